"""Packs, made in worker processes in the plan's order.

Comes in: an index, preprocessing and an iterable of `MicroBatch`. Goes out: an iterator of `Pack`.
"""

import logging
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llavaforge.data.faults import Fault, RecordError
from llavaforge.data.index.index import Row, SampleIndex
from llavaforge.data.load.features import ImageFeatures
from llavaforge.data.load.pack import BadSample, Pack, make_pack
from llavaforge.data.order.plan import MicroBatch
from llavaforge.data.pixels.decode import ImageError, decode
from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.errors import RunFailed, UserError
from llavaforge.processes import workers
from llavaforge.processes.alarm import alarm

logger = logging.getLogger(__name__)

_PREFETCH = 4  # packs each worker keeps ready
_SHARED_MEMORY = Path("/dev/shm")
_MARGIN = 2  # later packs may have more images than the first


@dataclass(frozen=True)
class PackDataset(Dataset[Pack]):
    """Maps a micro-batch to its pack; the only place where images are read.

    Attributes:
        blank_image: give mid-grey pixels instead of the image (to measure what a model guesses blindly).
        masks_bad: mask a sample whose image cannot be read (`Pack.bad`), instead of raising.
        features: of the index's images, to give instead of their pixels.
    """

    index: SampleIndex
    preprocessing: Preprocessing
    image_token_id: int
    num_image_tokens: int
    blank_image: bool = False
    masks_bad: bool = False
    features: ImageFeatures | None = None

    def __getitem__(self, source: MicroBatch) -> Pack:
        rows = [self.index.row(number) for number in source.samples]
        images: list[Any] = []
        bad: list[BadSample] = []
        for number, row in zip(source.samples, rows, strict=True):
            try:
                images += self.pixels(row) if self.features is None else self._features(number, row, self.features)
            except BadImage as error:
                if not self.masks_bad:
                    raise UserError(str(error.fault)) from None
                images += [self.blank()] * len(row.images)
                bad.append(BadSample(number, int(self.index.num_supervised[number]), error.fault))
        return make_pack(rows, images, self.image_token_id, self.num_image_tokens, source, bad)

    def blank(self) -> np.ndarray | torch.Tensor:
        """Return what stands for an image that is not looked at: mid-grey pixels, or features."""
        return self.preprocessing.blank() if self.features is None else self.features.blank()

    def pixels(self, row: Row) -> list[np.ndarray]:
        """Return the pixels of a row's images: `uint8` (C, H, W) each.

        Raises:
            BadImage: one is missing or cannot be decoded.
        """
        pixels = []
        for number in range(len(row.images)):
            try:
                image = self.preprocessing(decode(*self.index.read_image(row, number)))
            except RecordError as error:
                raise BadImage(row.fault(error)) from None
            except ImageError as error:
                raise BadImage(row.fault(RecordError(error.kind, str(error), row.images[number].name))) from None
            pixels.append(self.preprocessing.blank() if self.blank_image else image)
        return pixels

    def _features(self, number: int, row: Row, features: ImageFeatures) -> list[torch.Tensor]:
        """Return the kept features of a row's images, (P, D) each.

        Raises:
            BadImage: there are none of an image since it cannot be read.
            RunFailed: there are none, though it can.
        """
        if (found := features.of_row(number)) is None:
            self.pixels(row)
            path = features.files[row.data_set].path
            raise RunFailed(f"{path}: the features of {row.where} were damaged while in use. They are computed anew.")
        return found


class BadImage(Exception):
    """A sample's image cannot be read."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class _ErrorsReturned(Dataset[Pack | UserError]):
    """Returns a `UserError` instead of raising it: torch would put a worker's traceback into its message."""

    def __init__(self, dataset: PackDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, source: MicroBatch) -> Pack | UserError:
        try:
            return self._dataset[source]
        except UserError as error:
            return error


