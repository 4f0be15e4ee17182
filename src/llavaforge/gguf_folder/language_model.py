"""The language model of a LLaVA as `model.gguf`.

Comes in: a model folder. Goes out: fields and a plan of tensors under llama.cpp's names:

    model.language_model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llavaforge.errors import UserError
from llavaforge.gguf_folder.files import GgufTensor, ModelTensors


@dataclass(frozen=True)
class LanguageFamily:
    """One family of language models.

    Attributes:
        architecture: its name in GGUF.
        interleaves: llama.cpp turns neighbours by RoPE, where transformers turns the two halves of a head.
    """

    architecture: str
    interleaves: bool


LANGUAGE_FAMILIES: dict[str, LanguageFamily] = {
    "llama": LanguageFamily("llama", interleaves=True),
    "mistral": LanguageFamily("llama", interleaves=True),
    "qwen2": LanguageFamily("qwen2", interleaves=False),
    "qwen3": LanguageFamily("qwen3", interleaves=False),
}
"""By the `model_type` of the text config."""

_OUTER = {
    "model.language_model.embed_tokens": "token_embd",
    "model.language_model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = re.compile(r"^model\.language_model\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def check_text_config(config: Any) -> None:
    """Check, before anything is written, that llama.cpp can compute a language model.

    Args:
        config: a LLaVA's `text_config`.

    Raises:
        UserError: it cannot, or we do not write it.
    """
    if config.model_type not in LANGUAGE_FAMILIES:
        raise UserError(
            f"--format gguf: the language model is a `{config.model_type}`; {', '.join(LANGUAGE_FAMILIES)} are written."
        )
    if config.hidden_act != "silu":
        raise UserError(f"--format gguf: the language model's hidden_act is {config.hidden_act!r}; llama.cpp has silu.")
    kinds = getattr(config, "layer_types", None)  # Mistral's config has none: all of its layers slide, or no one
    if "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None):
        raise UserError("--format gguf: the language model has sliding windows, which llama.cpp lacks for its family.")
    rope = _rope(config)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("--format gguf: RoPE turns a part of each head (partial_rotary_factor), which is not written.")
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"--format gguf: rope_type is {kind!r}; default, linear and llama3 are written.")


def add_language_fields(writer: GGUFWriter, config: Any) -> None:
    """Add the fields that say how the language model computes; the tokenizer's are others."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_rope_dimension_count(_head_width(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def plan_language_model(config: Any, model: ModelTensors, dtype: torch.dtype) -> list[GgufTensor]:
    """Return the tensors of `model.gguf`.

    Args:
        config: a LLaVA's `text_config`.
        model: the folder's tensors.
        dtype: of the matrices.

    Raises:
        UserError: a tensor has no place in llama.cpp's model.
    """
    return list(_plan(config, model, dtype))


def _plan(config: Any, model: ModelTensors, dtype: torch.dtype) -> Iterator[GgufTensor]:
    if (factors := _rope_factors(config)) is not None:
        yield GgufTensor("rope_freqs.weight", factors, tuple(factors.shape), torch.float32)
    for module in model:
        if not module.startswith(("model.language_model.", "lm_head.")):
            continue
        if module == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is no output.weight
        shape, name = model.shape(module), _name(module)
        change = {}
        if LANGUAGE_FAMILIES[config.model_type].interleaves and ".self_attn.q_proj." in module:
            change = {"change": partial(interleaved, num_heads=config.num_attention_heads)}
        elif LANGUAGE_FAMILIES[config.model_type].interleaves and ".self_attn.k_proj." in module:
            change = {"change": partial(interleaved, num_heads=config.num_key_value_heads)}
        yield GgufTensor(name, module, shape, dtype if len(shape) > 1 else torch.float32, **change)


def interleaved(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection: those that RoPE turns together become neighbours.

    Args:
        tensor: (heads x width, ...), each head with its first and its second half.
        num_heads: of these rows.

    Returns:
        The same shape; row i of a head's first half stands at 2i, its partner at 2i + 1.
    """
    halves = tensor.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _name(module: str) -> str:
    outer, _, kind = module.rpartition(".")
    if outer in _OUTER and kind == "weight":
        return f"{_OUTER[outer]}.weight"
    match = _LAYER.match(module)
    if match is None or match[2] not in _IN_LAYER:
        raise UserError(f"--format gguf: the language model's tensor `{module}` has no place in llama.cpp's model.")
    return f"blk.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"


def _rope(config: Any) -> dict[str, Any]:
    return dict(config.rope_parameters)


def _rope_factors(config: Any) -> torch.Tensor | None:
    """Return by how much each frequency of a llama3 RoPE is slowed, None for other RoPEs."""
    if _rope(config).get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = _head_width(config)
    plain = _rope(config)["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain / scaled


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
