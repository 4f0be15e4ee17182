import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration

from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.errors import UserError
from llavaforge.join.parts import customize_model
from llavaforge.model_folder.projector import read_projector
from llavaforge.model_folder.tensors import open_tensors

NAMES = ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"]
PROJECTOR = {
    "linear_1.weight": torch.randn(32, 24),
    "linear_1.bias": torch.randn(32),
    "linear_2.weight": torch.randn(32, 32),
    "linear_2.bias": torch.randn(32),
}
LLAVA_NAMES = {name: name.replace("linear_1", "0").replace("linear_2", "2") for name in NAMES}


def pickled(path: Path, prefix: str) -> Path:
    torch.save({f"{prefix}mm_projector.{LLAVA_NAMES[name]}": PROJECTOR[name] for name in NAMES}, path)
    return path


def assert_is_projector(found: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(NAMES)
    assert all(torch.equal(found[name], PROJECTOR[name]) for name in NAMES)


@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model."])
def test_llava_s_mm_projector_bin_is_read_as_a_file_and_in_its_folder(prefix: str, tmp_path: Path):
    path = pickled(tmp_path / "mm_projector.bin", prefix)
    assert_is_projector(read_projector(str(path)))
    assert_is_projector(read_projector(str(tmp_path)))


@pytest.mark.parametrize("prefix", ["multi_modal_projector.", "model.multi_modal_projector."])
def test_a_model_folder_of_any_naming_is_read_and_a_run_s_folder_leads_to_its_final(prefix: str, tmp_path: Path):
    final = tmp_path / "run/final"
    final.mkdir(parents=True)
    save_file({prefix + name: PROJECTOR[name] for name in NAMES} | {"x": torch.zeros(1)}, final / "model.safetensors")
    assert_is_projector(read_projector(str(final)))
    assert_is_projector(read_projector(str(tmp_path / "run")))


def test_a_peft_adapter_is_read(tmp_path: Path):
    prefix = "base_model.model.model."
    tensors = {f"{prefix}multi_modal_projector.{name}": PROJECTOR[name] for name in NAMES}
    lora = {f"{prefix}language_model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)}
    save_file(tensors | lora, tmp_path / "adapter_model.safetensors")
    assert_is_projector(read_projector(str(tmp_path)))


def test_a_source_without_a_projector_of_two_layers_is_refused(tmp_path: Path):
    torch.save({"model.mm_projector.weight": torch.zeros(2, 2)}, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="holds no projector of two layers"):
        read_projector(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        read_projector(str(tmp_path / "nothing/at/all"))


def join(tiny_clip: Path, language_model: Path, output_dir: Path, source: Path, **options) -> Path:
    customize_model(
        CustomizeModelConfig(
            vision_tower=str(tiny_clip),
            language_model=str(language_model),
            output_dir=output_dir,
            projector_from=str(source),
            **options,
        )
    )
    return output_dir


def test_a_trained_projector_lands_in_the_joined_model(tiny_clip, tiny_lm: Callable[[str], Path], tmp_path: Path):
    source = pickled(tmp_path / "mm_projector.bin", "model.")
    folder = join(tiny_clip, tiny_lm("qwen2"), tmp_path / "out", source)
    projector = LlavaForConditionalGeneration.from_pretrained(folder).model.multi_modal_projector
    assert_is_projector({name: tensor.detach() for name, tensor in projector.named_parameters()})
    assert json.loads((folder / "config.json").read_text())["multimodal_projector_bias"] is True
    bf16 = open_tensors(join(tiny_clip, tiny_lm("qwen2"), tmp_path / "bf16", source, torch_dtype="bfloat16"))
    stored = bf16["multi_modal_projector.linear_1.weight"]
    assert torch.equal(stored, PROJECTOR["linear_1.weight"].bfloat16())


def test_a_projector_that_does_not_fit_is_refused_with_the_remedy(
    tiny_clip, tiny_siglip, tiny_lm: Callable[[str], Path], tmp_path: Path
):
    source = pickled(tmp_path / "mm_projector.bin", "model.")
    with pytest.raises(UserError, match="--projector_bias true"):
        join(tiny_clip, tiny_lm("qwen2"), tmp_path / "out", source, projector_bias=False)
    wide = {f"mm_projector.{LLAVA_NAMES[name]}": torch.zeros(3, *PROJECTOR[name].shape[1:]) for name in NAMES}
    torch.save(wide, source)
    with pytest.raises(UserError, match=r"has shape \[3.* ask for \[32"):
        join(tiny_clip, tiny_lm("qwen2"), tmp_path / "out", source)
    assert not (tmp_path / "out").exists()
