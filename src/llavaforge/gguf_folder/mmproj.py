"""The vision tower, up to the layer that is read, and the projector as `mmproj.gguf`; and what that file computes.

Comes in: a model folder. Goes out: fields and a plan of tensors under llama.cpp's names:

    model.vision_tower.encoder.layers.0.self_attn.q_proj.weight -> v.blk.0.attn_q.weight
    model.multi_modal_projector.linear_1.weight                 -> mm.0.weight
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from gguf import GGUFWriter
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention
from transformers import LlavaConfig

from llavaforge.errors import UserError
from llavaforge.gguf_folder.files import GgufFile, GgufTensor, ModelTensors
from llavaforge.model_folder.towers import TOWERS

_OUTER = {
    "model.vision_tower.embeddings.class_embedding": "v.class_embd",
    "model.vision_tower.embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "model.vision_tower.embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "model.vision_tower.embeddings.position_embedding.weight": "v.position_embd.weight",
    "model.vision_tower.pre_layrnorm.weight": "v.pre_ln.weight",
    "model.vision_tower.pre_layrnorm.bias": "v.pre_ln.bias",
    "model.multi_modal_projector.linear_1.weight": "mm.0.weight",
    "model.multi_modal_projector.linear_1.bias": "mm.0.bias",
    "model.multi_modal_projector.linear_2.weight": "mm.2.weight",
    "model.multi_modal_projector.linear_2.bias": "mm.2.bias",
}
_LAYER = re.compile(r"^model\.vision_tower\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_IN_LAYER = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_UNREAD = ("model.vision_tower.post_layernorm.", "model.vision_tower.head.")

# The one switch between llama.cpp's activations: `use_gelu` or, without it, CLIP's quick one.
_IS_GELU = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}
_WHOLE = ("v.patch_embd.weight", "v.position_embd.weight")  # in float32: small, and not every backend takes less


def check_vision(config: LlavaConfig) -> None:
    """Check, before anything is written, that llama.cpp can compute tower and projector.

    Raises:
        UserError: it cannot.
    """
    vision, layer = config.vision_config, config.vision_feature_layer
    if vision.model_type not in TOWERS:
        raise UserError(f"--format gguf: the tower is a `{vision.model_type}`; {', '.join(TOWERS)} are written.")
    drops_first = config.vision_feature_select_strategy == "default"
    if drops_first != TOWERS[vision.model_type].has_class_token:
        raise UserError(
            f"--format gguf: vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; llama.cpp "
            "drops a CLIP's class token (`default`) and keeps all patches of a SigLIP (`full`)."
        )
    if not isinstance(layer, int) or not 1 <= num_layers_read(config) <= vision.num_hidden_layers:
        raise UserError(f"--format gguf: vision_feature_layer is {layer}; one layer of the tower is written.")
    if vision.hidden_act not in _IS_GELU:
        raise UserError(
            f"--format gguf: the tower's hidden_act is {vision.hidden_act!r}; {', '.join(_IS_GELU)} are written."
        )
    if config.projector_hidden_act != "gelu":
        raise UserError(f"--format gguf: projector_hidden_act is {config.projector_hidden_act!r}; llama.cpp has gelu.")
    if vision.intermediate_size == vision.hidden_size:
        raise UserError("--format gguf: llama.cpp mixes up a tower's two MLP matrices where they are square.")


def num_layers_read(config: LlavaConfig) -> int:
    """Return the number of layers that stand before the hidden states that the projector reads."""
    layer = config.vision_feature_layer
    return int(layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer)


def add_vision_fields(writer: GGUFWriter, config: LlavaConfig, image_processor: Any) -> None:
    """Add the fields that say how tower and projector compute, and how pixels are made."""
    vision, num_layers = config.vision_config, num_layers_read(config)
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(num_layers)
    writer.add_array("clip.vision.feature_layer", [num_layers])  # without it the last block would not be computed
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_use_gelu(_IS_GELU[vision.hidden_act])
    means, stds = image_processor.image_mean, image_processor.image_std
    if not image_processor.do_normalize:  # llama.cpp does in any case
        means, stds = [0.0] * 3, [1.0] * 3
    writer.add_vision_image_mean([float(value) for value in means])
    writer.add_vision_image_std([float(value) for value in stds])


def plan_mmproj(config: LlavaConfig, model: ModelTensors, dtype: torch.dtype) -> list[GgufTensor]:
    """Return the tensors of `mmproj.gguf`.

    Args:
        config: of the model.
        model: the folder's tensors.
        dtype: of the matrices.

    Raises:
        UserError: a tensor has no place in llama.cpp's tower.
    """
    return list(_plan(config, model, dtype))


def _plan(config: LlavaConfig, model: ModelTensors, dtype: torch.dtype) -> Iterator[GgufTensor]:
    for module in model:
        if not module.startswith(("model.vision_tower.", "model.multi_modal_projector.")) or module.startswith(_UNREAD):
            continue
        match, shape = _LAYER.match(module), model.shape(module)
        if match is not None and int(match[1]) >= num_layers_read(config):
            continue
        if match is not None and match[2] in _IN_LAYER:
            name = f"v.blk.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"
        elif module in _OUTER:
            name = _OUTER[module]
        else:
            raise UserError(f"--format gguf: the tower's tensor `{module}` has no place in llama.cpp's tower.")
        yield GgufTensor(name, module, shape, dtype if len(shape) > 1 and name not in _WHOLE else torch.float32)
    if not config.multimodal_projector_bias:  # llama.cpp adds them in any case
        for number in (0, 2):
            zeros = torch.zeros(config.text_config.hidden_size)
            yield GgufTensor(f"mm.{number}.bias", zeros, tuple(zeros.shape), torch.float32)


@torch.no_grad()
def embeddings(file: GgufFile, pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """Compute what `mmproj.gguf` says, from its own fields and tensors alone, in float32.

    It is llama.cpp's graph (tools/mtmd/models/llava.cpp) but for two things: the class token comes first, as in the
    towers' training, and the projector's GELU is the exact one.

    Args:
        file: `mmproj.gguf`.
        pixels_NCHW: normalised pixels.

    Returns:
        (N, patches, width of the language model).
    """
    weights, fields = {name: file[name].float() for name in file}, file.fields
    heads, eps = fields["clip.vision.attention.head_count"], fields["clip.vision.attention.layer_norm_epsilon"]

    def norm(hidden_NTD: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return layer_norm(hidden_NTD, weight.shape, weight, bias, eps)

    def dense(hidden_NTD: torch.Tensor, name: str) -> torch.Tensor:
        return linear(hidden_NTD, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def split(hidden_NTD: torch.Tensor) -> torch.Tensor:
        return hidden_NTD.unflatten(-1, (heads, -1)).transpose(1, 2)

    patch_bias, patch = weights.get("v.patch_embd.bias"), fields["clip.vision.patch_size"]
    hidden_NTD = conv2d(pixels_NCHW.float(), weights["v.patch_embd.weight"], patch_bias, stride=patch)
    hidden_NTD = hidden_NTD.flatten(2).transpose(1, 2)
    num_patches = hidden_NTD.shape[1]
    if "v.class_embd" in weights:
        first = weights["v.class_embd"].expand(len(hidden_NTD), 1, -1)
        hidden_NTD = torch.cat([first, hidden_NTD], dim=1)
    hidden_NTD = hidden_NTD + weights["v.position_embd.weight"]
    if "v.pre_ln.weight" in weights:
        hidden_NTD = norm(hidden_NTD, "v.pre_ln")
    for number in range(fields["clip.vision.feature_layer"][0]):
        block = f"v.blk.{number}"
        normed = norm(hidden_NTD, f"{block}.ln1")
        query, key, value = (split(dense(normed, f"{block}.attn_{one}")) for one in "qkv")
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden_NTD = hidden_NTD + dense(mixed, f"{block}.attn_out")
        inner = dense(norm(hidden_NTD, f"{block}.ln2"), f"{block}.ffn_up")
        inner = gelu(inner, approximate="tanh") if fields["clip.use_gelu"] else inner * torch.sigmoid(1.702 * inner)
        hidden_NTD = hidden_NTD + dense(inner, f"{block}.ffn_down")
    return dense(gelu(dense(hidden_NTD[:, -num_patches:], "mm.0")), "mm.2")
