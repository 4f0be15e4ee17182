"""`llavaforge quickstart`: the whole path of a real run on tiny parts, without network or GPU.

    data -> customize-model -> stage 1 (projector, captions) -> stage 2 (use_lora, questions) -> evaluate -> export
    -> one answer by plain transformers

Comes in: the small parts shipped beside this file. Goes out: a folder with everything that a real run leaves, a table
and a picture. Every act calls the verb that a user would type. An interrupted quickstart goes on where it stopped.
"""

import json
import logging
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from llavaforge.config.load import build
from llavaforge.config.schema import (
    CustomizeModelConfig,
    EvaluateConfig,
    ExportConfig,
    MakeShapesConfig,
    QuickstartConfig,
    TrainConfig,
)
from llavaforge.errors import UserError, reading
from llavaforge.inference.evaluate import evaluate
from llavaforge.inference.export import export
from llavaforge.join.parts import customize_model
from llavaforge.results import CustomizeModelResult, EvaluateResult, QuickstartResult
from llavaforge.starter import SMALL_CLIP, SMALL_QWEN2
from llavaforge.starter.shapes import make_shapes
from llavaforge.training.run import train

logger = logging.getLogger(__name__)

NUM_IMAGES = 3000
GRID = "answers.png"
_MARKER = "quickstart.json"
_NEXT = (
    "llavaforge customize-model --vision_tower openai/clip-vit-large-patch14-336 "
    "--language_model Qwen/Qwen1.5-4B-Chat --output_dir my-model/model-01"
)


def quickstart(config: QuickstartConfig) -> QuickstartResult:
    """Join, train twice, evaluate with and without looking, export, and let plain transformers answer.

    Returns:
        exact_match, exact_match_blank_image, wall_s, majority_share, and the paths of model, run, export and picture.

    Raises:
        UserError: `output_dir` holds something else, or a quickstart of another seed.
    """
    begin = time.monotonic()
    # Matrices this small gain little from a second thread, and on a busy machine two threads wait for each other:
    # 400 tokens/s were seen instead of 10,000 (LOG.md).
    torch.set_num_threads(1)
    out = config.output_dir
    _claim(config)
    tell = _Acts(num_acts=7)
    data, model, run, exported = out / "data", out / "model-01", out / "train", out / "exported"
    shapes = MakeShapesConfig(output_dir=data, num_samples=NUM_IMAGES, seed=config.seed)
    tell("a world of coloured shapes", lambda: data.exists() or make_shapes(shapes))
    tell("customize-model: tower + projector + language model", lambda: model.exists() or _customize(config, model))
    tell("train: stage 1 `projector` on captions, stage 2 `use_lora` on questions", lambda: train(_recipe(config)))
    final = run / "final"
    questions = data / "heldout" / "questions.json"
    seeing = tell("evaluate on held-out images", lambda: _evaluate(final, questions, out / "evaluation"))
    blind = tell(
        "evaluate once more with the images blanked",
        lambda: _evaluate(final, questions, out / "evaluation-blank", True),
    )
    tell("export", lambda: exported.exists() or export(ExportConfig(checkpoint=final, output_dir=exported)))
    lines = [json.loads(line) for line in (out / "evaluation" / "samples.jsonl").read_text().splitlines()]
    answer = tell("one answer by plain transformers", lambda: plain_answer(exported, data / "heldout", lines[0]))
    draw_answers(lines, data / "heldout" / "images", out / GRID)
    result: QuickstartResult = {
        "exact_match": seeing["exact_match"],
        "exact_match_blank_image": blind["exact_match"],
        "majority_share": max(Counter(line["reference"] for line in lines).values()) / len(lines),
        "wall_s": round(time.monotonic() - begin, 1),
        "model": str(model),
        "run": str(run),
        "exported": str(exported),
        "picture": str(out / GRID),
    }
    _print_summary(result, lines[0], answer)
    return result


