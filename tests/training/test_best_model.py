"""Answers and metrics while a run goes on; the best checkpoint; stopping early."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from llavaforge.answers.metrics import measure
from llavaforge.answers.vqa import vqa_accuracy
from llavaforge.checkpoint.state import steps_of
from llavaforge.config.load import build
from llavaforge.config.schema import VALUES_OF_METRICS, EvaluateConfig, TrainConfig
from llavaforge.errors import UserError
from llavaforge.inference.evaluate import evaluate
from llavaforge.model.compile import compile_layers
from llavaforge.results import TrainResult
from llavaforge.training import trainer
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from llavaforge.training.sample_answers import ANSWERS, SampleAnswers
from llavaforge.training.trainer import Trainer
from train_tools import train_config

Configured = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def configured(tiny_llava: Path, shapes: Path) -> Configured:
    questions = {place: shapes / place / "questions.json" for place in ("train", "heldout")}

    def make(output_dir: Path, **options: Any) -> TrainConfig:
        given = {
            "max_steps": 3, "eval_steps": 1, "save_steps": 0, "eval_data_path": questions["heldout"],
            "eval_generate_samples": 5, "eval_max_new_tokens": 4, "learning_rate": 1e-3, **options,
        }  # fmt: skip
        return train_config(tiny_llava, questions["train"], output_dir, **given)

    return make


@pytest.fixture
def config(configured: Configured, tmp_path: Path) -> Any:
    return lambda name="run", **options: configured(tmp_path / name, **options)


LORA = {"train_type": "use_lora", "eval_metrics": ["exact_match", "bleu"]}


@pytest.fixture(scope="module")
def answered(configured: Configured, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """The folder of a run that answered samples after each of its three steps, and its result. Read only."""
    folder = tmp_path_factory.mktemp("answered") / "run"
    return folder, train(configured(folder, **LORA))


def answers_of(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / ANSWERS).read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Any]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_weights(one: Path, other: Path) -> bool:
    mine, theirs = weights_of(one), weights_of(other)
    return mine.keys() == theirs.keys() and all(bool((mine[name] == theirs[name]).all()) for name in mine)


def check_that_evaluate_answers_alike(run: Path, shapes: Path, folder: Path) -> None:
    """Compare what a run answered after its last step with what its finished model answers."""
    evaluate(
        EvaluateConfig(
            model_name_or_path=str(run / "final"), data_path=shapes / "heldout" / "questions.json",
            output_dir=folder, max_new_tokens=4, bf16=False, dataloader_num_workers=0,
        )
    )  # fmt: skip
    expected = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    found = answers_of(run)[-5:]
    assert found[-1]["sample"] == len(expected) - 1  # spread over all of them
    names = ("question", "reference", "answer", "exact_match")
    for line in found:
        assert [line[name] for name in names] == [expected[line["sample"]][name] for name in names]
    assert read_metrics(run)[-1]["eval_exact_match"] == sum(line["exact_match"] for line in found) / 5


def test_answers_while_training_are_those_of_evaluate_and_change_nothing(
    answered: tuple[Path, TrainResult], config: Any, shapes: Path, tmp_path: Path
) -> None:
    run, result = answered
    assert [line["step"] for line in answers_of(run)] == [1] * 5 + [2] * 5 + [3] * 5
    check_that_evaluate_answers_alike(run, shapes, tmp_path / "evaluation")
    last = read_metrics(run)[-1]
    assert last["eval_loss"] == result["eval_loss"] and {"eval_bleu_1", "eval_bleu_4"} <= last.keys()
    train(config("silent", **LORA | {"eval_generate_samples": 0}))
    assert same_weights(run / "final", tmp_path / "silent" / "final")


def test_answers_of_compiled_layers_are_those_of_evaluate_and_compile_nothing_more(
    config: Any, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By counting graphs, which are not compiled to C++: that would take a minute."""
    counter, ask, more = CompileCounter(), SampleAnswers.__call__, []

    def counted(self: SampleAnswers, step: int) -> dict[str, float]:
        before = counter.frame_count
        found = ask(self, step)
        more.append(counter.frame_count - before)
        return found

    monkeypatch.setattr(trainer, "compile_layers", partial(compile_layers, backend=counter))
    monkeypatch.setattr(SampleAnswers, "__call__", counted)
    train(config(train_type="projector", max_steps=1, compile=True))
    assert counter.frame_count > 0 and more == [0]
    check_that_evaluate_answers_alike(tmp_path / "run", shapes, tmp_path / "evaluation")


