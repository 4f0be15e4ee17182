"""Train two steps with TRL's `SFTTrainer` on a folder: nothing of llavaforge is imported.

    python train_with_trl.py FOLDER QUESTIONS.json IMAGES NUMBER

Goes out: one JSON line, the versions and the losses. A model that knows these questions has a small first loss, unless
its template, its image tokens or its processor are not what it was trained with.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset, Image, List
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import SFTConfig, SFTTrainer


def main(folder: Path, questions: Path, images: Path, number: int) -> None:
    """Print the losses."""
    samples = []
    for row in json.loads(questions.read_text())[:number]:
        question, answer = (turn["value"].replace("<image>", "").strip() for turn in row["conversations"])
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        completion = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        samples.append({"prompt": prompt, "completion": completion, "images": [str(images / row["image"])]})
    rows = Dataset.from_list(samples).cast_column("images", List(Image()))
    with tempfile.TemporaryDirectory() as output_dir:
        options = SFTConfig(
            output_dir=output_dir, max_steps=2, per_device_train_batch_size=8, logging_steps=1, report_to="none",
            max_length=None, use_cpu=True, bf16=False, save_strategy="no", learning_rate=1e-5,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=LlavaForConditionalGeneration.from_pretrained(folder), args=options, train_dataset=rows,
            processing_class=AutoProcessor.from_pretrained(folder),
        )  # fmt: skip
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "trl": trl.__version__}
    print(json.dumps({**versions, "losses": losses}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
