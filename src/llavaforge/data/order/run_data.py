"""The data of a run: what it trains on, what it holds out, and what it leaves out.

Comes in: the run's options and its model's processor. Goes out: an `OpenedData`, checked.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from llavaforge.config.schema import DataEntry, TrainConfig
from llavaforge.data.faults import Fault
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_index, refuse, refuse_missing
from llavaforge.data.order.mixture import Mixture, RowNumbers, deal, drop_quarantined
from llavaforge.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Held-out data: an index and the rows of it that are evaluated."""

    index: SampleIndex
    rows: RowNumbers

    @cached_property
    def records(self) -> str:
        """A checksum of which records these are, whatever the model: contents of their data set, file, row."""
        contents = [data_set.contents for data_set in self.index.data_sets]
        data_set = np.searchsorted(self.index.starts, self.rows, side="right") - 1
        digest = hashlib.sha256(json.dumps(contents).encode())
        for column in (data_set, self.index.column("file")[self.rows], self.index.column("row")[self.rows]):
            digest.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]

    @property
    def identity(self) -> str:
        """What tells it from other held-out data, as a model sees it."""
        which = "" if len(self.rows) == len(self.index) else f", {self.records}"
        return f"{self.index.fingerprint}, {len(self.rows)} rows{which}"


@dataclass(frozen=True)
class OpenedData:
    """The training samples, what of them an epoch holds, what is held out, and the records that are left out."""

    index: SampleIndex
    mixture: Mixture
    held_out: HeldOut | None
    left_out: list[Fault]


def open_data(config: TrainConfig, processor: Any, num_image_tokens: int, quiet: bool) -> OpenedData:
    """Open the data of a run, preparing what is not in the cache.

    Raises:
        UserError: records are faulty (more than `max_bad_samples` under `on_bad_sample: skip`), none has an image, or
        nothing is left to train on or to hold out.
    """
    index, rows, left_out = _sound(config, config.entries, processor, num_image_tokens, quiet)
    if not index.num_images.any():
        raise UserError(
            f"{index.data_sets[0].source.name}: no record has an image, so the projector would learn nothing. "
            "Add image-text data."
        )
    mixture, kept = deal(config, index, rows)
    held_out = HeldOut(index, kept) if len(kept) else None
    if config.eval_entries:
        held_out, more = open_held_out(config, processor, num_image_tokens, quiet)
        left_out += more
    return OpenedData(index, mixture, held_out, left_out)


def open_held_out(
    config: TrainConfig, processor: Any, num_image_tokens: int, quiet: bool
) -> tuple[HeldOut, list[Fault]]:
    """Open the held-out data sets of a run that has some (not a `validation_split`), and tell what is left out of them.

    Raises:
        UserError: as `open_data`.
    """
    index, rows, left_out = _sound(config, config.eval_entries, processor, num_image_tokens, quiet)
    for entry, mine in zip(config.eval_entries, rows, strict=True):
        if not len(mine):
            raise UserError(f"{entry.path}: no sound record is left to evaluate on.")
    return HeldOut(index, np.concatenate(rows)), left_out


def _sound(
    config: TrainConfig, entries: Sequence[DataEntry], processor: Any, num_image_tokens: int, quiet: bool
) -> tuple[SampleIndex, list[RowNumbers], list[Fault]]:
    """Return an index, the rows of each data set that may be used, and the faults of the others."""
    index = open_index(entries, processor, num_image_tokens, config, quiet)
    rows, faults = drop_quarantined(index, config.quarantine)
    if config.quarantine is not None and not quiet:
        num_left_out = index.num_records
        num_left_out -= sum(map(len, rows)) + sum(map(len, faults))
        told = "%s leaves out %d records" + ("" if num_left_out else ": what it lists is of other data than this")
        logger.log(logging.INFO if num_left_out else logging.WARNING, told, config.quarantine, num_left_out)
    for data_set, mine in zip(index.data_sets, faults, strict=True):
        if config.on_bad_sample == "stop":
            refuse(mine, data_set.num_records, data_set.source.name)
            refuse_missing(data_set)
    left_out = [fault for mine in faults for fault in mine]
    _check_bound(" and ".join(data_set.source.name for data_set in index.data_sets), left_out, config.max_bad_samples)
    return index, rows, left_out


def _check_bound(name: str, faults: Sequence[Fault], bound: int) -> None:
    """Check that a data set has no more faulty records than a run may leave out.

    Raises:
        UserError: it has.
    """
    if len(faults) > bound:
        raise UserError(
            f"{name}: {len(faults)} records are faulty, over max_bad_samples {bound}. The first of them: {faults[0]}\n"
            "`llavaforge data check` names all of them."
        )
