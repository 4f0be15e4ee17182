"""From a data set to its index: parsed, checked and tokenised once, in parallel, into a memory-mapped Arrow file.

Comes in: a `Source` and a `SampleBuilder`. Goes out: the path of the Arrow file, and the faults of the records that are
not in it.

The file is found again by a fingerprint of all that it depends on. It appears by a rename once it is complete: an
interrupted preparation is redone, and of two processes that want the same file one prepares and the other waits.
"""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict
from itertools import chain, count, islice, takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from llavaforge.data.faults import Fault, RecordError, describe_record
from llavaforge.data.index.fingerprint import fingerprint_of
from llavaforge.data.index.schema import SCHEMA
from llavaforge.data.index.sums import is_sound, sums_of, write_sums
from llavaforge.data.rows.kinds import Chunk, read_chunks
from llavaforge.data.rows.readers import Malformed, parse_raw
from llavaforge.data.rows.records import Record, id_of, parse_record
from llavaforge.data.rows.sources import Source
from llavaforge.data.storage import columns
from llavaforge.data.storage.image_ref import ImageRef
from llavaforge.data.storage.image_store import ImageStore
from llavaforge.data.text.sample import Sample, SampleBuilder
from llavaforge.errors import UserError
from llavaforge.files import naming, sync_path
from llavaforge.folders import remove_leftovers
from llavaforge.processes import workers
from llavaforge.progress import Bar

logger = logging.getLogger(__name__)

# Raise the first when a change of this package changes ids or labels, which ends runs that have begun (their identity
# holds it); the second when it only changes what else the file holds, or how.
_FORMAT, _LAYOUT = 3, 4
_CHUNK = 1_000  # records per parallel task; a single chunk is not worth a process
_ROWS_PER_BATCH = 1 << 16  # of the file: few batches open quickly, and one fits in memory
_BYTES_PER_BATCH = 1 << 28  # Arrow's lists count up to 2**31 elements in a batch
# Four numbers from 0 to 1 in brackets, as LLaVA writes a box, and the marks of other families.
_BOXES = re.compile(r"\[\s*[01]?\.\d+(?:\s*,\s*[01]?\.\d+){3}\s*\]|<box>|<\|box_start\|>|\bbbox\b")
_LARGE_GROUP = 64_000_000  # bytes of images in a row group of Parquet


def prepared(source: Source, builder: SampleBuilder | None, cache_dir: Path, quiet: bool) -> tuple[Path, str]:
    """Prepare a data set, or find that it is prepared.

    Without a `builder` the token columns stay empty (to check a data set without a model).

    Returns:
        The Arrow file, and the fingerprint of all that it depends on. `faults_of` reads the faults beside it.

    Raises:
        UserError: a file cannot be read at all.
    """
    fingerprint = fingerprint_of(source, builder, _FORMAT)
    name = hashlib.sha256(f"{fingerprint} {_LAYOUT}".encode()).hexdigest()[:16]
    first = cache_dir / "index" / f"{source.files[0].name.split('.')[0]}-{name}.arrow"
    if (path := _current(first, source.images)) is None:
        first.parent.mkdir(parents=True, exist_ok=True)
        with naming(first), alone(first):
            if (path := _current(first, source.images)) is None:
                path = next(version for version in _versions(first) if not version.exists())
                _prepare(source, builder, path, quiet)
    return path, fingerprint


def _versions(path: Path) -> Iterator[Path]:
    """Yield the names of an index: when one is damaged or an image was added, it may be in use, so another is made."""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}.arrow")


def _current(path: Path, images: ImageStore) -> Path | None:
    """Return the newest version of an index that is of use still, if there is one."""
    there = list(takewhile(Path.exists, _versions(path)))
    return next((version for version in reversed(there) if _is_current(version, images)), None)


def faults_of(path: Path) -> list[Fault]:
    """Return the faults of the records that are not in an Arrow file."""
    return [Fault(**json.loads(line)) for line in _faults_file(path).read_text().splitlines()]


