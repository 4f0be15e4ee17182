"""From a template of this folder and values to one self-contained HTML page.

Comes in: the name of a template and what it shows. Goes out: the page as text.

A page extends the skeleton `page.html.jinja`, which brings the style (`style.css`), light and dark, and a security
policy that forbids scripts and any request: what a page shows comes from other people's data.

    {% extends "page.html.jinja" %}
    {% from "parts.html.jinja" import facts, table %}
    {% block title %}My report{% endblock %}
    {% block header %}<h1>My report</h1>{{ facts({"model": model}) }}{% endblock %}
    {% block main %}{{ table(("kind", "count"), rows) }}{{ histogram }}{% endblock %}
"""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llavaforge.report.glyphs import glyphs

OWN_PAGE = r'\s*<!doctype html>(?s:.){1,200}<meta name="generator" content="llavaforge">'
"""How our pages begin (`files.check_own`)."""


def render(template: Path, **values: Any) -> str:
    """Render a template, which may extend and import those of this folder and of its own.

    Args:
        template: such as `data_preview/preview.html.jinja`.
        values: what it shows. Text is escaped; `Markup` (a chart, say) is put in as it is.

    Raises:
        jinja2.UndefinedError: the template wants a value that is not given.
    """
    return _environment(template.parent).get_template(template.name).render(**values)


def count(number: float) -> str:
    """Return a number for people: `12,345`, or three figures when it is no whole number (the filter `count`)."""
    return f"{number:,.0f}" if number == int(number) or abs(number) >= 1000 else f"{number:.3g}"


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = count
    environment.filters["glyphs"] = glyphs
    return environment
