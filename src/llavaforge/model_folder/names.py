"""Two names for every tensor: the one in memory and the one in our files.

In memory: stock `LlavaForConditionalGeneration` of transformers 5.23. In our files: what vLLM, mlx
and transformers 4 expect, and 5 understands.

    in memory                                     in our files
    model.vision_tower.encoder.layers.0...        vision_tower.vision_model.encoder.layers.0...
    model.multi_modal_projector.linear_1.weight   multi_modal_projector.linear_1.weight
    model.language_model.layers.0...              language_model.model.layers.0...
    lm_head.weight                                language_model.lm_head.weight
"""

import re

# Modules of CLIP's and SigLIP's vision model; other towers have no `vision_model` level in any file.
_TOWER_PARTS = r"(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\.)"

_TO_FILE = [
    (re.compile(r"^model\.vision_tower\." + _TOWER_PARTS), "vision_tower.vision_model."),
    (re.compile(r"^model\.vision_tower\."), "vision_tower."),
    (re.compile(r"^model\.multi_modal_projector\."), "multi_modal_projector."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
]

_TO_MODULE = [
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\."), "model.multi_modal_projector."),
    (re.compile(r"^(?:model\.)?(?:language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?language_model\.(?:model\.)?"), "model.language_model."),
]


def to_file_name(module_name: str) -> str:
    """Return the name in our files of a tensor of the stock model, as in the table above.

    Raises:
        ValueError: the name belongs to no part of a LLaVA.
    """
    return _rename(module_name, _TO_FILE)


def to_module_name(file_name: str) -> str:
    """Return the in-memory name of a tensor stored under any name that transformers 4 or 5 has written.

    Understands `language_model.model.*`, `model.language_model.*`, `vision_tower.vision_model.*`,
    `vision_tower.*` and in-memory names themselves.

    Raises:
        ValueError: the name belongs to no part of a LLaVA.
    """
    return _rename(file_name, _TO_MODULE)


def is_buffer(name: str) -> bool:
    """Say whether a stored tensor is a constant that models compute themselves and old files carry along."""
    return name.endswith((".position_ids", ".inv_freq", ".masked_bias"))


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, prefix in rules:
        if pattern.match(name):
            return pattern.sub(prefix, name, count=1)
    raise ValueError(f"`{name}` is no tensor of a vision tower, projector or language model")
