"""What a run shows while it goes: metrics.jsonl, a loss curve, and honest speed.

Comes in: counts per step. Goes out: `output_dir/metrics.jsonl`, `loss.png`, lines on stderr. One line of metrics.jsonl:

    {"step": 12, "epoch": 0.1, "loss": 2.31, "grad_norm": 1.7, "learning_rate": 0.001, "samples_per_s": 31.2,
     "tokens_per_s": 19501.0, "mfu": 0.31, "save_time_s": 0.8, "save_write_time_s": 21.4}

The last two are there only when something was saved since the line before (`Saver.take_times`).
"""

import io
from pathlib import Path
from typing import Any

from llavaforge.files import append_line, read_json_lines, replace_bytes, replace_text, to_json

METRICS = "metrics.jsonl"
CURVE = "loss.png"
_MOST_POINTS = 10  # of a curve in a card


class MetricsFile:
    """Appends to metrics.jsonl; on resume, lines of steps that will be done again are dropped."""

    def __init__(self, output_dir: Path, start_step: int) -> None:
        self._path = output_dir / METRICS
        kept = [line for line in read_metrics(output_dir) if line["step"] <= start_step]
        replace_text(self._path, "".join(to_json(line) + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        """Append one line."""
        append_line(self._path, values)


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; one that a kill cut is left out."""
    return [line for line in read_json_lines(output_dir / METRICS) if isinstance(line.get("step"), int)]


def curve(output_dir: Path) -> list[dict[str, Any]]:
    """Return loss, held-out loss and metrics of answers at some steps, the last one among them, for a model's card."""
    lines = read_metrics(output_dir)
    lines = [line for line in lines if "eval_loss" in line] or lines
    shown = lines[:: -(-len(lines) // _MOST_POINTS)] if lines else []
    shown += lines[-1:] if shown[-1:] != lines[-1:] else []
    return [
        {key: value for key, value in line.items() if key in ("step", "loss") or key.startswith("eval_")}
        for line in shown
    ]


def draw_curve(output_dir: Path) -> None:
    """Draw training and held-out loss over steps to `loss.png`."""
    lines = read_metrics(output_dir)
    if not lines:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.11, top=0.92)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o-")):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    axes.set(xlabel="step", ylabel="loss per supervised token", title=str(output_dir))
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    replace_bytes(output_dir / CURVE, picture.getvalue())
