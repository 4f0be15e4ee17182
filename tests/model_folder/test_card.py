"""A card says what a model is made of and how it was trained, and the hub can read it."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from llavaforge.config.schema import CustomizeModelConfig, ExportConfig
from llavaforge.inference.export import export
from llavaforge.join.parts import customize_model
from llavaforge.model_folder.card import PARTS, describe_part, model_card
from llavaforge.model_folder.read import read_config
from llavaforge.training.run import train
from train_tools import train_config

SHA = "0123456789abcdef0123456789abcdef01234567"


def test_a_part_of_the_hub_is_named_with_its_revision_and_licence(tiny_clip: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--openai--clip" / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    for file in tiny_clip.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n# CLIP\n")
    found, local = describe_part(snapshot), describe_part(tiny_clip)
    assert (found["name"], found["revision"], found["license"]) == ("openai/clip", SHA, "mit")
    assert (local["name"], local["revision"], local["license"]) == (tiny_clip.name, None, None)
    assert found["sha256"] == local["sha256"] and len(found["sha256"]) == 64


@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n", "---\n- a\n---\n", "\xff", "", "---\nlicense: 3\n---\n"])
def test_a_part_s_own_card_may_hold_anything(text: str, tiny_clip: Path, tmp_path: Path) -> None:
    for file in tiny_clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text(text, encoding="latin-1")
    assert describe_part(tmp_path)["license"] in (None, 3)


@pytest.mark.parametrize(
    "parts", [{}, {"vision_tower": 3}, {"vision_tower": {"revision": "x"}}, {"a": {"license": []}}]
)
@pytest.mark.parametrize("run", [{}, {"config": 3, "result": [], "data": 1}, {"data": [1, {"path": None}]}])
def test_records_that_were_edited_still_make_a_card(parts: Any, run: Any, tiny_llava: Path) -> None:
    assert model_card(read_config(tiny_llava), parts, run).startswith("---\nlibrary_name: transformers\n")


def test_cards_follow_the_model_from_the_join_to_the_export(
    tiny_clip: Path, tiny_lm: "object", shapes: Path, tmp_path: Path
) -> None:
    snapshots = []
    for name, source in (("openai--clip", tiny_clip), ("Qwen--Qwen1.5-4B-Chat", tiny_lm("qwen2"))):  # type: ignore[operator]
        snapshots.append(tmp_path / "hub" / f"models--{name}" / "snapshots" / SHA)
        snapshots[-1].mkdir(parents=True)
        for file in source.iterdir():
            (snapshots[-1] / file.name).write_bytes(file.read_bytes())
        (snapshots[-1] / "README.md").write_text("---\nlicense: mit\n---\n")
    customize_model(
        CustomizeModelConfig(
            vision_tower=str(snapshots[0]), language_model=str(snapshots[1]), output_dir=tmp_path / "model"
        )
    )
    folders = {"model": tmp_path / "model"}
    for train_type in ("projector", "use_lora"):
        run = tmp_path / train_type
        train(train_config(tmp_path / "model", shapes / "train", run, train_type=train_type, max_steps=2))
        export(ExportConfig(checkpoint=run / "final", output_dir=tmp_path / f"{train_type} exported"))
        folders |= {train_type: run / "final", f"{train_type} exported": tmp_path / f"{train_type} exported"}
    for name, folder in folders.items():
        front = metadata_load(folder / "README.md")
        assert front["base_model"] == ["openai/clip", "Qwen/Qwen1.5-4B-Chat"], name
        assert front["license"] == "mit" and front["pipeline_tag"] == "image-text-to-text"
        assert front["library_name"] == ("peft" if name == "use_lora" else "transformers")
        text = ModelCard.load(folder / "README.md").text
        assert SHA in text and str(tmp_path) not in text
        assert ("## Training" in text) == (name != "model")
        if name != "model":
            assert "| steps | 2 |" in text and "| data | train |" in text
        if name != "use_lora":
            assert json.loads((folder / PARTS).read_text())["vision_tower"]["revision"] == SHA
    assert "| lora_r |" in (folders["use_lora exported"] / "README.md").read_text()
    assert "| lora_r |" not in (folders["projector"] / "README.md").read_text()


def test_an_adapter_that_is_given_away_holds_no_private_path_and_moves_with_its_base(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home of someone"
    home.mkdir()
    base = home / "base"
    base.mkdir()
    for file in tiny_llava.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    train(train_config(base, shapes / "train", home / "run", train_type="use_lora", max_steps=2))
    for file in (home / "run" / "final").iterdir():
        if file.suffix in (".json", ".md", ".jinja") and file.name != "tokenizer.json":
            assert str(home) not in file.read_text() and str(shapes) not in file.read_text(), file.name
    home.rename(tmp_path / "elsewhere")
    result = export(ExportConfig(checkpoint=tmp_path / "elsewhere" / "run" / "final", output_dir=tmp_path / "exported"))
    assert result["max_logit_difference"] < 1e-3
