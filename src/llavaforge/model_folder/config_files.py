"""The JSON files of a model folder that describe the model: `config.json` and `generation_config.json`.

Comes in: transformers' config objects. Goes out: plain dicts that transformers 4 and 5 and vLLM read alike.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig, LlavaConfig, LlavaProcessor

from llavaforge.model_folder.chat_template import end_of_answer


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def config_json(config: LlavaConfig) -> dict[str, Any]:
    """Return the content of `config.json`.

    Transformers 5 writes RoPE's base only inside `rope_parameters` and the type only as `dtype`; older readers look
    for `rope_theta`, `rope_scaling` and `torch_dtype`. Both are written; they say the same.
    """
    content = _clean(config.to_diff_dict())
    content["architectures"] = ["LlavaForConditionalGeneration"]
    text = content["text_config"]
    if not text.get("architectures"):
        mapping = AutoModelForCausalLM._model_mapping
        text["architectures"] = [mapping[type(config.text_config)].__name__]
    text.update(_older_rope(text))
    content["tie_word_embeddings"] = text["tie_word_embeddings"] = config.text_config.tie_word_embeddings
    for part in (content, text, content["vision_config"]):
        part["dtype"] = part["torch_dtype"] = content.get("dtype", "float32")
    return content


def generation_json(
    config: LlavaConfig, generation_config: GenerationConfig, processor: LlavaProcessor
) -> dict[str, Any]:
    """Return the content of `generation_config.json`: pad and every end are set, `<image>` is never generated.

    Ends are the model's own, and the token that ends an answer in training: the chat template's, or the tokenizer's
    eos where the template writes none.
    """
    tokenizer = processor.tokenizer
    template = processor.chat_template or tokenizer.chat_template
    content = dict(generation_config.to_diff_dict())
    content.pop("_from_model_config", None)
    known: list[Any] = [content.get("eos_token_id")]
    if known == [None]:
        known = [getattr(config.text_config, "eos_token_id", None)]
    written = end_of_answer(template, tokenizer) if isinstance(template, str) else None
    known.append(tokenizer.eos_token_id if written is None else written)
    flat = [end for item in known for end in (item if isinstance(item, list) else [item]) if end is not None]
    ends = list(dict.fromkeys(flat))
    if ends:
        content["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if content.get("pad_token_id") is None:
        content["pad_token_id"] = tokenizer.pad_token_id
    suppressed = set(content.get("suppress_tokens") or []) | {config.image_token_index}
    content["suppress_tokens"] = sorted(suppressed)
    return content


def _older_rope(text: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_theta` and, for a scaled RoPE, `rope_scaling`, as transformers 4 reads them."""
    rope = text.get("rope_parameters") or {}
    if "rope_theta" not in rope:  # none, or one per kind of layer (Gemma 3), which transformers 4 names otherwise
        return {}
    older: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return older


def _clean(content: dict[str, Any]) -> dict[str, Any]:
    """Drop where a config came from, at every level: private paths have no place in a model folder."""
    kept = {key: value for key, value in content.items() if key not in ("_name_or_path", "_commit_hash")}
    return {key: _clean(value) if isinstance(value, dict) else value for key, value in kept.items()}
