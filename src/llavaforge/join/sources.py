"""Where the two parts come from: folders or hub names, of several kinds, each read through the same two objects.

Comes in: a folder (or hub name) with a CLIP, a SigLIP, a causal language model or a whole LLaVA. Goes out: its
config, and for each tensor of the stock LLaVA the name under which the source keeps it.

    model.vision_tower.encoder.layers.0.mlp.fc1.weight  <-  vision_model.encoder.layers.0.mlp.fc1.weight   (a CLIP)
    model.language_model.layers.0.mlp.up_proj.weight    <-  model.layers.0.mlp.up_proj.weight              (a Qwen2)
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llavaforge.errors import UserError, reading
from llavaforge.model_folder.hub import find_model_folder
from llavaforge.model_folder.json_files import read_json, refuse_original_llava, refuse_remote_code
from llavaforge.model_folder.names import is_buffer, to_module_name
from llavaforge.model_folder.tensors import TensorFiles, open_tensors
from llavaforge.model_folder.towers import TOWERS

log = logging.getLogger(__name__)

TOWER = "model.vision_tower."
BODY = "model.language_model."
HEAD = "lm_head.weight"

# What a whole CLIP or SigLIP (or one with a projection) holds besides its vision model.
_BESIDE_THE_TOWER = re.compile(r"^(text_model\.|text_projection|visual_projection|logit_scale|logit_bias)")


@dataclass(frozen=True)
class Part:
    """One of the two parts.

    Attributes:
        folder: where it is.
        config: of the part itself (a vision config or a language model's), also when the folder holds more.
        files: all tensors of the folder.
        to_stock: name in the files -> name in the stock LLaVA; None for what is left behind on purpose.
        is_llava: the folder holds a whole LLaVA.
    """

    folder: Path
    config: Any
    files: TensorFiles
    to_stock: Callable[[str], str | None]
    is_llava: bool


def open_tower(name: str) -> Part:
    """Open a vision tower: a CLIP or SigLIP (whole or its vision part), or that of a LLaVA.

    Raises:
        UserError: the folder is none of these, or asks for code of its own.
    """
    folder, config = _open(name)
    kind = config.model_type
    if kind == "llava" or kind in {family.whole for family in TOWERS.values()}:
        config = config.vision_config
    if config.model_type not in TOWERS:
        raise UserError(
            f"{folder}: is a `{kind}`. A vision tower is one of {', '.join(sorted(TOWERS))}, or part of a "
            f"{', a '.join(family.whole for family in TOWERS.values())} or a LLaVA."
        )
    to_stock = _part_of_llava(TOWER) if kind == "llava" else _tower_name
    return Part(folder, config, open_tensors(folder), to_stock, kind == "llava")


def open_language_model(name: str) -> Part:
    """Open a causal language model, or that of a LLaVA.

    Raises:
        UserError: the folder is neither, or asks for code of its own.
    """
    folder, config = _open(name)
    kind = config.model_type
    if kind == "llava":
        config = config.text_config
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{folder}: is a `{kind}`, not a causal language model that transformers knows.")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{folder}: holds quantised weights. Give the original model.")
    if kind == "llava":
        return Part(folder, config, open_tensors(folder), _part_of_llava(BODY, HEAD), True)
    prefix = AutoModelForCausalLM._model_mapping[type(config)].base_model_prefix + "."
    return Part(folder, config, open_tensors(folder), lambda stored: _language_model_name(stored, prefix), False)


def match_tensors(part: Part, expected: Mapping[str, torch.Size]) -> dict[str, str]:
    """Find for each tensor of the stock model the one tensor of the part that goes there.

    Args:
        part: a part.
        expected: names and shapes of that part of the stock LLaVA.

    Returns:
        Name in the stock model -> name in the part's files.

    Raises:
        UserError: a tensor is missing, has another shape, or has no place in a LLaVA.
    """
    placed: dict[str, str] = {}
    left: list[str] = []
    for stored in part.files:
        name = part.to_stock(stored)
        if name is None or is_buffer(stored):
            left.append(stored)
        elif name in expected and name not in placed:
            placed[name] = stored
        elif name == HEAD and HEAD not in expected:
            left.append(_check_tied(part, stored))
        else:
            raise UserError(
                f"{part.folder}: tensor `{stored}` {list(part.files.shape(stored))} has no place in a LLaVA; without "
                "it the joined model would answer differently. Choose another model."
            )
    missing = [name for name in expected if name not in placed]
    if missing:
        raise UserError(
            f"{part.folder}: has no tensor for `{missing[0]}` ({len(missing)} of {len(expected)} are missing). "
            "Is the download complete?"
        )
    for name, stored in placed.items():
        if part.files.shape(stored) != tuple(expected[name]):
            found, wanted = list(part.files.shape(stored)), list(expected[name])
            raise UserError(f"{part.folder}: tensor `{stored}` has shape {found}; config.json asks for {wanted}.")
    _report(part, left)
    return placed


def _check_tied(part: Part, stored: str) -> str:
    """Check that a stored head which config.json calls tied is the embedding indeed."""
    embedding = next((name for name in part.files if name.endswith("embed_tokens.weight")), None)
    if embedding is None or not torch.equal(part.files[embedding], part.files[stored]):
        raise UserError(
            f"{part.folder}: tensor `{stored}` differs from the embedding, though config.json says "
            "`tie_word_embeddings: true`. Set that to false in a copy of the model."
        )
    return stored


def _report(part: Part, left: list[str]) -> None:
    if left:
        groups = sorted({name.split(".")[0] for name in left})
        log.info("%s: %d tensors are left behind (%s).", part.folder, len(left), ", ".join(groups))
        log.debug("left behind: %s", ", ".join(left))


def _open(name: str) -> tuple[Path, Any]:
    folder = find_model_folder(name)
    content = read_json(folder / "config.json")
    refuse_remote_code(folder)
    refuse_original_llava(folder, content)
    kind = str(content.get("model_type"))
    with reading(folder / "config.json", f"transformers does not take it (model_type {kind[:50]!r}): correct it."):
        return folder, AutoConfig.from_pretrained(folder)


def _tower_name(stored: str) -> str | None:
    if _BESIDE_THE_TOWER.match(stored):
        return None
    return TOWER + stored.removeprefix("vision_model.")


def _language_model_name(stored: str, prefix: str) -> str:
    if stored.startswith("lm_head."):
        return stored
    return BODY + stored.removeprefix(prefix)


def _part_of_llava(*prefixes: str) -> Callable[[str], str | None]:
    def to_stock(stored: str) -> str | None:
        name = to_module_name(stored)
        return name if name.startswith(prefixes) else None

    return to_stock
