"""Parquet and Arrow files: rows without their image bytes, and the bytes of one image.

Comes in: a .parquet or .arrow file, as Hugging Face `datasets` writes them (`push_to_hub`, `save_to_disk`). Goes out:
rows for `data/rows/records.py`, and image bytes.

An image column is a struct {bytes, path}, a list of them, or plain bytes. An Arrow file is mapped, so any image is
there at once. Parquet stores rows in groups that must be decoded whole: keep them small (`datasets` writes 100 images
a group).
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llavaforge.data.storage.image_ref import IMAGE_KEYS, ImageRef
from llavaforge.errors import UserError

SUFFIXES = (".parquet", ".arrow")
_MAY_NAME_IMAGES = re.compile(r"im(a?ge?)s?|photo|pic|path|file", re.IGNORECASE)  # fields that are looked at if unread
_BATCH = 1000  # rows decoded at a time
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # without it Arrow reads a cut-off stream as a shorter one


def read_rows(
    path: Path,
    container: int,
    fields: Collection[str],
    conversations: Collection[str],
    renamed: Mapping[str, str],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the numbered rows of a .parquet or .arrow file, each image as an `ImageRef` into it.

    Other fields are None, but for those that may name images.

    Args:
        path: the file.
        container: number of the file in its `ImageStore`.
        fields: names of the fields to read.
        conversations: those of them that hold a list of turns, in whatever way it is stored.
        renamed: by our names of fields the file's own, where they differ.
    """
    schema = _schema(path)
    names, image = schema.names, _image_column(path, image_column_of(renamed))
    wanted = {*fields, *renamed.values(), *(name for name in names if _MAY_NAME_IMAGES.search(name))}
    kept = [n for n in names if n == image or (n in wanted and not _holds_images(schema.field(n).type))]
    others = dict.fromkeys(name for name in names if name not in kept)
    conversations = {renamed.get(name, name) for name in conversations}
    number = 0
    for batch in _text_batches(path, kept or names[:1], image):
        for row in batch.to_pylist():
            row |= others
            if image is not None:
                refs = _refs(row.pop(image), path, container, number)
                row[image if image in IMAGE_KEYS or image in renamed.values() else "image"] = refs
            for name in conversations:
                if name in row:
                    row[name] = _listed(row[name])
            yield number, row
            number += 1


def image_column_of(renamed: Mapping[str, str]) -> str | None:
    """Return the file's own name of the image column, when `DataEntry.columns` names one."""
    return renamed.get("images", renamed.get("image"))


def num_rows(path: Path) -> int:
    """Return the number of rows of a file."""
    return int(_parquet(path).metadata.num_rows if path.suffix == ".parquet" else _arrow(path).num_rows)


def close_files() -> None:
    """Forget opened files: they may have changed since."""
    for cache in (_parquet, _arrow, _read_group):
        cache.cache_clear()


def read_image(path: Path, row: int, number: int, column: str | None = None) -> bytes:
    """Return the bytes of an image: the `number`-th of its row, of the image column or the one named.

    Raises:
        ValueError: the row holds no bytes there.
    """
    if path.suffix == ".arrow":
        value = _arrow(path).column(_known_image_column(path, column))[row]
    else:
        group, first = _group_images(path, row, _known_image_column(path, column))
        value = group[row - first]
    if isinstance(value, pa.ListScalar):
        value = value.values[number]
    if isinstance(value, pa.StructScalar):
        value = value["bytes"]
    data = value.as_py()
    if data is None:
        raise ValueError("it names a file and holds no bytes: save the data set with its images embedded")
    return bytes(data)


def largest_group_bytes(path: Path, column: str | None = None) -> int:
    """Return how many bytes of images must be decoded at most to reach one of a Parquet file; 0 without images."""
    metadata, name = _parquet(path).metadata, _image_column(path, column)
    sizes = [0]
    for group in range(metadata.num_row_groups):
        leaves = [metadata.row_group(group).column(leaf) for leaf in range(metadata.num_columns)]
        sizes.append(sum(c.total_uncompressed_size for c in leaves if c.path_in_schema.split(".")[0] == name))
    return max(sizes)


def _image_column(path: Path, named: str | None) -> str | None:
    """Return the image column: the one named, the first that records look for, or one that can only be images.

    Raises:
        UserError: there are several, and none is named.
    """
    schema = _schema(path)
    known = [named] if named is not None else [name for name in IMAGE_KEYS if name in schema.names]
    if known:
        return next((n for n in known if n in schema.names and _holds_images(schema.field(n).type)), None)
    found = [field.name for field in schema if _holds_images(field.type) and not _is_binary(field.type)]
    if len(found) > 1:
        raise UserError(
            f"{path}: has several image columns ({', '.join(found[:10])}). Name one in a data entry: "
            f"`columns: {{image: {found[0]}}}`."
        )
    return found[0] if found else None


def _known_image_column(path: Path, named: str | None) -> str:
    if (name := _image_column(path, named)) is None:
        raise KeyError(f"{path} has no image column")
    return name


