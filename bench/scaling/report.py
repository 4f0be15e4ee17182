"""The tables of `bench/scaling/run.py` for people. Megabytes and gigabytes are powers of ten."""

from typing import Any

from rich.console import Console
from rich.table import Table

from bench.report import print_machine


def print_all(results: dict[str, Any], console: Console) -> None:
    """Print everything that was measured."""
    print_machine(results["machine"], console)
    print_speed(results, console)
    print_bytes(results, console)
    print_checkpoints(results, console)


def print_speed(results: dict[str, Any], console: Console) -> None:
    """Print samples per second of two processes against one."""
    table = _table(
        "Two processes against one, one thread each, the same global batch and samples",
        "one: samples/s", "two: samples/s", "ratio", "least - most",
    )  # fmt: skip
    for name, row in results["speed"].items():
        ratio = row["ratio"]
        rates = [f"{row[who]['samples_per_s']:.3f}" for who in ("one", "two")]
        table.add_row(name, *rates, f"{ratio['median']:.2f}", f"{ratio['min']:.2f} - {ratio['max']:.2f}")
    console.print(table)


def print_bytes(results: dict[str, Any], console: Console) -> None:
    """Print what a process sends per step, counted, by formula, and on TCP."""
    table = _table(
        "Megabytes that a process sends per step",
        "micro-steps", "all-reduce", "all-gather", "reduce-scatter", "counted", "formula", "counted / formula",
        "on TCP", "TCP / what gloo sends",
    )  # fmt: skip
    for name, row in results["bytes"].items():
        counted, tcp = row["counted"], row["tcp"]
        kinds = [counted.get(kind, 0) for kind in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")]
        cells = [f"{value / 1e6:.2f}" for value in (*kinds, sum(counted.values()), sum(row["formula"].values()))]
        on_tcp = ("-", "-") if tcp is None else (f"{tcp / 1e6:.2f}", f"{tcp / row['tcp_expected']:.4f}")
        table.add_row(name, str(row["micro_steps"]), *cells, f"{row['ratio']:.4f}", *on_tcp)
    console.print(table)


def print_checkpoints(results: dict[str, Any], console: Console) -> None:
    """Print the times of checkpoints."""
    table = _table("Checkpoints", "processes", "MB", "save: s/GB", "load: s/GB")
    for name, row in results["checkpoints"].items():
        seconds = [f"{row[key]:.2f}" for key in ("save_s_per_gb", "load_s_per_gb")]
        table.add_row(name, str(row["processes"]), f"{row['bytes'] / 1e6:.1f}", *seconds)
    console.print(table)


def _table(title: str, *headings: str) -> Table:
    table = Table("", title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
