"""A card says what a model is made of and how it was trained, and the hub can read it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from llavaforge.checkpoint.state import without_private_paths
from llavaforge.config.schema import CustomizeModelConfig, ExportConfig
from llavaforge.errors import UserError
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


@pytest.mark.parametrize(
    "text", ["---\nlicense: [\n---\n", "---\n- a\n---\n", "\xff", "", "---\nlicense: 2024-01-01\n---\n"]
)
def test_a_part_s_own_card_may_hold_anything(text: str, tiny_clip: Path, tmp_path: Path) -> None:
    for file in tiny_clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text(text, encoding="latin-1")
    assert describe_part(tmp_path)["license"] is None


@pytest.mark.parametrize(
    "parts", [{}, {"vision_tower": 3}, {"vision_tower": {"revision": "x"}}, {"a": {"license": []}}]
)
@pytest.mark.parametrize(
    "run",
    [
        {},
        {"config": 3, "result": [], "data": 1},
        {"data": [1, {"path": None}]},
        {"hub_data": 3},
        {"curve": 3},
        {"curve": [{}, 1]},
        {"curve": [{"step": "a|b"}]},
    ],
)
def test_records_that_were_edited_still_make_a_card(parts: Any, run: Any, tiny_llava: Path) -> None:
    assert model_card(read_config(tiny_llava), parts, run).startswith("---\nlibrary_name: transformers\n")


def test_cards_follow_the_model_from_the_join_to_the_export(
    tiny_clip: Path, tiny_lm: "object", shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, repo_type: str(shapes / "train"))
    data = {"projector": shapes / "train", "use_lora": Path("someone/shapes")}  # the second one is the hub's
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
    for train_type, data_path in data.items():
        run = tmp_path / train_type
        train(train_config(tmp_path / "model", data_path, run, train_type=train_type, max_steps=2))
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
            named = "someone/shapes" if "lora" in name else "train"
            assert re.search(r"\| step \| loss \|\n.*\n\| 1 \| [\d.]+ \|\n\| 2 \| [\d.]+ \|", text), text
            assert "| steps | 2 |" in text and f"| data | {named} |" in text
            assert front.get("datasets") == (["someone/shapes"] if "lora" in name else None)
        if name != "use_lora":
            assert json.loads((folder / PARTS).read_text())["vision_tower"]["revision"] == SHA
    assert "| lora_r |" in (folders["use_lora exported"] / "README.md").read_text()
    assert "| lora_r |" not in (folders["projector"] / "README.md").read_text()


def test_an_adapter_that_is_given_away_holds_no_private_path_and_finds_its_base_from_the_run(
    tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home of someone", tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
    base = shutil.copytree(tiny_llava, home / "base")
    monkeypatch.chdir(home)  # adapter_config.json names the base as seen from here
    config = train_config(base, shapes / "train", elsewhere / "run", train_type="use_lora", max_steps=2)
    train(config.model_copy(update={"system_prompt": "/no_think ~~~"}))
    final = elsewhere / "run" / "final"
    for file in final.iterdir():
        if file.suffix in (".json", ".md", ".jinja") and file.name != "tokenizer.json":
            text = file.read_text()
            assert not {word for word in (home.name, str(tmp_path), "../") if word in text}, file.name
    assert "| system_prompt | /no_think ~~~ |" in (final / "README.md").read_text()
    assert export(ExportConfig(checkpoint=final, output_dir=tmp_path / "one"))["max_logit_difference"] < 1e-3
    given = shutil.copytree(final, tmp_path / "given away")
    with pytest.raises(UserError, match=r"its base model base is not there.*--base_model FOLDER"):
        monkeypatch.chdir(tmp_path)
        export(ExportConfig(checkpoint=given, output_dir=tmp_path / "two"))
    export(ExportConfig(checkpoint=given, base_model=base, output_dir=tmp_path / "two"))


def test_a_run_whose_system_prompt_begins_like_a_path_keeps_it(tmp_path: Path) -> None:
    run = {
        "config": {"system_prompt": "~~~ Be helpful", "output_dir": "~nobody/runs/a", "data": [{"path": "/x/y.json"}]}
    }
    found = without_private_paths(run)["config"]
    assert found == {"system_prompt": "~~~ Be helpful", "output_dir": "a", "data": [{"path": "y.json"}]}
