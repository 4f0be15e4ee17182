"""llavaforge as its user runs it: `train(config)`, with nothing switched off. Runs in a process of its own."""

import json
import sys
from pathlib import Path
from typing import Any

from bench.race.stopwatch import Stopwatch
from bench.scenarios import Task
from llavaforge.config.schema import TrainConfig
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train


def config_of(task: Task) -> TrainConfig:
    """Return the recipe of a task: what both sides share, and llavaforge's defaults for the rest."""
    return TrainConfig(
        model_name_or_path=task.model,
        data_path=Path(task.data),
        output_dir=Path(task.output_dir),
        cache_dir=Path(task.cache_dir),
        train_type=task.train_type,
        max_steps=task.num_steps,
        per_device_train_batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        projector_learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        lora_r=task.lora_r,
        lora_alpha=task.lora_alpha,
        lora_target_modules=task.lora_targets,
        bf16=task.bf16,
        compile=task.compile,
        dataloader_num_workers=task.num_workers,
        save_steps=0,
    )


def run(task: Task, channel: int) -> None:
    """Train until told to stop; `channel` is where the stopwatch reports."""

    def lines(key: str) -> list[Any]:
        return [line[key] for line in read_metrics(Path(task.output_dir))]

    def counts() -> dict[str, Any]:
        tokens = lines("num_tokens")
        return {"tokens": tokens, "padded": tokens, "supervised": lines("num_supervised")}

    Stopwatch(channel, lambda: lines("loss"), counts)
    train(config_of(task))


if __name__ == "__main__":
    run(Task(**json.loads(sys.argv[1])), int(sys.argv[2]))
