"""Publish a folder atomically: either all of it is there under its name, or nothing is.

Comes in: a function that fills a folder. Goes out: the folder under its final name, with a manifest
of sizes and SHA-256 sums. Imports no torch, so that a test can
inject a fault at every system call and still be quick.

The order is the whole point: fill a temporary sibling, write the manifest, fsync every file and the folder,
rename, fsync the parent. A kill at any moment leaves the old state or the new one.

What is deleted or replaced is proved to be ours: by a manifest, by a name with our prefix and the number of a process
that is gone. What is damaged is moved aside, not deleted.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from llavaforge.files import (
    NEW,
    PREFIX,
    cache_dir,
    is_inside,
    machine,
    naming,
    real_path,
    remembered_sha256,
    sha256,
    sync_path,
    temporary_path,
)

MANIFEST = "manifest.json"
_OLD = "old"


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
    destination = real_path(destination)
    _check_replaceable(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(destination.parent, destination.name)
    temporary = temporary_path(destination, NEW)
    with naming(destination):
        temporary.mkdir()
    try:
        with naming(destination):
            yield temporary
        _open_to_readers(temporary)
        write_manifest(temporary, entries or {})
        _sync_tree(temporary, entries or {})
        _check_replaceable(destination, overwrite)  # once more: the block may have taken hours
        old = temporary_path(destination, _OLD)
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
    content = json.loads((folder / MANIFEST).read_bytes())
    entries = content.get("files") if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise ValueError("no list of files")
    for name, entry in entries.items():
        whole = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        if not whole or not is_inside(name):
            raise ValueError(f"no entry of a file: {name!r:.100}")
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

    Raises:
        OSError: a file is there and cannot be read just now; whether it is sound is not known.
    """
    try:
        entries = read_manifest(folder)
    except (FileNotFoundError, NotADirectoryError):
        return [f"{MANIFEST}: missing"]
    except (ValueError, RecursionError) as error:
        return [f"{MANIFEST}: damaged ({error})"]
    mine = sorted(entries.items())[share::num_shares]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: _difference(folder / item[0], item[1]), mine)
        return [difference for difference in found if difference]


def fingerprint(folder: Path) -> str:
    """Identify a model folder by the content of its weights, config and tokenizer.

    A published folder's manifest saves reading weights again that have its size and are not newer than it.
    """
    known: dict[str, dict[str, Any]] = {}
    with suppress(OSError, ValueError):
        known = read_manifest(folder)
    written_ns = (folder / MANIFEST).stat().st_mtime_ns if known else 0
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".bin") or path.name in ("config.json", "tokenizer.json")
    )

    def content(path: Path) -> str:
        status, entry = path.stat(), known.get(path.name)
        if entry is not None and status.st_size == entry["bytes"] and status.st_mtime_ns <= written_ns:
            return str(entry["sha256"])
        return remembered_sha256(path, cache_dir())

    with ThreadPoolExecutor() as pool:
        sums = pool.map(content, paths)
    lines = (f"{path.name} {one}\n" for path, one in zip(paths, sums, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def set_aside(folder: Path, why: str = "corrupt") -> Path:
    """Rename a folder, so that its name is free and nothing of it is lost; return its new name, which says why."""
    names = (folder.with_name(f"{folder.name}.{why}{f'-{number}' * (number > 1)}") for number in count(1))
    return folder.rename(next(name for name in names if not os.path.lexists(name)))


def remove_leftovers(parent: Path, name: str = "") -> None:
    """Remove what processes of this machine that were killed while they wrote have left in `parent`.

    A folder that was moved aside for a new one that never came is put back. Anything whose name is not wholly ours, or
    whose process is alive or elsewhere, stays.

    Args:
        parent: an existing folder.
        name: of the file or folder that was being written; empty for all.
    """
    pattern = re.compile(rf"{PREFIX}-{machine()}-(\d+)-({NEW}|{_OLD})-({re.escape(name) or '.+'})")
    found = [match for path in parent.iterdir() if (match := pattern.fullmatch(path.name))]
    for match in sorted(found, key=lambda match: match[2] == NEW):  # old ones first
        leftover, destination = parent / match[0], parent / match[3]
        if int(match[1]) != os.getpid() and _is_running(int(match[1])):
            continue
        if match[2] == _OLD and not destination.exists():
            os.rename(leftover, destination)
        elif leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; not a number of ours
        return True
    return True


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
