"""The JSON files of a model folder as plain mappings, and what of them is refused. Without torch and transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavaforge.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's content, which is a mapping.

    Raises:
        UserError: it is absent or damaged, or asks for code of its own (`auto_map`), which is never run.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing. Give a folder as `save_pretrained` or a hub download leaves it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise UserError(f"{path}: not valid JSON in UTF-8 ({error}). Download or copy it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def refuse_remote_code(folder: Path) -> None:
    """Check that no file of the folder asks for code of its own.

    Raises:
        UserError: one does.
    """
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file() and read_json(folder / name).get("auto_map"):
            raise UserError(
                f"{folder / name}: asks for code of its own (`auto_map`), which is never run. "
                "Give a model whose architecture is part of transformers."
            )


def refuse_original_llava(folder: Path, content: Mapping[str, Any]) -> None:
    """Refuse LLaVA's own layout (`LlavaLlamaForCausalLM`), which shares its `model_type` with transformers' LLaVA.

    Raises:
        UserError: the folder has it; names the way.
    """
    if content.get("model_type") in ("llava", "llava_llama", "llava_mistral") and "text_config" not in content:
        raise UserError(
            f"{folder}: is a LLaVA in its authors' own layout ({', '.join(content.get('architectures') or ['?'])}), "
            "which transformers does not open. Take its conversion of the same weights, such as "
            "llava-hf/llava-1.5-7b-hf for liuhaotian/llava-v1.5-7b; an mm_projector.bin is taken by --projector_from."
        )