def records_of(source: Source) -> Iterator[Record]:
    """Yield a data set's sound records, in the order of its index (which leaves out the others)."""
    worker = _Worker(None, source)
    for chunk in _limited(source):
        for raw in chunk.raws:
            with contextlib.suppress(RecordError):
                yield worker.record(parse_raw(raw))


def records_at(source: Source, places: Collection[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Record]]:
    """Yield the records at (number of the file, row), which were sound, each with its place; images are not looked for.

    Raises:
        UserError: one has changed since.
    """
    for chunk in _limited(source):
        for row, raw in zip(chunk.rows, chunk.raws, strict=True):
            if (place := (chunk.file, row)) in places:
                try:
                    yield place, _parsed(raw, source)
                except RecordError as error:
                    where = describe_record(source.file_names[chunk.file], row, id_of(parse_raw(raw)))
                    raise UserError(f"{where}: has changed since the data was opened: {error}") from None


def _parsed(raw: Any, source: Source) -> Record:
    if isinstance(value := parse_raw(raw), Malformed):
        raise RecordError("malformed_json", value.message)
    return parse_record(value, source.entry.format, source.entry.columns)


def _is_current(path: Path, images: ImageStore) -> bool:
    """Say whether an index is sound, and no image that was missing when it was made has been added since."""
    if not all(is_sound(one) for one in (path, _faults_file(path))):
        logger.warning("%s: prepared data is damaged; it is prepared anew", path)
        return False
    missing = [fault.path for fault in faults_of(path) if fault.kind in ("missing_image", "unsafe_path")]
    for name in missing:
        with contextlib.suppress(RecordError):
            images.locate(ImageRef(name))
            return False
    return True


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within the block be the only process that makes a file of the cache; wait for one that does."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        logger.info("another process prepares %s: waiting for it", path.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(source: Source, builder: SampleBuilder | None, path: Path, quiet: bool) -> None:
    logger.info("preparing %s", source.name)
    _warn_of_large_groups(source)
    # Of a preparation that was killed: we hold the lock.
    for written in (path, _faults_file(path)):
        remove_leftovers(path.parent, sums_of(written).name)
    for left_over in path.parent.glob(f"{glob.escape(path.stem)}.tmp-*"):
        left_over.unlink()
    data, faults = path.with_suffix(f".tmp-{os.getpid()}"), path.with_suffix(f".tmp-{os.getpid()}-faults")
    worker = _Worker(builder, source)
    num_records = 0
    try:
        with (
            naming(data),
            pa.OSFile(str(data), "wb") as file,
            pa.ipc.new_file(file, SCHEMA) as writer,
            faults.open("w") as fault_file,
            Bar(f"preparing {source.name}", quiet) as bar,
        ):
            gathered: list[pa.RecordBatch] = []
            for share, batch, found in _encoded(source, worker):
                fault_file.writelines(json.dumps(asdict(fault)) + "\n" for fault in found)
                gathered.append(batch)
                num_records += batch.num_rows + len(found)
                bar.update(share, f"preparing {source.name}: {num_records} records, {100 * share:.0f} %, ")
                num_rows, num_bytes = sum(one.num_rows for one in gathered), sum(one.nbytes for one in gathered)
                if num_rows >= _ROWS_PER_BATCH or num_bytes >= _BYTES_PER_BATCH:
                    writer.write_batch(pa.concat_batches(gathered))
                    gathered = []
            if gathered:
                writer.write_batch(pa.concat_batches(gathered))
        for written, final in ((faults, _faults_file(path)), (data, path)):
            sync_path(written)
            write_sums(written, final)
            os.replace(written, final)
    finally:
        data.unlink(missing_ok=True)
        faults.unlink(missing_ok=True)


def _warn_of_large_groups(source: Source) -> None:
    for path in source.files:
        size = 0
        with contextlib.suppress(OSError, pa.ArrowException):  # a damaged file is told of when it is read
            size = columns.largest_group_bytes(path, source.images.image_column) if path.suffix == ".parquet" else 0
        if size > _LARGE_GROUP:
            logger.warning(
                "%s: each of its images takes decoding %d MB, since Parquet decodes whole row groups. Write it anew "
                "with row_group_size=100, or with `save_to_disk`.",
                path, size // 1_000_000,
            )  # fmt: skip
            return