def _raised(packs: Any, timeout_s: float) -> Iterator[Pack]:
    """Yield packs; a worker's fault, its death and its silence are raised."""
    while True:
        try:
            with alarm(timeout_s):
                pack = next(packs)
        except StopIteration:
            return
        except TimeoutError:
            loaders = getattr(packs, "_workers", ())
            if _signals_of(loaders):  # torch looks for dead ones every five seconds only
                raise _death(loaders) from None
            for worker in loaders:  # what waits for one that hangs goes on then
                worker.kill()
            raise RunFailed(
                f"no image came from the loader for {timeout_s:.0f} s (stuck_timeout_s): it hangs, as on a network "
                "drive that does not answer. Look at the image folder's file system."
            ) from None
        except (RuntimeError, ConnectionError, EOFError) as error:
            # A connection to a worker breaks when it dies while it hands a pack over, before torch sees it dead.
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            raise _death(packs._workers) from None
        if isinstance(pack, UserError):
            raise pack
        yield pack


def _signals_of(loaders: Iterable[Any]) -> set[int]:
    """Return the signals that ended some of the workers."""
    return {-code for worker in loaders if (code := worker.exitcode) is not None and code < 0}


def _death(loaders: Iterable[Any]) -> RunFailed:
    found = _signals_of(loaders)
    ended = " by " + ", ".join(signal.Signals(number).name for number in sorted(found)) if found else ""
    return RunFailed(
        f"a loader worker was ended{ended}. SIGKILL is most often the system, when memory is used up: lower "
        "--dataloader_num_workers or give the job more memory; SIGBUS is a full /dev/shm, or prepared data "
        "that was cut while it was in use."
    )


@contextmanager
def loading(
    dataset: PackDataset, order: Iterable[MicroBatch], num_workers: int, pin_memory: bool, timeout_s: float = 0
) -> Iterator[Iterator[Pack]]:
    """Give an iterator over the packs of `order`; the workers are gone when the block ends.

    Workers hand packs over in shared memory, of which a container has 64 MB by default: no more are kept ready than go
    in.

    Args:
        dataset: makes the packs.
        order: what to load, in this order whatever the number of workers.
        num_workers: processes (0: this one).
        pin_memory: put packs in page-locked memory, for a GPU.
        timeout_s: longest wait for workers (0: for ever).

    Raises:
        UserError: there is too little shared memory for one pack of each worker.
    """
    sources = iter(order)
    first = next(sources, None)
    keys: Iterable[MicroBatch] = chain([first], sources) if first is not None else ()
    prefetch = _prefetch(dataset, first, num_workers) if first is not None and num_workers else 1
    loader: DataLoader[Pack | UserError] = DataLoader(
        _ErrorsReturned(dataset),
        sampler=keys,  # any iterable of keys will do; a plan need not know its length
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if num_workers else None,
        multiprocessing_context=workers.context() if num_workers else None,
    )
    with workers.signals_blocked():
        iterator: Any = iter(loader)
    try:
        yield _raised(iterator, timeout_s)
    finally:
        if num_workers and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
            for worker in iterator._workers:  # one that hangs hears no SIGTERM, and would be waited for at the end
                worker.kill()


def _prefetch(dataset: PackDataset, first: MicroBatch, num_workers: int) -> int:
    """Return how many packs each worker may keep ready, by the images of the first one."""
    num_images = int(dataset.index.num_images[np.asarray(first.samples, dtype=np.int64)].sum())
    pack_bytes = _MARGIN * max(1, num_images) * dataset.blank().nbytes
    if not _SHARED_MEMORY.is_dir():  # not Linux: torch hands packs over in files
        return _PREFETCH
    free = shutil.disk_usage(_SHARED_MEMORY).free
    fits = free // (pack_bytes * num_workers)
    remedy = "A container gets more by `docker run --shm-size=8g` (or --ipc=host), in Kubernetes by an emptyDir there"
    told = f"{_SHARED_MEMORY}: {free / 1e6:,.0f} MB are free, and a pack of {num_images} images takes"
    told += f" {pack_bytes / _MARGIN / 1e6:,.1f} MB"
    if not fits:
        raise UserError(f"{told}, for each of {num_workers} workers. {remedy}. Or lower --dataloader_num_workers.")
    if fits < _PREFETCH:
        logger.warning("%s: each worker keeps %d ready instead of %d. %s.", told, fits, _PREFETCH, remedy)
    return min(fits, _PREFETCH)


def _start_worker(_: int) -> None:
    workers.end_with_parent()
    torch.set_num_threads(1)
