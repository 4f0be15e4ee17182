"""Data files are read row by row: nothing malformed crashes a reader or is lost in silence, and memory stays small."""

import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llavaforge.config.schema import DataEntry, SampleOptions
from llavaforge.data.faults import KINDS, Fault
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_index
from llavaforge.data.rows import json_list
from llavaforge.data.rows.kinds import read_chunks
from llavaforge.data.rows.readers import Malformed, parse_raw
from llavaforge.data.storage import archives
from llavaforge.errors import UserError
from llavaforge.model.load import LoadedModel

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PIECES = (1, 7, 64)


def read(path: Path, chunk: int = 3) -> dict[int, Any]:
    """All rows of a file as values, by their numbers."""
    rows: dict[int, Any] = {}
    for found in read_chunks(path, 0, chunk, {}):
        assert len(found.rows) == len(found.raws) <= chunk and 0 <= found.progress <= 1
        for number, raw in zip(found.rows, found.raws, strict=True):
            assert number not in rows
            rows[number] = parse_raw(raw)
    return rows


def same(one: Any, other: Any) -> bool:
    """Equality that holds for NaN, and tells 1 from 1.0 and True."""
    return json.dumps(one) == json.dumps(other)


# JSON lists.

VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
NUMBER = st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
BLANK = st.text(" \t\r\n", max_size=3)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """Texts of JSON lists: spelled in many ways."""
    compact, ascii_only = draw(st.booleans()), draw(st.booleans())
    indent = draw(st.sampled_from([None, 0, 2]))
    separators = (",", ":") if compact else None
    spelled = VALUE.map(lambda value: json.dumps(value, ensure_ascii=ascii_only, indent=indent, separators=separators))
    elements = draw(
        st.lists(spelled | NUMBER | st.sampled_from(["NaN", "-Infinity", "true", '"\\ud83d\\ude00"']), max_size=6)
    )
    around = [draw(BLANK) + element + draw(BLANK) for element in elements]
    return draw(BLANK) + "[" + ",".join(around) + "]" + draw(BLANK)


@quick
@given(document=documents(), piece=st.sampled_from(PIECES))
def test_a_list_is_split_as_json_reads_it(
    document: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_list, "CHUNK_CHARACTERS", piece)
    path = tmp_path / "rows.json"
    path.write_bytes(document.encode())
    rows = read(path)
    assert list(rows) == list(range(len(rows)))
    assert same(list(rows.values()), json.loads(document))


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """Documents with a few characters lost, added or changed, or cut off."""
    text = draw(documents())
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(text)))
        new = draw(
            st.sampled_from(['"', "\\", "{", "}", "[", "]", ",", ":", "-", ".", "e", "1", " ", "\n", "\x00", "x", ""])
        )
        text = text[:at] + new + draw(st.sampled_from([text[at:], text[at + 1 :], ""]))
    return text


@quick
@given(document=damaged(), piece=st.sampled_from(PIECES))
def test_a_damaged_list_is_refused_with_its_place_or_read_as_json_reads_it(
    document: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_list, "CHUNK_CHARACTERS", piece)
    path = tmp_path / "rows.json"
    path.write_bytes(document.encode())
    text = document.replace("\r\n", "\n").replace("\r", "\n")
    wanted: Any = None
    error: json.JSONDecodeError | None = None
    try:
        wanted = json.loads(text)
    except json.JSONDecodeError as caught:
        error = caught
    try:
        rows = read(path)
    except UserError as refused:
        assert str(refused).startswith(str(path))
        starts_as_list = text.lstrip(" \t\r\n").startswith("[")
        assert not (error is None and starts_as_list), "a sound list was refused"
        if error is not None and starts_as_list and "trailing comma" not in error.msg:
            assert str(refused).startswith(f"{path}:{error.lineno}:{error.colno}: malformed JSON")
        return
    if text.lstrip().startswith("{"):  # rows on lines
        assert len(rows) == sum(bool(line.strip()) for line in text.split("\n"))
    else:
        assert same(list(rows.values()), wanted)


