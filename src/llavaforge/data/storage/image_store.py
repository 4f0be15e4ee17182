"""Image files where they are: a folder, a zip, a tar, a Parquet or Arrow column, or a row itself. Nothing is unpacked.

Comes in: names from records when data is prepared (`locate`), locations when a training step reads (`read`).

A location is found once and kept in the index, so a loader worker needs no directory of an archive: for the 595,375
images of CC3M that directory would cost every worker 300 MB and 5 s.
"""

import base64
import binascii
import os
import posixpath
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llavaforge.data.faults import RecordError
from llavaforge.data.storage import archives, columns
from llavaforge.data.storage.image_ref import ImageRef, short
from llavaforge.errors import UserError

ARCHIVES = (".zip", ".tar")
_LONGEST_NAME = 4096  # PATH_MAX of Linux
_NEAR_SUFFIXES = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff")
_MOST_OPEN_FILES = 64  # per process; a WebDataset may have ten thousand shards


@dataclass(frozen=True)
class ImageStore:
    """The images of one data set.

    Attributes:
        containers: the image root first (a folder, a .zip or a .tar, for images given by name), then the files of the
            data set that hold images themselves (tars, Parquet, Arrow).
        cache_dir: where the directories of archives are kept.
        allowed: real paths of further folders that links in the root may lead to (`image_roots`).
        image_column: name of the image column in Parquet and Arrow files; None: found by its type.
    """

    containers: tuple[Path, ...]
    cache_dir: Path
    allowed: tuple[str, ...] = ()
    image_column: str | None = None

    def __getstate__(self) -> dict[str, Any]:  # without the table of an archive: a worker maps it itself
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def root(self) -> Path:
        """Where images given by name are."""
        return self.containers[0]

    def locate(self, ref: ImageRef) -> ImageRef:
        """Return where an image is, without reading it.

        Raises:
            RecordError: it is outside the root, or not there.
        """
        if ref.container >= 0 or ref.name.startswith("data:"):
            return ref
        name = safe_name(ref.name)
        if (found := self._find(name, ref.name)) is not None:
            return found
        # macOS writes names with the accents apart from their letters, which look the same.
        for form in ("NFC", "NFD"):
            other = unicodedata.normalize(form, name)
            if other != name and (found := self._find(other, other)) is not None:
                return found
        near = next((other for other in _near(name) if self._find(other, other) is not None), None)
        hint = f" {short(near)!r} is there: name that." if near else " Add the file or remove the row."
        message = f"image {short(ref.name)!r} is not in {self.root}.{hint}"
        raise RecordError("missing_image", message, short(ref.name))

    def _find(self, name: str, called: str) -> ImageRef | None:
        if self.root.suffix not in ARCHIVES:
            return ImageRef(called, 0) if self._is_file(name) else None
        location = archives.find(self._members, name) or archives.find(self._members, f"images/{name}")
        return ImageRef(called, 0, *location) if location is not None else None

    def read(self, ref: ImageRef) -> bytes:
        """Return the bytes of an image.

        Args:
            ref: as `locate` gave it.

        Raises:
            RecordError: it is not there any more.
        """
        if ref.name.startswith("data:"):
            return _inline(ref.name)
        path = self.containers[ref.container]
        try:
            if path.suffix == ".zip":
                return archives.read_zip_member(_opened(path), ref.offset, ref.size, ref.crc)
            if path.suffix == ".tar":
                return archives.read_at(_opened(path), ref.offset, ref.size)
            if path.suffix in columns.SUFFIXES:
                return columns.read_image(path, ref.offset, ref.size, self.image_column)
            return self._read_file(safe_name(ref.name))
        except RecordError:
            raise
        except (OSError, ValueError, LookupError, zlib.error) as error:
            raise RecordError("missing_image", f"{self.name(ref)}: cannot be read ({error}).", ref.name) from None

    def name(self, ref: ImageRef) -> str:
        """Return what messages call an image."""
        if ref.name.startswith("data:"):
            return "inline image"
        path = self.containers[max(ref.container, 0)]
        return f"{path} row {ref.offset}" if path.suffix in columns.SUFFIXES else str(path / ref.name)

    def _is_file(self, name: str) -> bool:
        path = os.path.join(self._real_root, name)
        if not os.path.isfile(path) or len(name) > _LONGEST_NAME:
            return False
        self._check_inside(path, name)
        return True

    def _read_file(self, name: str) -> bytes:
        path = os.path.join(self._real_root, name)
        self._check_inside(path, name)
        with open(path, "rb", buffering=0) as file:
            archives.check_size(os.fstat(file.fileno()).st_size)
            return file.read()

    def _check_inside(self, path: str, name: str) -> None:
        real = os.path.realpath(path)
        folders = (self._real_root, *self._hub_blobs, *self.allowed)
        if not any(real.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders):
            raise RecordError(
                "unsafe_path",
                f"{path} is a link out of its folder, to {real}. image_roots allows the folders that you name.",
                name,
            )

    @cached_property
    def _hub_blobs(self) -> list[str]:
        """Where the hub's cache keeps the files that a data set's folder (`snapshots/<commit>`) only links to."""
        return [
            str(folder.parent / "blobs")
            for folder in Path(self._real_root).parents
            if folder.name == "snapshots" and (folder.parent / "blobs").is_dir()
        ]

    @cached_property
    def _real_root(self) -> str:
        return os.path.realpath(self.root)

    @cached_property
    def _members(self) -> npt.NDArray[np.void]:
        return archives.members(self.root, self.cache_dir)


