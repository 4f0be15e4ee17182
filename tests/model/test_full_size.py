"""CLIP-L/336 + Qwen1.5-4B at full size, on the meta device: the parameter counts of the published recipe."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from llavaforge.config.schema import TrainConfig
from llavaforge.model.trainable import parameter_groups


def published_model() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = Qwen2Config(
        hidden_size=2560, intermediate_size=6912, num_hidden_layers=40, num_attention_heads=20, num_key_value_heads=20,
        vocab_size=151_936, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=151_646)
        )


def config(**options: object) -> TrainConfig:
    return TrainConfig.model_validate({"model_name_or_path": "m", "data_path": "d", "output_dir": "o", **options})


def test_lora_of_rank_32_on_attention_is_26_214_400_parameters_in_the_language_model_alone() -> None:
    model = published_model()
    options = config(train_type="use_lora", lora_r=32, lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    groups = parameter_groups(model, options)
    lora = {name: p for group in groups if group.part == "lora" for name, p in group.parameters.items()}
    assert sum(parameter.numel() for parameter in lora.values()) == 26_214_400
    assert all(name.startswith("model.language_model.") for name in lora)
    projector = sum(group.num_parameters for group in groups if group.part == "projector")
    assert projector == 9_180_160
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for group in groups for name in group.parameters}


# CLIP's 24th layer and post_layernorm are never used at layer -2: 12,598,272 of the tower's 303,507,456 parameters.
@pytest.mark.parametrize(
    ("train_type", "expected"),
    [
        ("projector", 9_180_160),
        ("freeze_vision", 9_180_160 + 3_950_369_280),
        ("full", 4_263_056_896 - 12_596_224 - 2_048),
    ],
)
def test_what_learns_at_full_size(train_type: str, expected: int) -> None:
    model = published_model()
    groups = parameter_groups(model, config(train_type=train_type))
    assert sum(group.num_parameters for group in groups) == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_263_056_896


def test_default_rates_are_llavas() -> None:
    rates = {
        kind: {
            group.part: group.learning_rate
            for group in parameter_groups(published_model(), config(train_type=kind, lora_r=8))
        }
        for kind in ("projector", "use_lora", "full")
    }
    assert rates["projector"] == {"projector": 1e-3}
    assert rates["use_lora"] == {"projector": 2e-5, "lora": 2e-4}
    assert rates["full"] == pytest.approx({"vision_tower": 2e-6, "projector": 2e-5, "language_model": 2e-5})
