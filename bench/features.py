"""Micro-steps with kept vision features beside the same ones with the tower: captions, `projector`, taking turns.

    python -m bench.features

Each pair is one pack, forward and backward, once from pixels and once from features; what other programs take of the
machine meanwhile hits both. Reading is timed by itself, since loader workers do it beside the steps.
"""

import argparse
import datetime
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from bench import machine
from bench.parts import make_model
from bench.samples import NUM_SAMPLES, make_samples
from llavaforge.config.schema import TrainConfig
from llavaforge.data.order.plan import MicroBatch
from llavaforge.device import compute_dtype
from llavaforge.machine.random_model import REPLICA, TINY, ModelSize
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import cast_parameters
from llavaforge.processes.world import World
from llavaforge.training.features import keeping_features
from llavaforge.training.opening import open_stage

# By FLOPs, the tower's share of a step is all that can be saved. These have the shares of CLIP-L/336 and Qwen2.5-0.5B
# (1.38 times as fast without the tower), and of CLIP-L/336 and Qwen1.5-4B (1.04); the last one is for tests.
SIZES = {
    "half-billion": ModelSize(336, 384, 1536, 12, 6, 512, 1408, 8, 8, 6_170),
    "four-billion": REPLICA,
    "tiny": TINY,
}
_BATCH = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return 0."""
    options = _options(arguments)
    logging.getLogger("llavaforge").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "source_sha256": machine.source_sha256()}
    result["machine"] = machine.describe(compute_dtype("auto"))
    result["sizes"] = {name: _measure(SIZES[name], options.num_pairs) for name in options.size}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["sizes"], indent=1))
    return 0


def _measure(size: ModelSize, num_pairs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="llavaforge-bench-") as name:
        folder = Path(name)
        model = make_model(folder / "model", size, make_samples(folder / "data"))
        values = {
            "model_name_or_path": str(model),
            "data_path": folder / "data" / "captions.json",
            "output_dir": folder / "run",
            "cache_dir": folder / "cache",
            "train_type": "projector",
            "dataloader_num_workers": 0,
            "cache_vision_features": "disk",
        }
        opened = open_stage(TrainConfig.model_validate(values), World(), Console(quiet=True))
        cast_parameters(opened.loaded.model, compute_dtype("auto"))
        module = StepModule(opened.loaded.model, opened.loaded.preprocessing).train()
        starts = [number * _BATCH % NUM_SAMPLES for number in range(num_pairs + 1)]  # the first pair does not count
        batches = [MicroBatch(0, tuple(range(at, at + _BATCH)), True, 1, 999) for at in starts]
        seconds: dict[str, list[float]] = {key: [] for key in ("read", "read_kept", "step", "step_kept")}
        with keeping_features(opened, World()) as kept:
            datasets = {"": opened.dataset(opened.data.index, False), "_kept": kept.dataset(opened.data.index, False)}
            for batch in batches:
                for way, dataset in datasets.items():
                    read_s, pack = _timed(lambda dataset=dataset, batch=batch: dataset[batch])  # type: ignore[misc]
                    step_s, _ = _timed(lambda pack=pack: module(pack).backward())  # type: ignore[misc]
                    seconds[f"read{way}"].append(read_s)
                    seconds[f"step{way}"].append(step_s)
    ratios = [off / on for off, on in zip(seconds["step"][1:], seconds["step_kept"][1:], strict=True)]
    medians = {f"{key}_s": statistics.median(mine[1:]) for key, mine in seconds.items()}
    low, middle, high = statistics.quantiles(ratios, n=4)
    by_flops = sum(opened.flops.of_index(opened.data.index)) / sum(kept.flops.of_index(opened.data.index))
    return medians | {"times_as_fast": middle, "quartiles": [low, high], "by_flops": by_flops, "num_pairs": num_pairs}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    done = work()
    return time.perf_counter() - begin, done


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.features", description=__doc__)
    default = Path("bench") / "results" / f"{datetime.date.today().isoformat()}-features-cpu.json"
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes (default: %(default)s)")
    sizes = ["half-billion", "four-billion"]
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=sizes, help="tower and language model")
    parser.add_argument("--num_pairs", type=int, default=15, help="that count (default: %(default)s)")
    parser.add_argument("--num_threads", type=int, help="of the process; 1 on a busy machine (default: torch's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
