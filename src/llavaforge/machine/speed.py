"""How fast a machine trains a Llava: optimizer steps on random samples, timed one by one.

Comes in: some `Work`. Goes out: a `Speed`, in plain numbers.
"""

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from llavaforge.config.schema import TrainConfig
from llavaforge.data.load.pack import Pack
from llavaforge.device import compute_dtype
from llavaforge.engine.base import AdamWOptions
from llavaforge.engine.memory import Counts, engine_memory, engine_name, gradient_stays
from llavaforge.engine.open import open_engine
from llavaforge.engine.zero_config import build_settings, decided
from llavaforge.machine.random_model import (
    ModelSize,
    llava_config,
    preprocessing,
    random_model,
    random_packs,
    train_options,
)
from llavaforge.model.compile import compile_layers
from llavaforge.model.flops import FlopCounter
from llavaforge.model.liger import use_liger
from llavaforge.model.memory import activations
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import parameter_groups
from llavaforge.processes.world import World
from llavaforge.training.peak_flops import peak_flops

_NUM_DRAWN = 4  # different micro-batches; a run goes through them again and again


@dataclass(frozen=True)
class Work:
    """What is trained, and how.

    Attributes:
        size: of the model.
        train_type: what learns.
        num_samples: of a micro-batch.
        num_micro_batches: of a step.
        text_tokens: fewest and most tokens of a sample beside its image.
        compile: whether the layers are compiled.
        recompute_every: every how many layers one is recomputed (0: none).
        deepspeed: as in a recipe.
        liger: whether liger's kernels are used where layers are not compiled.
        options: further options of a recipe, such as `lora_r`.
    """

    size: ModelSize
    train_type: str
    num_samples: int
    num_micro_batches: int = 1
    text_tokens: tuple[int, int] = (24, 64)
    compile: bool = False
    recompute_every: int = 0
    deepspeed: str | None = None
    liger: bool = False
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Speed:
    """What was measured, of this process where there are several.

    Attributes:
        step_s: median seconds of a step.
        first_step_s: seconds of the first one, which compiles and allocates.
        samples_per_s: of all processes together.
        tokens_per_s: of all processes together.
        mfu: share of the device's peak that the model's FLOPs take (`model/flops.py`); recomputation does not count.
        peak_memory_bytes: the most that was allocated at a time.
        loss: of the last step, per supervised token.
        forecast_bytes: what `model/memory.py` and `engine/memory.py` expect of the peak.
    """

    step_s: float
    first_step_s: float
    samples_per_s: float
    tokens_per_s: float
    mfu: float
    peak_memory_bytes: int
    loss: float
    forecast_bytes: float


def measure(work: Work, world: World, num_steps: int = 6, num_warmup: int = 2) -> Speed:
    """Train for some steps and time each.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    size, config = work.size, train_options(work.train_type, **dict(work.options))
    dtype, settings = compute_dtype("auto"), _settings(work, config, world)
    model = random_model(size, world.device, dtype)
    groups = parameter_groups(model, config)
    counts = Counts.of(model)
    flops = FlopCounter.of(model, size.num_image_tokens)
    module = StepModule(model, preprocessing(size), work.recompute_every)
    if work.compile:
        compile_layers(model)
    elif work.liger:
        use_liger(model)
    engine = open_engine(world, settings)
    options = AdamWOptions.of(config)
    engine.prepare(module, groups, options, dtype)
    number = max(_NUM_DRAWN, work.num_micro_batches)
    drawn = list(random_packs(size, number, work.num_samples, work.text_tokens, world.rank))
    packs = [pack.pin_memory() for pack in drawn] if world.device.type == "cuda" else drawn
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, did = [], 0
    for _ in range(num_warmup + num_steps):
        begin = time.perf_counter()
        mine = [packs[(did + place) % number] for place in range(work.num_micro_batches)]
        did += len(mine)
        supervised = sum(pack.num_supervised for pack in mine) * world.size
        losses = [
            engine.micro_step(_placed(pack, place == len(mine)), 1.0 / supervised) for place, pack in enumerate(mine, 1)
        ]
        engine.step(1.0)
        loss = float(torch.stack(losses).sum()) * world.size / supervised
        seconds.append(time.perf_counter() - begin)
    step_s = statistics.median(seconds[num_warmup:])
    done = sum(flops.step(pack.lengths, pack.num_images, pack.num_supervised) for pack in packs) / number
    peak = peak_flops(world.device, dtype)
    name, kept = engine_name(settings), activations(llava_config(size), config, preprocessing(size), dtype)
    held = engine_memory(name, counts, world.size, dtype.itemsize, options.moments_in_8_bits)
    of_pack = kept.bytes(
        max(pack.num_tokens for pack in packs),
        work.num_samples,
        max(pack.num_supervised for pack in packs),
        work.recompute_every,
        work.compile,
    )
    forecast = held.peak(of_pack, work.num_samples * kept.per_image, gradient_stays(name, work.num_micro_batches))
    return Speed(
        step_s=step_s,
        first_step_s=seconds[0],
        samples_per_s=work.num_samples * work.num_micro_batches * world.size / step_s,
        tokens_per_s=sum(p.num_tokens for p in packs) / number * work.num_micro_batches * world.size / step_s,
        mfu=done * work.num_micro_batches / step_s / peak,
        peak_memory_bytes=engine.peak_memory_bytes(),
        loss=loss,
        forecast_bytes=forecast,
    )


def _settings(work: Work, config: TrainConfig, world: World) -> dict[str, Any] | None:
    if work.deepspeed is None and world.size == 1:
        return None
    known = decided(config, work.num_samples * work.num_micro_batches * world.size, world.size)
    return build_settings(work.deepspeed, known, work.size.width)


def _placed(pack: Pack, is_last_of_step: bool) -> Pack:
    return replace(pack, source=replace(pack.source, is_last_of_step=is_last_of_step))
