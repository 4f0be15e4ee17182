"""Attention in which packed samples do not see each other.

Registered with transformers under `PACKED`; the stock language model then calls it in every layer. No mask is ever
built: transformers builds masks only for the names it knows, and the borders of the samples say all. With the
borders absent (plain `generate`) use `stock_attention`.

Legend: H heads, T tokens of the pack, D head size.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llavaforge.errors import UserError
from llavaforge.model.block_attention import MAX_LENGTH, block_attention

PACKED = "llavaforge_packed"

# Before torch 2.12 the kernel took fewer heads of keys and values without being told.
_NAMES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters

# Keywords that a forward hands down to everything below it and that change nothing of what attention computes.
_NOT_FOR_US = frozenset(
    ["position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"]
)


@dataclass(frozen=True)
class Borders:
    """Where the samples of a pack begin and end.

    An object of its own, so that a compiled layer does not depend on how many samples there are.

    Attributes:
        lengths: of the samples; they sum to T.
        cu_seqlens_N1: `int32` borders on the device.
        longest: the largest of `lengths`.
    """

    lengths: tuple[int, ...]
    cu_seqlens_N1: torch.Tensor
    longest: int


def packed_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1HTD: torch.Tensor,
    value_1HTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    borders: Borders,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample of a pack, by the signature that transformers calls.

    Keys and values have fewer heads than the queries for grouped-query attention. With a `sliding_window` a token sees
    itself and the `sliding_window - 1` tokens before it. `scaling` is by default 1/sqrt(D).

    Returns:
        (1, T, H, D), and None for the weights.

    Raises:
        UserError: the model asks for something that is not computed here, such as soft-capped scores.
    """
    assert attention_mask is None, "packed attention takes borders, not a mask"
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _NOT_FOR_US)
    if is_causal is False or unknown:
        raise UserError(
            f"{type(module).__name__}: asks its attention for `{(unknown or ['is_causal=False'])[0]}`, which packed "
            "training does not compute. Choose another language model."
        )
    if has_varlen(query_1HTD, dropout):
        return _varlen(query_1HTD, key_1HTD, value_1HTD, borders, scaling, sliding_window), None
    return _one_by_one(query_1HTD, key_1HTD, value_1HTD, borders, scaling, dropout, sliding_window), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _one_by_one(
    query_1HTD: torch.Tensor,
    key_1HTD: torch.Tensor,
    value_1HTD: torch.Tensor,
    borders: Borders,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention sample by sample, (1, T, H, D); never compiled, as it depends on how many samples there are."""
    samples = zip(*(x.split(borders.lengths, 2) for x in (query_1HTD, key_1HTD, value_1HTD)), strict=True)
    outputs = [_of_sample(q, k, v, scaling, dropout, sliding_window) for q, k, v in samples]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _of_sample(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention of one sample, without a variable-length kernel."""
    length = query.shape[2]
    mask = _window_mask(length, sliding_window, query.device)
    in_half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type == "cpu" and in_half and mask is None and not dropout and length <= MAX_LENGTH:
        return block_attention(query[0], key[0], value[0], scaling or query.shape[-1] ** -0.5).unsqueeze(0)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the (length, length) mask of a sliding window, or None when it hides nothing."""
    if sliding_window is None or sliding_window >= length:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < sliding_window)


def has_varlen(query: torch.Tensor, dropout: float) -> bool:
    """FlashAttention's kernel needs Ampere or later, half precision, heads of at most 256 in a multiple of 8."""
    return (
        (query.is_cuda or query.is_meta)  # shapes alone: what the kernel would keep
        and dropout == 0
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and _is_ampere(query.device)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_ampere(device: torch.device) -> bool:
    return device.type == "meta" or (torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0))


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    gqa: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _NAMES_GQA else {}
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        borders.cu_seqlens_N1,
        borders.cu_seqlens_N1,
        borders.longest,
        borders.longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **gqa,
    )
    assert isinstance(output, torch.Tensor)
    return output.unsqueeze(0)


def use_packed_attention(model: Any) -> None:
    """Let the language model of a stock Llava use `packed_attention`; the tower keeps SDPA."""
    AttentionInterface.register(PACKED, packed_attention)
    model.set_attn_implementation({"text_config": PACKED, "vision_config": "sdpa"})


@contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """Within the block the language model uses plain SDPA, as `generate` needs; afterwards what it used before."""
    config = model.model.language_model.config
    before = config._attn_implementation
    model.set_attn_implementation({"text_config": "sdpa"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})
