"""The records behind rows of an index, as its samples have them.

Comes in: an index and numbers of rows. Goes out: their `Record`s, without what was cut to fit.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.prepare import records_at
from llavaforge.data.rows.records import Record
from llavaforge.data.storage.image_ref import ImageRef


def records_of_rows(index: SampleIndex, rows: Sequence[int] | npt.NDArray[np.int64]) -> list[Record]:
    """Return the records of rows, without the turns, and their images, that did not fit `max_length`.

    Raises:
        UserError: the data has changed since the index was opened.
    """
    rows = np.asarray(rows, dtype=np.int64)
    found: dict[int, Record] = {}
    for start, data_set in zip(index.starts, index.data_sets, strict=False):
        mine = rows[(rows >= start) & (rows < start + len(data_set))] - start
        files, lines = (data_set.numbers(name)[mine].tolist() for name in ("file", "row"))
        numbers = dict(zip(zip(files, lines, strict=True), (start + mine).tolist(), strict=True))
        found |= {numbers[place]: record for place, record in records_at(data_set.source, numbers)}
    dropped = index.column("num_turns_dropped")
    return [_cut(found[number], int(dropped[number]), index.row(number).images) for number in rows.tolist()]


def _cut(record: Record, num_turns_dropped: int, images: tuple[ImageRef, ...]) -> Record:
    return replace(
        record,
        turns=record.turns[: len(record.turns) - num_turns_dropped],
        images=images,
        answers=() if num_turns_dropped else record.answers,  # they are about the last question
    )
