"""The report of a comparison, and its result: what each variant reached, and which differences exceed the spread.

Comes in: the runs that are done. Goes out: `report.html`, and the values of the JSON line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

from markupsafe import Markup

from llavaforge.comparison.answers import make_cards
from llavaforge.comparison.charts import NUM_COLOURS, Line, Panel, draw
from llavaforge.comparison.measures import (
    LOSS,
    NOT_SHARES,
    Values,
    in_cell,
    in_words,
    mean_and_spread,
    measures_of,
    name_of,
)
from llavaforge.comparison.runs import Run
from llavaforge.comparison.spread import Verdict, compare_all
from llavaforge.comparison.variants import Variant, budget_of
from llavaforge.config.schema import CompareConfig
from llavaforge.files import replace_text
from llavaforge.report.page import OWN_PAGE, count, render
from llavaforge.results import CompareResult

OWN = OWN_PAGE
_GB = 1e9
Curve = list[dict[str, float]]  # see `Run.curve`


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        config: of the comparison.
        variants: in the recipe's order.
        runs: all of them, in the order in which they are done.
        left_out: train types that do not fit, and why.
        failed: runs that failed in this start, and why.
    """

    config: CompareConfig
    variants: Sequence[Variant]
    runs: Sequence[Run]
    left_out: Mapping[str, str]
    failed: dict[str, str] = field(default_factory=dict)

    def results(self) -> dict[Run, dict[str, Any]]:
        """Return the results of the runs that are done."""
        found = {run: run.result() for run in self.runs}
        return {run: result for run, result in found.items() if result is not None}


@dataclass(frozen=True)
class Row:
    """A variant in the table.

    Attributes:
        number: which gives its colour.
        variant: what it is.
        num_steps: of each of its runs.
        num_done: of its runs.
        measures: mean over seeds and spread of each measure, as text.
        costs: the same of samples per second, minutes of training and GB at the peak.
    """

    number: int
    variant: Variant
    num_steps: int
    num_done: int
    measures: list[str]
    costs: list[str]


