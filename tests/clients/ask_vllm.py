"""Ask vLLM the questions of a file, offline: nothing of llavaforge is imported.

    python ask_vllm.py FOLDER QUESTIONS.json IMAGES NUMBER

Goes out: as from `ask.py`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image

BATCH_SIZE = 8

# Nothing is sent anywhere, nothing is written outside of this environment, and nothing is printed after our line.
SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_CACHE_ROOT": f"{sys.prefix}/vllm", "VLLM_CONFIG_ROOT": f"{sys.prefix}/vllm",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip


def main(folder: Path, questions: Path, images: Path, number: int) -> None:
    """Print the answers."""
    os.environ.update(SETTINGS)
    import torch
    import transformers
    import vllm

    rows = json.loads(questions.read_text())[:number]
    model = vllm.LLM(str(folder), dtype="float32", max_model_len=512, max_num_seqs=BATCH_SIZE, enforce_eager=True)
    greedy, answers = vllm.SamplingParams(temperature=0, max_tokens=16), {}
    for first in (True, False):
        place = "first" if first else "last"
        messages = [message(row, images, first) for row in rows]
        for size in (1, BATCH_SIZE):
            batches = [messages[start : start + size] for start in range(0, number, size)]
            found = [done for batch in batches for done in model.chat(batch, greedy, use_tqdm=False)]
            answers[f"image {place}, {size} at a time"] = [done.outputs[0].text.strip() for done in found]
    versions = {"vllm": vllm.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({**versions, "answers": answers}))


def message(row: dict[str, Any], images: Path, first: bool) -> list[dict[str, Any]]:
    """Return a conversation that ends with the question."""
    words = row["conversations"][0]["value"].replace("<image>", "").strip()
    picture = Image.open(images / row["image"]).convert("RGB")
    content = [{"type": "image_pil", "image_pil": picture}, {"type": "text", "text": words}]
    return [{"role": "user", "content": content if first else content[::-1]}]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
