"""The site's pages: one for every verb with all its options, and every link leads to a page."""

import re
from pathlib import Path

import pytest
from tools import write_measured
from tools.docs_pages import ROOT, pages

from llavaforge.cli import VERBS
from llavaforge.config import schema

PAGES = pages() | {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_with_all_its_options(verb: str) -> None:
    page = PAGES[f"verbs/{verb.replace(' ', '-')}.md"]
    fields = getattr(schema, VERBS[verb].schema).model_fields
    assert re.findall(r"^\*\*`--(\w+)`\*\* \(.+; (?:required|default `.*`)\)\n:   \S", page, flags=re.M) == list(fields)


@pytest.mark.parametrize("place", PAGES)
def test_every_link_of_a_page_leads_somewhere(place: str) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", PAGES[place], flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if re.match(r"https?://", link):
            continue
        target = (Path(place).parent / link).as_posix().removeprefix("./")
        assert target in PAGES or (ROOT / "docs" / target).resolve().exists(), f"{place}: {link}"


def test_options_that_others_names_lead_to_are_there() -> None:
    text = (ROOT / "docs" / "coming-from.md").read_text()
    known = {field for verb in VERBS.values() for field in getattr(schema, verb.schema).model_fields}
    ours = [row.split("|")[2] for row in text.splitlines() if row.startswith("| ") and "|---" not in row]
    named = {name for cell in ours for name in re.findall(r"--([a-z0-9_]+)|`([a-z_]+):", cell) for name in name if name}
    assert len(named) > 10 and named <= known, named - known


def test_the_page_of_figures_is_that_of_the_files_of_results() -> None:
    assert write_measured.PAGE.read_text() == write_measured.page()
