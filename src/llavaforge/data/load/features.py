"""Kept features: what a frozen vision tower makes of each image, computed once and read from then on.

Comes in: features, image by image. Goes out: the same bytes, in any process of the host.

A file has a slot for each distinct image of a data set:

    CRC-32 (8 bytes) | features (P, D) in the type that is computed in

A slot is written in place and proves by its sum that it is whole. So nothing else has to say what is there: what was
never written, cut off by a kill or damaged since is computed again, and all processes may write at the same time.

Legend: P image tokens, D tower width.
"""

import hashlib
import os
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from llavaforge.data.index.index import DataSetIndex, SampleIndex
from llavaforge.data.storage import archives
from llavaforge.files import naming

_SUM_BYTES = 8


@dataclass(frozen=True)
class FeatureFile:
    """The features of a data set's distinct images.

    Attributes:
        path: of the file; another process opens it by this name.
        num_slots: number of images that have a place in it.
        shape: (P, D) of one image's features.
        dtype: theirs.
    """

    path: Path
    num_slots: int
    shape: tuple[int, int]
    dtype: torch.dtype

    def __getstate__(self) -> dict[str, Any]:  # a worker process opens the file itself
        return {name: value for name, value in vars(self).items() if name != "_file"}

    @property
    def slot_bytes(self) -> int:
        """Bytes that one image takes."""
        return _SUM_BYTES + self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the file takes already; slots that were never written take none."""
        return os.fstat(self._file.fileno()).st_blocks * 512  # stat(2): in units of 512, whatever the disk's blocks are

    def open(self) -> None:
        """Open the file, or make it, and give it its size."""
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            size = self.num_slots * self.slot_bytes
            if os.fstat(self._file.fileno()).st_size < size:
                self._file.truncate(size)

    def close(self) -> None:
        """Close the file; memory that no process holds any more is freed."""
        self._file.close()

    def read(self, slot: int) -> torch.Tensor | None:
        """Return the features of an image, (P, D), or None when they are not there or not whole."""
        content = bytearray(self.slot_bytes)
        try:
            if os.preadv(self._file.fileno(), [content], slot * len(content)) != len(content):
                return None
        except OSError:
            return None
        if int.from_bytes(content[:_SUM_BYTES], "little") != zlib.crc32(memoryview(content)[_SUM_BYTES:]):
            return None
        return torch.frombuffer(content, dtype=self.dtype, offset=_SUM_BYTES).view(self.shape)

    def write(self, slot: int, features_PD: torch.Tensor) -> None:
        """Put the features of an image in their place."""
        assert (features_PD.shape, features_PD.dtype) == (self.shape, self.dtype), features_PD
        data = features_PD.contiguous().view(torch.uint8).numpy().tobytes()
        content = memoryview(zlib.crc32(data).to_bytes(_SUM_BYTES, "little") + data)
        at = slot * len(content)
        with naming(self.path):
            while content:  # a disk that is nearly full takes a part
                written = os.pwrite(self._file.fileno(), content, at)
                content, at = content[written:], at + written

    @cached_property
    def _file(self) -> BinaryIO:
        with naming(self.path):
            return open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """The kept features of an index.

    Attributes:
        index: whose images they are of.
        files: one for each of its data sets.
        starts: where each row's images begin in `slots`; one more than there are rows.
        slots: the slot of each image of each row, those of all files numbered one file after the other.
    """

    index: SampleIndex
    files: tuple[FeatureFile, ...]
    starts: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, index: SampleIndex, files: Sequence[FeatureFile], slots: Sequence[npt.NDArray[np.int64]]
    ) -> "ImageFeatures":
        """Put the files of an index's data sets together; `slots` as `distinct_images` gives them for each."""
        bases = [0, *accumulate(file.num_slots for file in files)]
        every = np.concatenate([base + mine for base, mine in zip(bases, slots, strict=False)])
        return cls(index, tuple(files), np.concatenate([[0], np.cumsum(index.num_images)]), every)

    def slots_of(self, number: int) -> list[int]:
        """Return the slots of a row's images, in their order."""
        return self.slots[self.starts[number] : self.starts[number + 1]].tolist()

    def of_row(self, number: int) -> list[torch.Tensor] | None:
        """Return the features of a row's images, (P, D) each, or None when those of one are not there."""
        found = [self.read(slot) for slot in self.slots_of(number)]
        whole = [features_PD for features_PD in found if features_PD is not None]
        return whole if len(whole) == len(found) else None

    def blank(self) -> torch.Tensor:
        """Return features for an image that no supervised token sees."""
        return torch.zeros(self.files[0].shape, dtype=self.files[0].dtype)

    def read(self, slot: int) -> torch.Tensor | None:
        """Return the features in a slot, as `FeatureFile.read`."""
        file, own = self._place(slot)
        return file.read(own)

    def write(self, slot: int, features_PD: torch.Tensor) -> None:
        """Put features into a slot, as `FeatureFile.write`."""
        file, own = self._place(slot)
        file.write(own, features_PD)

    def _place(self, slot: int) -> tuple[FeatureFile, int]:
        number = bisect_right(self._bases, slot) - 1
        return self.files[number], slot - self._bases[number]

    @cached_property
    def _bases(self) -> list[int]:
        return [0, *accumulate(file.num_slots for file in self.files)][:-1]


def distinct_images(data_set: DataSetIndex) -> tuple[npt.NDArray[np.int64], int, str]:
    """Number the distinct images of a data set.

    Returns:
        The number of each image of each row, how many there are, and a digest of what they are: of an image file its
        size, times and inode, of an archive or a table its own fingerprint, of an image within a row its text.
    """
    encoded = data_set.image_paths().dictionary_encode().combine_chunks()
    names: list[str] = encoded.dictionary.to_pylist()
    containers = [path for path in data_set.source.images.containers if path.is_file()]
    digest = hashlib.sha256()
    for path in containers:
        digest.update(f"{archives.fingerprint(path)} {_state(str(path))}\0".encode())
    with ThreadPoolExecutor() as pool:  # on a network drive each takes a millisecond
        for name, state in zip(names, pool.map(_state, names), strict=True):
            digest.update(f"{name}\0{state}\0".encode("utf-8", "surrogatepass"))
    return encoded.indices.to_numpy().astype(np.int64), len(names), digest.hexdigest()


def _state(path: str) -> str:
    """Return what changes with a file's content; empty where there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the place in an archive, or the text of an image
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
