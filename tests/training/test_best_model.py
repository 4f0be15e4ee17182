"""Answers and metrics while a run goes on; the best checkpoint; stopping early."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llavaforge.answers.metrics import measure
from llavaforge.answers.vqa import vqa_accuracy
from llavaforge.checkpoint.state import steps_of
from llavaforge.config.load import build
from llavaforge.config.schema import VALUES_OF_METRICS, EvaluateConfig, TrainConfig
from llavaforge.errors import UserError
from llavaforge.inference.evaluate import evaluate
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from llavaforge.training.sample_answers import ANSWERS
from llavaforge.training.trainer import Trainer
from train_tools import train_config


@pytest.fixture
def config(tiny_llava: Path, shapes: Path, tmp_path: Path) -> Any:
    def make(name: str = "run", **options: Any) -> TrainConfig:
        questions = {place: shapes / place / "questions.json" for place in ("train", "heldout")}
        given = {
            "max_steps": 8, "eval_steps": 2, "save_steps": 0, "eval_data_path": questions["heldout"],
            "eval_generate_samples": 5, "eval_max_new_tokens": 4, "learning_rate": 1e-3, **options,
        }  # fmt: skip
        return train_config(tiny_llava, questions["train"], tmp_path / name, **given)

    return make


def answers_of(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / ANSWERS).read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Any]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_weights(one: Path, other: Path) -> bool:
    mine, theirs = weights_of(one), weights_of(other)
    return mine.keys() == theirs.keys() and all(bool((mine[name] == theirs[name]).all()) for name in mine)


@pytest.mark.parametrize("compile_", [False, True])
def test_answers_while_training_are_those_of_evaluate_and_change_nothing(
    config: Any, shapes: Path, tmp_path: Path, compile_: bool
) -> None:
    options = {"train_type": "use_lora", "compile": compile_, "eval_steps": 3, "max_steps": 3}
    result = train(config(eval_metrics=["exact_match", "bleu"], **options))
    train(config("silent", eval_generate_samples=0, **options))
    assert same_weights(tmp_path / "run" / "final", tmp_path / "silent" / "final")
    evaluate(
        EvaluateConfig(
            model_name_or_path=str(tmp_path / "run" / "final"), data_path=shapes / "heldout" / "questions.json",
            output_dir=tmp_path / "evaluation", max_new_tokens=4, bf16=False, dataloader_num_workers=0,
        )
    )  # fmt: skip
    expected = [json.loads(line) for line in (tmp_path / "evaluation" / "samples.jsonl").read_text().splitlines()]
    found = answers_of(tmp_path / "run")
    assert [line["step"] for line in found] == [3] * 5
    assert found[-1]["sample"] == len(expected) - 1  # spread over all of them
    for line in found:
        other = expected[line["sample"]]
        assert {key: line[key] for key in ("question", "reference", "answer", "exact_match")} == {
            key: other[key] for key in ("question", "reference", "answer", "exact_match")
        }
    last = read_metrics(tmp_path / "run")[-1]
    assert last["eval_exact_match"] == sum(line["exact_match"] for line in found) / 5
    assert last["eval_loss"] == result["eval_loss"] and {"eval_bleu_1", "eval_bleu_4"} <= last.keys()


def test_answers_of_several_people_are_measured_by_all_of_them(config: Any, shapes: Path, tmp_path: Path) -> None:
    rows = json.loads((shapes / "heldout" / "questions.json").read_text())[:6]
    data = {"path": tmp_path / "data.json", "images": shapes / "heldout" / "images"}
    options = {"max_steps": 1, "learning_rate": 0.0, "eval_data_path": None, "eval_data": [data]}
    options |= {"eval_generate_samples": 6, "projector_learning_rate": 0.0}
    data["path"].write_text(json.dumps(rows))
    train(config("first", **options))
    said = [line["answer"] for line in answers_of(tmp_path / "first")]
    for number, row in enumerate(rows):
        row["answers"] = [said[number]] * number + ["x"] * (10 - number)
    data["path"].write_text(json.dumps(rows))
    train(config("second", eval_metrics=["vqa"], **options))
    found = answers_of(tmp_path / "second")
    assert [line["answer"] for line in found] == said
    assert [line["vqa"] for line in found] == [vqa_accuracy(said[n], rows[n]["answers"]) for n in range(6)]
    assert read_metrics(tmp_path / "second")[-1]["eval_vqa"] == sum(line["vqa"] for line in found) / 6 > 0


def test_the_finished_model_is_the_best_one_and_its_checkpoint_stays(config: Any, tmp_path: Path) -> None:
    # A rate at which the held-out loss gets worse after the first evaluations.
    options = {"learning_rate": 0.3, "warmup_ratio": 0.0, "eval_generate_samples": 0, "lr_scheduler_type": "constant"}
    result = train(config(load_best_model_at_end=True, save_steps=2, save_total_limit=1, **options))
    losses = {line["step"]: line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert best < 8, f"the test wants a run that gets worse: {losses}"
    assert (result["best_step"], result["best_metric"]) == (best, losses[best])
    assert steps_of(tmp_path / "run") == sorted({best, 8})
    train(config("short", max_steps=best, **options))
    assert same_weights(tmp_path / "run" / "final", tmp_path / "short" / "final")
    assert not result["stopped_early"]


def test_a_run_stops_early_and_is_finished_then(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"learning_rate": 0.3, "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "max_steps": 40}
    patient = config(early_stopping_patience=2, load_best_model_at_end=True, save_steps=30, **options)
    result = train(patient)
    losses = {line["step"]: line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert result["stopped_early"] and result["global_step"] == best + 4 == max(losses) < 40
    assert best + 4 in steps_of(tmp_path / "run")  # to go on from
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train(patient) == result and (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    more = train(config(early_stopping_patience=3, load_best_model_at_end=True, save_steps=30, **options))
    assert more["stopped_early"] and more["global_step"] > result["global_step"]
    best = more["best_step"] or 0
    longer = train(config(load_best_model_at_end=True, save_steps=30, **{**options, "max_steps": best + 8}))
    assert longer["global_step"] == best + 8


def test_an_interrupted_run_knows_its_best_and_repeats_no_answer(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config("whole"))

    class Interrupted(Exception):
        pass

    show = Trainer._show

    def interrupt(self: Trainer, bar: Any, line: dict[str, Any]) -> None:
        show(self, bar, line)
        if line["step"] == 5:
            raise Interrupted

    monkeypatch.setattr(Trainer, "_show", interrupt)
    with pytest.raises(Interrupted):
        train(config(save_steps=3))
    monkeypatch.undo()
    assert len(answers_of(tmp_path / "run")) == 10  # of steps 2 and 4
    result = train(config(save_steps=3))
    assert answers_of(tmp_path / "run") == answers_of(tmp_path / "whole")
    assert result["best_step"] == 8 or result["best_metric"] is not None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"metric_for_best_model": "eval_exact_match"}, "eval_exact_match` is not measured"),
        (
            {"metric_for_best_model": "eval_bleu", "eval_metrics": ["bleu"], "eval_generate_samples": 4},
            r"eval_bleu` is not measured.*bleu_1, bleu_2",
        ),
        ({"early_stopping_patience": 2, "eval_steps": 0}, "needs more than one evaluation: give eval_steps"),
        ({"eval_generate_samples": 4}, "needs held-out data"),
        ({"eval_metrics": ["multiple_choice_likelihood"]}, "measured by `evaluate` alone"),
    ],
)
def test_options_that_cannot_go_together_are_told(options: dict[str, Any], told: str) -> None:
    given = {"model_name_or_path": "m", "data_path": "d", "output_dir": "o", "eval_steps": 0}
    if "needs held-out" not in told:
        given["eval_data_path"] = "e"
    with pytest.raises(UserError, match=told):
        build(TrainConfig, {**given, **options}, "recipe.yaml")


def test_zero_3_does_not_answer_while_training(config: Any) -> None:
    with pytest.raises(UserError, match="under ZeRO-3 no process has the whole model"):
        train(config(deepspeed="zero3"))


def test_another_metric_or_other_held_out_data_begins_the_search_for_the_best_anew(
    config: Any, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config(max_steps=2, save_steps=2))
    metric = {"eval_metrics": ["exact_match"], "metric_for_best_model": "eval_exact_match", "save_steps": 2}
    result = train(config(max_steps=4, **metric))
    assert result["best_step"] == 4 and 0 <= (result["best_metric"] or 0) <= 1
    assert "the best step is looked for anew" in caplog.text
    caplog.clear()
    result = train(config(max_steps=6, save_steps=2, eval_data_path=shapes / "train" / "questions.json"))
    assert result["best_step"] == 6 and "looked for anew" in caplog.text


def test_the_names_of_metrics_values_are_those_that_are_measured() -> None:
    for name, values in VALUES_OF_METRICS.items():
        found = measure([name], {"answer": ["yes", "no"]}, {"answer": [["yes"], ["no"]]})
        assert sorted(found.of_all) == sorted(values)
