"""The doctor finds every named fault, with its kind and row, and training takes the list it writes."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from llavaforge.cli import main
from llavaforge.config.schema import DataCheckConfig
from llavaforge.data.faults import KINDS
from llavaforge.data_check.check import data_check
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from train_tools import train_config

NUM_RECORDS = 12
Row = dict[str, Any]
Spoil = Callable[[list[Row], Path], None]


def row(number: int) -> Row:
    return {
        "id": f"{number:03d}",
        "image": f"{number:03d}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat is number {number}?"},
            {"from": "gpt", "value": f"A square with the number {number}."},
        ],
    }


def write_image(path: Path, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def write_rows(folder: Path, rows: list[Row]) -> Path:
    (folder / "chat.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "images").mkdir(parents=True)
    for number in range(NUM_RECORDS):
        write_image(tmp_path / "data" / "images" / f"{number:03d}.png", number)
    return write_rows(tmp_path / "data", [row(number) for number in range(NUM_RECORDS)])


def check(model: Path | None, data: Path, **options: Any) -> dict[str, Any]:
    values = {"model_name_or_path": str(model) if model else None, "data_path": data, **options}
    return data_check(DataCheckConfig.model_validate(values))


def findings(report: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (report / "findings.jsonl").read_text().splitlines()]
    return [(line["kind"], line["row"]) for line in lines]


def test_sound_data_is_clean(tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    result = check(tiny_llava, data, report=tmp_path / "report", global_batch_size=5)
    assert result["num_records"] == result["num_images"] == NUM_RECORDS
    assert result["num_errors"] == result["num_warnings"] == 0
    assert result["steps_per_epoch"] == 3
    assert findings(tmp_path / "report") == []


def turn(number: int, **values: str) -> Spoil:
    def spoil(rows: list[Row], _: Path) -> None:
        rows[3]["conversations"][number].update(values)

    return spoil


def image(data: bytes) -> Spoil:
    return lambda rows, images: (images / rows[3]["image"]).write_bytes(data) and None


def remove(rows: list[Row], images: Path) -> None:
    (images / rows[3]["image"]).unlink()


def truncate(rows: list[Row], images: Path) -> None:
    path = images / rows[3]["image"]
    path.write_bytes(path.read_bytes()[:2000])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


BOMB = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(bytes(1000)))
    + chunk(b"IEND", b"")
)


def set_row(**values: Any) -> Spoil:
    return lambda rows, _: rows[3].update(values)


def link_out(rows: list[Row], images: Path) -> None:
    os.rename(images / rows[3]["image"], images.parent.parent / "outside.png")
    os.symlink(images.parent.parent / "outside.png", images / rows[3]["image"])


FAULTS: dict[str, tuple[str, Spoil]] = {
    "missing file": ("missing_image", remove),
    "truncated file": ("truncated_image", truncate),
    "empty file": ("not_an_image", image(b"\n")),
    "HTML page named .png": ("not_an_image", image(b"<!DOCTYPE html><html>404</html>")),
    "decompression bomb": ("image_too_large", image(BOMB)),
    "path out of the folder": ("unsafe_path", set_row(image="../secret.png")),
    "link out of the folder": ("unsafe_path", link_out),
    "URL": ("remote_image", set_row(image="http://example.com/a.png")),
    "no placeholder": ("image_count", turn(0, value="What?")),
    "two placeholders": ("image_count", turn(0, value="<image><image>")),
    "placeholder as a word": ("image_count", turn(0, value="<image>\nWhat does <image> stand for?")),
    "unknown role": ("unknown_role", turn(0, **{"from": "robot"})),
    "turns in the wrong order": ("turn_order", lambda rows, _: rows[3]["conversations"].reverse()),
    "empty answer": ("empty_answer", turn(1, value="")),
    "white answer": ("empty_answer", turn(1, value=" \n\t ")),
    "no conversation": ("malformed_row", set_row(conversations=None)),
    "far too long": ("too_long", turn(0, value="<image>" + "Why? " * 100)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_is_found_with_kind_and_row(name: str, tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    kind, spoil = FAULTS[name]
    rows = [row(number) for number in range(NUM_RECORDS)]
    spoil(rows, data / "images")
    write_rows(data, rows)
    result = check(tiny_llava, data, report=tmp_path / "report", max_length=100)
    assert result["errors_by_kind"] == {kind: 1} and KINDS[kind].severity == "error"
    assert findings(tmp_path / "report") == [(kind, 3)]
    assert result["num_records"] == NUM_RECORDS


WARNINGS: dict[str, tuple[str, int, Spoil]] = {
    "longer than max_length": ("shortened", 3, turn(1, value="Because. " * 60)),
    "literal placeholder in an answer": ("literal_placeholder", 3, turn(1, value="It is an <image> of a square.")),
    "exact duplicate": ("duplicate", 8, lambda rows, _: rows.__setitem__(8, {**rows[3], "id": "other"})),
    "image with two captions": ("repeated_image", 3, lambda rows, _: rows[8].update(image=rows[3]["image"])),
    "copy of an image with two captions": (
        "repeated_image", 3, lambda rows, images: shutil.copy(images / "003.png", images / "008.png") and None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_is_found_with_kind_and_row(name: str, tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    kind, place, spoil = WARNINGS[name]
    rows = [row(number) for number in range(NUM_RECORDS)]
    spoil(rows, data / "images")
    write_rows(data, rows)
    result = check(tiny_llava, data, report=tmp_path / "report", max_length=100)
    assert result["num_errors"] == 0 and result["warnings_by_kind"] == {kind: 1}
    assert findings(tmp_path / "report") == [(kind, place)]


def test_malformed_lines_are_found_and_the_others_checked(tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    lines = [json.dumps(row(number)) for number in range(NUM_RECORDS)]
    lines[4] = lines[4][:-9]
    (data / "chat.json").unlink()
    (data / "chat.jsonl").write_text("\n".join(lines))
    (data / "images" / "007.png").unlink()
    assert check(tiny_llava, data, report=tmp_path / "report")["num_errors"] == 2
    assert findings(tmp_path / "report") == [("malformed_json", 5), ("missing_image", 8)]


@pytest.mark.parametrize("how", ["same record", "same image", "copy of the image"])
def test_leaks_between_training_and_held_out_data(how: str, tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out"
    (held_out / "images").mkdir(parents=True)
    write_image(held_out / "images" / "100.png", 100)
    shutil.copy(data / "images" / "003.png", held_out / "images" / "101.png")
    other = {**row(101), "image": "101.png"}
    if how == "same image":
        other["image"] = "data/images/003.png"
        (tmp_path / "chat.json").write_text(json.dumps([{**row(100), "image": "held-out/images/100.png"}, other]))
        held_out = tmp_path / "chat.json"
    elif how == "same record":
        shutil.copy(data / "images" / "003.png", held_out / "images" / "003.png")
        write_rows(held_out, [row(100), row(3)])
    else:
        write_rows(held_out, [row(100), other])
    result = check(tiny_llava, data, eval_data_path=held_out, report=tmp_path / "report")
    assert result["errors_by_kind"] == {"leak": 1}
    assert ("leak", 3) in findings(tmp_path / "report")


def test_a_split_is_checked_for_copies_of_images(tiny_llava: Path, data: Path) -> None:
    assert check(tiny_llava, data, validation_split=4)["num_errors"] == 0
    for number in range(NUM_RECORDS):
        write_image(data / "images" / f"{number:03d}.png", 0)
    assert check(tiny_llava, data, validation_split=4)["errors_by_kind"] == {"leak": NUM_RECORDS - 4}


def test_without_a_model_records_and_images_are_checked(data: Path, tmp_path: Path) -> None:
    (data / "images" / "003.png").write_bytes(b"x")
    result = check(None, data, report=tmp_path / "report")
    assert result["errors_by_kind"] == {"not_an_image": 1} and result["steps_per_epoch"] is None
    assert check(None, data, check_images=False)["num_errors"] == 0


def test_training_takes_the_quarantine_and_refuses_another_datas(
    tiny_llava: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(number) for number in range(NUM_RECORDS)]
    rows[5]["conversations"][1]["value"] = ""
    write_rows(data, rows)
    (data / "images" / "003.png").write_bytes(b"<html>")
    bad = tmp_path / "bad.jsonl"
    flags = ["--model_name_or_path", str(tiny_llava), "--data_path", str(data)]
    assert main(["data", "check", *flags, "--quarantine", str(bad)]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["num_errors"] == 2
    assert "chat.json row 3" in captured.err.replace("\n", " ") and "Traceback" not in captured.err
    config = train_config(tiny_llava, data, tmp_path / "run", quarantine=bad, num_train_epochs=1.0, max_steps=0)
    result = train(config)
    assert result["num_bad_samples"] == 0
    assert sum(4 for _ in read_metrics(tmp_path / "run")) == 12  # ten records in steps of four: three steps
    write_rows(data, rows[1:])
    assert main(["train", *flags, "--output_dir", str(tmp_path / "other"), "--quarantine", str(bad)]) == 2
    assert "other contents" in capsys.readouterr().err


def test_a_training_recipe_is_checked_as_it_stands(
    tiny_llava: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {tiny_llava}\ndata:\n  - {{path: {data}, repeat: 2}}\noutput_dir: {tmp_path}/run\n"
        "train_type: full\nlearning_rate: 1e-4\nglobal_batch_size: 8\n"
    )
    assert main(["data", "check", str(recipe)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps_per_epoch"] == 3
    recipe.write_text(recipe.read_text() + "stages:\n  - {name: a, global_batch_size: 4}\n  - {name: b}\n")
    for stage, steps in (("a", 6), ("b", 3)):
        assert main(["data", "check", str(recipe), "--stage", stage]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps_per_epoch"] == steps
    assert main(["data", "check", str(recipe), "--stage", "c"]) == 2
    assert "no stage 'c'. Its stages: a, b" in capsys.readouterr().err
    recipe.write_text(recipe.read_text() + "lerning_rate: 1\n")
    assert main(["data", "check", str(recipe)]) == 2
    assert "unknown key `lerning_rate`" in capsys.readouterr().err


def test_the_report_stands_alone_and_escapes_what_it_quotes(tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    rows = [row(number) for number in range(NUM_RECORDS)]
    rows[3]["conversations"][0]["from"] = "<script>alert(1)</script>"
    write_rows(data, rows)
    check(tiny_llava, data, report=tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "") and "chat.json row 3" in page
    for chart in ("Length of samples", "Supervised tokens", "Shorter side", "Longer side"):
        assert chart in page
    assert page.count("<svg") == 4


def test_a_data_set_of_faults_only_does_not_hide_the_others(tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": 1}\n' * 3)
    (data / "images" / "003.png").unlink()
    options = {"model_name_or_path": str(tiny_llava), "data": [{"path": data}, {"path": bad}]}
    result = data_check(DataCheckConfig.model_validate({**options, "report": tmp_path / "report"}))
    assert result["errors_by_kind"] == {"malformed_row": 3, "missing_image": 1}
    assert f"{bad}: bad.jsonl:2" in (tmp_path / "report" / "report.html").read_text()  # which of the data sets


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{path: x, wieght: 2}", "data, entry 2: unknown key `wieght`. Did you mean `weight`?"),
        ("{pth: x}", "data, entry 2: `path` is missing: give it in the recipe."),
        ("{path: x, weight: -3}", "data, entry 2: `weight` = -3: Input should be greater than 0."),
        ("{path: x, format: mesages}", "data, entry 2: `format` = 'mesages': Input should be 'auto'"),
    ],
)
def test_a_fault_of_an_entry_names_it(
    entry: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data:\n  - {{path: y}}\n  - {entry}\n")
    assert main(["data", "check", str(recipe)]) == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_leaves_no_traceback_and_no_process(data: Path, tmp_path: Path) -> None:
    rows = [row(number % NUM_RECORDS) for number in range(100_000)]
    write_rows(data, rows)
    command = [sys.executable, "-m", "llavaforge", "data", "check", "--data_path", str(data)]
    environment = {**os.environ, "LLAVAFORGE_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    assert any(line.startswith("preparing") for line in process.stderr)
    until = time.monotonic() + 300
    started = psutil.Process(process.pid)
    while len(started.children(recursive=True)) == len(started.children()):  # until the fork server has workers
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert "Traceback" not in told, told
    assert process.returncode == 130 and "interrupted" in told, told
    until = time.monotonic() + 60
    while (left := _running(process.pid)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left


def _running(session: int) -> list[psutil.Process]:
    """The processes of a session that have not ended (who has ended may wait for its new parent as a zombie)."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
