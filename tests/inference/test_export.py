"""What was exported is what was trained, and other tools open it."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llavaforge.checkpoint.trained import open_model
from llavaforge.config.schema import CustomizeModelConfig, ExportConfig
from llavaforge.errors import UserError
from llavaforge.inference.export import Sample, _generate, check_batch, export
from llavaforge.join.parts import customize_model
from llavaforge.model_folder.verify import load_verified
from llavaforge.model_folder.write import update_model_folder
from llavaforge.training.run import train
from train_tools import TRAIN_TYPES, tensors_of, train_config

FLOAT32_BOUND = 1e-5  # of the largest logit
BFLOAT16_BOUND = 1e-1  # of the largest logit: 5.6 % were seen of a tiny model with AMX; see inference/export.py


@pytest.fixture(scope="module")
def runs(tiny_llava: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each train type, with a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    for train_type in TRAIN_TYPES:
        train(train_config(tiny_llava, shapes / "train", folder / train_type, train_type=train_type, save_steps=5))
    return {train_type: folder / train_type for train_type in TRAIN_TYPES}


def logits(model: LlavaForConditionalGeneration, folder: Path, shapes: Path) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    image = Image.open(shapes / "heldout" / "images" / "shapes_heldout_000000.jpg")
    with torch.no_grad():
        inputs = processor(images=image, text=text, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("source", ["final", "checkpoint-5"])
@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_exported_equals_trained(
    train_type: str, source: str, runs: dict[str, Path], shapes: Path, tmp_path: Path
) -> None:
    checkpoint = runs[train_type] / source
    result = export(ExportConfig(checkpoint=checkpoint, output_dir=tmp_path / "out"))
    model, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = logits(open_model(str(checkpoint)).model, tmp_path / "out", shapes)
    bound = FLOAT32_BOUND * expected.abs().max().item()
    assert result["max_logit_difference"] <= bound
    torch.testing.assert_close(logits(model, tmp_path / "out", shapes), expected, rtol=0, atol=bound)
    if train_type != "use_lora":
        assert result["max_logit_difference"] == 0.0


def test_the_last_checkpoint_and_final_export_the_same_bytes(runs: dict[str, Path], tmp_path: Path) -> None:
    for source in ("final", "checkpoint-5"):
        export(ExportConfig(checkpoint=runs["use_lora"] / source, output_dir=tmp_path / source))
    one, other = (tensors_of(tmp_path / source) for source in ("final", "checkpoint-5"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_gguf_of_a_lora_equals_gguf_of_its_export(runs: dict[str, Path], tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=runs["use_lora"] / "final", output_dir=tmp_path / "plain"))
    for checkpoint, name in ((runs["use_lora"] / "checkpoint-5", "one"), (tmp_path / "plain", "other")):
        export(ExportConfig(checkpoint=checkpoint, output_dir=tmp_path / name, format="gguf"))
    for name in ("model.gguf", "mmproj.gguf", "Modelfile"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_bfloat16_model_exports_within_the_stated_bound(
    tiny_clip: Path, tiny_lm: "object", shapes: Path, tmp_path: Path
) -> None:
    customize_model(
        CustomizeModelConfig(
            vision_tower=str(tiny_clip),
            language_model=str(tiny_lm("qwen2")),  # type: ignore[operator]
            output_dir=tmp_path / "model",
            torch_dtype="bfloat16",
        )
    )
    train(train_config(tmp_path / "model", shapes / "train", tmp_path / "run", train_type="use_lora", bf16=True))
    export(ExportConfig(checkpoint=tmp_path / "run" / "final", output_dir=tmp_path / "out"))
    exported = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    expected = logits(open_model(str(tmp_path / "run" / "final")).model, tmp_path / "out", shapes).float()
    difference = (logits(exported, tmp_path / "out", shapes).float() - expected).abs().max()
    assert difference <= BFLOAT16_BOUND * expected.abs().max()


def test_exported_folder_survives_transformers_and_a_second_join(runs: dict[str, Path], tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=runs["use_lora"] / "final", output_dir=tmp_path / "out"))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    AutoProcessor.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    customize_model(
        CustomizeModelConfig(
            vision_tower=str(tmp_path / "again"),
            language_model=str(tmp_path / "again"),
            projector_from=str(tmp_path / "again"),
            output_dir=tmp_path / "joined",
        )
    )
    before, after = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "joined")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_base_model_that_moved_is_named_and_one_that_changed_is_noticed(
    tiny_clip: Path, tiny_lm: "object", shapes: Path, tmp_path: Path
) -> None:
    parts = dict(vision_tower=str(tiny_clip), language_model=str(tiny_lm("qwen2")))  # type: ignore[operator]
    customize_model(CustomizeModelConfig(**parts, output_dir=tmp_path / "model"))
    train(train_config(tmp_path / "model", shapes / "train", tmp_path / "run", train_type="use_lora", max_steps=2))
    config = ExportConfig(checkpoint=tmp_path / "run" / "final", output_dir=tmp_path / "out")
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"model is not there.*--base_model FOLDER"):
        export(config)
    export(config.model_copy(update={"base_model": tmp_path / "moved", "output_dir": tmp_path / "of moved"}))
    for wrong, message in (
        (tmp_path / "run", "is not the model that"),
        (tmp_path / "run" / "run.json", "is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            export(config.model_copy(update={"base_model": wrong}))
    with pytest.raises(UserError, match=r"is a whole model, which needs no base model"):
        export(ExportConfig(checkpoint=tmp_path / "moved", output_dir=tmp_path / "out", base_model=tmp_path / "moved"))
    customize_model(CustomizeModelConfig(**parts, output_dir=tmp_path / "model", seed=9))
    with pytest.raises(UserError, match=r"base model .* has changed since the run"):
        export(config)
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_and_what_is_not_empty_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a checkpoint-N nor a final"):
        export(ExportConfig(checkpoint=tmp_path / "absent", output_dir=tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        export(ExportConfig(checkpoint=runs["full"] / "final", output_dir=tmp_path / "full"))


def test_exported_config_carries_what_other_tools_read(runs: dict[str, Path], tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=runs["full"] / "final", output_dir=tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {"eos_token_id", "pad_token_id"} <= set(generation)
    assert generation["suppress_tokens"] == [config["image_token_index"]]
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).is_file()


def test_exported_folders_say_what_older_and_batched_clients_need(
    tiny_llava: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    for number, source in enumerate((tiny_llava, runs["full"] / "final", runs["use_lora"] / "final")):
        folder = tmp_path / str(number)
        export(ExportConfig(checkpoint=source, output_dir=folder))
        fields = json.loads((folder / "tokenizer_config.json").read_text())
        assert fields["tokenizer_class"] == "Qwen2Tokenizer"  # as the language model's own folder names it
        assert fields["model_input_names"] == ["input_ids", "attention_mask"]
        assert fields["padding_side"] == "left"
        template = (folder / "chat_template.jinja").read_text()
        assert fields["chat_template"] == template
        assert json.loads((folder / "chat_template.json").read_text()) == {"chat_template": template}
        card = (folder / "README.md").read_text()
        assert card.startswith("---\n") and "image-text-to-text" in card
        for path in (
            path for path in folder.iterdir() if path.name != "tokenizer.json" and path.suffix != ".safetensors"
        ):
            assert '"/' not in path.read_text() and str(tmp_path.parent) not in path.read_text(), path


def test_a_folder_that_pads_on_the_right_fails_the_proof(tiny_llava: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(ExportConfig(checkpoint=tiny_llava, output_dir=folder))
    model, processor = load_verified(folder), AutoProcessor.from_pretrained(folder)
    samples = [
        Sample(Image.new("RGB", (40, 30), colour), text)
        for colour, text in (("red", "What?"), ("blue", "What is it, and where?"))
    ]
    alone = [_generate(processor, model, [sample]) for sample in samples]
    check_batch(folder, model, samples, alone, bound=1e-3)
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"padding_side": "left"', '"padding_side": "right"'))
    with pytest.raises(RuntimeError, match="in a batch the answer to 'What\\?' differs"):
        check_batch(folder, model, samples, alone, bound=1e-3)


def test_an_export_that_answers_otherwise_than_the_trained_model_is_told(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that is written is another run's: its files are whole, its answers are not the ones asked for."""
    monkeypatch.setattr(
        "llavaforge.inference.export.merge",
        lambda folder, trained, overwrite: update_model_folder(folder, trained.base, {}),
    )
    with pytest.raises(RuntimeError, match="is not the trained model's"):
        export(ExportConfig(checkpoint=runs["use_lora"] / "final", output_dir=tmp_path / "out"))


