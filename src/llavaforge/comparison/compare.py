"""`llavaforge compare`: several ways to train under one budget, each with several seeds; one report.

Comes in: a training recipe, what is compared, the seeds and the budget. Goes out, in `output_dir`:

    compare.json    what is compared, and the number of steps of each variant
    runs/           a folder for each variant, see `comparison/runs.py`
    report.html     written anew after every run

The story: open every variant -> settle how many steps each gets -> train and evaluate what is not done yet, seed by
seed -> tell which differences exceed the spread over seeds.
"""

import fcntl
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llavaforge.comparison.child import prepare_children
from llavaforge.comparison.report import OWN, Comparison, summarize, write_report
from llavaforge.comparison.runs import RUNS, Run, rehearse
from llavaforge.comparison.variants import Variant, budget_of, open_variants
from llavaforge.config.schema import OF_COMPARISON, CompareConfig
from llavaforge.errors import RunFailed, UserError, reading
from llavaforge.files import PREFIX, check_own, replace_text, to_json
from llavaforge.processes.launch import num_processes
from llavaforge.progress import Bar
from llavaforge.results import CompareResult
from llavaforge.training.signals import StopRequest
from llavaforge.version import __version__

logger = logging.getLogger(__name__)

REPORT = "report.html"
_PLAN = "compare.json"
_NEEDED = ("output_dir", "eval_data_path", "validation_split", "stages", "eval_data")  # of what is the same for all


def compare(config: CompareConfig) -> CompareResult:
    """Train every variant with every seed, one after the other; those that are done are not done again.

    Returns:
        output_dir, report, num_runs, num_trained, best, variants, differences.

    Raises:
        UserError: the recipe, the model or the data is at fault, or the folder belongs to another comparison; a
        `RunFailed` in the end when some of the runs failed.
        StoppedEarly: a signal asked for it; the run that was going on is saved.
    """
    if num_processes() > 1:
        raise UserError("compare: its runs take one process each. Start it without torchrun or srun.")
    for name in sorted(config.model_fields_set & OF_COMPARISON.keys() - set(_NEEDED)):
        logger.info("the recipe's %s is not used: it is the same for all, %s", name, OF_COMPARISON[name])
    with StopRequest() as stop, _claimed(config.output_dir):
        prepare_children()
        variants, left_out = open_variants(config)
        if "none" not in config.metrics and all(one.identity["eval_metrics"] == ["none"] for one in variants):
            logger.info("no metric suits all held-out answers: losses alone are compared (metrics NAME asks for one)")
        plan = _checked_plan(config, variants)
        with stop.postponed():
            steps, failed = _all_steps(config, variants, plan, stop)
            variants = [variant for variant in variants if variant.name in steps]
            runs = [Run(config, variant, seed, steps[variant.name]) for seed in config.seeds for variant in variants]
            comparison = Comparison(config, variants, runs, left_out, failed)
            num_trained = _do_all(comparison, config.output_dir / REPORT, stop)
    if comparison.failed:
        raise RunFailed(
            f"what failed: {'; '.join(comparison.failed)}. {config.output_dir / REPORT} says why, and has the others; "
            "started again, compare tries once more what failed."
        )
    return summarize(comparison, config.output_dir / REPORT, num_trained)


def _do_all(comparison: Comparison, report: Path, stop: StopRequest) -> int:
    """Do the runs that are not done, and write the report after each; return how many were done."""
    runs, num_trained = comparison.runs, 0
    waiting = [run for run in runs if run.result() is None]
    if len(waiting) < len(runs):
        logger.info("%d of %d runs are done already", len(runs) - len(waiting), len(runs))
    with Bar("comparing") as bar:
        for number, run in enumerate(waiting):
            where = f"run {number + 1} of {len(waiting)}: {run.name}"
            logger.info(where)

            def watch(step: int, number: int = number, run: Run = run, where: str = where) -> None:
                if step:  # before, nothing tells how long it takes
                    share = (number + step / run.num_steps) / len(waiting)
                    bar.update(share, f"{where}  step {step}/{run.num_steps}  ")

            try:
                result = run.do(stop, watch)
                num_trained += 1
                told = "%s: held-out loss %.4f after %d samples, %.1f samples/s"
                loss, speed = result["evaluation"]["loss"], result["train"]["samples_per_s"]
                samples = run.num_steps * run.variant.batch_size
                logger.info(told, run.name, math.nan if loss is None else loss, samples, speed)
            except RunFailed as error:  # of memory, say: the others may still go
                comparison.failed[run.name] = str(error)
                logger.error("%s", error)
            write_report(comparison, report)
    if not waiting:
        write_report(comparison, report)
    return num_trained


