"""All rows, one after the other, and their table."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.gpu.rows import ROWS, SIZES, Row
from llavaforge.machine.facts import machine_facts

_LONGEST_S = 240


def run_row(row: Row) -> dict[str, Any]:
    """Measure a row in a process of its own."""
    command = [sys.executable, "-m", "bench.gpu.row", json.dumps(asdict(row))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {_LONGEST_S} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def line(row: Row, result: dict[str, Any]) -> str:
    """Return a row of the table."""
    row = replace(row, num_samples=result.get("num_samples", row.num_samples))
    if "error" in result:
        return f"{row.title:<80}{result['error'][:80]}"
    figures = f"{result['samples_per_s']:8.2f} samples/s  MFU {result['mfu']:5.1%}"
    return f"{row.title:<80}{figures}  {result['peak_memory_bytes'] / 1e9:6.1f} GB  step {result['step_s']:.3f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="published")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of rows, from 0")
    parser.add_argument("--minutes", type=float, default=120.0, help="begin no row after so many")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    rows = [replace(row, size=options.size) for row in ROWS]
    begin, results = time.monotonic(), []
    for number in options.only or range(len(rows)):
        if time.monotonic() - begin > 60 * options.minutes:
            sys.stderr.write(f"row {number} and later ones: no time left\n")
            break
        results.append({**asdict(rows[number]), **run_row(rows[number])})
        sys.stdout.write(line(rows[number], results[-1]) + "\n")
        sys.stdout.flush()
        if options.output is not None:
            options.output.write_text(json.dumps({"machine": machine_facts(), "rows": results}, indent=1) + "\n")
