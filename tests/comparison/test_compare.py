"""A comparison is made of ordinary runs, is reproduced from its seeds, and repeats nothing after an interruption."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import waiting
import yaml

from llavaforge.cli import main
from llavaforge.comparison import child
from llavaforge.training.metrics import read_metrics
from train_tools import train_config

VARIANTS: dict[str, Any] = {
    "projector": {"train_type": "projector"},
    "lora": {"train_type": "use_lora", "lora_r": 4, "lora_alpha": 8},
}
TIMED = ("samples_per_s", "peak_memory_bytes")
Recipe = Callable[..., list[str]]


@pytest.fixture(scope="module")
def recipe(tiny_llava: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A function from a folder and changes to the words that compare there."""
    folder = tmp_path_factory.mktemp("recipes")

    def write(output_dir: Path, **changes: Any) -> list[str]:
        config = train_config(tiny_llava, shapes / "train" / "questions.json", output_dir, warmup_ratio=0.0)
        values = config.model_dump(mode="json", exclude_unset=True)
        for name in ("train_type", "max_steps", "lora_r", "lora_alpha", "projector_learning_rate", "save_steps"):
            del values[name]
        values |= {
            "validation_split": 8,
            "variants": VARIANTS,
            "seeds": [0, 1],
            "budget_samples": 14,  # three steps of four, and two samples that make none
            "max_new_tokens": 4,
        }
        path = folder / f"{len(list(folder.iterdir()))}.yaml"
        path.write_text(
            yaml.safe_dump(
                {key: value for key, value in (values | changes).items() if value is not None}, sort_keys=False
            )
        )
        return ["compare", str(path)]

    return write


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.refers_to: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.refers_to += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two variants that was interrupted in the second run, then got a second seed. Read only."""
    folder = tmp_path_factory.mktemp("compare") / "whole"

    def ask_to_stop() -> None:
        while not (folder / waiting.SIGN).exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as told:
        patch.setattr(child, "_become", waiting.become)
        thread = threading.Thread(target=ask_to_stop, daemon=True)
        thread.start()
        assert main(recipe(folder, seeds=[0])) == 75
    thread.join()
    assert "start again to go on" in told.getvalue() and "Traceback" not in told.getvalue()
    assert starts(folder) == {"projector/seed-0": 2, "lora/seed-0": 1}
    assert "1 of 2 runs are done" in Page((folder / "report.html").read_text()).text
    assert main(recipe(folder)) == 0
    return folder


def starts(folder: Path) -> dict[str, int]:
    """How often each run was trained and evaluated, by its log's name."""
    logs = (folder / "runs").glob("*/*.log")
    return {f"{log.parent.name}/{log.stem}": log.read_text().count("$ llavaforge ") for log in logs}


