"""Single files: replaced whole or not at all, ours told from the user's, remembered by their sums.

Comes in: a path and what is to stand there. Goes out: the file. Imports no torch.
"""

import hashlib
import json
import logging
import math
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from llavaforge.errors import UserError

PREFIX = ".llavaforge"  # of temporary names, before the machine, the process and what they are; and of locks
NEW = "new"
_SUM_DIGITS = 64

# How Rust's libraries (safetensors, tokenizers) and Arrow print an errno.
_NUMBER = re.compile(r"(?:\(os error |\[[Ee]rrno )(\d+)")

logger = logging.getLogger(__name__)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a system's error the name of what was being written or read.

    A full disk's lacks one; others' may be of a temporary file, of which the user knows nothing.

    Raises:
        OSError: with `path` as its file name.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = (error.errno if isinstance(error, OSError) else None) or _system_number(error)
        named = getattr(error, "filename", None)
        if number is None or (named is not None and not _is_temporary(Path(os.fsdecode(named)))):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def check_own(path: Path, own: str) -> None:
    """Check that a file may be written: that none is there, or an empty one, or one that llavaforge wrote.

    Args:
        path: as the user named it.
        own: a regular expression; what llavaforge writes there begins so.

    Raises:
        UserError: something else is there, or nothing can be written there.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Name a file.")
    above = next(folder for folder in real_path(path).parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{above}: is a file, and {path} would be below it. Give another name.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{above}: cannot be written to, so {path} cannot. Change that, or give another name.")
    if not path.is_file():
        return
    with path.open("rb") as file:
        beginning = file.read(4096).decode("utf-8", "replace")
    if beginning and not re.match(own, beginning):
        raise UserError(
            f"{path}: is there already, and llavaforge did not write it, so it is not replaced. "
            "Move it, or give another name."
        )


def replace_text(path: Path, text: str, own: str | None = None) -> None:
    """Replace a file's text atomically.

    Args:
        path: the file; its folder is made when there is none.
        text: all of it.
        own: of a file that the user named, see `check_own`.

    Raises:
        UserError: another's file is there.
    """
    replace_bytes(path, text.encode("utf-8", "backslashreplace"), own)


def replace_bytes(path: Path, content: bytes, own: str | None = None) -> None:
    """Replace a file's content, as `replace_text`."""
    if own is not None:
        check_own(path, own)
    path = real_path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # /dev/stdout
            path.write_bytes(content)
            return
        temporary = temporary_path(path, NEW)
        try:
            temporary.write_bytes(content)
            sync_path(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_path(path.parent)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append an object to a .jsonl file, as a whole line or not at all (but for a kill of the machine)."""
    with naming(path), path.open("ab", buffering=0) as file:
        file.write(to_json(value).encode() + b"\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file of ours, empty when there is none; lines that a kill cut are left out."""
    lines: list[dict[str, Any]] = []
    damaged = 0
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            lines.append(value)
        else:
            damaged += bool(line.strip())
    if damaged:
        logger.warning("%s: left out %d damaged lines", path, damaged)
    return lines


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON that every reader takes: numbers that are not finite become null (JSON has none of them)."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def real_path(path: Path) -> Path:
    """Return where a path leads through its links; of a link that leads to itself, the path as it is."""
    return Path(os.path.realpath(path))


def is_inside(name: str) -> bool:
    """Say whether a relative file name stays below its folder."""
    return not (Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name)


def cache_dir(chosen: Path | str | None = None) -> Path:
    """Return where prepared data, and sums of large files, are kept."""
    return Path(chosen or os.environ.get("LLAVAFORGE_CACHE") or Path("~/.cache/llavaforge").expanduser())


def remembered_sha256(path: Path, cache: Path) -> str:
    """Return a file's SHA-256, remembered by size, times and inode: a gigabyte takes a second or more.

    Args:
        path: the file.
        cache: folder of the cache; where it cannot be written, nothing is remembered.
    """
    status = path.stat()
    key = [str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    known = cache / "contents" / hashlib.sha256(json.dumps(key).encode()).hexdigest()
    with suppress(OSError):
        if len(text := known.read_text(errors="replace")) == _SUM_DIGITS:
            return text
    digest = sha256(path)
    with suppress(OSError):
        known.parent.mkdir(parents=True, exist_ok=True)
        replace_text(known, digest)
    return digest


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


def temporary_path(destination: Path, kind: str) -> Path:
    """Return a sibling's name that tells whose it is, so that only those of dead processes are ever removed."""
    return destination.with_name(f"{PREFIX}-{machine()}-{os.getpid()}-{kind}-{destination.name}")


@cache
def machine() -> str:
    """Identify what process numbers belong to: a host, and in a container its own space of numbers."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        space = 0
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _is_temporary(path: Path) -> bool:
    return any(part.startswith(PREFIX) for part in path.parts)


def _system_number(error: Exception) -> int | None:
    match = _NUMBER.search(str(error))
    return int(match[1]) if match else None
