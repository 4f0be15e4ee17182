"""The proof that a joined model is its parts: same text logits, same image features, same token ids.

Comes in: the complete folder (not published yet) and the parts. Goes out: nothing, or a message that names what has no
place in a LLaVA. One model is in memory at a time; each is loaded by plain transformers.

Legend: B sequences, T tokens, D width, N images, C channels, H and W pixels.
"""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, LlavaConfig
from transformers.utils import logging as transformers_logging

from llavaforge.data.index.index import Row
from llavaforge.data.load.pack import make_pack
from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.errors import UserError, reading, reason
from llavaforge.join.sources import BODY, TOWER, Part
from llavaforge.join.tokenizer import load_tokenizer
from llavaforge.model.step import StepModule
from llavaforge.model_folder.names import is_buffer
from llavaforge.model_folder.verify import check_report, compare_logits, load_verified

log = logging.getLogger(__name__)

# Settings of language models that act on the logits after the head, where the stock LLaVA has nothing, and the value at
# which they do nothing. The proof would find them too, but only the table can tell what it is.
_SETTINGS_WITHOUT_PLACE: dict[str, float | None] = {
    "final_logit_softcapping": None,  # Gemma 2
    "logits_scaling": 1.0,  # Granite
    "logit_scale": 1.0,  # Cohere
    "lm_head_multiplier": 1.0,  # Falcon-H1
}

# The same operations on the same bytes give the same bits, but for one thing: a matrix product may take another path
# when a memory-mapped tensor starts at another alignment. Relative to the largest value.
_RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# Of the loss of two texts of a few tokens; with other samples in view it is another by far.
_PACKED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}

# Scripts, digits, spaces and newlines that tokenizers of every family split differently.
_PROBE_TEXTS = (
    "What is in the picture?\n\n  Two cats; 1,234 dogs\tand a naïve café.",
    "图片里有什么 <|im_start|>user\nHi<|im_end|>",
    "def f(x):\n    return x**2  # ok",
)


def refuse_settings_without_place(folder: Path, config: Any) -> None:
    """Refuse a language model whose config acts where a LLaVA has nothing.

    Raises:
        UserError: naming the setting.
    """
    for name, neutral in _SETTINGS_WITHOUT_PLACE.items():
        value = getattr(config, name, neutral)
        if value is not None and value != neutral:
            raise UserError(
                f"{folder}: the setting `{name}: {value}` of config.json has no place in a LLaVA: the joined model's "
                "logits would differ from this model's. Choose another language model."
            )


