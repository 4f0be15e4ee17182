"""The one module an engine runs: a pack in, the summed loss out. Nothing of the model runs outside it.

(But a frozen tower does before an engine takes the model: `model/features.py`.)

Legend: T tokens of the pack, M image tokens of the pack, I images, P image tokens of each, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from llavaforge.clock import LANGUAGE_MODEL, TOWER, Clock
from llavaforge.data.load.pack import Pack
from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.model.activations import CHUNK
from llavaforge.model.attention import Borders, use_packed_attention
from llavaforge.model.feature_layers import feature_width
from llavaforge.model.loss import LossHead
from llavaforge.model.tower import normalize, tower_features


class StepModule(nn.Module):
    """A stock Llava with the packed forward pass around it.

    Args:
        model: a stock `LlavaForConditionalGeneration`; its weights stay its own.
        preprocessing: the image processor's settings, for the normalisation.
        recompute_every: every how many layers of the language model one is computed again in the backward pass
            (gradient checkpointing; 0: none). Never the tower's: for the whole model it would back-propagate through a
            frozen tower.
        clock: told when the tower is at work, and when the language model is.
        features_given: all packs bring kept features, so that the tower never runs.

    Attributes:
        runs_all_modules: run every module in every pass, forward and backward, in the same order, whatever the pack
            holds. ZeRO-3 sets it: there each of these calls gathers the module's weights from all ranks.
    """

    def __init__(
        self,
        model: Any,
        preprocessing: Preprocessing,
        recompute_every: int = 0,
        clock: Clock | None = None,
        features_given: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._begin = clock.begin if clock is not None else lambda part: None
        self.loss_head = LossHead(model.lm_head)
        self.preprocessing = preprocessing
        self._features_given = features_given
        self.runs_all_modules = False
        use_packed_attention(model)
        if recompute_every:
            model.model.language_model.activation_checkpointing_enable(
                {"use_reentrant": False}, every_n_layers=recompute_every
            )

    def forward(self, pack: Pack) -> torch.Tensor:
        """Return the sum of the supervised tokens' cross-entropies, a float32 scalar."""
        # Features first, whatever the pack: DeepSpeed reduces gradients in the order in which a rank has them.
        images_IPD = self.image_features(pack) if pack.num_images else self._blank_features()
        are_put_in = bool(pack.num_images) or self.runs_all_modules
        hidden_TD = self._text_model(pack, images_IPD if are_put_in else None)
        total: torch.Tensor = self.loss_head(hidden_TD, pack.predictors_S, pack.targets_S)
        return total if are_put_in else total + 0.0 * images_IPD.sum().float()

    def token_losses(self, pack: Pack, images_IPD: torch.Tensor | None, cache: Any) -> torch.Tensor:
        """Return the cross-entropy of each supervised token, (S,) float32 (for evaluation, without gradients).

        Args:
            pack: the samples.
            images_IPD: the projected features of its images (`image_features`); None where there are none.
            cache: a `transformers.Cache` that takes the pack's keys and values.
        """
        hidden_TD = self._text_model(pack, images_IPD, cache)
        pieces = zip(
            hidden_TD.index_select(0, pack.predictors_S).split(CHUNK), pack.targets_S.split(CHUNK), strict=True
        )
        return torch.cat(
            [cross_entropy(self.model.lm_head(hidden).float(), targets, reduction="none") for hidden, targets in pieces]
        )

    def _text_model(self, pack: Pack, images_IPD: torch.Tensor | None, cache: Any = None) -> torch.Tensor:
        """Return the last hidden states, (T, D).

        Features are put in by index: the stock model looks for the image tokens on the device, and waits for it twice.
        Those of a pack without images are put in times zero, so that the backward pass runs all modules too.
        """
        model = self.model.model
        embedded_TD = model.get_input_embeddings()(pack.ids_T)
        if images_IPD is not None:
            features_MD = images_IPD.flatten(0, 1).to(embedded_TD.dtype)
            if pack.num_images:
                embedded_TD = embedded_TD.index_copy(0, pack.image_positions_M, features_MD)
            else:
                embedded_TD = embedded_TD + 0.0 * features_MD.sum()
        outputs = model.language_model(
            inputs_embeds=embedded_TD.unsqueeze(0),
            position_ids=pack.position_ids_T.unsqueeze(0),
            past_key_values=cache,
            use_cache=cache is not None,
            borders=Borders(pack.lengths, pack.cu_seqlens_N1, max(pack.lengths)),
        )
        hidden: torch.Tensor = outputs.last_hidden_state
        return hidden.squeeze(0)

    def image_features(self, pack: Pack) -> torch.Tensor:
        """Return the projected features of a pack's images, (I, P, D)."""
        if not len(pack.features_IPD):
            return self._of_pixels(pack.pixels_ICHW)
        projected: torch.Tensor = self.model.model.multi_modal_projector(pack.features_IPD)
        return projected

    def _of_pixels(self, pixels_ICHW: torch.Tensor) -> torch.Tensor:
        """Return the projected features, (I, P, D)."""
        tower = self.model.model.vision_tower
        self._begin(TOWER)
        pixels = normalize(pixels_ICHW, self.preprocessing, next(tower.parameters()).dtype)
        with torch.set_grad_enabled(self._tower_learns() and torch.is_grad_enabled()):
            features_IPD = tower_features(self.model, pixels)
        self._begin(LANGUAGE_MODEL)
        if features_IPD.requires_grad:  # the last thing of the backward pass is the tower's
            features_IPD.register_hook(lambda gradient: self._begin(TOWER))
        projected: torch.Tensor = self.model.model.multi_modal_projector(features_IPD)
        return projected

    def _tower_learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.model.model.vision_tower.parameters())

    def _blank_features(self) -> torch.Tensor:
        """Return features for a pack without images, which hang on all that learns of projector and tower.

        Times zero they give it a gradient too; else ranks with and without images would wait for each other for ever.
        """
        config, projector = self.model.config, self.model.model.multi_modal_projector
        parameter = next(projector.parameters())
        if self._tower_learns() or (self.runs_all_modules and not self._features_given):
            vision = config.vision_config
            size = (1, vision.num_channels, vision.image_size, vision.image_size)
            return self._of_pixels(torch.zeros(size, dtype=torch.uint8, device=parameter.device))
        width = feature_width(config)
        blank: torch.Tensor = projector(torch.zeros(1, 1, width, dtype=parameter.dtype, device=parameter.device))
        return blank
