"""The DeepSpeed settings of a run: a shipped file or the user's, its `auto` values filled in, contradictions refused.

Comes in: `--deepspeed` and the values that the recipe decides. Goes out: the dict that `deepspeed.initialize` takes.

A setting that would have no effect is an error: what a file says must be what happens.
"""

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llavaforge.config.load import nearest
from llavaforge.config.schema import TrainConfig, shipped_deepspeed
from llavaforge.device import compute_dtype
from llavaforge.engine.cpu_adam import load_cpu_adam
from llavaforge.engine.memory import offloads_optimizer
from llavaforge.errors import UserError
from llavaforge.model.trainable import learning_rate
from llavaforge.model_folder.hub import find_model_folder
from llavaforge.model_folder.read import read_config

DEFAULT = "zero2"
_AUTO = "auto"

# What a file may set freely at its top level; everything else there is decided by the recipe.
_FREE = (
    "zero_optimization communication_data_type prescale_gradients gradient_predivide_factor comms_logger "
    "wall_clock_breakdown steps_per_print"
).split()

# Decided by the recipe and carried out by us: DeepSpeed is not told.
_OURS = "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer fp16".split()

_INSTEAD = {
    "scheduler": "the recipe's lr_scheduler_type, warmup_ratio and warmup_steps decide",
    "fp16": "llavaforge computes in bfloat16 or float32 (--bf16)",
    "amp": "llavaforge computes in bfloat16 or float32 (--bf16)",
    "activation_checkpointing": "give --gradient_checkpointing",
    "tensorboard": "give --report_to tensorboard",
    "checkpoint": "llavaforge writes its own checkpoints (--save_steps)",
}

# What of the section `zero_optimization` has an effect, per stage (DeepSpeed 0.19.8, runtime/engine.py).
_COMMON = {"stage", "offload_optimizer"}
_STAGE_1_AND_2 = _COMMON | set(
    "contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions "
    "allgather_bucket_size overlap_comm round_robin_gradients".split()
)
_STAGE_3 = _COMMON | set(
    "contiguous_gradients reduce_scatter reduce_bucket_size overlap_comm sub_group_size offload_param "
    "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold "
    "stage3_allgather_sequential memory_efficient_linear".split()
)
_STAGE_1_BF16 = _COMMON | {"allgather_bucket_size"}  # DeepSpeed then uses another optimizer, which knows no more
_OFFLOAD = {"device", "pin_memory"}


def build_settings(named: str | None, known: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """Return the complete DeepSpeed settings.

    Args:
        named: `zero1`, `zero2`, ... (`config.schema.shipped_deepspeed`), a path, or None for ZeRO-2.
        known: what the recipe decides, by dotted key, such as `bf16.enabled`; a file may repeat it or say `auto`.
        hidden_size: of the language model, for `auto` bucket sizes (as transformers' integration derives them).

    Raises:
        UserError: an unreadable file; a setting that contradicts the recipe, is unknown, or would have no effect.
    """
    path = shipped_deepspeed().get(named or DEFAULT) or Path(str(named))
    settings = _read(path)
    problems = [*_contradictions(settings, known), *_unknown(settings, known)]
    bf16 = bool(known["bf16.enabled"])
    zero = settings.get("zero_optimization")
    problems += _problems_of_zero(zero, bf16) if isinstance(zero, dict) else ["`zero_optimization` is missing"]
    if problems:
        raise UserError(f"{path} (deepspeed):\n" + "\n".join(f"  {problem}" for problem in problems))
    assert isinstance(zero, dict)
    for key, value in known.items():
        _put(settings, key, value)
    sizes = _auto_sizes(hidden_size)
    settings["zero_optimization"] = {
        key: sizes[key] if value == _AUTO else int(value) if isinstance(value, float) else value  # 5e8 is a float
        for key, value in zero.items()
    }
    return {key: value for key, value in settings.items() if key not in _OURS}


def settings_of_run(config: TrainConfig, global_batch_size: int | None, num_processes: int) -> dict[str, Any] | None:
    """Return DeepSpeed's settings for a run, None for plain PyTorch; checked before a weight is read.

    `global_batch_size` is None where it is not given.

    Raises:
        UserError: as `build_settings` and `check_installed`.
    """
    if config.optim == "adamw_8bit":
        _check_8_bits(config, num_processes)
    if num_processes == 1 and config.deepspeed is None:
        return None
    hidden_size = int(read_config(find_model_folder(config.model_name_or_path)).get_text_config().hidden_size)
    settings = build_settings(config.deepspeed, decided(config, global_batch_size, num_processes), hidden_size)
    check_installed(settings)
    return settings


def _check_8_bits(config: TrainConfig, num_processes: int) -> None:
    if num_processes > 1 or config.deepspeed is not None:
        raise UserError(
            "optim: adamw_8bit works in a single process without DeepSpeed; under ZeRO the moments are divided among "
            "the processes already. Give optim: adamw."
        )
    if importlib.util.find_spec("torchao") is None:
        raise UserError("optim: adamw_8bit needs torchao: pip install 'llavaforge[8bit]'.")


def decided(config: TrainConfig, global_batch_size: int | None, num_processes: int) -> dict[str, Any]:
    """Return what the recipe decides of DeepSpeed's settings, by dotted key."""
    micro = config.per_device_train_batch_size
    accumulation = config.gradient_accumulation_steps
    if micro and global_batch_size:
        accumulation = math.ceil(global_batch_size / (micro * num_processes))
    return {
        "train_batch_size": global_batch_size or (micro or 0) * (accumulation or 1) * num_processes or None,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.max_grad_norm,
        "bf16.enabled": compute_dtype(config.bf16) == torch.bfloat16,
        "bf16.check_grad_overflow": True,
        "fp16.enabled": False,
        "data_types.grad_accum_dtype": "fp32",
        "optimizer.type": "AdamW",
        "optimizer.params.lr": learning_rate(config),
        "optimizer.params.betas": [config.adam_beta1, config.adam_beta2],
        "optimizer.params.eps": config.adam_epsilon,
        "optimizer.params.weight_decay": config.weight_decay,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": True,
    }


def check_installed(settings: Mapping[str, Any]) -> None:
    """Check that DeepSpeed is there and, for an offloaded optimizer, build its C++ part.

    Raises:
        UserError: it is not, or does not build.
    """
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise UserError("Several processes need DeepSpeed: pip install 'llavaforge[deepspeed]'.") from None
    if not offloads_optimizer(settings):
        return
    remedy = "Install it, or use a DeepSpeed file without offload_optimizer (such as zero2 or zero3)."
    compiler = os.environ.get("CXX", "c++")
    for tool, package in ((compiler, "a C++ compiler"), ("ninja", "pip install ninja")):
        if shutil.which(tool) is None:
            raise UserError(
                f"offload_optimizer compiles DeepSpeed's CPU Adam, and `{tool}` ({package}) is not there. {remedy}"
            )
    try:
        load_cpu_adam()
    except Exception as error:  # whatever a compiler may do
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"offload_optimizer: DeepSpeed's CPU Adam does not build: {lines[0]}\n{remedy}") from None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        shipped = ", ".join(shipped_deepspeed())
        raise UserError(f"{path}: no such file (deepspeed). Give a DeepSpeed JSON file or one of {shipped}.")
    try:
        settings = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a DeepSpeed JSON file ({error}).") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not a DeepSpeed JSON file (a {type(settings).__name__} instead of an object).")
    return settings


