"""`llavaforge estimate`: will it fit, how long does it take, what does it cost; nothing is loaded, nothing is run.

Comes in: configs, a machine, what samples are like. Goes out: a table on stdout with a row for every train type and
engine, and the same as one JSON object. All formulas are those that training itself goes by: `model/flops.py`,
`model/activations.py`, `engine/memory.py`, `training/pack_memory.py`.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavaforge.config.schema import EstimateConfig, shipped_deepspeed
from llavaforge.config.train_types import TRAIN_TYPES
from llavaforge.engine.memory import engine_memory, engine_name, gradient_stays
from llavaforge.errors import UserError
from llavaforge.forecast.kept import activations_of
from llavaforge.forecast.machine import Machine, read_machine
from llavaforge.forecast.read import read_sizes
from llavaforge.forecast.samples import Samples, read_samples
from llavaforge.forecast.sizes import ModelSizes
from llavaforge.forecast.table import show
from llavaforge.model.flops import FlopCounter
from llavaforge.results import EstimateResult, EstimateRow
from llavaforge.training.pack_memory import USABLE_SHARE, decide

_MOST_SAMPLES = 4096  # of a micro-batch that is tried


def estimate(config: EstimateConfig) -> EstimateResult:
    """Estimate parameters, memory per GPU, time and cost of a training.

    Raises:
        UserError: no model or machine is named, or an unknown one; options that contradict each other.
    """
    sizes, machine = read_sizes(config), read_machine(config)
    samples = read_samples(config, sizes.num_image_tokens)
    chosen = _chosen_engine(config)
    rows = [
        Estimator(config.model_copy(update={"train_type": kind}), sizes, machine, samples).row(engine)
        for kind in TRAIN_TYPES
        for engine in _engines(config, chosen)
    ]
    row = next(one for one in rows if (one["train_type"], one["engine"]) == (config.train_type, chosen))
    result: EstimateResult = {
        **row,
        "parameters": sizes.parameters,
        "gpu": machine.name,
        "num_gpus": config.num_gpus,
        "assumptions": _assumptions(config, sizes, machine, samples),
        "rows": rows,
    }
    show(result)
    return result


@dataclass(frozen=True)
class Estimator:
    """Estimates one train type on one machine."""

    config: EstimateConfig
    sizes: ModelSizes
    machine: Machine
    samples: Samples

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the type that is computed in."""
        return 4 if self.config.bf16 is False else 2

    def row(self, engine: str) -> EstimateRow:
        """Return all of one engine."""
        config, budget = self.config, USABLE_SHARE * self.machine.memory_bytes
        counts, kept = self.sizes.counts(config), activations_of(self.sizes, config, self.itemsize)
        held = engine_memory(engine, counts, config.num_gpus, self.itemsize, config.optim == "adamw_8bit")
        compiled = config.compile is not False and not engine.startswith("zero3")
        sizes = self.samples.sizes
        # As a run decides, which leaves out what compiling spares.
        most_tokens, every = decide(config, kept, budget - held.total, sizes)
        per_step = config.samples_per_step(config.num_gpus) / config.num_gpus
        tokens = sizes.largest_pack(min(config.max_samples_per_batch, math.ceil(per_step)))
        tokens = tokens if most_tokens is None else min(tokens, most_tokens)
        stays = gradient_stays(engine, math.ceil(round(per_step * sizes.mean / tokens, 6)))

        def peak(num_tokens: int, recompute_every: int) -> float:
            of_images = sizes.num_images(num_tokens) * kept.per_image
            return held.peak(sizes.bytes(kept, num_tokens, recompute_every, compiled), of_images, stays)

        logits = kept.logits(sizes.num_supervised(tokens))
        seconds = self.seconds_per_epoch(every, compiled)
        price = config.price_per_gpu_hour
        hardest = 1 if config.gradient_checkpointing == "auto" else every
        return {
            "train_type": config.train_type,
            "engine": engine,
            "learning": sum(self.sizes.learning(config).values()),
            "memory_per_gpu": {
                "weights": round(held.weights),
                "gradients": round(held.gradients),
                "optimizer": round(held.optimizer),
                "buffers": round(held.buffers),
                "activations": round(sizes.bytes(kept, tokens, every, compiled) - logits),
                "logits": round(logits),
                "total": round(peak(tokens, every)),
            },
            "fits": peak(tokens, every) <= budget,
            "recompute_every": every,
            "micro_batch": max(1, int(tokens / sizes.mean)),
            "largest_micro_batch": _largest(lambda n: peak(sizes.largest_pack(n), hardest) <= budget),
            "mfu": self.machine.mfu(config.train_type, compiled),
            "hours_per_epoch": seconds / 3600,
            "cost_per_epoch": None if price is None else price * config.num_gpus * seconds / 3600,
        }

    def seconds_per_epoch(self, recompute_every: int, compiled: bool) -> float:
        """Return the seconds of an epoch: all FLOPs that are done, at the rate that is reached."""
        config, samples = self.config, self.samples
        learning = frozenset(TRAIN_TYPES[config.train_type].parts)
        counter = FlopCounter.of_matrices(self.sizes.matrices(config), self.sizes.num_image_tokens, learning)
        of_sample = counter.of_index(samples).mean() + counter.recomputed(samples.lengths, recompute_every) / len(
            samples.lengths
        )
        rate = config.num_gpus * self.machine.peak_flops * self.machine.mfu(config.train_type, compiled)
        return float(samples.number * of_sample / rate)


