"""Data is prepared once: found again when nothing changed, redone when anything did, never half-used, in parallel."""

import base64
import copy
import gzip
import io
import json
import logging
import os
import shutil
import signal
import tarfile
import time
import zipfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import normalizers

from llavaforge.config.schema import DataEntry, SampleOptions
from llavaforge.data.index import prepare
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_checked_index, open_index
from llavaforge.data.rows.records import Record
from llavaforge.data.rows.turns import Turn
from llavaforge.errors import UserError
from llavaforge.model.load import LoadedModel
from llavaforge.processes import workers
from prepare_worker import open_unread, prepare_and_die, prepare_and_wait

Rows = list[dict[str, Any]]


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def image_rows(num: int) -> Rows:
    return [chat(f"<image>\nWhat is number {n}?", f"A square, {n}.", id=f"r{n}", image=f"{n}.jpg") for n in range(num)]


def write(folder: Path, rows: Rows, num_images: int | None = None) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(len(rows) if num_images is None else num_images):
        (folder / "images" / f"{number}.jpg").write_bytes(b"image %d" % number)
    (folder / "chat.json").write_text(json.dumps(rows))
    return folder


def options(cache: Path, **changes: Any) -> SampleOptions:
    return SampleOptions(cache_dir=cache, **changes)


def images_of(index: SampleIndex) -> list[bytes]:
    rows = [index.row(number) for number in range(len(index))]
    return [index.read_image(row, number)[0] for row in rows for number in range(len(row.images))]


def index_files(cache: Path) -> set[str]:
    """What lies in the cache besides locks, without the fingerprint."""
    names = [path.name for path in (cache / "index").iterdir() if path.suffix not in (".lock", ".crc32")]
    return {f"{name.split('-')[0]}.{name.split('.', 1)[1]}" for name in names}


def identity(index: SampleIndex) -> list[tuple[Path, int, int]]:
    """The files of an index: name, inode and time of writing."""
    paths = [part.path for part in index.data_sets]
    return [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]


# Found again, or redone.


def test_unchanged_data_is_not_prepared_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder, cache = write(tmp_path / "set", image_rows(5)), tmp_path / "cache"
    first = identity(open_unread(folder, cache))
    assert identity(open_unread(folder, cache)) == first
    os.utime(folder / "chat.json")  # touched
    (folder / "chat.json").write_text((folder / "chat.json").read_text())  # written again, the same
    assert identity(open_unread(folder, cache)) == first
    assert caplog.text.count("preparing ") == 1
    assert index_files(cache) == {"chat.arrow", "chat.faults.jsonl"}


def test_a_moved_data_set_is_not_prepared_again_and_reads_its_images(tmp_path: Path) -> None:
    folder, cache = write(tmp_path / "set", [*image_rows(5), chat("Hi", "")]), tmp_path / "cache"
    first = open_unread(folder, cache)
    shutil.move(folder, tmp_path / "elsewhere")
    moved = open_unread(tmp_path / "elsewhere", cache)
    assert identity(moved) == identity(first)
    assert images_of(moved) == [b"image %d" % number for number in range(5)]
    assert [str(fault) for fault in moved.data_sets[0].faults] == [str(fault) for fault in first.data_sets[0].faults]


def test_everything_that_the_tokens_depend_on_makes_another_index(loaded_llava: LoadedModel, tmp_path: Path) -> None:
    folder, cache = write(tmp_path / "set", image_rows(3)), tmp_path / "cache"

    def opened(processor: Any, num_image_tokens: int = 4, **changes: Any) -> SampleIndex:
        return open_index([DataEntry(path=folder)], processor, num_image_tokens, options(cache, **changes), quiet=True)

    template, tokenizer = copy.deepcopy(loaded_llava.processor), copy.deepcopy(loaded_llava.processor)
    template.chat_template = template.chat_template.replace("<|im_end|>\\n", "<|im_end|>") + " "
    tokenizer.tokenizer.add_tokens(["square"])
    plain = opened(loaded_llava.processor)
    others = [
        opened(template),
        opened(tokenizer),
        opened(loaded_llava.processor, max_length=1000),
        opened(loaded_llava.processor, prompt_style="plain"),
        opened(loaded_llava.processor, system_prompt="Be brief."),
        opened(loaded_llava.processor, num_image_tokens=9),
        opened(None),
    ]
    assert len({index.data_sets[0].path for index in [plain, *others]}) == 8
    assert len({index.fingerprint for index in [plain, *others]}) == 8
    assert identity(opened(copy.deepcopy(loaded_llava.processor))) == identity(plain)
    assert len(others[1].row(0).ids) < len(plain.row(0).ids)


