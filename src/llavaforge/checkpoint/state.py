"""A resumable checkpoint: full float32 weights and moments of what learns, and where the run stands.

Comes in: `output_dir/checkpoint-N/`, as `writing.py` publishes it. Goes out: what is in it, for either engine on any
number of processes:

    state.safetensors     weight/<name>, exp_avg/<name>, exp_avg_sq/<name>, float32, full shape; in shards
                          (state-00001-of-00004.safetensors and an index) when large or written by several processes
    train_state.json      step, counts
    run.json              what run this belongs to: identity, config, base model
    manifest.json         sizes and SHA-256

What is frozen is not in it: it is found in the base model, whose fingerprint `run.json` holds.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from llavaforge.config.train_types import TRAIN_TYPES, TrainType
from llavaforge.engine.base import ParameterState
from llavaforge.errors import reading
from llavaforge.model_folder.card import RUN
from llavaforge.model_folder.json_files import read_json
from llavaforge.model_folder.tensors import open_tensors

STEM = "state"
TRAIN_STATE = "train_state.json"
LATEST = "latest"
PREFIX = "checkpoint-"
_KEYS = ("weight", "exp_avg", "exp_avg_sq")
_TEXTS = {"system_prompt"}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Identity(_Strict):
    base_model: str
    global_batch_size: PositiveInt


class _Lora(_Strict):
    r: PositiveInt
    alpha: PositiveInt
    dropout: float
    target_modules: list[str]


class _Result(_Strict):
    global_step: int
    train_loss: float | None


class _Run(_Strict):
    """What readers of a `run.json` rely on."""

    train_type: TrainType
    base_model: str
    identity: _Identity
    lora: _Lora | None = None
    data: list[dict[str, Any]] = []
    num_steps: PositiveInt | None = None
    held_out: str | None = None
    earlier_held_out: list[str | None] = []
    result: _Result | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "_Run":
        if "lora" in self.model_fields_set and TRAIN_TYPES[self.train_type].uses_lora != (self.lora is not None):
            raise ValueError(f"train_type {self.train_type} and lora do not go together")
        return self


def load_train_state(folder: Path) -> dict[str, Any]:
    """Read the counts of a checkpoint.

    Raises:
        UserError: they are damaged.
    """
    return read_json(folder / TRAIN_STATE)


def load_run(folder: Path) -> dict[str, Any]:
    """Read what run a checkpoint or a `final` belongs to.

    Raises:
        UserError: that is damaged, or no run's.
    """
    run = read_json(folder / RUN)
    with reading(folder / RUN, "Restore it, or give another folder."):
        _Run.model_validate(run)
    return run


def without_private_paths(value: Any) -> Any:
    """Return a run's description for a folder that is given away: of a path outside of here only the last name is left.

    (A system prompt may begin like a path.)
    """
    if isinstance(value, dict):
        return {key: item if key in _TEXTS else without_private_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_private_paths(item) for item in value]
    is_private = isinstance(value, str) and value.startswith(("/", "~", "../"))
    return Path(value).name if is_private else value


def with_private_paths(value: Any, whole: Any) -> Any:
    """Return a description with the paths that `without_private_paths` cut, where another one still has them.

    Args:
        value: of a folder that is given away.
        whole: of the same run, maybe of a later start of it: all else in it counts for nothing.
    """
    if value == without_private_paths(whole):
        return whole
    if isinstance(value, dict) and isinstance(whole, dict):
        return {key: with_private_paths(item, whole.get(key)) for key, item in value.items()}
    if isinstance(value, list) and isinstance(whole, list) and len(value) == len(whole):
        return [with_private_paths(*pair) for pair in zip(value, whole, strict=True)]
    return value


class ParameterStates(Mapping[str, ParameterState]):
    """Weights and moments of a checkpoint by module name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._tensors = open_tensors(folder, STEM)
        self._names = [key.removeprefix("weight/") for key in self._tensors if key.startswith("weight/")]

    def different(self, shapes: Mapping[str, torch.Size]) -> list[str]:
        """Return the parameters that are not here with weight and moments of these shapes, and those beyond them."""
        keys = {name: [f"{key}/{name}" for key in _KEYS] for name in shapes}
        unlike = [
            name
            for name, mine in keys.items()
            if not all(key in self._tensors and self._tensors.shape(key) == shapes[name] for key in mine)
        ]
        return sorted(unlike + [name for name in self._names if name not in shapes])

    def __getitem__(self, name: str) -> ParameterState:
        return ParameterState(*(self._tensors[f"{key}/{name}"] for key in _KEYS))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the trained weights alone, by module name, float32."""
    tensors = open_tensors(folder, STEM)
    return {key.removeprefix("weight/"): tensors[key] for key in tensors if key.startswith("weight/")}


def steps_of(output_dir: Path) -> list[int]:
    """Return the steps of the published checkpoints, oldest first."""
    suffixes = [path.name.removeprefix(PREFIX) for path in output_dir.glob(f"{PREFIX}*")]
    return sorted(int(suffix) for suffix in suffixes if suffix.isdigit())
