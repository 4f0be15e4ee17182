"""Keeping what a frozen vision tower makes of the images, so that no step decodes them or runs the tower.

Comes in: an opened stage. Goes out: the same stage, whose packs bring features instead of pixels. All processes compute
before step 1, each its share, what no earlier run has left.
"""

import hashlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.prepare import alone
from llavaforge.data.load.features import FeatureFile, ImageFeatures, distinct_images
from llavaforge.data.order.mixture import RowNumbers
from llavaforge.data.order.plan import MicroBatch
from llavaforge.device import compute_dtype
from llavaforge.errors import UserError
from llavaforge.files import cache_dir
from llavaforge.model.features import FeatureMaker, describe_features, feature_shape
from llavaforge.processes.host_memory import free_host_memory
from llavaforge.processes.world import World
from llavaforge.progress import Bar
from llavaforge.training.opening import OpenedStage

logger = logging.getLogger(__name__)

_ROWS = 8  # of a pack


@dataclass(frozen=True, eq=False)
class _Images:
    """The images of those rows of an index that the run takes.

    Attributes:
        features: of the index.
        rows: number of the row of each image.
        slots: slot of each image.
    """

    features: ImageFeatures
    rows: RowNumbers
    slots: RowNumbers

    @classmethod
    def of(cls, features: ImageFeatures, rows: RowNumbers) -> "_Images":
        row_of_image = np.repeat(np.arange(len(features.index)), np.diff(features.starts))
        chosen = np.isin(row_of_image, rows)
        return cls(features, row_of_image[chosen], features.slots[chosen])

    @property
    def distinct(self) -> RowNumbers:
        """Every slot once."""
        return np.unique(self.slots)


@contextmanager
def keeping_features(opened: OpenedStage, world: World) -> Iterator[OpenedStage]:
    """Give the stage with kept features, where `cache_vision_features` asks for them; all processes call this.

    The order of the samples stays that of a run without. So do the weights: to the byte where a step's tower would see
    as many images at once as `FeatureMaker`'s, else within the rounding of its matrix products.

    Raises:
        UserError: there is no room for them, or a file cannot be written.
    """
    if opened.config.cache_vision_features == "off":
        yield opened
        return
    world.at("computing vision features")
    with ExitStack() as held:
        described = world.run_on_all(lambda: _described(opened, world))
        tower = world.broadcast_object(described)
        images = [_Images.of(_open(opened, index, tower, world, held), rows) for index, rows in _used(opened)]
        world.run_on_all(lambda: _check_room(opened, images) if world.rank_on_host == 0 else None)
        begin_s = time.perf_counter()
        with ExitStack() as locks:
            world.run_on_all(lambda: _lock(opened, images, locks) if world.is_writer else None)
            num_computed = sum(_fill(opened, mine, world) for mine in images)
        logger.info(
            "vision features: computed those of %d images in %.1f s", num_computed, time.perf_counter() - begin_s
        )
        features = tuple(mine.features for mine in images)
        yield replace(opened, flops=opened.flops.without_tower(), features=features)


def _used(opened: OpenedStage) -> list[tuple[SampleIndex, RowNumbers]]:
    """Return each index with the rows of it that the run takes."""
    data, rows = opened.data, opened.plan.rows()
    if data.held_out is None:
        return [(data.index, rows)]
    if data.held_out.index is data.index:
        return [(data.index, np.union1d(rows, data.held_out.rows))]
    return [(data.index, rows), (data.held_out.index, data.held_out.rows)]


def _described(opened: OpenedStage, world: World) -> str:
    if not world.is_writer:
        return ""
    return describe_features(opened.loaded, world.device, compute_dtype(opened.config.bf16))


def _open(opened: OpenedStage, index: SampleIndex, tower: str, world: World, held: ExitStack) -> ImageFeatures:
    """Open the files of an index: found again by the tower and the images, or new ones in memory."""
    files, slots = [], []
    for data_set in index.data_sets:
        mine, num_images, images = world.run_on_all(partial(distinct_images, data_set))
        digest = hashlib.sha256(f"{tower} {images}".encode()).hexdigest()
        name = f"{data_set.source.files[0].name.split('.')[0]}-{digest[:16]}.features"
        path = cache_dir(opened.config.cache_dir) / "features" / name
        if opened.config.cache_vision_features == "memory":
            path = _in_memory(name, world, held)
        file = FeatureFile(path, num_images, feature_shape(opened.loaded), compute_dtype(opened.config.bf16))
        world.run_on_all(file.open)
        held.callback(file.close)
        files.append(file)
        slots.append(mine)
    return ImageFeatures.of(index, files, slots)


