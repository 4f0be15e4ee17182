import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from llavaforge.model_folder.names import to_file_name, to_module_name

# (in memory, in our files, other names that transformers has written)
NAMES = [
    (
        "model.language_model.layers.0.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        ["language_model.layers.0.mlp.up_proj.weight"],
    ),
    ("lm_head.weight", "language_model.lm_head.weight", []),
    (
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        [
            "vision_tower.encoder.layers.0.mlp.fc1.weight",
            "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        ],
    ),
    ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias", []),
]


@pytest.mark.parametrize(("module", "file", "others"), NAMES)
def test_names_go_both_ways_and_every_older_style_is_understood(module, file, others):
    assert to_file_name(module) == file
    for name in [module, file, *others]:
        assert to_module_name(name) == module


@pytest.mark.parametrize("vision", [CLIPVisionConfig, SiglipVisionConfig])
def test_every_tensor_of_the_stock_model_has_one_legacy_name_that_leads_back(vision):
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    with torch.device("meta"):
        config = LlavaConfig(vision_config=vision(**small), text_config=Qwen2Config(**small, num_key_value_heads=2))
        names = list(LlavaForConditionalGeneration(config).state_dict())
    files = [to_file_name(name) for name in names]
    assert len(set(files)) == len(names) and [to_module_name(file) for file in files] == names
    assert {file.split(".")[0] for file in files} == {"language_model", "vision_tower", "multi_modal_projector"}
    assert all(file.startswith("vision_tower.vision_model.") for file in files if file.startswith("vision"))


@pytest.mark.parametrize("name", ["text_model.embeddings.weight", "model.embed_tokens.weight"])
def test_a_name_of_no_part_is_an_error(name):
    with pytest.raises(ValueError, match=name):
        to_module_name(name)