def _largest(fits: Any) -> int:
    """Return the most samples of a micro-batch that fit, 0 for none."""
    low, high = 0, _MOST_SAMPLES
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _chosen_engine(config: EstimateConfig) -> str:
    """Return the engine that the options ask for."""
    if config.deepspeed is None:
        return "plain" if config.num_gpus == 1 else "zero2"
    path = shipped_deepspeed().get(config.deepspeed) or Path(config.deepspeed)
    try:
        name = engine_name(json.loads(path.read_text(encoding="utf-8")))
        if name not in (*shipped_deepspeed(), "zero1-offload"):
            raise ValueError(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path} (deepspeed): has no `zero_optimization.stage` of 1, 2 or 3 in JSON. Correct it, or give one of "
            f"{', '.join(shipped_deepspeed())}."
        ) from None
    return name


def _engines(config: EstimateConfig, chosen: str) -> Iterator[str]:
    """Yield the engines that a row is made for."""
    if config.optim == "adamw_8bit":
        if config.num_gpus > 1 or config.deepspeed is not None:
            raise UserError("optim: adamw_8bit works in a single process without DeepSpeed. Give num_gpus 1, or adamw.")
        yield "plain"
        return
    if config.num_gpus == 1:
        yield "plain"
    yield from sorted(shipped_deepspeed(), key=len)  # offloading last
    if chosen == "zero1-offload":
        yield chosen


def _assumptions(config: EstimateConfig, sizes: ModelSizes, machine: Machine, samples: Samples) -> dict[str, Any]:
    """Return what the figures hang on, as shown and as in the JSON line."""
    of_samples = samples.sizes
    return {
        "num_samples": samples.number,
        "tokens_per_sample": round(of_samples.mean, 1),
        "images_per_sample": round(of_samples.images_per_token * of_samples.mean, 4),
        "supervised_per_sample": round(of_samples.supervised_per_token * of_samples.mean, 1),
        "image_tokens": sizes.num_image_tokens,
        "global_batch_size": config.samples_per_step(config.num_gpus),
        "compute_dtype": "float32" if config.bf16 is False else "bfloat16",
        "compile": config.compile is not False,
        "gpu_memory_bytes": round(machine.memory_bytes),
        "usable_share_of_memory": USABLE_SHARE,
        "peak_tflops": round(machine.peak_flops / 1e12, 1),
        "mfu_is": machine.source_of_mfu,
        "price_per_gpu_hour": config.price_per_gpu_hour,
    }
