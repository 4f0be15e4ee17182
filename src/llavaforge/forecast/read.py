"""The sizes of a LLaVA from its `config.json`, or from those of its two parts.

Comes in: folders or hub names; no weights are read, nor downloaded. Goes out: a `ModelSizes`, and what had to be
assumed.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavaforge.config.load import nearest
from llavaforge.config.schema import EstimateConfig
from llavaforge.errors import UserError
from llavaforge.forecast.sizes import TEXT_FAMILIES, VISION_DEFAULTS, ModelSizes, TextSizes, VisionSizes
from llavaforge.join.embedding import num_embeddings
from llavaforge.model_folder.hub import find_config_folder
from llavaforge.model_folder.json_files import read_json, refuse_original_llava, refuse_remote_code
from llavaforge.model_folder.towers import TOWERS

logger = logging.getLogger(__name__)

_IMAGE_TOKEN = "<image>"
# The tower of a LLaVA whose config.json does not describe it (transformers' LlavaConfig).
_DEFAULT_TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip


def read_sizes(config: EstimateConfig) -> ModelSizes:
    """Return the sizes of the model that the options name.

    Raises:
        UserError: a folder is missing, or holds no such model; its config.json is damaged.
    """
    if config.model_name_or_path is not None and config.vision_tower is None:
        folder, content = _open(config.model_name_or_path)
        if content.get("model_type") != "llava":
            raise UserError(
                f"{folder}: is a `{content.get('model_type')}`, not a LLaVA. Give its two parts as --vision_tower and "
                "--language_model, or join them with `llavaforge customize-model`."
            )
        return sizes_of_llava(content, str(folder / "config.json"))
    assert config.vision_tower is not None and config.language_model is not None
    vision, text = _tower(config.vision_tower), _language_model(config.language_model)
    return ModelSizes(vision, text, -2, "default" if vision.has_class_token else "full", True)


def sizes_of_llava(content: Mapping[str, Any], where: str) -> ModelSizes:
    """Return the sizes that a LLaVA's `config.json` describes."""
    tied = {"tie_word_embeddings": True} if content.get("tie_word_embeddings") else {}
    text = {"model_type": "llama", **_mapping(content, "text_config", where), **tied}
    layer = content.get("vision_feature_layer", -2)
    vision = _vision_sizes(_mapping(content, "vision_config", where) or _DEFAULT_TOWER, where)
    states = vision.num_hidden_layers + 1
    layers = layer if isinstance(layer, list) else [layer]
    if not layers or not all(isinstance(one, int) and -states <= one < states for one in layers):
        raise UserError(f"{where}: vision_feature_layer is {layer!r:.100}; the tower has {states} hidden states.")
    return ModelSizes(
        vision_config=vision,
        text_config=_text_sizes(text, where),
        vision_feature_layer=layer,
        vision_feature_select_strategy=content.get("vision_feature_select_strategy", "default"),
        multimodal_projector_bias=bool(content.get("multimodal_projector_bias", True)),
    )


def _tower(name: str) -> VisionSizes:
    folder, content = _open(name)
    kind = content.get("model_type")
    if kind == "llava" or kind in {family.whole for family in TOWERS.values()}:
        family = next((tower for tower, family in TOWERS.items() if family.whole == kind), "clip_vision_model")
        content = {"model_type": family, **_mapping(content, "vision_config", str(folder / "config.json"))}
    if content.get("model_type") not in TOWERS:
        raise UserError(
            f"{folder}: is a `{kind}`. A vision tower is one of {', '.join(sorted(TOWERS))}, or part of a "
            f"{', a '.join(family.whole for family in TOWERS.values())} or a LLaVA."
        )
    return _vision_sizes(content, str(folder / "config.json"))


def _language_model(name: str) -> TextSizes:
    folder, content = _open(name)
    where = str(folder / "config.json")
    if content.get("model_type") == "llava":
        return sizes_of_llava(content, where).text_config
    text = _text_sizes(content, where)
    rows = num_embeddings(text.vocab_size, _image_token_id(folder, text.vocab_size))
    return TextSizes(**{**vars(text), "vocab_size": rows})


def _open(name: str) -> tuple[Path, dict[str, Any]]:
    folder = find_config_folder(name)
    if (folder / "final" / "config.json").is_file():  # a run's folder
        folder = folder / "final"
    content = read_json(folder / "config.json")
    refuse_remote_code(folder)
    refuse_original_llava(folder, content)
    return folder, content


def _text_sizes(content: Mapping[str, Any], where: str) -> TextSizes:
    kind = content.get("model_type")
    if kind not in TEXT_FAMILIES:
        raise UserError(
            f"{where}: the language model is a `{kind}`. `estimate` knows the layers of {', '.join(TEXT_FAMILIES)}."
            f"{nearest(str(kind), TEXT_FAMILIES)}"
        )
    values = _taken(content, TEXT_FAMILIES[kind].defaults)
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    _check(values, where, may_be_none=("head_dim",))
    if values["head_dim"] is None:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    return TextSizes(kind, **values)


def _vision_sizes(content: Mapping[str, Any], where: str) -> VisionSizes:
    kind = content.get("model_type", "clip_vision_model")
    if kind not in VISION_DEFAULTS:
        raise UserError(f"{where}: the vision tower is a `{kind}`; `estimate` knows {', '.join(VISION_DEFAULTS)}.")
    values = _taken(content, VISION_DEFAULTS[kind])
    if kind == "clip_vision_model":
        values["vision_use_head"] = False
    _check(values, where)
    return VisionSizes(kind, TOWERS[kind].has_class_token, **values)


def _mapping(content: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """Return a config within a config, empty where it is left out."""
    inner = content.get(name) or {}
    if not isinstance(inner, dict):
        raise UserError(f"{where}: `{name}` is {inner!r:.50}, a mapping was expected. Copy the file again.")
    return inner


def _taken(content: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: content.get(name, default) for name, default in defaults.items()}


def _check(values: Mapping[str, Any], where: str, may_be_none: tuple[str, ...] = ()) -> None:
    """Check that what is a size is one."""
    for name, value in values.items():
        if isinstance(value, bool) or name == "hidden_act" or (value is None and name in may_be_none):
            continue
        if not isinstance(value, int) or not 0 < value < 10**7:
            raise UserError(f"{where}: `{name}` is {value!r:.50}, a positive number was expected. Copy the file again.")


def _image_token_id(folder: Path, vocab_size: int) -> int:
    """Return the id that `<image>` has or gets in the joined model: the next free one of the tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        logger.warning("%s: no tokenizer.json, so `<image>` is assumed to fit the %d rows.", folder, vocab_size)
        return vocab_size - 1
    content = read_json(path)
    try:
        added = {str(token["content"]): int(token["id"]) for token in content.get("added_tokens") or []}
        vocabulary = content["model"]["vocab"]
        num_own = len(vocabulary)
        known = added.get(_IMAGE_TOKEN, vocabulary.get(_IMAGE_TOKEN) if isinstance(vocabulary, dict) else None)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no tokenizer's ({error!r:.100}). Copy it again.") from None
    added |= _of_tokenizer_config(folder)
    return int(known) if known is not None else max(num_own - 1, *added.values(), 0) + 1


def _of_tokenizer_config(folder: Path) -> dict[str, int]:
    """Return the further tokens that tokenizer_config.json adds."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        decoder = read_json(path).get("added_tokens_decoder") or {}
        return {json.dumps(token): int(number) for number, token in decoder.items()}
    except (TypeError, ValueError, AttributeError):
        return {}
