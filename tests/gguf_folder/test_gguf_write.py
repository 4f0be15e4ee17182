"""What is written for llama.cpp holds the model: read back by gguf's reader, and by transformers' own."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

import tiny_parts
from llavaforge.cli import parse
from llavaforge.config.schema import CustomizeModelConfig, ExportConfig
from llavaforge.errors import UserError
from llavaforge.folders import differences
from llavaforge.gguf_folder import mmproj
from llavaforge.gguf_folder.files import GgufFile, ModelTensors, check_tensors
from llavaforge.gguf_folder.language_model import plan_language_model
from llavaforge.gguf_folder.mmproj import embeddings
from llavaforge.gguf_folder.write import check_gguf, write_gguf_folder
from llavaforge.inference.export import export
from llavaforge.join.parts import customize_model
from llavaforge.model_folder.read import read_config
from llavaforge.model_folder.tensors import open_tensors

TEXT = "What is in the picture? <|im_start|>42 red squares"


@pytest.fixture(scope="module")
def llava(
    tiny_clip: Path, tiny_siglip: Path, tiny_lm: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function from a tower, a language model's family and `customize-model` options to a joined model."""
    towers, made = {"clip": tiny_clip, "siglip": tiny_siglip}, {}

    def make(tower: str, family: str, **options: object) -> Path:
        key = (tower, family, *options.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("llava") / f"{tower}-{family}"
            parts = {"vision_tower": str(towers[tower]), "language_model": str(tiny_lm(family))}
            customize_model(CustomizeModelConfig(output_dir=made[key], **parts, **options))
        return made[key]

    return make


@pytest.fixture(scope="module")
def gguf(llava: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from the same to the folder for llama.cpp."""
    made: dict[Path, Path] = {}

    def make(tower: str, family: str, **options: object) -> Path:
        model = llava(tower, family, **options)
        if model not in made:
            made[model] = tmp_path_factory.mktemp("gguf")
            write_gguf_folder(made[model], model, "auto")
        return made[model]

    return make


@pytest.mark.parametrize(("tower", "family"), [("clip", "qwen2"), ("siglip", "llama")])
def test_fields_say_what_the_model_is(
    tower: str, family: str, llava: Callable[..., Path], gguf: Callable[..., Path]
) -> None:
    config = LlavaForConditionalGeneration.from_pretrained(llava(tower, family)).config
    text, vision = GgufFile(gguf(tower, family) / "model.gguf").fields, config.vision_config
    assert text["general.architecture"] == family
    assert text[f"{family}.block_count"] == config.text_config.num_hidden_layers
    assert text[f"{family}.attention.head_count_kv"] == config.text_config.num_key_value_heads
    assert text[f"{family}.rope.freq_base"] == config.text_config.rope_parameters["rope_theta"]
    assert text["tokenizer.ggml.tokens"][config.image_token_index] == "<image>"
    assert text["tokenizer.ggml.suppress_tokens"] == [config.image_token_index]
    assert text["tokenizer.ggml.eos_token_id"] == tiny_parts.NUM_TOKENS + 2
    assert text["tokenizer.ggml.add_bos_token"] is False
    assert len(text["tokenizer.ggml.tokens"]) == len(set(text["tokenizer.ggml.tokens"])) == tiny_parts.VOCAB_SIZE
    seen = GgufFile(gguf(tower, family) / "mmproj.gguf")
    assert seen.fields["general.architecture"] == "clip" and seen.fields["clip.projector_type"] == "mlp"
    assert seen.fields["clip.vision.image_size"] == vision.image_size
    assert seen.fields["clip.vision.block_count"] == vision.num_hidden_layers - 1  # -2 is read
    assert seen.fields["clip.use_gelu"] is (tower == "siglip")
    assert ("v.class_embd" in seen) is (tower == "clip")
    assert not any("post_ln" in name or f"v.blk.{vision.num_hidden_layers - 1}." in name for name in seen)


@pytest.mark.parametrize(
    ("tower", "options"),
    [
        ("clip", {}),
        ("siglip", {}),
        ("clip", {"vision_feature_layer": -1}),
        ("siglip", {"vision_feature_layer": 1, "projector_bias": False}),
    ],
    ids=str,
)
def test_mmproj_alone_yields_the_model_s_image_embeddings(
    tower: str, options: dict[str, object], llava: Callable[..., Path], gguf: Callable[..., Path]
) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava(tower, "qwen2", **options)).eval()
    file, edge = GgufFile(gguf(tower, "qwen2", **options) / "mmproj.gguf"), model.config.vision_config.image_size
    pixels_NCHW = torch.randn(3, 3, edge, edge, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = torch.stack(list(model.get_image_features(pixels_NCHW).pooler_output))
    torch.testing.assert_close(embeddings(file, pixels_NCHW), expected, rtol=0, atol=1e-5)
    file.fields["clip.use_gelu"] = not file.fields["clip.use_gelu"]  # what a wrong field would do
    assert (embeddings(file, pixels_NCHW) - expected).abs().max() > 1e-4


def test_a_tensor_under_another_s_name_is_noticed_before_anything_is_published(
    llava: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mmproj._IN_LAYER, "self_attn.q_proj", "attn_v")
    monkeypatch.setitem(mmproj._IN_LAYER, "self_attn.v_proj", "attn_q")
    with pytest.raises(RuntimeError, match="an image embedding differs"):
        export(ExportConfig(checkpoint=llava("clip", "qwen2"), output_dir=tmp_path / "out", format="gguf"))
    assert not any(tmp_path.iterdir())


def test_a_changed_byte_is_noticed(llava: Callable[..., Path], gguf: Callable[..., Path], tmp_path: Path) -> None:
    model = ModelTensors(open_tensors(llava("clip", "qwen2")))
    plan = plan_language_model(read_config(llava("clip", "qwen2")).text_config, model, torch.float32)
    content = bytearray((gguf("clip", "qwen2") / "model.gguf").read_bytes())
    content[-100] ^= 1
    (tmp_path / "model.gguf").write_bytes(content)
    assert check_tensors(gguf("clip", "qwen2") / "model.gguf", plan, model) == len(plan)
    with pytest.raises(RuntimeError, match="is not what the model has"):
        check_tensors(tmp_path / "model.gguf", plan, model)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied", "qwen3", "llama", "llama3_rope", "mistral_full"])
def test_transformers_own_reader_finds_the_same_language_model(
    family: str, llava: Callable[..., Path], gguf: Callable[..., Path]
) -> None:
    """It turns RoPE's rows back; of llama3's RoPE and of wide heads it reads nothing, so that it is told."""
    folder = gguf("siglip", family)
    whole = LlavaForConditionalGeneration.from_pretrained(llava("siglip", family)).eval()
    told = {"config": whole.config.text_config} if family in ("qwen3", "llama3_rope") else {}
    alone = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32, **told).eval()
    ids = AutoTokenizer.from_pretrained(llava("siglip", family))(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(alone(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=0, atol=1e-4)
    other = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    assert other(TEXT).input_ids == ids[0].tolist()


def test_rope_freqs_slow_each_frequency_as_llama3_s_rope_does(
    llava: Callable[..., Path], gguf: Callable[..., Path]
) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava("siglip", "llama3_rope"))
    file, scaled = (
        GgufFile(gguf("siglip", "llama3_rope") / "model.gguf"),
        model.model.language_model.rotary_emb.inv_freq,
    )
    width = file.fields["llama.rope.dimension_count"]
    plain = file.fields["llama.rope.freq_base"] ** -(torch.arange(0, width, 2) / width)
    torch.testing.assert_close(plain / file["rope_freqs.weight"], scaled, rtol=1e-6, atol=0)
    assert (scaled != plain).any()


@pytest.mark.parametrize(
    ("asked", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16), ("auto", torch.float32)]
)
def test_matrices_have_the_type_that_was_asked_for(
    asked: str, dtype: torch.dtype, llava: Callable[..., Path], tmp_path: Path
) -> None:
    difference = write_gguf_folder(tmp_path, llava("clip", "qwen2"), asked)
    assert (difference < 1e-5) is (asked == "auto")
    file = GgufFile(tmp_path / "model.gguf")
    assert {file[name].dtype for name in file if file[name].ndim > 1} == {dtype}
    assert {file[name].dtype for name in file if file[name].ndim == 1} == {torch.float32}


def test_a_bfloat16_model_keeps_its_bits(llava: Callable[..., Path], tmp_path: Path) -> None:
    folder = llava("clip", "llama", torch_dtype="bfloat16")
    write_gguf_folder(tmp_path, folder, "auto")
    stored = GgufFile(tmp_path / "model.gguf")["token_embd.weight"]
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    assert stored.dtype == torch.bfloat16 and torch.equal(stored, model.get_input_embeddings().weight)


def test_a_number_that_float16_does_not_hold_is_named(llava: Callable[..., Path], tmp_path: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava("clip", "qwen2"))
    model.get_input_embeddings().weight.data[3, 3] = 1e6
    folder = tmp_path / "model"
    folder.mkdir()
    for file in llava("clip", "qwen2").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(folder)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"embed_tokens.*float16.*--gguf_type f32 or bf16"):
        write_gguf_folder(tmp_path / "out", folder, "f16")


@pytest.mark.parametrize(
    ("tower", "family", "message"),
    [
        ("clip", "phi3", r"`phi3`; llama, mistral, qwen2, qwen3 are written"),
        ("clip", "qwen2_sliding", "sliding windows"),
        ("clip", "mistral", "sliding windows"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_before_anything_is_written(
    tower: str, family: str, message: str, llava: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(ExportConfig(checkpoint=llava(tower, family), output_dir=tmp_path / "out", format="gguf"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("config.json", '"projector_hidden_act": "gelu"', '"projector_hidden_act": "relu"', "projector_hidden_act"),
        ("config.json", '"hidden_act": "quick_gelu"', '"hidden_act": "relu"', "the tower's hidden_act"),
        ("config.json", 'strategy": "default"', 'strategy": "full"', "vision_feature_select_strategy"),
        ("config.json", '"vision_feature_layer": -2', '"vision_feature_layer": [-2, -1]', "vision_feature_layer"),
        (
            "config.json",
            '"rope_type": "default"',
            '"rope_type": "dynamic", "factor": 2.0',
            "default, linear and llama3",
        ),
        ("tokenizer.json", '"Isolated"', '"Removed"', "no name of llama.cpp's is known"),
    ],
)
def test_settings_that_llama_cpp_lacks_are_refused(
    name: str, old: str, new: str, message: str, llava: Callable[..., Path], tmp_path: Path
) -> None:
    for file in llava("clip", "qwen2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        check_gguf(tmp_path)


def test_export_publishes_a_folder_and_replaces_only_its_own(llava: Callable[..., Path], tmp_path: Path) -> None:
    config = ExportConfig(checkpoint=llava("siglip", "llama"), output_dir=tmp_path / "out", format="gguf")
    result = export(config)
    assert result["max_logit_difference"] == 0 and result["max_embedding_difference"] < 1e-5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.gguf", "mmproj.gguf", "Modelfile", "README.md", "manifest.json"}
    assert not differences(tmp_path / "out") and [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="not empty"):
        export(config)
    export(config.model_copy(update={"overwrite": True, "gguf_type": "f16"}))
    assert GgufFile(tmp_path / "out" / "model.gguf")["token_embd.weight"].dtype == torch.float16
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.txt"):
        export(config.model_copy(update={"overwrite": True}))


def test_the_card_says_how_to_start_and_what_differs(gguf: Callable[..., Path]) -> None:
    clip, siglip = ((gguf(*parts) / "README.md").read_text() for parts in (("clip", "qwen2"), ("siglip", "llama")))
    for text in (clip, siglip):
        assert "llama-server -m model.gguf --mmproj mmproj.gguf" in text and "no square" in text
    assert "25814" in clip and "25814" not in siglip
    assert "middle square" in clip and "squeezed" in siglip


def test_a_type_without_the_format_is_refused() -> None:
    with pytest.raises(UserError, match="gguf_type belongs to format gguf"):
        parse("export", ["--checkpoint", "final", "--output_dir", "out", "--gguf_type", "f16"])


def test_without_the_package_the_extra_is_named(
    llava: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'llavaforge\[gguf\]'"):
        export(ExportConfig(checkpoint=llava("clip", "qwen2"), output_dir=tmp_path / "out", format="gguf"))
