"""What goes wrong while a run goes on: it ends with a name for it, and what was done is saved."""

import contextlib
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llavaforge.engine.base import StepResult
from llavaforge.errors import UserError
from llavaforge.files import read_json_lines
from llavaforge.folders import differences
from llavaforge.training.guards import Guards
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from llavaforge.training.step import OptimizerStep
from train_tools import arguments_of, tensors_of, train_config
from warm import WarmProcess, command_line


@contextlib.contextmanager
def running(config: Any, step: int, before: str = "") -> Iterator[WarmProcess]:
    """A run in a process of its own, once it has taken so many steps."""
    process = WarmProcess(command_line, arguments_of(config), before)
    try:
        deadline = time.monotonic() + 300
        while step and not any(line["step"] >= step for line in read_metrics(config.output_dir)):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.kill()


def workers_of(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if child.ppid() != pid]


def newest(run: Path) -> Path:
    return run / (run / "latest").read_text().strip()


FAULTS = {
    "killed": (signal.SIGKILL, r"error: a loader worker was ended by SIGKILL.*lower --dataloader_num_workers"),
    "stopped": (signal.SIGSTOP, r"error: no image came from the loader for 3 s \(stuck_timeout_s\)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_loader_worker_that_dies_or_hangs_ends_the_run_with_what_is_done_saved(
    name: str, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    number, message = FAULTS[name]
    values: dict[str, Any] = dict(max_steps=100_000, dataloader_num_workers=2, stuck_timeout_s=4)
    with running(train_config(tiny_llava, shapes / "train", tmp_path / "run", **values), step=2) as process:
        workers = workers_of(process.pid)
        for worker in workers if name == "stopped" else workers[:1]:
            worker.send_signal(number)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 1 and re.search(message, told, re.DOTALL) and "Traceback" not in told, told
    assert not differences(newest(tmp_path / "run"))
    assert re.search(r"steps done so far are saved in \S*checkpoint-\d+", told)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


def fail_in(step: int, moment: str) -> Callable[..., Any]:
    """An `OptimizerStep.__call__` that finds no memory in a step, before or while weights are changed."""
    real = OptimizerStep.__call__

    def call(self: OptimizerStep, *arguments: Any) -> Any:
        if self.state.step == step - 1:
            self.is_updating = moment == "update"
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(self, *arguments)

    return call


@pytest.mark.parametrize("moment", ["forward", "update"])
def test_out_of_memory_names_what_to_lower_and_saves_whole_weights_only(
    moment: str, tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OptimizerStep, "__call__", fail_in(4, moment))
    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", save_steps=2)
    remedies = "--gradient_checkpointing true; --per_device_train_batch_size 2; --max_length below 2048"
    with pytest.raises(UserError, match=f"step 4: out of memory .*{remedies}") as caught:
        train(config)
    assert caught.value.exit_code == 1
    assert newest(tmp_path / "run").name == ("checkpoint-3" if moment == "forward" else "checkpoint-2")
    assert not differences(newest(tmp_path / "run"))
    monkeypatch.undo()
    train(config)
    train(train_config(tiny_llava, shapes / "train", tmp_path / "whole"))
    one, other = tensors_of(tmp_path / "run" / "final"), tensors_of(tmp_path / "whole" / "final")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_is_told_with_the_folder_and_nothing_half_written_is_left(
    policy: str, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = dict(max_steps=2, save_steps=1, on_save_error=policy, train_type="full")
    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", **values)
    limited = LIMITED.format(size=200_000)  # a checkpoint is larger: writing it fails as on a full disk
    with running(config, 0, limited) as process:
        _, told = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in told, told
    assert f"checkpoint-1 is not saved: {tmp_path / 'run'}" in told and "No checkpoint was saved before" in told
    # With `continue` all steps are taken, and then the finished model finds no place either.
    assert len(read_metrics(tmp_path / "run")) == (1 if policy == "stop" else 2)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left <= {"run.json", ".llavaforge.lock", "metrics.jsonl", "loss.png", "report.html"}, left


def test_too_little_space_is_found_before_a_checkpoint_is_begun(
    tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", save_steps=2)
    usage = shutil.disk_usage(tmp_path)
    real = Guards.look_at

    def fills_the_disk(self: Guards, *arguments: Any) -> None:
        real(self, *arguments)
        if self.state.step == 4:
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))

    monkeypatch.setattr(Guards, "look_at", fills_the_disk)
    message = r"checkpoint-4 is not saved: .*a checkpoint takes \d+ MB, 0 MB are free.*checkpoint-2 is intact"
    with pytest.raises(UserError, match=message):
        train(config)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2"]


def test_a_loss_far_above_the_last_ones_is_told_with_its_records(
    tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Guards] = []
    real = Guards.look_at

    def keep(self: Guards, *arguments: Any) -> None:
        seen.append(self)
        real(self, *arguments)

    monkeypatch.setattr(Guards, "look_at", keep)
    train(train_config(tiny_llava, shapes / "train", tmp_path / "run", max_steps=1))
    monkeypatch.undo()
    guards = seen[0]
    for number in range(130):
        guards.look_at(StepResult(1.0, False), {"step": 1, "loss": 2.0 + 0.1 * (number % 2), "grad_norm": 1.0})
    guards.look_at(StepResult(1.0, False), {"step": 1, "loss": 2.3, "grad_norm": 1.0})
    assert not (tmp_path / "run" / "unusual_steps.jsonl").exists()
    guards.look_at(StepResult(1.0, False), {"step": 1, "loss": 3.0, "grad_norm": 1.0})
    (line,) = read_json_lines(tmp_path / "run" / "unusual_steps.jsonl")
    assert len(line["records"]) == 4 and "far above the last 128 steps" in caplog.text


def test_the_prepared_data_may_be_damaged_or_gone_at_any_time(
    tiny_llava: Path, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def start(name: str) -> dict[str, Any]:
        values: dict[str, Any] = dict(cache_dir=tmp_path / "cache", max_steps=2)
        train(train_config(tiny_llava, shapes / "train", tmp_path / name, **values))
        final = tmp_path / name / "final"
        return {key: tensor for key, tensor in tensors_of(final).items()}

    whole = start("whole")
    (index,) = (tmp_path / "cache" / "index").glob("*.arrow")
    content = index.read_bytes()
    middle = bytearray(content)
    middle[len(content) // 2] ^= 1
    for name, damaged in (("flipped", bytes(middle)), ("cut", content[:1000]), ("empty", b""), ("gone", None)):
        for path in (tmp_path / "cache" / "index").glob("*.arrow"):  # the newest one is looked at first
            path.unlink() if damaged is None else path.write_bytes(damaged)
        caplog.clear()
        again = start(name)
        assert [key for key in whole if not torch.equal(whole[key], again[key])] == [], name
        assert ("prepared data is damaged; it is prepared anew" in caplog.text) == (damaged is not None), name
    for path in (tmp_path / "cache" / "index").glob("*.faults.jsonl"):
        path.write_text('{"kind": ')
    start("list")


def test_prepared_data_that_goes_while_a_run_needs_it_is_named(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = dict(
        cache_dir=tmp_path / "cache", max_steps=100_000, dataloader_num_workers=1, eval_steps=40,
        eval_data_path=shapes / "heldout", save_steps=10,
    )  # fmt: skip
    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", **values)
    with running(config, step=3) as process:
        for path in (tmp_path / "cache" / "index").glob("*.arrow"):
            path.unlink()  # workers of the held-out loss open it anew
        _, told = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in told, told
    assert ".arrow: cannot be read" in told and "it is prepared anew" in told
    assert json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
