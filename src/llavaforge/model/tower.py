"""The vision tower, cut after the feature layer: what comes later is never run.

Legend: I images, C channels, H and W pixels, P image tokens, D tower width.
"""

from functools import cache
from typing import Any

import torch
from torch import nn

from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.model.feature_layers import feature_states, num_layers_used


def normalize(pixels_ICHW: torch.Tensor, preprocessing: Preprocessing, dtype: torch.dtype) -> torch.Tensor:
    """Turn `uint8` pixels into the tower's input: `(pixels * rescale - mean) / std`, computed in float32.

    Returns:
        (I, C, H, W) of `dtype`, equal to what the image processor returns.
    """
    mean, std = _channels(preprocessing.mean, pixels_ICHW.device), _channels(preprocessing.std, pixels_ICHW.device)
    return ((pixels_ICHW.float() * preprocessing.rescale - mean) / std).to(dtype)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return a number per channel, (C, 1, 1), on a device; copied there once, since each copy waits for the device."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def tower_features(model: Any, pixels_ICHW: torch.Tensor) -> torch.Tensor:
    """Return the features that the projector reads, running no layer after them.

    Equal to the stock `get_image_features` before its projector.

    Args:
        model: a stock `LlavaForConditionalGeneration`.
        pixels_ICHW: normalised pixels.

    Returns:
        (I, P, D), with the CLS token dropped when the model's strategy says so.
    """
    config = model.config
    tower = vision_backbone(model)
    hidden = tower.embeddings(pixels_ICHW)
    if hasattr(tower, "pre_layrnorm"):  # CLIP has one (its name is misspelt upstream); SigLIP has none
        hidden = tower.pre_layrnorm(hidden)
    kept = {0: hidden}
    for number in range(num_layers_used(config)):
        hidden = tower.encoder.layers[number](hidden, None)
        kept[number + 1] = hidden
    features = torch.cat([kept[layer] for layer in feature_states(config)], dim=-1)
    return features[:, 1:] if config.vision_feature_select_strategy == "default" else features


def vision_backbone(model: Any) -> Any:
    """Return the module that holds `embeddings` and `encoder` (older transformers wrap it once more)."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def unused_modules(model: Any) -> list[nn.Module]:
    """Return what of the tower no feature depends on; it is always frozen."""
    tower = vision_backbone(model)
    late = list(tower.encoder.layers[num_layers_used(model.config) :])
    return late + [getattr(tower, name) for name in ("post_layernorm", "head") if hasattr(tower, name)]