@pytest.mark.parametrize(
    "row",
    ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, f'{{"a": {"9" * 5000}}}'],
    ids=["lists", "objects", "digits", "in it"],
)
def test_what_python_refuses_to_parse_is_told(row: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(f"[{{}},\n {row}]")
    with pytest.raises(UserError, match=r"rows\.json:2:2: malformed JSON"):
        read(tmp_path / "rows.json")
    (tmp_path / "rows.jsonl").write_text(f"{{}}\n{row}\n{{}}\n")
    rows = read(tmp_path / "rows.jsonl")
    assert isinstance(rows[2], Malformed) and rows[1] == rows[3] == {}


def test_the_place_of_a_fault_far_into_a_long_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "CHUNK_CHARACTERS", 1000)
    row = '{"id": 1}, '
    (tmp_path / "rows.json").write_text("[\n" + row * 1000 + '{"id": oops}]')
    with pytest.raises(UserError, match=rf"rows\.json:2:{len(row) * 1000 + 8}: malformed JSON: Expecting value"):
        read(tmp_path / "rows.json")


# JSON lines.

ONE_LINE = st.text(st.characters(exclude_characters="\n\r\ufeff", exclude_categories=["Cs"]), max_size=12)


@quick
@given(
    texts=st.lists(VALUE.map(json.dumps) | ONE_LINE | st.sampled_from(["{", '{"a": 1', "[1,", "", " "]), max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    chunk=st.integers(1, 4),
)
def test_malformed_lines_are_told_apart_and_the_others_read(
    texts: list[str], end: str, chunk: int, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(end.join(texts).encode())
    rows = read(tmp_path / "rows.jsonl", chunk)
    assert list(rows) == [number for number, text in enumerate(texts, 1) if text.strip()]
    for number, row in rows.items():
        try:
            wanted = json.loads(texts[number - 1])
        except ValueError:
            assert isinstance(row, Malformed)
        else:
            assert same(row, wanted)


ROW: dict[str, Any] = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_malformed_lines_become_faults_with_their_number(name: str, tmp_path: Path) -> None:
    good = json.dumps(ROW)
    lines = [good, good[:-5], "", good, "nonsense", good]
    (tmp_path / name).write_text("\n".join(lines))
    index = open_index(tmp_path / name, None, 0, SampleOptions(), quiet=True)
    rows, faults = ([1, 4, 6], [2, 5]) if name == "rows.jsonl" else ([0, 2, 4], [1, 3])  # .json: rows, from 0
    assert [index.row(number).number for number in range(len(index))] == rows
    assert [(fault.kind, fault.file, fault.row) for fault in index.data_sets[0].faults] == [
        ("malformed_json", name, row) for row in faults
    ]
    assert "malformed JSON at column" in index.data_sets[0].faults[0].message


# RowNumbers of any kind, through the whole preparation.

HALVES = st.text(st.characters(), max_size=6)  # with halves of surrogate pairs, which JSON can write
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | HALVES | st.sampled_from(["<image>", "<|im_end|>", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HALVES, inner, max_size=3),
    max_leaves=5,
)
ROLE = st.sampled_from(["human", "gpt", "system", "user", "assistant"])
TEXT = (
    st.sampled_from(["What?", "<image>", "<image>\nWhat?", "A square.", " ", "<|im_end|>", "<think>a</think>b"])
    | HALVES
)


def mostly(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(strategy, strategy, strategy, ANY)


def fields(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={key.rstrip("_"): mostly(value) for key, value in strategies.items()})


NAME = (
    st.sampled_from(["a.jpg", "b.jpg", "../a.jpg", "/a", "https://x.org/a.jpg", "data:image/png;base64,AA=="]) | HALVES
)
PART = fields(type=st.sampled_from(["text", "image", "image_url"]), text=TEXT, image=NAME, image_url=fields(url=NAME))
ROWS = mostly(
    fields(
        id=HALVES | st.integers(),
        image=NAME,
        images=st.lists(NAME, max_size=3),
        conversations=st.lists(fields(from_=ROLE, value=TEXT), max_size=5),
        system=TEXT,
    )
    | fields(
        messages=st.lists(fields(role=ROLE, content=TEXT | st.lists(PART, max_size=3)), max_size=5),
        images=st.lists(NAME),
    )
    | fields(image=NAME, caption=TEXT)
)


@pytest.fixture(scope="module")
def open_(loaded_llava: LoadedModel) -> Callable[..., SampleIndex]:
    def open_file(path: Path, images: Path | None = None) -> SampleIndex:
        entry = DataEntry(path=path, images=images)
        return open_index([entry], loaded_llava.processor, loaded_llava.num_image_tokens, SampleOptions(), quiet=True)

    return open_file


def assert_all_accounted_for(index: SampleIndex, numbers: list[int], num_images: int) -> None:
    """Every row is a sample with all its images, or a fault that can be shown."""
    faults: list[Fault] = index.data_sets[0].faults
    rows = [index.row(number) for number in range(len(index))]
    assert sorted([row.number for row in rows] + [fault.row for fault in faults]) == numbers
    for fault in faults:
        assert fault.kind in KINDS and fault.message
        str(fault).encode()
    for row in rows:
        assert index.num_supervised[rows.index(row)] > 0
        assert len(row.images) == row.ids.tolist().count(num_images)


@settings(parent=quick, max_examples=80)
@given(rows=st.lists(ROWS, min_size=1, max_size=6))
def test_no_row_of_json_crashes_or_passes_unnoticed(
    rows: list[Any], open_: Callable[..., SampleIndex], loaded_llava: LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"not looked at here")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = open_(tmp_path / "rows.jsonl", tmp_path)
    assert_all_accounted_for(index, list(range(1, len(rows) + 1)), loaded_llava.image_token_id)


@pytest.mark.parametrize("field", ["value", "image", "id"])
def test_half_a_surrogate_pair_is_a_fault_of_its_row(
    field: str, open_: Callable[..., SampleIndex], tmp_path: Path
) -> None:
    """JSON can write what UTF-8, and so Arrow and the tokenizer, cannot."""
    row = {
        "id": "x",
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image>"}, *ROW["conversations"][1:]],
    }
    spoiled = json.loads(json.dumps(row))
    (spoiled["conversations"][1] if field == "value" else spoiled)[field] = "a.jpg\ud83d"
    (tmp_path / "a.jpg").write_bytes(b"not looked at here")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(spoiled))
    index = open_(tmp_path / "rows.jsonl", tmp_path)
    if field == "id":  # only told to people
        assert [index.row(number).id for number in range(2)] == ["x", "a.jpg?"]
    else:
        assert [(fault.kind, fault.row) for fault in index.data_sets[0].faults] == [("malformed_row", 2)]


def or_none(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy, strategy, strategy)


PLAIN = st.sampled_from(["What?", "<image>", "<image>\nWhat?", "A square.", " ", "<|im_end|>"]) | st.text(max_size=4)
EMBEDDED = or_none(
    st.fixed_dictionaries({"bytes": or_none(st.binary(max_size=4)), "path": or_none(st.sampled_from(["a", "b"]))})
)
SPOKEN = st.fixed_dictionaries({"from": or_none(ROLE), "value": or_none(PLAIN)})
LISTS = st.fixed_dictionaries(
    {"from": or_none(st.lists(ROLE, max_size=4)), "value": or_none(st.lists(PLAIN, max_size=4))}
)
ARROW_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ARROW_TURN = [("from", pa.string()), ("value", pa.string())]
COLUMNS: dict[str, list[tuple[pa.DataType, st.SearchStrategy[Any]]]] = {
    "id": [(pa.string(), PLAIN), (pa.int64(), st.integers(0, 9))],
    "image": [(ARROW_IMAGE, EMBEDDED), (pa.binary(), st.binary(max_size=3)), (pa.string(), st.just("a.jpg"))],
    "images": [
        (pa.list_(ARROW_IMAGE), st.lists(EMBEDDED, max_size=3)),
        (pa.large_list(pa.binary()), st.lists(or_none(st.binary(max_size=2)), max_size=2)),
        (pa.list_(pa.string()), st.lists(st.just("a.jpg"), max_size=2)),
    ],
    "conversations": [
        (pa.list_(pa.struct(ARROW_TURN)), st.lists(or_none(SPOKEN), max_size=4)),
        (pa.struct([(name, pa.list_(kind)) for name, kind in ARROW_TURN]), LISTS),
        (pa.string(), st.lists(SPOKEN, max_size=4).map(json.dumps) | PLAIN | st.just("[" * 100_000)),
    ],
    "caption": [(pa.string(), PLAIN), (pa.int64(), st.integers(0, 9))],
    "thumb": [(pa.binary(), st.binary(max_size=2)), (ARROW_IMAGE, EMBEDDED)],
}  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    size = draw(st.integers(1, 5))
    arrays: dict[str, pa.Array] = {}
    for name in draw(st.lists(st.sampled_from(list(COLUMNS)), min_size=1, unique=True)):
        kind, values = draw(st.sampled_from(COLUMNS[name]))
        arrays[name] = pa.array(draw(st.lists(or_none(values), min_size=size, max_size=size)), type=kind)
    return pa.table(arrays)


@settings(parent=quick, max_examples=100)
@given(table=tables(), group=st.integers(1, 3), kind=st.sampled_from(["parquet", "arrow"]), batch=st.integers(1, 3))
def test_no_row_of_parquet_or_arrow_crashes_or_passes_unnoticed(
    table: pa.Table, group: int, kind: str, batch: int, open_: Callable[..., SampleIndex], loaded_llava: LoadedModel,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("llavaforge.data.storage.columns._BATCH", batch)
    (tmp_path / "a.jpg").write_bytes(b"not looked at here")
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=group)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=group)
    index = open_(path, tmp_path)
    assert_all_accounted_for(index, list(range(table.num_rows)), loaded_llava.image_token_id)
    for number in range(len(index)):
        row = index.row(number)
        held = [ref for ref in row.images if ref.container > 0]
        if held:  # these bytes, in this order, are the row's
            assert [bytes_of(table, row.number)[ref.size] for ref in held] == images_read(index, number)


def bytes_of(table: pa.Table, row: int) -> list[bytes | None]:
    """What the image column that comes first for records holds in a row."""
    order = [name for name in ("images", "image") if name in table.schema.names]
    holding = [name for name in order if "binary" in str(table.schema.field(name).type)] or ["thumb"]
    value = table.column(holding[0])[row].as_py()
    values = value if isinstance(value, list) else [value]
    return [item["bytes"] if isinstance(item, dict) else item for item in values]


def images_read(index: SampleIndex, number: int) -> list[bytes | None]:
    row, store = index.row(number), index.data_sets[0].source.images
    found: list[bytes | None] = []
    for ref in row.images:
        try:
            found.append(store.read(ref))
        except Exception as error:
            assert "holds no bytes" in str(error)
            found.append(None)
    return found


MEMBER = st.tuples(
    st.sampled_from(["000", "001", "some/000", "ünï"]),
    st.sampled_from(["json", "txt", "jpg", "0.jpg", "10.png", "cls", "JPG", "tar", ""]),
    st.sampled_from([json.dumps(ROW).encode(), b"<image>", b"{", b"[]", b"\xff\xfe", b"", b"A square."]),
)


@settings(parent=quick, max_examples=100)
@given(members=st.lists(MEMBER, min_size=1, max_size=8))
def test_no_sample_of_a_tar_crashes_or_passes_unnoticed(
    members: list[tuple[str, str, bytes]], open_: Callable[..., SampleIndex], loaded_llava: LoadedModel, tmp_path: Path
) -> None:
    path = tmp_path / "shard.tar"
    write_tar(path, [(f"{stem}.{extension}", data) for stem, extension, data in members])
    groups: list[list[str]] = []
    last = None
    for stem, extension, _ in members:
        if stem != last:
            groups.append([])
        last = stem
        groups[-1].append(extension.lower())
    samples = [group for group in groups if {"json", "txt", "jpg", "0.jpg", "10.png"} & set(group)]
    index = open_(path)
    assert_all_accounted_for(index, list(range(len(samples))), loaded_llava.image_token_id)
    twice = {
        number
        for number, group in enumerate(samples)
        for one in group
        if group.count(one) > 1 and one not in ("cls", "tar", "")
    }
    assert twice <= {fault.row for fault in index.data_sets[0].faults}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_a_name_that_is_not_utf8_can_be_shown(open_: Callable[..., SampleIndex], tmp_path: Path) -> None:
    write_tar(tmp_path / "shard.tar", [("\udcff.jpg", b"pixels"), ("\udcff.txt", b"A square.")])
    index = open_(tmp_path / "shard.tar")
    assert index.data_sets[0].faults == []
    data, name = index.read_image(index.row(0))
    assert data == b"pixels" and name.endswith("\ufffd.jpg")


# Archives.


@quick
@given(data=st.data(), suffix=st.sampled_from([".zip", ".tar"]))
def test_a_damaged_archive_is_refused_or_read(data: st.DataObject, suffix: str, tmp_path: Path) -> None:
    contents = bytearray(ARCHIVES[suffix])
    for _ in range(data.draw(st.integers(1, 3))):
        contents[data.draw(st.integers(0, len(contents) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"images{suffix}"
    path.write_bytes(contents[: data.draw(st.integers(0, len(contents)) | st.just(len(contents)))])
    try:
        archives.members(path, tmp_path / "cache")
    except UserError as error:
        assert re.match(rf"{path}: not a readable", str(error))


def archives_to_damage() -> dict[str, bytes]:
    buffers = {".zip": io.BytesIO(), ".tar": io.BytesIO()}
    with zipfile.ZipFile(buffers[".zip"], "w") as archive, tarfile.open(fileobj=buffers[".tar"], mode="w") as tar:
        for name in ("a.jpg", "b" * 120 + ".jpg"):
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(b"pixels")
            info = tarfile.TarInfo(name)
            info.size = 6
            tar.addfile(info, io.BytesIO(b"pixels"))
    return {suffix: buffer.getvalue()[:6144] for suffix, buffer in buffers.items()}


ARCHIVES = archives_to_damage()

# Memory.

READS_ALL = """
import resource, sys
from pathlib import Path
from llavaforge.data.rows.kinds import read_chunks

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

for _ in read_chunks(Path(sys.argv[1]), 0, 1000, {}):
    pass
before = peak()
rows = sum(len(chunk.rows) for chunk in read_chunks(Path(sys.argv[2]), 0, 1000, {}))
print(rows, (peak() - before) / 1024)
"""


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    """60 MB take no more than a file of one piece, give or take two pieces."""
    row = json.dumps(ROW | {"id": "x" * 1000})
    for folder, num_rows in (("small", 5_000), ("large", 55_000)):
        (tmp_path / folder).mkdir()
        text = "[" + f"{row},\n" * (num_rows - 1) + row + "]" if name == "rows.json" else f"{row}\n" * num_rows
        (tmp_path / folder / name).write_text(text)
    assert (tmp_path / "large" / name).stat().st_size > 60e6
    files = [str(tmp_path / folder / name) for folder in ("small", "large")]
    ran = subprocess.run([sys.executable, "-c", READS_ALL, *files], capture_output=True, text=True, check=True)
    num_read, grown_mb = ran.stdout.split()
    assert int(num_read) == 55_000
    assert float(grown_mb) < 8