def _contradictions(settings: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    flat = dict(_flat(settings))
    for key, ours in known.items():
        theirs = flat.get(key, _AUTO)
        if theirs != _AUTO and not _same(theirs, ours):
            yield f'`{key}` is {theirs!r} there and {ours!r} in the recipe: change one of them, or put "auto"'


def _unknown(settings: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    for key, value in _flat({key: value for key, value in settings.items() if key not in _FREE}):
        if key in known:
            continue
        top = key.split(".")[0]
        if top in _INSTEAD:
            yield f"`{key}` would have no effect: {_INSTEAD[top]}; remove it"
        else:
            hint = nearest(key, [*known, *_FREE])
            yield f"`{key}` = {value!r} would have no effect: llavaforge does not know it.{hint} Remove it"
    for key in _FREE:
        if settings.get(key) == _AUTO:
            yield f'`{key}` cannot be "auto": nothing in a recipe decides it; give a value or remove it'


def _problems_of_zero(zero: Mapping[str, Any], bf16: bool) -> Iterator[str]:
    stage = zero.get("stage")
    if stage not in (1, 2, 3):
        yield f"`zero_optimization.stage` is {stage!r}: give 1, 2 or 3 (without DeepSpeed, start a single process)"
        return
    offload = zero.get("offload_optimizer") or {}
    other_optimizer = stage == 1 and bf16 and offload.get("device", "none") == "none"
    allowed = _STAGE_3 if stage == 3 else _STAGE_1_BF16 if other_optimizer else _STAGE_1_AND_2
    for key, value in zero.items():
        if key not in allowed:
            at = f"stage {stage}" + (" in bfloat16" if other_optimizer else "")
            known = f"known there: {', '.join(sorted(allowed))}"
            if not other_optimizer and key in _STAGE_3 | _STAGE_1_AND_2:
                known = "it works at " + ("stage 3 only" if key in _STAGE_3 else "stages 1 and 2 only")
            yield f"`zero_optimization.{key}` has no effect at {at} ({known}); remove it"
        elif key in ("offload_optimizer", "offload_param"):
            yield from _problems_of_offload(key, value)
        elif value != _AUTO and not _is_whole(value):
            yield f"`zero_optimization.{key}` is {value!r}: give a whole number, true or false"
        elif value == _AUTO and key not in _auto_sizes(1):
            yield f'`zero_optimization.{key}` cannot be "auto": give a value or remove it'


def _problems_of_offload(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, dict) or value.get("device", "none") not in ("cpu", "none"):
        yield f'`zero_optimization.{key}` is {value!r}: give {{"device": "cpu"}} or remove it'
        return
    for name in value.keys() - _OFFLOAD:
        yield f"`zero_optimization.{key}.{name}` would have no effect; known: {', '.join(sorted(_OFFLOAD))}; remove it"


def _auto_sizes(hidden_size: int) -> dict[str, int]:
    """Return transformers' values for `auto` (integrations/deepspeed.py)."""
    return {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def _is_whole(value: Any) -> bool:
    return isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer())


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) or isinstance(ours, str):
        return str(theirs).lower() == str(ours).lower()
    if isinstance(ours, list):
        return isinstance(theirs, list) and [float(value) for value in theirs] == ours
    if ours is None:
        return theirs is None
    return isinstance(theirs, bool | int | float) and float(theirs) == float(ours)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[last] = value