@contextmanager
def _claimed(output_dir: Path) -> Iterator[None]:
    """Hold a folder for this comparison while the block lasts.

    Raises:
        UserError: it holds something else, or another process is comparing there.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir}: is a file. Give another output_dir.")
    there = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
    strangers = sorted(name for name in there if not name.startswith(PREFIX))
    if strangers and _PLAN not in strangers:
        raise UserError(
            f"{output_dir}: not empty and not a comparison (it holds {', '.join(strangers[:3])}). "
            "Give another output_dir."
        )
    check_own(output_dir / REPORT, OWN)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / f"{PREFIX}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{output_dir}: another process is comparing here. Wait for it to end.") from None
        yield


def _checked_plan(config: CompareConfig, variants: list[Variant]) -> dict[str, Any]:
    """Return what is kept of each variant between starts, by name; what has been begun must be what is asked for now.

    Raises:
        UserError: a variant that has been begun differs.
    """
    path = config.output_dir / _PLAN
    known: dict[str, Any] = {}
    if path.is_file():
        with reading(path, "It says what the runs in this folder are: restore it, or give another output_dir."):
            stored = json.loads(path.read_text())
            known = dict(stored["variants"])
        if stored.get("llavaforge") != __version__:
            logger.warning("%s was begun with llavaforge %s", config.output_dir, stored.get("llavaforge"))
    for variant in variants:
        if (before := known.get(variant.name, {}).get("identity")) is None:
            continue
        now = variant.identity
        # What an older version did not write down is not compared.
        if not (names := sorted(name for name in before if before[name] != now.get(name))):
            known[variant.name]["identity"] = now
            continue
        if not (config.output_dir / RUNS / variant.name).exists():
            del known[variant.name]
            continue
        lines = [f"  {name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in names]
        raise UserError(
            f"{config.output_dir}: `{variant.name}` was begun with another recipe, which differs in\n"
            + "\n".join(lines)
            + "\nGive another output_dir, the same options, or the variant another name (new ones and seeds may come)."
        )
    for variant in variants:
        known.setdefault(variant.name, {"identity": variant.identity})
    _write_plan(path, known)
    return known


def _all_steps(
    config: CompareConfig, variants: list[Variant], plan: dict[str, Any], stop: StopRequest
) -> tuple[dict[str, int], dict[str, str]]:
    """Return the number of steps of each variant, and why a rehearsal failed, by its name.

    Raises:
        RunFailed: all of them did.
    """
    steps, failed = {}, {}
    for variant in variants:
        try:
            steps[variant.name] = _num_steps(config, variant, plan, stop)
        except RunFailed as error:
            failed[f"rehearsal of {variant.name}"] = str(error)
            logger.error("%s", error)
    if not steps:
        raise RunFailed("every rehearsal failed: see above.")
    return steps, failed


def _num_steps(config: CompareConfig, variant: Variant, plan: dict[str, Any], stop: StopRequest) -> int:
    """Return how many steps the budget gives a variant; settled once, so that it stays when compare is started again.

    Raises:
        UserError: not one.
    """
    entry = plan[variant.name]
    if "num_steps" in entry:
        return int(entry["num_steps"])
    ((budget, amount),) = budget_of(config).items()
    if budget == "budget_minutes":
        logger.info("rehearsal: how long a step of %s takes", variant.name)
        entry["step_time_s"] = rehearse(config, variant, stop, lambda step: None)
        cost, unit, amount = entry["step_time_s"], "seconds", 60 * amount
    elif budget == "budget_flops":
        cost, unit = variant.flops_per_sample * variant.batch_size, "FLOPs"
    else:
        cost, unit = variant.batch_size, "samples"
    if amount < cost:
        raise UserError(
            f"{budget}: {amount:g} {unit} are less than one step of {variant.name}, which takes {cost:g}. Give more."
        )
    entry["num_steps"] = int(amount // cost)
    _write_plan(config.output_dir / _PLAN, plan)
    logger.info("%s: %d steps of %d samples", variant.name, entry["num_steps"], variant.batch_size)
    return int(entry["num_steps"])


def _write_plan(path: Path, variants: dict[str, Any]) -> None:
    replace_text(path, to_json({"llavaforge": __version__, "variants": variants}, indent=1) + "\n")
