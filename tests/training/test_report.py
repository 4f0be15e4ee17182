"""A run's page and its trackers: what they show is what the run's files say."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llavaforge.errors import UserError
from llavaforge.files import to_json
from llavaforge.processes.world import World
from llavaforge.report.page import OWN_PAGE
from llavaforge.training import report, trackers
from llavaforge.training.metrics import read_metrics
from llavaforge.training.opening import open_stage
from llavaforge.training.run import train
from llavaforge.training.trackers import open_trackers
from train_tools import train_config


def page_of(output_dir: Path) -> str:
    return (output_dir / "report.html").read_text()


def test_the_page_of_a_run_shows_its_curves_answers_and_recipe(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    questions = {place: shapes / place / "questions.json" for place in ("train", "heldout")}
    config = train_config(
        tiny_llava, questions["train"], tmp_path / "run", max_steps=4, eval_steps=2, eval_generate_samples=3,
        eval_data_path=questions["heldout"], eval_max_new_tokens=3, learning_rate=0.00123,
    )  # fmt: skip
    train(config)
    page = page_of(tmp_path / "run")
    assert re.match(OWN_PAGE, page) and "This run is finished." in page
    for title in ("loss per supervised token", "exact_match", "learning rate", "gradient norm", "tokens per second"):
        assert f"<figcaption>{title}</figcaption><svg" in page
    assert page.count('src="data:image/jpeg;base64,') == 3 and "learning_rate: 0.00123" in page
    assert page.count("<dt>step 2</dt>") == page.count("<dt>step 4</dt>") == 3
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "<script" not in page
    shares = [float(share) for share in re.findall(r"</span>([\d.]+) %</div>", page)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    lines = read_metrics(tmp_path / "run")
    assert f"{lines[-1]['eval_loss']:.4f}" in page


def test_a_page_of_many_steps_stays_small_and_names_what_was_left_out(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    opened = open_stage(
        train_config(tiny_llava, shapes / "train", tmp_path, max_steps=1000), World(), Console(quiet=True)
    )
    parts = {f"time_share_{part}": 0.125 for part in report.PARTS}
    line = {"loss": 1.23456789, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens_per_s": 999.9, "time_s": 1.0, **parts}
    lines = [to_json({"step": step, **line, "eval_loss": 1.0 / step}) for step in range(1, 1001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    faults = [{"step": 3, "message": f"<lost {row}>", "file": "chat.json", "row": row} for row in range(30)]
    (tmp_path / "bad_samples.jsonl").write_text("\n".join(map(to_json, faults)) + "\n")
    begin = time.perf_counter()
    page = report.report_page(opened, {}, "is going on")
    assert time.perf_counter() - begin < 20
    assert len(page) < 5_000_000 / 5
    assert "&lt;lost 0&gt;" in page and "and 10 more" in page and page.count("12.5 %") == len(report.PARTS)


def test_a_page_that_cannot_be_written_ends_no_run(
    tiny_llava: Path, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_stage(train_config(tiny_llava, shapes / "train", tmp_path, max_steps=1), World(), Console(quiet=True))
    (tmp_path / "report.html").write_text("my own notes")
    report.Reporter(opened, None).write("is finished")
    assert (tmp_path / "report.html").read_text() == "my own notes"
    assert "the report was not written" in caplog.text
    (tmp_path / "report.html").unlink()
    (tmp_path / "eval_answers.jsonl").write_text('{"step": 1}\n')  # not what we write
    report.Reporter(opened, None).write("is finished")
    assert caplog.text.count("the report was not written") == 2


def test_a_run_that_is_stopped_has_a_page_that_says_so(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", max_steps=20, learning_rate=1e30)
    with pytest.raises(UserError):
        train(config)
    assert "This run has ended before its last step" in page_of(tmp_path / "run")


LINES = [{"step": 1, "loss": 2.5, "note": "text"}, {"step": 2, "loss": 1.5, "eval_loss": 1.25}]


def track(names: list[str], output_dir: Path) -> None:
    with open_trackers(names, output_dir, {"learning_rate": 0.1}) as tracker:
        for line in LINES:
            tracker(dict(line))


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track(["tensorboard"], tmp_path)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    assert [one.value for one in events.Scalars("eval_loss")] == [1.25]


def records_of_log(data: bytes, header: int = 7, block: int = 1 << 15) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, after a header: checksum, length, type (1 whole, 4 last)."""
    position, record = header, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # the rest of a block is filled up
            position += block - position % block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_offline_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track(["wandb"], tmp_path)
    wandb.teardown()  # as at the end of the process: until then its own process may still be writing
    from wandb.proto import wandb_internal_pb2

    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = []
    for data in records_of_log(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found.append({key: items[key] for key in ("step", "loss", "eval_loss") if key in items})
    assert found == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5, "eval_loss": 1.25}]


def test_mlflow_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    track(["mlflow"], tmp_path / "my-run")
    (run,) = mlflow.search_runs(output_format="list")
    assert run.data.metrics["loss"] == 1.5 and run.data.metrics["eval_loss"] == 1.25
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(1, 2.5), (2, 1.5)]
    assert run.info.run_name == "my-run"


def test_a_client_that_is_missing_or_does_not_start_is_told_and_one_that_fails_later_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from contextlib import contextmanager

    @contextmanager
    def missing(*_: Any) -> Any:
        import a_tracker_that_is_not_installed  # type: ignore[import-not-found]  # noqa: F401

        yield

    @contextmanager
    def not_logged_in(*_: Any) -> Any:
        raise RuntimeError("api_key not configured")
        yield

    calls = []

    @contextmanager
    def fails_later(*_: Any) -> Any:
        def log(line: dict[str, Any]) -> None:
            calls.append(line)
            raise ConnectionError("no route")

        yield log
        raise ConnectionError("no route")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", missing)
    with pytest.raises(UserError, match=r"needs a_tracker_that_is_not_installed: pip install 'llavaforge\[wandb\]'"):
        track(["wandb"], tmp_path)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", not_logged_in)
    with pytest.raises(UserError, match=r"does not start.*api_key not configured"):
        track(["wandb"], tmp_path)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", fails_later)
    track(["tensorboard", "wandb"], tmp_path)
    assert len(calls) == 1 and "no more metrics are sent" in caplog.text
    assert "was not closed" in caplog.text