def _in_memory(name: str, world: World, held: ExitStack) -> Path:
    """Return where the processes of a host find a new file in its memory; it ends with the last that holds it."""
    path = world.run_on_all(lambda: _new_in_memory(name, held) if world.rank_on_host == 0 else "")
    here = socket.gethostname()
    return Path(next(path for host, path in world.all_gather_objects((here, path)) if path and host == here))


def _new_in_memory(name: str, held: ExitStack) -> str:
    if not hasattr(os, "memfd_create"):
        raise UserError("cache_vision_features memory needs Linux: give cache_vision_features disk.")
    handle = os.memfd_create(name)
    held.callback(os.close, handle)
    return f"/proc/{os.getpid()}/fd/{handle}"


def _check_room(opened: OpenedStage, images: Sequence[_Images]) -> None:
    """Tell how large the features are, and check that they fit on this host.

    Raises:
        UserError: they do not.
    """
    files = {file.path: file for mine in images for file in mine.features.files}
    one, num_images = next(iter(files.values())), sum(len(mine.distinct) for mine in images)
    needed = num_images * one.slot_bytes
    if opened.config.cache_vision_features == "memory":
        where, free, there = "the host's memory", free_host_memory(), 0
    else:
        where, free = str(one.path.parent), shutil.disk_usage(one.path.parent).free
        there = sum(file.allocated_bytes for file in files.values())
    told = (
        f"{num_images:,} images x {one.shape[0]} tokens x {one.shape[1]} numbers of {one.dtype.itemsize} bytes = "
        f"{_size(needed)}; {where} has {_size(there)} of it, and {_size(free)} free"
    )
    if needed - there > free:
        raise UserError(
            f"cache_vision_features does not fit: {told}. Give a --cache_dir with more room, less data, or "
            "cache_vision_features off."
        )
    logger.info("vision features: %s", told)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _lock(opened: OpenedStage, images: Sequence[_Images], locks: ExitStack) -> None:
    """Let another run that wants the same files on the disk wait, and find them complete."""
    if opened.config.cache_vision_features == "disk":
        for path in sorted({file.path for mine in images for file in mine.features.files}):
            locks.enter_context(alone(path))


def _fill(opened: OpenedStage, images: _Images, world: World) -> int:
    """Compute what is missing, and return how many images that were.

    Dealt over all processes first, and then over those of each host: hosts that share a disk find nothing then.
    """
    num_computed = world.run_on_all(lambda: _fill_share(opened, images, world, world.rank, world.size))
    if world.size_on_host < world.size:
        share = world.rank_on_host, world.size_on_host
        num_computed += world.run_on_all(lambda: _fill_share(opened, images, world, *share))
    return int(world.all_reduce_sum([num_computed])[0])


def _fill_share(opened: OpenedStage, images: _Images, world: World, share: int, num_shares: int) -> int:
    """Compute what is missing of one share of the images.

    An image that stays missing stands only in rows that cannot be read, which a step leaves out as ever.
    """
    features, distinct = images.features, images.distinct
    mine = distinct[distinct % num_shares == share].tolist()
    missing = {slot for slot in mine if features.read(slot) is None}
    num_missing, bad = len(missing), set[int]()
    if not missing:
        return 0
    make = FeatureMaker(opened.loaded, world.device, compute_dtype(opened.config.bf16))
    with Bar("computing vision features", quiet=not world.is_writer) as bar:
        while (rows := _first_rows(images, missing, bad)).size:
            order = [MicroBatch(0, tuple(rows[at : at + _ROWS].tolist()), True, 0) for at in range(0, len(rows), _ROWS)]
            with opened.packs(features.index, order, pin_memory=False, masks_bad=True) as packs:
                for pack in packs:
                    bad |= {one.number for one in pack.bad}
                    made = iter(make(pack.pixels_ICHW))
                    for number in pack.source.samples:
                        for slot, features_PD in zip(features.slots_of(number), made, strict=False):
                            if slot in missing and number not in bad:
                                features.write(slot, features_PD)
                                missing.discard(slot)
                    done = num_missing - len(missing)
                    bar.update(done / num_missing, f"vision features: {done} of {num_missing} images, ")
    return num_missing - len(missing)


def _first_rows(images: _Images, missing: set[int], bad: set[int]) -> RowNumbers:
    """Return for each missing image the first row that has it and is not known to be bad."""
    open_ = np.isin(images.slots, list(missing)) & ~np.isin(images.rows, list(bad))
    _, first = np.unique(images.slots[open_], return_index=True)
    return np.unique(images.rows[open_][first])
