"""An interrupted run ends where an uninterrupted one does."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llavaforge.data.load.loader import PackDataset
from llavaforge.data.load.pack import Pack
from llavaforge.errors import StoppedEarly, UserError
from llavaforge.folders import differences
from llavaforge.training.guards import Guards
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from train_tools import arguments_of, tensors_of, train_config
from warm import WarmProcess, command_line

STEPS = 12
KILLED_IN_STEP_9 = """
import os, signal
from llavaforge.training.step import OptimizerStep

step = OptimizerStep.__call__

def step_or_die(self, *arguments):
    if self.state.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)

OptimizerStep.__call__ = step_or_die
"""


def wait_for_step(output_dir: Path, step: int, process: WarmProcess) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_metrics(output_dir)):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached")


def assert_equal_models(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture(scope="module")
def whole(tiny_llava: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, without loader workers. Read only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(train_config(tiny_llava, shapes / "train", folder, max_steps=STEPS, save_steps=6))
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_and_resumed_equals_uninterrupted(
    num_workers: int, whole: Path, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(max_steps=STEPS, save_steps=6, dataloader_num_workers=num_workers)
    broken = train_config(tiny_llava, shapes / "train", tmp_path / "broken", **options)
    killed = WarmProcess(command_line, arguments_of(broken), KILLED_IN_STEP_9)
    assert killed.wait(900) == -signal.SIGKILL, killed.communicate()
    assert len(read_metrics(tmp_path / "broken")) == 8
    assert not (tmp_path / "broken" / "final").exists()
    assert train(broken)["global_step"] == STEPS
    assert_equal_models(whole / "final", tmp_path / "broken" / "final")
    losses = [[line["loss"] for line in read_metrics(run)] for run in (whole, tmp_path / "broken")]
    assert losses[0] == losses[1]  # the same samples in the same order


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGHUP, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_saves_and_says_start_again(
    number: signal.Signals, exit_code: int, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", max_steps=100_000, dataloader_num_workers=1)
    process = WarmProcess(command_line, arguments_of(config))
    wait_for_step(tmp_path / "run", 3, process)
    os.killpg(process.pid, number)  # as SLURM does: the loader's workers get it too
    out, err = process.communicate(timeout=300)
    assert process.returncode == exit_code, err
    assert out == "" and "Start again to go on" in err and "Traceback" not in err, err
    latest = (tmp_path / "run" / "latest").read_text().strip()
    assert not differences(tmp_path / "run" / latest)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask for a stop as a signal would, at a chosen step."""
    agree = Guards.agree

    def agree_or_stop(self: Guards, packs: list[Pack], fault: UserError | None, stop: Any) -> int:
        if self.state.step == step:
            stop.exit_code = 75
        return agree(self, packs, fault, stop)

    monkeypatch.setattr(Guards, "agree", agree_or_stop)


@pytest.mark.parametrize("train_type", ["use_lora", "full"])
def test_stopped_and_resumed_equals_uninterrupted_for_other_train_types(
    train_type: str, tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(max_steps=8, train_type=train_type, lora_dropout=0.1)
    train(train_config(tiny_llava, shapes / "train", tmp_path / "whole", **options))
    broken = train_config(tiny_llava, shapes / "train", tmp_path / "broken", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(StoppedEarly):
            train(broken)
    train(broken)
    stem = "adapter_model.safetensors" if train_type == "use_lora" else "model.safetensors"
    files = [tmp_path / name / "final" / stem for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_corrupt_checkpoint_is_passed_over_for_the_one_before(
    tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = dict(max_steps=9, save_steps=3)
    train(train_config(tiny_llava, shapes / "train", tmp_path / "whole", **options))
    broken = train_config(tiny_llava, shapes / "train", tmp_path / "broken", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(StoppedEarly):
            train(broken)
    newest = tmp_path / "broken" / "checkpoint-7" / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    train(broken)
    assert "checkpoint-7 is damaged" in caplog.text and "going on from" in caplog.text
    assert (tmp_path / "broken" / "checkpoint-7.corrupt").is_dir()
    assert_equal_models(tmp_path / "whole" / "final", tmp_path / "broken" / "final")


def test_only_the_newest_checkpoints_are_kept(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    train(train_config(tiny_llava, shapes / "train", tmp_path / "run", max_steps=5, save_steps=1, save_total_limit=2))
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-5"]
    assert (tmp_path / "run" / "latest").read_text().strip() == "checkpoint-5"


def test_a_bad_image_in_the_middle_loses_no_step(
    tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    rows = json.loads((shapes / "train" / "chat.json").read_text())
    (data / "chat.json").write_text(json.dumps(rows))
    for row in rows:
        (data / "images" / row["image"]).write_bytes((shapes / "train" / "images" / row["image"]).read_bytes())
    config = train_config(tiny_llava, data, tmp_path / "run", max_steps=9)
    seen: list[str] = []
    pixels = PackDataset.pixels
    with monkeypatch.context() as patch:
        patch.setattr(PackDataset, "pixels", lambda self, row: (seen.append(row.images[0].name), pixels(self, row))[1])
        train(train_config(tiny_llava, data, tmp_path / "whole", max_steps=9))
    victim = data / "images" / seen[21]  # of the sixth step
    whole_image = victim.read_bytes()
    victim.write_bytes(whole_image[:500])
    with pytest.raises(
        UserError, match=rf"(?s)chat.json row .*{victim.name}: cannot be decoded.*5 steps done so far are saved"
    ):
        train(config)
    victim.write_bytes(whole_image)
    assert train(config)["global_step"] == 9
    assert_equal_models(tmp_path / "whole" / "final", tmp_path / "run" / "final")
