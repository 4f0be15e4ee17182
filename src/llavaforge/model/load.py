"""A model folder as what training and use need of it.

Comes in: a folder (or hub name) in llava-hf style. Goes out: a `LoadedModel`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.errors import UserError, reading
from llavaforge.model_folder.hub import find_model_folder
from llavaforge.model_folder.projector import check_projector, read_projector
from llavaforge.model_folder.verify import load_verified, num_placeholders, read_checked

_REMEDY = "One of its small files (config.json, tokenizer, image processor) is at fault: correct it or copy it again."


@dataclass(frozen=True)
class LoadedModel:
    """A stock Llava, its processor, and the numbers that follow from both.

    Attributes:
        path: its folder.
        model: `LlavaForConditionalGeneration`.
        processor: `LlavaProcessor`.
        preprocessing: the image processor's settings.
        num_image_tokens: tokens that one image takes.
    """

    path: Path
    model: Any
    processor: Any
    preprocessing: Preprocessing
    num_image_tokens: int

    @property
    def image_token_id(self) -> int:
        """Id of `<image>`."""
        return int(self.processor.image_token_id)


def load_model(name_or_path: str, dtype: torch.dtype | None = None, projector_from: str | None = None) -> LoadedModel:
    """Load a model folder with plain transformers and check that nothing is missing.

    Args:
        name_or_path: a model folder, or its name on the hub.
        dtype: type of the weights; None: as the folder says.
        projector_from: a trained projector to put in place of the model's own (`model_folder/projector.py`).

    Raises:
        UserError: not a model folder, no processor, missing or unexpected tensors, or settings that do not fit
        together.
    """
    path = find_model_folder(name_or_path)
    with reading(path, _REMEDY):
        _, processor = read_checked(path)
        loaded = _loaded(path, load_verified(path, dtype, processor), processor)
    if projector_from is not None:
        projector, tensors = loaded.model.model.multi_modal_projector, read_projector(projector_from)
        check_projector(projector_from, tensors, {name: old.shape for name, old in projector.state_dict().items()})
        projector.load_state_dict(tensors)
    return loaded


def load_without_weights(name_or_path: str) -> LoadedModel:
    """Open a model folder with parameters that have shapes only: enough for samples, plans and FLOPs.

    Raises:
        UserError: as `load_model`, but for the weights.
    """
    path = find_model_folder(name_or_path)
    with reading(path, _REMEDY):
        config, processor = read_checked(path)
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(config)
        return _loaded(path, model, processor)


def _loaded(path: Path, model: Any, processor: Any) -> LoadedModel:
    preprocessing = Preprocessing.of(processor.image_processor)
    preprocessing.blank()
    if not isinstance(processor.image_token_id, int):
        raise UserError(f"{path}: the processor knows no `<image>` token. {_REMEDY}")
    return LoadedModel(path, model, processor, preprocessing, num_placeholders(processor)[0])