def test_peft_opens_the_adapter_by_itself(
    tiny_llava: Path, runs: dict[str, Path], shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = runs["use_lora"] / "final"
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert not Path(named).is_absolute() and Path(named).resolve() == tiny_llava.resolve()
    model = AutoPeftModel.from_pretrained(adapter)
    expected = logits(open_model(str(adapter)).model, adapter, shapes)
    found = logits(model, adapter, shapes)
    torch.testing.assert_close(found, expected[..., : found.shape[-1]], rtol=0, atol=1e-4)


def test_export_never_replaces_what_it_reads(tiny_llava: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    for checkpoint, output_dir, message in (
        (runs["use_lora"] / "final", tiny_llava, "would replace"),  # its base model
        (runs["full"] / "final", runs["full"] / "final", "would replace"),  # itself
        (runs["full"] / "final", runs["full"], "would replace"),
        (runs["full"] / "final", runs["full"] / "final" / "exported", "lies inside"),
    ):
        before = sorted((path, path.stat().st_mtime_ns) for path in output_dir.parent.rglob("*"))
        with pytest.raises(UserError, match=message):
            export(ExportConfig(checkpoint=checkpoint, output_dir=output_dir, overwrite=True))
        assert before == sorted((path, path.stat().st_mtime_ns) for path in output_dir.parent.rglob("*"))
