"""Steps with kept vision features against steps that run the tower: the same run, captions, `projector`, in turns.

python -m bench.features
"""

import argparse
import datetime
import json
import logging
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from bench import machine
from bench.parts import make_model
from bench.samples import make_samples
from bench.scenarios import SIZES
from llavaforge.config.schema import TrainConfig
from llavaforge.device import compute_dtype
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train

_BATCH = 8
_EPOCH = 4  # steps; those of the first epoch do not count
KINDS = ("off", "disk", "memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.features", description=__doc__)
    today = datetime.date.today().isoformat()
    default = Path("bench") / "results" / f"{today}-features-cpu.json"
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes (default: %(default)s)")
    parser.add_argument("--size", choices=["replica", "tiny"], default="replica")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, taking turns (default: %(default)s)")
    parser.add_argument("--compile", choices=["true", "false"], default="false", help="layers, as in a long run")
    options = parser.parse_args(arguments)
    logging.getLogger("llavaforge").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="llavaforge-bench-") as folder:
        texts = make_samples(Path(folder) / "data")
        model = make_model(Path(folder) / "model", SIZES[options.size], texts)
        for number in range(options.rounds):
            for kind in KINDS:
                lines = _run(model, Path(folder), f"{kind}-{number}", kind, options.compile == "true")
                seconds[kind] += [line["step_time_s"] for line in lines[_EPOCH:]]
                losses[kind] = lines[-1]["loss"]
    result = _figures(seconds) | {"last_loss": losses, "size": options.size, "compiled": options.compile == "true"}
    result |= {"date": today, "machine": machine.describe(compute_dtype("auto"))}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("samples_per_s", "times_as_fast", "last_loss")}, indent=1))
    return 0


def _run(model: Path, folder: Path, name: str, kind: str, compiled: bool) -> list[dict[str, Any]]:
    """Train two epochs; return the metrics of each step."""
    config = TrainConfig.model_validate(
        {
            "model_name_or_path": str(model),
            "data": [{"path": folder / "data" / "captions.json", "max_samples": _EPOCH * _BATCH}],
            "output_dir": folder / name,
            "cache_dir": folder / "cache",
            "train_type": "projector",
            "max_steps": 2 * _EPOCH,
            "per_device_train_batch_size": _BATCH,
            "compile": compiled,
            "save_steps": 0,
            "cache_vision_features": kind,
        }
    )
    train(config)
    return read_metrics(folder / name)


def _figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return samples per second of the median step, its spread, and how they compare."""
    medians = {kind: statistics.median(mine) for kind, mine in seconds.items()}
    return {
        "step_s": {
            kind: {"median": medians[kind], "quartiles": statistics.quantiles(mine, n=4)[::2]}
            for kind, mine in seconds.items()
        },
        "samples_per_s": {kind: _BATCH / median for kind, median in medians.items()},
        "times_as_fast": {kind: medians["off"] / median for kind, median in medians.items()},
    }


if __name__ == "__main__":
    raise SystemExit(main())
