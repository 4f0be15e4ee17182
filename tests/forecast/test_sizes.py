"""Parameters from configs are those of transformers' modules, and what learns is what the trainer lets learn."""

import json
from pathlib import Path

import cases
import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import tiny_parts
from llavaforge.engine.memory import Counts
from llavaforge.errors import UserError
from llavaforge.forecast.read import read_sizes
from llavaforge.forecast.sizes import TEXT_FAMILIES, VISION_DEFAULTS
from llavaforge.join.tensors import part_parameters, stock_shapes
from llavaforge.machine.random_model import PUBLISHED, llava_config, random_model, train_options
from llavaforge.model.flops import Matrices
from llavaforge.model.trainable import set_trainable

META = torch.device("meta")
LORA_LAST = sorted(cases.KINDS, key=lambda kind: kind == "use_lora")  # of one model: it adds parameters


@pytest.mark.parametrize("tower", cases.TOWERS)
@pytest.mark.parametrize("text", cases.TEXTS)
def test_parameters_are_those_of_transformers_modules(text: str, tower: str) -> None:
    config = cases.llava(text, tower)
    assert cases.reckoned(config).parameters == part_parameters(stock_shapes(config))


@pytest.mark.parametrize("options", [{"vision_feature_layer": -1}, {"vision_feature_layer": [-3, -1]}])
def test_other_features(options: dict[str, object]) -> None:
    config = cases.llava(multimodal_projector_bias=False, **options)
    with META:
        model = LlavaForConditionalGeneration(config)
    sizes = cases.reckoned(config)
    assert sizes.parameters == part_parameters(stock_shapes(config))
    for kind in LORA_LAST:
        set_trainable(model, train_options(kind, lora_r=6))
        assert sizes.counts(cases.learning(kind)) == Counts.of(model), kind


@pytest.mark.parametrize(("text", "tower"), [*((text, "clip") for text in cases.TEXTS), ("qwen2", "siglip")])
def test_what_learns_and_the_products_are_the_trainers_own(text: str, tower: str) -> None:
    config = cases.llava(text, tower)
    with META:
        model = LlavaForConditionalGeneration(config)
    sizes = cases.reckoned(config)
    for kind in LORA_LAST:
        learning, options = set_trainable(model, train_options(kind, lora_r=6)), cases.learning(kind)
        counted = {part: sum(p.numel() for p in parameters.values()) for part, parameters in learning.items()}
        assert sizes.learning(options) == counted, kind
        assert sizes.counts(options) == Counts.of(model), kind
        assert sizes.matrices(options) == Matrices.of(model), kind


@pytest.mark.parametrize("kind", ["use_lora", "full"])
def test_the_published_model(kind: str) -> None:
    options = {"lora_target_modules": ["q_proj", "v_proj", "down_proj"], "lora_r": 8}
    model = random_model(PUBLISHED, META, torch.bfloat16)
    set_trainable(model, train_options(kind, **options))
    sizes = cases.reckoned(llava_config(PUBLISHED))
    assert sizes.parameters["total"] == 4_263_056_896
    assert sizes.counts(cases.learning(kind, **options)) == Counts.of(model)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_defaults_are_transformers(family: str) -> None:
    """A config.json may leave out what its class has as a default, as llava-hf's do."""
    none = {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = tiny_parts.FAMILIES[family][0](**none)
    for name, ours in TEXT_FAMILIES[family].defaults.items():
        theirs = getattr(config, name, None)
        follows = {"num_key_value_heads": config.num_attention_heads}
        follows |= {"head_dim": config.hidden_size // config.num_attention_heads}
        if not (ours is False and theirs is None):  # some classes lack the attribute
            assert (follows[name] if ours is None else ours) == (follows[name] if theirs is None else theirs), name


@pytest.mark.parametrize("config", [CLIPVisionConfig(), SiglipVisionConfig()], ids=lambda config: config.model_type)
def test_defaults_of_towers_are_transformers(config: object) -> None:
    for name, ours in VISION_DEFAULTS[config.model_type].items():  # type: ignore[attr-defined]
        assert getattr(config, name, False) == ours, name


def test_a_config_that_says_little_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """As llava-hf/llava-1.5-7b-hf writes its config.json; 7,063,427,072 parameters."""
    content = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32_064}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    sizes = read_sizes(cases.estimate_config(model_name_or_path=str(tmp_path)))
    assert sizes.parameters == part_parameters(stock_shapes(AutoConfig.from_pretrained(tmp_path)))
    assert sizes.parameters["total"] == 7_063_427_072


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
@pytest.mark.parametrize("rows", [tiny_parts.VOCAB_SIZE, tiny_parts.NUM_TOKENS + 3])
def test_two_parts_are_what_joins_to_one(family: str, rows: int, tiny_siglip: Path, tmp_path: Path) -> None:
    """Also where the embedding has no free row for `<image>`, and grows."""
    from llavaforge.config.schema import CustomizeModelConfig
    from llavaforge.join.parts import customize_model

    text = tiny_parts.save_language_model(tmp_path / "text", family, vocab_size=rows)
    parts = {"vision_tower": str(tiny_siglip), "language_model": str(text)}
    joined = customize_model(CustomizeModelConfig(**parts, output_dir=tmp_path / "joined"))
    for named in (parts, {"model_name_or_path": str(tmp_path / "joined")}):
        assert read_sizes(cases.estimate_config(**named)).parameters == joined["parameters"]


def test_a_whole_clip_and_a_llava_have_a_tower_too(tiny_clip: Path, tiny_llava: Path, tiny_lm: object) -> None:
    whole, part = (
        read_sizes(cases.estimate_config(vision_tower=str(tower), language_model=str(tiny_llava)))
        for tower in (tiny_clip, tiny_llava)
    )
    assert whole == part == read_sizes(cases.estimate_config(model_name_or_path=str(tiny_llava)))


def test_names_that_no_layer_has_are_refused() -> None:
    sizes = cases.reckoned(cases.llava("phi3"))
    with pytest.raises(UserError, match=r"match nothing.*qkv_proj"):
        sizes.counts(cases.learning("use_lora", lora_target_modules=["q_proj"]))
