"""Model FLOPs of a step: what the mathematics needs, whatever the implementation does.

A matrix product of m x k by k x n is 2mkn. What learns costs three times its forward pass (forward, gradient of the
inputs, gradient of the weights); what is frozen but has something learning before it costs two; what is frozen with
nothing before it costs one. Recomputation does not count (PaLM's MFU, Chowdhery et al. 2022, appendix B). Frozen parts
counted at three times, as is common, would flatter the figure. Causal attention counts the half of the scores that
exist. The arithmetic is without torch; only reading a model needs it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llavaforge.model.feature_layers import num_layers_used


class Sampled(Protocol):
    """Samples whose sizes are known, such as a `SampleIndex`."""

    @property
    def lengths(self) -> npt.NDArray[Any]:
        """Tokens per sample, image tokens included."""

    @property
    def num_images(self) -> npt.NDArray[Any]:
        """Images per sample."""

    @property
    def num_supervised(self) -> npt.NDArray[Any]:
        """Supervised tokens per sample."""


@dataclass(frozen=True)
class Matrices:
    """Numbers of weights that take part in matrix products, and the widths of attention.

    Attributes:
        patch_embedding: of the tower.
        tower_layer: of one layer of the tower.
        projector: of its two layers.
        body: of the language model without its head and without a LoRA.
        lora: of the LoRA.
        head: of the language head.
        num_patches: of an image.
        tower_tokens: patches and class token of an image.
        tower_width: of the tower's attention.
        tower_layers: that the features need.
        attention_width: of the language model: heads times their size.
        num_layers: of the language model.
    """

    patch_embedding: int
    tower_layer: int
    projector: tuple[int, int]
    body: int
    lora: int
    head: int
    num_patches: int
    tower_tokens: int
    tower_width: int
    tower_layers: int
    attention_width: int
    num_layers: int

    @classmethod
    def of(cls, model: Any) -> "Matrices":
        """Count a stock Llava, which may lie on the meta device."""
        from llavaforge.model.lora import is_lora
        from llavaforge.model.tower import vision_backbone

        text, vision = model.config.get_text_config(), model.config.vision_config
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        body, projector, tower = model.model.language_model, model.model.multi_modal_projector, vision_backbone(model)
        lora = sum(p.numel() for n, p in body.named_parameters() if is_lora(n))
        return cls(
            patch_embedding=tower.embeddings.patch_embedding.weight.numel(),
            tower_layer=_in_linear_layers(tower.encoder.layers[0]),
            projector=(_in_linear_layers(projector.linear_1), _in_linear_layers(projector.linear_2)),
            body=_in_linear_layers(body) - lora,
            lora=lora,
            head=text.hidden_size * text.vocab_size,
            num_patches=(vision.image_size // vision.patch_size) ** 2,
            tower_tokens=tower.embeddings.position_embedding.weight.shape[0],
            tower_width=vision.hidden_size,
            tower_layers=num_layers_used(model.config),
            attention_width=text.num_attention_heads * head_size,
            num_layers=text.num_hidden_layers,
        )


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
        from llavaforge.model.trainable import part_of

        learning = frozenset(part_of(n) for n, p in model.named_parameters() if p.requires_grad)
        return cls.of_matrices(Matrices.of(model), num_image_tokens, learning)

    @classmethod
    def of_matrices(cls, matrices: Matrices, num_image_tokens: int, learning: frozenset[str]) -> "FlopCounter":
        """Return the counter of a model of these sizes."""
        tokens = matrices.tower_tokens
        per_layer = 2.0 * matrices.tower_layer * tokens + 4.0 * tokens**2 * matrices.tower_width
        first, second = (2.0 * weights * num_image_tokens for weights in matrices.projector)
        return cls(
            embedding_per_image=2.0 * matrices.patch_embedding * matrices.num_patches,
            tower_per_image=matrices.tower_layers * per_layer,
            projector_per_image=(first, second),
            body_per_token=2.0 * matrices.body,
            lora_per_token=2.0 * matrices.lora,
            head_per_supervised=2.0 * matrices.head,
            attention_per_pair=4.0 * matrices.num_layers * matrices.attention_width,
            num_layers=matrices.num_layers,
            learning=learning,
        )

    def without_tower(self) -> "FlopCounter":
        """Return the counter of steps to which kept features are brought."""
        return replace(self, embedding_per_image=0.0, tower_per_image=0.0)

    def step(self, lengths: Sequence[int], num_images: int, num_supervised: int) -> float:
        """Return the model FLOPs of a training step on samples of these lengths, images and supervised tokens."""
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        return float(sum(self._flops(sum(lengths), pairs, num_images, num_supervised, bool(num_images))))

    def by_part(self, lengths: Sequence[int], num_images: int, num_supervised: int) -> dict[str, float]:
        """Return the same for the vision tower, and for the language model with the projector."""
        from llavaforge.clock import LANGUAGE_MODEL, TOWER

        pairs = sum(length * (length + 1) / 2 for length in lengths)
        tower, others = self._flops(sum(lengths), pairs, num_images, num_supervised, bool(num_images))
        return {TOWER: tower, LANGUAGE_MODEL: others}

    def recomputed(self, lengths: Sequence[int] | npt.NDArray[Any], every: int) -> float:
        """Return the FLOPs of computing one of every so many layers of the language model again (not in `step`)."""
        of_samples = np.asarray(lengths, dtype=np.float64)
        pairs = float((of_samples * (of_samples + 1) / 2).sum())
        body = (self.body_per_token + self.lora_per_token) * float(of_samples.sum()) + self.attention_per_pair * pairs
        return body * math.ceil(self.num_layers / every) / self.num_layers if every else 0.0

    def of_index(self, index: Sampled) -> npt.NDArray[np.float64]:
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


def _in_linear_layers(module: Any) -> int:
    """Return the number of weights of all linear layers of a module, biases left out."""
    from torch import nn

    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
