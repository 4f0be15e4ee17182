import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
)

import tiny_parts
from llavaforge.cli import main
from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.errors import UserError
from llavaforge.join.parts import customize_model
from llavaforge.model_folder.projector import new_projector
from llavaforge.model_folder.tensors import open_tensors
from llavaforge.model_folder.verify import load_verified

TinyLM = Callable[[str], Path]
ACCEPTED = [family for family in tiny_parts.FAMILIES if family not in ("gemma2", "phi")]


def join(tower: Path, language_model: Path, output_dir: Path, **options) -> Path:
    config = CustomizeModelConfig(
        vision_tower=str(tower), language_model=str(language_model), output_dir=output_dir, **options
    )
    customize_model(config)
    return output_dir


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def image() -> Image.Image:
    pixels = torch.randint(0, 256, (60, 90, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("family", ACCEPTED)
def test_every_family_gives_the_source_model_s_text_logits_to_the_bit(
    family: str, tiny_clip: Path, tiny_lm: TinyLM, tmp_path: Path
):
    source = tiny_lm(family)
    folder = join(tiny_clip, source, tmp_path / "out")
    ids = torch.randint(0, tiny_parts.VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source).eval()(ids).logits
        found = LlavaForConditionalGeneration.from_pretrained(folder).eval()(ids).logits
    assert torch.equal(expected, found)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied"])
def test_every_tensor_keeps_its_bytes_and_only_the_projector_is_new(
    family: str, tiny_clip: Path, tiny_lm: TinyLM, tmp_path: Path
):
    folder = join(tiny_clip, tiny_lm(family), tmp_path / "out")
    written, tower, text = open_tensors(folder), open_tensors(tiny_clip), open_tensors(tiny_lm(family))
    for name in written:
        if name.startswith("vision_tower."):
            assert same_bytes(written[name], tower[name.removeprefix("vision_tower.")]), name
        elif name.startswith("language_model."):
            assert same_bytes(written[name], text[name.removeprefix("language_model.")]), name
    assert sum(name.startswith("language_model.") for name in written) == len(text)
    assert ("language_model.lm_head.weight" in written) == (family == "qwen2")
    projector = [name for name in written if name.startswith("multi_modal_projector.")]
    assert len(projector) == 4
    assert len(written) == len(text) + len(projector) + sum(name.startswith("vision_model.") for name in tower)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is (family == "qwen2_tied")


@pytest.mark.parametrize(("kind", "tokens", "strategy", "additional"), [
    ("tiny_clip", 4, "default", 1), ("tiny_clip_vision", 4, "default", 1), ("tiny_siglip", 16, "full", 0),
])  # fmt: skip
def test_cls_handling_and_image_tokens_follow_from_the_tower(
    kind, tokens, strategy, additional, tiny_lm: TinyLM, tmp_path: Path, image, request
):
    tower = request.getfixturevalue(kind)
    folder = join(tower, tiny_lm("qwen2"), tmp_path / "out")
    processor, model = AutoProcessor.from_pretrained(folder), LlavaForConditionalGeneration.from_pretrained(folder)
    assert processor.num_additional_image_tokens == additional
    assert processor.vision_feature_select_strategy == model.config.vision_feature_select_strategy == strategy
    inputs = processor(images=image, text="<image>\nWhat?", return_tensors="pt")
    assert int((inputs["input_ids"] == 303).sum()) == tokens == model.config.image_seq_length
    model_class = SiglipVisionModel if kind == "tiny_siglip" else CLIPVisionModel
    with torch.no_grad():
        hidden = model_class.from_pretrained(tower)(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        expected = model.model.multi_modal_projector(hidden[:, 1:] if strategy == "default" else hidden)
        assert torch.equal(model.get_image_features(inputs["pixel_values"]).pooler_output[0], expected[0])
        assert model(**inputs).logits.isfinite().all()


def test_padding_gives_llava_1_5_s_square_of_the_mean_colour(tiny_clip: Path, tiny_lm: TinyLM, tmp_path: Path, image):
    processor = AutoProcessor.from_pretrained(
        join(tiny_clip, tiny_lm("qwen2"), tmp_path / "out", image_aspect_ratio="pad")
    )
    found = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    mean = processor.image_processor.image_mean
    square = Image.new("RGB", (90, 90), tuple(int(255 * value) for value in mean))
    square.paste(image, (0, 15))
    crop = AutoProcessor.from_pretrained(join(tiny_clip, tiny_lm("qwen2"), tmp_path / "crop"))
    expected = crop(images=square, text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(found, expected)
    assert not torch.equal(found, crop(images=image, text="<image>", return_tensors="pt")["pixel_values"])


def test_cropping_is_the_tower_s_own_processing(tiny_clip: Path, tiny_llava: Path, image):
    from transformers import AutoImageProcessor

    own = AutoImageProcessor.from_pretrained(tiny_clip)(images=image, return_tensors="pt")["pixel_values"]
    joined = AutoProcessor.from_pretrained(tiny_llava)(images=image, text="<image>", return_tensors="pt")
    assert torch.equal(joined["pixel_values"], own)


def test_the_embedding_grows_only_when_image_does_not_fit_and_old_rows_keep_their_bytes(
    tiny_clip: Path, tmp_path: Path
):
    for family in ("qwen2", "qwen2_tied"):
        source = tiny_parts.save_language_model(tmp_path / family, family, vocab_size=303, dtype=torch.bfloat16)
        folder = join(tiny_clip, source, tmp_path / f"out-{family}")
        old, new = open_tensors(source), open_tensors(folder)
        names = ["model.embed_tokens.weight", *(["lm_head.weight"] if family == "qwen2" else [])]
        for name in names:
            grown = new["language_model." + name]
            assert grown.shape[0] == 320 and same_bytes(grown[:303], old[name])
            mean = old[name].float().mean(0).to(torch.bfloat16)
            assert torch.equal(grown[303:], mean.expand(17, -1))
        config = json.loads((folder / "config.json").read_text())
        assert config["text_config"]["vocab_size"] == 320 and config["image_token_index"] == 303
        load_verified(folder)
    fits = tiny_parts.save_language_model(tmp_path / "fits", vocab_size=304)
    assert open_tensors(join(tiny_clip, fits, tmp_path / "out-fits")).shape(
        "language_model.model.embed_tokens.weight"
    ) == (304, 32)


def test_a_tokenizer_that_has_image_already_keeps_its_id(tiny_clip: Path, tmp_path: Path):
    source = tiny_parts.save_language_model(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", "<extra>"]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(source)
    folder = join(tiny_clip, source, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["image_token_index"] == 303
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    assert fields["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>", "<image>", "<extra>"]


def test_parts_of_other_types_keep_their_bytes_and_the_folder_loads_in_the_language_model_s(
    tiny_lm: TinyLM, tmp_path: Path
):
    tower = tiny_parts.save_clip(tmp_path / "clip", dtype=torch.float16)
    source = tiny_parts.save_language_model(tmp_path / "lm", dtype=torch.bfloat16)
    folder = join(tower, source, tmp_path / "out")
    written = open_tensors(folder)
    types = {name.split(".")[0]: written.dtype(name) for name in written}
    assert types == {
        "vision_tower": torch.float16,
        "language_model": torch.bfloat16,
        "multi_modal_projector": torch.bfloat16,
    }
    for options in ({}, {"dtype": "auto"}):
        model = LlavaForConditionalGeneration.from_pretrained(folder, **options)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_type_asked_for_holds_for_every_tensor(tiny_clip: Path, tiny_lm: TinyLM, tmp_path: Path):
    folder = join(tiny_clip, tiny_lm("qwen2"), tmp_path / "out", torch_dtype="bfloat16")
    written = open_tensors(folder)
    assert {written.dtype(name) for name in written} == {torch.bfloat16}
    assert LlavaForConditionalGeneration.from_pretrained(folder).dtype == torch.bfloat16


def test_pickled_and_sharded_parts_give_the_same_folder(tiny_clip: Path, tiny_lm: TinyLM, tiny_llava: Path, tmp_path):
    import shutil

    tower = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    torch.save(dict(open_tensors(tower)), tower / "pytorch_model.bin")
    (tower / "model.safetensors").unlink()
    source = Path(shutil.copytree(tiny_lm("qwen2"), tmp_path / "lm"))
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="50KB")
    assert (source / "model.safetensors.index.json").is_file()
    folder = join(tower, source, tmp_path / "out")
    assert (folder / "model.safetensors").read_bytes() == (tiny_llava / "model.safetensors").read_bytes()


def test_a_folder_saved_again_by_transformers_can_be_customised_again(tiny_llava: Path, tmp_path: Path):
    saved = tmp_path / "saved"
    LlavaForConditionalGeneration.from_pretrained(tiny_llava).save_pretrained(saved)
    AutoProcessor.from_pretrained(tiny_llava).save_pretrained(saved)
    load_verified(saved)
    folder = join(saved, saved, tmp_path / "out", projector_from=str(saved))
    assert (folder / "model.safetensors").read_bytes() == (tiny_llava / "model.safetensors").read_bytes()
    for name in ("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((tiny_llava / name).read_text()), name
    assert (folder / "chat_template.jinja").read_text() == (tiny_llava / "chat_template.jinja").read_text()
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    assert fields["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>", "<image>"]


def test_the_projector_is_drawn_as_transformers_does_and_from_the_seed(tiny_clip, tmp_path: Path):
    source = tiny_parts.save_language_model(tmp_path / "lm", hidden_size=128, initializer_range=0.07)
    folder = join(tiny_clip, source, tmp_path / "out", seed=3)
    files, prefix = open_tensors(folder), "multi_modal_projector."
    written = {name.removeprefix(prefix): files[name] for name in files if name.startswith(prefix)}
    again, other = (
        new_projector({name: tensor.shape for name, tensor in written.items()}, 0.07, seed, torch.float32)
        for seed in (3, 4)
    )
    assert all(torch.equal(written[name], again[name]) for name in written)
    assert not torch.equal(written["linear_2.weight"], other["linear_2.weight"])
    by_transformers = LlavaForConditionalGeneration(AutoConfig.from_pretrained(folder)).model.multi_modal_projector
    for weight, bias in (
        (written["linear_2.weight"], written["linear_1.bias"]),
        (by_transformers.linear_2.weight, by_transformers.linear_1.bias),
    ):
        assert weight.std().item() == pytest.approx(0.07, rel=0.03) and abs(weight.mean().item()) < 0.003
        assert not bias.any()


def test_projector_options_reach_the_model(tiny_clip: Path, tiny_lm: TinyLM, tmp_path: Path):
    options = {"projector_hidden_act": "relu", "projector_bias": False, "vision_feature_layer": -1}
    folder = join(tiny_clip, tiny_lm("qwen2"), tmp_path / "out", **options)
    model = load_verified(folder)
    projector = model.model.multi_modal_projector
    assert isinstance(projector.act, torch.nn.ReLU) and projector.linear_1.bias is None
    assert model.config.vision_feature_layer == -1


def test_defaults_for_chat_template_pad_token_and_image_processor_come_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tower = tiny_parts.save_clip(tmp_path / "clip", whole=False, processor=False)
    source = tiny_parts.save_language_model(tmp_path / "lm")
    tiny_parts.save_tokenizer(source, chat_template=None, pad=False)
    (source / "chat_template.jinja").unlink(missing_ok=True)
    with caplog.at_level(logging.WARNING):
        folder = join(tower, source, tmp_path / "out")
    for text in ("no chat template; ChatML", "has no preprocessor_config.json"):
        assert text in caplog.text
    processor = AutoProcessor.from_pretrained(folder)
    rendered = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.pad_token is not None


def test_the_processor_turns_a_conversation_with_an_image_into_inputs_and_an_answer(tiny_llava: Path, image):
    model, processor = load_verified(tiny_llava), AutoProcessor.from_pretrained(tiny_llava)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is in the picture?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    expected = "<|im_start|>user\n" + "<image>" * 4 + "\nWhat is in the picture?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.decode(inputs["input_ids"][0]) == expected
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_a_chat_template_file_replaces_the_model_s_own(tiny_clip: Path, tiny_lm: TinyLM, tmp_path: Path):
    template = tmp_path / "mine.jinja"
    template.write_text("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")
    folder = join(tiny_clip, tiny_lm("qwen2"), tmp_path / "out", chat_template=template)
    content = [{"type": "image"}, {"type": "text", "text": "Hi"}]
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.apply_chat_template([{"role": "user", "content": content}]) == "[<image>\nHi]"
    template.write_text("{% for message in messages %}")
    with pytest.raises(UserError, match=r"mine.jinja: does not render a simple question"):
        join(tiny_clip, tiny_lm("qwen2"), tmp_path / "other", chat_template=template)


def test_the_command_line_prints_the_table_and_one_json_line(tiny_clip, tiny_lm: TinyLM, tmp_path: Path, capsys):
    output_dir = tmp_path / "a/b"
    command = ["customize-model", "--vision-tower", str(tiny_clip), "--language_model", str(tiny_lm("qwen2"))]
    assert main([*command, "--output_dir", str(output_dir)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    model = LlavaForConditionalGeneration.from_pretrained(output_dir)
    counts = {
        "vision_tower": sum(p.numel() for p in model.model.vision_tower.parameters()),
        "projector": sum(p.numel() for p in model.model.multi_modal_projector.parameters()),
        "language_model": sum(p.numel() for p in [*model.model.language_model.parameters(), model.lm_head.weight]),
        "total": sum(p.numel() for p in model.parameters()),
    }
    assert result == {"output_dir": str(output_dir), "image_token_id": 303, "parameters": counts}
    assert f"{counts['total']:,}" in printed and "vision tower" in printed
    assert main([*command, "--output_dir", str(output_dir)]) == 2
    assert main([*command, "--output_dir", str(output_dir), "--overwrite"]) == 0
