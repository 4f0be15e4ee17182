"""The tokenised data set: an Arrow file, memory-mapped, built once and found again by its fingerprint.

Comes in: records and a `SampleBuilder`. Goes out: a `SampleIndex`. Called by `train/run.py` and `use/evaluate.py`.

One row:

    id "GCC_train_002582585" | where "chat.json row 7 (id ...)" | image "GCC_train_002582585.jpg" | ids [151644, 872,
    ...] | supervised_spans [25, 41] | length 626 | num_supervised 16
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llavaforge.checkpoint.publish import sha256, sync_path
from llavaforge.config.schema import SampleOptions
from llavaforge.data.image_store import ImageStore, find_images
from llavaforge.data.records import Record, RecordError, find_data_file, raise_faults, read_records
from llavaforge.data.sample import Sample, SampleBuilder
from llavaforge.data.template import ChatTemplate

logger = logging.getLogger(__name__)

_FORMAT = 1  # raise when a change of this package changes what the file holds
_CHUNK = 2_000  # records per parallel task; fewer than two chunks are not worth a process
_NUM_IMAGES_CHECKED = 1_000
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("where", pa.string()),
        ("image", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("supervised_spans", pa.list_(pa.int32())),
        ("length", pa.int32()),
        ("num_supervised", pa.int32()),
    ]
)


@dataclass(frozen=True)
class SampleIndex:
    """Random access to the samples of one data set.

    Sent to a worker process, it travels as its path and is mapped again there: all share one copy in memory.

    Attributes:
        path: the Arrow file.
        images: where the images are.
        fingerprint: identifies data, tokenizer, template and options.
    """

    path: Path
    images: ImageStore
    fingerprint: str

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "images": self.images, "fingerprint": self.fingerprint}

    @cached_property
    def table(self) -> pa.Table:
        """Memory-mapped Arrow table with the columns of `SCHEMA`."""
        return pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per sample, image tokens included."""
        return self._numbers("length")

    @cached_property
    def num_supervised(self) -> npt.NDArray[np.int64]:
        """Supervised tokens per sample."""
        return self._numbers("num_supervised")

    @cached_property
    def num_images(self) -> npt.NDArray[np.int64]:
        """Images per sample."""
        return np.asarray(self.table.column("image").is_valid().to_numpy(), dtype=np.int64)

    def _numbers(self, column: str) -> npt.NDArray[np.int64]:
        return np.asarray(self.table.column(column).to_numpy(), dtype=np.int64)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row(self, number: int) -> dict[str, Any]:
        """Return one row as plain Python values."""
        return {name: self.table.column(name)[number].as_py() for name in SCHEMA.names}


def open_index(data_path: Path, processor: Any, num_image_tokens: int, options: SampleOptions) -> SampleIndex:
    """Open the index of a data set, building it first when it is not in the cache.

    Args:
        data_path: as in `TrainConfig.data_path`.
        processor: the model's `LlavaProcessor`.
        num_image_tokens: tokens that one image takes.
        options: prompt style, lengths, cache.

    Raises:
        UserError: faulty records or missing images, all counted, the first ones named.
    """
    data_file = find_data_file(data_path)
    images = find_images(data_file, options.image_folder)
    builder = sample_builder(processor, num_image_tokens, options)
    fingerprint = _fingerprint(data_file, builder)
    path = _cache_dir(options) / f"{data_file.stem}-{fingerprint[:16]}.arrow"
    known = path.is_file()
    if not known:
        records = read_records(data_file)
        _check_images([(record.where, record.image) for record in records], images, data_file)
        _build(records, builder, path, data_file)
    index = SampleIndex(path, images, fingerprint)
    if known:  # the images may have gone since: look at some, as all would take minutes on a network drive
        some = np.linspace(0, len(index) - 1, min(len(index), _NUM_IMAGES_CHECKED), dtype=np.int64)
        table = index.table.select(["where", "image"]).take(some)
        pairs = zip(table["where"].to_pylist(), table["image"].to_pylist(), strict=True)
        _check_images(list(pairs), images, data_file)
    _report(index.table.schema.metadata, data_file)
    return index


