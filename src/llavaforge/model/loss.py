"""The one normalisation of the loss: a sum over supervised tokens, divided by those of the whole global batch.

Legend: T tokens, S supervised tokens, D width, V vocabulary.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from llavaforge.model.activations import CHUNK


class LossHead(nn.Module):
    """A language head and the summed cross-entropy of its logits, which exist for supervised tokens alone.

    More than `CHUNK` of them are done in chunks whose logits are computed again in the backward pass. The chunks are no
    modules: ZeRO-3 gathers a module's weights from all ranks whenever it is called, and fetches them ahead only while
    every pass makes the same calls.

    Args:
        lm_head: the language head, (.., D) -> (.., V); its weights stay its own.
    """

    def __init__(self, lm_head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = lm_head.weight, lm_head.bias

    def forward(self, hidden_TD: torch.Tensor, predictors_S: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
        """Return the summed loss, a float32 scalar.

        Args:
            hidden_TD: last hidden states.
            predictors_S: positions in T that predict a supervised token.
            targets_S: the tokens to predict.
        """
        chosen = hidden_TD.index_select(0, predictors_S)
        num_chunks = math.ceil(len(targets_S) / CHUNK)
        if num_chunks <= 1:
            return self._chunk_loss(chosen, targets_S)
        chunks = [
            checkpoint(self._chunk_loss, hidden, targets, use_reentrant=False)
            for hidden, targets in zip(chosen.tensor_split(num_chunks), targets_S.tensor_split(num_chunks), strict=True)
        ]
        return torch.stack(chunks).sum()

    def _chunk_loss(self, hidden_SD: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
        return cross_entropy(linear(hidden_SD, self.weight, self.bias).float(), targets_S, reduction="sum")
