"""LoRA on the language model alone (Hu et al. 2021, arXiv:2106.09685), with peft's layers.

Comes in: a stock Llava. Goes out: the same model with LoRA layers inside, and tensors under the names that
`peft.PeftModel.from_pretrained` expects.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer

from llavaforge.errors import UserError

_ADAPTER = "default"
# Lets `peft.AutoPeftModel` find the class; none of peft's task types means an image-text model.
_AUTO_MAPPING = {
    "base_model_class": "LlavaForConditionalGeneration",
    "parent_library": "transformers.models.llava.modeling_llava",
}


class LoraLinear(Linear):
    """peft's layer with fewer passes over its output.

    The scale goes onto the r numbers of the inner product, and its outer product is added by the matrix product itself.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return `base(x) + scaling * B(A(dropout(x)))`."""
        a, b = self.lora_A[_ADAPTER], self.lora_B[_ADAPTER]
        if args or kwargs or self.disable_adapters or self.merged or x.dtype != a.weight.dtype:
            output: torch.Tensor = super().forward(x, *args, **kwargs)
            return output
        rows = x.flatten(0, -2)
        result = self.base_layer(rows)
        inner = a(self.lora_dropout[_ADAPTER](rows)) * self.scaling[_ADAPTER]
        # A compiled sum is fused with what follows; ZeRO-3 gathers a module's weights only when the module is called.
        if torch.compiler.is_compiling() or hasattr(b.weight, "ds_id"):
            result = result + b(inner)
        else:
            result = result.addmm_(inner, b.weight.t())
        return result.unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class LoraOptions:
    """Rank, scale, dropout and the names of the layers that get a LoRA."""

    r: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """The factor of the update: alpha / r."""
        return self.alpha / self.r


def target_pattern(target_modules: Iterable[str]) -> str:
    """Return a pattern over full module paths.

    Bare names such as `q_proj` would match CLIP's layers too (haotian-liu/LLaVA issue 1380).
    """
    return r"model\.language_model\..*\.(" + "|".join(re.escape(name) for name in target_modules) + ")"


def peft_config(options: LoraOptions, base_model: str | None = None) -> LoraConfig:
    """Return the peft config of an adapter that also carries the whole projector."""
    return LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=target_pattern(options.target_modules),
        modules_to_save=["multi_modal_projector"] if base_model else None,
        base_model_name_or_path=base_model,
        inference_mode=bool(base_model),
        auto_mapping=_AUTO_MAPPING if base_model else None,
    )


def add_lora(model: Any, options: LoraOptions, seed: int) -> None:
    """Put LoRA layers into the language model, in place.

    A is drawn from U(-1/sqrt(in), 1/sqrt(in)) (peft's Kaiming start) in float32 from `seed`, B is zero, so the model
    computes what it did before.

    Raises:
        UserError: no layer of the language model has one of the names.
    """
    pattern = re.compile(target_pattern(options.target_modules))
    if not any(pattern.fullmatch(name) for name, _ in model.named_modules()):
        linear = {
            n.rsplit(".", 1)[-1]
            for n, m in model.model.language_model.named_modules()
            if isinstance(m, torch.nn.Linear)
        }
        raise UserError(
            f"lora_target_modules {list(options.target_modules)} match nothing in the language model. "
            f"It has: {', '.join(sorted(linear))}."
        )
    inject_adapter_in_model(peft_config(options), model, adapter_name=_ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        a, b = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
        bound = 1 / math.sqrt(a.in_features)
        fresh = torch.empty(a.weight.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        a.weight.data = fresh.to(a.weight.device)
        b.weight.data = torch.zeros(b.weight.shape, dtype=torch.float32, device=b.weight.device)
        if type(layer) is Linear:
            layer.__class__ = LoraLinear


def is_lora(name: str) -> bool:
    """Say whether a parameter belongs to a LoRA."""
    return ".lora_A." in name or ".lora_B." in name


def adapter_tensors(trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename trained tensors (LoRA and projector, by module name) to the names of a saved peft adapter."""
    return {
        "base_model.model." + name.replace(f".{_ADAPTER}.", "."): tensor.contiguous()
        for name, tensor in trained.items()
    }


def trained_tensors(adapter: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `adapter_tensors`."""
    renamed = {}
    for key, tensor in adapter.items():
        name = key.removeprefix("base_model.model.")
        renamed[re.sub(r"\.(lora_[AB])\.", rf".\1.{_ADAPTER}.", name)] = tensor
    return renamed


def merged_weight(
    weight: torch.Tensor, trained: Mapping[str, torch.Tensor], module: str, scaling: float
) -> torch.Tensor:
    """Return `weight + scaling * B @ A` for one layer, computed in float32 and cast back.

    Args:
        weight: (out, in), of the base model.
        trained: trained tensors by module name.
        module: path of the layer, e.g. `model.language_model.layers.0.self_attn.q_proj`.
        scaling: alpha / r.
    """
    a = trained[f"{module}.lora_A.{_ADAPTER}.weight"].float()
    b = trained[f"{module}.lora_B.{_ADAPTER}.weight"].float()
    return (weight.float() + scaling * (b @ a)).to(weight.dtype)


def lora_modules(trained: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the module paths that have a LoRA among the trained tensors."""
    return sorted(name.split(".lora_A.")[0] for name in trained if ".lora_A." in name)
