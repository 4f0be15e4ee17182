"""However a global batch is split, the same steps are taken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from ranks import free_port
from train_tools import command, train_config


def curve(folder: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(folder)]


WHOLE: dict[str, Any] = dict(global_batch_size=8, per_device_train_batch_size=8, train_type="full", learning_rate=1e-3)


@pytest.fixture(scope="module")
def whole(tiny_llava: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps are one micro-batch each. Read only."""
    folder = tmp_path_factory.mktemp("8x1") / "run"
    train(train_config(tiny_llava, shapes / "train", folder, **WHOLE))
    return folder


@pytest.mark.parametrize(
    "split", [dict(per_device_train_batch_size=1), dict(per_device_train_batch_size=4), dict(max_tokens_per_batch=300)]
)
def test_micro_batching_changes_nothing(
    split: dict[str, int], whole: Path, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    train(train_config(tiny_llava, shapes / "train", tmp_path / "split", **{**WHOLE, **split}))
    for key in ("loss", "grad_norm"):
        assert curve(tmp_path / "split", key) == pytest.approx(curve(whole, key), rel=1e-4)


def test_micro_batch_times_accumulation_gives_the_global_batch(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    trio = dict(global_batch_size=None, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    train(train_config(tiny_llava, shapes / "train", tmp_path / "trio", max_steps=2, **trio))
    whole = dict(global_batch_size=6, per_device_train_batch_size=6)
    train(train_config(tiny_llava, shapes / "train", tmp_path / "whole", max_steps=2, **whole))
    assert curve(tmp_path / "trio", "loss") == pytest.approx(curve(tmp_path / "whole", "loss"), rel=1e-5)


@pytest.mark.slow
def test_torchrun_prints_one_result_and_leaves_what_one_process_leaves(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(max_steps=4, per_device_train_batch_size=1, global_batch_size=None)
    options |= dict(gradient_accumulation_steps=2, learning_rate=1e-3)
    two = train_config(tiny_llava, shapes / "train", tmp_path / "two", **options)  # ZeRO-2 of itself
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = subprocess.run(
        [*launcher, *command(two)[1:]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()  # one result, and nothing that DeepSpeed prints
    assert json.loads(line)["global_step"] == 4
    whole = dict(max_steps=4, per_device_train_batch_size=4, global_batch_size=4, learning_rate=1e-3)
    train(train_config(tiny_llava, shapes / "train", tmp_path / "one", **whole))
    assert curve(tmp_path / "two", "loss") == pytest.approx(curve(tmp_path / "one", "loss"), rel=1e-4)