def test_answers_of_several_people_are_measured_by_all_of_them(
    config: Any, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    rows = json.loads((shapes / "heldout" / "questions.json").read_text())[:6]
    data = {"path": tmp_path / "data.json", "images": shapes / "heldout" / "images"}
    data["path"].write_text(json.dumps(rows))
    evaluate(
        EvaluateConfig(
            model_name_or_path=str(tiny_llava), data_path=data["path"], image_folder=data["images"],
            output_dir=tmp_path / "evaluation", max_new_tokens=4, bf16=False, dataloader_num_workers=0,
        )
    )  # fmt: skip
    said = [json.loads(line)["answer"] for line in (tmp_path / "evaluation" / "samples.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["answers"] = [said[number]] * number + ["x"] * (10 - number)
    data["path"].write_text(json.dumps(rows))
    options = {"max_steps": 1, "learning_rate": 0.0, "projector_learning_rate": 0.0, "eval_generate_samples": 6}
    train(config(eval_data_path=None, eval_data=[data], eval_metrics=["vqa"], **options))
    found = answers_of(tmp_path / "run")
    assert [line["answer"] for line in found] == said
    assert [line["vqa"] for line in found] == [vqa_accuracy(said[n], rows[n]["answers"]) for n in range(6)]
    assert read_metrics(tmp_path / "run")[-1]["eval_vqa"] == sum(line["vqa"] for line in found) / 6 > 0


@pytest.fixture
def gets_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every evaluation after step 2 say that the model is worse: no machine's rounding decides that then."""
    monkeypatch.setattr(trainer, "held_out_loss", lambda opened, held_out, engine, step: (1.0 + abs(step - 2), []))


WORSE = {"eval_generate_samples": 0, "lr_scheduler_type": "constant", "load_best_model_at_end": True}


@pytest.mark.usefixtures("gets_worse")
def test_the_finished_model_is_the_best_one_and_its_checkpoint_stays(config: Any, tmp_path: Path) -> None:
    result = train(config(max_steps=5, save_steps=1, save_total_limit=1, **WORSE))
    assert (result["best_step"], result["best_metric"]) == (2, 1.0)
    assert steps_of(tmp_path / "run") == [2, 5]
    train(config("short", max_steps=2, **WORSE))
    assert same_weights(tmp_path / "run" / "final", tmp_path / "short" / "final")
    assert not same_weights(tmp_path / "run" / "final", tmp_path / "run" / "checkpoint-5")
    assert not result["stopped_early"]


@pytest.mark.usefixtures("gets_worse")
def test_a_run_stops_early_and_is_finished_then(config: Any, tmp_path: Path) -> None:
    patient = config(early_stopping_patience=2, max_steps=20, save_steps=15, **WORSE)
    result = train(patient)
    assert result["stopped_early"] and result["global_step"] == 4 == read_metrics(tmp_path / "run")[-1]["step"]
    assert 4 in steps_of(tmp_path / "run")  # to go on from
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train(patient) == result and (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    more = train(config(early_stopping_patience=3, max_steps=20, save_steps=15, **WORSE))
    assert more["stopped_early"] and (more["global_step"], more["best_step"]) == (5, 2)
    longer = train(config(max_steps=7, save_steps=15, **WORSE))
    assert longer["global_step"] == 7 and not longer["stopped_early"]


def test_an_interrupted_run_knows_its_best_and_repeats_no_answer(
    answered: tuple[Path, TrainResult], config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Exception):
        pass

    show = Trainer._show

    def interrupt(self: Trainer, bar: Any, line: dict[str, Any]) -> None:
        show(self, bar, line)
        if line["step"] == 3:
            raise Interrupted

    monkeypatch.setattr(Trainer, "_show", interrupt)
    with pytest.raises(Interrupted):
        train(config(save_steps=1, **LORA))
    monkeypatch.undo()
    assert len(answers_of(tmp_path / "run")) == 15  # of step 3 too, which is not saved
    result = train(config(save_steps=1, **LORA))
    whole, expected = answered
    assert answers_of(tmp_path / "run") == answers_of(whole)
    best = ("best_step", "best_metric")
    assert [result[name] for name in best] == [expected[name] for name in best]  # type: ignore[literal-required]


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
    train(config(max_steps=1, save_steps=1))
    metric = {"eval_metrics": ["exact_match"], "metric_for_best_model": "eval_exact_match", "save_steps": 1}
    result = train(config(max_steps=2, **metric))
    assert result["best_step"] == 2 and 0 <= (result["best_metric"] or 0) <= 1
    assert "the best step is looked for anew" in caplog.text
    caplog.clear()
    result = train(config(max_steps=3, save_steps=1, eval_data_path=shapes / "train" / "questions.json"))
    assert result["best_step"] == 3 and "looked for anew" in caplog.text


def test_the_names_of_metrics_values_are_those_that_are_measured() -> None:
    for name, values in VALUES_OF_METRICS.items():
        found = measure([name], {"answer": ["yes", "no"]}, {"answer": [["yes"], ["no"]]})
        assert sorted(found.of_all) == sorted(values)
