"""A resumable checkpoint: full float32 weights and moments of what learns, and where the run stands.

Comes in: an engine and the run's counts. Goes out: `output_dir/checkpoint-N/`, readable by either engine on any number
of processes:

    state.safetensors     weight/<name>, exp_avg/<name>, exp_avg_sq/<name>, float32, full shape; in shards
                          (state-00001-of-00004.safetensors and an index) when large or written by several processes
    train_state.json      step, counts
    run.json              what run this belongs to: identity, config, base model
    manifest.json         sizes and SHA-256

What is frozen is not in it: it is found in the base model, whose fingerprint `run.json` holds.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llavaforge.engine.base import Engine, ParameterState
from llavaforge.files import entry_of, publishing, replace_text, sync_path
from llavaforge.model_folder.tensors import name_shards, open_tensors, write_numbered

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

    All processes call this; each writes, sums and flushes its share of the tensors, the writer publishes.
    """
    folder, world = output_dir / f"{PREFIX}{step}", engine.world
    if world.broadcast_object(folder.exists()):
        return folder
    if not world.is_writer:
        temporary = Path(world.broadcast_object(""))
        world.all_gather_objects(_write_shards(temporary, engine))
    else:
        entries: dict[str, dict[str, Any]] = {}
        with publishing(folder, entries) as temporary:
            world.broadcast_object(str(temporary))
            written = world.all_gather_objects(_write_shards(temporary, engine))
            shards = [shard for mine in written for shard in mine]
            paths = name_shards(temporary, STEM, [(name, tensors) for name, tensors, _ in shards])
            entries |= {path.name: entry for path, (_, _, entry) in zip(paths, shards, strict=True)}
            (temporary / TRAIN_STATE).write_text(json.dumps(train_state, indent=1) + "\n")
            (temporary / RUN).write_text(json.dumps(run, indent=1) + "\n")
        replace_text(output_dir / LATEST, folder.name + "\n")
        _rotate(output_dir, keep)
    world.barrier()
    return folder


def load_train_state(folder: Path) -> dict[str, Any]:
    """Read the counts of a checkpoint."""
    state: dict[str, Any] = json.loads((folder / TRAIN_STATE).read_text())
    return state


def load_run(folder: Path) -> dict[str, Any]:
    """Read what run a checkpoint or a `final` belongs to."""
    run: dict[str, Any] = json.loads((folder / RUN).read_text())
    return run


def without_private_paths(value: Any) -> Any:
    """Return a run's description for a folder that is given away: of absolute paths only the last name is left."""
    if isinstance(value, dict):
        return {key: without_private_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_private_paths(item) for item in value]
    is_private = isinstance(value, str) and value.startswith(("/", "~"))
    return Path(value).name if is_private else value


class ParameterStates(Mapping[str, ParameterState]):
    """Weights and moments of a checkpoint by module name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._tensors = open_tensors(folder, STEM)
        self._names = [key.removeprefix("weight/") for key in self._tensors if key.startswith("weight/")]

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


def _write_shards(folder: Path, engine: Engine) -> list[tuple[str, list[str], dict[str, Any]]]:
    """Write the tensors that fall to this process; return file name, tensor names and manifest entry of each shard."""
    shards = write_numbered(folder, f"{STEM}-of-{engine.world.rank:05d}", _flat(engine))
    for path, _ in shards:
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes its files private
        sync_path(path)
    return [(path.name, names, entry_of(path)) for path, names in shards]


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
