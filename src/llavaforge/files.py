"""Publish a folder atomically: either all of it is there under its name, or nothing is.

Comes in: a function that fills a folder. Goes out: the folder under its final name, with a manifest
of sizes and SHA-256 sums. Imports no torch, so that a test can
inject a fault at every system call and still be quick.

The order is the whole point: fill a temporary sibling, write the manifest, fsync every file and the folder,
rename, fsync the parent. A kill at any moment leaves the old state or the new one.

What is deleted or replaced is proved to be ours: by a manifest, or by a name with our prefix and the number of a
process that is gone.
"""

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_PREFIX = ".llavaforge"  # of temporary names, before the machine, the process and what they are
_NEW, _OLD = "new", "old"


@contextmanager
def publishing(
    destination: Path, entries: dict[str, dict[str, Any]] | None = None, overwrite: bool = False
) -> Iterator[Path]:
    """Give a temporary sibling folder to fill; publish it as `destination` when the block ends well.

    If the block raises, the temporary folder is removed and nothing is published.

    Args:
        destination: a path that does not exist yet (or an empty folder).
        entries: manifest entries of files that others wrote, flushed and summed (`entry_of`); filled within the block.
        overwrite: replace a published folder, once the new one is complete.

    Raises:
        FileExistsError: `destination` exists and is not empty, or with `overwrite` holds what was not published.
    """
    destination = destination.resolve()
    _check_replaceable(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(destination.parent, destination.name)
    temporary = _temporary(destination, _NEW)
    temporary.mkdir()
    try:
        yield temporary
        _open_to_readers(temporary)
        write_manifest(temporary, entries or {})
        _sync_tree(temporary, entries or {})
        _check_replaceable(destination, overwrite)  # once more: the block may have taken hours
        old = _temporary(destination, _OLD)
        if destination.exists() and any(destination.iterdir()):
            os.rename(destination, old)  # killed after this, the next `remove_leftovers` puts it back
        elif destination.exists():
            destination.rmdir()
        os.rename(temporary, destination)
        sync_path(destination.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_replaceable(destination: Path, overwrite: bool) -> None:
    if destination.exists() and any(destination.iterdir()) and (not overwrite or not_published(destination)):
        raise FileExistsError(f"{destination} is not empty")


def not_published(folder: Path) -> list[str]:
    """Return what of a folder its manifest does not prove to be published: paths below it, or that it has no manifest.

    Names and sizes are compared. Whatever is not in the list may be deleted.
    """
    try:
        entries = read_manifest(folder)
    except (OSError, ValueError):
        return [f"no readable {MANIFEST}"]
    known = {MANIFEST, *entries, *(parent.as_posix() for name in entries for parent in Path(name).parents)}
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    sizes = {name: path.lstat().st_size for name, path in found.items() if name in entries}
    return [name for name in found if name not in known or (name in sizes and sizes[name] != entries[name]["bytes"])]


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a published folder's manifest, by path below it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a manifest.
    """
    content = json.loads((folder / MANIFEST).read_text())
    entries = content.get("files") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(one, dict) and "bytes" in one for one in entries.values()):
        raise ValueError("no list of files")
    return entries


def write_manifest(folder: Path, known: Mapping[str, dict[str, Any]]) -> None:
    """Write `manifest.json`: size in bytes and SHA-256 of every other file below `folder`.

    Args:
        folder: complete but for the manifest.
        known: entries that are there already, by path.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    unknown = [name for name in paths if name not in known]
    with ThreadPoolExecutor() as pool:
        found = dict(zip(unknown, pool.map(lambda name: entry_of(paths[name]), unknown), strict=True))
    entries = {name: known[name] if name in known else found[name] for name in paths}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n")


def entry_of(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def differences(folder: Path, share: int = 0, num_shares: int = 1) -> list[str]:
    """Compare a published folder with its manifest.

    Args:
        folder: published.
        share: which part of the files to look at, when several processes divide the work.
        num_shares: number of parts.

    Returns:
        One line per difference (missing manifest, missing file, other size, other content); empty when all is well.
    """
    try:
        entries = read_manifest(folder)
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: unreadable ({error})"]
    mine = sorted(entries.items())[share::num_shares]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: _difference(folder / item[0], item[1]), mine)
        return [difference for difference in found if difference]


def fingerprint(folder: Path) -> str:
    """Identify a model folder by the content of its weights, config and tokenizer.

    A published folder's manifest saves reading the weights again.
    """
    known = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".bin") or path.name in ("config.json", "tokenizer.json")
    )
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda name: known[name]["sha256"] if name in known else sha256(folder / name), names)
    return hashlib.sha256("".join(f"{n} {s}\n" for n, s in zip(names, sums, strict=True)).encode()).hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Replace a small file's text atomically (used for the `latest` pointer)."""
    temporary = _temporary(path, _NEW)
    temporary.write_text(text)
    sync_path(temporary)
    os.replace(temporary, path)
    sync_path(path.parent)


def remove_leftovers(parent: Path, name: str = "") -> None:
    """Remove what processes of this machine that were killed while they wrote have left in `parent`.

    A folder that was moved aside for a new one that never came is put back. Anything whose name is not wholly ours, or
    whose process is alive or elsewhere, stays.

    Args:
        parent: an existing folder.
        name: of the file or folder that was being written; empty for all.
    """
    pattern = re.compile(rf"{_PREFIX}-{_machine()}-(\d+)-({_NEW}|{_OLD})-({re.escape(name) or '.+'})")
    found = [match for path in parent.iterdir() if (match := pattern.fullmatch(path.name))]
    for match in sorted(found, key=lambda match: match[2] == _NEW):  # old ones first
        leftover, destination = parent / match[0], parent / match[3]
        if int(match[1]) != os.getpid() and _is_running(int(match[1])):
            continue
        if match[2] == _OLD and not destination.exists():
            os.rename(leftover, destination)
        elif leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _temporary(destination: Path, kind: str) -> Path:
    return destination.with_name(f"{_PREFIX}-{_machine()}-{os.getpid()}-{kind}-{destination.name}")


@cache
def _machine() -> str:
    """Identify what process numbers belong to: a host, and in a container its own space of numbers."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        space = 0
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; not a number of ours
        return True
    return True


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _difference(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name}: missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name}: {path.stat().st_size} bytes instead of {entry['bytes']}"
    if sha256(path) != entry["sha256"]:
        return f"{path.name}: content differs from its SHA-256"
    return None


def _open_to_readers(folder: Path) -> None:
    """Let every file be read by whom the folder lets in: safetensors makes its files private."""
    mode = folder.stat().st_mode & 0o666
    for path in _files(folder):
        path.chmod(mode)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _sync_tree(folder: Path, done: Mapping[str, dict[str, Any]]) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.relative_to(folder).as_posix() not in done:
            sync_path(path)
