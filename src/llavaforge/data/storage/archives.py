"""Zip and tar files as random access: where each member's bytes are, found once and kept in a small mapped file.

Comes in: an archive. Goes out: a table of its members, and the bytes of one. Nothing is unpacked, and names inside an
archive never become paths.

A row of the table: hash of the name, offset, size, CRC-32: 32 bytes a member, sorted by the hash.
"""

import hashlib
import os
import posixpath
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from llavaforge.errors import UserError

_TABLE = np.dtype([("hash", "<u8"), ("offset", "<i8"), ("size", "<i8"), ("crc", "<i8")])
_NO_CRC = -1
MAX_BYTES = 256_000_000  # of one image file or text: a hundredfold of the largest photographs
_EDGE = 1 << 20  # bytes of an archive's either end that identify it, with its size and time
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_STORED, _DEFLATED, _ENCRYPTED = 0, 8, 1
_TAR_END = bytes(tarfile.BLOCKSIZE)


class OpenFile:
    """A file to read at any place, from any thread or forked process; closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)
        self.fileno = self._file.fileno()


def find(members: npt.NDArray[np.void], name: str) -> tuple[int, int, int] | None:
    """Return (offset, size, CRC-32 or -1) of a member, or None when there is none of that name."""
    key = _hash(name)
    row = int(np.searchsorted(members["hash"], key))
    if row == len(members) or members["hash"][row] != key:
        return None
    found = members[row]
    return int(found["offset"]), int(found["size"]), int(found["crc"])


def members(path: Path, cache_dir: Path) -> npt.NDArray[np.void]:
    """Return the table of an archive's members, from the cache when it was seen before.

    Raises:
        UserError: the file is not a readable zip or tar.
    """
    cached = cache_dir / f"{path.stem}-{fingerprint(path)[:16]}.members.npy"
    if not cached.is_file():
        entries = list(_zip_entries(path) if path.suffix == ".zip" else _tar_entries(path))
        table = np.array(entries, dtype=_TABLE)
        table.sort(order="hash", kind="stable")
        cache_dir.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache_dir, suffix=".tmp.npy")
        with os.fdopen(handle, "wb") as file:
            np.save(file, table)
        os.replace(temporary, cached)
    found: npt.NDArray[np.void] = np.load(cached, mmap_mode="r" if cached.stat().st_size > 4096 else None)
    return found


def fingerprint(path: Path) -> str:
    """Identify a large file by its size, time and both ends (a zip's directory and a Parquet's footer are there)."""
    status = path.stat()
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with open(path, "rb") as file:
        digest.update(file.read(_EDGE))
        file.seek(max(0, status.st_size - _EDGE))
        digest.update(file.read(_EDGE))
    return digest.hexdigest()


def check_size(size: int) -> None:
    """Check that an image file, or a text in an archive, may be read into memory.

    Raises:
        ValueError: it may not.
    """
    if size > MAX_BYTES:
        raise ValueError(f"over {MAX_BYTES:,} bytes")


def read_at(file: OpenFile, offset: int, size: int) -> bytes:
    """Return bytes of a file.

    Raises:
        OSError: the file ends before.
        ValueError: they are too many.
    """
    check_size(size)
    data = os.pread(file.fileno, size, offset)
    while len(data) < size and (more := os.pread(file.fileno, size - len(data), offset + len(data))):
        data += more
    if len(data) < size:
        raise OSError(f"{file.path} ends {size - len(data)} bytes too early")
    return data


def read_zip_member(file: OpenFile, offset: int, size: int, crc: int) -> bytes:
    """Return the contents of a zip's member, checked against its CRC-32.

    `offset` is that of the member's local header, `size` that of its (compressed) bytes.

    Raises:
        ValueError: not the member that was there, encrypted, or compressed in a way other than deflate.
    """
    header = _LOCAL.unpack(read_at(file, offset, _LOCAL.size))
    signature, _, flags, method, *_, name_length, extra_length = header
    if signature != b"PK\x03\x04":
        raise ValueError(f"{file.path} has changed: no member at byte {offset}")
    if flags & _ENCRYPTED or method not in (_STORED, _DEFLATED):
        raise ValueError(f"{file.path}: a member is encrypted or uses compression method {method}: pack it again")
    data = read_at(file, offset + _LOCAL.size + name_length + extra_length, size)
    if method == _DEFLATED:
        unpacked = zlib.decompressobj(-zlib.MAX_WBITS)
        data = unpacked.decompress(data, MAX_BYTES)
        if not unpacked.eof:
            raise ValueError(f"{file.path}: the member at byte {offset} is cut, or grows past {MAX_BYTES:,} bytes")
    if zlib.crc32(data) != crc:
        raise ValueError(f"{file.path}: the member at byte {offset} is damaged (CRC-32)")
    return data


def _hash(name: str) -> int:
    """Return 64 bits of a name: among 100 million, two are equal with a probability of 0.03 %."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _tar_entries(path: Path) -> Iterator[tuple[int, int, int, int]]:
    with open(path, "rb") as file:
        for member in tar_members(path, file):
            yield _hash(posixpath.normpath(member.name)), member.offset_data, member.size, _NO_CRC


def tar_members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an uncompressed tar.

    Raises:
        UserError: it is not one.
    """
    try:
        with tarfile.open(path, "r:", file) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                if member.isreg():
                    yield member
            file.seek(archive.offset)  # `tarfile` takes any block it cannot read for the end
            if file.read(tarfile.BLOCKSIZE) != _TAR_END:
                raise ValueError(f"damaged or cut off at byte {archive.offset}")
    except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
        raise UserError(f"{path}: not a readable, uncompressed tar ({error}). Download or pack it again.") from None


def _zip_entries(path: Path) -> Iterator[tuple[int, int, int, int]]:
    file_size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name, offset, size = member.orig_filename, member.header_offset, member.compress_size
                if not 0 <= offset <= file_size - size:
                    raise ValueError("its directory is damaged")
                if not name.endswith("/"):
                    yield _hash(posixpath.normpath(name)), offset, size, member.CRC
    except (OSError, ValueError, OverflowError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable zip ({error}). Download or pack it again.") from None
