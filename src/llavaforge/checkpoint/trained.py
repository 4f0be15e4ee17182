"""What a run trained, read back: from a checkpoint-N, or from a LoRA run's `final`.

Comes in: a folder of a run. Goes out: the trained tensors and the base model they belong to, put into a loaded model or
merged into a new folder.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llavaforge.checkpoint.state import TRAIN_STATE, load_run, load_weights, with_private_paths, without_private_paths
from llavaforge.errors import UserError, reading
from llavaforge.folders import differences, fingerprint
from llavaforge.model.load import LoadedModel, load_model
from llavaforge.model.lora import LoraOptions, add_lora, is_lora, lora_modules, merged_weight, trained_tensors
from llavaforge.model_folder.card import RUN
from llavaforge.model_folder.tensors import open_tensors
from llavaforge.model_folder.write import update_model_folder


@dataclass(frozen=True)
class Trained:
    """Trained tensors by module name, and what they belong to.

    Attributes:
        base: folder of the model that the run started from.
        tensors: float32 weights of what learnt.
        lora: the LoRA options, or None when plain weights learnt.
        run: the run's description.
    """

    base: Path
    tensors: dict[str, torch.Tensor]
    lora: LoraOptions | None
    run: dict[str, Any]


def read_trained(folder: Path, base_model: Path | None = None) -> Trained | None:
    """Read a checkpoint-N or a LoRA run's `final`.

    Args:
        folder: of the run.
        base_model: folder of the model that the run started from, when it is not where it was.

    Returns:
        None for a plain model folder, which needs no base.

    Raises:
        UserError: no such folder, faulty files, or a base model that is gone or has changed.
    """
    is_checkpoint = (folder / TRAIN_STATE).is_file()
    if not is_checkpoint and not (folder / "adapter_config.json").is_file():
        if base_model is not None:
            raise UserError(f"{folder}: is a whole model, which needs no base model. Leave --base_model out.")
        return None
    if not (folder / RUN).is_file():
        raise UserError(
            f"{folder}: an adapter that llavaforge did not write (no {RUN}). Open it with peft, "
            "or merge it there and give the merged folder."
        )
    if found := differences(folder):
        raise UserError(f"{folder}: {'; '.join(found)}. Give another checkpoint, or copy it again.")
    run = load_run(folder)
    base = base_model or Path(own_run(folder, run)["base_model"])
    _check_base(folder, base, run, is_given=base_model is not None)
    with reading(folder / RUN, "Restore it, or give another checkpoint."):
        options = _lora_options(run)
    if is_checkpoint:
        return Trained(base, load_weights(folder), options, run)
    adapter = open_tensors(folder, "adapter_model")
    return Trained(base, trained_tensors(dict(adapter.items())), options, run)


def own_run(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Return a run's description with its paths, which a `final` does not hold: it is there to be given away.

    Args:
        folder: a checkpoint-N or a `final`.
        run: its own description, which is returned where it was moved out of the run's folder.
    """
    around = folder.resolve().parent
    with suppress(UserError):
        if (around / RUN).is_file():
            own = load_run(around)
            if own["identity"]["base_model"] == run["identity"]["base_model"]:
                return with_private_paths(run, own) | {"base_model": own["base_model"]}
    return run


def open_model(name_or_path: str, base_model: Path | None = None, dtype: torch.dtype | None = None) -> LoadedModel:
    """Open anything that a run leaves, or any model folder, with what was trained in place (a LoRA stays unmerged).

    Raises:
        UserError: see `read_trained` and `load_model`.
    """
    trained = read_trained(Path(name_or_path), base_model) if Path(name_or_path).is_dir() else None
    if trained is None:
        return load_model(name_or_path, dtype)
    loaded = load_model(str(trained.base), dtype)
    if trained.lora is not None:
        add_lora(loaded.model, trained.lora, seed=0)
    parameters = dict(loaded.model.named_parameters())
    for name, tensor in trained.tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UserError(f"{name_or_path}: `{name}` has no place in {trained.base}. Give another checkpoint.")
    if missing := sorted(name for name in parameters if is_lora(name) and name not in trained.tensors):
        raise UserError(f"{name_or_path}: lacks `{missing[0]}`. Give another checkpoint.")
    with torch.no_grad():
        for name, tensor in trained.tensors.items():
            parameters[name].copy_(tensor)
    return loaded


def merge(output_dir: Path, trained: Trained, overwrite: bool = False) -> None:
    """Write the plain model folder that equals base plus what was trained."""
    modules = {f"{module}.weight": module for module in lora_modules(trained.tensors)}

    def changed(name: str, base: torch.Tensor) -> torch.Tensor:
        if name in modules:
            assert trained.lora is not None
            return merged_weight(base, trained.tensors, modules[name], trained.lora.scaling)
        return trained.tensors.get(name, base)

    records = {RUN: without_private_paths(trained.run)}
    update_model_folder(output_dir, trained.base, changed, overwrite=overwrite, records=records)


def _lora_options(run: dict[str, Any]) -> LoraOptions | None:
    """Return the LoRA options of a run, None when plain weights learnt."""
    stated = run.get("lora")
    if "lora" not in run and run["train_type"] == "use_lora":  # written by llavaforge 0.1.0 of before December 2026
        stated = {name: run["config"][f"lora_{name}"] for name in ("r", "alpha", "dropout", "target_modules")}
    if stated is None:
        return None
    return LoraOptions(**stated | {"target_modules": tuple(stated["target_modules"])})


def _check_base(folder: Path, base: Path, run: dict[str, Any], is_given: bool) -> None:
    if not base.is_dir():
        what = "no folder" if base.exists() else "not there"
        raise UserError(
            f"{folder}: its base model {base} is {what}. Put it back, or name the folder that it is in now: "
            "--base_model FOLDER (under `train`, model_name_or_path)."
        )
    if fingerprint(base) != run["identity"]["base_model"] and is_given:
        raise UserError(
            f"{base}: is not the model that {folder} was trained on (that was {run['base_model']}), or has changed."
        )
    if fingerprint(base) != run["identity"]["base_model"]:
        raise UserError(
            f"{folder}: its base model {base} has changed since the run. Restore the model that it was trained on."
        )