@pytest.mark.parametrize("kind", ["json", "jsonl.gz", "parquet", "arrow", "tar"])
def test_changed_data_is_prepared_again_and_its_new_images_are_read(kind: str, tmp_path: Path) -> None:
    """Also by the process that has the old file open, and when only a letter changed."""
    cache = tmp_path / "cache"
    path = tmp_path / f"rows.{kind}"
    before, after = (
        [chat("<image>", f"{answer}{number}", id=f"{answer}{number}") for number in range(3)] for answer in "ab"
    )
    write_as(kind, path, before, b"old")
    first = open_unread(path, cache)
    assert images_of(first) == [b"old0", b"old1", b"old2"]
    write_as(kind, tmp_path / f"new.{kind}", after, b"new")
    os.replace(tmp_path / f"new.{kind}", path)
    second = open_unread(path, cache)
    assert [second.row(number).id for number in range(3)] == ["b0", "b1", "b2"]
    assert images_of(second) == [b"new0", b"new1", b"new2"]
    assert second.fingerprint != first.fingerprint


def write_as(kind: str, path: Path, rows: Rows, image: bytes) -> None:
    """Write rows with an image each: embedded where the format can, else inline."""
    images = [image + b"%d" % number for number in range(len(rows))]
    if kind in ("parquet", "arrow"):
        table = pa.Table.from_pylist([row | {"image": {"bytes": data}} for row, data in zip(rows, images, strict=True)])
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=2)
        else:
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            for number, (row, data) in enumerate(zip(rows, images, strict=True)):
                for extension, contents in (("jpg", data), ("json", json.dumps(row).encode())):
                    member = tarfile.TarInfo(f"{number}.{extension}")
                    member.size = len(contents)
                    archive.addfile(member, io.BytesIO(contents))
    else:
        uris = ["data:image/jpeg;base64," + base64.b64encode(data).decode() for data in images]
        listed = [row | {"image": uri} for row, uri in zip(rows, uris, strict=True)]
        if kind == "json":
            path.write_text(json.dumps(listed))
        else:
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in listed).encode()))


def test_a_changed_archive_of_images_is_looked_up_again(tmp_path: Path) -> None:
    folder, cache = tmp_path / "set", tmp_path / "cache"
    write(folder, image_rows(3))
    shutil.rmtree(folder / "images")
    for names in (("0.jpg", "1.jpg", "2.jpg"), ("2.jpg", "1.jpg", "0.jpg")):
        with zipfile.ZipFile(folder / "new.zip", "w") as archive:
            for name in names:
                archive.writestr(name, f"{name} of {names[0]}")
        os.replace(folder / "new.zip", folder / "images.zip")
        assert images_of(open_unread(folder, cache)) == [b"%d.jpg of %s" % (n, names[0].encode()) for n in range(3)]


def test_the_same_bytes_by_another_name_have_their_own_numbers(tmp_path: Path) -> None:
    """Rows of .json are counted from 0, lines of .jsonl from 1."""
    text = "".join(json.dumps(row) + "\n" for row in [chat("Hi", "Hello."), chat("Hi", "")])
    numbers = []
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_text(text)
        index = open_unread(tmp_path / name, tmp_path / "cache")
        numbers.append((index.row(0).where, index.data_sets[0].faults[0].where))
    assert numbers == [("rows.json row 0", "rows.json row 1"), ("rows.jsonl:1", "rows.jsonl:2")]


def test_a_missing_image_that_is_added_is_picked_up(tmp_path: Path) -> None:
    """The old index stays as it is for a process that uses it."""
    folder, cache = write(tmp_path / "set", image_rows(5), num_images=3), tmp_path / "cache"
    first = open_unread(folder, cache)
    assert [(fault.kind, fault.row) for fault in first.data_sets[0].faults] == [
        ("missing_image", 3),
        ("missing_image", 4),
    ]
    kept = identity(first)
    (folder / "images" / "3.jpg").write_bytes(b"image 3")
    second = open_unread(folder, cache)
    assert [fault.row for fault in second.data_sets[0].faults] == [4]
    assert images_of(second) == [b"image %d" % number for number in range(4)]
    assert identity(first) == kept and images_of(first) == [b"image %d" % number for number in range(3)]
    assert identity(open_unread(folder, cache)) == identity(second)
    (folder / "images" / "4.jpg").write_bytes(b"image 4")
    assert len(open_unread(folder, cache)) == 5


