"""liger-kernel's norms and SwiGLU (Hsu et al. 2024, arXiv:2410.10989), where a GPU's layers cannot be compiled.

Comes in: a stock Llava on a GPU. Goes out: the same model, in which each norm and each SwiGLU is one kernel. Modules of
this model alone change: liger's own functions replace transformers' classes for the whole process.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

# Norms that compute as Llama's does; Gemma's, for one, adds 1 to its weight.
_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"}


def has_liger(device: torch.device) -> bool:
    """Say whether liger's kernels can run: an NVIDIA or AMD GPU, and the package."""
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def use_liger(model: Any) -> int:
    """Let the language model's norms and SwiGLUs use liger's kernels, in place; return how many do."""
    changed = 0
    for module in model.model.language_model.modules():
        kind: Any = type(module)
        if kind.__name__ in _NORMS:
            module.__class__ = _with_forward(kind, _norm)
        elif _is_swiglu(module):
            module.__class__ = _with_forward(kind, _swiglu)
        else:
            continue
        changed += 1
    return changed


@cache
def _with_forward(kind: Any, forward: Any) -> Any:
    return type(f"Liger{kind.__name__}", (kind,), {"forward": forward})


def _is_swiglu(module: nn.Module) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj")
    return all(hasattr(module, name) for name in parts) and isinstance(
        getattr(module, "act_fn", None), nn.SiLU | SiLUActivation
    )


def _norm(self: Any, hidden_states: torch.Tensor) -> Any:
    from liger_kernel.ops import LigerRMSNormFunction  # type: ignore[import-not-found]

    return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)


def _swiglu(self: Any, x: torch.Tensor) -> Any:
    from liger_kernel.ops import LigerSiLUMulFunction

    return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))
