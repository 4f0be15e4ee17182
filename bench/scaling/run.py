"""Two processes against one, as a story: make model and samples, let the contenders take turns, report.

    speed        samples per second of two processes with ZeRO against one with plain PyTorch, one thread each
    bytes        what a process sends per step, counted and on TCP, against the formula (`bench/scaling/wire.py`)
    checkpoints  seconds to save and to load, per gigabyte

`python -m bench.scaling` (or `make bench-scaling`) from the root of the repository. Every contender is a fresh start of
`train(config)` on the same samples; rounds of all contenders follow each other, so that a drift of the machine hits all
alike. On a machine with two cores the single process leaves one of them idle: the ratio says what a second process
adds, not what a process costs.
"""

import argparse
import datetime
import importlib.metadata
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from bench import machine
from bench.fairness import check_losses
from bench.parts import make_model
from bench.samples import make_samples
from bench.scaling import report as scaling_report
from bench.scaling.processes import run
from bench.scaling.wire import MAX_LIVE, Weights, formula, gloo_bytes, ring_bytes
from bench.scenarios import REAL, SIZES
from llavaforge.config.schema import TrainConfig, shipped_deepspeed
from llavaforge.device import compute_dtype
from llavaforge.training.metrics import read_metrics

WARMUP_STEPS = 2  # ZeRO-3 watches its first passes before it fetches ahead
REAL_PARAMETERS = 4_263_056_896  # of CLIP-L/336 + Qwen1.5-4B
SCALED = "zero3-scaled"
# Who takes part, by the name of a shipped DeepSpeed file; "one" is the single process.
CONTENDERS = ("one", "zero1", "zero2", "zero3", SCALED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement and return 0."""
    options = _options(arguments)
    logging.getLogger("llavaforge").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console(width=150)
    torch.set_num_threads(1)
    dtype = compute_dtype(options.bf16 if options.bf16 == "auto" else options.bf16 == "true")
    results: dict[str, Any] = {"date": _today(), "machine": machine.describe(dtype), "settings": _settings(options)}
    results["machine"]["libraries"]["deepspeed"] = importlib.metadata.version("deepspeed")
    results["source_sha256"] = machine.source_sha256()
    with tempfile.TemporaryDirectory(prefix="llavaforge-scaling-") as folder:
        bench = Bench(Path(folder), options, dtype)
        rounds = [bench.round(number) for number in range(options.rounds)]
        results["speed"] = {name: bench.speed(name, rounds) for name in bench.contenders if name != "one"}
        results["bytes"] = {name: bench.sent(name, rounds[0][name]) for name in results["speed"]}
        results["checkpoints"] = {name: bench.checkpoints(name) for name in ("one", "zero2") if name in rounds[0]}
    scaling_report.print_all(results, console)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: {options.output}")
    return 0


class Bench:
    """The model, the samples and what is done with them.

    Args:
        folder: everything goes there.
        options: of the command line.
        dtype: the type in which is computed.
    """

    def __init__(self, folder: Path, options: argparse.Namespace, dtype: torch.dtype) -> None:
        self._folder, self._options, self._dtype = folder, options, dtype
        size = SIZES[options.size]
        self._model = make_model(folder / "model", size, make_samples(folder / "data"))
        self._hidden_size = size.width
        self.contenders = ["one", *(name for name in CONTENDERS[1:] if name in options.contenders)]
        self._scaled = folder / f"{SCALED}.json"

    def round(self, number: int) -> dict[str, dict[str, Any]]:
        """Let every contender train once; who goes first changes from round to round."""
        order = self.contenders if number % 2 == 0 else self.contenders[::-1]
        told = {name: self._train(name, f"round-{number}-{name}") for name in order}
        check_losses({name: told[name]["losses"] for name in self.contenders}, self._dtype == torch.bfloat16)
        return told

    def speed(self, name: str, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
        """Compare a contender with the single process, step by step: the same samples in the same round."""
        one, two = ([told[who]["step_time_s"] for told in rounds] for who in ("one", name))
        pairs = [a / b for ones, twos in zip(one, two, strict=True) for a, b in zip(ones, twos, strict=True)]
        batch = self._options.global_batch_size

        def rate(seconds: list[list[float]]) -> float:
            return batch / statistics.median(second for steps in seconds for second in steps)

        return {
            "one": {"samples_per_s": rate(one), "step_time_s": one},
            "two": {"samples_per_s": rate(two), "step_time_s": two},
            "ratio": {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs), "pairs": pairs},
        }

    def sent(self, name: str, told: dict[str, Any]) -> dict[str, Any]:
        """Compare what the first process of a contender sent per step with the formula (median over the steps)."""
        rank = told["ranks"][0]
        weights, steps = Weights(**rank["weights"]), rank["steps"][WARMUP_STEPS:]
        tensors = {
            kind: statistics.median(step["tensors"].get(kind, 0) for step in steps)
            for kind in sorted({kind for step in steps for kind in step["tensors"]})
        }
        on_tcp = [step["tcp_bytes"] for step in steps if step["tcp_bytes"] is not None]
        zero = self._zero(name)
        live = zero.get("stage3_max_live_parameters", MAX_LIVE)
        micro_steps = self._options.global_batch_size // (2 * self._options.micro_batch_size)
        expected = formula(zero["stage"], weights, 2, micro_steps, self._dtype.itemsize, live)
        counted = ring_bytes(tensors, 2)
        return {
            "stage": zero["stage"],
            "micro_steps": micro_steps,
            "weights": rank["weights"],
            "max_live": live,
            "formula": expected,
            "counted": counted,
            "ratio": sum(counted.values()) / sum(expected.values()),
            "tcp": statistics.median(on_tcp) if on_tcp else None,
            "tcp_expected": gloo_bytes(tensors, 2),
        }

    def checkpoints(self, name: str) -> dict[str, Any]:
        """Save and load the state after each of some short steps.

        A load includes the check of all hashes; it reads what has just been written, from memory rather than the disk.
        """
        small = {"global_batch_size": 2, "per_device_train_batch_size": 1, "save_total_limit": 1}
        told = self._train(name, f"checkpoints-{name}", save_steps=1, max_steps=self._options.num_checkpoints, **small)
        seen = told["ranks"][0]["checkpoints"]
        gigabytes = seen[0]["bytes"] / 1e9
        return {
            "processes": len(told["ranks"]),
            "bytes": seen[0]["bytes"],
            "save_s": [one["save_s"] for one in seen],
            "load_s": [one["load_s"] for one in seen],
            "save_s_per_gb": statistics.median(one["save_s"] for one in seen) / gigabytes,
            "load_s_per_gb": statistics.median(one["load_s"] for one in seen) / gigabytes,
        }

    def _train(self, name: str, folder: str, **changes: Any) -> dict[str, Any]:
        print(f"{folder} ...", file=sys.stderr)
        config = self._config(name, self._folder / folder, **changes)
        threshold = 10 * self._hidden_size  # `auto` of stage3_param_persistence_threshold
        ranks = run(config, 1 if name == "one" else 2, threshold, self._folder / "logs" / folder)
        lines = read_metrics(config.output_dir)
        return {
            "ranks": ranks,
            "losses": [line["loss"] for line in lines],
            "step_time_s": [line["step_time_s"] for line in lines[WARMUP_STEPS:]],
        }

    def _config(self, name: str, output_dir: Path, **changes: Any) -> TrainConfig:
        options = self._options
        values: dict[str, Any] = dict(
            model_name_or_path=str(self._model),
            data_path=self._folder / "data" / "instructions.json",
            output_dir=output_dir,
            cache_dir=self._folder / "cache",
            train_type=options.train_type,
            max_steps=WARMUP_STEPS + options.num_steps,
            global_batch_size=options.global_batch_size,
            per_device_train_batch_size=options.micro_batch_size,
            gradient_checkpointing=options.gradient_checkpointing,
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            bf16=self._dtype == torch.bfloat16,
            dataloader_num_workers=0,  # or the workers of two processes would compete with them for two cores
            deepspeed=self._file(name),
            save_steps=0,
        )
        return TrainConfig(**(values | changes))

    def _file(self, name: str) -> str | None:
        """Return the contender's DeepSpeed file."""
        if name == "one":
            return None
        if name != SCALED:
            return name
        if not self._scaled.exists():
            zero = self._zero("zero3") | _scaled_bounds(self._model)
            self._scaled.write_text(json.dumps({"zero_optimization": zero}))
        return str(self._scaled)

    def _zero(self, name: str) -> dict[str, Any]:
        """Return the section `zero_optimization` of the contender's file."""
        file = Path(str(shipped_deepspeed().get(name) or self._file(name)))
        section: dict[str, Any] = json.loads(file.read_text())["zero_optimization"]
        return section


def _scaled_bounds(model: Path) -> dict[str, int]:
    """Return ZeRO-3's bounds in the replica's measure: by default a quarter of the real model may stay gathered."""
    entries = json.loads((model / "manifest.json").read_text())["files"]
    stored = sum(entry["bytes"] for name, entry in entries.items() if name.endswith(".safetensors"))
    live = MAX_LIVE * stored // 4 // REAL_PARAMETERS  # stored in float32
    return {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    default = Path("bench") / "results" / f"{_today()}-scaling-cpu.json"
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes (default: %(default)s)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS[1:], default=list(CONTENDERS[1:]))
    parser.add_argument("--size", choices=[name for name in SIZES if name != REAL], default="replica")
    parser.add_argument("--rounds", type=int, default=2, help="of all contenders (default: %(default)s)")
    parser.add_argument("--num_steps", type=int, default=4, help="measured steps per round (default: %(default)s)")
    parser.add_argument("--num_checkpoints", type=int, default=4, help="saved and loaded (default: %(default)s)")
    parser.add_argument("--global_batch_size", type=int, default=8, help="samples per step (default: %(default)s)")
    parser.add_argument("--micro_batch_size", type=int, default=2, help="of a process (default: %(default)s)")
    parser.add_argument("--train_type", choices=["freeze_vision", "full", "use_lora"], default="freeze_vision")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--bf16", choices=["auto", "true", "false"], default="auto", help="as in training")
    options = parser.parse_args(arguments)
    if options.global_batch_size % (2 * options.micro_batch_size):
        parser.error(
            "global_batch_size is a multiple of two micro-batches, so that both processes have the same number"
        )
    return options


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "output"}


def _today() -> str:
    return datetime.date.today().isoformat()


if __name__ == "__main__":
    sys.exit(main())
