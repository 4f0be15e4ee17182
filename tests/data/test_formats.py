"""What people's data looks like: read as what it says, or told of; never learnt as something else in silence."""

import base64
import io
import json
import tarfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llavaforge.cli import main
from llavaforge.config.schema import DataEntry, SampleOptions
from llavaforge.data.faults import RecordError
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_index
from llavaforge.data.rows.records import parse_record
from llavaforge.data.rows.sources import find_source
from llavaforge.data.rows.turns import Turn
from llavaforge.data.storage import archives
from llavaforge.errors import UserError
from llavaforge.model.load import LoadedModel


def picture(colour: str = "red", format_: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.new("RGB", (40, 30), colour)
    image.paste("white", (5, 5, 15, 15))
    image.save(file, format_, **options)
    return file.getvalue()


ANSWERED = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}
WANTED = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))

SAME: dict[str, dict[str, Any]] = {
    "question and answer": {"image": "a.jpg", "question": "What?", "answer": "A cat."},
    "prompt and completion": {"image": "a.jpg", "prompt": "What?", "completion": "A cat."},
    "prompt and completion as messages": {
        "image": "a.jpg",
        "prompt": [{"role": "user", "content": "<image>\nWhat?"}],
        "completion": [{"role": "assistant", "content": "A cat."}],
    },
    "the_cauldron": {"images": ["a.jpg"], "texts": [{"user": "What?", "assistant": "A cat.", "source": "VQAv2"}]},
    "a list of no images beside one": {"images": [], "image": "a.jpg", **ANSWERED},
    "nulls of a merged table": {
        "images": [None],
        "image": {"bytes": None, "path": "a.jpg"},
        "messages": None,
        "conversations": [
            {"from": None, "value": None, "role": "user", "content": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cat.", "role": None, "content": None},
        ],
    },
    "a path with a scheme": {"image": "file://a.jpg", **ANSWERED},
}


@pytest.mark.parametrize("name", SAME)
def test_every_way_to_write_a_row_is_the_same_record(name: str) -> None:
    record = parse_record(SAME[name])
    assert record.turns == WANTED
    assert [image.name for image in record.images] == ["a.jpg"]


def test_columns_of_other_names_are_mapped() -> None:
    row = {"picture": "a.jpg", "ask": "What?", "reply": "A cat.", "image": None}
    columns = {"image": "picture", "question": "ask", "answer": "reply"}
    assert parse_record(row, columns=columns).turns == WANTED
    with pytest.raises(RecordError, match=r"no field `ask` \(`columns`\); found picture"):
        parse_record({"picture": "a.jpg"}, columns=columns)
    with pytest.raises(ValueError, match="`picture` is none of our fields"):
        DataEntry(path=Path("x"), columns={"picture": "image"})
    with pytest.raises(RecordError, match=r"columns: \{image: \.\.\., question: "):
        parse_record({"ask": "What?", "reply": "A cat."})


def test_a_system_text_in_the_last_turn_comes_first() -> None:
    row = {"image": "a.jpg", "conversations": [*ANSWERED["conversations"], {"from": "system", "value": "Be brief."}]}
    assert parse_record(row).turns == (Turn("system", "Be brief."), *WANTED)


TEXT_ONLY = {"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]}
TOLD: dict[str, tuple[dict[str, Any], str, str]] = {
    "a video": ({"video": "a.mp4", **TEXT_ONLY}, "video", "`video`, which is not read"),
    "videos": ({"videos": ["a.mp4"], **TEXT_ONLY}, "video", "`videos`, which is not read"),
    "a placeholder of a video": (
        {"conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]},
        "video",
        "holds `<video>`",
    ),
    "image_path": ({"image_path": "a.jpg", **TEXT_ONLY}, "unread_image", r"columns: \{image: image_path\}"),
    "imgs": ({"imgs": ["a.PNG"], **TEXT_ONLY}, "unread_image", r"columns: \{image: imgs\}"),
    "no base64": ({"image": "x" * 5000, **ANSWERED}, "malformed_row", "a file name or base64"),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_an_answer_is_about_is_not_left_out_in_silence(name: str) -> None:
    row, kind, message = TOLD[name]
    with pytest.raises(RecordError, match=message) as caught:
        parse_record(row)
    assert caught.value.kind == kind
    assert len(str(caught.value)) < 600


def test_fields_that_name_no_image_are_nobodys_business() -> None:
    for beside in ({"video": None}, {"videos": []}, {"source": "coco.json"}, {"path": None}, {"note": "a.jpg\nb.jpg"}):
        assert parse_record({**beside, **TEXT_ONLY}).images == ()


Rows = Callable[..., SampleIndex]


@pytest.fixture
def opened(loaded_llava: LoadedModel, tmp_path: Path) -> Rows:
    """Write rows with a few images, and open them as training does."""

    def make(rows: list[dict[str, Any]], **entry: Any) -> SampleIndex:
        folder = tmp_path / "set"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "images" / "a.jpg").write_bytes(picture())
        (folder / "chat.json").write_text(json.dumps(rows))
        options = SampleOptions(cache_dir=tmp_path / "cache")
        entries = [DataEntry(path=folder, **entry)]
        return open_index(entries, loaded_llava.processor, loaded_llava.num_image_tokens, options)

    return make


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("form", ["raw", "lines", "uri", "uri with lines"])
def test_base64_is_an_image_with_or_without_a_header_and_line_breaks(form: str, format_: str, opened: Rows) -> None:
    data = picture(format_=format_)
    text = (base64.encodebytes if "lines" in form else base64.b64encode)(data).decode()
    index = opened([{"image": f"data:image/x;base64,{text}" if "uri" in form else text, **ANSWERED}])
    assert index.read_image(index.row(0))[0] == data


def test_a_missing_image_says_which_file_is_there_instead(opened: Rows, tmp_path: Path) -> None:
    rows = [{"image": name, **ANSWERED} for name in ("h.jpg", "c.jpg", "nowhere.jpg")]
    images = tmp_path / "set" / "images"
    images.mkdir(parents=True)
    (images / "h.gif").write_bytes(picture(format_="GIF"))
    (images / "c.JPG").write_bytes(picture())
    messages = [fault.message for fault in opened(rows).data_sets[0].faults]
    assert "'h.gif' is there: name that" in messages[0] and "'c.JPG' is there: name that" in messages[1]
    assert "Add the file or remove the row" in messages[2]


def test_accents_may_be_written_in_either_form(opened: Rows, tmp_path: Path) -> None:
    images = tmp_path / "set" / "images"
    images.mkdir(parents=True)
    composed, apart = unicodedata.normalize("NFC", "caf\u00e9.jpg"), unicodedata.normalize("NFD", "th\u00e9.jpg")
    for name in (composed, apart):
        (images / name).write_bytes(picture())
    names = [unicodedata.normalize(form, name) for form in ("NFC", "NFD") for name in (composed, apart)]
    index = opened([{"image": name, **ANSWERED} for name in names])
    assert len(index) == 4
    assert {index.read_image(index.row(number))[0] for number in range(4)} == {picture()}


def test_linked_folders_of_images_are_read_where_they_are_allowed(opened: Rows, tmp_path: Path) -> None:
    (tmp_path / "lab" / "coco").mkdir(parents=True)
    (tmp_path / "lab" / "coco" / "b.jpg").write_bytes(picture())
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "coco").symlink_to(tmp_path / "lab" / "coco")
    rows = [{"image": "coco/b.jpg", **ANSWERED}]
    (fault,) = opened(rows).data_sets[0].faults
    assert fault.kind == "unsafe_path" and "image_roots" in fault.message
    index = opened(rows, image_roots=[tmp_path / "lab"])
    assert index.read_image(index.row(0))[0] == picture()
    with pytest.raises(UserError, match=r"no such folder \(image_roots\)"):
        opened(rows, image_roots=[tmp_path / "nowhere"])


def test_an_image_that_grows_past_the_bound_is_not_read(
    opened: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    monkeypatch.setattr(archives, "MAX_BYTES", 1_000_000)
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(2_000_000))
        archive.writestr("a.jpg", picture())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bomb.jpg").write_bytes(bytes(2_000_000))
    for images in ("images.zip", "images"):
        index = opened([{"image": "bomb.jpg", **ANSWERED}], images=tmp_path / images)
        with pytest.raises(RecordError, match=r"1,000,000 bytes"):
            index.read_image(index.row(0))


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def records(path: Path, tmp_path: Path, **entry: Any) -> list[tuple[int, tuple[Turn, ...]]]:
    index = open_index([DataEntry(path=path, **entry)], None, 0, SampleOptions(cache_dir=tmp_path / "cache"))
    assert not index.data_sets[0].faults, index.data_sets[0].faults
    from llavaforge.data.index.prepare import records_of

    return [(len(record.images), record.turns) for record in records_of(index.data_sets[0].source)]


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize("named", [True, False], ids=["paths", "no paths"])
def test_a_struct_of_nulls_is_no_image(named: bool, tmp_path: Path) -> None:
    image = {"bytes": picture(), "path": "a.jpg" if named else None}
    nothing = {"bytes": None, "path": None}
    rows = [{"image": image, **ANSWERED}, {"image": nothing, **TEXT_ONLY}, {"image": None, **TEXT_ONLY}]
    turn = pa.list_(pa.struct({"from": pa.string(), "value": pa.string()}))
    write_parquet(tmp_path / "set.parquet", rows, pa.schema([("image", STRUCT), ("conversations", turn)]))
    assert [number for number, _ in records(tmp_path / "set.parquet", tmp_path)] == [1, 0, 0]


def test_of_several_image_columns_one_is_named(tmp_path: Path) -> None:
    one, other = ({"bytes": picture(colour), "path": None} for colour in ("red", "blue"))
    rows = [{"first": one, "second": other, "question": "What?", "answer": "A cat."}]
    schema = pa.schema([("first", STRUCT), ("second", STRUCT), ("question", pa.string()), ("answer", pa.string())])
    path = tmp_path / "set.parquet"
    write_parquet(path, rows, schema)
    with pytest.raises(UserError, match=r"several image columns \(first, second\)"):
        records(path, tmp_path)
    index = open_index(
        [DataEntry(path=path, columns={"image": "second"})], None, 0, SampleOptions(cache_dir=tmp_path / "cache")
    )
    assert index.read_image(index.row(0))[0] == picture("blue")


def test_messages_of_datasets_sequences_are_read(tmp_path: Path) -> None:
    content = {"type": ["image", "text"], "text": [None, "What?"]}
    rows = [
        {
            "image": {"bytes": picture(), "path": None},
            "messages": {"role": ["user", "assistant"], "content": [content, {"type": ["text"], "text": ["A cat."]}]},
        }
    ]
    parts = pa.struct({"type": pa.list_(pa.string()), "text": pa.list_(pa.string())})
    messages = pa.struct({"role": pa.list_(pa.string()), "content": pa.list_(parts)})
    write_parquet(tmp_path / "set.parquet", rows, pa.schema([("image", STRUCT), ("messages", messages)]))
    assert records(tmp_path / "set.parquet", tmp_path) == [(1, WANTED)]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_what_img2dataset_leaves_is_read_from_its_tars(tmp_path: Path) -> None:
    for shard in ("00000", "00001"):
        write_tar(tmp_path / "set" / f"{shard}.tar", {"1.jpg": picture(), "1.txt": b"a cat", "1.json": b'{"url": "x"}'})
        write_parquet(tmp_path / "set" / f"{shard}.parquet", [{"url": "https://x/1.jpg", "caption": "a cat"}])
        (tmp_path / "set" / f"{shard}_stats.json").write_text("{}")
    assert [number for number, _ in records(tmp_path / "set", tmp_path)] == [1, 1]


def test_dotted_keys_of_webdataset_are_read_and_two_texts_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "one.tar", {"s0.input.jpg": picture(), "s0.outputs.txt": b"a cat"})
    ((number, turns),) = records(tmp_path / "one.tar", tmp_path)
    assert number == 1 and turns[-1].text == "a cat"
    write_tar(tmp_path / "two.tar", {"s0.jpg": picture(), "s0.question.txt": b"What?", "s0.answer.txt": b"a cat"})
    index = open_index(tmp_path / "two.tar", None, 0, SampleOptions(cache_dir=tmp_path / "cache"))
    (fault,) = index.data_sets[0].faults
    assert "s0.question.txt and s0.answer.txt" in fault.message


SPLITS = {
    "vqarad": (("vqarad_train.parquet", "vqarad_test.parquet"), "vqarad_train.parquet"),
    "cc3m": (("cc3m-train-0000.tar", "cc3m-train-0001.tar", "cc3m-validation-0000.tar"), "cc3m-train-0000.tar"),
    "only parts": (("part-0.parquet", "part-1.parquet"), "part-0.parquet"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_test_shards_beside_train_shards_are_not_trained_on(name: str, tmp_path: Path) -> None:
    files, first = SPLITS[name]
    for file in files:
        if file.endswith(".tar"):
            write_tar(tmp_path / "set" / file, {"1.jpg": picture(), "1.txt": b"a cat"})
        else:
            write_parquet(tmp_path / "set" / file, [{"question": "What?", "answer": "A cat."}])
    found = [path.name for path in find_source(DataEntry(path=tmp_path / "set"), tmp_path / "cache").files]
    assert found[0] == first
    assert not any(word in file for file in found for word in ("test", "validation"))


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_saved_data_set_names_no_file_outside_of_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    content = {"_data_files": [{"filename": "../x.arrow"}]} if name == "state.json" else {"splits": ["../other"]}
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match="outside of"):
        find_source(DataEntry(path=folder), tmp_path / "cache")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_row_without_end_is_refused_in_bounded_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llavaforge.data.rows import json_list

    monkeypatch.setattr(json_list, "LONGEST_ROW", 100_000)
    monkeypatch.setattr(json_list, "CHUNK_CHARACTERS", 10_000)
    start = '[{"id": "' if name == "rows.json" else '{"id": "'
    (tmp_path / name).write_text(start + "a" * 1_000_000)
    with pytest.raises(UserError, match="over 100,000 characters"):
        open_index(tmp_path / name, None, 0, SampleOptions(cache_dir=tmp_path / "cache"))


def test_pictures_in_which_nothing_can_be_seen_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    images = tmp_path / "set" / "images"
    images.mkdir(parents=True)
    scan = (np.arange(64 * 64, dtype=np.uint16) % 4096).reshape(64, 64)  # 12 bits in a 16-bit file
    Image.fromarray(scan).save(images / "scan.png")
    Image.new("RGB", (1, 1)).save(images / "lost.png")
    Image.new("RGB", (60, 40), "white").save(images / "white.jpg")
    (images / "a.jpg").write_bytes(picture())
    names = ("scan.png", "lost.png", "white.jpg", "a.jpg")
    rows = [{"id": name, "image": name, **ANSWERED} for name in names]
    (tmp_path / "set" / "chat.json").write_text(json.dumps(rows))
    assert main(["data", "check", f"--data_path={tmp_path / 'set'}", f"--report={tmp_path / 'report'}"]) == 0
    findings = [json.loads(line) for line in (tmp_path / "report" / "findings.jsonl").read_text().splitlines()]
    assert {line["id"] for line in findings if line["kind"] == "nothing_to_see"} == set(names[:3])


def test_boxes_are_told_of_where_images_are_cropped(
    tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "a.jpg").write_bytes(picture())
    answers = ("[0.1, 0.25, .5, 1.0]", "It is at [12, 30].")
    rows = [
        {"id": answer, "image": "a.jpg", "question": f"Where? {number}", "answer": answer}
        for number, answer in enumerate(answers)
    ]
    (tmp_path / "set" / "chat.json").write_text(json.dumps(rows))
    arguments = [f"--data_path={tmp_path / 'set'}", f"--model_name_or_path={tiny_llava}", f"--report={tmp_path / 'r'}"]
    assert main(["data", "check", *arguments]) == 0
    findings = [json.loads(line) for line in (tmp_path / "r" / "findings.jsonl").read_text().splitlines()]
    assert [line["id"] for line in findings if line["kind"] == "cut_boxes"] == [answers[0]]
    assert "--image_aspect_ratio pad" in capsys.readouterr().err


def test_a_long_conversation_is_cut_in_seconds_as_turn_by_turn(opened: Rows, loaded_llava: LoadedModel) -> None:
    turns = [
        turn
        for number in range(800)
        for turn in ({"from": "human", "value": f"Question {number}?"}, {"from": "gpt", "value": f"Answer {number}."})
    ]
    begin = time.monotonic()
    index = opened([{"conversations": turns}])
    assert time.monotonic() - begin < 20
    kept = len(turns) - int(index.column("num_turns_dropped")[0])
    assert index.lengths[0] <= 2048
    whole = opened([{"conversations": turns[:kept]}])
    assert whole.row(0).ids.tolist() == index.row(0).ids.tolist()
    assert int(opened([{"conversations": turns[: kept + 2]}]).column("num_turns_dropped")[0]) == 2
