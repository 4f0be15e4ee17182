"""The image processor of a joined model: the tower's own, or one that pads to a square first.

Comes in: the tower's folder and config. Goes out: an image processor on the Pillow backend. Called by `parts.py`.
"""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llavaforge.errors import UserError
from llavaforge.model_folder.read import read_json

log = logging.getLogger(__name__)


def prepare_image_processor(folder: Path, vision_config: Any, image_aspect_ratio: str) -> Any:
    """Return the image processor.

    Args:
        folder: the tower's.
        vision_config: its config; `image_size` in pixels.
        image_aspect_ratio: `crop`: the tower's own way. `pad`: a square of the mean colour around the image, then
            resized (LLaVA-1.5's way).

    Raises:
        UserError: the folder's processor does not load.
    """
    own = _own(folder) or _default(folder, vision_config)
    if image_aspect_ratio == "crop":
        return own
    edge = vision_config.image_size
    return LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": edge},
        crop_size={"height": edge, "width": edge},
        resample=own.resample,
        image_mean=own.image_mean,
        image_std=own.image_std,
    )


def _own(folder: Path) -> Any:
    nested = folder / "processor_config.json"
    stored = (folder / "preprocessor_config.json").is_file() or (
        nested.is_file() and "image_processor" in read_json(nested)
    )
    if not stored:
        return None
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{folder}: the image processor does not load: {error}") from None


def _default(folder: Path, vision_config: Any) -> Any:
    """Return what the tower's family was trained with."""
    log.warning("%s: has no preprocessor_config.json; the settings of its family's original models are used.", folder)
    edge = vision_config.image_size
    square = {"height": edge, "width": edge}
    if vision_config.model_type == "clip_vision_model":
        return CLIPImageProcessorPil(
            size={"shortest_edge": edge}, crop_size=square, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD
        )
    return SiglipImageProcessorPil(size=square, image_mean=IMAGENET_STANDARD_MEAN, image_std=IMAGENET_STANDARD_STD)
