"""Steps with kept vision features against steps that run the tower: the same run, captions, `projector`, in turns.

    python -m bench.features

The first epoch does not count. On a busy machine `--num_threads 1` makes the processor time a measure of work.
"""

import argparse
import datetime
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.utils import logging as transformers_logging

from bench import machine
from bench.parts import make_model
from bench.race.stopwatch import cpu_time_s
from bench.samples import make_samples
from llavaforge.config.schema import TrainConfig
from llavaforge.device import compute_dtype
from llavaforge.machine.random_model import REPLICA, TINY, ModelSize
from llavaforge.training.run import train

KINDS = ("off", "disk", "memory")
# By FLOPs, what the tower takes of a step is all that can be saved: as with CLIP-L/336 and Qwen2.5-0.5B (1.38 times as
# fast without it), with CLIP-L/336 and Qwen1.5-4B (1.04), and for tests.
SIZES = {
    "half-billion": ModelSize(336, 384, 1536, 12, 6, 512, 1408, 8, 8, 6_170),
    "four-billion": REPLICA,
    "tiny": TINY,
}
_BATCH = 8
_EPOCH = 4  # steps
# Loader workers keep up to 8 batches ready. So many steps lie beyond the last one measured that they work all the time.
_SPARE_STEPS = 16


class _Enough(BaseException):
    """All steps that count are taken."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return 0."""
    options = _options(arguments)
    logging.getLogger("llavaforge").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    steps: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    described = machine.describe(compute_dtype("auto"))
    with tempfile.TemporaryDirectory(prefix="llavaforge-bench-") as name:
        folder = Path(name)
        model = make_model(folder / "model", SIZES[options.size], make_samples(folder / "data"))
        for number in range(options.rounds):
            for kind in KINDS:
                steps[kind] += _run(model, folder, f"{kind}-{number}", kind, options)
    result = {
        "date": datetime.date.today().isoformat(),
        "size": options.size,
        "compiled": options.compile == "true",
        "machine": described,
        "source_sha256": machine.source_sha256(),
        "wall": _figures({kind: [wall for wall, _ in mine] for kind, mine in steps.items()}),
        "processor": _figures({kind: [busy for _, busy in mine] for kind, mine in steps.items()}),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("wall", "processor")}, indent=1))
    return 0


def _run(model: Path, folder: Path, name: str, kind: str, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Train until enough steps after the first epoch are taken; return their seconds by the clock and the processor."""
    config = TrainConfig.model_validate(
        {
            "model_name_or_path": str(model),
            "data": [{"path": folder / "data" / "captions.json", "max_samples": _EPOCH * _BATCH}],
            "output_dir": folder / name,
            "cache_dir": folder / "cache",
            "train_type": "projector",
            "max_steps": _EPOCH + options.num_steps + _SPARE_STEPS,
            "per_device_train_batch_size": _BATCH,
            "compile": options.compile == "true",
            "save_steps": 0,
            "cache_vision_features": kind,
        }
    )
    ends: list[tuple[float, float]] = []

    def after_step(*_: Any) -> None:
        ends.append((time.perf_counter(), cpu_time_s()))
        if len(ends) == _EPOCH + options.num_steps:
            raise _Enough

    hook = register_optimizer_step_post_hook(after_step)
    try:
        train(config)
    except _Enough:
        pass
    finally:
        hook.remove()
    counted = ends[_EPOCH - 1 :]
    return [(end - begin, busy - before) for (begin, before), (end, busy) in pairwise(counted)]


def _figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the steps' seconds, samples per second of the median step, and how they compare."""
    medians = {kind: statistics.median(mine) for kind, mine in seconds.items()}
    return {
        "step_s": seconds,
        "samples_per_s": {kind: _BATCH / median for kind, median in medians.items()},
        "times_as_fast": {kind: medians["off"] / median for kind, median in medians.items()},
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.features", description=__doc__)
    default = Path("bench") / "results" / f"{datetime.date.today().isoformat()}-features-cpu.json"
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes (default: %(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="half-billion", help="tower and language model")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, taking turns (default: %(default)s)")
    parser.add_argument("--num_steps", type=int, default=8, help="measured steps of a run (default: %(default)s)")
    parser.add_argument("--num_threads", type=int, help="of the training process (default: torch's)")
    parser.add_argument("--compile", choices=["true", "false"], default="false", help="layers, as in a long run")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
