"""The FLOP formula against torch's own counter, which sees every matrix product that the step module really does.

torch counts what is done, the formula what the mathematics needs. They differ by design in two things:

- causal attention: the math kernel computes all T x T scores of a sample, the formula counts the T(T+1)/2 that exist;
  `masked_scores` reckons the other half, and the test adds it to the formula;
- recomputation (gradient checkpointing, a loss in pieces) does not belong to model FLOPs; it is off here.

What remains must agree to rounding, so a wrong factor of a small part (the projector, a LoRA) shows as well.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from llavaforge.config.schema import TrainConfig
from llavaforge.data.index.index import Row
from llavaforge.data.load.pack import Pack, make_pack
from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.data.storage.image_ref import ImageRef
from llavaforge.model.flops import FlopCounter
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import parameter_groups
from train_tools import TRAIN_TYPES

SIDE, PATCH, IMAGE_TOKEN, NUM_IMAGE_TOKENS = 56, 14, 99, 16
HEAD_SIZE = 16
# Text tokens of each sample, its <image> included, and how many of them are supervised, at the end.
SAMPLES = ((40, 10), (9, 3), (23, 12))


def model_of(tower: type = CLIPVisionConfig, feature_layer: int = -2) -> Any:
    """A model whose parts are all of a size that shows in the sum; grouped-query attention."""
    vision = tower(
        hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    strategy = "default" if tower is CLIPVisionConfig else "full"
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=NUM_IMAGE_TOKENS,
        vision_feature_layer=feature_layer, vision_feature_select_strategy=strategy,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def pack_of(samples: Sequence[tuple[int, int]], with_image: bool = True) -> Pack:
    rows: list[Row] = []
    for length, supervised in samples:
        ids = [1 + place % 90 for place in range(length)]
        ids[2] = IMAGE_TOKEN if with_image else 1
        images = (ImageRef("a.jpg"),) if with_image else ()
        rows.append(Row(0, "rows", 0, "", images, np.array(ids), np.array([length - supervised, length]), length))
    pixels = [np.zeros((3, SIDE, SIDE), dtype=np.uint8)] * (len(rows) if with_image else 0)
    return make_pack(rows, pixels, IMAGE_TOKEN, NUM_IMAGE_TOKENS)


def formula(model: Any, packs: Sequence[Pack]) -> float:
    counter = FlopCounter.of(model, NUM_IMAGE_TOKENS)
    return sum(counter.step(pack.lengths, pack.num_images, pack.num_supervised) for pack in packs)


def counted(model: Any, pack: Pack, recompute_every: int = 0) -> int:
    """What torch counts of one forward and backward pass."""
    steps = Preprocessing(None, (SIDE, SIDE), None, 3, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    module = StepModule(model, steps, recompute_every)
    module.train()
    # Only the math kernel's products are seen one by one; torch has no formula for the CPU's flash kernel, nor for a
    # product that is added in place.
    in_place: Any = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as mode:
        module(pack).backward()
    return mode.get_total_flops()


def masked_scores(model: Any, pack: Pack, passes: int = 3) -> float:
    text = model.config.text_config
    hidden_pairs = sum(length**2 - length * (length + 1) / 2 for length in pack.lengths)
    # Two products (scores, values) of 2 FLOPs each in one forward pass; the backward pass counts as two.
    per_pair = passes * 4.0 * text.num_hidden_layers * text.num_attention_heads * HEAD_SIZE
    return per_pair * hidden_pairs


def prepared(train_type: str, **model_options: Any) -> Any:
    model = model_of(**model_options)
    values = {
        "model_name_or_path": "m", "data_path": "d", "output_dir": "o", "train_type": train_type, "lora_r": 6,
        "lora_alpha": 6,
    }  # fmt: skip
    parameter_groups(model, TrainConfig.model_validate(values))
    return model


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
@pytest.mark.parametrize("tower", [CLIPVisionConfig, SiglipVisionConfig])
@pytest.mark.parametrize("feature_layer", [-2, -1])
def test_formula_equals_torchs_counter(train_type: str, tower: type, feature_layer: int) -> None:
    model = prepared(train_type, tower=tower, feature_layer=feature_layer)
    pack = pack_of(SAMPLES)
    expected = formula(model, [pack]) + masked_scores(model, pack)
    assert counted(model, pack) == pytest.approx(expected, rel=1e-6)


# What is done beyond the mathematics, or left out in the first layer, relative to these few narrow layers: a zero
# goes through the projector (all types), and no gradient goes below the first LoRA.
@pytest.mark.parametrize(("train_type", "bound"), [("projector", 0.01), ("freeze_vision", 0.01), ("use_lora", 0.05)])
def test_samples_without_an_image(train_type: str, bound: float) -> None:
    """Without an image the projector learns nothing, and a frozen language model has nothing to hand back."""
    model = prepared(train_type)
    pack = pack_of(SAMPLES, with_image=False)
    passes = 3 if train_type != "projector" else 1
    expected = formula(model, [pack]) + masked_scores(model, pack, passes)
    assert counted(model, pack) == pytest.approx(expected, rel=bound)


@pytest.mark.parametrize("train_type", ["projector", "use_lora"])
def test_kept_features_cost_nothing(train_type: str) -> None:
    model, pack = prepared(train_type), pack_of(SAMPLES)
    pack.features_IPD = torch.zeros(pack.num_images, NUM_IMAGE_TOKENS, model.config.vision_config.hidden_size)
    pack.pixels_ICHW = pack.pixels_ICHW[:0]
    counter = FlopCounter.of(model, NUM_IMAGE_TOKENS).without_tower()
    expected = counter.step(pack.lengths, pack.num_images, pack.num_supervised) + masked_scores(model, pack)
    assert counted(model, pack) == pytest.approx(expected, rel=1e-6)


def test_unused_tower_layers_do_not_count() -> None:
    cut, whole = (prepared("full", feature_layer=layer) for layer in (-3, -1))
    pack = pack_of(SAMPLES)
    layer = whole.model.vision_tower.encoder.layers[0]
    matrices = 2 * sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    tokens = NUM_IMAGE_TOKENS + 1
    per_image = tokens * matrices + 4 * tokens**2 * 48
    assert formula(whole, [pack]) - formula(cut, [pack]) == pytest.approx(3 * 2 * len(SAMPLES) * per_image)


@pytest.mark.parametrize("train_type", ["use_lora", "full"])
def test_what_is_recomputed_is_counted_apart(train_type: str) -> None:
    """Of three layers: all, or two. torch stops early: of each layer's last product only the result is not needed."""
    model, pack = prepared(train_type), pack_of(SAMPLES)
    once = counted(model, pack)
    for every, layers in ((1, 3), (2, 2)):
        again = FlopCounter.of(model, NUM_IMAGE_TOKENS).recomputed(pack.lengths, every)
        last = layers * 2.0 * (6 if train_type == "use_lora" else 96) * 64 * pack.num_tokens
        scores = masked_scores(model, pack, 1) * layers / 3
        fresh = prepared(train_type)
        assert counted(fresh, pack, every) - once == pytest.approx(again + scores - last, rel=0.02)


def test_the_parts_are_the_whole() -> None:
    counter = FlopCounter.of(prepared("full"), NUM_IMAGE_TOKENS)
    parts = counter.by_part((40, 9), 2, 13)
    assert sum(parts.values()) == counter.step((40, 9), 2, 13) and min(parts.values()) > 0
    assert counter.by_part((40, 9), 0, 13)["vision_tower"] == 0