def prove(folder: Path, tower: Part, language_model: Part, config: LlavaConfig, preprocessing: Preprocessing) -> None:
    """Prove that the model in `folder` is its parts, and that it can be trained.

    Args:
        folder: the complete model folder.
        tower: compared at `config.vision_feature_layer`, on a fixed random image.
        language_model: compared on fixed random token ids.
        config: of the joined model; all three models are loaded in its `dtype`.
        preprocessing: of its image processor.

    Raises:
        UserError: they differ.
    """
    _release_memory()  # the writing before this converted tensors as well
    with _quiet():
        vocab_size, vision = language_model.config.vocab_size, tower.config
        ids_BT = torch.randint(0, vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        pixels_NCHW = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with reading(language_model.folder, "It does not run by itself. Choose another language model."):
            expected_logits = _logits(_load(language_model, config.dtype), ids_BT)
        _release_memory()
        expected_features = _features(_load(tower, config.dtype), pixels_NCHW, config.vision_feature_layer)
        _release_memory()
        model = load_verified(folder, dtype=config.dtype)
        with reading(language_model.folder, "It does not run within a LLaVA. Choose another language model."):
            logits = _logits(model, ids_BT)
        features = _features(model.model.vision_tower, pixels_NCHW, config.vision_feature_layer)
        compare_logits(
            expected_logits,
            logits,
            atol=_tolerance(expected_logits, config.dtype),
            what=f"{language_model.folder}: text-only, the joined model is not this model",
            hint="Something of it has no place in a LLaVA. Choose another language model.",
        )
        compare_logits(
            expected_features,
            features,
            atol=_tolerance(expected_features, config.dtype),
            what=f"{tower.folder}: the joined model's tower is not this tower (image features, not logits)",
        )
        _prove_training(model, preprocessing, language_model.folder)
    _compare_tokenizers(folder, language_model.folder)
    log.info("Proved: text logits and image features equal the parts'; a packed step trains.")


def _prove_training(model: Any, preprocessing: Preprocessing, source: Path) -> None:
    """Prove that packed texts do not see each other in this language model, and that its first layer gets a gradient.

    (Some architectures pass nothing on to their attention, and so cannot know where a sample ends.)

    Raises:
        UserError: they do, or it cannot.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [
        Row(0, "probe", length, "", (), ids.numpy().astype("int32"), np.array([1, length]), length)
        for length in (5, 9)
        for ids in [torch.randint(0, model.config.text_config.vocab_size, (length,), generator=generator)]
    ]
    step_module = StepModule(model.requires_grad_(False), preprocessing)
    first = next(model.model.language_model.layers[0].parameters()).requires_grad_()
    try:
        with torch.no_grad():
            apart = sum(float(step_module(make_pack([row], [], -1, 1))) for row in rows)
        together = step_module(make_pack(rows, [], -1, 1))
        together.backward()
        gradient = float(first.grad.float().norm()) if first.grad is not None else 0.0
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except Exception as error:  # whatever an architecture does that was not made for this
        raise UserError(
            f"{source}: a model joined with it cannot be trained ({reason(error)}). Choose another language model."
        ) from error
    difference = abs(float(together.detach()) - apart) / apart
    if not difference < _PACKED_TOLERANCE[model.dtype] or not 0 < gradient < float("inf"):
        raise UserError(
            f"{source}: a model joined with it cannot be trained: packed texts have another loss than one by one "
            f"(relative difference {difference:.2g}; gradient of the first layer {gradient:.2g}). Choose another "
            "language model."
        )


def _load(part: Part, dtype: torch.dtype) -> Any:
    """Load a part as a model of its own."""
    vision = part.config.model_type.endswith("vision_model")
    mapping = AutoModel._model_mapping if vision else AutoModelForCausalLM._model_mapping
    model_class = mapping[type(part.config)]
    same_type = all(part.files.dtype(name) == dtype for name in part.files)
    if same_type and not part.is_llava:
        model, report = model_class.from_pretrained(part.folder, dtype=dtype, output_loading_info=True)
    else:  # converted one by one: from_pretrained would keep the pages of the whole file beside what it converts
        state = _own_state(part, dtype, model_class.base_model_prefix)
        model, report = model_class.from_pretrained(
            None, config=part.config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    # What is too many was judged by `match_tensors`; here only what a source lacks matters.
    check_report(part.folder, {"missing_keys": report["missing_keys"], "mismatched_keys": report["mismatched_keys"]})
    return model.eval()


def _own_state(part: Part, dtype: torch.dtype, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a part in `dtype`, by the names they have when that part stands alone."""
    state: dict[str, torch.Tensor] = {}
    for stored in part.files:
        name = part.to_stock(stored)
        if name is None or is_buffer(stored):
            continue
        if not part.is_llava:
            name = stored
        elif name.startswith(TOWER):
            name = name.removeprefix(TOWER)
        elif name.startswith(BODY):
            name = f"{prefix}.{name.removeprefix(BODY)}"
        state[name] = part.files.converted(stored, dtype)
    return state


@torch.no_grad()
def _logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_BT, use_cache=False).logits.float()


@torch.no_grad()
def _features(tower: Any, pixels_NCHW: torch.Tensor, layer: int) -> torch.Tensor:
    """Return the hidden states of `layer` and of the last one, and what is pooled: every tensor has a say."""
    outputs = tower(pixels_NCHW.to(tower.dtype), output_hidden_states=True)
    states_NTD = [outputs.hidden_states[layer], outputs.hidden_states[-1]]
    if outputs.pooler_output is not None:
        states_NTD.append(outputs.pooler_output[:, None])
    return torch.cat(states_NTD, dim=1).float()


def _tolerance(expected: torch.Tensor, dtype: torch.dtype) -> float:
    return _RELATIVE_TOLERANCE[dtype] * float(expected.abs().max())


def _compare_tokenizers(folder: Path, source: Path) -> None:
    own, joined = load_tokenizer(source), AutoProcessor.from_pretrained(folder).tokenizer
    for text in _PROBE_TEXTS:
        expected, found = own(text).input_ids, joined(text).input_ids
        if expected != found:
            raise UserError(
                f"{source}: the tokenizer does not survive being saved: {text!r} becomes {found} instead of "
                f"{expected}. Give a folder with the tokenizer.json that the model was published with."
            )


def _release_memory() -> None:
    """Give back to the system what the last model took, before the next one is loaded.

    The models themselves are gone: they hold no reference cycles, and a test measures the peak. But
    glibc keeps freed blocks below 32 MB for itself (261 of 260 MB in a test that converted to bfloat16).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' load reports: our own checks say what matters."""
    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()
