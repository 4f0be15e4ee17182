"""The image processor of a joined model: the tower's own, or one that pads to a square first.

Comes in: the tower's folder and config. Goes out: an image processor on the Pillow backend.
"""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llavaforge.errors import reading
from llavaforge.model_folder.json_files import read_json
from llavaforge.model_folder.towers import TOWERS

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
    with reading(folder, "It is the image processor that does not load. Correct preprocessor_config.json."):
        return AutoImageProcessor.from_pretrained(folder, backend="pil")


def _default(folder: Path, vision_config: Any) -> Any:
    """Return what the tower's family was trained with."""
    log.warning("%s: has no preprocessor_config.json; the settings of its family's original models are used.", folder)
    return TOWERS[vision_config.model_type].image_processor(vision_config.image_size)
