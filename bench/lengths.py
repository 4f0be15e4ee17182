"""Does the time of a step grow in proportion to its tokens? Packs of 2,000 to 32,000 tokens, `projector`, the replica.

    python -m bench.lengths

Two rounds, the second from the largest to the smallest, so that a drift of the machine shows. Goes out: seconds by
tokens, the line through them, and how far they lie from it.
"""

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from llavaforge.device import compute_dtype
from llavaforge.machine.random_model import REPLICA, TINY
from llavaforge.machine.speed import Work, measure
from llavaforge.processes.world import World

SIZES = {"replica": REPLICA, "tiny": TINY}  # the last one is for tests


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return 0."""
    options = _options(arguments)
    world, rounds = World(), []
    for numbers in (options.samples, options.samples[::-1]):
        found = {n: measure(Work(SIZES[options.size], "projector", n), world, options.num_steps) for n in numbers}
        rounds.append([found[number] for number in options.samples])
    tokens = np.array([[speed.tokens_per_s * speed.step_s for speed in round_] for round_ in rounds]).mean(0)
    seconds = np.array([[speed.step_s for speed in round_] for round_ in rounds]).min(0)
    slope, start = np.polyfit(tokens, seconds, 1, w=1 / seconds)  # the relative distance counts
    line = slope * tokens + start
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(compute_dtype("auto")),
        "source_sha256": machine.source_sha256(),
        "tokens": tokens.round().tolist(),
        "seconds": seconds.tolist(),
        "seconds_of_rounds": [[speed.step_s for speed in round_] for round_ in rounds],
        "seconds_per_1000_tokens": (1000 * seconds / tokens).tolist(),
        "from_the_line": (seconds / line - 1).tolist(),
        "start_s": float(start),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    keys = "tokens", "seconds", "seconds_per_1000_tokens", "from_the_line"
    for number, step_s, per_thousand, off in zip(*(result[key] for key in keys), strict=True):
        print(f"{number:>8.0f} tokens {step_s:>8.3f} s {per_thousand:>8.4f} s per 1,000  {off:+.1%} from the line")
    print(f"written: {options.output}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.lengths", description=__doc__)
    default = Path("bench") / "results" / f"{datetime.date.today()}-lengths-cpu.json"
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes (default: %(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="replica")
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[3, 6, 13, 26, 52], help="of a pack, in ascending order"
    )
    parser.add_argument("--num_steps", type=int, default=4, help="measured steps of each (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