def figures(folder: Path) -> Any:
    """The results of all runs, without what the clock says and where they are."""
    found = {}
    for path in sorted((folder / "runs").glob("*/*.json")):
        result = json.loads(path.read_text())
        trained = {name: result["train"][name] for name in ("global_step", "train_loss", "eval_loss")}
        measured = {name: value for name, value in result["evaluation"].items() if name != "model_name_or_path"}
        found[f"{path.parent.name}/{path.stem}"] = trained | measured
    return found


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_a_comparison_of_an_older_version_is_told_as_it_is_and_nothing_is_repeated(
    whole: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The older one measured no answers along the way."""
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    plan = json.loads((folder / "compare.json").read_text())
    for variant in plan["variants"].values():
        for name in [name for name in variant["identity"] if name.startswith("eval_") and name != "eval_steps"]:
            del variant["identity"][name]
    (folder / "compare.json").write_text(json.dumps(plan))
    for path in (folder / "runs").glob("*/*/metrics.jsonl"):
        lines = [line | {"eval_exact_match": None} for line in read_metrics(path.parent)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = starts(folder)  # one was begun, gone on with and evaluated
    assert before == {f"{name}/seed-{seed}": 2 for name in VARIANTS for seed in (0, 1)} | {"lora/seed-0": 3}
    assert main(recipe(folder)) == 0
    result = last_line(capsys)
    assert starts(folder) == before
    assert (result["num_runs"], result["num_trained"]) == (4, 0)
    found = figures(folder)
    for name, summary in result["variants"].items():
        losses = [found[f"{name}/seed-{seed}"]["loss"] for seed in (0, 1)]
        assert losses[0] != losses[1]
        assert summary["loss"] == pytest.approx(sum(losses) / 2)
        assert summary["loss_spread"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
        assert (summary["num_steps"], summary["num_samples"]) == (3, 12)
    assert result["variants"]["lora"]["num_learning"] > result["variants"]["projector"]["num_learning"]
    assert {one["measure"] for one in result["differences"]} == {"loss", "exact_match"}
    assert result["best"] == min(VARIANTS, key=lambda name: result["variants"][name]["loss"])
    assert (folder / "report.html").read_text().count(": its way<") == 8  # lines of the loss of four runs
    assert main([*recipe(folder), "--eval_generate_samples", "3"]) == 2
    assert "eval_generate_samples: 32 there, 3 now" in capsys.readouterr().err


def test_answers_are_measured_along_the_way_and_take_no_training_time(whole: Path) -> None:
    found = figures(whole)
    for name in (f"{name}/seed-{seed}" for name in VARIANTS for seed in (0, 1)):
        lines = read_metrics(whole / "runs" / name)
        # Of eight records all are answered, and by as many tokens as in the end.
        assert lines[-1]["eval_exact_match"] == pytest.approx(found[name]["exact_match"])
        for line in lines:
            assert line["step_time_s"] <= line["time_s"] * (1.001 - line["time_share_evaluation"])
            assert line["time_share_evaluation"] > 0.1 and "eval_loss" in line
        answers = [json.loads(one) for one in (whole / "runs" / name / "eval_answers.jsonl").read_text().splitlines()]
        assert [line["step"] for line in answers] == [step for step in (1, 2, 3) for _ in range(8)]


def test_a_run_is_what_train_makes_of_its_recipe_although_it_was_interrupted(whole: Path, tmp_path: Path) -> None:
    run = whole / "runs" / "lora" / "seed-0"
    values = yaml.safe_load(run.with_suffix(".yaml").read_text())
    assert (values["seed"], values["max_steps"]) == (0, 3)
    assert "going on from" in run.with_suffix(".log").read_text()
    assert main(["train", str(run.with_suffix(".yaml")), "--output_dir", str(tmp_path / "run")]) == 0
    other = tmp_path / "run"
    weights = "final/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (other / weights).read_bytes()
    names = ("step", "loss", "eval_loss", "eval_exact_match")
    steps, expected = ([[line[name] for name in names] for line in read_metrics(folder)] for folder in (run, other))
    assert steps == expected and [step for step, *_ in steps] == [1, 2, 3]
    assert (run / "eval_answers.jsonl").read_text() == (other / "eval_answers.jsonl").read_text()


def test_the_page_stands_alone_and_shows_all(whole: Path) -> None:
    text = (whole / "report.html").read_text()
    page = Page(text)
    assert len(text) < 5e6
    assert all(one.startswith(("#", "data:")) for one in page.refers_to)
    assert not re.search(r"url\((?!#)|@import", text)
    assert text.count(": its way<") == 16  # two panels of the loss and two of exact match, four runs each
    assert "script" not in page.tags and page.tags.count("svg") == 2 and "img" in page.tags
    found = figures(whole)
    for name in VARIANTS:
        mean = sum(found[f"{name}/seed-{seed}"]["loss"] for seed in (0, 1)) / 2
        assert name in page.text and f"{mean:.4f} ±" in page.text
    assert re.search(r"runs done\s*4 of 4", page.text)
    assert "Holm" in page.text and "preliminary" not in page.text


def test_a_changed_recipe_is_refused(whole: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    before = figures(whole)
    changes = {"learning_rate": 2e-2, "budget_samples": 20, "validation_split": 4, "metrics": ["none"]}
    assert main(recipe(whole, seeds=[0, 1, 2], **changes)) == 2
    told = capsys.readouterr().err
    assert "`projector` was begun with another recipe" in told and "\n  seed" not in told
    assert "learning_rate: 0.01 there, 0.02 now" in told and "budget_samples: 14 there, 20 now" in told
    assert "held-out records: " in told and "metrics: ['auto'] there, ['none'] now" in told
    assert figures(whole) == before


def spent_flops(folder: Path, name: str) -> float:
    """The model FLOPs that a run counted, by its last checkpoint."""
    (state,) = (folder / "runs" / name / "seed-0").glob("checkpoint-*/train_state.json")
    return float(json.loads(state.read_text())["model_flops"])


def test_a_budget_of_flops_gives_each_its_own_steps_and_what_fails_does_not_stop_the_others(
    whole: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, budget = tmp_path / "flops", 2.2 * spent_flops(whole, "lora")
    monkeypatch.setattr(child, "_become", waiting.end_at_once)
    words = recipe(folder, seeds=[0], metrics=["none"], budget_samples=None, budget_flops=budget)
    for start in (1, 2):
        assert main(words) == 1
        told = capsys.readouterr()
        assert told.out == "" and "Traceback" not in told.err
        assert "what failed: projector, seed 0; lora, seed 0" in told.err
        assert starts(folder) == {"projector/seed-0": start, "lora/seed-0": start}
    page = Page((folder / "report.html").read_text()).text
    assert "0 of 2 runs are done" in page and page.count("it ended without a word") == 2
    steps = {}
    for name in VARIANTS:
        run = yaml.safe_load((folder / "runs" / name / "seed-0.yaml").read_text())
        steps[name] = run["max_steps"]
        assert run["eval_generate_samples"] == 0
        # Of three steps we know what they spend; samples differ from the mean one.
        assert 0.8 * budget <= spent_flops(whole, name) / 3 * steps[name] <= 1.1 * budget
    assert steps["projector"] > steps["lora"] == 6


def test_a_budget_of_minutes_is_rehearsed_once_and_captions_have_no_metric_but_are_shown(
    recipe: Recipe,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And a rehearsal that fails is tried again, while the others go on."""
    folder = tmp_path / "minutes"
    broken = {"train_type": "projector", "learning_rate": 1e30, "max_skipped_steps": 0}
    changes = {"variants": {"broken": broken, "lora": VARIANTS["lora"]}, "seeds": [0]}
    changes |= {"budget_samples": None, "budget_minutes": 0.003}
    changes |= {"data_path": str(shapes / "train"), "eval_data_path": str(shapes / "heldout")}  # captions
    changes |= {"validation_split": None, "max_eval_samples": 8}
    assert main(recipe(folder, **changes)) == 1
    assert "what failed: rehearsal of broken" in capsys.readouterr().err
    assert caplog.text.count("rehearsal: ") == 2
    plan = json.loads((folder / "compare.json").read_text())["variants"]
    steps = figures(folder)["lora/seed-0"]["global_step"]
    assert plan["lora"]["num_steps"] == steps == int(0.18 // plan["lora"]["step_time_s"]) > 0
    assert "num_steps" not in plan["broken"] and starts(folder) == {"lora/seed-0": 3}  # trained, measured, asked
    assert not list(folder.rglob("eval_answers.jsonl"))
    page = Page((folder / "report.html").read_text())
    assert "rehearsal of twelve steps" in page.text and "the run has diverged" in page.text
    assert "With one seed nothing can be said" in page.text and "exact match" not in page.text
    assert "Sample answers" in page.text and 4 <= page.tags.count("img") <= 8
    monkeypatch.setattr(child, "_become", waiting.end_at_once)
    assert main(recipe(folder, **changes)) == 1
    assert caplog.text.count("rehearsal: how long a step of broken") == 2
    assert caplog.text.count("rehearsal: how long a step of lora") == 1
    assert json.loads((folder / "compare.json").read_text())["variants"] == plan and "lora/seed-0" in figures(folder)
