"""The kinds of data files: one table, from a suffix to how such files are read, split and told apart.

Comes in: a file found by `data/rows/sources.py`. Goes out: chunks of its raw rows.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from llavaforge.data.rows import readers
from llavaforge.data.storage import columns
from llavaforge.errors import UserError


@dataclass(frozen=True)
class FileKind:
    """One kind.

    Attributes:
        read: yields numbered raw rows of (path, open file, number of the file's container in its `ImageStore`, and
            `DataEntry.columns`).
        holds_images: images are in the file itself. Such files are large: a folder of them is one data set in shards,
            and they are told apart by size, time and both ends; others by their SHA-256.
        num_rows: how many rows a file has, where it says so; else progress is told by bytes.
    """

    read: Callable[[Path, BinaryIO, int, Mapping[str, str]], Iterator[tuple[int, Any]]]
    holds_images: bool
    num_rows: Callable[[Path], int] | None = None


FILE_KINDS: dict[str, FileKind] = {
    ".json": FileKind(readers.json_rows, holds_images=False),
    ".jsonl": FileKind(readers.json_line_rows, holds_images=False),
    ".ndjson": FileKind(readers.json_line_rows, holds_images=False),
    ".parquet": FileKind(readers.column_rows, holds_images=True, num_rows=columns.num_rows),
    ".arrow": FileKind(readers.column_rows, holds_images=True, num_rows=columns.num_rows),
    ".tar": FileKind(readers.tar_rows, holds_images=True),
}
PACKED = (".gz", ".zst")
"""Compressed texts keep the suffix of their kind before this one: `rows.jsonl.zst`."""


def suffix_of(path: Path) -> str:
    """Return a file's suffix, a key of `FILE_KINDS` if it is a data file; of packed text the one below .gz or .zst."""
    inner = Path(path.stem).suffix
    is_packed_text = path.suffix in PACKED and inner in FILE_KINDS and not FILE_KINDS[inner].holds_images
    return inner if is_packed_text else path.suffix


@dataclass(frozen=True)
class Chunk:
    """Rows of one file.

    Attributes:
        file: number of the file.
        rows: their numbers: of lines (from 1) in .jsonl, else of rows (from 0).
        raws: JSON text, values, or `Malformed`.
        progress: how much of the file was read by then, 0 to 1.
    """

    file: int
    rows: list[int]
    raws: list[Any]
    progress: float


def read_chunks(path: Path, file: int, size: int, renamed: Mapping[str, str]) -> Iterator[Chunk]:
    """Yield a data file's rows.

    Args:
        path: of a kind in `FILE_KINDS`.
        file: its number in the data set; its images are in container `file + 1`.
        size: most rows of a chunk.
        renamed: `DataEntry.columns`.

    Raises:
        UserError: the file cannot be read as what its name says.
    """
    kind, num_bytes = FILE_KINDS[suffix_of(path)], max(1, path.stat().st_size)
    rows: list[int] = []
    raws: list[Any] = []
    try:
        num_rows = kind.num_rows(path) if kind.num_rows is not None else None
        with open(path, "rb") as opened:
            for row, raw in kind.read(path, opened, file + 1, renamed):
                rows.append(row)
                raws.append(raw)
                if len(rows) == size:
                    yield Chunk(file, rows, raws, (row + 1) / num_rows if num_rows else opened.tell() / num_bytes)
                    rows, raws = [], []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). Save the file as UTF-8.") from None
    except (EOFError, OSError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}). Download it again.") from None
    if rows:
        yield Chunk(file, rows, raws, 1.0)
