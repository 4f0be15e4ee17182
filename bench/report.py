"""Figures from the contenders' reports: a table for people, JSON for comparisons.

Memory is the most resident memory of the training process, its loader workers apart.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.race.race import WARMUP_STEPS, Report
from bench.race.work import StepWork
from bench.scenarios import SIDE_TITLES, Scenario, Side

_MIB = 2**20


def side_figures(told: Report, steps: Sequence[StepWork], batch_size: int, peak_flops: float) -> dict[str, Any]:
    """Return one contender's figures over the measured steps.

    Args:
        told: what it reported.
        steps: the work of every step, warm-up included.
        batch_size: samples per step.
        peak_flops: FLOP/s of a matrix product on this machine.
    """
    seconds, num_steps = sum(told.seconds), len(told.seconds)
    measured = steps[WARMUP_STEPS : WARMUP_STEPS + num_steps]
    return {
        "samples_per_s": batch_size * num_steps / seconds,
        "supervised_tokens_per_s": sum(step.supervised for step in measured) / seconds,
        "tokens_per_s": sum(step.tokens for step in measured) / seconds,
        "mfu": sum(step.flops for step in measured) / seconds / peak_flops,
        "cpu_s_per_sample": sum(told.cpu_seconds) / (batch_size * num_steps),
        "padding_share": 1 - sum(told.counts["tokens"]) / sum(told.counts["padded"]),
        "peak_memory_bytes": told.steps[-1]["peak_memory_bytes"],
        "worker_memory_bytes": max(step["worker_memory_bytes"] for step in told.steps),
        "step_time_s": told.seconds,
        "losses": told.losses,
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return how many times less ours took: median, least and most over the pairs of a step with the same samples."""
    pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs), "pairs": pairs}


def scenario_figures(scenario: Scenario, sides: dict[Side, Any], reports: dict[Side, Report]) -> dict[str, Any]:
    """Return a scenario's entry of the JSON file."""
    ours, others = reports["ours"], {side: told for side, told in reports.items() if side != "ours"}
    ratios = {side: ratio(ours.seconds, told.seconds) for side, told in others.items()}
    return {
        "name": scenario.name,
        "data": scenario.data,
        "train_type": scenario.train_type,
        "num_learning": ours.steps[0]["num_learning"],
        "sides": sides,
        "speedup": ratios,
        "cpu_time_ratio": {side: ratio(ours.cpu_seconds, told.cpu_seconds) for side, told in others.items()},
        "memory_ratio": sides["usual"]["peak_memory_bytes"] / sides["ours"]["peak_memory_bytes"],
        "bar": scenario.bar,
        "bar_met": ratios["usual"]["median"] >= scenario.bar,
    }


def print_shares(shares: dict[str, dict[str, float]], console: Console) -> None:
    """Print the share of the forward FLOPs per part and model."""
    models = list(shares)
    table = Table("share of the forward FLOPs", title="A caption sample", title_justify="left")
    for model in models:
        table.add_column(model, justify="right")
    for part in shares[models[0]]:
        table.add_row(part, *(f"{shares[model][part]:.1%}" for model in models))
    console.print(table)


def print_scenario(figures: dict[str, Any], console: Console) -> None:
    """Print one scenario's table."""
    title = f"{figures['data']}, {figures['train_type']} ({figures['num_learning']:,} parameters learn)"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("samples/s", "supervised tok/s", "tok/s", "CPU s/sample", "padding", "MFU", "memory", "workers"):
        table.add_column(heading, justify="right")
    table.add_column("ours is faster", justify="right", no_wrap=True)
    for side, row in figures["sides"].items():
        table.add_row(SIDE_TITLES[side], *_cells(row), _speedup(figures["speedup"].get(side)))
    console.print(table)
    verdict = "met" if figures["bar_met"] else "MISSED"
    cpu = figures["cpu_time_ratio"]["usual"]["median"]
    console.print(
        f"  bar {figures['bar']}x: {verdict}; CPU time {cpu:.2f}x less, memory {figures['memory_ratio']:.2f}x less\n"
    )


def print_machine(machine: dict[str, Any], console: Console) -> None:
    """Print the machine's description."""
    text = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "libraries")
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    console.print(f"{text}\n{libraries}\n")


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['samples_per_s']:.2f}",
        f"{row['supervised_tokens_per_s']:.1f}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['cpu_s_per_sample']:.2f}",
        f"{row['padding_share']:.0%}",
        f"{row['mfu']:.0%}",
        f"{row['peak_memory_bytes'] / _MIB:,.0f} MiB",
        f"{row['worker_memory_bytes'] / _MIB:,.0f} MiB",
    ]


def _speedup(value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{value['median']:.2f}x ({value['min']:.2f} - {value['max']:.2f})"