def test_a_link_out_of_the_folder_that_is_replaced_by_its_image_is_picked_up(tmp_path: Path) -> None:
    folder, cache = write(tmp_path / "set", image_rows(2), num_images=1), tmp_path / "cache"
    (tmp_path / "outside.jpg").write_bytes(b"image 1")
    (folder / "images" / "1.jpg").symlink_to(tmp_path / "outside.jpg")
    assert [fault.kind for fault in open_unread(folder, cache).data_sets[0].faults] == ["unsafe_path"]
    (folder / "images" / "1.jpg").unlink()
    (folder / "images" / "1.jpg").write_bytes(b"image 1")
    assert images_of(open_unread(folder, cache)) == [b"image 0", b"image 1"]


def test_two_image_folders_for_the_same_rows_do_not_undo_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder, cache = write(tmp_path / "set", image_rows(2), num_images=0), tmp_path / "cache"
    for number in range(2):
        (tmp_path / f"images{number}").mkdir()
        (tmp_path / f"images{number}" / f"{number}.jpg").write_bytes(b"image %d" % number)
    for number in (0, 1, 0, 1):
        index = open_unread(folder, cache, images=tmp_path / f"images{number}")
        assert images_of(index) == [b"image %d" % number]
    assert caplog.text.count("preparing ") == 2


