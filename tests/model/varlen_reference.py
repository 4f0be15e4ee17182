"""The variable-length attention op of CUDA on a CPU: its definition in float32, and what its kernel asks of its inputs.

`register()` gives torch's own op a CPU kernel, so that the branch for CUDA runs in tests, forward and backward.
"""

from collections.abc import Iterator

import torch
from torch.nn.attention import varlen

from llavaforge.model import attention


def register() -> None:
    varlen._varlen_attn.register_kernel("cpu", _forward)
    varlen._varlen_attn_backward.register_kernel("cpu", _backward)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: torch.Tensor, longest: int) -> None:
    """FlashAttention's preconditions (torch/aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp)."""
    assert query.dtype == key.dtype == value.dtype and query.dtype in (torch.float16, torch.bfloat16)
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    num_tokens, num_heads, head_size = query.shape
    assert head_size % 8 == 0 and head_size <= 256
    assert key.shape == value.shape == (num_tokens, key.shape[1], head_size) and num_heads % key.shape[1] == 0
    assert borders.dtype == torch.int32 and borders.is_contiguous() and borders.device == query.device
    lengths = borders.diff().tolist()
    assert borders[0] == 0 and borders[-1] == num_tokens and min(lengths) > 0
    assert type(longest) is int and longest == max(lengths)


def _samples(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: torch.Tensor, scale: float | None, left: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield for each sample its place; in float32 scaled queries, keys and values, (H, L, D); weights, (H, L, L)."""
    repeats = query.shape[1] // key.shape[1]
    for start, end in zip(borders.tolist(), borders.tolist()[1:], strict=False):
        place = slice(start, end)
        q = query[place].float().transpose(0, 1) * (scale or query.shape[-1] ** -0.5)
        k, v = (x[place].float().repeat_interleave(repeats, 1).transpose(0, 1) for x in (key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
        hidden = (distance < 0) | ((distance > left) if left >= 0 else (distance < 0))
        yield place, q, k, v, (q @ k.transpose(1, 2)).masked_fill(hidden, -torch.inf).softmax(-1)


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: torch.Tensor, borders_k: torch.Tensor,
    longest: int, longest_k: int, is_causal: bool = False, scale: float | None = None,
    window_size: list[int] | None = None, enable_gqa: bool = False, seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None, num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    _check(query, key, value, borders, longest)
    assert borders is borders_k and longest == longest_k and seqused_k is block_table is num_splits is None
    assert window_size is not None and window_size[1] == 0 and is_causal == (window_size == [-1, 0])
    assert not attention._NAMES_GQA or enable_gqa == (query.shape[1] != key.shape[1])
    output = torch.empty_like(query)
    for place, _, _, v, weights in _samples(query, key, value, borders, scale, window_size[0]):
        output[place] = (weights @ v).transpose(0, 1)
    return output, torch.zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
    lse: torch.Tensor, borders: torch.Tensor, borders_k: torch.Tensor, longest: int, longest_k: int, is_causal: bool,
    rng_state: torch.Tensor, scale: float | None = None, window_size: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    _check(query, key, value, borders, longest)
    assert window_size is not None and grad.stride(-1) == 1
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
    for place, q, k, v, weights in _samples(query, key, value, borders, scale, window_size[0]):
        grad_output = grad[place].float().transpose(0, 1)
        grad_weights = grad_output @ v.transpose(1, 2)
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
        grads[0][place] = (grad_scores @ k).transpose(0, 1) * (scale or query.shape[-1] ** -0.5)
        for number, per_head in ((1, grad_scores.transpose(1, 2) @ q), (2, weights.transpose(1, 2) @ grad_output)):
            grads[number][place] = per_head.transpose(0, 1).unflatten(1, (key.shape[1], -1)).sum(2)
    of_query, of_key, of_value = (torch.empty_like(x).copy_(g) for x, g in zip((query, key, value), grads, strict=True))
    return of_query, of_key, of_value
