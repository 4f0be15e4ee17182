"""Opening the index of data sets, and refusing what cannot be trained on.

Comes in: entries of a recipe's `data` list and a model's processor. Goes out: a `SampleIndex`, or one error that counts
and names the faulty records.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llavaforge.config.schema import DataEntry, SampleOptions
from llavaforge.data.faults import Fault, RecordError
from llavaforge.data.index.index import DataSetIndex, SampleIndex
from llavaforge.data.index.prepare import prepared
from llavaforge.data.rows.sources import find_source
from llavaforge.data.storage.image_ref import ImageRef
from llavaforge.data.text.sample import SampleBuilder
from llavaforge.data.text.template import ChatTemplate
from llavaforge.errors import UserError
from llavaforge.files import cache_dir

logger = logging.getLogger(__name__)

_MOST_FAULTS_SHOWN = 10
_NUM_IMAGES_CHECKED = 1_000


def open_index(
    data: Path | Sequence[DataEntry],
    processor: Any,
    num_image_tokens: int,
    options: SampleOptions,
    quiet: bool = False,
) -> SampleIndex:
    """Open the index of data sets, preparing what is not in the cache. Faulty records are in `data_sets[i].faults`.

    Args:
        data: a path as in `TrainConfig.data_path`, or the entries of `TrainConfig.data`.
        processor: the model's `LlavaProcessor`, or None to read records without tokens.
        num_image_tokens: tokens that one image takes.
        options: prompt style, lengths, cache.
        quiet: show no progress.

    Raises:
        UserError: a file cannot be read at all.
    """
    if isinstance(data, Path):
        data = [DataEntry(path=data, images=options.image_folder, image_roots=options.image_roots)]
    builder = sample_builder(processor, num_image_tokens, options) if processor is not None else None
    cache = cache_dir(options.cache_dir)
    data_sets = []
    for entry in data:
        source = find_source(entry, cache)
        path, fingerprint = prepared(source, builder, cache, quiet)
        data_sets.append(DataSetIndex(path, source, fingerprint))
    index = SampleIndex(tuple(data_sets))
    if not quiet:
        _report(index, options)
    return index


def open_checked_index(
    data: Path | Sequence[DataEntry], processor: Any, num_image_tokens: int, options: SampleOptions
) -> SampleIndex:
    """Open an index as `open_index` does, and accept no faulty record.

    Raises:
        UserError: faulty records or missing images, all counted, the first ones named.
    """
    index = open_index(data, processor, num_image_tokens, options)
    for data_set in index.data_sets:
        refuse(data_set.faults, data_set.num_records, data_set.source.name)
        refuse_missing(data_set)
    return index


def refuse(faults: Sequence[Fault], num_records: int, name: str) -> None:
    """Raise one UserError for all faulty records, if there are any."""
    if not num_records:
        raise UserError(f"{name}: no rows. A data set needs at least one record with `conversations`.")
    if not faults:
        return
    shown = "\n".join(f"  {fault}" for fault in faults[:_MOST_FAULTS_SHOWN])
    more = f"\n  ... and {len(faults) - _MOST_FAULTS_SHOWN} more" if len(faults) > _MOST_FAULTS_SHOWN else ""
    raise UserError(
        f"{name}: {len(faults)} of {num_records} records are faulty:\n{shown}{more}\n"
        "`llavaforge data check` names all of them; `--on_bad_sample skip` leaves them out."
    )


def refuse_missing(data_set: DataSetIndex) -> None:
    """Check that images are still there: a sample of them, as all would take minutes on a network drive.

    Raises:
        UserError: names those that are gone.
    """
    if not data_set.source.images.root.is_dir() or not len(data_set):
        return
    faults = []
    for number in np.unique(np.linspace(0, len(data_set) - 1, min(len(data_set), _NUM_IMAGES_CHECKED), dtype=np.int64)):
        row = data_set.row(int(number))
        try:
            for image in row.images:
                data_set.source.images.locate(image if image.container else ImageRef(image.name))
        except RecordError as error:
            faults.append(row.fault(error))
    refuse(faults, len(data_set), data_set.source.name)


def sample_builder(processor: Any, num_image_tokens: int, options: SampleOptions) -> SampleBuilder:
    """Return the builder for a model's processor and the user's options."""
    tokenizer = processor.tokenizer
    template = processor.chat_template or tokenizer.chat_template or ""
    keeps = options.special_tokens_in_text == "keep"
    chat = ChatTemplate(tokenizer, template, options.prompt_style, options.system_prompt, keeps)
    return SampleBuilder(tokenizer, chat, int(processor.image_token_id), num_image_tokens, options.max_length)


def _report(index: SampleIndex, options: SampleOptions) -> None:
    told = "split into plain text (special_tokens_in_text: keep learns them as tokens)"
    told = "learnt as tokens" if options.special_tokens_in_text == "keep" else told
    for data_set in index.data_sets:
        turns, tokens = int(data_set.numbers("num_turns_dropped").sum()), int(data_set.numbers("num_tokens_cut").sum())
        if turns or tokens:
            logger.warning(
                "%s: %d turns dropped and %d tokens cut to fit max_length", data_set.source.name, turns, tokens
            )
        if special := int(data_set.numbers("num_special_tokens").sum()):
            logger.warning("%s: %d special tokens in texts are %s", data_set.source.name, special, told)
        if literals := int(data_set.numbers("num_literals").sum()):
            logger.warning("%s: %d literal `<image>` in texts are kept as text", data_set.source.name, literals)
