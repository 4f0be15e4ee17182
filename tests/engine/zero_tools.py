"""What the tests of ZeRO share: options, curves and comparisons."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llavaforge.training.metrics import read_metrics

STEPS = 20
STAGES = ("zero1", "zero2", "zero3")
Alone = Callable[..., tuple[Path, dict[str, Any]]]


def options(**changes: Any) -> dict[str, Any]:
    """Clipping and weight decay at work, two micro-steps per rank, and a bad start for whoever guesses defaults."""
    values: dict[str, Any] = dict(
        max_steps=6, global_batch_size=8, per_device_train_batch_size=2, learning_rate=1e-3, train_type="full",
        max_grad_norm=0.5, weight_decay=0.1, adam_beta2=0.95,
    )  # fmt: skip
    return values | changes


def curve(folder: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(folder) if key in line]


def assert_same_curve(one: Path, other: Path, rel: float = 1e-4) -> None:
    assert len(read_metrics(one)) == len(read_metrics(other)) > 0
    for key in ("loss", "grad_norm", "eval_loss"):
        assert curve(other, key) == pytest.approx(curve(one, key), rel=rel), key


def assert_close_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-3) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (other[name] - tensor).abs().max() < atol, name


def held_out(shapes: Path) -> dict[str, Any]:
    return {"eval_data_path": shapes / "heldout", "eval_steps": 10}
