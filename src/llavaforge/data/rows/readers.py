"""The rows of a data file, a chunk at a time, whatever its kind; memory does not grow with the file.

Comes in: a file found by `data/rows/sources.py`. Goes out: chunks of raw rows with their numbers. JSON rows stay text
here: parsing them is the workers' part.
"""

import gzip
import io
import json
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa

from llavaforge.data.rows import json_list
from llavaforge.data.rows.json_list import JsonList
from llavaforge.data.rows.records import FIELDS
from llavaforge.data.storage import archives, columns
from llavaforge.data.storage.image_ref import IMAGE_KEYS, ImageRef
from llavaforge.errors import UserError

_CONVERSATIONS = ("conversations", "messages")
_JSON_LINES = (".jsonl", ".ndjson")
_TEXT_MEMBERS = {"txt": "caption", "text": "caption", "caption": "caption"}
_IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jfif", "ppm")


@dataclass(frozen=True)
class Malformed:
    """A row that is not JSON."""

    message: str


@dataclass(frozen=True)
class Chunk:
    """RowNumbers of one file.

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


def read_chunks(path: Path, file: int, size: int) -> Iterator[Chunk]:
    """Yield a data file's rows.

    Args:
        path: .json, .jsonl or .ndjson (also .gz, .zst), .parquet, .arrow, or .tar (WebDataset).
        file: its number in the data set; its images are in container `file + 1`.
        size: most rows of a chunk.

    Raises:
        UserError: the file cannot be read as what its name says.
    """
    rows: list[int] = []
    raws: list[Any] = []
    with _opened(path, file + 1) as (pairs, progress):
        for row, raw in pairs:
            rows.append(row)
            raws.append(raw)
            if len(rows) == size:
                yield Chunk(file, rows, raws, progress(row))
                rows, raws = [], []
    if rows:
        yield Chunk(file, rows, raws, 1.0)


def parse_raw(raw: Any) -> Any:
    """Return a raw row as plain values, or as `Malformed`."""
    if not isinstance(raw, str):
        return raw
    try:
        return json.loads(raw.rstrip())
    except json.JSONDecodeError as error:
        message = error.msg.replace("starting at", "not closed")
        return Malformed(f"malformed JSON at column {error.colno}: {message}. Mend the line.")
    except (ValueError, RecursionError) as error:  # a number of more than 4,300 digits; nested too deeply
        return Malformed(f"malformed JSON: {error}. Mend the line.")


def is_json_lines(path: Path) -> bool:
    """Say whether a file's name tells JSON lines."""
    return any(suffix in _JSON_LINES for suffix in path.suffixes[-2:])


@contextmanager
def _opened(path: Path, container: int) -> Iterator[tuple[Iterator[tuple[int, Any]], Callable[[int], float]]]:
    """Open a data file; gives its numbered rows, and how much of it is read by a row, from 0 to 1."""
    size = max(1, path.stat().st_size)
    try:
        with open(path, "rb") as file:
            if path.suffix in columns.SUFFIXES:
                num_rows = columns.num_rows(path)
                yield columns.read_rows(path, container, FIELDS, _CONVERSATIONS), lambda row: (row + 1) / num_rows
            elif path.suffix == ".tar":
                yield enumerate(_tar_rows(path, file, container)), lambda _: file.tell() / size
            else:
                yield _text_rows(path, file), lambda _: file.tell() / size
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). Save the file as UTF-8.") from None
    except (EOFError, OSError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}). Download it again.") from None


def _text_rows(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    text = _decoded(path, file)
    if is_json_lines(path):
        yield from ((number, line) for number, line in enumerate(text, 1) if line.strip())
        return
    start = text.read(json_list.CHUNK_CHARACTERS)
    if start.lstrip().startswith("{"):  # JSON lines by another name
        yield from enumerate(line for line in _lines_of_objects(start, text, path) if line.strip())
    else:
        yield from enumerate(JsonList(path, text, start))


def _lines_of_objects(start: str, rest: IO[str], path: Path) -> Iterator[str]:
    """Yield the lines of a text whose first chunk was read already."""
    lines = start.split("\n")
    lines[-1] += rest.readline()
    if isinstance(parse_raw(lines[0]), Malformed):
        raise UserError(f"{path}: expected a JSON list of rows (or an object on each line), found one object.")
    yield from lines
    yield from rest


def _decoded(path: Path, file: BinaryIO) -> IO[str]:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.GzipFile(fileobj=file), encoding="utf-8-sig")
    if path.suffix == ".zst":
        stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
        return io.TextIOWrapper(stream, encoding="utf-8-sig")
    return io.TextIOWrapper(file, encoding="utf-8-sig")


def _tar_rows(path: Path, file: BinaryIO, container: int) -> Iterator[Any]:
    """Yield the samples of a WebDataset tar: members in a row that share a name up to its first dot."""
    opened = archives.OpenFile(path)  # its reads leave the place of `file`
    for key, group in groupby(archives.tar_members(path, file), lambda member: _key_and_extension(member)[0]):
        members: list[tuple[str, ImageRef | bytes]] = []
        for member in group:
            extension = _key_and_extension(member)[1]
            if extension.rsplit(".", 1)[-1] in _IMAGE_MEMBERS:
                members.append((extension, ImageRef(_name(member), container, member.offset_data, member.size)))
            elif extension == "json" or extension in _TEXT_MEMBERS:
                members.append((extension, archives.read_at(opened, member.offset_data, member.size)))
        if members:
            yield _tar_row(key, members)


def _name(member: tarfile.TarInfo) -> str:
    return member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _key_and_extension(member: tarfile.TarInfo) -> tuple[str, str]:
    folder, base = posixpath.split(_name(member))
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def _tar_row(key: str, members: Sequence[tuple[str, ImageRef | bytes]]) -> Any:
    if len(dict(members)) < len(members):
        return Malformed(f"{key}: a member comes twice. Give each sample a name of its own (up to the first dot).")
    row: dict[str, Any] = {"__key__": key}
    images: dict[str, ImageRef] = {}
    for extension, value in members:
        if isinstance(value, ImageRef):
            images[extension] = value
            continue
        try:
            text = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Malformed(f"{key}.{extension} is not UTF-8 text ({error}).")
        if extension != "json":
            row[_TEXT_MEMBERS[extension]] = text
            continue
        parsed = parse_raw(text)
        if not isinstance(parsed, dict):
            return parsed if isinstance(parsed, Malformed) else Malformed(f"{key}.json is not an object.")
        row = {**parsed, **row}
    if images:
        named = next((row.pop(name) for name in IMAGE_KEYS if row.get(name) is not None), None)
        row = {name: value for name, value in row.items() if name not in IMAGE_KEYS}
        row["images"] = _in_order(images, named)
    return row


def _in_order(images: dict[str, ImageRef], named: Any) -> list[ImageRef]:
    """Return a sample's images in the order in which its JSON names them, or else by their extensions' numbers.

    (`tar --sort=name` puts 10.jpg before 2.jpg.)
    """
    by_name = {
        name: ref for extension, ref in images.items() for name in (ref.name, posixpath.basename(ref.name), extension)
    }
    names = named if isinstance(named, list) else [named]
    if names and all(isinstance(name, str) and name in by_name for name in names):
        return [by_name[name] for name in names]
    return [images[extension] for extension in sorted(images, key=_by_numbers)]


def _by_numbers(extension: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", extension)]
