"""The tokenised data: memory-mapped Arrow files, built once, with random access to any sample.

Comes in: an entry of a recipe's `data` list, or several. Goes out: a `SampleIndex`.

One row:

    where "chat.json row 7 (id 'GCC_train_002582585')" | images (GCC_train_002582585.jpg in images.zip at byte 81,
    74,311 bytes) | ids [151644, 872, ...] | supervised_spans [25, 41] | length 626 | num_supervised 16
"""

import os
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from llavaforge.data.faults import Fault, RecordError, describe_record
from llavaforge.data.index.fingerprint import contents_of
from llavaforge.data.index.prepare import faults_of
from llavaforge.data.rows.sources import Source
from llavaforge.data.storage.image_ref import ImageRef
from llavaforge.data.storage.image_store import safe_name
from llavaforge.errors import reading


class Row(NamedTuple):
    """One sample.

    Attributes:
        data_set: number of its data set in the index.
        file: name of its record's file.
        number: of the record in the file, as `faults.describe_record` counts.
        id: its record's own id.
        images: in the order of their placeholders.
        ids: token ids, one placeholder per image.
        supervised_spans: flat [start, end, start, end, ...] over `ids`.
        length: tokens once the image tokens are written out.
    """

    data_set: int
    file: str
    number: int
    id: str
    images: tuple[ImageRef, ...]
    ids: npt.NDArray[np.int32]
    supervised_spans: npt.NDArray[np.int32]
    length: int

    @property
    def where(self) -> str:
        """What messages call the record."""
        return describe_record(self.file, self.number, self.id)

    def fault(self, error: RecordError) -> Fault:
        """Return an error as a fault of this record."""
        return Fault(error.kind, self.file, self.number, self.id, str(error), error.path)


class _Batch:
    """A record batch of the file as views that give a row in microseconds (Arrow's scalars take a hundred)."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        columns = {name: batch.column(name) for name in batch.schema.names}
        self.id = columns["id"]
        self.file, self.row, self.length = (columns[name].to_numpy() for name in ("file", "row", "length"))
        ids, spans = columns["ids"], columns["supervised_spans"]
        self.ids, self.ids_at = ids.values.to_numpy(), ids.offsets.to_numpy()
        self.spans, self.spans_at = spans.values.to_numpy(), spans.offsets.to_numpy()
        images = columns["images"]
        self.images_at = images.offsets.to_numpy()
        names, *numbers = images.values.flatten()
        self.image_names, self.image_numbers = names, [column.to_numpy() for column in numbers]

    def image(self, number: int) -> ImageRef:
        container, offset, size, crc = (int(column[number]) for column in self.image_numbers)
        return ImageRef(self.image_names[number].as_py(), container, offset, size, crc)


@dataclass(frozen=True)
class DataSetIndex:
    """The samples of one data set.

    Attributes:
        path: the Arrow file.
        source: what it was made from.
        fingerprint: of all that it depends on.
    """

    path: Path
    source: Source
    fingerprint: str

    def __getstate__(self) -> dict[str, Any]:  # a worker process maps the file itself: all share one copy in memory
        return {"path": self.path, "source": self.source, "fingerprint": self.fingerprint}

    @cached_property
    def table(self) -> pa.Table:
        """The mapped file, with the columns of `prepare.SCHEMA`."""
        with reading(self.path, "It was prepared data of the cache: start again, and it is prepared anew."):
            return pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()

    @cached_property
    def faults(self) -> list[Fault]:
        """The faults of the records that are not in the file."""
        return faults_of(self.path)

    @cached_property
    def contents(self) -> str:
        """Identifies the data files, whatever the model."""
        return contents_of(self.source)

    def image_paths(self) -> pa.ChunkedArray:
        """Return every image's path (or location in a file), row by row: equal texts are the same image."""
        root = self.source.images.root
        real = pa.array([os.path.realpath(path) for path in self.source.images.containers])
        first_file = 1 if root.is_dir() else 0
        chunks = []
        for batch in self._batches:
            name, container, offset, size, _ = batch.column("images").values.flatten()
            location = [pa.compute.cast(column, pa.string()) for column in (offset, size)]
            file = real.take(pa.compute.max_element_wise(container, 0))
            in_file = pa.compute.binary_join_element_wise(file, *location, "#")
            by_name = pa.compute.binary_join_element_wise(real[0], _without_detours(name), "/")
            inline = pa.compute.starts_with(name, "data:")
            named = pa.compute.if_else(inline, name, by_name)
            chunks.append(pa.compute.if_else(pa.compute.greater_equal(container, first_file), in_file, named))
        return pa.chunked_array(chunks, type=pa.string())

    @property
    def num_records(self) -> int:
        """Sound and faulty records together."""
        return len(self) + len(self.faults)

    def numbers(self, column: str) -> npt.NDArray[Any]:
        """Return a whole column of numbers."""
        return self.table.column(column).to_numpy()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row(self, number: int, data_set: int = 0) -> Row:
        """Return one row."""
        chunk = bisect_right(self._starts, number) - 1
        if (batch := self._views.get(chunk)) is None:
            batch = self._views[chunk] = _Batch(self._batches[chunk])
        at = number - self._starts[chunk]
        return Row(
            data_set,
            self.source.file_names[batch.file[at]],
            int(batch.row[at]),
            batch.id[at].as_py(),
            tuple(batch.image(image) for image in range(batch.images_at[at], batch.images_at[at + 1])),
            batch.ids[batch.ids_at[at] : batch.ids_at[at + 1]],
            batch.spans[batch.spans_at[at] : batch.spans_at[at + 1]],
            int(batch.length[at]),
        )

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return [batch for batch in self.table.to_batches() if batch.num_rows]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *np.cumsum([batch.num_rows for batch in self._batches]).tolist()][:-1]

    @cached_property
    def _views(self) -> dict[int, _Batch]:
        return {}


