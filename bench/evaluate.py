"""`evaluate` beside the usual way, a loop of plain `generate`: the same model, records and answers, taking turns.

    python -m bench.evaluate

Both open the folder, read the images and answer; `evaluate` measures the held-out loss and writes its page beside.
With `--model_name_or_path` and `--data_path` (a JSON list of one-turn conversations beside its `images/`) it takes
yours instead of random weights, whose answers are always as long as may be.
"""

import argparse
import datetime
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from bench import machine
from bench.parts import make_model
from bench.samples import make_samples
from llavaforge.config.schema import EvaluateConfig
from llavaforge.device import pick_device
from llavaforge.inference.evaluate import evaluate
from llavaforge.machine.random_model import REPLICA, TINY

_SIZES = {"replica": REPLICA, "tiny": TINY}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return 0."""
    options = _options(arguments)
    logging.getLogger("llavaforge").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "source_sha256": machine.source_sha256()}
    result["machine"] = machine.describe(torch.float32)
    with tempfile.TemporaryDirectory(prefix="llavaforge-bench-") as name:
        model, data = options.model_name_or_path, options.data_path
        result["model"] = options.name or f"random weights, {options.size}"
        if model is None:
            texts = make_samples(Path(name) / "data")
            model = make_model(Path(name) / "model", _SIZES[options.size], texts)
            data = Path(name) / "data" / "captions.json"
        result |= _measure(model, data, Path(name), options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))
    return 0


def _measure(model: Path, data: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    rows = json.loads(data.read_text())[: options.num_samples]
    found: dict[str, Any] = {}

    def usual(_: int) -> None:
        found["usual"] = _generate(model, rows, data.parent / "images", options.max_new_tokens)

    def ours(pair: int) -> None:
        evaluate(
            EvaluateConfig(
                model_name_or_path=str(model), data_path=data, max_samples=len(rows), metrics=["exact_match"],
                max_new_tokens=options.max_new_tokens, per_device_eval_batch_size=options.batch_size, bf16=False,
                output_dir=folder / "evaluation", cache_dir=folder / f"cache-{pair}",
            )
        )  # fmt: skip

    seconds: dict[str, list[float]] = {"generate_s": [], "evaluate_s": []}
    for pair in range(options.num_pairs):
        sides = (("generate_s", usual), ("evaluate_s", ours))
        for name, side in sides if pair % 2 == 0 else sides[::-1]:
            begin = time.perf_counter()
            side(pair)
            seconds[name].append(time.perf_counter() - begin)
    expected, num_tokens = found["usual"]
    lines = [json.loads(line) for line in (folder / "evaluation" / "samples.jsonl").read_text().splitlines()]
    ratios = [slow / fast for slow, fast in zip(*seconds.values(), strict=True)]
    return {
        "num_samples": len(rows),
        "answer_tokens": num_tokens,
        "batch_size": options.batch_size,
        "same_answers": sum(line["answer"] == answer for line, answer in zip(lines, expected, strict=True)),
        "num_pairs": len(ratios),
        **seconds,
        "tokens_per_s": num_tokens / statistics.median(seconds["evaluate_s"]),
        "times_as_fast": statistics.median(ratios),
        "least_and_most": [min(ratios), max(ratios)],
    }


@torch.no_grad()
def _generate(model: Path, rows: Sequence[dict[str, Any]], images: Path, max_new_tokens: int) -> tuple[list[str], int]:
    """Return the answers that plain transformers gives one after the other, and how many tokens they are."""
    device, processor = pick_device(), AutoProcessor.from_pretrained(model)
    stock = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).to(device).eval()
    answers, num_tokens = [], 0
    for row in rows:
        question = row["conversations"][0]["value"].replace("<image>", "").strip()
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        with Image.open(images / row["image"]) as image:
            inputs = processor(images=image.convert("RGB"), text=text, return_tensors="pt").to(device)
        ids = stock.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        num_tokens += len(ids)
        answers.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return answers, num_tokens


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.evaluate", description=__doc__)
    default = Path("bench") / "results" / f"{datetime.date.today().isoformat()}-evaluate.json"
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes (default: %(default)s)")
    parser.add_argument("--size", choices=list(_SIZES), default="replica", help="of random weights")
    parser.add_argument("--model_name_or_path", type=Path, help="a model folder instead")
    parser.add_argument("--data_path", type=Path, help="for that model")
    parser.add_argument("--name", help="what the result calls it")
    parser.add_argument("--num_samples", type=int, default=48, help="that are answered (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="longest answer (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="of `evaluate` (default: %(default)s)")
    parser.add_argument("--num_pairs", type=int, default=3, help="of measurements (default: %(default)s)")
    parser.add_argument("--num_threads", type=int, help="of the process; 1 on a busy machine (default: torch's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
