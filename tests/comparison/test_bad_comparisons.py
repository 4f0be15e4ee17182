"""Bad input of `compare`: exit code 2, what to do, and nothing trained."""

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llavaforge.cli import main

LORA = {"train_type": "use_lora", "lora_r": 4}


def write(folder: Path, model: Path, data: Path, **changes: Any) -> list[str]:
    values = {
        "model_name_or_path": str(model),
        "data_path": str(data / "train" / "questions.json"),
        "eval_data_path": str(data / "heldout" / "questions.json"),
        "output_dir": str(folder / "out"),
        "global_batch_size": 4,
        "dataloader_num_workers": 0,
        "variants": {"a": LORA, "b": {"train_type": "projector"}},
        "budget_samples": 8,
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({key: value for key, value in (values | changes).items() if value is not None}))
    return ["compare", str(recipe)]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no budget": ({"budget_samples": None}, "give one of budget_samples, budget_minutes and budget_flops"),
    "two budgets": ({"budget_minutes": 1}, "found budget_samples and budget_minutes"),
    "a budget below one step": ({"budget_samples": 3}, "less than one step of a, which takes 4"),
    "no FLOPs": ({"budget_samples": None, "budget_flops": 1}, "less than one step of a"),
    "no held-out data": ({"eval_data_path": None}, "give validation_split, eval_data_path or eval_data"),
    "a bound of several held-out data sets": (
        {"eval_data_path": None, "eval_data": [{"path": "a.json"}, {"path": "b.json"}], "max_eval_samples": 3},
        "give each its max_samples",
    ),
    "a bound of a split": (
        {"eval_data_path": None, "validation_split": 4, "max_eval_samples": 3},
        "say there how many are held out",
    ),
    "a variant that holds out others": (
        {
            "eval_data_path": None,
            "validation_split": 4,
            "variants": {"a": LORA, "b": LORA | {"data_path": "CHAT"}},
        },
        "variants, b: its data, quarantine or max_length makes it hold out other records than a does",
    ),
    "a split beside held-out data": (
        {"validation_split": 10},
        "give one of eval_data_path, eval_data and validation_split",
    ),
    "held-out data that is not there": ({"eval_data_path": "nowhere.json"}, "nowhere.json"),
    "one variant": ({"variants": {"a": LORA}}, "at least two"),
    "names that differ in case": ({"variants": {"a": LORA, "A": LORA}}, "differ not only in case"),
    "a name that is no folder's": ({"variants": {"../a": LORA, "b": LORA}}, "names a folder"),
    "a list of variants": ({"variants": [LORA, LORA]}, "dictionary"),
    "a variant's unknown key": (
        {"variants": {"a": LORA, "b": {"lora_rank": 4}}},
        "variants, b: unknown key `lora_rank`",
    ),
    "a variant's bad value": ({"variants": {"a": LORA, "b": {"lora_r": -1}}}, "variants, b: `lora_r` = -1"),
    "a variant's own seed": ({"variants": {"a": LORA, "b": {"seed": 1}}}, "`seed` is the same for all"),
    "a variant's own length": ({"variants": {"a": LORA, "b": {"max_steps": 9}}}, "by the budget"),
    "a variant that ends early": (
        {"variants": {"a": LORA, "b": {"early_stopping_patience": 2}}},
        "would end a run before its budget",
    ),
    "a seed twice": ({"seeds": [0, 0]}, "each is trained once"),
    "no seed": ({"seeds": []}, "at least 1 item"),
    "an unknown key": ({"sedes": [0]}, "Did you mean `seeds`?"),
    "no model": ({"model_name_or_path": "no-model"}, "no-model"),
    "a variant's missing model": ({"variants": {"a": LORA, "b": {"model_name_or_path": "no-model"}}}, "no-model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_before_anything_is_trained(
    case: str, tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, expected = BAD[case]
    changes = json.loads(json.dumps(changes).replace('"CHAT"', json.dumps(str(shapes / "train" / "chat.json"))))
    assert main(write(tmp_path, tiny_llava, shapes, **changes)) == 2
    told = capsys.readouterr()
    assert told.out == "" and "Traceback" not in told.err
    assert expected in told.err
    assert not (tmp_path / "out" / "runs").exists()


def test_folders_of_others_stay_as_they_are(
    tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = write(tmp_path, tiny_llava, shapes)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert main(words) == 2
    assert "not a comparison (it holds thesis.txt)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    (tmp_path / "out" / "thesis.txt").rename(tmp_path / "out" / "compare.json")
    assert main(words) == 2
    assert "compare.json: cannot be read" in capsys.readouterr().err


def test_two_comparisons_in_one_folder(
    tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".llavaforge.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(write(tmp_path, tiny_llava, shapes)) == 2
    assert "another process is comparing here" in capsys.readouterr().err


def test_the_stage_of_a_recipe_is_chosen_by_name(
    tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"name": "one", "lora_r": 0}, {"name": "two", "lora_r": 4}]
    words = write(tmp_path, tiny_llava, shapes, stages=stages, variants=None, budget_samples=1)
    assert main(words) == 2
    assert "`lora_r` = 0" in capsys.readouterr().err
    assert main([*words, "--stage", "two"]) == 2
    assert "stage 'two' goes on from what 'one' leaves" in capsys.readouterr().err
    words.append(f"--model_name_or_path={tiny_llava}")
    assert main([*words, "--stage", "two"]) == 2  # its budget is too small for the first of the four train types
    assert "less than one step of projector" in capsys.readouterr().err
    assert main([*words, "--stage", "three"]) == 2
    assert "no stage 'three'. Its stages: one, two" in capsys.readouterr().err


def test_several_processes_are_refused(
    tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert main(write(tmp_path, tiny_llava, shapes)) == 2
    assert "Start it without torchrun" in capsys.readouterr().err
