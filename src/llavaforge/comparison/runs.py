"""The runs of a comparison: where each is, what it has left, and how it is done.

Comes in: a variant with its number of steps, and a seed. Goes out, in `output_dir/runs/VARIANT/`:

    seed-0.yaml          the run's recipe, which `llavaforge train` takes
    seed-0/              the run, as `train` leaves it
    seed-0-evaluation/   what `evaluate` wrote of its final model
    seed-0-answers/      the same of a few records, where no metric suits and so nothing was answered
    seed-0.log           what both said
    seed-0.json          the result: with it the run is done, and never done again
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from llavaforge.checkpoint.state import load_run
from llavaforge.comparison.child import last_words, run_child
from llavaforge.comparison.variants import Variant, evaluate_options
from llavaforge.config.recipe import FINAL
from llavaforge.config.schema import CompareConfig
from llavaforge.device import pick_device
from llavaforge.errors import RunFailed, UserError
from llavaforge.files import PREFIX, replace_text, to_json
from llavaforge.folders import differences
from llavaforge.processes.workers import num_cores
from llavaforge.training.metrics import METRICS, read_metrics
from llavaforge.training.signals import StopRequest

logger = logging.getLogger(__name__)

RUNS = "runs"
_REHEARSALS = f"{PREFIX}-rehearsals"
_REHEARSED_STEPS, _FIRST_STEPS = 12, 2  # the first ones allocate memory and fill caches: they are not counted
_NUM_CURVE_POINTS = 10
_LONGEST_LINES = 8192  # bytes that surely hold a whole line of metrics.jsonl
_NUM_ANSWERS = 8  # where no metric asks for more
_EVALUATION, _ANSWERS = "-evaluation", "-answers"
_INPUT_AT_FAULT = 2
Watch = Callable[[int], None]  # told the steps that the run has done


@dataclass(frozen=True, eq=False)
class Run:
    """One training of a variant with one seed.

    Attributes:
        config: of the comparison.
        variant: what is trained.
        seed: of the sample order, LoRA's initial weights and dropout.
        num_steps: of all runs of the variant.
    """

    config: CompareConfig
    variant: Variant
    seed: int
    num_steps: int

    @property
    def folder(self) -> Path:
        """Where `train` writes."""
        return self.config.output_dir / RUNS / self.variant.name / f"seed-{self.seed}"

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.variant.name}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """Return what came of it; None where it is not done, or where that is damaged."""
        try:
            result = json.loads(self._beside(".json").read_text())
            return result if isinstance(result, dict) and {"train", "evaluation"} <= result.keys() else None
        except (OSError, ValueError):
            return None

    def curve(self) -> list[dict[str, float]]:
        """Return samples, seconds of training, held-out loss and metrics of answers, wherever these were measured."""
        points, seconds = [], 0.0
        for line in read_metrics(self.folder):
            seconds += line["step_time_s"]
            measured = {key.removeprefix("eval_"): value for key, value in line.items() if key.startswith("eval_")}
            measured = {name: value for name, value in measured.items() if value is not None}
            if measured:
                points.append({"samples": line["step"] * self.variant.batch_size, "seconds": seconds} | measured)
        return points

    def answers(self) -> list[dict[str, Any]]:
        """Return lines of `samples.jsonl` with answers, of the held-out records in their order, or of the first few."""
        found = (_lines(self._beside(suffix)) for suffix in (_EVALUATION, _ANSWERS))
        return next((lines for lines in found if lines and "answer" in lines[0]), [])

    def do(self, stop: StopRequest, watch: Watch) -> dict[str, Any]:
        """Train, or go on with it; then evaluate, and leave the result.

        Args:
            stop: postponed by the caller; looked at all the time.
            watch: told how far the run is.

        Raises:
            StoppedEarly: that was asked for; the same run goes on where it stopped.
            UserError: the run's input is at fault, or the run failed (`RunFailed`); the log says more.
        """
        values = self.variant.values | {
            "output_dir": str(self.folder),
            "seed": self.seed,
            "max_steps": self.num_steps,
            "eval_steps": self.variant.values.get("eval_steps") or max(1, self.num_steps // _NUM_CURVE_POINTS),
        }
        _train(self._beside(".yaml"), values, self._beside(".log"), self.name, stop, watch)
        self._evaluate(self._beside(_EVALUATION), stop)
        if "none" not in self.config.metrics and "answer" not in _lines(self._beside(_EVALUATION))[0]:
            few = min(_NUM_ANSWERS, len(self.variant.held_out.rows))
            self._evaluate(self._beside(_ANSWERS), stop, metrics=["exact_match"], max_samples=few)
        result = {
            "variant": self.variant.name,
            "seed": self.seed,
            "device": device_name(),
            "train": load_run(self.folder / FINAL)["result"],
            "evaluation": json.loads((self._beside(_EVALUATION) / "summary.json").read_text()),
        }
        replace_text(self._beside(".json"), to_json(result, indent=1) + "\n")
        return result

    def _evaluate(self, folder: Path, stop: StopRequest, **changes: Any) -> None:
        options = evaluate_options(self.config, self.variant.values, str(self.folder / FINAL))
        words = ["evaluate", f"--output_dir={folder}"]
        for name, value in (options.model_dump(mode="json", exclude_unset=True) | changes).items():
            if isinstance(value, list):
                words += [f"--{name}", *value] if value else []
            elif value is not None:
                words.append(f"--{name}={value}")
        _checked(run_child(words, self._beside(".log"), stop, lambda: None), self._beside(".log"), self.name)

    def _beside(self, suffix: str) -> Path:
        return self.folder.with_name(self.folder.name + suffix)


def rehearse(config: CompareConfig, variant: Variant, stop: StopRequest, watch: Watch) -> float:
    """Return the seconds that a step of a variant takes here: the mean of ten, after the first two.

    Raises:
        StoppedEarly: that was asked for.
        UserError: as `Run.do`.
    """
    folder = config.output_dir / _REHEARSALS / variant.name
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed; nobody else writes there
    values = variant.values | {
        "output_dir": str(folder / "run"),
        "seed": config.seeds[0],
        "max_steps": _REHEARSED_STEPS,
        "save_steps": 0,
        "eval_steps": 0,
        "eval_generate_samples": 0,
        "eval_data": [],
        "validation_split": 0,
    }
    name = f"rehearsal of {variant.name}"
    _train(folder / "run.yaml", values, folder / "run.log", name, stop, watch)
    times = [line["step_time_s"] for line in read_metrics(folder / "run")][_FIRST_STEPS:]
    shutil.rmtree(folder, ignore_errors=True)
    return float(sum(times) / len(times))


def _lines(evaluation: Path) -> list[dict[str, Any]]:
    """Return what `evaluate` wrote of each sample; nothing where it has not been."""
    path = evaluation / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def device_name() -> str:
    """Return what the runs' times are of."""
    device = pick_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {num_cores()} cores"


def _train(recipe: Path, values: dict[str, Any], log: Path, name: str, stop: StopRequest, watch: Watch) -> None:
    """Train a recipe in a process of its own, unless that is done."""
    folder = Path(values["output_dir"])
    text = f"# llavaforge train {recipe}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    replace_text(recipe, text)
    if (folder / FINAL).is_dir() and not differences(folder / FINAL):
        return  # only the evaluation was interrupted: it says which run it measures

    _checked(run_child(["train", str(recipe)], log, stop, lambda: watch(_steps_done(folder))), log, name)


def _steps_done(folder: Path) -> int:
    """Return the step of the last whole line of metrics.jsonl, however long that is by now."""
    with suppress(OSError, ValueError, LookupError), (folder / METRICS).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINES))
        return int(json.loads(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"])
    return 0


def _checked(exit_code: int, log: Path, name: str) -> None:
    """Raise what a child's exit code means."""
    if not exit_code:
        return
    told = f"{name}: {last_words(log)}\n({os.fspath(log)} has all that it said)"
    raise UserError(told) if exit_code == _INPUT_AT_FAULT else RunFailed(told)
