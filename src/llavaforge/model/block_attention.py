"""Causal attention of one sample on a CPU: blocks of queries against the keys before them, as plain matrix products.

In: queries, keys and values of a sample. Out: what each token attends to. PyTorch's own CPU kernel works in tiles so
small that in bfloat16 it took nearly half of a training step (LOG.md); here a block is a few large products, and no
score after a block's last query is computed. In float32 PyTorch's is as fast, and for short samples twice so.

The weights are kept for the backward pass: half of heads x length^2 numbers per layer. `MAX_LENGTH` bounds that; a
longer sample is left to PyTorch. In bfloat16 scores are rounded before the softmax, as in transformers' `eager`.

Legend: H heads, K heads of keys and values, L tokens of the sample, D head size; of a block: Q queries (of all heads
that share a key head, one head after the other), N keys.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

MAX_LENGTH = 1024
BLOCK = 192
"""Queries per block: fewer waste less above the diagonal, more make better matrix products."""


class BlockAttention(torch.autograd.Function):
    """Causal attention of one sample; use `block_attention`."""

    @staticmethod
    def forward(
        ctx: Any, query_HLD: torch.Tensor, key_KLD: torch.Tensor, value_KLD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Return what each token attends to, (H, L, D)."""
        num_heads, length, size = query_HLD.shape
        num_key_heads = key_KLD.shape[0]
        output_HLD = torch.empty_like(query_HLD)
        scaled_HLD = query_HLD * scaling
        weights = []
        for start, end in _blocks(length):
            query_KQD = scaled_HLD[:, start:end].reshape(num_key_heads, -1, size)
            scores_KQN = query_KQD @ key_KLD[:, :end].transpose(1, 2)
            _hide_later(scores_KQN, start, end)
            weight_KQN = scores_KQN.softmax(-1)
            output_HLD[:, start:end] = (weight_KQN @ value_KLD[:, :end]).view(num_heads, -1, size)
            weights.append(weight_KQN)
        ctx.save_for_backward(scaled_HLD, key_KLD, value_KLD, *weights)
        ctx.scaling = scaling
        return output_HLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_HLD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        scaled_HLD, key_KLD, value_KLD, *weights = ctx.saved_tensors
        num_heads, length, size = scaled_HLD.shape
        num_key_heads = key_KLD.shape[0]
        grad_query_HLD = torch.empty_like(scaled_HLD)
        # Sums over blocks, so in float32.
        grad_key_KLD, grad_value_KLD = torch.zeros(2, num_key_heads, length, size)
        for (start, end), weight_KQN in zip(_blocks(length), weights, strict=True):
            query_KQD = scaled_HLD[:, start:end].reshape(num_key_heads, -1, size)
            grad_KQD = grad_HLD[:, start:end].reshape(num_key_heads, -1, size)
            grad_value_KLD[:, :end] += weight_KQN.transpose(1, 2) @ grad_KQD
            grad_weight_KQN = grad_KQD @ value_KLD[:, :end].transpose(1, 2)
            grad_scores_KQN = torch.ops.aten._softmax_backward_data(grad_weight_KQN, weight_KQN, -1, weight_KQN.dtype)
            grad_query_HLD[:, start:end] = (grad_scores_KQN @ key_KLD[:, :end]).view(num_heads, -1, size)
            grad_key_KLD[:, :end] += grad_scores_KQN.transpose(1, 2) @ query_KQD
        dtype = key_KLD.dtype
        return grad_query_HLD.mul_(ctx.scaling), grad_key_KLD.to(dtype), grad_value_KLD.to(dtype), None


def block_attention(
    query_HLD: torch.Tensor, key_KLD: torch.Tensor, value_KLD: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attend to all tokens of a sample that are not later, (H, L, D).

    H is a multiple of K; heads that share a key head are neighbours. `scaling` is a factor of the scores.
    """
    # Heads lie side by side in what comes in; copied once here, they are not copied for every block (12 % in bfloat16).
    inputs = (query_HLD.contiguous(), key_KLD.contiguous(), value_KLD.contiguous())
    output: torch.Tensor = BlockAttention.apply(*inputs, scaling)
    return output


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def _hide_later(scores_KQN: torch.Tensor, start: int, end: int) -> None:
    """Hide later tokens from the queries `start` to `end`; all of them lie in the last columns."""
    later = torch.full((end - start, end - start), -torch.inf, dtype=scores_KQN.dtype).triu_(1)
    scores_KQN.unflatten(1, (-1, end - start))[..., start:] += later
