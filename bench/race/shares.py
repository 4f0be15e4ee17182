"""Where the work lies: the share of model FLOPs per part, for the replica and for the real pair.

From the same formula that the trainer's MFU uses (`llavaforge.model.flops`), on models that hold no numbers.
"""

import torch

from llavaforge.machine.random_model import ModelSize, random_model
from llavaforge.model.flops import FlopCounter


def forward_shares(size: ModelSize, num_text_tokens: int, num_supervised: int) -> dict[str, float]:
    """Return the share of each part in the forward pass of one sample with one image; they sum to 1."""
    model = random_model(size, torch.device("meta"), torch.bfloat16)
    counter = FlopCounter.of(model, size.num_image_tokens)
    length = size.num_image_tokens + num_text_tokens
    flops = {
        "vision tower": counter.embedding_per_image + counter.tower_per_image,
        "projector": sum(counter.projector_per_image),
        "language model, matrices": counter.body_per_token * length,
        "language model, attention": counter.attention_per_pair * length * (length + 1) / 2,
        "head, supervised tokens": counter.head_per_supervised * num_supervised,
    }
    total = sum(flops.values())
    return {part: number / total for part, number in flops.items()}
