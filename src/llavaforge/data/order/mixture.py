"""Which samples an epoch holds, from one data set or a mixture of several: a pure function of (seed, epoch).

Comes in: the entries of a recipe's `data` and their index. Goes out: a `Mixture`, and the rows that are held out.

Each data set gives a fixed number of draws to every epoch. Whole passes take all its rows; what a weight or a broken
`repeat` leaves over is taken from its shuffled rows in turn, so that over the epochs every row comes equally often.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from llavaforge.config.schema import DataEntry, DataOptions
from llavaforge.data.faults import Fault
from llavaforge.data.index.index import DataSetIndex, SampleIndex
from llavaforge.errors import UserError, reason

RowNumbers = npt.NDArray[np.int64]

_SPLIT_SEED = 42  # of what is held out: runs of all seeds hold out the same, so that their losses can be compared
_MOST_SAMPLES = 1_000_000_000  # of an epoch: their order is held in memory, 8 bytes each


class Mixture:
    """The samples of every epoch.

    Args:
        rows: for each data set, the rows of the index that take part.
        draws: for each data set, its samples per epoch.
        seed: of the shuffling.
    """

    def __init__(self, rows: Sequence[RowNumbers], draws: Sequence[int], seed: int) -> None:
        self.rows, self.draws, self.seed = tuple(rows), tuple(draws), seed
        self._epochs: dict[int, RowNumbers] = {}

    def __len__(self) -> int:
        """Samples per epoch."""
        return sum(self.draws)

    @property
    def all_rows(self) -> RowNumbers:
        """Every row that may come."""
        return np.concatenate(self.rows)

    def epoch(self, number: int) -> RowNumbers:
        """Return an epoch's samples in their order."""
        if number not in self._epochs:
            data_sets = [self._of_data_set(data_set, number) for data_set in range(len(self.rows))]
            samples = np.concatenate(data_sets)
            order = np.random.default_rng([self.seed, number]).permutation(len(samples))
            self._epochs = {**dict(list(self._epochs.items())[-1:]), number: samples[order]}  # a batch may span two
        return self._epochs[number]

    def _of_data_set(self, data_set: int, epoch: int) -> RowNumbers:
        rows, draws = self.rows[data_set], self.draws[data_set]
        if not draws:
            return rows[:0]
        whole, rest = divmod(draws, len(rows))
        drawn = [rows] * whole
        if rest:
            positions = np.arange(epoch * rest, (epoch + 1) * rest)
            for turn in np.unique(positions // len(rows)):
                order = _shuffled(len(rows), self.seed, data_set, int(turn))
                drawn.append(rows[order[positions[positions // len(rows) == turn] % len(rows)]])
        return np.concatenate(drawn)

    def table(self, entries: Sequence[DataEntry], num_supervised: npt.NDArray[np.int64]) -> Table:
        """Return what an epoch is made of, for people."""
        table = Table(title="An epoch", title_justify="left")
        for heading in ("data", "records", "samples", "share", "of the supervised tokens"):
            table.add_column(heading, justify="left" if heading == "data" else "right")
        tokens = [draws * float(num_supervised[rows].mean()) for rows, draws in zip(self.rows, self.draws, strict=True)]
        for entry, rows, draws, supervised in zip(entries, self.rows, self.draws, tokens, strict=True):
            share, of_tokens = draws / len(self), supervised / sum(tokens)
            table.add_row(str(entry.path), f"{len(rows):,}", f"{draws:,}", f"{share:.1%}", f"{of_tokens:.1%}")
        return table


def deal(options: DataOptions, index: SampleIndex, rows: Sequence[RowNumbers]) -> tuple[Mixture, RowNumbers]:
    """Hold out what `validation_split` asks for, and mix the rest of the rows that may be used of each data set.

    Returns:
        The mixture to train on, and the rows that are held out (none without `validation_split`).

    Raises:
        UserError: nothing is left on one of the sides.
    """
    if not options.validation_split:
        return mix(options.entries, rows, options.seed), np.zeros(0, dtype=np.int64)
    train, held_out = split_held_out(index, np.concatenate(rows), options.validation_split)
    kept = [np.intersect1d(mine, train, assume_unique=True) for mine in rows]
    return mix(options.entries, kept, options.seed), held_out


def mix(entries: Sequence[DataEntry], rows: Sequence[RowNumbers], seed: int) -> Mixture:
    """Deal the rows of data sets into epochs, by their weights or repeats.

    Raises:
        UserError: a data set has no rows left, or its weight gives it no sample in an epoch.
    """
    for entry, mine in zip(entries, rows, strict=True):
        if not len(mine):
            raise UserError(
                f"{entry.path}: no records are left to train on: all are faulty, held out or in quarantine. "
                "Mend the data, or remove it."
            )
    total = sum(len(mine) for mine in rows)
    if entries[0].weight is not None:
        weights = np.array([entry.weight for entry in entries], dtype=np.float64)
        draws = [round(share * total) for share in weights / weights.sum()]
    else:
        draws = [round((entry.repeat or 1) * len(mine)) for entry, mine in zip(entries, rows, strict=True)]
    if sum(draws) > max(_MOST_SAMPLES, total):
        raise UserError(
            f"{entries[0].path}: `repeat` makes an epoch of {sum(draws):,} samples; at most {_MOST_SAMPLES:,} are "
            "taken. Lower it, and raise num_train_epochs or max_steps instead."
        )
    for entry, number in zip(entries, draws, strict=True):
        if not number:
            raise UserError(f"{entry.path}: its weight or repeat gives it no sample in an epoch. Raise it.")
    return Mixture(rows, draws, seed)


def split_held_out(index: SampleIndex, rows: RowNumbers, amount: float) -> tuple[RowNumbers, RowNumbers]:
    """Hold out records, whole images at a time: no image is both trained on and held out.

    Args:
        index: all data.
        rows: what there is to divide.
        amount: a share (below 1), or a number of records; where images repeat, as many as whole images give.

    Returns:
        The rows to train on, and those held out.

    Raises:
        UserError: nothing is left to train on, or nothing is held out.
    """
    wanted = round(amount * len(rows)) if amount < 1 else int(amount)
    if not 0 < wanted < len(rows):
        raise UserError(
            f"validation_split {amount:g} holds out {wanted} of {len(rows)} records, and some must be on both sides: "
            "give another --validation_split."
        )
    group = _groups(index)[rows]
    order, sizes = np.random.default_rng(_SPLIT_SEED).permutation(group), np.bincount(group)
    _, first = np.unique(order, return_index=True)
    chosen = np.zeros(len(sizes), dtype=bool)
    left = wanted
    for one in order[np.sort(first)].tolist():
        if sizes[one] <= left:
            chosen[one] = True
            left -= int(sizes[one])
        if not left:
            break
    train, held_out = rows[~chosen[group]], rows[chosen[group]]
    if not len(held_out):
        raise UserError(
            f"validation_split {amount:g} holds out {wanted} of {len(rows)} records, but every image comes in more: "
            f"the fewest records that share no image with others are {sizes[sizes > 0].min()}. Hold out at least so "
            "many, or give eval_data_path instead."
        )
    return train, held_out


def _groups(index: SampleIndex) -> RowNumbers:
    """Return for each row a number that is equal for rows that share an image, and for those that share with these."""
    starts, keys = image_keys(index)
    row_of_image = np.repeat(np.arange(len(index)), np.diff(starts))
    group = np.arange(len(index))
    while True:  # every row takes the least number among the rows of its images
        least = np.full(int(keys.max(initial=-1)) + 1, len(index))
        np.minimum.at(least, keys, group[row_of_image])
        lower = group.copy()
        np.minimum.at(lower, row_of_image, least[keys])
        if np.array_equal(lower, group):
            return group
        group = lower[lower]  # a short cut: the row of that number may know a lower one


def drop_quarantined(index: SampleIndex, file: Path | None) -> tuple[list[RowNumbers], list[list[Fault]]]:
    """Return the rows of each data set, and its faults, without the records that a quarantine file lists.

    Raises:
        UserError: the file is not one, or was written for other contents.
    """
    listed = _read_quarantine(file) if file is not None else []
    contents = {data_set.contents for data_set in index.data_sets}
    names = {data_set.source.name for data_set in index.data_sets}
    for line in listed:
        if line["source"] in names and line["contents"] not in contents:
            raise UserError(
                f"{file}: was written for other contents of {line['source']}. Run `llavaforge data check` again."
            )
    rows, faults = [], []
    for start, data_set in zip(index.starts, index.data_sets, strict=False):
        # Told by the contents: a path may be written in several ways, and two splits have the same path.
        bad = {(line["file"], line["row"]) for line in listed if line["contents"] == data_set.contents}
        if renamed := {name for name, _ in bad} - set(data_set.source.file_names):
            raise UserError(
                f"{file}: names {min(renamed)}, but that file of {data_set.source.name} is called "
                f"{', '.join(data_set.source.file_names[:3])} now. Run `llavaforge data check` again."
            )
        kept = np.ones(len(data_set), dtype=bool)
        kept[_numbers_of(data_set, bad)] = False
        rows.append(start + np.flatnonzero(kept))
        faults.append([fault for fault in data_set.faults if (fault.file, fault.row) not in bad])
    return rows, faults


def _read_quarantine(file: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line.strip()]
        for line in lines:
            if not all(isinstance(line[name], str) for name in ("source", "contents", "file")):
                raise TypeError("source, contents and file are texts")
            if type(line["row"]) is not int:
                raise TypeError("row is a number")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file}: not a quarantine list ({reason(error)}). Write one with "
            "`llavaforge data check --quarantine FILE`."
        ) from None
    return lines


def _numbers_of(data_set: DataSetIndex, records: set[tuple[str, int]]) -> RowNumbers:
    """Return the numbers of the rows at (file, row); those that are not in the index are passed over."""
    files, names = data_set.numbers("file"), data_set.source.file_names
    rows, found = data_set.numbers("row"), []
    for file, row in records:
        first, last = np.searchsorted(files, [names.index(file), names.index(file) + 1])
        at = first + int(np.searchsorted(rows[first:last], row))
        if at < last and rows[at] == row:
            found.append(at)
    return np.array(found, dtype=np.int64)


def image_keys(index: SampleIndex) -> tuple[RowNumbers, RowNumbers]:
    """Return where each row's images begin, and for each image a number that is equal for equal images."""
    counts = index.num_images
    numbers: dict[str, int] = {}
    keys = [np.zeros(0, dtype=np.int64)]
    for data_set in index.data_sets:
        names = data_set.image_paths()
        encoded = names.dictionary_encode().combine_chunks()
        known = [numbers.setdefault(name, len(numbers)) for name in encoded.dictionary.to_pylist()]
        keys.append(np.array(known, dtype=np.int64)[encoded.indices.to_numpy()] if known else keys[0])
    return np.concatenate([[0], np.cumsum(counts)]), np.concatenate(keys)


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: int, data_set: int, turn: int) -> RowNumbers:
    return np.random.default_rng([seed, data_set, turn]).permutation(size)
