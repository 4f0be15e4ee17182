"""Charts of a comparison: a measure against samples, time and memory, a colour for each variant, a line for each run.

Comes in: what each run reached, and on the way there. Goes out: `Markup` for the page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llavaforge.report.svg import TEXT, svg_style, to_svg

NUM_COLOURS = 8
_STYLES = ("-", "--", ":", "-.")  # each with all colours
_STAND_INS = [f"#0000{number:02x}" for number in range(1, NUM_COLOURS + 1)]
_COLOURS = {name: f"var(--series-{number})" for number, name in enumerate(_STAND_INS)} | {TEXT: "var(--faint)"}
_WIDE = 30  # times the smallest value: a linear axis would leave the better half of the curves in its last pixels


@dataclass(frozen=True)
class Line:
    """What one run reached: one point, which is a dot, or several in the order of training.

    Attributes:
        number: of its variant, which gives the colour.
        name: told by the pointer.
        x: where it stood.
        y: the measure there.
    """

    number: int
    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """A measure against one thing; panels side by side share the measure's axis."""

    label: str
    lines: Sequence[Line]


def draw(title: str, label: str, panels: Sequence[Panel]) -> Markup:
    """Draw panels side by side.

    Args:
        title: of the figure.
        label: of the measure's axis.
        panels: at least one.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    values = [y for panel in panels for line in panel.lines for y in line.y]
    is_log = bool(values) and min(values) > 0 and max(values) > _WIDE * min(values)
    with svg_style():
        width, height = 3.4 * len(panels), 2.7
        figure = Figure(figsize=(width, height))
        # Inches for labels, as constrained layout has them in twice the time.
        figure.subplots_adjust(0.75 / width, 0.45 / height, 1 - 0.15 / width, 1 - 0.1 / height, 0.05)
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(all_axes, panels, strict=True):
            for line in panel.lines:
                colour = _STAND_INS[line.number % NUM_COLOURS]
                style = _STYLES[line.number // NUM_COLOURS % len(_STYLES)]
                if len(line.x) > 1:
                    axes.plot(line.x, line.y, style, color=colour, linewidth=1.2, gid=f"{line.name}: its way")
                else:
                    (dot,) = axes.plot(line.x, line.y, "o", color=colour, markersize=5, alpha=0.8, clip_on=False)
                    dot.set_gid(f"{line.name}: {line.y[0]:.4g}")
            axes.set(xlabel=panel.label, yscale="log" if is_log else "linear")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.2, linewidth=0.5)
        all_axes[0].set_ylabel(label)
        svg = to_svg(figure, _COLOURS)
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}</figure>').format(title, svg)
