"""Publish a folder atomically: either all of it is there under its name, or nothing is.

Comes in: a function that fills a folder. Goes out: the folder under its final name, with a manifest
of sizes and SHA-256 sums. Called by every writer of checkpoints and model folders. Imports no torch, so that a test can
inject a fault at every system call and still be quick.

The order is the whole point: fill a temporary sibling, write the manifest, fsync every file and the folder,
rename, fsync the parent. A kill at any moment leaves the old state or the new one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"


@contextmanager
def publishing(destination: Path, entries: dict[str, dict[str, Any]] | None = None) -> Iterator[Path]:
    """Give a temporary sibling folder to fill; publish it as `destination` when the block ends well.

    If the block raises, the temporary folder is removed and nothing is published.

    Args:
        destination: a path that does not exist yet (or an empty folder).
        entries: manifest entries of files that others wrote, flushed and summed (`entry_of`); filled within the block.

    Raises:
        FileExistsError: `destination` exists and is not empty; a published folder is never written again.
    """
    destination = destination.absolute()
    if destination.exists() and any(destination.iterdir()):
        raise FileExistsError(f"{destination} is already published")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.parent / f"{_TEMPORARY}{os.getpid()}-{destination.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _open_to_readers(temporary)
        write_manifest(temporary, entries or {})
        _sync_tree(temporary, entries or {})
        if destination.exists():
            destination.rmdir()
        os.rename(temporary, destination)
        sync_path(destination.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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


def faults(folder: Path, share: int = 0, num_shares: int = 1) -> list[str]:
    """Compare a published folder with its manifest.

    Args:
        folder: published.
        share: which part of the files to look at, when several processes divide the work.
        num_shares: number of parts.

    Returns:
        One line per fault (missing manifest, missing file, other size, other content); empty when all is well.
    """
    try:
        entries: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{MANIFEST}: unreadable ({error})"]
    mine = sorted(entries.items())[share::num_shares]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: _fault(folder / item[0], item[1]), mine)
        return [fault for fault in found if fault]


def fingerprint(folder: Path) -> str:
    """Identify a model folder by the content of its weights, config and tokenizer.

    A published folder's manifest saves reading the weights again.
    """
    known: dict[str, dict[str, Any]] = {}
    if (folder / MANIFEST).is_file():
        known = json.loads((folder / MANIFEST).read_text())["files"]
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
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    temporary.write_text(text)
    sync_path(temporary)
    os.replace(temporary, path)
    sync_path(path.parent)


def remove_leftovers(parent: Path) -> None:
    """Remove the temporary folders that a killed process left in `parent`."""
    for leftover in parent.glob(f"{_TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


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


def _fault(path: Path, entry: dict[str, Any]) -> str | None:
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
