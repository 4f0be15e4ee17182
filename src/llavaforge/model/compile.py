"""torch.compile of a model's layers, one by one: a layer's small operations run as a few fused ones.

Comes in: a stock Llava, the user's wish and the work ahead. Goes out: the same model, with compiled layers or without.
All layers of a kind share one graph, whatever the pack: lengths are symbols in it, and how many samples there are is
hidden in `attention.Borders`.
"""

import hashlib
import importlib.util
import logging
import math
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from llavaforge.errors import UserError
from llavaforge.model.feature_layers import num_layers_used
from llavaforge.model.tower import vision_backbone

logger = logging.getLogger(__name__)

# Below so many FLOPs a run is over before the first step's compilation has paid: 26 s on two CPU cores, where a step
# then takes 0.78 of its time (LOG.md); about a minute on a GPU that does 4e14 FLOP/s.
_LEAST_FLOPS = {"cpu": 2e14, "cuda": 1e17}


def compiles(
    option: bool | Literal["auto"],
    device: torch.device,
    num_flops: float,
    *,
    has_whole_weights: bool = True,
    gradient_checkpointing: bool = False,
) -> bool:
    """Say whether a run's layers are compiled: the same for all processes and all starts of a run.

    Args:
        option: the user's; `auto` compiles where it pays.
        device: of the run.
        num_flops: of the whole run.
        has_whole_weights: of the engine, when a layer runs.
        gradient_checkpointing: whether layers are computed twice.

    Raises:
        UserError: it was asked for and cannot be.
    """
    if option is False or (option == "auto" and num_flops < _LEAST_FLOPS.get(device.type, math.inf)):
        return False
    if not has_whole_weights:
        lacks = "ZeRO-3, which gathers weights within a layer (zero2 does not)"
    elif gradient_checkpointing and device.type == "cpu":  # its attention is not compiled: a break within the layer
        lacks = "gradient_checkpointing on a CPU"
    else:
        lacks = missing_for_compile(device)
    if lacks and option is True:
        raise UserError(f"compile: true does not go with {lacks}. Change that, or give compile: auto.")
    if lacks:
        logger.info("layers are not compiled, which does not go with %s", lacks)
    return not lacks


def compile_layers(model: Any, must: bool = True, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let the layers of the language model and of the tower be compiled when they run first, in place.

    Args:
        model: a stock Llava.
        must: a layer that does not compile is an error; else it runs as it is, with a warning of torch's.
        backend: torch.compile's.
    """
    torch._dynamo.reset()  # graphs of an earlier stage's model: they count towards the bound, and hold its weights
    torch._dynamo.config.suppress_errors = not must
    if next(model.parameters()).device.type == "cpu":
        _separate_cache()
    tower = vision_backbone(model)
    for layer in (*model.model.language_model.layers, *tower.encoder.layers[: num_layers_used(model.config)]):
        layer.compile(dynamic=True, backend=backend)


def _separate_cache() -> None:
    """Keep this kind of processor's compiled code in a folder of its own within torch's cache.

    torch does not tell them apart: code for vectors of 16 numbers, in a cache that machines share (or in an image)
    and built where they hold 8, computes half of them. Seen with torch 2.13: losses of NaN.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    kind = hashlib.sha256(f"{capability} {_cpu_flags()}".encode()).hexdigest()[:12]
    folder = Path(cache_dir())
    if folder.name != f"cpu-{kind}":
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"cpu-{kind}")


def _cpu_flags() -> str:
    """Return what the processor can do, in the system's words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def is_compiled(model: Any) -> bool:
    """Say whether the layers are compiled, or will be."""
    return model.model.language_model.layers[0]._compiled_call_impl is not None


def missing_for_compile(device: torch.device) -> str:
    """Return what a compiled layer needs and is not there; empty when all is."""
    if device.type == "cpu" and torch.__version__ < "2.12":  # it compiles the layers anew for nearly every pack
        return "torch before 2.12 on a CPU"
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(name and shutil.which(name) for name in compilers):
        return "a machine without a C++ compiler: install one (Debian: g++), or name it in CXX"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "a Python without triton: pip install triton"
    return ""
