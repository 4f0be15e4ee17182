import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny_parts
from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.errors import UserError
from llavaforge.join import parts, prove
from llavaforge.join.parts import customize_model
from llavaforge.join.sources import match_tensors
from llavaforge.model_folder.tensors import open_tensors, write_shards

TinyLM = Callable[[str], Path]


def assert_refused(tower: Path, language_model: Path, output_dir: Path, message: str, **options) -> None:
    config = CustomizeModelConfig(
        vision_tower=str(tower), language_model=str(language_model), output_dir=output_dir, **options
    )
    with pytest.raises(UserError, match=message):
        customize_model(config)
    assert not output_dir.exists() and not list(output_dir.parent.glob(".llavaforge-*"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = {**dict(open_tensors(folder)), **changes}
    write_shards(folder, "model", [(name, tensor) for name, tensor in tensors.items() if tensor is not None])


@pytest.fixture
def clip(tiny_clip: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_clip, tmp_path / "clip"))


@pytest.fixture
def lm(tiny_lm: TinyLM, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_lm("qwen2"), tmp_path / "lm"))


def test_a_head_bias_has_no_place_and_is_named(tiny_clip: Path, tiny_lm: TinyLM, tmp_path: Path):
    assert_refused(
        tiny_clip, tiny_lm("phi"), tmp_path / "out", r"tensor `lm_head.bias` \[384\] has no place in a LLaVA"
    )


def test_logit_soft_capping_has_no_place_and_is_named(tiny_clip: Path, tiny_lm: TinyLM, tmp_path: Path):
    assert_refused(tiny_clip, tiny_lm("gemma2"), tmp_path / "out", "the setting `final_logit_softcapping: 30.0`")


def test_what_no_table_knows_is_found_by_the_logits(tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prove, "_SETTINGS_WITHOUT_PLACE", {})
    source = tiny_parts.save_language_model(tmp_path / "gemma2", "gemma2", final_logit_softcapping=1.0)
    assert_refused(tiny_clip, source, tmp_path / "out", "text-only, the joined model is not this model: logits differ")


