"""What each step of a task amounts to: its samples, and their tokens and model FLOPs, from llavaforge's index."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.race.our_way import config_of
from bench.race.race import SPARE_STEPS, WARMUP_STEPS
from bench.samples import NUM_SAMPLES
from bench.scenarios import NUM_WORKERS, Scenario, Side, Task
from llavaforge.config.schema import TrainConfig
from llavaforge.data.index.open import open_index
from llavaforge.data.order.mixture import Mixture
from llavaforge.data.order.plan import Plan
from llavaforge.model.flops import FlopCounter
from llavaforge.model.load import load_model
from llavaforge.model.trainable import parameter_groups


@dataclass(frozen=True)
class StepWork:
    """Tokens without padding, supervised ones among them, and model FLOPs (frozen parts forward only)."""

    tokens: int
    supervised: int
    flops: float


def make_tasks(
    scenario: Scenario, model: Path, folder: Path, batch_size: int, num_measured: int, bf16: bool, compiled: bool
) -> dict[Side, Task]:
    """Return the task of each side; they differ in loader workers and folders alone.

    Args:
        scenario: what is raced.
        model: folder of the joined model.
        folder: has `data/`; outputs and caches go here.
        batch_size: samples per step.
        num_measured: steps that count.
        bf16: compute in bfloat16.
        compiled: compile our layers.
    """
    num_steps = WARMUP_STEPS + num_measured + SPARE_STEPS
    zeros = np.zeros(NUM_SAMPLES, dtype=np.int64)
    plan = Plan(
        mixture=Mixture([np.arange(NUM_SAMPLES)], [NUM_SAMPLES], TrainConfig.model_fields["seed"].default),
        lengths=zeros,
        num_supervised=zeros,
        costs=np.zeros(NUM_SAMPLES),
        global_batch_size=batch_size,
        num_steps=num_steps,
        world_size=1,
        max_samples=batch_size,
        max_tokens=None,
    )
    order = np.concatenate([plan.global_batch(step) for step in range(num_steps)]).tolist()
    return {
        side: Task(
            model=str(model),
            data=str(folder / "data" / f"{scenario.data}.json"),
            order=order,
            output_dir=str(folder / scenario.name / side),
            cache_dir=str(folder / "cache"),
            train_type=scenario.train_type,
            learning_rate=scenario.learning_rate,
            batch_size=batch_size,
            num_steps=num_steps,
            num_workers=NUM_WORKERS[side],
            bf16=bf16,
            compile=compiled,
        )
        for side in scenario.sides
    }


def work_of(task: Task) -> list[StepWork]:
    """Return the work of each step of a task."""
    config = config_of(task)
    loaded = load_model(task.model)
    parameter_groups(loaded.model, config)
    counter = FlopCounter.of(loaded.model, loaded.num_image_tokens)
    index = open_index(config.data_path, loaded.processor, loaded.num_image_tokens, config)
    steps = []
    for rows in np.array(task.order).reshape(-1, task.batch_size):
        lengths, supervised = index.lengths[rows], int(index.num_supervised[rows].sum())
        flops = counter.step(lengths.tolist(), len(rows), supervised)
        steps.append(StepWork(int(lengths.sum()), supervised, flops))
    return steps