def plain_answer(model: Path, data: Path, line: dict[str, Any]) -> str:
    """Let transformers alone, with nothing of llavaforge, answer one question about one image."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model)
    llava = LlavaForConditionalGeneration.from_pretrained(model)
    content = [{"type": "image"}, {"type": "text", "text": line["question"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with Image.open(data / "images" / line["image"]) as image:
        inputs = processor(images=image, text=text, return_tensors="pt")
    output = llava.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer: str = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


def draw_answers(lines: list[dict[str, Any]], images: Path, path: Path) -> None:
    """Draw a grid of images with question, answer, and right or wrong; some wrong ones first, if there are any."""
    from matplotlib.figure import Figure

    wrong = [line for line in lines if not line["correct"]][:4]
    right = [line for line in lines[:: max(1, len(lines) // 16)] if line["correct"]]
    shown = (wrong + right)[:16]
    figure = Figure(figsize=(12, 13), layout="constrained")
    for axes, line in zip(figure.subplots(4, 4).flat, shown, strict=False):
        with Image.open(images / line["image"]) as image:
            axes.imshow(image)
        verdict, colour = ("right", "darkgreen") if line["correct"] else (f"wrong: {line['reference']}", "firebrick")
        axes.set_title(textwrap.fill(line["question"], 30), fontsize=9)
        axes.set_xlabel(f"{line['answer']}  ({verdict})", color=colour, fontsize=11)
        axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=80)


class _Acts:
    """Says which act begins, does it, and says how long it took."""

    def __init__(self, num_acts: int) -> None:
        self._done, self._num_acts = 0, num_acts

    def __call__(self, title: str, act: Callable[[], Any]) -> Any:
        self._done += 1
        begin = time.monotonic()
        logger.info("\n[%d/%d] %s", self._done, self._num_acts, title)
        result = act()
        logger.info("      done in %.0f s", time.monotonic() - begin)
        return result


def _claim(config: QuickstartConfig) -> None:
    marker = config.output_dir / _MARKER
    if marker.is_file():
        with reading(marker, "Give another --output_dir."):
            seed = json.loads(marker.read_text())["seed"]
        if seed != config.seed:
            raise UserError(f"{config.output_dir}: a quickstart of seed {seed}. Give another --output_dir.")
        return
    if config.output_dir.exists() and any(config.output_dir.iterdir()):
        raise UserError(f"{config.output_dir}: not empty and not a quickstart. Give another --output_dir.")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"seed": config.seed}) + "\n")


def _customize(config: QuickstartConfig, model: Path) -> CustomizeModelResult:
    options = CustomizeModelConfig(
        vision_tower=str(SMALL_CLIP),
        language_model=str(SMALL_QWEN2),
        output_dir=model,
        torch_dtype="float32",
        seed=config.seed,
    )
    return customize_model(options)


def _recipe(config: QuickstartConfig) -> TrainConfig:
    out = config.output_dir
    values = yaml.safe_load(Path(__file__).with_name("quickstart.yaml").read_text())
    captions, questions = values["stages"]
    captions |= {"data_path": str(out / "data" / "train"), "eval_data_path": str(out / "data" / "heldout")}
    questions |= {name: str(Path(captions[name]) / "questions.json") for name in ("data_path", "eval_data_path")}
    shared = {
        "model_name_or_path": str(out / "model-01"),
        "data_path": captions["data_path"],
        "output_dir": out / "train",
        "cache_dir": out / "cache",
        "seed": config.seed,
    }
    return build(TrainConfig, {**values, **shared}, "quickstart.yaml")


def _evaluate(model: Path, questions: Path, output_dir: Path, blank_image: bool = False) -> EvaluateResult:
    return evaluate(
        EvaluateConfig(
            model_name_or_path=str(model),
            data_path=questions,
            output_dir=output_dir,
            blank_image=blank_image,
            per_device_eval_batch_size=50,
            max_new_tokens=8,
            bf16=False,
            dataloader_num_workers=0,
            cache_dir=output_dir.parent / "cache",
        )
    )


def _print_summary(result: QuickstartResult, line: dict[str, Any], answer: str) -> None:
    table = Table(title="What came of it", title_justify="left", show_header=False)
    for name, value in (
        ("exact match on held-out images", f"{result['exact_match']:.1%}"),
        ("with the images blanked", f"{result['exact_match_blank_image']:.1%}"),
        ("always the commonest answer", f"{result['majority_share']:.1%}"),
        ("time", f"{result['wall_s']:.0f} s"),
        ("joined model", result["model"]),
        ("run: curves, checkpoints, adapter", result["run"]),
        ("exported model (plain transformers)", result["exported"]),
        ("picture of answers", result["picture"]),
        (f"transformers, on {line['image']}", f"{line['question']}  {answer}"),
    ):
        table.add_row(name, value)
    Console(file=sys.stdout).print(table)
    sys.stdout.write(f"\nNext, with real models (a hub or two folders):\n\n  {_NEXT}\n\n")
