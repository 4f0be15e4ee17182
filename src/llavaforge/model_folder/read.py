"""Read the small files of a model folder: config, processor, generation config. Never runs code of a folder.

Comes in: a folder written by us or in llava-hf's style. Goes out: transformers' objects, complete.
"""

import logging
from pathlib import Path

from transformers import AutoProcessor, GenerationConfig, LlavaConfig, LlavaProcessor

from llavaforge.errors import UserError, reading
from llavaforge.model_folder.json_files import read_json, refuse_original_llava, refuse_remote_code
from llavaforge.model_folder.towers import TOWERS

log = logging.getLogger(__name__)

_MOST_ADDITIONAL_TOKENS = 64
_COPY_AGAIN = "Correct it, or download or copy it again."


def read_config(folder: Path) -> LlavaConfig:
    """Return the config of a LLaVA folder.

    Raises:
        UserError: it is missing, or is no LLaVA's.
    """
    content = read_json(folder / "config.json")
    refuse_remote_code(folder)
    refuse_original_llava(folder, content)
    if content.get("model_type") != "llava":
        raise UserError(
            f"{folder}: is a `{content.get('model_type')}`, not a LLaVA. "
            "Join a vision tower and a language model with `llavaforge customize-model`."
        )
    with reading(folder / "config.json", _COPY_AGAIN):
        return LlavaConfig.from_pretrained(folder)


def read_generation_config(folder: Path) -> GenerationConfig:
    """Return a folder's generation config, or an empty one (which the writer completes)."""
    if not (folder / "generation_config.json").is_file():
        return GenerationConfig()
    read_json(folder / "generation_config.json")
    with reading(folder / "generation_config.json", _COPY_AGAIN):
        return GenerationConfig.from_pretrained(folder)


def read_processor(folder: Path) -> LlavaProcessor:
    """Return the processor of a LLaVA folder, with what old folders lack filled in from the config.

    Raises:
        UserError: tokenizer or image processor is missing.
    """
    for name, what in (("tokenizer_config.json", "tokenizer"), ("preprocessor_config.json", "image processor")):
        nested = folder / "processor_config.json"  # where transformers 5 keeps the image processor
        if not (folder / name).is_file() and (name.startswith("tokenizer") or not nested.is_file()):
            _explain_other_folder(folder)
            raise UserError(
                f"{folder}: has no processor ({name}, the {what}, is missing). Copy the processor's files of the model "
                "it was made from into it, or write the folder anew with `llavaforge customize-model`."
            )
    refuse_remote_code(folder)
    with reading(folder, f"It is the processor (tokenizer, image processor) that does not load. {_COPY_AGAIN}"):
        processor = AutoProcessor.from_pretrained(folder)
    if not isinstance(processor, LlavaProcessor):
        raise UserError(f"{folder}: holds a {type(processor).__name__}, not a complete LlavaProcessor.")
    _complete(processor, folder)
    number = processor.num_additional_image_tokens
    if not isinstance(number, int) or not 0 <= number <= _MOST_ADDITIONAL_TOKENS:
        raise UserError(f"{folder}: num_additional_image_tokens is {number!r:.50}; 1 is a CLIP's, 0 a SigLIP's.")
    _take_jinja(processor, folder)
    return processor


def _explain_other_folder(folder: Path) -> None:
    """Raise a better error where the folder is something else than a model without a processor."""
    if (folder / "final").is_dir():
        raise UserError(f"{folder}: is a run's folder. Its finished model is {folder / 'final'}: give that.")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(
            f"{folder}: holds no model (no config.json). Give a folder that customize-model or train wrote."
        )
    if (folder / "config.json").is_file():
        read_config(folder)


def _complete(processor: LlavaProcessor, folder: Path) -> None:
    """Fill in what llava-hf folders from before transformers 4.46 lack."""
    config = read_config(folder)
    if processor.patch_size is None or processor.vision_feature_select_strategy is None:
        log.warning("%s: the processor's patch size and feature selection are filled in from config.json.", folder)
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        family = TOWERS.get(config.vision_config.model_type)
        processor.num_additional_image_tokens = int(family.has_class_token) if family else 0


def _take_jinja(processor: LlavaProcessor, folder: Path) -> None:
    """Take the chat template that people edit: transformers reads the older `chat_template.json` first."""
    jinja = folder / "chat_template.jinja"
    if not jinja.is_file():
        return
    template = jinja.read_text(encoding="utf-8")
    if processor.chat_template not in (None, template):
        log.warning("%s: differs from chat_template.json; the .jinja file is used. `export` writes both anew.", jinja)
    processor.chat_template = processor.tokenizer.chat_template = template
