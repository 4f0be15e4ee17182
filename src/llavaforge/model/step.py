"""The one module an engine runs: a pack in, the summed loss out. Nothing of the model runs outside it.

Legend: T tokens of the pack, I images, P image tokens, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llavaforge.data.images import Preprocessing
from llavaforge.data.pack import Pack
from llavaforge.model.attention import use_packed_attention
from llavaforge.model.loss import loss_sum
from llavaforge.model.tower import normalize, tower_features


class StepModule(nn.Module):
    """A stock Llava with the packed forward pass around it.

    Args:
        model: a stock `LlavaForConditionalGeneration`; its weights stay its own.
        preprocessing: the image processor's settings, for the normalisation.
        gradient_checkpointing: recompute the language model's layers in the backward pass. Never the tower's:
        switching it
            on for the whole model would back-propagate through a frozen tower.
    """

    def __init__(self, model: Any, preprocessing: Preprocessing, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        use_packed_attention(model)
        if gradient_checkpointing:
            model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})

    def forward(self, pack: Pack) -> torch.Tensor:
        """Return the sum of the supervised tokens' cross-entropies, a float32 scalar."""
        hidden_TD = self.hidden(pack)
        total = loss_sum(self.model.lm_head, hidden_TD, pack.predictors_S, pack.targets_S)
        if not pack.num_images:
            total = total + self._untouched_vision()
        return total

    def token_losses(self, pack: Pack) -> torch.Tensor:
        """Return the cross-entropy of each supervised token, (S,) float32 (for evaluation, without gradients)."""
        chosen = self.hidden(pack)[pack.predictors_S]
        return cross_entropy(self.model.lm_head(chosen).float(), pack.targets_S, reduction="none")

    def hidden(self, pack: Pack) -> torch.Tensor:
        """Return the language model's last hidden states, (T, D)."""
        images = self._image_features(pack.pixels_ICHW) if pack.num_images else None
        outputs = self.model.model(
            input_ids=pack.ids_T.unsqueeze(0),
            position_ids=pack.position_ids_T.unsqueeze(0),
            mm_encoder_outputs=None
            if images is None
            else {"image": BaseModelOutputWithPooling(pooler_output=list(images))},
            use_cache=False,
            lengths=pack.lengths,
            cu_seqlens=pack.cu_seqlens_N1,
        )
        hidden: torch.Tensor = outputs.last_hidden_state
        return hidden.squeeze(0)

    def _image_features(self, pixels_ICHW: torch.Tensor) -> torch.Tensor:
        """Return the projected features, (I, P, D)."""
        tower = self.model.model.vision_tower
        pixels = normalize(pixels_ICHW, self.preprocessing, next(tower.parameters()).dtype)
        with torch.set_grad_enabled(self._tower_learns() and torch.is_grad_enabled()):
            features_IPD = tower_features(self.model, pixels)
        projected: torch.Tensor = self.model.model.multi_modal_projector(features_IPD)
        return projected

    def _tower_learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.model.model.vision_tower.parameters())

    def _untouched_vision(self) -> torch.Tensor:
        """Return a zero that depends on what learns of projector and tower: a text-only pack gives it a gradient too.

        Without it, ranks with and without images would wait for each other for ever.
        """
        projector = self.model.model.multi_modal_projector
        weight = projector.linear_1.weight
        if self._tower_learns():
            vision = self.model.config.vision_config
            blank = torch.zeros(
                1, vision.num_channels, vision.image_size, vision.image_size, dtype=torch.uint8, device=weight.device
            )
            return 0.0 * self._image_features(blank).sum().float()
        return 0.0 * projector(weight.new_zeros(1, weight.shape[1])).sum().float()
