"""The one normalisation of the loss: a sum over supervised tokens, divided by those of the whole global batch.

Legend: T tokens, S supervised tokens, D width, V vocabulary.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

# Supervised tokens per chunk of logits: 1024 x 151,936 floats are 0.6 GB, the most that is alive at a time.
CHUNK = 1024


def loss_sum(
    lm_head: nn.Module,
    hidden_TD: torch.Tensor,
    predictors_S: torch.Tensor,
    targets_S: torch.Tensor,
    most_supervised: int = 0,
) -> torch.Tensor:
    """Return the summed cross-entropy of the supervised tokens; logits exist for those alone.

    More than `CHUNK` of them are done in chunks whose logits are computed again in the backward pass. All ranks make
    the same number of chunks: under ZeRO-3 each one gathers the head's weights from all of them.

    Args:
        lm_head: the language head, (.., D) -> (.., V).
        hidden_TD: last hidden states.
        predictors_S: positions in T that predict a supervised token.
        targets_S: the tokens to predict.
        most_supervised: supervised tokens of the rank that has most of them now.

    Returns:
        A float32 scalar.
    """
    chosen = hidden_TD.index_select(0, predictors_S)
    num_chunks = math.ceil(max(len(targets_S), most_supervised) / CHUNK)
    if num_chunks <= 1:
        return _chunk_loss(lm_head, chosen, targets_S)
    chunks = [
        checkpoint(_chunk_loss, lm_head, hidden, targets, use_reentrant=False)
        for hidden, targets in zip(chosen.tensor_split(num_chunks), targets_S.tensor_split(num_chunks), strict=True)
    ]
    return torch.stack(chunks).sum()


def _chunk_loss(lm_head: nn.Module, hidden_SD: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
    return cross_entropy(lm_head(hidden_SD).float(), targets_S, reduction="sum")
