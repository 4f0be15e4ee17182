"""What a pack takes at the worst moment of its step, from what the model keeps per token and per image.

Arithmetic, without torch: what is kept per token is counted by `model/memory.py`, or reckoned by `forecast/kept.py`.
"""

import math
from dataclasses import dataclass

CHUNK = 1024
"""Supervised tokens per chunk of logits: 1024 x 151,936 floats are 0.6 GB, the most that is alive at a time."""
_COMPILED = 0.8  # at most: 0.72 for `projector`, 0.78 for `use_lora` (H200; LOG.md)


@dataclass(frozen=True)
class Activations:
    """What the forward pass keeps for the backward pass, in bytes.

    Attributes:
        layer_per_token: of a layer of the language model.
        input_per_token: of a layer that is computed again: its input.
        others_per_token: of what lies around the layers.
        per_image: of tower and projector.
        num_layers: of the language model.
        logits_per_supervised: logits in the compute type and in float32, and the gradients of both.
        compiled_share: a compiled layer keeps so much of what it would keep.
    """

    layer_per_token: float
    input_per_token: float
    others_per_token: float
    per_image: float
    num_layers: int
    logits_per_supervised: float
    compiled_share: float = _COMPILED

    def bytes(
        self,
        num_tokens: int,
        num_images: int,
        num_supervised: int,
        recompute_every: int = 0,
        compiled: bool = False,
    ) -> float:
        """Return what a pack takes at the worst moment of its step, logits included."""
        layer = self.layer_per_token * (self.compiled_share if compiled else 1.0)
        again = math.ceil(self.num_layers / recompute_every) if recompute_every else 0
        # The layer that is at work: its gradients come to about as much as it keeps; or what it has just computed again
        # and half as much of gradients (tests/forecast/test_peak.py).
        at_work = 1.0 if again < self.num_layers else 1.5
        per_token = (self.num_layers - again + at_work) * layer + again * self.input_per_token + self.others_per_token
        return num_tokens * per_token + num_images * self.per_image + self.logits(num_supervised)

    def logits(self, num_supervised: int) -> float:
        """Return what of it are logits and their gradients."""
        return self.logits_per_supervised * min(num_supervised, CHUNK)


def logits_bytes(vocab_size: int, itemsize: int) -> float:
    """Return what a supervised token's logits take: in the compute type and in float32, and the gradients of both."""
    return float(vocab_size * (2 * itemsize + 8))
