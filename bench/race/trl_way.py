"""TRL's `SFTTrainer` at its best here: its own collator for images, its loss in pieces, two loader workers.

It has no packing for images. Not an extra of llavaforge: `pip install trl` beside it, and the race takes it in. Uses
nothing of llavaforge. Runs in a process of its own.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, List
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer

from bench.race.usual_way import SYSTEM_PROMPT, arguments, load, train
from bench.scenarios import Task

# Of the usual way's arguments, those that are not defaults there.
_SHARED = (
    *("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "logging_steps"),
    *("dataloader_num_workers", "bf16", "use_cpu", "train_sampling_strategy", "remove_unused_columns", "disable_tqdm"),
    *("save_strategy", "report_to"),
)


def data_set(task: Task, processor: Any) -> Dataset:
    """Return the records in the order in which they are trained: a prompt, a completion, an image."""
    data = Path(task.data)
    rows = json.loads(data.read_text())
    samples = []
    for row in (rows[number] for number in task.order):
        question, answer = (turn["value"] for turn in row["conversations"])
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
        prompt = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        image = str(data.parent / "images" / row["image"])
        samples.append({"prompt": prompt, "completion": answer + processor.tokenizer.eos_token, "images": [image]})
    return Dataset.from_list(samples).cast_column("images", List(Image()))


def run(task: Task, channel: int) -> None:
    """Train until told to stop; `channel` is where the stopwatch reports."""
    processor = AutoProcessor.from_pretrained(task.model)
    rows = data_set(task, processor)
    usual = arguments(task)
    shared = {name: getattr(usual, name) for name in _SHARED}
    options = SFTConfig(**shared, gradient_checkpointing=False, max_length=None, completion_only_loss=True)
    trainer = SFTTrainer(model=load(task), args=options, train_dataset=rows, processing_class=processor)
    train(trainer, rows, task.batch_size, channel)


if __name__ == "__main__":
    run(Task(**json.loads(sys.argv[1])), int(sys.argv[2]))
