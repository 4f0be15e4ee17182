"""Kept vision features: the bytes of a run without them, whatever happens to the files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from train_tools import train_config

KINDS = ("disk", "memory")


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """A private copy of the training data, 40 records."""
    return Path(shutil.copytree(shapes / "train", tmp_path / "data"))


def weights(run: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((run / "final").glob("*.safetensors")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train_type", ["projector", "freeze_vision", "use_lora"])
def test_a_run_with_kept_features_ends_with_the_same_bytes(
    train_type: str, kind: str, tiny_llava: Path, data: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"train_type": train_type, "max_steps": 24, "validation_split": 6, "eval_steps": 8}
    values["cache_dir"] = tmp_path / "cache"
    without = train(train_config(tiny_llava, data, tmp_path / "without", **values))
    kept = train(train_config(tiny_llava, data, tmp_path / "kept", cache_vision_features=kind, **values))
    assert weights(tmp_path / "kept") == weights(tmp_path / "without")
    assert kept["eval_loss"] == without["eval_loss"]