def find_image_root(images: Path | None, folder: Path) -> Path:
    """Return where images given by name are: `images`, or `images/`, `images.zip`, `images.tar` of a folder, or itself.

    Raises:
        UserError: `images` is neither a folder nor an archive.
    """
    if images is not None:
        if not images.is_dir() and not (images.is_file() and images.suffix in ARCHIVES):
            hint = " Compressed tars cannot be read in place: unpack it." if images.suffix in (".gz", ".tgz") else ""
            raise UserError(f"{images}: no such folder of images. Give a folder, a .zip or a .tar.{hint}")
        return images
    candidates = [folder / "images", *(folder / f"images{suffix}" for suffix in ARCHIVES)]
    return next((candidate for candidate in candidates if candidate.exists()), folder)


def safe_name(name: str) -> str:
    """Return a relative file name without detours.

    Raises:
        RecordError: it is absolute or climbs out of its folder.
    """
    path = posixpath.normpath(name.replace("\\", "/")) if "\\" in name else posixpath.normpath(name)
    if "\0" in name or posixpath.isabs(path) or path.split("/")[0] == ".." or path[1:2] == ":":
        raise RecordError(
            "unsafe_path",
            f"image {short(name)!r} is not a name below the image folder. Give a relative path without `..`.",
            short(name),
        )
    return path


def _near(name: str) -> Iterator[str]:
    """Yield names that a download may have given an image instead: another suffix, or its letters in another case."""
    stem, _ = posixpath.splitext(name)
    for suffix in _NEAR_SUFFIXES:
        yield from (f"{stem}.{suffix}", f"{stem}.{suffix.upper()}")
    yield from (name.lower(), name.upper())


def _inline(uri: str) -> bytes:
    header, _, data = uri.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError("no base64")
        return base64.b64decode("".join(data.split()), validate=True)
    except (ValueError, binascii.Error) as error:
        raise RecordError(
            "not_an_image", f"inline image {uri[:40]!r}: {error}. Write base64 after the comma."
        ) from None


def close_files() -> None:
    """Forget opened files: they may have changed since."""
    _opened.cache_clear()
    columns.close_files()


@lru_cache(maxsize=_MOST_OPEN_FILES)
def _opened(path: Path) -> archives.OpenFile:
    return archives.OpenFile(path)