@dataclass(frozen=True)
class SampleIndex:
    """Random access to the samples of one or several data sets, numbered one data set after the other."""

    data_sets: tuple[DataSetIndex, ...]

    @cached_property
    def starts(self) -> list[int]:
        """Number of the first sample of each data_set, and of all samples."""
        return [0, *np.cumsum([len(data_set) for data_set in self.data_sets]).tolist()]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per sample, image tokens included."""
        return self.column("length").astype(np.int64)

    @cached_property
    def num_supervised(self) -> npt.NDArray[np.int64]:
        """Supervised tokens per sample."""
        return self.column("num_supervised").astype(np.int64)

    @cached_property
    def num_images(self) -> npt.NDArray[np.int64]:
        """Images per sample."""
        counts = [
            pa.compute.list_value_length(data_set.table.column("images")).to_numpy() for data_set in self.data_sets
        ]
        return np.concatenate(counts).astype(np.int64)

    @property
    def num_records(self) -> int:
        """Sound and faulty records together."""
        return sum(data_set.num_records for data_set in self.data_sets)

    @property
    def fingerprint(self) -> str:
        """Identifies data, tokenizer, template and options."""
        return "+".join(data_set.fingerprint[:16] for data_set in self.data_sets)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a column of numbers over all samples."""
        return np.concatenate([data_set.numbers(name) for data_set in self.data_sets])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def row(self, number: int) -> Row:
        """Return one row."""
        data_set = bisect_right(self.starts, number, hi=len(self.data_sets)) - 1
        return self.data_sets[data_set].row(number - self.starts[data_set], data_set)

    def read_image(self, row: Row, number: int = 0) -> tuple[bytes, str]:
        """Return the bytes of a row's image and what messages call it.

        Raises:
            RecordError: it is not there any more.
        """
        images = self.data_sets[row.data_set].source.images
        return images.read(row.images[number]), images.name(row.images[number])


def _without_detours(names: pa.Array) -> pa.Array:
    odd = pa.compute.match_substring_regex(names, r"(^|/)\.|//|\\")  # few data sets have any
    if not pa.compute.any(odd).as_py():
        return names
    return pa.array([name if name.startswith("data:") else safe_name(name) for name in names.to_pylist()])
