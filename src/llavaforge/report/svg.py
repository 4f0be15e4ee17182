"""Matplotlib's figures as inline SVG, which take their colours from the page (`style.css`): light and dark.

Comes in: a figure drawn within `svg_style` in stand-in colours. Goes out: `Markup` for a page's template.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

TEXT = "#000000"
"""The stand-in for texts and axes, which is what matplotlib draws them in."""
_TITLE_OF_GROUP = re.compile(r'<g id="([^"]*: [^"]*)">')  # an id with a colon and a blank is what the pointer shows


@contextmanager
def svg_style() -> Iterator[None]:
    """Let matplotlib write texts as texts, and the same bytes every time."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "-", "font.sans-serif": ["DejaVu Sans"], "font.size": 8}):
        yield


def to_svg(figure: Any, colours: Mapping[str, str]) -> Markup:
    """Return a figure as an element of HTML.

    Args:
        figure: of matplotlib; an artist's `gid` with a colon and a blank becomes its tooltip.
        colours: from the stand-ins it is drawn in to CSS values.
    """
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = re.sub(r'^.*?(?=<svg)| xmlns(:\w+)?="[^"]*"', "", file.getvalue(), flags=re.DOTALL)  # HTML needs neither
    svg = _TITLE_OF_GROUP.sub(r"<g><title>\1</title>", svg)
    return Markup(re.sub("|".join(colours), lambda found: colours[found[0]], svg))
