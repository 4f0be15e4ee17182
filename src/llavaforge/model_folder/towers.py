"""The families of vision towers: one row each, with all that differs between them outside of their forward pass.

CONTRIBUTING.md says what else a new family needs. transformers is imported where an image processor is made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TowerFamily:
    """One family.

    Attributes:
        whole: `model_type` of the image-text model whose `vision_config` describes such a tower.
        has_class_token: a token stands before the patches in its output; transformers' Llava drops that one.
        image_processor: from an edge in pixels to the image processor that the family was pre-trained with.
    """

    whole: str
    has_class_token: bool
    image_processor: Callable[[int], Any]


def _clip_processor(edge: int) -> Any:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": edge},
        crop_size={"height": edge, "width": edge},
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    )


def _siglip_processor(edge: int) -> Any:
    from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(
        size={"height": edge, "width": edge}, image_mean=IMAGENET_STANDARD_MEAN, image_std=IMAGENET_STANDARD_STD
    )


TOWERS: dict[str, TowerFamily] = {
    "clip_vision_model": TowerFamily("clip", has_class_token=True, image_processor=_clip_processor),
    "siglip_vision_model": TowerFamily("siglip", has_class_token=False, image_processor=_siglip_processor),
}
"""By the `model_type` of the vision config."""
