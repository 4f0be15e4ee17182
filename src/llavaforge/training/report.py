"""A run's page, while it goes on and afterwards: curves, where the time went, answers, what was left out, the recipe.

Comes in: the files of the run's folder. Goes out: `output_dir/report.html`, which opens offline.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from markupsafe import Markup

from llavaforge.clock import PARTS
from llavaforge.errors import UserError, reason
from llavaforge.files import read_json_lines, replace_text
from llavaforge.report.page import OWN_PAGE, render
from llavaforge.report.svg import TEXT, svg_style, to_svg
from llavaforge.training.bad_samples import BAD_SAMPLES
from llavaforge.training.metrics import read_metrics
from llavaforge.training.opening import OpenedStage
from llavaforge.training.sample_answers import ANSWERS, SampleAnswers
from llavaforge.training.usage import NAMES

logger = logging.getLogger(__name__)

REPORT = "report.html"
_EVERY_S = 60.0  # while the run goes on, and
_MOST_SHARE = 0.005  # of its time
_MOST_POINTS = 500  # of a curve: 1,000 logged steps are 0.2 MB
_MOST_ANSWERS = 8  # of a sample, spread over the run
_MOST_QUESTIONS = 24
_MOST_LEFT_OUT = 20
_STAND_INS = {"#000001": "var(--accent)", "#000002": "var(--special)", TEXT: "var(--faint)"}


class Curve(NamedTuple):
    """A line of a chart: numbers by step."""

    label: str
    points: Sequence[tuple[int, float]]
    style: str


class Question(NamedTuple):
    """A held-out sample and what was answered at some steps."""

    urls: Sequence[str]
    question: str
    reference: str
    answers: Sequence[tuple[int, str, bool | None]]


class Reporter:
    """Writes the page of a run, now and then and at the end; a page that cannot be written ends no run.

    Args:
        opened: the stage.
        sample_answers: has pictures of the held-out samples that are asked.
    """

    def __init__(self, opened: OpenedStage, sample_answers: SampleAnswers | None) -> None:
        self._opened, self._sample_answers = opened, sample_answers
        self._pictures: Mapping[int, Sequence[str]] | None = None
        self._path = opened.config.output_dir / REPORT
        self._next_s = time.monotonic() + _EVERY_S

    def write_when_due(self) -> None:
        """Write the page if the last one is a while ago."""
        if (begin_s := time.monotonic()) >= self._next_s:
            self.write("is going on")
            end_s = time.monotonic()
            self._next_s = end_s + max(_EVERY_S, (end_s - begin_s) / _MOST_SHARE)

    def write(self, status: str) -> None:
        """Write the page.

        Args:
            status: of the run, such as `is finished`.
        """
        try:
            if self._pictures is None:
                asked = self._sample_answers
                self._pictures = asked.thumbnails(_MOST_QUESTIONS) if asked is not None else {}
            replace_text(self._path, report_page(self._opened, self._pictures, status), OWN_PAGE)
        except Exception as error:  # whatever a page may be made of, it is worth no run
            logger.warning("the report was not written: %s", error if isinstance(error, UserError) else reason(error))


def report_page(opened: OpenedStage, pictures: Mapping[int, Sequence[str]], status: str) -> str:
    """Return the page, from the files of a run as far as it has come."""
    config, lines = opened.config, read_metrics(opened.config.output_dir)
    left_out = read_json_lines(config.output_dir / BAD_SAMPLES)
    answers = read_json_lines(config.output_dir / ANSWERS)
    newest = {key: value for line in lines for key, value in line.items()}
    facts = {
        "model": config.model_name_or_path,
        "train type": config.train_type,
        "steps": f"{newest.get('step', 0):,} of {opened.plan.num_steps:,}",
        "learns": f"{sum(group.num_parameters for group in opened.groups):,} parameters",
        "samples per step": f"{opened.plan.global_batch_size:,}",
    }
    for key, name, form in (
        ("loss", "loss", ".4f"),
        ("eval_loss", "held-out loss", ".4f"),
        ("tokens_per_s", "tokens/s", ",.0f"),
        ("mfu", "MFU", ".1%"),
    ):
        if isinstance(newest.get(key), int | float):
            facts[name] = format(newest[key], form)
    return render(
        Path(__file__).parent / "report.html.jinja",
        name=str(config.output_dir),
        status=status,
        facts=facts,
        charts=_charts(lines),
        times=_times(lines),
        questions=_questions(answers, pictures),
        num_more_questions=len({line["sample"] for line in answers} - pictures.keys()),
        data=_data(opened),
        left_out=left_out[:_MOST_LEFT_OUT],
        num_left_out=len(left_out),
        recipe=yaml.safe_dump(config.model_dump(mode="json", exclude={"stages"}), sort_keys=False, allow_unicode=True),
    )


def _charts(lines: Sequence[Mapping[str, Any]]) -> list[Markup]:
    metrics = sorted({key for line in lines for key in line if key.startswith("eval_")} - {"eval_loss"})
    losses = [_curve(lines, "loss", "training", "-"), _curve(lines, "eval_loss", "held-out", "o-")]
    charts = [
        ("loss per supervised token", losses),
        *((name.removeprefix("eval_"), [_curve(lines, name, "held-out answers", "o-")]) for name in metrics),
        ("learning rate", [_curve(lines, "learning_rate", "", "-")]),
        ("gradient norm", [_curve(lines, "grad_norm", "", "-")]),
        ("tokens per second", [_curve(lines, "tokens_per_s", "", "-")]),
    ]
    return [_chart(title, curves) for title, curves in charts if any(curve.points for curve in curves)]


def _curve(lines: Sequence[Mapping[str, Any]], key: str, label: str, style: str) -> Curve:
    """Return a key's numbers by step; of many, means of as many neighbours as it takes."""
    points = [(line["step"], float(line[key])) for line in lines if isinstance(line.get(key), int | float)]
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[begin : begin + size] for begin in range(0, len(points), max(1, size))]
    return Curve(label, [(mine[-1][0], sum(value for _, value in mine) / len(mine)) for mine in groups], style)


