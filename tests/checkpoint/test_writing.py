"""Checkpoints are written while training goes on: the same bytes, and nothing lost by how a run ends meanwhile."""

import errno
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save

from llavaforge.config.schema import TrainConfig
from llavaforge.errors import UserError
from llavaforge.folders import differences
from llavaforge.training import saving
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from llavaforge.training.step import OptimizerStep
from train_tools import arguments_of, train_config
from warm import WarmProcess, command_line

Config = Callable[..., TrainConfig]
SAVED, LATER = 3, 5  # a checkpoint, and the step that is taken before its first byte is written


@pytest.fixture
def config(tiny_llava: Path, shapes: Path, tmp_path: Path) -> Config:
    """A run of six steps with checkpoints of the third and the sixth."""

    def make(name: str = "run", **changes: Any) -> TrainConfig:
        values: dict[str, Any] = dict(max_steps=6, save_steps=SAVED)
        return train_config(tiny_llava, shapes / "train", tmp_path / name, **(values | changes))

    return make


def when_writing(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let the threads that write a checkpoint do something before they open a file."""
    real = Path.open

    def slow(self: Path, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name.startswith("checkpoint"):
            act()
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", slow)


def write_after_step(monkeypatch: pytest.MonkeyPatch, step: int, then: BaseException | None = None) -> None:
    """Let nothing of a checkpoint be written before a later step is taken, which may end the run."""
    real, is_taken = OptimizerStep.__call__, threading.Event()

    def taken(self: OptimizerStep, *arguments: Any) -> Any:
        result = real(self, *arguments)
        if self.state.step == step:
            is_taken.set()
            if then is not None:
                raise then
        return result

    def wait() -> None:
        assert is_taken.wait(120), "training waits for the checkpoint"

    monkeypatch.setattr(OptimizerStep, "__call__", taken)
    when_writing(monkeypatch, wait)


def left(run: Path) -> list[str]:
    """What lies there beside what a run leaves."""
    return sorted(path.name for path in run.iterdir() if path.name.startswith(".") and path.suffix != ".lock")


def published(run: Path) -> list[str]:
    found = sorted(run.glob("checkpoint-*"))
    assert all(differences(folder) == [] for folder in found)
    return [folder.name for folder in found]


def test_what_is_written_while_steps_go_on_equals_what_is_written_at_once(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        write_after_step(patch, LATER)
        train(config("background"))
    assert "training waits" not in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(saving, "free_host_memory", lambda: 0)
        train(config("at_once"))
    assert caplog.text.count("training waits while checkpoints are written: for a copy of one, a host lacks") == 1
    runs = [tmp_path / "background", tmp_path / "at_once"]
    for step in (3, 6):
        one, other = (run / f"checkpoint-{step}" / "state.safetensors" for run in runs)
        assert one.read_bytes() == other.read_bytes()
        assert one.read_bytes() == save(load_file(one), metadata={"format": "pt"})  # as the library writes it
        states = [json.loads((run / f"checkpoint-{step}" / "train_state.json").read_text()) for run in runs]
        assert [state.pop("train_time_s") for state in states] and states[0] == states[1]
    assert [published(run) for run in runs] == [["checkpoint-3", "checkpoint-6"]] * 2
    background, at_once = ({line["step"]: line for line in read_metrics(run)} for run in runs)
    assert {step for step, line in at_once.items() if "save_write_time_s" in line} == {3, 6}
    assert at_once[3]["save_time_s"] > at_once[3]["save_write_time_s"] > 0
    assert "save_write_time_s" not in background[3] and "save_time_s" not in background[4]
    assert 0 < background[3]["save_time_s"] < background[6]["save_write_time_s"]


WRITING_WHEN_KILLED = """
import os, signal, threading
from pathlib import Path
from llavaforge.training.step import OptimizerStep

step, open_, is_writing = OptimizerStep.__call__, Path.open, threading.Event()

def open_or_wait(self, *arguments, **options):
    if threading.current_thread().name.startswith("checkpoint") and "checkpoint-6" in str(self):
        is_writing.set()
        threading.Event().wait()
    return open_(self, *arguments, **options)

def step_or_die(self, *arguments):
    if self.state.step == 7:
        assert is_writing.wait(300)
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)

OptimizerStep.__call__, Path.open = step_or_die, open_or_wait
"""


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_killed_while_a_checkpoint_is_written_it_goes_on_from_the_one_before(
    where: str, config: Config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed = WarmProcess(command_line, arguments_of(config(max_steps=8)), WRITING_WHEN_KILLED)
    assert killed.wait(600) == -signal.SIGKILL, killed.communicate()
    assert published(run) == ["checkpoint-3"]
    (unfinished,) = left(run)
    if where == "elsewhere":  # a job that is queued again may start on another host
        _, _, *rest = unfinished.split("-")
        (run / unfinished).rename(run / "-".join([".llavaforge", "0123abcd", *rest]))
    assert train(config(max_steps=8))["global_step"] == 8
    assert left(run) == [] and published(run) == ["checkpoint-6", "checkpoint-8"]
    train(config("whole", max_steps=8))
    models = [tmp_path / name / "final" / "model.safetensors" for name in ("run", "whole")]
    assert models[0].read_bytes() == models[1].read_bytes()


@pytest.mark.parametrize(
    ("error", "is_saved"),
    [(RuntimeError("a fault"), True), (KeyboardInterrupt(), False)],
    ids=["fault", "ctrl-C twice"],
)
def test_a_run_that_ends_by_a_fault_publishes_what_is_being_written(
    error: BaseException, is_saved: bool, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_after_step(monkeypatch, LATER, then=error)
    with pytest.raises(type(error)):
        train(config())
    assert published(tmp_path / "run") == ["checkpoint-3"] * is_saved
    assert left(tmp_path / "run") == []


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_fault_of_the_last_checkpoint_is_told_before_the_finished_model(
    policy: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise OSError(errno.EIO, "Input/output error")

    when_writing(monkeypatch, fails)
    told = f"checkpoint-6 is not saved: {tmp_path / 'run'}.*The disk or the network drive fails.*No checkpoint was"
    if policy == "stop":
        with pytest.raises(UserError, match=told):
            train(config(max_steps=6, save_steps=6))
    else:
        train(config(on_save_error=policy))
        assert caplog.text.count("The run goes on (on_save_error: continue)") == 2
    assert (tmp_path / "run" / "final").is_dir() == (policy == "continue")
    assert published(tmp_path / "run") == [] and left(tmp_path / "run") == []
