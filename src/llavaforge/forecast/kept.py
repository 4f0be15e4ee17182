"""What a model keeps for the backward pass, reckoned from its sizes.

`model/memory.py` counts the same by running the model without data, which takes torch and seconds;
`tests/forecast/test_kept.py` compares the two for every family and train type.

A tensor is kept where the backward pass needs it: the input of a linear layer if its matrix learns or has a LoRA; what
an elementwise function was given; queries, keys, values, output and one number per head of attention. In eager mode
RMSNorm and SwiGLU keep more than they need; compiled (and liger's) kernels compute that again.
"""

from dataclasses import dataclass

from llavaforge.config.schema import LearningOptions
from llavaforge.config.train_types import TRAIN_TYPES
from llavaforge.forecast.sizes import Linear, ModelSizes, TextSizes
from llavaforge.model.activations import Activations, logits_bytes
from llavaforge.model.feature_layers import num_layers_used

_FLOAT32 = 4
_INDEX = 8  # bytes of a token id or a position


@dataclass(frozen=True)
class _Layer:
    """What one layer of the language model keeps per token: in all, and of it what compiled kernels do not keep."""

    kept: float
    spared: float


def activations_of(sizes: ModelSizes, options: LearningOptions, itemsize: int) -> Activations:
    """Return what a model keeps per token and per image.

    Args:
        sizes: of the model.
        options: what learns.
        itemsize: bytes of a number of the type that is computed in.
    """
    text, parts = sizes.text_config, TRAIN_TYPES[options.train_type].parts
    learns = "language_model" in parts
    layer = _layer(sizes, options, itemsize)
    final_norm = text.hidden_size * (_FLOAT32 + learns * _norm_bytes(text, itemsize)) + _FLOAT32
    rotary = 2 * text.head_dim * itemsize  # sine and cosine, which all layers share
    return Activations(
        layer_per_token=layer.kept,
        input_per_token=float(text.hidden_size * itemsize),
        others_per_token=float(final_norm + rotary + learns * _INDEX),
        per_image=_per_image(sizes, "vision_tower" in parts, itemsize),
        num_layers=text.num_hidden_layers,
        logits_per_supervised=logits_bytes(text.vocab_size, itemsize),
        compiled_share=1 - layer.spared / layer.kept,
    )


def _layer(sizes: ModelSizes, options: LearningOptions, itemsize: int) -> _Layer:
    text, learns = sizes.text_config, "language_model" in TRAIN_TYPES[options.train_type].parts
    width, inner, queries, keys = text.hidden_size, text.intermediate_size, text.width_of_queries, text.width_of_keys
    read_by = text.linears if learns else sizes.loras(options) if options.uses_lora else {}
    inputs = _inputs(text, read_by)
    # Two norms: their input in float32, a root mean square each, and what a learning weight multiplies.
    norms = 2 * (width * (_FLOAT32 + learns * _norm_bytes(text, itemsize)) + _FLOAT32)
    kept = norms + itemsize * (2 * queries + 2 * keys + 3 * inner + inputs) + _FLOAT32 * text.num_attention_heads
    spared = 2 * width * (_FLOAT32 - itemsize + learns * _norm_bytes(text, itemsize)) + itemsize * inner
    if text.family.normalises_heads:
        heads = text.num_attention_heads + text.num_key_value_heads
        kept += (queries + keys) * (_FLOAT32 + learns * itemsize) + _FLOAT32 * heads
        spared += (queries + keys) * (_FLOAT32 - itemsize + learns * itemsize)
    if text.family.is_fused:  # the values are a view of all that the fused layer made
        kept += itemsize * (queries + keys)
        kept += itemsize * queries * ("o_proj" in read_by)
    if options.uses_lora:
        kept += itemsize * options.lora_r * len(read_by)
        if options.lora_dropout:  # each layer draws anew: the mask and what it leaves, instead of the input
            kept += sum(2 * linear.inputs * itemsize for linear in read_by.values())
            kept -= itemsize * (inputs + queries * ("o_proj" in read_by) * text.family.is_fused)
    return _Layer(float(kept), float(spared))


def _inputs(text: TextSizes, read_by: dict[str, Linear]) -> int:
    """Return the width of all inputs that are kept for linear layers alone; attention keeps that of `o_proj`."""
    attention = any(name in read_by for name in ("q_proj", "k_proj", "v_proj", "qkv_proj"))
    mlp = any(name in read_by for name in ("gate_proj", "up_proj", "gate_up_proj"))
    return (attention + mlp) * text.hidden_size + ("down_proj" in read_by) * text.intermediate_size


def _norm_bytes(text: TextSizes, itemsize: int) -> int:
    """Return the bytes of a number that a norm's weight multiplies."""
    return _FLOAT32 if text.family.norm_in_float32 else itemsize


def _per_image(sizes: ModelSizes, tower_learns: bool, itemsize: int) -> float:
    vision, width, tokens = sizes.vision_config, sizes.text_config.hidden_size, sizes.num_image_tokens
    features, _ = sizes.projector
    # The projector's input, what its activation was given and has made, and the features put into the text.
    projector = itemsize * (tokens * features.inputs + 3 * tokens * width) + tokens * _INDEX
    if not tower_learns:
        return float(projector)
    rows, inner = vision.num_tokens, vision.intermediate_size
    # The sigmoid of CLIP's activation is kept too.
    activated = 3 if vision.hidden_act == "quick_gelu" else 2
    norm = vision.hidden_size * itemsize + 2 * _FLOAT32
    layer = 2 * norm + itemsize * (6 * vision.hidden_size + activated * inner) + _FLOAT32 * vision.num_attention_heads
    pixels = itemsize * vision.num_channels * vision.image_size**2
    before = rows * norm * vision.has_class_token
    return float(projector + pixels + before + num_layers_used(sizes) * rows * layer)
