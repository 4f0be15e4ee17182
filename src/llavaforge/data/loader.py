"""Packs, made in worker processes in the plan's order.

Comes in: an index, preprocessing and an iterable of `MicroBatch`. Goes out: an iterator of `Pack`. Called by
`train/run.py` and `use/evaluate.py`.
"""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llavaforge.data.images import Preprocessing, decode
from llavaforge.data.index import SampleIndex
from llavaforge.data.pack import Pack, make_pack
from llavaforge.data.plan import MicroBatch
from llavaforge.errors import UserError

_PREFETCH = 4  # packs each worker keeps ready


class PackDataset(Dataset[Pack]):
    """Maps a micro-batch to its pack; the only place where pixels are read.

    Attributes:
        index: the samples.
        preprocessing: the image processor's steps.
        image_token_id: the placeholder's id.
        num_image_tokens: tokens per image.
        blank_image: give mid-grey pixels instead of the image (to measure what a model guesses blindly).
    """

    def __init__(
        self,
        index: SampleIndex,
        preprocessing: Preprocessing,
        image_token_id: int,
        num_image_tokens: int,
        blank_image: bool = False,
    ) -> None:
        self.index = index
        self.preprocessing = preprocessing
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens
        self.blank_image = blank_image

    def __getitem__(self, source: MicroBatch) -> Pack:
        rows = [self.index.row(number) for number in source.samples]
        pixels = [self.pixels(row) for row in rows if row["image"] is not None]
        return make_pack(rows, pixels, self.image_token_id, self.num_image_tokens, source)

    def pixels(self, row: dict[str, Any]) -> np.ndarray:
        """Return a row's pixels: `uint8` (C, H, W).

        Raises:
            UserError: the image is missing or cannot be decoded; names file and row.
        """
        images = self.index.images
        try:
            pixels = self.preprocessing(decode(images.read(row["image"]), str(images.root / row["image"])))
        except UserError as error:
            raise UserError(f"{row['where']}: {error}") from None
        return np.full_like(pixels, 127) if self.blank_image else pixels


class _Told(Dataset[Pack | UserError]):
    """Returns a `UserError` instead of raising it: torch would put a worker's traceback into its message."""

    def __init__(self, dataset: PackDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, source: MicroBatch) -> Pack | UserError:
        try:
            return self._dataset[source]
        except UserError as error:
            return error


def _raised(packs: Iterator[Pack | UserError]) -> Iterator[Pack]:
    for pack in packs:
        if isinstance(pack, UserError):
            raise pack
        yield pack


@contextmanager
def loading(
    dataset: PackDataset, order: Iterable[MicroBatch], num_workers: int, pin_memory: bool
) -> Iterator[Iterator[Pack]]:
    """Give an iterator over the packs of `order`; the workers are gone when the block ends.

    Args:
        dataset: makes the packs.
        order: what to load, in this order whatever the number of workers.
        num_workers: processes (0: this one).
        pin_memory: put packs in page-locked memory, for a GPU.
    """
    loader: DataLoader[Pack | UserError] = DataLoader(
        _Told(dataset),
        sampler=order,  # any iterable of keys will do; a plan need not know its length
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=_PREFETCH if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if num_workers else None,
        multiprocessing_context="spawn" if num_workers else None,
    )
    with _signals_blocked():
        iterator = iter(loader)
    try:
        yield _raised(iterator)
    finally:
        if num_workers and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start processes that never see a request to stop.

    A signal to the process group asks the trainer to stop at a step's end: the workers must live until then, also while
    they start. A spawned process inherits the mask; ours is lifted again, and what came meanwhile is then delivered.
    """
    resource_tracker.ensure_running()  # its start lifts the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