def summarize(comparison: Comparison, report: Path, num_trained: int) -> CompareResult:
    """Return the values of the JSON line of a comparison whose runs are all done."""
    results = comparison.results()
    measures = measures_of(results)
    variants: dict[str, dict[str, Any]] = {}
    for variant in comparison.variants:
        mine = {run: result for run, result in results.items() if run.variant is variant}
        summary: dict[str, Any] = {
            "num_learning": variant.num_learning,
            "num_steps": next(iter(mine)).num_steps,
            "num_samples": next(iter(mine)).num_steps * variant.batch_size,
        }
        for name, of_variants in measures.items():
            values = list(of_variants.get(variant.name, {}).values())
            summary[name] = fmean(values) if values else None  # of none of its models is the loss finite
            summary[f"{name}_spread"] = stdev(values) if len(values) > 1 else None
        for name in ("samples_per_s", "peak_memory_bytes"):
            summary[name] = fmean(result["train"][name] for result in mine.values())
        variants[variant.name] = summary
    return {
        "output_dir": str(comparison.config.output_dir),
        "report": str(report),
        "num_runs": len(comparison.runs),
        "num_trained": num_trained,
        "best": min(measures.get(LOSS, {}), key=lambda name: variants[name][LOSS], default=None),
        "variants": variants,
        "differences": [asdict(one) | {"verdict": one.verdict} for one in compare_all(measures)],
    }


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the page on what is done so far."""
    results = comparison.results()
    measures = measures_of(results)
    differences, curves = compare_all(measures), {run: run.curve() for run in results}
    by_verdict: dict[str, list[str]] = {verdict: [] for verdict in get_args(Verdict)}
    for one in sorted(differences, key=lambda one: (one.p_among_all is None, one.p_among_all, one.p)):
        by_verdict[one.verdict].append(in_words(one))
    page = render(
        Path(__file__).parent / "compare.html.jinja",
        facts=_facts(comparison, results),
        rows=[_row(comparison, number, results, measures) for number in range(len(comparison.variants))],
        measures=[name_of(name) for name in measures],
        notes=_notes(comparison, results),
        num_runs=len(comparison.runs),
        num_done=len(results),
        num_seeds=len(comparison.config.seeds),
        num_judged=sum(one.p is not None for one in differences),
        sentences=by_verdict,
        charts=_charts(comparison, results, measures, curves),
        on_the_way=_on_the_way(comparison.variants, curves),
        cards=make_cards(list(results)),
        colours={variant.name: number % NUM_COLOURS for number, variant in enumerate(comparison.variants)},
        left_out=comparison.left_out,
        failed=comparison.failed,
    )
    replace_text(path, page, OWN)


def _row(
    comparison: Comparison,
    number: int,
    results: Mapping[Run, dict[str, Any]],
    measures: Mapping[str, Values],
) -> Row:
    variant = comparison.variants[number]
    mine = {run: result["train"] for run, result in results.items() if run.variant is variant}
    cells = [in_cell(name, list(of.get(variant.name, {}).values())) for name, of in measures.items()]
    num_steps = next(run.num_steps for run in comparison.runs if run.variant is variant)
    costs = [
        mean_and_spread([train["samples_per_s"] for train in mine.values()], 1),
        mean_and_spread([_seconds(run, train) / 60 for run, train in mine.items()], 2),
        mean_and_spread([train["peak_memory_bytes"] / _GB for train in mine.values()], 2),
    ]
    return Row(number, variant, num_steps, len(mine), cells, costs)


def _seconds(run: Run, train: Mapping[str, Any]) -> float:
    """Return how long the steps of a run took."""
    return run.num_steps * run.variant.batch_size / max(1e-9, train["samples_per_s"])


def _facts(comparison: Comparison, results: Mapping[Run, dict[str, Any]]) -> dict[str, str]:
    config, variant = comparison.config, comparison.variants[0]
    ((budget, amount),) = budget_of(config).items()
    devices = list(dict.fromkeys(result["device"] for result in results.values()))
    told = f"{amount:.3g} FLOPs" if budget == "budget_flops" else f"{count(amount)} {budget.removeprefix('budget_')}"
    return {
        "model": config.model_name_or_path,
        "data": ", ".join(str(entry.path) for entry in config.entries),
        "held out": f"{count(len(variant.held_out.rows))} records of "
        + (", ".join(str(entry.path) for entry in config.eval_entries) or "these"),
        "budget of each run": told,
        "seeds": ", ".join(map(str, config.seeds)),
        "runs done": f"{len(results)} of {len(comparison.runs)}",
        "device": ", ".join(devices) or "-",
    }


def _notes(comparison: Comparison, results: Mapping[Run, dict[str, Any]]) -> list[str]:
    """Return what a reader must know to read the numbers rightly."""
    config, variants = comparison.config, comparison.variants
    notes = [
        f"± is the standard deviation over seeds; the held-out records are the same for all. The learning rate "
        f"({', '.join(dict.fromkeys(one.values.get('lr_scheduler_type', 'cosine') for one in variants))}) runs over "
        "each run's own number of steps.",
        "Time is that of the training steps: loading, evaluation and saving are not in it. Memory is the peak of the "
        "training process (on a CPU its resident memory).",
    ]
    if config.budget_minutes is not None:
        notes.append(
            "The budget is minutes: a rehearsal of twelve steps measured a variant's step, and its number of steps was "
            "fixed by that once (compare.json), so that the runs can be repeated. What they took in the end is in the "
            "table. Layers are not compiled unless the recipe says so (compile: true)."
        )
    if len({(one.identity["held-out data"], one.identity["prompt_style"]) for one in variants}) > 1:
        notes.append(
            "The variants read the held-out records as different tokens (another tokenizer, template or length): their "
            "losses per token are not of the same thing. Compare their answers."
        )
    if len({result["device"] for result in results.values()}) > 1:
        notes.append("The runs were made on different devices: do not compare their time and memory.")
    return notes


def _on_the_way(variants: Sequence[Variant], curves: Mapping[Run, Curve]) -> str:
    """Return what the curves of metrics are of, if there are any that are not of all held-out records."""
    num_records = len(variants[0].held_out.rows)
    asked = {one.values.get("eval_generate_samples", 0) for one in variants}
    numbers = " or ".join(f"{number:,}" for number in sorted(asked) if 0 < number < num_records)
    has_curves = any(point.keys() - {"samples", "seconds", LOSS} for points in curves.values() for point in points)
    if not numbers or not has_curves:
        return ""
    return (
        f"The lines of metrics are of the answers about {numbers} held-out records, the same each time, the dots of "
        f"those about all {num_records:,}: a line may end beside its dot."
    )


def _charts(
    comparison: Comparison,
    results: Mapping[Run, dict[str, Any]],
    measures: Mapping[str, Values],
    curves: Mapping[Run, Curve],
) -> list[Markup]:
    numbers = {variant.name: number for number, variant in enumerate(comparison.variants)}
    ends = {
        run: {
            "samples": float(run.num_steps * run.variant.batch_size),
            "minutes of training": _seconds(run, result["train"]) / 60,
            "peak memory, GB": result["train"]["peak_memory_bytes"] / _GB,
        }
        for run, result in results.items()
    }
    samples, minutes, memory = ("samples", "minutes of training", "peak memory, GB")
    charts = []
    for measure, values in measures.items():
        scale = 1 if measure in NOT_SHARES else 100
        of_runs = {
            run: scale * values[run.variant.name][run.seed]
            for run in results
            if run.seed in values.get(run.variant.name, {})
        }
        panels = {
            label: [Line(numbers[run.variant.name], run.name, [ends[run][label]], [y]) for run, y in of_runs.items()]
            for label in (samples, minutes, memory)
        }
        for run, points in curves.items():
            if len(way := [point for point in points if measure in point]) > 1:
                y, number = [scale * point[measure] for point in way], numbers[run.variant.name]
                panels[samples].append(Line(number, run.name, [point["samples"] for point in way], y))
                panels[minutes].append(Line(number, run.name, [point["seconds"] / 60 for point in way], y))
        name = name_of(measure)
        title, unit = f"{name[0].upper()}{name[1:]}, each run", "" if measure in NOT_SHARES else ", %"
        charts.append(draw(title, name + unit, [Panel(label, lines) for label, lines in panels.items()]))
    return charts
