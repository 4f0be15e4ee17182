"""Run the tests of the table, and write `docs/reliability.md` from what came of them.

Comes in: `table.py`. Goes out: the page, with how many cases of each class were tried and held, and what a kill costs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.faults.costs import measure_costs
from bench.faults.table import CLASSES, NOT_APPLICABLE, FaultClass

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"


def run_tests(output: Path) -> tuple[dict[tuple[str, str], list[bool]], int]:
    """Run all tests of the table; return the outcomes by (file, function), and how many examples are drawn."""
    tests = sorted({test for one in CLASSES for test in one.tests})
    command = [sys.executable, "-m", "pytest", f"--junitxml={output}", *tests]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    print("\n".join(done.stdout.splitlines()[-1:]), file=sys.stderr)
    outcomes: dict[tuple[str, str], list[bool]] = {}
    for case in ElementTree.parse(output).iter("testcase"):
        if case.find("skipped") is None:
            key = (case.attrib["classname"].replace(".", "/") + ".py", case.attrib["name"].split("[")[0])
            passed = case.find("failure") is None and case.find("error") is None
            outcomes.setdefault(key, []).append(passed)
    drawn = (ROOT / test.split("::")[0] for test in tests)
    examples = sum(int(number) for file in set(drawn) for number in re.findall(r"max_examples=(\d+)", file.read_text()))
    return outcomes, examples


def count(one: FaultClass, outcomes: dict[tuple[str, str], list[bool]]) -> tuple[int, int]:
    """Return how many cases of a class were tried, and how many held."""
    mine = [
        passed
        for (file, function), results in outcomes.items()
        if file in one.tests or f"{file}::{function}" in one.tests
        for passed in results
    ]
    return len(mine), sum(mine)


def page(counts: Sequence[tuple[int, int]], examples: int, costs: dict[str, Any]) -> str:
    """Return `docs/reliability.md`."""
    lines = [
        "# What goes wrong, and what happens then", "",
        "Written by `make faults`, which runs the tests named here. Cases are test cases; besides them, "
        f"{examples:,} inputs were drawn at random (hypothesis).", "",
        "| class of fault | what happens | cases held | tests |", "|---|---|---|---|",
    ]  # fmt: skip
    for one, (tried, held) in zip(CLASSES, counts, strict=True):
        tests = ", ".join(f"`{test.split('::')[-1]}`" for test in one.tests)
        lines.append(f"| {one.name} | {one.then} | {held} of {tried} | {tests} |")
    faults, inputs = (
        [pair for one, pair in zip(CLASSES, counts, strict=True) if one.is_input == is_input]
        for is_input in (False, True)
    )
    lines += [
        "",
        f"Faults tried {sum(tried for tried, _ in faults)}, survived {sum(held for _, held in faults)}. Bad inputs "
        f"tried {sum(tried for tried, _ in inputs)}, refused clearly or read {sum(held for _, held in inputs)}.",
        "",
        f"A run of quickstart's parts on this machine: {costs['recovery_s']:.1f} s from a kill to the next step "
        f"(a start of the program included); at save_steps {costs['save_steps']} training waits for saves for "
        f"{costs['share_saving']:.1%} of the time, {costs['save_s']:.2f} s a checkpoint.", "",
        "`make soak` kills, signals, damages and starves runs at random for half an hour.", "",
        "## What does not apply", "",
        *(f"- {name}: {why}." for name, why in NOT_APPLICABLE.items()), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests of the table and write the page; exit 1 when one did not hold."""
    argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__).parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        os.environ["LLAVAFORGE_CACHE"] = str(Path(folder) / "cache")
        costs = measure_costs(Path(folder))
        outcomes, examples = run_tests(Path(folder) / "results.xml")
    counts = [count(one, outcomes) for one in CLASSES]
    PAGE.write_text(page(counts, examples, costs))
    print(PAGE.read_text())
    print(json.dumps({"tried": sum(tried for tried, _ in counts), "held": sum(held for _, held in counts), **costs}))
    return int(any(tried != held or not tried for tried, held in counts))


if __name__ == "__main__":
    sys.exit(main())
