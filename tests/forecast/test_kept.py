"""What is kept for the backward pass, reckoned, against what autograd keeps when the model's forward runs."""

import cases
import pytest
import torch

from llavaforge.forecast.kept import activations_of
from llavaforge.machine.random_model import TINY, preprocessing, train_options
from llavaforge.model.memory import activations

TEXT = 64  # tokens beside the image, as `model/memory.py` counts


def check(config: object, kind: str, **options: object) -> None:
    options = {"lora_r": 6, **options}
    counted = activations(config, train_options(kind, **options), preprocessing(TINY), torch.bfloat16)
    sizes = cases.reckoned(config)  # type: ignore[arg-type]
    ours = activations_of(sizes, cases.learning(kind, **options), 2)
    tokens = sizes.num_image_tokens + TEXT
    rotary = 2 * sizes.text_config.head_dim * 2
    # The counted layers are two, and sine and cosine are among them.
    assert ours.layer_per_token + rotary / 2 == pytest.approx(counted.layer_per_token, rel=0.003)
    around = ours.others_per_token - rotary
    assert ours.per_image + tokens * around == pytest.approx(
        counted.per_image + tokens * counted.others_per_token, rel=0.005
    )  # of one image the features are a view with the class token, of two a copy without; what is counted lies between
    for name in ("input_per_token", "num_layers", "logits_per_supervised"):
        assert getattr(ours, name) == getattr(counted, name)


# What a tower keeps has nothing to do with the text; mistral's and tied layers keep what llama's and qwen2's do.
TEXTS, TEXT_KINDS = ("gemma", "llama", "phi3", "qwen2", "qwen3"), ("projector", "use_lora", "freeze_vision")
CASES = [(text, kind) for text in TEXTS for kind in TEXT_KINDS]
CASES += [("qwen2", "full"), ("llama biases", "freeze_vision"), ("qwen3 biases", "freeze_vision")]


@pytest.mark.parametrize(("text", "kind"), CASES)
def test_kept_is_what_autograd_keeps(text: str, kind: str) -> None:
    check(cases.llava(text), kind)


@pytest.mark.parametrize("kind", ["projector", "full"])
@pytest.mark.parametrize("layer", [-1, [-3, -1]])
def test_kept_of_a_siglip_and_other_features(kind: str, layer: int | list[int]) -> None:
    check(cases.llava("qwen2", "siglip", vision_feature_layer=layer), kind)


@pytest.mark.parametrize("text", ["qwen2", "phi3"])
@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.1}, {"lora_target_modules": ["q_proj", "o_proj", "qkv_proj"]},
     {"lora_target_modules": ["down_proj", "v_proj", "gate_up_proj"], "lora_dropout": 0.1}],
)  # fmt: skip
def test_kept_of_a_lora(text: str, options: dict[str, object]) -> None:
    check(cases.llava(text), "use_lora", **options)
