"""One set of samples, written in every format, is read as the same samples; what cannot be read is refused by name."""

import base64
import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PillowImage

from llavaforge.config.schema import DataEntry, SampleOptions
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_checked_index, open_index, sample_builder
from llavaforge.data.rows.formats import CAPTION_PROMPT
from llavaforge.data.rows.records import parse_record
from llavaforge.data.rows.sources import find_source
from llavaforge.data.storage import columns
from llavaforge.errors import UserError
from llavaforge.model.load import LoadedModel

OPTIONS = SampleOptions()


def jpeg(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    PillowImage.new("RGB", (20, 16), colour).save(buffer, "jpeg")
    return buffer.getvalue()


IMAGES = {"red.jpg": jpeg((200, 0, 0)), "shelf/blue.jpg": jpeg((0, 0, 200)), "shelf/grün.jpg": jpeg((0, 200, 0))}
PARSED = [
    # (id, images, turns)
    ("turns", ["red.jpg"], [("human", "<image>\nWhat colour?"), ("gpt", 'Red, "really".'), ("human", "Sure?"),
                            ("gpt", "Yes \\ no / {maybe}, [1, 2]\tor\nnot.")]),
    ("several", ["shelf/blue.jpg", "red.jpg"], [("human", "<image>\nand\n<image>\nCompare."), ("gpt", "Blue, red.")]),
    ("text", [], [("human", "Hello\u2028ça va\u0085?"), ("gpt", "Hi \U0001f600 漢字\u2029there.")]),
    ("system", ["shelf/grün.jpg"], [("system", "Be brief."), ("human", "What is it?\n<image>"), ("gpt", "A square.")]),
]  # fmt: skip
Parsed = tuple[str, list[str], list[tuple[str, str]]]
Rows = list[dict[str, Any]]


def llava(parsed: Sequence[Parsed] = PARSED) -> Rows:
    """The rows as LLaVA writes them: one file name, or a list of them."""
    rows = []
    for id_, images, turns in parsed:
        row: dict[str, Any] = {"id": id_, "conversations": [{"from": role, "value": text} for role, text in turns]}
        if images:
            row["image"] = images[0] if len(images) == 1 else images
        rows.append(row)
    return rows


def sharegpt() -> Rows:
    rows = []
    for row, (_, images, turns) in zip(llava(), PARSED, strict=True):
        row = {key: value for key, value in row.items() if key != "image"} | {"images": images}
        if turns[0][0] == "system":
            row |= {"system": turns[0][1], "conversations": row["conversations"][1:]}
        rows.append(row)
    return rows


ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def messages(parts: bool = False, image: Callable[[str], dict[str, Any]] | None = None) -> Rows:
    """The rows as OpenAI writes them; with `parts`, each line of a text is a content part."""
    rows = []
    for id_, images, turns in PARSED:
        left = list(images)
        said: list[dict[str, Any]] = []
        for role, text in turns:
            content: Any = text
            if parts:
                pieces = text.split("\n") if "<image>" in text else [text]
                content = [
                    image(left.pop(0)) if image and piece == "<image>" else {"type": "text", "text": piece}
                    for piece in pieces
                ]
            said.append({"role": ROLES[role], "content": content})
        rows.append({"id": id_, "messages": said} | ({} if parts else {"images": images}))
    return rows


def url_part(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": name}}


def inline(name: str) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(IMAGES[name]).decode()


def in_columns(one: bool = False, as_bytes: bool = True) -> Rows:
    """The rows with their images' bytes, for Arrow; every row has the same fields."""
    rows: Rows = []
    for (_, images, _), row in zip(PARSED, llava(), strict=True):
        embedded = [{"bytes": IMAGES[name] if as_bytes else None, "path": name} for name in images]
        row.pop("image", None)
        rows.append(row | ({"image": embedded[0] if embedded else None} if one else {"images": embedded}))
    return [row for row in rows if row["id"] != "several"] if one else rows


CONVERSATIONS = List({"from": Value("string"), "value": Value("string")})
ONE_IMAGE = Features({"id": Value("string"), "image": Image(), "conversations": CONVERSATIONS})
IMAGE_LIST = Features({"id": Value("string"), "images": List(Image()), "conversations": CONVERSATIONS})


def saved_by_datasets(one: bool = False, folder: Path | None = None) -> Dataset:
    """The rows as Hugging Face `datasets` holds them; with a folder, by the paths of image files there."""
    rows = in_columns(one, as_bytes=folder is None)
    for row in rows if folder else []:
        if one:
            row["image"] = row["image"] and str(folder / row["image"]["path"])
        else:
            row["images"] = [str(folder / image["path"]) for image in row["images"]]
    return Dataset.from_list(rows, features=ONE_IMAGE if one else IMAGE_LIST)


def write_images(folder: Path) -> None:
    for name, data in IMAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def zip_images(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in IMAGES.items():
            archive.writestr(name, data)


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def lines(rows: Rows, ascii_only: bool = False) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return bytes(sink.getvalue())


# Ways to write the samples: each gets an empty folder and returns the entry of a recipe.


def folder_with_images(root: Path) -> DataEntry:
    write_images(root / "images")
    (root / "chat.json").write_text(json.dumps(llava()))
    return DataEntry(path=root)


def json_and_zip(root: Path) -> DataEntry:
    zip_images(root / "images.zip")
    (root / "rows.json").write_text(json.dumps(llava(), ensure_ascii=False), "utf-8")
    return DataEntry(path=root / "rows.json")


def chat_json_beside_a_named_tar(root: Path) -> DataEntry:
    with tarfile.open(root / "photos.tar", "w") as archive:
        for name, data in IMAGES.items():
            add_member(archive, f"./{name}", data)
    (root / "chat.json").write_text(json.dumps(llava()))
    return DataEntry(path=root, images=root / "photos.tar")


def text_file(name: str, encode: Callable[[Rows], bytes]) -> Callable[[Path], DataEntry]:
    def write(root: Path) -> DataEntry:
        write_images(root / "pictures")
        (root / name).write_bytes(encode(llava()))
        return DataEntry(path=root / name, images=root / "pictures")

    return write


def rows_in_json(rows: Rows, format_: str) -> Callable[[Path], DataEntry]:
    def write(root: Path) -> DataEntry:
        write_images(root / "images")
        (root / "rows.jsonl").write_text(lines(rows), "utf-8")
        return DataEntry.model_validate({"path": root / "rows.jsonl", "format": format_})

    return write


def saved_dataset(root: Path) -> DataEntry:
    saved_by_datasets().save_to_disk(root / "set")
    return DataEntry(path=root / "set")


def saved_dict_of_image_files(root: Path) -> DataEntry:
    """Saved with the paths of files, which are gone when it is read."""
    write_images(root / "elsewhere")
    whole = saved_by_datasets(folder=root / "elsewhere")
    DatasetDict({"test": whole.select([0]), "train": whole}).save_to_disk(
        root / "set", num_shards={"train": 2, "test": 1}
    )
    shutil.rmtree(root / "elsewhere")
    return DataEntry(path=root / "set")


def saved_dict_with_a_named_split(root: Path) -> DataEntry:
    whole = saved_by_datasets()
    DatasetDict({"train": whole.select([0]), "held-out": whole}).save_to_disk(root / "set")
    return DataEntry(path=root / "set", split="held-out")


def write_shards(root: Path, hash_: str = "") -> None:
    whole = saved_by_datasets()
    (root / "data").mkdir()
    for number in range(2):
        shard = whole.shard(2, number, contiguous=True)
        shard.to_parquet(root / "data" / f"train-0000{number}-of-00002{hash_}.parquet", batch_size=2)
    whole.select([0]).to_parquet(root / "data" / f"test-00000-of-00001{hash_}.parquet")


def hub_shards(root: Path) -> DataEntry:
    write_shards(root)
    return DataEntry(path=root)


def hub_shards_with_hashes(root: Path) -> DataEntry:
    write_shards(root, hash_="-0123456789abcdef")
    return DataEntry(path=root)


def one_parquet(root: Path) -> DataEntry:
    saved_by_datasets().to_parquet(root / "all.parquet", batch_size=2)
    assert pq.ParquetFile(root / "all.parquet").metadata.num_row_groups == 2
    return DataEntry(path=root / "all.parquet")


def parquet_of_paths(root: Path) -> DataEntry:
    """Only the names of image files are in it."""
    write_images(root / "images")
    rows = [{"images": images, **row} for row, (_, images, _) in zip(llava(), PARSED, strict=True)]
    pq.write_table(
        pa.Table.from_pylist([{k: v for k, v in row.items() if k != "image"} for row in rows]), root / "p.parquet"
    )
    return DataEntry(path=root / "p.parquet")


def plain_table(rows: Rows) -> Callable[[Path], DataEntry]:
    def write(root: Path) -> DataEntry:
        pq.write_table(pa.Table.from_pylist(rows), root / "rows.parquet", row_group_size=2)
        return DataEntry(path=root / "rows.parquet")

    return write


def as_struct_of_lists() -> Rows:
    def turned(turns: list[dict[str, str]]) -> dict[str, list[str]]:
        return {key: [turn[key] for turn in turns] for key in ("from", "value")}

    return [row | {"conversations": turned(row["conversations"])} for row in in_columns()]


def as_json_text() -> Rows:
    return [row | {"conversations": json.dumps(row["conversations"])} for row in in_columns()]


def as_messages_with_marks() -> Rows:
    """Content parts that only mark the places of the images beside them."""
    marked = messages(parts=True, image=lambda _: {"type": "image", "text": None})
    return [{"messages": row["messages"], "id": row["id"], "images": beside["images"]}
            for row, beside in zip(marked, in_columns(), strict=True)]  # fmt: skip


def with_plain_bytes() -> Rows:
    """A list of plain bytes, and other columns of bytes, times and vectors."""
    other = {"thumb": b"no image", "vector": [0.5, 1.5], "image_hash": 7}
    return [other | row | {"images": [image["bytes"] for image in row["images"]]} for row in in_columns()]


def feather(root: Path) -> DataEntry:
    """Arrow's file format, in several record batches, with long offsets."""
    table = pa.Table.from_pylist(in_columns())
    large = pa.large_list(table.schema.field("images").type.value_type)
    table = table.set_column(table.schema.get_field_index("images"), "images", table["images"].cast(large))
    with pa.ipc.new_file(root / "rows.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return DataEntry(path=root / "rows.arrow")


def tar_shards(root: Path) -> DataEntry:
    """Two shards; members sorted by name, so that image 10 comes before image 2."""
    for number in range(2):
        with tarfile.open(root / f"{number:06d}.tar", "w") as archive:
            for at, (row, (_, images, _)) in enumerate(zip(llava(), PARSED, strict=True)):
                if at // 2 != number:
                    continue
                row.pop("image", None)
                members = [(f"{place}.jpg", IMAGES[name]) for place, name in zip((2, 10), images, strict=False)]
                members.append(("json", json.dumps(row).encode()))
                members.append(("cls", b"7"))
                for extension, data in sorted(members):
                    add_member(archive, f"some/{at:08d}.{extension}", data)
    return DataEntry(path=root)


def tar_whose_json_names_the_images(root: Path) -> DataEntry:
    """Alphabetically, red comes after blue: what the row says counts."""
    rows = llava()
    with tarfile.open(root / "shard.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for row, (id_, images, _) in zip(rows, PARSED, strict=True):
            names = {
                name: f"{id_}.{'z' if name.startswith('shelf') else 'a'}{place}.jpg"
                for place, name in enumerate(images)
            }
            if images:
                row["image"] = [names[name] for name in images]
            add_member(archive, f"{id_}.json", json.dumps(row).encode())
            for name in sorted(images, key=names.__getitem__):
                add_member(archive, names[name], IMAGES[name])
    return DataEntry(path=root / "shard.tar")


CRLF = text_file("rows.jsonl", lambda rows: lines(rows, ascii_only=True).replace("\n", "\r\n").encode())
WAYS: dict[str, Callable[[Path], DataEntry]] = {
    "folder": folder_with_images,
    "json and zip": json_and_zip,
    "chat.json beside a named tar": chat_json_beside_a_named_tar,
    "jsonl": text_file("rows.jsonl", lambda rows: lines(rows).encode()),
    "jsonl with empty lines": text_file("rows.jsonl", lambda rows: lines(rows).replace("\n", "\n\n \n").encode()),
    "jsonl without the last line end": text_file("rows.ndjson", lambda rows: lines(rows).rstrip().encode()),
    "jsonl.gz": text_file("rows.jsonl.gz", lambda rows: gzip.compress(lines(rows).encode())),
    "jsonl.gz of two members": text_file(
        "rows.jsonl.gz", lambda rows: b"".join(gzip.compress(lines(part).encode()) for part in (rows[:1], rows[1:]))
    ),
    "jsonl.zst": text_file("rows.jsonl.zst", lambda rows: zstd(lines(rows).encode())),
    "jsonl.zst of two frames": text_file(
        "rows.jsonl.zst", lambda rows: b"".join(zstd(lines(part).encode()) for part in (rows[:1], rows[1:]))
    ),
    "json.zst": text_file("rows.json.zst", lambda rows: zstd(json.dumps(rows).encode())),
    "json.gz": text_file("rows.json.gz", lambda rows: gzip.compress(json.dumps(rows).encode())),
    "lines named .json": text_file("rows.json", lambda rows: lines(rows).encode()),
    "byte order mark": text_file("rows.json", lambda rows: json.dumps(rows).encode("utf-8-sig")),
    "byte order mark, lines": text_file("rows.jsonl", lambda rows: lines(rows).encode("utf-8-sig")),
    "byte order mark, lines named .json": text_file("rows.json", lambda rows: lines(rows).encode("utf-8-sig")),
    "CRLF lines": CRLF,
    "CRLF list": text_file("rows.json", lambda rows: json.dumps(rows, indent=1).replace("\n", "\r\n").encode()),
    "pretty-printed": text_file("rows.json", lambda rows: json.dumps(rows, indent=4, ensure_ascii=False).encode()),
    "sharegpt": rows_in_json(sharegpt(), "sharegpt"),
    "messages": rows_in_json(messages(), "messages"),
    "messages with parts": rows_in_json(messages(parts=True, image=url_part), "messages"),
    "messages with inline images": rows_in_json(
        messages(parts=True, image=lambda name: url_part(inline(name))), "messages"
    ),
    "llava with inline images": rows_in_json(
        llava([(id_, [inline(name) for name in images], turns) for id_, images, turns in PARSED]), "llava"
    ),
    "detected, formats mixed": rows_in_json(
        [llava()[0], sharegpt()[1], messages()[2], messages(True, url_part)[3]], "auto"
    ),
    "save_to_disk": saved_dataset,
    "save_to_disk, splits and shards": saved_dict_of_image_files,
    "save_to_disk, a named split": saved_dict_with_a_named_split,
    "shards of the hub": hub_shards,
    "shards of the hub, with hashes": hub_shards_with_hashes,
    "to_parquet": one_parquet,
    "Parquet that names files": parquet_of_paths,
    "Parquet, struct of lists": plain_table(as_struct_of_lists()),
    "Parquet, JSON text": plain_table(as_json_text()),
    "Parquet, messages": plain_table(as_messages_with_marks()),
    "Parquet, plain bytes": plain_table(with_plain_bytes()),
    "Arrow file": feather,
    "WebDataset": tar_shards,
    "WebDataset that names its images": tar_whose_json_names_the_images,
}  # fmt: skip


class Seen(NamedTuple):
    """What training sees of a row."""

    id: str
    ids: list[int]
    supervised_spans: list[int]
    images: list[bytes]


def seen(index: SampleIndex) -> list[Seen]:
    rows = [index.row(number) for number in range(len(index))]
    return [
        Seen(row.id, row.ids.tolist(), row.supervised_spans.tolist(),
             [index.read_image(row, number)[0] for number in range(len(row.images))])
        for row in rows
    ]  # fmt: skip


@pytest.fixture(scope="module")
def open_(loaded_llava: LoadedModel) -> Callable[..., SampleIndex]:
    def open_entry(entry: DataEntry, sound: bool = False) -> SampleIndex:
        if sound:
            return open_checked_index([entry], loaded_llava.processor, loaded_llava.num_image_tokens, OPTIONS)
        return open_index([entry], loaded_llava.processor, loaded_llava.num_image_tokens, OPTIONS, quiet=True)

    return open_entry


@pytest.fixture(scope="module")
def wanted(loaded_llava: LoadedModel) -> list[Seen]:
    """The samples, made from records without any file."""
    builder = sample_builder(loaded_llava.processor, loaded_llava.num_image_tokens, OPTIONS)
    samples = [builder.build(parse_record(row)) for row in llava()]
    return [
        Seen(id_, sample.ids, sample.supervised_spans, [IMAGES[name] for name in images])
        for sample, (id_, images, _) in zip(samples, PARSED, strict=True)
    ]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches of Arrow rows, cut in the middle of a record batch."""
    monkeypatch.setattr(columns, "_BATCH", 3)


@pytest.mark.parametrize("way", WAYS)
def test_every_format_gives_the_same_samples(
    way: str, open_: Callable[..., SampleIndex], wanted: list[Seen], tmp_path: Path, small_batches: None
) -> None:
    index = open_(WAYS[way](tmp_path))
    assert index.data_sets[0].faults == []
    assert seen(index) == wanted


@pytest.mark.parametrize("kind", ["save_to_disk", "to_parquet"])
def test_a_column_of_single_images(
    kind: str, open_: Callable[..., SampleIndex], wanted: list[Seen], tmp_path: Path, small_batches: None
) -> None:
    dataset = saved_by_datasets(one=True)
    if kind == "save_to_disk":
        dataset.save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        dataset.to_parquet(tmp_path / "set" / "train.parquet", batch_size=2)
    index = open_(DataEntry(path=tmp_path / "set"))
    assert index.data_sets[0].faults == []
    assert seen(index) == [sample for sample in wanted if sample.id != "several"]


def caption_json(root: Path) -> DataEntry:
    write_images(root / "images")
    (root / "chat.json").write_text(
        json.dumps([{"id": name, "image": name, "caption": f"A {name}"} for name in IMAGES])
    )
    return DataEntry(path=root, format="caption")


def caption_tar(root: Path) -> DataEntry:
    with tarfile.open(root / "shard-000000.tar", "w") as archive:
        for name, data in IMAGES.items():
            key = name.replace(".jpg", "")
            add_member(archive, f"{key}.jpg", data)
            add_member(archive, f"{key}.json", json.dumps({"id": name, "url": "https://example.com/a.jpg"}).encode())
            add_member(archive, f"{key}.txt", f"A {name}\n".encode())
    return DataEntry(path=root)


def caption_parquet(root: Path) -> DataEntry:
    rows = [{"id": name, "image": {"bytes": data, "path": None}, "text": f"A {name}"} for name, data in IMAGES.items()]
    features = Features({"id": Value("string"), "image": Image(), "text": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(root / "train.parquet")
    return DataEntry(path=root)


def caption_parquet_by_another_name(root: Path) -> DataEntry:
    """The only image column has a name of its own."""
    rows = [{"id": name, "picture": {"bytes": data}, "caption": f"A {name}"} for name, data in IMAGES.items()]
    pq.write_table(pa.Table.from_pylist(rows), root / "train.parquet")
    return DataEntry(path=root)


@pytest.mark.parametrize("write", [caption_json, caption_tar, caption_parquet, caption_parquet_by_another_name])
def test_captions(
    write: Callable[[Path], DataEntry], open_: Callable[..., SampleIndex], loaded_llava: LoadedModel, tmp_path: Path
) -> None:
    builder = sample_builder(loaded_llava.processor, loaded_llava.num_image_tokens, OPTIONS)
    rows = [{"image": name, "conversations": [{"from": "human", "value": f"<image>\n{CAPTION_PROMPT}"},
                                              {"from": "gpt", "value": f"A {name}"}]} for name in IMAGES]  # fmt: skip
    samples = [builder.build(parse_record(row)) for row in rows]
    index = open_(write(tmp_path))
    assert index.data_sets[0].faults == []
    assert seen(index) == [
        Seen(name, sample.ids, sample.supervised_spans, [IMAGES[name]])
        for name, sample in zip(IMAGES, samples, strict=True)
    ]


def test_a_mixture_of_formats_is_one_index(
    open_: Callable[..., SampleIndex], wanted: list[Seen], loaded_llava: LoadedModel, tmp_path: Path
) -> None:
    entries = []
    for number, write in enumerate((folder_with_images, hub_shards, tar_shards)):
        (tmp_path / str(number)).mkdir()
        entries.append(write(tmp_path / str(number)))
    index = open_index(entries, loaded_llava.processor, loaded_llava.num_image_tokens, OPTIONS, quiet=True)
    assert seen(index) == wanted * 3


# Splits and layouts.


def test_the_train_split_is_the_default(tmp_path: Path) -> None:
    write_shards(tmp_path)
    files = find_source(DataEntry(path=tmp_path), tmp_path).files
    assert [file.name for file in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    files = find_source(DataEntry(path=tmp_path, split="test"), tmp_path).files
    assert [file.name for file in files] == ["test-00000-of-00001.parquet"]


LAYOUTS: list[tuple[list[str], str | None, list[str] | str]] = [
    # files of a folder, the split asked for, the files found or the error
    (["a.json"], None, ["a.json"]),
    (["a.json", "b.json"], None, r"no chat\.json.*several other data files \(a\.json, b\.json\): name one"),
    (["chat.json", "metadata.json"], None, ["chat.json"]),
    (["chat.json", "._chat.json", ".hidden.json"], None, ["chat.json"]),
    (["rows.json", "._rows.json"], None, ["rows.json"]),
    (["chat.json", "images.zip", "other.tar"], None, ["chat.json"]),
    (["train.jsonl", "test.jsonl"], None, ["train.jsonl"]),
    (["train.jsonl", "test.jsonl.gz"], "test", ["test.jsonl.gz"]),
    (["train.jsonl", "test.jsonl"], "tset", r"no split 'tset'.*test\.jsonl, train\.jsonl"),
    (["train-00000-of-00002.jsonl.gz", "train-00001-of-00002.jsonl.gz", "test-00000-of-00001.jsonl.gz"], None,
     ["train-00000-of-00002.jsonl.gz", "train-00001-of-00002.jsonl.gz"]),
    (["train-00000-of-00002.json", "test-00000-of-00001.json"], "test", ["test-00000-of-00001.json"]),
    (["000.tar", "001.tar", "images.tar"], None, ["000.tar", "001.tar"]),
    (["train-0.tar", "train-1.tar", "val-0.tar"], None, ["train-0.tar", "train-1.tar"]),
    (["train-0.tar", "train-1.tar", "val-0.tar"], "val", ["val-0.tar"]),
    (["validation.parquet", "test.parquet"], None, "splits test, validation: name one"),
    (["test.parquet", "more.parquet"], None, "splits more, test: name one"),
    (["test-0.parquet", "test-1.parquet"], None, ["test-0.parquet", "test-1.parquet"]),
    (["train.parquet"], "validation", "no split 'validation'.*It has: train"),
    (["0000.parquet", "0001.parquet"], None, ["0000.parquet", "0001.parquet"]),
    (["0000.parquet", "0001.parquet"], "train", r"no split 'train'.*\(no name\)"),
    (["train-00000-of-00001.parquet", "dataset_infos.json"], None, ["train-00000-of-00001.parquet"]),
    (["train/chat.json", "test/chat.json"], "test", ["chat.json"]),
    (["notes.txt"], None, r"no chat\.json.*Name the data file itself \(\.json, .*\.zst\)"),
    ([], None, r"no chat\.json"),
    ([], "train", "no split 'train'.*no data files"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "split", "expected"), LAYOUTS, ids=range(len(LAYOUTS)))
def test_the_files_of_a_folder(names: list[str], split: str | None, expected: list[str] | str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    entry = DataEntry(path=folder, split=split)
    if isinstance(expected, list):
        assert [file.name for file in find_source(entry, tmp_path).files] == expected
        return
    with pytest.raises(UserError, match=f"(?s){folder}.*{expected}"):
        find_source(entry, tmp_path)


def test_a_split_in_a_folder_of_its_own_has_its_own_images(open_: Callable[..., SampleIndex], tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        folder_with_images(tmp_path / split)
    index = open_(DataEntry(path=tmp_path, split="test"), sound=True)
    assert index.data_sets[0].source.images.root == tmp_path / "test" / "images"


def test_the_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    whole = saved_by_datasets()
    DatasetDict({"validation": whole, "test": whole}).save_to_disk(tmp_path / "several")
    DatasetDict({"test": whole}).save_to_disk(tmp_path / "one")
    whole.save_to_disk(tmp_path / "none")
    assert find_source(DataEntry(path=tmp_path / "one"), tmp_path).files[0].parent.name == "test"
    for name, split, message in (
        ("several", None, "validation, test.*name one|Name one"),
        ("several", "train", "no split 'train'.*validation, test"),
        ("none", "train", "has no splits.*Drop `split`"),
    ):
        with pytest.raises(UserError, match=f"(?s){tmp_path / name}.*{message}"):
            find_source(DataEntry(path=tmp_path / name, split=split), tmp_path)


def test_a_damaged_saved_data_set(tmp_path: Path) -> None:
    whole = saved_by_datasets()
    for name in ("text", "list", "empty"):
        whole.save_to_disk(tmp_path / name)
    (tmp_path / "text" / "state.json").write_text("{")
    (tmp_path / "list" / "state.json").write_text("[]")
    (tmp_path / "empty" / "state.json").write_text('{"_data_files": []}')
    for name in ("text", "list", "empty"):
        with pytest.raises(UserError, match=f"{tmp_path / name}.*(Save it again|without rows)"):
            find_source(DataEntry(path=tmp_path / name), tmp_path)
    whole.save_to_disk(tmp_path / "gone")
    (shard,) = (tmp_path / "gone").glob("*.arrow")
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard}: not there"):
        find_source(DataEntry(path=tmp_path / "gone"), tmp_path)


# What cannot be read.


def unreadable_files() -> dict[str, tuple[str, Callable[[Path], Any], str]]:
    """Name of the case -> (file, how it is written, what the error says besides the file)."""
    text = lines(llava() * 50).encode()
    listed = json.dumps(llava()).encode()

    def table(path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(in_columns()), path)

    def stream(path: Path) -> None:
        table = pa.Table.from_pylist(in_columns())
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)

    def shard(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            for at, row in enumerate(llava()):
                add_member(archive, f"{at}.json", json.dumps(row).encode())

    def cut(write: Callable[[Path], Any], keep: Callable[[bytes], int]) -> Callable[[Path], Any]:
        def write_and_cut(path: Path) -> None:
            write(path)
            data = path.read_bytes()
            path.write_bytes(data[: keep(data)])

        return write_and_cut

    def put(data: bytes) -> Callable[[Path], Any]:
        return lambda path: path.write_bytes(data)

    again, half = "ownload it again", lambda data: len(data) // 2
    no_rows = pa.table({"id": pa.array([], pa.string())})
    not_utf8 = json.dumps(llava(), ensure_ascii=False).encode().replace("ç".encode(), b"\xe7")
    not_a_tar = "not a readable, uncompressed tar.*ownload"
    return {
        "unknown suffix": ("rows.csv", put(b"a,b"), "not a known kind of data file.*Known: .json"),
        "no suffix": ("rows", put(b"[]"), "not a known kind of data file"),
        "compressed tar": ("rows.tar.gz", put(gzip.compress(b"")), "not a known kind of data file. Unpack it"),
        "tgz": ("rows.tgz", put(gzip.compress(b"")), "not a known kind of data file. Unpack it"),
        "empty .json": ("rows.json", put(b""), "expected a JSON list of rows, found an empty file"),
        "blank .json": ("rows.json", put(b" \n"), "expected a JSON list of rows, found an empty file"),
        "empty .jsonl": ("rows.jsonl", put(b""), "no rows"),
        "empty .parquet": ("rows.parquet", put(b""), again),
        "empty .arrow": ("rows.arrow", put(b""), again),
        "empty .tar": ("rows.tar", put(b""), not_a_tar),
        "tar without members": ("rows.tar", put(bytes(10240)), "no rows"),
        "empty .gz": ("rows.jsonl.gz", put(b""), "no rows|ownload it again"),
        "empty .zst": ("rows.jsonl.zst", put(b""), "no rows|ownload it again"),
        "no rows": ("rows.json", put(b"[]"), "no rows"),
        "no Parquet rows": ("rows.parquet", lambda path: pq.write_table(no_rows, path), "no rows"),
        "one object": ("rows.json", put(json.dumps(llava()[0], indent=1).encode()), "found one object"),
        "one object on a line": ("rows.json", put(b'{"data": []}'), r"rows\.json row 0: a row needs"),
        "a text": ("rows.json", put(b'"text"'), "expected a JSON list of rows, found something else"),
        "not JSON": ("rows.json", put(b"<html>"), "expected a JSON list of rows, found something else"),
        "a list of numbers": ("rows.json", put(b"[1, 2]"), "2 of 2 records are faulty.*a row is an object"),
        "a list in .jsonl": ("rows.jsonl", put(listed), "1 of 1 records are faulty.*found list"),
        "cut-off .json": ("rows.json", put(listed[:-40]), r"rows\.json:1:\d+: malformed JSON"),
        "cut-off .json after a row": ("rows.json", put(listed.split(b", {")[0]), r"rows\.json:1:\d+: malformed"),
        "cut-off .jsonl": ("rows.jsonl", put(text[:-40]), r"rows\.jsonl:200: malformed JSON"),
        "cut-off .gz": ("rows.jsonl.gz", put(gzip.compress(text)[:-20]), again),
        "cut-off .zst": ("rows.jsonl.zst", put(zstd(text)[:-20]), again),
        "not gzip": ("rows.jsonl.gz", put(text), again),
        "not zstd": ("rows.jsonl.zst", put(text), again),
        "Latin-1": ("rows.json", put(not_utf8), "not UTF-8 text.*Save the file as UTF-8"),
        "UTF-16": ("rows.jsonl", put(text.decode().encode("utf-16")), "not UTF-8 text"),
        "cut-off .parquet": ("rows.parquet", cut(table, half), again),
        "not Parquet": ("rows.parquet", put(listed), again),
        "cut-off .arrow": ("rows.arrow", cut(stream, half), again),
        "cut-off .arrow between batches": ("rows.arrow", cut(stream, lambda data: len(data) - 8), again),
        "not Arrow": ("rows.arrow", put(listed), again),
        "cut-off .tar": ("rows.tar", cut(shard, lambda data: 700), again),
        "cut-off .tar between members": ("rows.tar", cut(shard, lambda data: 2048), not_a_tar),
        "compressed by the name of a tar": ("rows.tar", put(gzip.compress(bytes(10240))), not_a_tar),
    }  # fmt: skip


UNREADABLE = unreadable_files()


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_refused_by_name(case: str, open_: Callable[..., SampleIndex], tmp_path: Path) -> None:
    name, write, message = UNREADABLE[case]
    write_images(tmp_path / "images")
    write(tmp_path / name)
    with pytest.raises(UserError, match=f"(?s){message}") as caught:
        open_(DataEntry(path=tmp_path / name), sound=True)
    assert str(tmp_path / name) in str(caught.value)


def test_a_single_file_has_no_split(tmp_path: Path) -> None:
    json_and_zip(tmp_path)
    with pytest.raises(UserError, match=r"rows\.json: a single file has no split 'train'"):
        find_source(DataEntry(path=tmp_path / "rows.json", split="train"), tmp_path)


@pytest.mark.parametrize(
    "name", ["not there", "/not/there", "data/set/chat", "rows.json", "data/rows.jsonl", "~nobody/x"]
)
def test_a_typo_of_a_local_path_asks_no_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=f"{name}: no such file or folder"):
        find_source(DataEntry(path=Path(name)), tmp_path)


# The hub: there is no network, so its client is the one stand-in.


def test_a_name_of_the_hub_is_downloaded(
    open_: Callable[..., SampleIndex], wanted: list[Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of the hub holds links to files elsewhere in it."""
    cached = tmp_path / "hub" / "datasets--someone--some-set"
    snapshot, blobs = cached / "snapshots" / "0123abcd", cached / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    folder_with_images(snapshot)
    for number, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    index = open_(DataEntry(path=Path("someone/some-set")), sound=True)
    assert asked == [("someone/some-set", {"repo_type": "dataset"})]
    assert seen(index) == wanted
    assert index.data_sets[0].source.name == "someone/some-set"


def test_a_name_that_the_hub_does_not_know_may_be_a_typo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"data/typo: no such file or folder.*the hub does not give it: no network"):
        find_source(DataEntry(path=Path("data/typo")), tmp_path)
