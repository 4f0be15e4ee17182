"""Models of all families as transformers has them and as `forecast` reckons them."""

from typing import Any

from transformers import CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

import tiny_parts
from llavaforge.config.schema import EstimateConfig, LearningOptions
from llavaforge.forecast.read import sizes_of_llava
from llavaforge.forecast.sizes import TEXT_FAMILIES, ModelSizes

KINDS = ("projector", "use_lora", "freeze_vision", "full")
# Settings that change what a layer is made of.
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in TEXT_FAMILIES},
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
}
TOWERS: dict[str, Any] = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}


def llava(text: str = "qwen2", tower: str = "clip", **options: Any) -> LlavaConfig:
    """A config whose every size shows in a sum: no two are alike, heads are not `width / number` where they may be."""
    family, settings = TEXTS[text]
    config_class, of_family = tiny_parts.FAMILIES[family]
    sizes = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=5, num_attention_heads=4)
    heads = {"head_dim": 24} if family in ("qwen3", "gemma") else {}
    text_config = config_class(**{**tiny_parts._SIZES, **of_family, **sizes, **heads, **settings})
    vision_config = TOWERS[tower](
        hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14
    )
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=text_config.vocab_size - 1,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        **options,
    )


def reckoned(config: LlavaConfig) -> ModelSizes:
    return sizes_of_llava(config.to_dict(), "config.json")


def learning(kind: str, **options: Any) -> LearningOptions:
    return LearningOptions.model_validate({"train_type": kind, "lora_r": 6, **options})


def estimate_config(**options: Any) -> EstimateConfig:
    return EstimateConfig.model_validate({"gpu": "h200", **options})
