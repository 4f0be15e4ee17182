"""An estimate as a table for people, on stdout."""

from rich.console import Console
from rich.table import Table

from llavaforge.results import EstimateResult, EstimateRow

_PARTS = ("weights", "gradients", "optimizer", "buffers", "activations", "logits", "total")
_WIDEST = 250


def show(result: EstimateResult) -> None:
    """Print parameters, all rows, and what they hang on."""
    console = Console()
    parameters = Table("part", "parameters")
    parameters.columns[1].justify = "right"
    for part, count in result["parameters"].items():
        parameters.add_row(part.replace("_", " "), f"{count:,}", end_section=part == "language_model")
    console.print(parameters)
    rows = _rows(result)  # as wide as it is: a narrower terminal breaks its lines, but no figure is cut off
    needed = console.measure(rows, options=console.options.update(width=_WIDEST)).maximum
    Console(width=max(console.width, needed)).print(rows)
    assumed = {"micro_batch": result["micro_batch"], **result["assumptions"]}
    told = ", ".join(f"{name} {value}" for name, value in assumed.items() if value is not None)
    console.print(f"{result['num_gpus']} x {result['gpu']}: {told}", markup=False, highlight=False, soft_wrap=True)


def _rows(result: EstimateResult) -> Table:
    table = Table(title="GB (10^9 bytes) per GPU; an epoch", caption="* as the options ask", padding=(0, 1, 0, 0))
    for name in ("train type", "engine"):
        table.add_column(name, no_wrap=True)
    others = ["fits", "recom-\nputed", "largest\nbatch", "MFU", "hours"]
    if result["cost_per_epoch"] is not None:
        others.append("cost")
    for name in (*(part for part in _PARTS), *others):
        table.add_column(name, justify="right", no_wrap=True)
    rows = result["rows"]
    for number, row in enumerate(rows):
        ends = number + 1 == len(rows) or rows[number + 1]["train_type"] != row["train_type"]
        table.add_row(*_cells(row, result), end_section=ends)
    return table


def _cells(row: EstimateRow, result: EstimateResult) -> list[str]:
    is_chosen = all(row[key] == result[key] for key in ("train_type", "engine"))
    every = row["recompute_every"]
    cells = [row["train_type"] + " *" * is_chosen, row["engine"]]
    cells += [f"{row['memory_per_gpu'][part] / 1e9:.1f}" for part in _PARTS]
    cells += ["yes" if row["fits"] else "no", {0: "-", 1: "all"}.get(every, f"1 in {every}")]
    cells += [str(row["largest_micro_batch"]), f"{row['mfu']:.0%}", f"{row['hours_per_epoch']:.1f}"]
    return cells if row["cost_per_epoch"] is None else [*cells, f"{row['cost_per_epoch']:,.2f}"]