def test_the_first_records_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted with the faulty ones, over files and chunks."""
    for name, answers in (("0.jsonl", "abc"), ("1.jsonl", "d efgh")):
        (tmp_path / name).write_text("".join(json.dumps(chat("Hi", answer, id=answer)) + "\n" for answer in answers))
    table = [json.loads(line) for name in ("0.jsonl", "1.jsonl") for line in (tmp_path / name).read_text().splitlines()]
    for number, rows in enumerate((table[:3], table[3:])):
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / f"{number}.parquet")
    monkeypatch.setattr(prepare, "_CHUNK", 2)
    found = {}
    for most in (1, 2, 3, 6, 99):
        index = open_unread(tmp_path / "set", tmp_path / "cache", max_samples=most)
        found[most] = "".join(index.row(number).id for number in range(len(index)))
    assert found == {1: "a", 2: "ab", 3: "abc", 6: "abcde", 99: "abcdefgh"}


# In parallel, in batches.


def mixed_rows(num: int) -> Rows:
    """Every seventh row has a fault."""
    rows = image_rows(num)
    for number in range(0, num, 7):
        rows[number]["conversations"][1]["value"] = " "
    return rows


def test_parallel_preparation_gives_the_same_bytes(
    loaded_llava: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "set", mixed_rows(300))
    made = []
    for chunk in (1000, 20):
        monkeypatch.setattr(prepare, "_CHUNK", chunk)
        cache = tmp_path / f"cache{chunk}"
        index = open_index([DataEntry(path=folder)], loaded_llava.processor, 4, options(cache), quiet=True)
        (batch,) = index.data_sets[0].table.combine_chunks().to_batches()
        made.append((batch.serialize().to_pybytes(), index.data_sets[0].faults, index.fingerprint))
    assert made[0] == made[1]
    assert len(made[0][1]) == 43


def test_any_row_is_there_at_once_over_several_record_batches(
    loaded_llava: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_ROWS_PER_BATCH", 15)
    monkeypatch.setattr(prepare, "_CHUNK", 10)
    rows = mixed_rows(100)
    for number in range(0, 100, 3):
        rows[number]["image"] = [f"{number}.jpg", f"{99 - number}.jpg"]
        rows[number]["conversations"][0]["value"] += "<image>"
    for number in range(1, 100, 5):
        del rows[number]["image"]
        rows[number]["conversations"][0]["value"] = "Hello"
    folder = write(tmp_path / "set", rows)
    index = open_index([DataEntry(path=folder)], loaded_llava.processor, 4, options(tmp_path / "cache"), quiet=True)
    table = index.data_sets[0].table
    assert len(table.to_batches()) > 4
    for number, stored in sorted(enumerate(table.to_pylist()), key=lambda pair: pair[0] * 37 % 61):
        row = index.row(number)
        assert (row.id, row.number, row.length, row.file) == (
            stored["id"],
            stored["row"],
            stored["length"],
            "chat.json",
        )
        assert row.ids.tolist() == stored["ids"] and row.supervised_spans.tolist() == stored["supervised_spans"]
        assert [ref._asdict() for ref in row.images] == stored["images"]
        assert index.num_images[number] == len(row.images)
        assert index.num_supervised[number] == stored["num_supervised"]
        wanted = rows[row.number].get("image", [])
        assert [ref.name for ref in row.images] == ([wanted] if isinstance(wanted, str) else wanted)


def test_a_large_batch_is_written_before_arrow_cannot_count_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_BYTES_PER_BATCH", 2000)
    monkeypatch.setattr(prepare, "_CHUNK", 10)
    index = open_unread(write(tmp_path / "set", image_rows(100)), tmp_path / "cache")
    assert len(index) == 100 and len(index.data_sets[0].table.to_batches()) > 3


# Faults.

GOOD = chat("<image>", "A square.", image="0.jpg")
FAULTY: dict[str, Any] = {
    "malformed_json": '{"id": "cut off',
    "malformed_row": {"id": 1, "conversations": "text"},
    "unknown_role": {"conversations": [{"from": "robot", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "turn_order": {"conversations": [{"from": "gpt", "value": "Hello."}]},
    "empty_answer": chat("Hi", " \n"),
    "image_count": chat("<image><image>", "Two.", image="0.jpg"),
    "remote_image": chat("<image>", "A square.", image="https://example.com/0.jpg"),
    "unsafe_path": chat("<image>", "A square.", image="../0.jpg"),
    "missing_image": chat("<image>", "A square.", image="gone.jpg"),
    "unprovable_labels": chat("Hi", "<think>so</think> Hello."),
    "too_long": chat("Why? " * 100, "Because."),
}


def test_every_fault_is_listed_with_its_file_and_row(loaded_llava: LoadedModel, tmp_path: Path) -> None:
    processor = copy.deepcopy(loaded_llava.processor)
    processor.chat_template = processor.chat_template.replace(
        "message['content']", "(message['content'] | replace('<think>', ''))"
    )
    lines = [json.dumps(GOOD)]
    for faulty in FAULTY.values():
        lines += [faulty if isinstance(faulty, str) else json.dumps({"id": "bad"} | faulty), json.dumps(GOOD)]
    write(tmp_path, [], num_images=1)
    (tmp_path / "chat.json").unlink()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    entry = DataEntry(path=tmp_path / "rows.jsonl")
    index = open_index([entry], processor, 4, options(tmp_path / "cache", max_length=200), quiet=True)
    faults = index.data_sets[0].faults
    assert [fault.kind for fault in faults] == list(FAULTY)
    assert [(fault.file, fault.row) for fault in faults] == [("rows.jsonl", 2 * n) for n in range(1, len(FAULTY) + 1)]
    assert [fault.id for fault in faults] == ["", "1", *["bad"] * (len(FAULTY) - 2)]
    assert [index.row(number).number for number in range(len(index))] == list(range(1, 2 * len(FAULTY) + 2, 2))
    with pytest.raises(UserError, match=rf"(?s){len(FAULTY)} of {len(lines)} records are faulty.*rows\.jsonl:2: "):
        open_checked_index([entry], processor, 4, options(tmp_path / "cache", max_length=200))


def test_a_sample_of_which_no_answer_is_left_is_refused_with_its_row(loaded_llava: LoadedModel, tmp_path: Path) -> None:
    rows = [chat("Hi", "Hello."), chat("Why? " * 20, "Because.", id="long"), chat("Hi", "Bye.")]
    folder, processor = write(tmp_path / "set", rows, num_images=0), loaded_llava.processor
    whole = open_index([DataEntry(path=folder)], processor, 4, options(tmp_path / "cache"), quiet=True)
    start, end = whole.row(1).supervised_spans.tolist()
    assert end - start > 2
    for max_length, num_left in ((start + 1, 1), (end - 1, end - 1 - start)):
        cut = open_checked_index(
            [DataEntry(path=folder)], processor, 4, options(tmp_path / "cache", max_length=max_length)
        )
        assert cut.num_supervised[1] == num_left and cut.column("num_tokens_cut")[1] > 0
    with pytest.raises(UserError, match=r"1 of 3 records are faulty:\s+chat\.json row 1 \(id 'long'\): .*max_length"):
        open_checked_index([DataEntry(path=folder)], processor, 4, options(tmp_path / "cache", max_length=start))


def test_a_sample_whose_answer_has_no_tokens_is_refused_with_its_row(loaded_llava: LoadedModel, tmp_path: Path) -> None:
    """A tokenizer that drops characters, and an end token that it drops too."""
    processor = copy.deepcopy(loaded_llava.processor)
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    processor.tokenizer._special_tokens_map["eos_token"] = "\u200b"
    folder = write(tmp_path / "set", [GOOD, chat("<image>", "\u200b\u200b", image="0.jpg")], num_images=1)
    with pytest.raises(UserError, match=r"1 of 2 records are faulty:\s+chat\.json row 1: no supervised tokens"):
        open_checked_index([DataEntry(path=folder)], processor, 4, options(tmp_path / "cache", prompt_style="plain"))


# Interrupted, and two at once: real processes, killed for real.

NUM_ROWS = 60
NUM_SOUND = NUM_ROWS - (NUM_ROWS + 6) // 7


def started(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    process: BaseProcess = workers.context().Process(target=target, args=arguments)
    process.start()
    return process


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# In order: the contents' SHA-256 is remembered, the samples are written, both files are synced, the faults and then the
# data get their names.
POINTS = [("replace", 0), ("concat_batches", 0), ("sync_path", 0), ("sync_path", 1), ("replace", 1), ("replace", 2)]


@pytest.mark.parametrize(("name", "calls_before"), POINTS)
def test_a_killed_preparation_leaves_nothing_that_is_used(
    name: str, calls_before: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder, cache = write(tmp_path / "set", mixed_rows(NUM_ROWS)), tmp_path / "cache"
    process = started(prepare_and_die, folder, cache, name, calls_before)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not list(cache.rglob("*.arrow"))
    index = open_unread(folder, cache)
    assert "preparing " in caplog.text
    assert [row.id for row in map(index.row, range(len(index)))] == [f"r{n}" for n in range(NUM_ROWS) if n % 7]
    assert len(index.data_sets[0].faults) == (NUM_ROWS + 6) // 7
    assert index_files(cache) == {"chat.arrow", "chat.faults.jsonl"}


def test_a_process_killed_in_the_middle_of_parallel_work_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    folder, cache, log = write(tmp_path / "set", mixed_rows(NUM_ROWS)), tmp_path / "cache", tmp_path / "log"
    process = started(prepare_and_wait, folder, cache, log, tmp_path / "go", NUM_ROWS // 6, 4)
    wait_until(lambda: bool(list((cache / "index").glob("*.tmp-*"))))
    time.sleep(1)  # some chunks are with the workers
    process.kill()
    process.join()
    assert not list(cache.rglob("*.arrow")) and list(cache.rglob("*.tmp-*"))
    assert len(open_unread(folder, cache)) == NUM_SOUND
    assert index_files(cache) == {"chat.arrow", "chat.faults.jsonl"}


def start_two(tmp_path: Path) -> tuple[list[BaseProcess], list[Path]]:
    """Start one process that prepares until there is a file `go`, and one that waits for the first."""
    folder, logs = write(tmp_path / "set", mixed_rows(NUM_ROWS)), [tmp_path / "log0", tmp_path / "log1"]
    processes = []
    for log, says in zip(logs, ("preparing", "another process prepares"), strict=True):
        arguments = (folder, tmp_path / "cache", log, tmp_path / "go", NUM_ROWS, 0)
        processes.append(started(prepare_and_wait, *arguments))
        wait_until(lambda log=log, says=says: says in log.read_text() if log.exists() else False)  # type: ignore[misc]
    return processes, logs


def test_of_two_processes_one_prepares_and_the_other_waits(tmp_path: Path) -> None:
    processes, logs = start_two(tmp_path)
    (tmp_path / "go").touch()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [log.read_text().count("preparing") for log in logs] == [1, 0]
    assert index_files(tmp_path / "cache") == {"chat.arrow", "chat.faults.jsonl"}
    (path,) = (tmp_path / "cache").rglob("*.arrow")
    before = path.stat().st_mtime_ns
    index = open_unread(tmp_path / "set", tmp_path / "cache")
    assert len(index) == NUM_SOUND and index.data_sets[0].path == path and path.stat().st_mtime_ns == before


def test_when_the_one_that_prepares_is_killed_the_waiting_one_takes_over(tmp_path: Path) -> None:
    (first, second), logs = start_two(tmp_path)
    first.kill()
    first.join()
    (tmp_path / "go").touch()
    second.join()
    assert second.exitcode == 0
    assert [log.read_text().count("preparing") for log in logs] == [1, 1]
    assert index_files(tmp_path / "cache") == {"chat.arrow", "chat.faults.jsonl"}
    assert len(open_unread(tmp_path / "set", tmp_path / "cache")) == NUM_SOUND


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(image_rows(3))[:-10])
    with pytest.raises(UserError, match="malformed JSON"):
        open_unread(tmp_path / "rows.json", tmp_path / "cache")
    assert index_files(tmp_path / "cache") == set()


def test_records_come_in_the_order_of_the_index(tmp_path: Path) -> None:
    index = open_unread(write(tmp_path / "set", mixed_rows(20)), tmp_path / "cache")
    records: list[Record] = list(prepare.records_of(index.data_sets[0].source))
    assert [record.id for record in records] == [index.row(number).id for number in range(len(index))]
    assert records[0].turns[1] == Turn("assistant", "A square, 1.")
