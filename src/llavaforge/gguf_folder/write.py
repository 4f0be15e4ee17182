"""A folder for llama.cpp and Ollama: `model.gguf`, `mmproj.gguf`, a `Modelfile` and a card.

Comes in: a model folder. Goes out: the folder, read back and compared: every tensor with the model's, and the image
embeddings that `mmproj.gguf` yields with those of plain transformers.
"""

import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from llavaforge.gguf_folder.chat_template import for_llama_cpp, for_ollama
from llavaforge.gguf_folder.files import GgufFile, ModelTensors, check_tensors, write_gguf
from llavaforge.gguf_folder.language_model import (
    LANGUAGE_FAMILIES,
    add_language_fields,
    check_text_config,
    plan_language_model,
)
from llavaforge.gguf_folder.mmproj import add_vision_fields, check_vision, embeddings, plan_mmproj
from llavaforge.gguf_folder.tokenizer import add_tokenizer_fields, pre_tokenizer_name, spaces_of
from llavaforge.model_folder.card import PARTS, RUN, gguf_card, read_records
from llavaforge.model_folder.json_files import read_json
from llavaforge.model_folder.read import read_config, read_generation_config, read_processor
from llavaforge.model_folder.tensors import open_tensors

log = logging.getLogger(__name__)

MODEL, MMPROJ, MODELFILE = "model.gguf", "mmproj.gguf", "Modelfile"
_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_SEES = ("model.vision_tower.", "model.multi_modal_projector.")

# Largest difference of an embedding, as a share of the largest one. Towers of 24 layers yield the same bits, and 6e-3
# where weights are rounded to bfloat16. GELU is exact in some CLIPs and has its tanh form alone in llama.cpp.
_BOUND, _ROUNDED_BOUND = 1e-5, 3e-2


def check_gguf(folder: Path) -> None:
    """Check, before anything is written, that a model folder can be written as GGUF.

    Raises:
        UserError: it cannot; the message says what can.
    """
    config = read_config(folder)
    check_text_config(config.text_config)
    check_vision(config)
    path = folder / "tokenizer.json"
    if path.is_file():  # older folders have other files; transformers makes this one of them
        pre_tokenizer_name(read_json(path), path)


def write_gguf_folder(target: Path, source: Path, gguf_type: str) -> float:
    """Write and verify a folder.

    Args:
        target: an empty folder, to be published by the caller.
        source: the model folder, as transformers opens it.
        gguf_type: of the matrices: `f32`, `f16`, `bf16`, or `auto`, the type that the model has.

    Returns:
        The largest difference between an image embedding of `mmproj.gguf` and of plain transformers.

    Raises:
        UserError: see `check_gguf`; or a number does not fit into the type.
        RuntimeError: what was written is not the model.
    """
    check_gguf(source)
    config, processor, model = read_config(source), read_processor(source), ModelTensors(open_tensors(source))
    stored = model.dtype("model.language_model.embed_tokens.weight")
    dtype = stored if gguf_type == "auto" else _TYPES[gguf_type]
    language = plan_language_model(config.text_config, model, dtype)
    vision = plan_mmproj(config, model, dtype)

    def add_language(writer: GGUFWriter) -> None:
        writer.add_type("model")
        add_language_fields(writer, config.text_config)
        _add_text_fields(writer, source, config, processor)

    def add_vision(writer: GGUFWriter) -> None:
        add_vision_fields(writer, config, processor.image_processor)

    architecture = LANGUAGE_FAMILIES[config.text_config.model_type].architecture
    write_gguf(target / MODEL, architecture, dtype, add_language, language, model)
    write_gguf(target / MMPROJ, "clip", dtype, add_vision, vision, model)
    num_tensors = sum(check_tensors(target / name, plan, model) for name, plan in ((MODEL, language), (MMPROJ, vision)))
    difference = _check_embeddings(target / MMPROJ, config, model, is_rounded=dtype != stored)
    log.info(
        "verified: %d tensors are the model's; mmproj.gguf yields its image embeddings (largest difference %.2g)",
        *(num_tensors, difference),
    )
    records, tokenizer, template = read_records(source), processor.tokenizer, _template(processor)
    ollama = for_ollama(template, tokenizer.special_tokens_map, spaces_of(source)) if template is not None else None
    if ollama is None:
        log.warning("there is no chat template that Ollama's language can say: the Modelfile has none")
    ends = [tokenizer.convert_ids_to_tokens(number) for number in _ends(source, tokenizer)]
    (target / MODELFILE).write_text(_modelfile(ollama, ends), encoding="utf-8")
    card = gguf_card(config, processor.image_processor, _NAMES[dtype], records.get(PARTS), records.get(RUN))
    (target / "README.md").write_text(card, encoding="utf-8")
    return difference


def _add_text_fields(writer: GGUFWriter, source: Path, config: LlavaConfig, processor: LlavaProcessor) -> None:
    tokenizer, suppressed = processor.tokenizer, [int(config.image_token_index)]
    add_tokenizer_fields(writer, source, config.text_config.vocab_size, _ends(source, tokenizer), tokenizer, suppressed)
    if (template := _template(processor)) is not None:
        writer.add_chat_template(for_llama_cpp(template, tokenizer.special_tokens_map, spaces_of(source)))


def _template(processor: LlavaProcessor) -> str | None:
    template = processor.chat_template or processor.tokenizer.chat_template
    return template if isinstance(template, str) else None


def _ends(source: Path, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer, as the folder's generation config has them."""
    ends = read_generation_config(source).eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return [int(number) for number in (ends if isinstance(ends, list) else [ends]) if number is not None]


def _check_embeddings(path: Path, config: LlavaConfig, model: ModelTensors, is_rounded: bool) -> float:
    """Compare the image embeddings of a written file with those of plain transformers, both in float32.

    Raises:
        RuntimeError: they differ.
    """
    edge = config.vision_config.image_size
    pixels_NCHW = torch.randn(2, 3, edge, edge, generator=torch.Generator().manual_seed(0))
    expected, found = _stock_embeddings(config, model, pixels_NCHW), embeddings(GgufFile(path), pixels_NCHW)
    share = _ROUNDED_BOUND if is_rounded or config.vision_config.hidden_act == "gelu" else _BOUND
    difference, bound = float((expected - found).abs().max()), share * float(expected.abs().max())
    if not difference <= bound:
        raise RuntimeError(
            f"{path}: an image embedding differs from the model's by {difference:.3g}, more than {bound:.3g}"
        )
    return difference


@torch.no_grad()
def _stock_embeddings(config: LlavaConfig, model: ModelTensors, pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """Compute the image embeddings with transformers' own Llava, which gets no language model."""
    alone = deepcopy(config)
    alone.text_config = LlamaConfig(
        hidden_size=config.text_config.hidden_size,
        num_hidden_layers=0,
        vocab_size=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    stock = LlavaForConditionalGeneration(alone).float().eval()
    weights = {name: model[name].float() for name in model if name.startswith(_SEES)}
    unlike = set(weights) ^ {name for name, _ in stock.named_parameters() if name.startswith(_SEES)}
    assert not unlike, f"{sorted(unlike)[0]} is not in both"
    stock.load_state_dict(weights, strict=False)
    return torch.stack(list(stock.get_image_features(pixels_NCHW).pooler_output))


def _modelfile(template: str | None, ends: list[str]) -> str:
    lines = [f"FROM ./{MODEL}", f"FROM ./{MMPROJ}"]
    lines += [f'TEMPLATE """{template}"""'] if template is not None else []
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends]
    return "\n".join([*lines, "PARAMETER temperature 0"]) + "\n"
