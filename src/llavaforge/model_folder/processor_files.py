"""The files of a model folder that make its inputs: tokenizer, chat template and image processor.

Comes in: a `LlavaProcessor`. Goes out: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and `.json`,
`processor_config.json` and `preprocessor_config.json`.
"""

import json
from pathlib import Path
from typing import Any

from transformers import LlavaProcessor

from llavaforge.model_folder.chat_template import accepting_strings_and_lists, beginning_as_trained
from llavaforge.model_folder.config_files import write_json
from llavaforge.model_folder.json_files import read_json

# Class names that transformers 4 does not know, and the ones that mean the same to both.
_CLASSES_OF_4 = {"TokenizersBackend": "PreTrainedTokenizerFast", "PythonBackend": "PreTrainedTokenizer"}


def write_processor(folder: Path, processor: LlavaProcessor) -> None:
    """Write every file that `AutoProcessor.from_pretrained` of transformers 4 and 5 reads.

    The tokenizer's fields come last: a save by transformers drops those that transformers 4 wants.
    """
    tokenizer = processor.tokenizer
    template = processor.chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    accepting = None
    if isinstance(template, str):
        accepting = accepting_strings_and_lists(template, tokenizer.special_tokens_map)
        accepting = beginning_as_trained(accepting, tokenizer.special_tokens_map)
        (folder / "chat_template.jinja").write_text(accepting)
        write_json(folder / "chat_template.json", {"chat_template": accepting})  # where processors before 4.49 look
    write_json(folder / "preprocessor_config.json", _preprocessor_json(processor))
    write_json(folder / "processor_config.json", _processor_json(processor))
    _write_tokenizer_fields(folder / "tokenizer_config.json", processor, accepting)


def _processor_json(processor: LlavaProcessor) -> dict[str, Any]:
    # Flat: transformers 5 also reads an image processor nested in here, over which transformers 4 stumbles.
    return {
        "processor_class": "LlavaProcessor",
        "image_token": processor.image_token,
        "patch_size": processor.patch_size,
        "vision_feature_select_strategy": processor.vision_feature_select_strategy,
        "num_additional_image_tokens": processor.num_additional_image_tokens,
    }


def _preprocessor_json(processor: LlavaProcessor) -> dict[str, Any]:
    content = dict(processor.image_processor.to_dict())
    name = type(processor.image_processor).__name__
    for ending in ("Pil", "Fast"):  # the same processor on another backend; readers choose their own
        name = name.removesuffix(ending)
    return content | {"image_processor_type": name, "processor_class": "LlavaProcessor"}


def _write_tokenizer_fields(path: Path, processor: LlavaProcessor, chat_template: str | None) -> None:
    """Write what a save by transformers 5 leaves out.

    Without `model_input_names` transformers 4 makes `token_type_ids`, which Llava's `generate` refuses; without
    `padding_side` batches are padded on the right, and all but the longest prompt are answered wrongly. Tokenizers
    before 4.49 look for the chat template here.

    `additional_special_tokens` and `added_tokens_decoder` are what transformers 4 writes itself. `extra_special_tokens`
    is a dict: transformers 4 fails on a list, and 5 reads `additional_special_tokens` only beside a dict or nothing.
    """
    tokenizer, image_token = processor.tokenizer, processor.image_token
    content = json.loads(path.read_text())
    for key in ("extra_special_tokens", "model_specific_special_tokens", "is_local", "local_files_only", "backend"):
        content.pop(key, None)
    content["tokenizer_class"] = _tokenizer_class(content["tokenizer_class"], Path(tokenizer.name_or_path))
    content["processor_class"] = "LlavaProcessor"
    content["model_input_names"] = ["input_ids", "attention_mask"]
    content["padding_side"] = "left"
    if chat_template is not None:
        content["chat_template"] = chat_template
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    content["added_tokens_decoder"] = {
        str(number): {field: getattr(token, field) for field in fields}
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    extra = [str(token) for token in tokenizer.extra_special_tokens]
    content["additional_special_tokens"] = extra if image_token in extra else [*extra, image_token]
    content["extra_special_tokens"] = {"image_token": image_token}
    content["image_token"] = image_token
    write_json(path, content)


def _tokenizer_class(name: str, source: Path) -> str:
    """Return the class of a tokenizer as its source names it: transformers 5 loads any as its `TokenizersBackend`."""
    if name in _CLASSES_OF_4 and (source / "tokenizer_config.json").is_file():
        name = read_json(source / "tokenizer_config.json").get("tokenizer_class") or name
    return _CLASSES_OF_4.get(name, name)
