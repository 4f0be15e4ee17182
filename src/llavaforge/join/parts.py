"""Two pre-trained parts become one LLaVA folder: the story of `llavaforge customize-model`.

Comes in: a `CustomizeModelConfig`. Goes out: a folder that plain transformers opens, proved to be its parts, and a
table of parameters on stdout.
"""

import copy
import difflib
import logging
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaConfig, LlavaProcessor
from transformers.activations import ACT2FN

from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.errors import UserError, reading
from llavaforge.join.embedding import num_embeddings
from llavaforge.join.image_processor import prepare_image_processor
from llavaforge.join.prove import prove, refuse_settings_without_place
from llavaforge.join.sources import HEAD, TOWER, Part, match_tensors, open_language_model, open_tower
from llavaforge.join.tensors import EMBEDDING, JoinedTensors, compare_files, part_parameters, stock_shapes
from llavaforge.join.tokenizer import IMAGE_TOKEN, prepare_tokenizer
from llavaforge.model_folder.card import PARTS, describe_part
from llavaforge.model_folder.projector import PROJECTOR, check_projector, new_projector, read_projector
from llavaforge.model_folder.read import read_generation_config
from llavaforge.model_folder.tensors import open_tensors
from llavaforge.model_folder.towers import TOWERS
from llavaforge.model_folder.verify import num_placeholders
from llavaforge.model_folder.write import check_output_dir, write_model_folder
from llavaforge.results import CustomizeModelResult

log = logging.getLogger(__name__)


def customize_model(config: CustomizeModelConfig) -> CustomizeModelResult:
    """Join a vision tower and a language model into one LLaVA folder.

    Returns:
        `output_dir`, `image_token_id`, and `parameters` of vision_tower, projector, language_model and total.

    Raises:
        UserError: a part is unsuitable or incomplete, an option does not fit, or the output folder is taken.
    """
    check_output_dir(config.output_dir, config.overwrite)
    tower, language_model = open_tower(config.vision_tower), open_language_model(config.language_model)
    check_output_dir(config.output_dir, config.overwrite, [tower.folder, language_model.folder])
    refuse_settings_without_place(language_model.folder, language_model.config)
    _warn_about(language_model)
    tokenizer, image_token_id = prepare_tokenizer(language_model.folder, config.chat_template)
    joined_config = _config(config, tower, language_model, image_token_id)
    processor = _processor(config, tower, tokenizer, joined_config)
    preprocessing = Preprocessing.of(processor.image_processor)
    tensors = _tensors(config, tower, language_model, joined_config)

    def check(folder: Path) -> None:
        compare_files(open_tensors(folder), tensors)
        prove(folder, tower, language_model, joined_config, preprocessing)

    write_model_folder(
        config.output_dir,
        config=joined_config,
        processor=processor,
        generation_config=read_generation_config(language_model.folder),
        tensors=tensors,
        overwrite=config.overwrite,
        check=check,
        records={PARTS: _origins(config, tower, language_model)},
    )
    parameters = part_parameters(stock_shapes(joined_config))
    _print_table(parameters, tower, language_model, config)
    return {"output_dir": str(config.output_dir), "image_token_id": image_token_id, "parameters": parameters}


def join_configs(vision_config: Any, text_config: Any, image_token_id: int, **options: Any) -> LlavaConfig:
    """Return the config of the joined model; CLS handling, image tokens and embedding rows follow from the parts.

    Args:
        vision_config: of a CLIP or SigLIP vision model.
        text_config: of a causal language model; its `vocab_size` grows when `image_token_id` does not fit.
        image_token_id: of `<image>`.
        options: further fields of `LlavaConfig`.
    """
    has_class_token = TOWERS[vision_config.model_type].has_class_token
    text_config = copy.deepcopy(text_config)
    text_config.vocab_size = num_embeddings(text_config.vocab_size, image_token_id)
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        vision_feature_select_strategy="default" if has_class_token else "full",
        tie_word_embeddings=text_config.tie_word_embeddings,
        **options,
    )


def _origins(config: CustomizeModelConfig, tower: Part, language_model: Part) -> dict[str, Any]:
    """Return what the model is made of, for `parts.json` and the model card."""
    source = config.projector_from
    known = Path(source).name if source and Path(source).expanduser().exists() else source
    projector = {"name": known or f"new, seed {config.seed}"}
    return {
        "vision_tower": describe_part(tower.folder),
        "projector": projector,
        "language_model": describe_part(language_model.folder),
    }


def _warn_about(language_model: Part) -> None:
    if language_model.config.model_type == "gemma":
        log.warning(
            "%s: transformers 4 multiplies a Gemma's image features by the square root of the width, 5 does not. "
            "Use the joined model with the version that trained it.",
            language_model.folder,
        )


