"""The usual way: Hugging Face's `Trainer` around the whole stock model, as fine-tuning scripts for LLaVA are written.

Batches are made by the collator, sample by sample: render the chat, open the image, run the processor, tokenise the
answer apart, pad on the left. Labels are -100 on the prompt and on padding; the model runs its whole tower and computes
logits for every position. Uses nothing of llavaforge. Runs in a process of its own.

Such scripts often train one turn per row; here the turns after the first are appended in the same manner, so that both
sides have the same samples.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainingArguments

from bench.race.stopwatch import Stopwatch
from bench.scenarios import Task

IGNORE_INDEX = -100
SYSTEM_PROMPT = "You are a helpful assistant."

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]


class Rows(torch.utils.data.Dataset[Row]):
    """The records in the order in which they are trained."""

    def __init__(self, data: Path, order: list[int]) -> None:
        rows = json.loads(data.read_text())
        self._rows: list[Row] = [rows[number] for number in order]
        self._images = data.parent / "images"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Row:
        row = self._rows[place]
        return {"turns": row["conversations"], "image": self._images / row["image"]}


class Collator:
    """Rows in, a left-padded batch out."""

    def __init__(self, processor: Any) -> None:
        self._processor, self._tokenizer = processor, processor.tokenizer

    def __call__(self, rows: list[Row]) -> Batch:
        """Make a batch of some rows."""
        samples = [self._sample(row) for row in rows]
        ids = self._pad([ids for ids, _, _ in samples], self._tokenizer.pad_token_id)
        return {
            "input_ids": ids,
            "attention_mask": (ids != self._tokenizer.pad_token_id).long(),
            "labels": self._pad([labels for _, labels, _ in samples], IGNORE_INDEX),
            "pixel_values": torch.cat([pixels for _, _, pixels in samples]),
        }

    def _sample(self, row: Row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        texts = [turn["value"] for turn in row["turns"]]
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": texts[0]}]
        prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self._processor(images=Image.open(row["image"]), text=prompt, return_tensors="pt")
        pieces = [(inputs["input_ids"][0], False)]
        for number in range(1, len(texts), 2):
            if number > 1:
                question = f"\n<|im_start|>user\n{texts[number - 1]}<|im_end|>\n<|im_start|>assistant\n"
                pieces.append((self._tokenise(question), False))
            pieces.append((self._tokenise(texts[number] + self._tokenizer.eos_token), True))
        labels = [ids if learns else torch.full_like(ids, IGNORE_INDEX) for ids, learns in pieces]
        return torch.cat([ids for ids, _ in pieces]), torch.cat(labels), inputs["pixel_values"]

    def _tokenise(self, text: str) -> torch.Tensor:
        ids: torch.Tensor = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
        return ids

    @staticmethod
    def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


def load(task: Task) -> Any:
    """Load the model, and freeze what the task freezes."""
    model = LlavaForConditionalGeneration.from_pretrained(task.model)
    if task.train_type == "use_lora":
        from peft import LoraConfig, get_peft_model

        # Bare names would match the tower too; here both sides put LoRA into the language model alone.
        names = "|".join(task.lora_targets)
        options = LoraConfig(
            r=task.lora_r,
            lora_alpha=task.lora_alpha,
            lora_dropout=0.0,
            target_modules=rf"model\.language_model\..*\.({names})",
            modules_to_save=["multi_modal_projector"],
        )
        return get_peft_model(model, options)
    model.model.vision_tower.requires_grad_(False)
    if task.train_type == "projector":
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    return model


def arguments(task: Task) -> TrainingArguments:
    """Return the Trainer's arguments: what both sides share, and the Trainer's defaults for the rest."""
    return TrainingArguments(
        output_dir=task.output_dir,
        max_steps=task.num_steps,
        per_device_train_batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        dataloader_num_workers=task.num_workers,
        bf16=task.bf16,
        use_cpu=True,
        train_sampling_strategy="sequential",  # the rows are in order already
        remove_unused_columns=False,  # the collator needs columns that the model does not know
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def train(trainer: Trainer, rows: Any, batch_size: int, channel: int) -> None:
    """Train until told to stop, and tell what each batch held.

    Args:
        trainer: with its collator.
        rows: that it trains on, in this order.
        batch_size: rows per step.
        channel: where the stopwatch reports.
    """

    def losses() -> list[float]:
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    def counts() -> dict[str, Any]:
        starts = range(0, len(losses()) * batch_size, batch_size)
        batches = [trainer.data_collator([rows[start + place] for place in range(batch_size)]) for start in starts]
        return {
            "tokens": [int(batch["attention_mask"].sum()) for batch in batches],
            "padded": [batch["attention_mask"].numel() for batch in batches],
            "supervised": [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches],
        }

    Stopwatch(channel, losses, counts)
    trainer.train()


def run(task: Task, channel: int) -> None:
    """Train until told to stop; `channel` is where the stopwatch reports."""
    processor = AutoProcessor.from_pretrained(task.model)
    rows, collator = Rows(Path(task.data), task.order), Collator(processor)
    trainer = Trainer(model=load(task), args=arguments(task), train_dataset=rows, data_collator=collator)
    train(trainer, rows, task.batch_size, channel)


if __name__ == "__main__":
    run(Task(**json.loads(sys.argv[1])), int(sys.argv[2]))
