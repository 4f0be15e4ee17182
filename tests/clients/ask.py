"""Ask a model folder the questions of a file, in a client's own environment: nothing of llavaforge is imported.

    python ask.py FOLDER QUESTIONS.json IMAGES NUMBER

Goes out: one JSON line, the versions and the answers by way of asking: one by one and in a padded batch, with the image
before and after the words.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

BATCH_SIZE = 8


def main(folder: Path, questions: Path, images: Path, number: int) -> None:
    """Print the answers."""
    rows = json.loads(questions.read_text())[:number]
    if (folder / "adapter_config.json").is_file():
        from peft import AutoPeftModel

        model = AutoPeftModel.from_pretrained(folder)
    else:
        model = LlavaForConditionalGeneration.from_pretrained(folder)
    model, processor = model.eval(), AutoProcessor.from_pretrained(folder)
    answers = {}
    for first in (True, False):
        for size in (1, BATCH_SIZE):
            batches = [rows[start : start + size] for start in range(0, number, size)]
            found = [answer for batch in batches for answer in ask(model, processor, batch, images, first)]
            answers[f"image {'first' if first else 'last'}, {size} at a time"] = found
    print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__, "answers": answers}))


def ask(model: Any, processor: Any, rows: list[dict[str, Any]], images: Path, first: bool) -> list[str]:
    """Return the greedy answers to some questions as one batch, padded as the folder's files say."""
    texts = []
    for row in rows:
        words = row["conversations"][0]["value"].replace("<image>", "").strip()
        content = [{"type": "image"}, {"type": "text", "text": words}]
        messages = [{"role": "user", "content": content if first else content[::-1]}]
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True))
    pictures = [Image.open(images / row["image"]) for row in rows]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    found = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in found]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