def _chart(title: str, curves: Sequence[Curve]) -> Markup:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with svg_style():
        figure = Figure(figsize=(4.4, 2.3))
        # As constrained layout has it, in half of the time.
        figure.subplots_adjust(left=0.16, right=0.98, bottom=0.19, top=0.92)
        axes = figure.add_subplot()
        for curve, colour in zip(curves, _STAND_INS, strict=False):
            if curve.points:
                x, y = zip(*curve.points, strict=True)
                axes.plot(x, y, curve.style, color=colour, linewidth=1.1, markersize=3, label=curve.label or None)
        axes.set(xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, linewidth=0.5)
        if sum(bool(curve.label and curve.points) for curve in curves) > 1:
            axes.legend(frameon=False)
        svg = to_svg(figure, _STAND_INS)
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}</figure>').format(title, svg)


def _times(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Return the shares of the time of all logged steps, the largest first."""
    seconds = {
        part: sum(line.get("time_s", 0.0) * line.get(f"time_share_{part}", 0.0) for line in lines) for part in PARTS
    }
    total = sum(seconds.values())
    shares = [(NAMES.get(part, part), seconds[part] / total) for part in PARTS] if total else []
    return sorted(((name, share) for name, share in shares if share >= 0.001), key=lambda pair: -pair[1])


def _questions(answers: Sequence[Mapping[str, Any]], pictures: Mapping[int, Sequence[str]]) -> list[Question]:
    by_sample: dict[int, list[Mapping[str, Any]]] = {}
    for line in answers:
        if line["sample"] in pictures:
            by_sample.setdefault(line["sample"], []).append(line)
    questions = []
    for number, mine in by_sample.items():
        shown = mine[:: -(-len(mine) // _MOST_ANSWERS)]
        shown = shown if shown[-1] is mine[-1] else [*shown, mine[-1]]
        told = [(line["step"], line["answer"], _is_right(line)) for line in shown]
        questions.append(Question(pictures.get(number, ()), mine[0]["question"], mine[0]["reference"], told))
    return questions


def _is_right(line: Mapping[str, Any]) -> bool | None:
    """Say whether an answer is right, by its first metric; None where none was measured."""
    values = [value for key, value in line.items() if key not in ("step", "sample") and isinstance(value, int | float)]
    return values[0] == 1 if values else None


def _data(opened: OpenedStage) -> list[tuple[str, int, str]]:
    """Return name, samples of an epoch and their share, of each data set."""
    draws = opened.data.mixture.draws
    total = max(1, sum(draws))
    names = [data_set.source.name for data_set in opened.data.index.data_sets]
    return [(name, number, f"{number / total:.1%}") for name, number in zip(names, draws, strict=True)]
