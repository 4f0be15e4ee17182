"""How the rows of each kind of data file are read, one at a time: memory does not grow with the file.

Comes in: an open file (`data/rows/kinds.py` says which reader it gets). Goes out: numbered raw rows. JSON rows stay
text here: parsing them is the part of the worker processes.
"""

import gzip
import io
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa

from llavaforge.data.rows import json_list
from llavaforge.data.rows.formats import FIELDS
from llavaforge.data.rows.json_list import JsonList
from llavaforge.data.storage import archives, columns
from llavaforge.data.storage.image_ref import IMAGE_KEYS, ImageRef
from llavaforge.errors import UserError

_CONVERSATIONS = ("conversations", "messages", "texts", "prompt", "completion")
_TEXT_MEMBERS = {"txt": "caption", "text": "caption", "caption": "caption"}
_IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jfif", "ppm")


@dataclass(frozen=True)
class Malformed:
    """A row that is not JSON."""

    message: str


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


def column_rows(path: Path, _: BinaryIO, container: int, renamed: Mapping[str, str]) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a Parquet or Arrow file."""
    return columns.read_rows(path, container, FIELDS, _CONVERSATIONS, renamed)


def json_rows(path: Path, file: BinaryIO, *_: Any) -> Iterator[tuple[int, str]]:
    """Yield the rows of a JSON list as text, numbered from 0; or of JSON lines by another name."""
    text = _decoded(path, file)
    start = text.read(json_list.CHUNK_CHARACTERS)
    if start.lstrip().startswith("{"):  # JSON lines by another name
        yield from enumerate(line for line in _lines_of_objects(start, text, path) if line.strip())
    else:
        yield from enumerate(JsonList(path, text, start))


def json_line_rows(path: Path, file: BinaryIO, *_: Any) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file that are not empty, numbered from 1."""
    return ((number, line) for number, line in enumerate(_lines(_decoded(path, file), path), 1) if line.strip())


def _lines(text: IO[str], path: Path) -> Iterator[str]:
    """Yield lines, none of them longer than a row may be."""
    while line := text.readline(json_list.LONGEST_ROW):
        if len(line) == json_list.LONGEST_ROW:
            raise UserError(f"{path}: a line of over {json_list.LONGEST_ROW:,} characters, which is no row. Mend it.")
        yield line


def _lines_of_objects(start: str, rest: IO[str], path: Path) -> Iterator[str]:
    """Yield the lines of a text whose first chunk was read already."""
    lines = start.split("\n")
    lines[-1] += rest.readline(json_list.LONGEST_ROW)
    if isinstance(parse_raw(lines[0]), Malformed):
        raise UserError(f"{path}: expected a JSON list of rows (or an object on each line), found one object.")
    yield from lines
    yield from _lines(rest, path)


def _decoded(path: Path, file: BinaryIO) -> IO[str]:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.GzipFile(fileobj=file), encoding="utf-8-sig")
    if path.suffix == ".zst":
        stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
        return io.TextIOWrapper(stream, encoding="utf-8-sig")
    return io.TextIOWrapper(file, encoding="utf-8-sig")


def tar_rows(path: Path, file: BinaryIO, container: int, _: Any) -> Iterator[tuple[int, Any]]:
    """Yield the samples of a WebDataset tar: members in a row that share a name up to its first dot."""
    return enumerate(_tar_samples(path, file, container))


def _tar_samples(path: Path, file: BinaryIO, container: int) -> Iterator[Any]:
    opened = archives.OpenFile(path)  # its reads leave the position of `file`
    for key, group in groupby(archives.tar_members(path, file), lambda member: _key_and_extension(member)[0]):
        members: list[tuple[str, ImageRef | bytes]] = []
        for member in group:
            extension = _key_and_extension(member)[1]
            if extension.rsplit(".", 1)[-1] in _IMAGE_MEMBERS:
                members.append((extension, ImageRef(_name(member), container, member.offset_data, member.size)))
            elif extension.rsplit(".", 1)[-1] in ("json", *_TEXT_MEMBERS):
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
        kind = extension.rsplit(".", 1)[-1]
        if kind != "json":
            if (name := _TEXT_MEMBERS[kind]) in row:
                texts = " and ".join(f"{key}.{one}" for one, text in members if not isinstance(text, ImageRef))
                return Malformed(f"{key}: has several texts ({texts}). Leave one, or put them into {key}.json.")
            row[name] = text
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
