"""How much memory a step takes, before it is taken: what a run's largest pack needs, by part.

Comes in: a model's config, what learns, and a pack's size. Goes out: bytes. What the layers keep for the backward pass
is not guessed: the model's forward runs on the `meta` device, where tensors have shapes only, and what autograd saves
is counted. Measured against a GPU in LOG.md.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, LlavaForConditionalGeneration

from llavaforge.config.schema import TrainConfig
from llavaforge.data.load.pack import Pack
from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.model.activations import Activations, logits_bytes
from llavaforge.model.step import StepModule
from llavaforge.model.tower import vision_backbone
from llavaforge.model.trainable import cast_parameters, set_trainable

_COUNTED = "llavaforge_counted"
_NUM_COUNTED = 2  # layers; all are alike
_TEXT = 64  # tokens beside the image in the pack that is counted


def activations(config: Any, options: TrainConfig, preprocessing: Preprocessing, dtype: torch.dtype) -> Activations:
    """Count what a model keeps per token and per image.

    Args:
        config: a `LlavaConfig`.
        options: what learns.
        preprocessing: of the model's image processor.
        dtype: that is computed in.
    """
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(copy.deepcopy(config), dtype=dtype)
    num_layers, body = config.get_text_config().num_hidden_layers, model.model.language_model
    body.layers = body.layers[:_NUM_COUNTED]
    set_trainable(model, options)
    cast_parameters(model, dtype)
    module = StepModule(model, preprocessing).train()
    AttentionInterface.register(_COUNTED, _counted_attention)
    model.set_attn_implementation({"vision_config": _COUNTED})
    one, two = (_saved(module, _pack(config, num_images)) for num_images in (1, 2))
    more = {part: two[part] - one[part] for part in two}
    text, tokens = config.get_text_config(), _num_tokens(config)
    return Activations(
        layer_per_token=more["layers"] / tokens / len(body.layers),
        input_per_token=float(text.hidden_size * dtype.itemsize),
        others_per_token=more["text"] / tokens,
        per_image=more["images"],
        num_layers=num_layers,
        logits_per_supervised=logits_bytes(text.vocab_size, dtype.itemsize),
    )


def _saved(module: StepModule, pack: Pack) -> dict[str, float]:
    """Return the bytes that autograd saves in a forward pass, parameters not counted, by where it saves them."""
    known = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    saved = {"images": 0.0, "layers": 0.0, "text": 0.0}
    alive, where = [], "text"

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            alive.append(tensor)  # else another storage may get its number
            saved[where] += storage.nbytes()
        return tensor

    def at(place: str) -> Any:
        def hook(*_: Any) -> None:
            nonlocal where
            where = place

        return hook

    model = module.model.model
    vision_backbone(module.model).embeddings.register_forward_pre_hook(at("images"))
    model.multi_modal_projector.register_forward_hook(at("text"))
    model.language_model.layers[0].register_forward_pre_hook(at("layers"))
    model.language_model.layers[-1].register_forward_hook(at("text"))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        module(pack)
    return saved


def _num_tokens(config: Any) -> int:
    """Return the tokens of one sample of `_pack`."""
    vision = config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2) + _TEXT


def _pack(config: Any, num_images: int) -> Pack:
    """Return a pack without contents of samples with an image each; one token of it is supervised."""
    vision, length = config.vision_config, _num_tokens(config)
    total = num_images * length

    def of(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return Pack(
        ids_T=of(total),
        image_positions_M=of(num_images * (length - _TEXT)),
        position_ids_T=of(total),
        cu_seqlens_N1=of(num_images + 1, dtype=torch.int32),
        lengths=(length,) * num_images,
        predictors_S=of(1),
        targets_S=of(1),
        pixels_ICHW=of(num_images, vision.num_channels, vision.image_size, vision.image_size, dtype=torch.uint8),
    )


def _counted_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    """Attention of the tower as its kernel on a GPU keeps it; on `meta` torch would keep all weights."""
    borders = torch.empty(query.shape[0] + 1, dtype=torch.int32, device="meta")
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    output = varlen_attn(q, k, v, borders, borders, query.shape[2], query.shape[2])
    assert isinstance(output, torch.Tensor)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None