def _faults_file(path: Path) -> Path:
    return path.with_suffix(".faults.jsonl")


def _encoded(source: Source, worker: "_Worker") -> Iterator[tuple[float, pa.RecordBatch, list[Fault]]]:
    """Yield each chunk's samples and faults, in order, with the share of the data that is done by then."""
    chunks = _limited(source)
    first = list(islice(chunks, 2))
    if len(first) < 2:
        for chunk in first:
            yield (1.0, *worker(chunk))
        return
    for chunk, result in workers.each(worker, chain(first, chunks)):
        yield ((chunk.file + chunk.progress) / len(source.files), *result)


def _limited(source: Source) -> Iterator[Chunk]:
    left = source.entry.max_samples
    for number, path in enumerate(source.files):
        for chunk in read_chunks(path, number, _CHUNK, source.entry.columns):
            if left is None:
                yield chunk
            elif left > 0:
                yield Chunk(chunk.file, chunk.rows[:left], chunk.raws[:left], chunk.progress)
                left -= len(chunk.rows)
            else:
                return


class _Worker:
    """Turns chunks into samples; sent to each worker process once."""

    def __init__(self, builder: SampleBuilder | None, source: Source) -> None:
        self._builder, self._images, self._format = builder, source.images, source.entry.format
        self._names, self._columns = source.file_names, source.entry.columns

    def __call__(self, chunk: Chunk) -> tuple[pa.RecordBatch, list[Fault]]:
        """Return a chunk's samples as Arrow, and the faults of the other rows."""
        faults: list[Fault] = []
        rows: list[int] = []
        records: list[Record] = []
        raws = [parse_raw(raw) for raw in chunk.raws]
        for row, raw in zip(chunk.rows, raws, strict=True):
            try:
                records.append(self.record(raw))
                rows.append(row)
            except RecordError as error:
                faults.append(self._fault(error, chunk.file, row, id_of(raw)))
        results: list[Sample | RecordError] = [Sample([], [], 0, num_images=len(record.images)) for record in records]
        if self._builder is not None:
            results = self._builder.build_all(records)
        good: list[tuple[int, Record, Sample]] = []
        for row, record, result in zip(rows, records, results, strict=True):
            if isinstance(result, RecordError):
                faults.append(self._fault(result, chunk.file, row, record.id))
            else:
                good.append((row, record, result))
        faults.sort(key=lambda fault: fault.row)
        return _arrow(chunk.file, good), faults

    def record(self, raw: Any) -> Record:
        """Return a raw row as a record whose images are located.

        Raises:
            RecordError: it is faulty.
        """
        if isinstance(raw, Malformed):
            raise RecordError("malformed_json", raw.message)
        record = parse_record(raw, self._format, self._columns)
        located = tuple(self._images.locate(image) for image in record.images)
        return Record(record.id, located, record.turns, record.num_literals, record.answers)

    def _fault(self, error: RecordError, file: int, row: int, id_: str) -> Fault:
        return Fault(error.kind, self._names[file], row, id_, str(error), error.path)


def _arrow(file: int, samples: list[tuple[int, Record, Sample]]) -> pa.RecordBatch:
    rows = [
        {
            "id": record.id,
            "file": file,
            "row": row,
            # Turns that were dropped to fit took their images along.
            "images": [image._asdict() for image in record.images[: sample.num_images]],
            "ids": sample.ids,
            "supervised_spans": sample.supervised_spans,
            "length": sample.length,
            "num_supervised": sample.num_supervised,
            "num_turns_dropped": sample.num_turns_dropped,
            "num_tokens_cut": sample.num_tokens_cut,
            "num_literals": record.num_literals,
            "num_special_tokens": sample.num_special_tokens,
            "has_boxes": any(_BOXES.search(turn.text) for turn in record.turns),
            "digest": _digest(record),
        }
        for row, record, sample in samples
    ]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def _digest(record: Record) -> int:
    """Return 64 bits of a record's contents, its id aside: equal for exact duplicates."""
    contents = repr(([image[:4] for image in record.images], [tuple(turn) for turn in record.turns]))
    digest = hashlib.blake2b(contents.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
