"""A resumable checkpoint: full float32 weights and moments of what learns, and where the run stands.

Comes in: an engine and the run's counts. Goes out: `output_dir/checkpoint-N/`, readable by either engine on any
number of processes:

    state.safetensors     weight/<name>, exp_avg/<name>, exp_avg_sq/<name>, float32 (in shards when large)
    train_state.json      step, counts
    run.json              what run this belongs to: identity, config, base model
    manifest.json         sizes and SHA-256

Called by `train/run.py`.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llavaforge.checkpoint.publish import publishing, replace_text
from llavaforge.engine.base import Engine, ParameterState
from llavaforge.model_folder.tensors import open_tensors, write_shards

logger = logging.getLogger(__name__)

STEM = "state"
TRAIN_STATE = "train_state.json"
RUN = "run.json"
LATEST = "latest"
PREFIX = "checkpoint-"
_KEYS = ("weight", "exp_avg", "exp_avg_sq")


def save(
    output_dir: Path, engine: Engine, step: int, train_state: dict[str, Any], run: dict[str, Any], keep: int
) -> Path:
    """Publish `checkpoint-STEP`, move the `latest` pointer, and remove the oldest beyond `keep`.

    All ranks call this; rank 0 writes.
    """
    folder = output_dir / f"{PREFIX}{step}"
    if engine.rank == 0 and not folder.exists():
        with publishing(folder) as temporary:
            write_shards(temporary, STEM, _flat(engine))
            (temporary / TRAIN_STATE).write_text(json.dumps(train_state, indent=1) + "\n")
            (temporary / RUN).write_text(json.dumps(run, indent=1) + "\n")
        replace_text(output_dir / LATEST, folder.name + "\n")
        _rotate(output_dir, keep)
    elif engine.rank != 0:
        for _ in engine.trainable_state():
            pass
    engine.barrier()
    return folder


def load_train_state(folder: Path) -> dict[str, Any]:
    """Read the counts of a checkpoint."""
    state: dict[str, Any] = json.loads((folder / TRAIN_STATE).read_text())
    return state


def load_run(folder: Path) -> dict[str, Any]:
    """Read what run a checkpoint or a `final` belongs to."""
    run: dict[str, Any] = json.loads((folder / RUN).read_text())
    return run


def load_parameter_states(folder: Path) -> dict[str, ParameterState]:
    """Read weights and moments, by module name."""
    tensors = open_tensors(folder, STEM)
    names = [key.removeprefix("weight/") for key in tensors if key.startswith("weight/")]
    return {name: ParameterState(*(tensors[f"{key}/{name}"] for key in _KEYS)) for name in names}


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the trained weights alone, by module name, float32."""
    tensors = open_tensors(folder, STEM)
    return {key.removeprefix("weight/"): tensors[key] for key in tensors if key.startswith("weight/")}


def steps_of(output_dir: Path) -> list[int]:
    """Return the steps of the published checkpoints, oldest first."""
    suffixes = [path.name.removeprefix(PREFIX) for path in output_dir.glob(f"{PREFIX}*")]
    return sorted(int(suffix) for suffix in suffixes if suffix.isdigit())


def _flat(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    for name, state in engine.trainable_state():
        yield f"weight/{name}", state.weight
        yield f"exp_avg/{name}", state.exp_avg
        yield f"exp_avg_sq/{name}", state.exp_avg_sq


def _rotate(output_dir: Path, keep: int) -> None:
    for step in steps_of(output_dir)[:-keep]:
        try:
            shutil.rmtree(output_dir / f"{PREFIX}{step}")
        except OSError as error:
            logger.warning("%s%d could not be removed: %s", PREFIX, step, error)
