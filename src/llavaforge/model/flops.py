"""Model FLOPs of a step: what the mathematics needs, whatever the implementation does.

A matrix product of m x k by k x n is 2mkn. What learns costs three times its forward pass (forward, gradient of the
inputs, gradient of the weights); what is frozen but has something learning before it costs two; what is frozen with
nothing before it costs one. Recomputation does not count (PaLM's MFU, Chowdhery et al. 2022, appendix B). Frozen parts
counted at three times, as is common, would flatter the figure. Causal attention counts the half of the scores that
exist.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from llavaforge.clock import LANGUAGE_MODEL, TOWER
from llavaforge.data.index.index import SampleIndex
from llavaforge.model.lora import is_lora
from llavaforge.model.tower import num_layers_used, vision_backbone
from llavaforge.model.trainable import part_of


@dataclass(frozen=True)
class FlopCounter:
    """Counts the model FLOPs of packs for one model and one choice of what learns.

    Attributes:
        embedding_per_image: forward FLOPs of the tower's patch embedding.
        tower_per_image: forward FLOPs of the tower's used layers.
        projector_per_image: forward FLOPs of the projector's first and second layer.
        body_per_token: forward FLOPs of the language model's matrices.
        lora_per_token: forward FLOPs of the LoRA matrices.
        head_per_supervised: forward FLOPs of the language head.
        attention_per_pair: forward FLOPs per (query, key) pair over all layers of the language model.
        num_layers: of the language model.
        learning: the parts that learn.
    """

    embedding_per_image: float
    tower_per_image: float
    projector_per_image: tuple[float, float]
    body_per_token: float
    lora_per_token: float
    head_per_supervised: float
    attention_per_pair: float
    num_layers: int
    learning: frozenset[str]

    @classmethod
    def of(cls, model: Any, num_image_tokens: int) -> "FlopCounter":
        """Read the sizes from a model whose parameters are already frozen or free."""
        text = model.config.get_text_config()
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        body, projector = model.model.language_model, model.model.multi_modal_projector
        lora = 2.0 * sum(p.numel() for n, p in body.named_parameters() if is_lora(n))
        vision, tower = model.config.vision_config, vision_backbone(model)
        num_patches = (vision.image_size // vision.patch_size) ** 2
        tokens = tower.embeddings.position_embedding.weight.shape[0]
        per_layer = _matrices(tower.encoder.layers[0]) * tokens + 4.0 * tokens**2 * vision.hidden_size
        return cls(
            embedding_per_image=2.0 * float(tower.embeddings.patch_embedding.weight.numel()) * num_patches,
            tower_per_image=num_layers_used(model.config) * per_layer,
            projector_per_image=(
                num_image_tokens * _matrices(projector.linear_1),
                num_image_tokens * _matrices(projector.linear_2),
            ),
            body_per_token=_matrices(body) - lora,
            lora_per_token=lora,
            head_per_supervised=2.0 * text.hidden_size * text.vocab_size,
            attention_per_pair=4.0 * text.num_hidden_layers * text.num_attention_heads * head_size,
            num_layers=text.num_hidden_layers,
            learning=frozenset(part_of(n) for n, p in model.named_parameters() if p.requires_grad),
        )

    def without_tower(self) -> "FlopCounter":
        """Return the counter of steps to which kept features are brought."""
        return replace(self, embedding_per_image=0.0, tower_per_image=0.0)

    def step(self, lengths: Sequence[int], num_images: int, num_supervised: int) -> float:
        """Return the model FLOPs of a training step on samples of these lengths, images and supervised tokens."""
        return sum(self.by_part(lengths, num_images, num_supervised).values())

    def by_part(self, lengths: Sequence[int], num_images: int, num_supervised: int) -> dict[str, float]:
        """Return the same for the vision tower, and for the language model with the projector."""
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        tower, others = self._flops(sum(lengths), pairs, num_images, num_supervised, bool(num_images))
        return {TOWER: tower, LANGUAGE_MODEL: others}

    def recomputed(self, lengths: Sequence[int], every: int) -> float:
        """Return the FLOPs of computing one of every so many layers of the language model again (not in `step`)."""
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        body = (self.body_per_token + self.lora_per_token) * sum(lengths) + self.attention_per_pair * pairs
        return body * math.ceil(self.num_layers / every) / self.num_layers if every else 0.0

    def of_index(self, index: SampleIndex) -> npt.NDArray[np.float64]:
        """Return the model FLOPs of each sample of an index on its own, in training."""
        lengths, num_images, num_supervised = index.lengths, index.num_images, index.num_supervised
        pairs = lengths * (lengths + 1) / 2
        tower, others = self._flops(lengths, pairs, num_images, num_supervised, num_images > 0)
        return np.asarray(tower + others, dtype=np.float64)

    def _flops(self, tokens: Any, pairs: Any, images: Any, supervised: Any, has_images: Any) -> tuple[Any, Any]:
        """Return what the tower needs, and what all else needs."""
        learns = self.learning
        # The projector learns in every train type, so gradients pass through the whole language model to the images.
        # Without images a frozen language model without LoRA hands nothing back.
        passes = has_images | (not learns.isdisjoint(("language_model", "lora")))
        body_factor = 3 if "language_model" in learns else 1 + passes
        tower_factor = 3 if "vision_tower" in learns else 1
        embedding_factor = 2 if "vision_tower" in learns else 1  # pixels need no gradient
        first_factor = 3 if "vision_tower" in learns else 2  # behind a frozen tower it needs no input gradient
        tower = (embedding_factor * self.embedding_per_image + tower_factor * self.tower_per_image) * images
        others = (
            (first_factor * self.projector_per_image[0] + 3 * self.projector_per_image[1]) * images
            + (body_factor * self.body_per_token + 3 * self.lora_per_token) * tokens
            + (1 + 2 * passes) * self.attention_per_pair * pairs
            + body_factor * self.head_per_supervised * supervised
        )
        return tower, others


def _matrices(module: nn.Module) -> float:
    """Return the forward FLOPs per row of input of all linear layers of a module."""
    return 2.0 * sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
