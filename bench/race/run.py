"""The benchmark as a story: describe the machine, make the model and samples, race each scenario, report."""

import argparse
import dataclasses
import datetime
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from bench import machine, report
from bench.fairness import check_counts
from bench.parts import make_model
from bench.race.race import race
from bench.race.shares import forward_shares
from bench.race.work import make_tasks, work_of
from bench.samples import make_samples
from bench.scenarios import HELP_BAR_S, REAL, SCENARIOS, SIZES, Scenario
from llavaforge.device import compute_dtype
from llavaforge.machine.random_model import ModelSize
from llavaforge.training.peak_flops import measured_flops

# A typical caption sample, for the table of shares: its text with markup, and its answer with the end token.
_TEXT_TOKENS, _SUPERVISED = 50, 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return 0; a missed bar is a result, not an error."""
    options = _options(arguments)
    logging.getLogger("llavaforge").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console(width=150)
    if options.num_threads:
        os.environ["OMP_NUM_THREADS"] = str(options.num_threads)  # the contenders inherit it
        torch.set_num_threads(options.num_threads)
    dtype = compute_dtype(options.bf16 if options.bf16 == "auto" else options.bf16 == "true")
    results: dict[str, Any] = {"date": _today(), "size": options.size, "machine": machine.describe(dtype)}
    results["vocab_size"] = _size(options).vocab_size
    results["compiled"] = options.compile == "true"
    results["source_sha256"] = machine.source_sha256()
    report.print_machine(results["machine"], console)
    sizes = [options.size, REAL]
    results["forward_shares"] = {name: forward_shares(SIZES[name], _TEXT_TOKENS, _SUPERVISED) for name in sizes}
    report.print_shares(results["forward_shares"], console)
    results["help"] = {"seconds": machine.help_seconds(), "bar_s": HELP_BAR_S}
    results["help"]["bar_met"] = results["help"]["seconds"] < HELP_BAR_S
    console.print(f"llavaforge --help: {results['help']['seconds']:.2f} s (bar {HELP_BAR_S} s)\n")
    results["scenarios"] = []
    with tempfile.TemporaryDirectory(prefix="llavaforge-bench-") as folder:
        texts = make_samples(Path(folder) / "data", options.photos)
        model = make_model(Path(folder) / "model", _size(options), texts)
        for scenario in SCENARIOS:
            if options.scenario and scenario.name not in options.scenario:
                continue
            figures = _measure(scenario, model, Path(folder), options, dtype)
            report.print_scenario(figures, console)
            results["scenarios"].append(figures)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: {options.output}")
    return 0


def _size(options: argparse.Namespace) -> ModelSize:
    size = SIZES[options.size]
    return dataclasses.replace(size, vocab_size=options.vocab_size or size.vocab_size)


def _measure(
    scenario: Scenario, model: Path, folder: Path, options: argparse.Namespace, dtype: torch.dtype
) -> dict[str, Any]:
    bf16 = dtype == torch.bfloat16
    compiled = options.compile == "true"
    tasks = make_tasks(scenario, model, folder, options.batch_size, options.num_steps, bf16, compiled)
    peak = measured_flops(torch.device("cpu"), dtype)
    reports = race(scenario, tasks, options.num_steps, folder / "logs" / scenario.name)
    peak = max(peak, measured_flops(torch.device("cpu"), dtype))
    steps = work_of(tasks["ours"])
    check_counts(
        {side: told.counts for side, told in reports.items()},
        {side: told.steps[0]["num_learning"] for side, told in reports.items()},
        [step.supervised for step in steps],
        [step.tokens for step in steps],
        options.batch_size,
    )
    sides = {side: report.side_figures(told, steps, options.batch_size, peak) for side, told in reports.items()}
    return {**report.scenario_figures(scenario, sides, reports), "matrix_product_flops": peak}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.race", description=__doc__)
    names = [scenario.name for scenario in SCENARIOS]
    default = Path("bench") / "results" / f"{_today()}-cpu.json"
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes (default: %(default)s)")
    parser.add_argument("--photos", type=Path, help="a folder of JPEG files to use instead of generated images")
    parser.add_argument("--scenario", nargs="+", choices=names, help="only these")
    parser.add_argument("--size", choices=[name for name in SIZES if name != REAL], default="replica")
    parser.add_argument("--vocab_size", type=int, help="another than the size's: Qwen1.5's 151936, for memory")
    parser.add_argument("--num_steps", type=int, default=5, help="measured steps per scenario (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="samples per step (default: %(default)s)")
    parser.add_argument(
        "--num_threads",
        type=int,
        help="of every training process (default: torch's). With 1, CPU time is work done even on a busy machine: "
        "several threads also spend it waiting for each other",
    )
    parser.add_argument("--compile", choices=["true", "false"], default="true", help="our layers, as in a long run")
    parser.add_argument("--bf16", choices=["auto", "true", "false"], default="auto", help="as in training")
    return parser.parse_args(arguments)


def _today() -> str:
    return datetime.date.today().isoformat()