@pytest.mark.parametrize(
    ("swapped", "message"),
    [
        ("model.language_model.layers.1.self_attn.{}_proj.weight", "text-only, the joined model is not this model"),
        ("model.vision_tower.encoder.layers.2.self_attn.{}_proj.weight", "the joined model's tower is not this tower"),
    ],
)
def test_a_tensor_in_the_wrong_place_is_found_by_the_proof(
    swapped: str, message: str, tiny_clip: Path, tiny_lm: TinyLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def misplace(part, expected):
        placed = match_tensors(part, expected)
        a, b = swapped.format("q"), swapped.format("k" if "vision" in swapped else "o")
        if a in placed:
            placed[a], placed[b] = placed[b], placed[a]
        return placed

    monkeypatch.setattr(parts, "match_tensors", misplace)
    assert_refused(tiny_clip, tiny_lm("qwen2"), tmp_path / "out", message)


def test_a_hub_name_that_the_hub_does_not_give_is_the_user_s_error(lm: Path, tmp_path: Path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(Path("nobody/nothing-at-all"), lm, tmp_path / "out", "no such folder, and the hub does not give it")


def test_soft_capped_attention_is_refused_since_packed_training_would_leave_it_out(tiny_clip: Path, tmp_path: Path):
    options = {"final_logit_softcapping": None, "attn_logit_softcapping": 2.0}
    source = tiny_parts.save_language_model(tmp_path / "gemma2", "gemma2", **options)
    assert_refused(tiny_clip, source, tmp_path / "out", "asks its attention for `softcap`")


@pytest.mark.parametrize(
    ("part", "name"),
    [("lm", "model.layers.1.mlp.down_proj.weight"), ("clip", "vision_model.encoder.layers.0.mlp.fc1.bias")],
)
def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(part, name, clip: Path, lm: Path, tmp_path: Path):
    folder = {"lm": lm, "clip": clip}[part]
    tensor = open_tensors(folder)[name].clone()
    tail = name.split(".", 1)[1]
    rewrite(folder, {name: None})
    assert_refused(clip, lm, tmp_path / "out", rf"{part}: has no tensor for `model.*{tail}` \(1 of")
    extra = name.replace("mlp", "adapter")
    rewrite(folder, {name: tensor, extra: tensor.clone()})
    assert_refused(clip, lm, tmp_path / "out", rf"{part}: tensor `{extra}` .* has no place")
    rewrite(folder, {extra: None, name: tensor[1:]})
    assert_refused(clip, lm, tmp_path / "out", rf"{part}: tensor `{name}` has shape .*config.json asks for")


def test_old_files_buffers_are_left_behind(clip: Path, lm: Path, tmp_path: Path):
    rewrite(clip, {"vision_model.embeddings.position_ids": torch.arange(5)[None]})
    rewrite(lm, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    customize_model(CustomizeModelConfig(vision_tower=str(clip), language_model=str(lm), output_dir=tmp_path / "out"))
    assert not [name for name in open_tensors(tmp_path / "out") if name.endswith(("position_ids", "inv_freq"))]


def test_a_tied_head_that_differs_from_the_embedding_is_an_error(clip: Path, tiny_lm: TinyLM, tmp_path: Path):
    lm = Path(shutil.copytree(tiny_lm("qwen2_tied"), tmp_path / "lm"))
    embedding = open_tensors(lm)["model.embed_tokens.weight"].clone()
    rewrite(lm, {"lm_head.weight": embedding})
    customize_model(CustomizeModelConfig(vision_tower=str(clip), language_model=str(lm), output_dir=tmp_path / "tied"))
    assert "language_model.lm_head.weight" not in open_tensors(tmp_path / "tied")
    rewrite(lm, {"lm_head.weight": embedding + 1})
    assert_refused(clip, lm, tmp_path / "out", "`lm_head.weight` differs from the embedding")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(file: str, clip: Path, lm: Path, tmp_path: Path):
    edit(lm / file, auto_map={"AutoConfig": "configuration_x.XConfig"})
    assert_refused(clip, lm, tmp_path / "out", rf"{file}: asks for code of its own")


def test_parts_that_are_no_parts_are_refused(clip: Path, lm: Path, tmp_path: Path):
    assert_refused(lm, lm, tmp_path / "out", "is a `qwen2`. A vision tower is one of")
    assert_refused(clip, clip, tmp_path / "out", "is a `clip`, not a causal language model")
    assert_refused(tmp_path / "none/at/all", lm, tmp_path / "out", "no such folder")
    (lm / "config.json").unlink()
    assert_refused(clip, lm, tmp_path / "out", r"config.json: missing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_feature_layer": -5}, r"has 4 hidden states; give a number from -4 to 3"),
        ({"projector_hidden_act": "gelo"}, r"projector_hidden_act = 'gelo'.*gelu"),
        ({"chat_template": Path("none.jinja")}, "none.jinja: no such chat template"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, clip: Path, lm: Path, tmp_path: Path):
    assert_refused(clip, lm, tmp_path / "out", message, **options)


def test_an_image_processor_of_another_size_is_refused(clip: Path, lm: Path, tmp_path: Path):
    edit(clip / "preprocessor_config.json", crop_size={"height": 56, "width": 56}, size={"shortest_edge": 56})
    assert_refused(
        clip, lm, tmp_path / "out", r"makes images of 56 x 56 pixels; the tower of config.json takes 28 x 28"
    )


def test_a_language_model_without_tokenizer_is_refused(clip: Path, lm: Path, tmp_path: Path):
    for path in lm.glob("tokenizer*"):
        path.unlink()
    assert_refused(clip, lm, tmp_path / "out", "lm: has no tokenizer")


def test_a_part_is_never_overwritten(clip: Path, lm: Path):
    for folder in (lm, lm.parent):
        config = CustomizeModelConfig(vision_tower=str(clip), language_model=str(lm), output_dir=folder, overwrite=True)
        with pytest.raises(UserError, match=r"would replace|replaces a model folder only|no readable manifest"):
            customize_model(config)
    assert (lm / "model.safetensors").is_file()
