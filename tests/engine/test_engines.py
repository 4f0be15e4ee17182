"""However a global batch is split, the same steps are taken."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llavaforge.train.metrics import read_metrics
from llavaforge.train.run import train
from train_tools import TRAIN_TYPES, command, tensors_of, train_config

STEPS = 10


def run_two_processes(config: Any, port: int) -> None:
    """Start the command line under torchrun, as a user would."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    done = subprocess.run(
        [*launcher, *command(config)[1:]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def curve(folder: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(folder)]


@pytest.mark.parametrize(
    "split", [dict(per_device_train_batch_size=1), dict(per_device_train_batch_size=4), dict(max_tokens_per_batch=300)]
)
def test_micro_batching_changes_nothing(split: dict[str, int], tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    whole: dict[str, Any] = dict(
        global_batch_size=8, per_device_train_batch_size=8, train_type="full", learning_rate=1e-3
    )
    train(train_config(tiny_llava, shapes / "train", tmp_path / "8x1", **whole))
    train(train_config(tiny_llava, shapes / "train", tmp_path / "split", **{**whole, **split}))
    for key in ("loss", "grad_norm"):
        assert curve(tmp_path / "split", key) == pytest.approx(curve(tmp_path / "8x1", key), rel=1e-4)


def test_the_seeds_trio_gives_the_global_batch(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    trio = dict(global_batch_size=None, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    train(train_config(tiny_llava, shapes / "train", tmp_path / "trio", max_steps=2, **trio))
    whole = dict(global_batch_size=6, per_device_train_batch_size=6)
    train(train_config(tiny_llava, shapes / "train", tmp_path / "whole", max_steps=2, **whole))
    assert curve(tmp_path / "trio", "loss") == pytest.approx(curve(tmp_path / "whole", "loss"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("train_type", "port"), list(zip(TRAIN_TYPES, range(29_641, 29_645), strict=True)))
def test_two_processes_zero_2_equal_one(
    train_type: str, port: int, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(
        train_type=train_type, max_steps=STEPS, global_batch_size=8, per_device_train_batch_size=2, learning_rate=1e-3,
        save_steps=6,
    )  # fmt: skip
    train(train_config(tiny_llava, shapes / "train", tmp_path / "one", **options))
    two = train_config(tiny_llava, shapes / "train", tmp_path / "two", **options)
    run_two_processes(two, port)
    for key in ("loss", "grad_norm"):
        assert curve(tmp_path / "two", key) == pytest.approx(curve(tmp_path / "one", key), rel=1e-4)
    if train_type == "use_lora":
        return
    one_model, two_model = (tensors_of(tmp_path / name / "final") for name in ("one", "two"))
    for name, tensor in one_model.items():
        torch.testing.assert_close(two_model[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(
        max_steps=8, per_device_train_batch_size=1, global_batch_size=None, learning_rate=1e-3
    )
    options |= dict(gradient_accumulation_steps=2, save_steps=4)
    two = train_config(tiny_llava, shapes / "train", tmp_path / "run", **options)
    run_two_processes(two, 29_651)  # global batch 1 x 2 x 2 = 4, frozen with the run
    before = curve(tmp_path / "run", "loss")
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    assert train(two)["global_step"] == 8
    assert curve(tmp_path / "run", "loss") == pytest.approx(before, rel=1e-4)


@pytest.mark.slow
def test_bfloat16_under_zero_2_starts_from_the_files_precision(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(max_steps=4, bf16=True, learning_rate=0.0, projector_learning_rate=1e-9)
    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", train_type="projector", **options)
    run_two_processes(config, 29_652)
    before, after = tensors_of(tiny_llava), tensors_of(tmp_path / "run" / "final")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-7)