def sample_builder(processor: Any, num_image_tokens: int, options: SampleOptions) -> SampleBuilder:
    """Return the builder for a model's processor and the user's options."""
    tokenizer = processor.tokenizer
    template = processor.chat_template or tokenizer.chat_template or ""
    chat = ChatTemplate(tokenizer, template, options.prompt_style, options.system_prompt)
    return SampleBuilder(tokenizer, chat, int(processor.image_token_id), num_image_tokens, options.max_length)


def _check_images(rows: Sequence[tuple[str, str | None]], images: ImageStore, data_file: Path) -> None:
    """Check that the image of each (where, image) is there."""
    faults = [
        f"{where}: image {image!r} is not in {images.root}. Add the file or remove the row."
        for where, image in rows
        if image is not None and not images.has(image)
    ]
    raise_faults(faults, len(rows), data_file)


def _build(records: Sequence[Record], builder: SampleBuilder, path: Path, data_file: Path) -> None:
    logger.info("tokenising %s (%d records)", data_file, len(records))
    faults: list[str] = []
    counts = {"turns_dropped": 0, "tokens_cut": 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    try:
        batches = []
        for chunk, (samples, chunk_faults) in _encode_chunks(records, builder):
            faults += chunk_faults
            if not chunk_faults:
                batches.append(_arrow(chunk, samples))
            counts["turns_dropped"] += sum(sample.num_turns_dropped for sample in samples)
            counts["tokens_cut"] += sum(sample.num_tokens_cut for sample in samples)
        raise_faults(faults, len(records), data_file)
        schema = SCHEMA.with_metadata({key: str(count) for key, count in counts.items()})
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        sync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode_chunks(
    records: Sequence[Record], builder: SampleBuilder
) -> Iterator[tuple[Sequence[Record], tuple[list[Sample], list[str]]]]:
    chunks = [records[start : start + _CHUNK] for start in range(0, len(records), _CHUNK)]
    num_processes = min(os.cpu_count() or 1, len(chunks))
    if num_processes < 2:
        yield from ((chunk, _encode(builder, chunk)) for chunk in chunks)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    with ProcessPoolExecutor(
        num_processes, mp_context=get_context("spawn"), initializer=_remember, initargs=(builder,)
    ) as pool:
        yield from zip(chunks, pool.map(_encode_remembered, chunks), strict=True)


_remembered: list[SampleBuilder] = []


def _remember(builder: SampleBuilder) -> None:
    _remembered[:] = [builder]


def _encode_remembered(records: Sequence[Record]) -> tuple[list[Sample], list[str]]:
    return _encode(_remembered[0], records)


def _encode(builder: SampleBuilder, records: Sequence[Record]) -> tuple[list[Sample], list[str]]:
    samples, faults = [], []
    for record in records:
        try:
            samples.append(builder.build(record))
        except RecordError as error:
            faults.append(str(error))
    return samples, faults


def _arrow(records: Sequence[Record], samples: Sequence[Sample]) -> pa.RecordBatch:
    columns = [
        [record.id for record in records],
        [record.where for record in records],
        [record.image for record in records],
        [sample.ids for sample in samples],
        [sample.supervised_spans for sample in samples],
        [sample.length for sample in samples],
        [sample.num_supervised for sample in samples],
    ]
    arrays = [pa.array(column, type=kind.type) for column, kind in zip(columns, SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _fingerprint(data_file: Path, builder: SampleBuilder) -> str:
    """Identify everything that the ids depend on. The images' contents are not part of it."""
    parts = {
        "format": _FORMAT,
        "data": sha256(data_file),
        "tokenizer": builder.tokenizer.backend_tokenizer.to_str(),
        "template": builder.chat.template,
        "style": builder.chat.style,
        "system_prompt": builder.chat.system_prompt,
        "eos_token": builder.tokenizer.eos_token,
        "image": [builder.image_token_id, builder.num_image_tokens],
        "max_length": builder.max_length,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _cache_dir(options: SampleOptions) -> Path:
    default = os.environ.get("LLAVAFORGE_CACHE") or Path.home() / ".cache" / "llavaforge"
    return Path(options.cache_dir or default) / "index"


def _report(metadata: dict[bytes, bytes], data_file: Path) -> None:
    turns, tokens = int(metadata[b"turns_dropped"]), int(metadata[b"tokens_cut"])
    if turns or tokens:
        logger.warning("%s: %d turns dropped and %d tokens cut to fit max_length", data_file, turns, tokens)