def _text_batches(path: Path, names: list[str], image: str | None) -> Iterator[pa.RecordBatch]:
    """Yield columns of a file, with `True` in place of image bytes."""
    told_by_path = False
    if path.suffix == ".parquet":
        leaves, told_by_path = _light_leaves(path, names, image)
        batches = _parquet(path).iter_batches(batch_size=_BATCH, columns=leaves)
    else:
        batches = iter(_arrow(path).select(names).to_batches(max_chunksize=_BATCH))
    for batch in batches:
        columns = [_without_bytes(column, told_by_path) for column in batch.columns]
        yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _light_leaves(path: Path, names: list[str], image: str | None) -> tuple[list[str], bool]:
    """Return the Parquet leaves of columns without image bytes, and whether an image without a path is none.

    Image bytes are read only where nothing else tells which are there: a merged table has structs of nulls in its
    text-only rows. (A column that is nothing but bytes is read.)
    """
    schema = _parquet(path).schema
    leaves = [schema.column(number).path for number in range(len(schema))]
    kept = [leaf for leaf in leaves if leaf.split(".")[0] in names]
    data = f"{image}.bytes"  # lists are not looked at: an empty one counts as a null
    if data in leaves:
        nulls, nulls_of_path = (_num_nulls(path, leaf) for leaf in (data, f"{image}.path"))
        if nulls and nulls != nulls_of_path:
            return kept, False
        if f"{image}.path" in leaves:
            kept.remove(data)
        return kept, bool(nulls)
    light = [leaf for leaf in kept if leaf.split(".")[0] != image or leaf.endswith(".path")]
    if any(leaf.split(".")[0] == image for leaf in light):
        kept = light
    return kept, False


def _num_nulls(path: Path, leaf: str) -> int | None:
    """Return how many values of a Parquet leaf are null; None when the file does not say."""
    metadata, total = _parquet(path).metadata, 0
    for group in range(metadata.num_row_groups):
        columns = (metadata.row_group(group).column(number) for number in range(metadata.num_columns))
        for column in columns:
            if column.path_in_schema == leaf:
                if column.statistics is None or not column.statistics.has_null_count:
                    return None
                total += column.statistics.null_count
    return total


def _without_bytes(column: pa.Array, told_by_path: bool) -> pa.Array:
    """Return a column with `True` in place of image bytes; nothing is copied."""
    kind = column.type
    if _is_list(kind) and _holds_images(kind):
        first, last = column.offsets[0].as_py(), column.offsets[-1].as_py()
        values = _without_bytes(column.values.slice(first, last - first), told_by_path)
        return type(column).from_arrays(pc.subtract(column.offsets, first), values, mask=column.is_null())
    if pa.types.is_struct(kind) and _holds_images(kind):
        path = column.field("path") if kind.get_field_index("path") >= 0 else pa.nulls(len(column), pa.string())
        mask = pc.or_(column.is_null(), pc.and_(column.field("bytes").is_null(), path.is_null()))
        return pa.StructArray.from_arrays([path], names=["path"], mask=mask)
    if pa.types.is_struct(kind) and told_by_path and kind.names == ["path"]:
        return pa.StructArray.from_arrays([column.field("path")], names=["path"], mask=column.field("path").is_null())
    return column.is_valid() if _is_binary(kind) else column


def _refs(value: Any, path: Path, container: int, row: int) -> Any:
    if isinstance(value, list):
        return [_ref(item, path, container, row, number) for number, item in enumerate(value)]
    return _ref(value, path, container, row, 0)


def _ref(value: Any, path: Path, container: int, row: int, number: int) -> ImageRef | None:
    if value is None or value is False:
        return None
    name = value.get("path") if isinstance(value, dict) else None
    return ImageRef(name or f"{path.name} row {row}", container, row, number)


def _listed(value: Any) -> Any:
    """Return a conversation as a list of turns: some data sets keep it as JSON text, some as a struct of lists."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, dict) and value and all(isinstance(item, list) for item in value.values()):
        if len({len(item) for item in value.values()}) == 1:
            value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if isinstance(value, list):  # so may the parts of a message be
        return [
            {key: _listed(item) if isinstance(item, dict) else item for key, item in turn.items()}
            if isinstance(turn, dict)
            else turn
            for turn in value
        ]
    return value


def _holds_images(kind: pa.DataType) -> bool:
    if _is_list(kind):
        return _holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _schema(path: Path) -> pa.Schema:
    return _parquet(path).schema_arrow if path.suffix == ".parquet" else _arrow(path).schema


@lru_cache(maxsize=16)
def _parquet(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path)


@lru_cache(maxsize=64)
def _arrow(path: Path) -> pa.Table:
    source = pa.memory_map(str(path))
    try:
        table = pa.ipc.open_stream(source).read_all()  # as `datasets` writes it
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()
    source.seek(source.size() - len(_END_OF_STREAM))
    if source.read() != _END_OF_STREAM:
        raise pa.ArrowInvalid("it has no end mark")
    return table


def _group_images(path: Path, row: int, column: str) -> tuple[pa.ChunkedArray, int]:
    """Return the images of a row's group, and the group's first row."""
    metadata, first = _parquet(path).metadata, 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if row < first + size:
            return _read_group(path, group, column), first
        first += size
    raise ValueError(f"{path} has no row {row} any more")


@lru_cache(maxsize=1)
def _read_group(path: Path, group: int, name: str) -> pa.ChunkedArray:
    """Return the images of a row group; the newest one is kept, for reading in order."""
    return _parquet(path).read_row_group(group, columns=[name]).column(name)
