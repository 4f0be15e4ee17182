"""Opening a run's data: what is trained on, what is held out, what is left out.

Comes in: the recipe and the model's processor. Goes out: `OpenedData`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llavaforge.config.schema import DataEntry, TrainConfig
from llavaforge.data.faults import Fault
from llavaforge.data.index.index import SampleIndex, open_index, refuse, refuse_missing
from llavaforge.data.order.mixture import Mixture, RowNumbers, deal, drop_quarantined
from llavaforge.errors import UserError
from llavaforge.model.load import LoadedModel
from llavaforge.training.bad_samples import check_bound

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Held-out data: an index and the rows of it that are evaluated."""

    index: SampleIndex
    rows: RowNumbers


@dataclass(frozen=True)
class OpenedData:
    """The training samples, what of them an epoch holds, what is held out, and the records that are left out."""

    index: SampleIndex
    mixture: Mixture
    held_out: HeldOut | None
    left_out: list[Fault]


def open_data(config: TrainConfig, loaded: LoadedModel, quiet: bool) -> OpenedData:
    """Open the data of a run, preparing what is not in the cache.

    Raises:
        UserError: records are faulty (more than `max_bad_samples` under `on_bad_sample: skip`), none has an image, or
        nothing is left to train on or to hold out.
    """
    index, rows, left_out = _sound(config, config.entries, loaded, quiet)
    if not index.num_images.any():
        raise UserError(
            f"{index.data_sets[0].source.name}: no record has an image, so the projector would learn nothing. "
            "Add image-text data."
        )
    mixture, kept = deal(config, index, rows)
    held_out = HeldOut(index, kept) if len(kept) else None
    if config.eval_entries:
        other, other_rows, more = _sound(config, config.eval_entries, loaded, quiet)
        for entry, mine in zip(config.eval_entries, other_rows, strict=True):
            if not len(mine):
                raise UserError(f"{entry.path}: no sound record is left to evaluate on.")
        held_out, left_out = HeldOut(other, np.concatenate(other_rows)), left_out + more
    return OpenedData(index, mixture, held_out, left_out)


def _sound(
    config: TrainConfig, entries: Sequence[DataEntry], loaded: LoadedModel, quiet: bool
) -> tuple[SampleIndex, list[RowNumbers], list[Fault]]:
    """Return an index, the rows of each data set that may be used, and the faults of the others."""
    index = open_index(entries, loaded.processor, loaded.num_image_tokens, config, quiet)
    rows, faults = drop_quarantined(index, config.quarantine)
    if config.quarantine is not None and not quiet:
        num_left_out = index.num_records
        num_left_out -= sum(map(len, rows)) + sum(map(len, faults))
        logger.info("%s leaves out %d records", config.quarantine, num_left_out)
    for data_set, mine in zip(index.data_sets, faults, strict=True):
        if config.on_bad_sample == "stop":
            refuse(mine, data_set.num_records, data_set.source.name)
            refuse_missing(data_set)
    left_out = [fault for mine in faults for fault in mine]
    check_bound(" and ".join(data_set.source.name for data_set in index.data_sets), left_out, config.max_bad_samples)
    return index, rows, left_out