def _config(config: CustomizeModelConfig, tower: Part, language_model: Part, image_token_id: int) -> LlavaConfig:
    num_states = tower.config.num_hidden_layers + 1
    if not -num_states <= config.vision_feature_layer < num_states:
        raise UserError(
            f"vision_feature_layer = {config.vision_feature_layer}: {tower.folder} has {num_states} hidden states; "
            f"give a number from {-num_states} to {num_states - 1}."
        )
    if config.projector_hidden_act not in ACT2FN:
        near = difflib.get_close_matches(config.projector_hidden_act, list(ACT2FN), n=3, cutoff=0.3)
        raise UserError(
            f"projector_hidden_act = {config.projector_hidden_act!r}: unknown; allowed are {near or 'gelu'} ..."
        )
    return join_configs(
        tower.config,
        language_model.config,
        image_token_id,
        projector_hidden_act=config.projector_hidden_act,
        vision_feature_layer=config.vision_feature_layer,
        multimodal_projector_bias=config.projector_bias,
        dtype=_dtype(config, language_model),
    )


def _dtype(config: CustomizeModelConfig, language_model: Part) -> torch.dtype:
    """Return the type that readers load the model in: the one asked for, else the language model's own.

    With `auto` a tower may keep another type in its file; `from_pretrained` then converts it on the way in.
    """
    if config.torch_dtype != "auto":
        return getattr(torch, config.torch_dtype)
    stored = (name for name in language_model.files if language_model.to_stock(name) == EMBEDDING)
    return language_model.files.dtype(next(stored, next(iter(language_model.files))))


def _processor(config: CustomizeModelConfig, tower: Part, tokenizer: Any, joined_config: LlavaConfig) -> LlavaProcessor:
    processor = LlavaProcessor(
        image_processor=prepare_image_processor(tower.folder, tower.config, config.image_aspect_ratio),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=joined_config.vision_feature_select_strategy,
        num_additional_image_tokens=int(TOWERS[tower.config.model_type].has_class_token),
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
    )
    _, pixels_NCHW = num_placeholders(processor)
    edge = tower.config.image_size
    if pixels_NCHW.shape[-2:] != (edge, edge):
        height, width = pixels_NCHW.shape[-2:]
        raise UserError(
            f"{tower.folder}: preprocessor_config.json makes images of {height} x {width} pixels; the tower of "
            f"config.json takes {edge} x {edge}. Correct `size` and `crop_size`."
        )
    return processor


def _tensors(
    config: CustomizeModelConfig, tower: Part, language_model: Part, joined_config: LlavaConfig
) -> JoinedTensors:
    """Find every tensor of the joined model in the parts; only the projector is drawn (or read)."""
    with reading(language_model.folder, "transformers' LLaVA does not take this kind of model: choose another."):
        shapes = stock_shapes(joined_config)
    projector_shapes = {
        name.removeprefix(PROJECTOR): shape for name, shape in shapes.items() if name.startswith(PROJECTOR)
    }
    tower_shapes = {name: shape for name, shape in shapes.items() if name.startswith(TOWER)}
    text_shapes = {name: shapes[name] for name in shapes if not name.startswith((TOWER, PROJECTOR))}
    for name in text_shapes.keys() & {EMBEDDING, HEAD}:  # as many rows as the source has
        text_shapes[name] = torch.Size([language_model.config.vocab_size, shapes[name][1]])
    sources = {name: (tower.files, stored) for name, stored in match_tensors(tower, tower_shapes).items()}
    sources |= {
        name: (language_model.files, stored) for name, stored in match_tensors(language_model, text_shapes).items()
    }
    if config.projector_from:
        projector = read_projector(config.projector_from)
        check_projector(config.projector_from, projector, projector_shapes)
    else:
        std = getattr(joined_config.text_config, "initializer_range", None) or 0.02
        projector = new_projector(projector_shapes, std, config.seed, joined_config.dtype)
    return JoinedTensors(
        sources=sources,
        projector={PROJECTOR + name: tensor for name, tensor in projector.items()},
        num_embeddings=joined_config.text_config.vocab_size,
        dtype=None if config.torch_dtype == "auto" else joined_config.dtype,
    )


def _print_table(parameters: dict[str, int], tower: Part, language_model: Part, config: CustomizeModelConfig) -> None:
    sources = {
        "vision_tower": config.vision_tower,
        "projector": config.projector_from or f"new (seed {config.seed})",
        "language_model": config.language_model,
        "total": str(config.output_dir),
    }
    table = Table("part", "parameters", "from")
    table.columns[1].justify = "right"
    for part, count in parameters.items():
        table.add_row(part.replace("_", " "), f"{count:,}", sources[part], end_section=part == "language_model")
    Console().print(table)
