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

import errno
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from llavaforge.config.train_types import TRAIN_TYPES, TrainType
from llavaforge.engine.base import Engine, ParameterState
from llavaforge.errors import EndedElsewhere, naming, reading
from llavaforge.files import replace_text, sync_path, to_json
from llavaforge.folders import entry_of, not_published, publishing
from llavaforge.model_folder.read import read_json
from llavaforge.model_folder.tensors import name_shards, open_tensors, write_numbered

logger = logging.getLogger(__name__)

STEM = "state"
TRAIN_STATE = "train_state.json"
RUN = "run.json"
LATEST = "latest"
PREFIX = "checkpoint-"
_KEYS = ("weight", "exp_avg", "exp_avg_sq")


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
    result: _Result | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "_Run":
        if "lora" in self.model_fields_set and TRAIN_TYPES[self.train_type].uses_lora != (self.lora is not None):
            raise ValueError(f"train_type {self.train_type} and lora do not go together")
        return self


def save(
    output_dir: Path,
    engine: Engine,
    step: int,
    train_state: dict[str, Any],
    run: dict[str, Any],
    num_bytes: int,
    keep: int,
) -> Path:
    """Publish `checkpoint-STEP`, move the `latest` pointer, and remove the oldest beyond `keep`.

    All processes call this; each writes, sums and flushes its share of the tensors, the writer publishes.

    Args:
        output_dir: of the run.
        engine: gives the tensors.
        step: steps done.
        train_state: where the run stands.
        run: what run this is.
        num_bytes: of all tensors, looked for on the disk before anything is written.
        keep: number of checkpoints.

    Raises:
        OSError: the disk is full, say; nothing is published then.
    """
    folder, world = output_dir / f"{PREFIX}{step}", engine.world
    if world.broadcast_object(folder.exists()):
        return folder
    failure: OSError | None = None
    try:
        with ExitStack() as published:
            entries: dict[str, dict[str, Any]] = {}

            def begin() -> str:
                if not world.is_writer:
                    return ""
                _check_free_space(output_dir, num_bytes)
                return str(published.enter_context(publishing(folder, entries)))

            temporary = Path(world.broadcast_object(world.run_on_all(begin)))
            written = world.all_gather_objects(world.run_on_all(lambda: _write_shards(temporary, engine)))
            if world.is_writer:
                entries |= _named([shard for mine in written for shard in mine], temporary)
                (temporary / TRAIN_STATE).write_text(to_json(train_state, indent=1) + "\n")
                (temporary / RUN).write_text(to_json(run, indent=1) + "\n")
        if world.is_writer:
            replace_text(output_dir / LATEST, folder.name + "\n")
            _rotate(output_dir, keep)
    except OSError as error:
        failure = error
    except EndedElsewhere:  # another process's fault: it is raised again below, on all of them
        pass

    def check() -> None:
        if failure is not None:
            raise failure

    world.run_on_all(check)
    return folder


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


def _write_shards(folder: Path, engine: Engine) -> list[tuple[str, list[str], dict[str, Any]]]:
    """Write the tensors that fall to this process; return file name, tensor names and manifest entry of each shard."""
    tensors = _flat(engine)
    try:
        with naming(folder):
            shards = write_numbered(folder, f"{STEM}-of-{engine.world.rank:05d}", tensors)
            for path, _ in shards:
                path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes its files private
                sync_path(path)
            return [(path.name, names, entry_of(path)) for path, names in shards]
    except OSError:
        for _ in tensors:  # the other processes wait for this one in each of them
            pass
        raise


def _named(shards: list[tuple[str, list[str], dict[str, Any]]], folder: Path) -> dict[str, dict[str, Any]]:
    """Give the shards of all processes their final names, and return their entries by them."""
    paths = name_shards(folder, STEM, [(name, tensors) for name, tensors, _ in shards])
    return {path.name: entry for path, (_, _, entry) in zip(paths, shards, strict=True)}


def _check_free_space(folder: Path, num_bytes: int) -> None:
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        needed = f"a checkpoint takes {num_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, needed, str(folder))


def _flat(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    for name, state in engine.trainable_state():
        yield f"weight/{name}", state.weight
        yield f"exp_avg/{name}", state.exp_avg
        yield f"exp_avg_sq/{name}", state.exp_avg_sq


def _rotate(output_dir: Path, keep: int) -> None:
    for step in steps_of(output_dir)[:-keep]:
        folder = output_dir / f"{PREFIX}{step}"
        try:
            if strangers := not_published(folder):
                logger.warning("%s is kept: it holds what llavaforge did not write (%s)", folder, strangers[0])
            else:
                shutil.rmtree(folder)
        except OSError as error:
            logger.warning("%s could not be removed: %s", folder, error)
