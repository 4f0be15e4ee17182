"""`llavaforge export`: from a checkpoint to a plain transformers folder that is proved to be the trained model.

Comes in: a checkpoint-N or a `final`. Goes out: a model folder, and the largest difference between its logits under
plain transformers and those of the trained model (LoRA unmerged) on a real sample.
"""

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from llavaforge.checkpoint.trained import Trained, merge, open_model, read_trained
from llavaforge.config.schema import DataEntry, ExportConfig
from llavaforge.data.faults import RecordError
from llavaforge.data.index.prepare import records_of
from llavaforge.data.pixels.decode import decode
from llavaforge.data.rows.sources import find_source
from llavaforge.errors import UserError
from llavaforge.files import cache_dir
from llavaforge.model_folder.read import read_processor
from llavaforge.model_folder.verify import load_verified
from llavaforge.model_folder.write import check_output_dir, update_model_folder
from llavaforge.results import ExportResult

logger = logging.getLogger(__name__)

_QUESTIONS = ("What?", "What is in this image, where is it, and what is around it?")

# Largest difference allowed, as a share of the largest logit: for float32 rounding alone; for half precision a merged
# LoRA rounds each weight once more (2^-9 relative for bfloat16): 5.6 % were seen of a tiny model with AMX.
_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 1e-2}


def export(config: ExportConfig) -> ExportResult:
    """Write and verify the exported model.

    Returns:
        output_dir, max_logit_difference.

    Raises:
        UserError: the checkpoint is at fault, or `output_dir` is not empty.
        RuntimeError: the exported folder does not compute what was trained; it is left in place for inspection.
    """
    check_output_dir(config.output_dir, config.overwrite, [config.checkpoint])
    trained = read_trained(config.checkpoint, config.base_model) if config.checkpoint.is_dir() else None
    if trained is None and not (config.checkpoint / "config.json").is_file():
        raise UserError(f"{config.checkpoint}: neither a checkpoint-N nor a final. Give one of a run's output_dir.")
    if trained is not None:
        check_output_dir(config.output_dir, config.overwrite, [trained.base])
    model = open_model(str(config.checkpoint), config.base_model).model  # before anything is written: does it fit?
    if trained is None:
        update_model_folder(config.output_dir, config.checkpoint, {}, overwrite=config.overwrite)
    else:
        merge(config.output_dir, trained, overwrite=config.overwrite)
    inputs = _real_sample(config.output_dir, trained)
    expected = _logits(model, inputs)
    del model
    gc.collect()  # one model at a time
    exported = load_verified(config.output_dir)
    found = _logits(exported, inputs)
    difference = float((expected.float() - found.float()).abs().max())
    bound = _BOUND[expected.dtype] * max(1.0, float(expected.abs().max()))
    if not difference <= bound:
        raise RuntimeError(
            f"{config.output_dir}: logits differ from the trained model's by {difference:.3g}, more than {bound:.3g}."
        )
    logger.info(
        "verified: plain transformers gives the trained model's logits (largest difference %.2g, at most %.2g in %s)",
        *(difference, bound, str(expected.dtype).removeprefix("torch.")),
    )
    check_batch(config.output_dir, exported, bound)
    return {"output_dir": str(config.output_dir), "max_logit_difference": difference}


def check_batch(folder: Path, model: Any, bound: float) -> None:
    """Let plain transformers answer a batch padded as the folder's files say, and each question of it alone.

    Raises:
        RuntimeError: the answers differ.
    """
    processor = AutoProcessor.from_pretrained(folder)
    alone = [_generate(processor, model, [question]) for question in _QUESTIONS]
    together = _generate(processor, model, _QUESTIONS)
    for number, (ids, logits) in enumerate(alone):
        for step in range(min(len(logits), len(together[1]))):
            difference = float((logits[step][0].float() - together[1][step][number].float()).abs().max())
            if not difference <= bound:
                raise RuntimeError(
                    f"{folder}: in a batch the answer to {_QUESTIONS[number]!r} differs from the answer to it alone "
                    f"(logits by {difference:.3g}, at most {bound:.3g} is taken)."
                )
            if ids[0, step] != together[0][number, step]:
                break  # two tokens as likely as each other: what follows is about another text
    logger.info("verified: plain transformers answers a padded batch as it answers one by one")


@torch.no_grad()
def _generate(processor: Any, model: Any, questions: Sequence[str]) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Return the new ids (B, T) and for each new token the logits (B, V) that it was chosen by."""
    texts = [_prompt(processor, question) for question in questions]
    inputs = processor(images=[_noise()] * len(texts), text=texts, padding=True, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], output.logits


def _prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def _real_sample(folder: Path, trained: Trained | None) -> dict[str, torch.Tensor]:
    """Return a processor's output for an image and its question: of the training data when it is at hand."""
    processor = read_processor(folder)
    image, question = _first_image(trained) or (_noise(), "What is in this image?")
    return dict(processor(images=image, text=_prompt(processor, question), return_tensors="pt"))


def _first_image(trained: Trained | None) -> tuple[Image.Image, str] | None:
    if trained is None:
        return None
    try:
        stated = trained.run["data"][0]  # absent in runs of llavaforge 0.1.0 of before December 2026
        entry = DataEntry(**{key: stated.get(key) for key in ("path", "images", "split")})
        source = find_source(entry, cache_dir())
        record = next(record for record in records_of(source) if len(record.images) == 1)
        image = decode(source.images.read(record.images[0]), source.images.name(record.images[0]))
        return image, record.turns[-2].text.replace("<image>", "").strip() or "What is in this image?"
    except (UserError, RecordError, StopIteration, LookupError, OSError, ValueError) as error:
        logger.warning("verifying on a generated image, the training data is not at hand: %s", error)
        return None


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 336, 3), dtype=np.uint8))


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    pixels = inputs["pixel_values"].to(next(model.model.vision_tower.parameters()).dtype)
    logits: torch.Tensor = model(**{**inputs, "pixel_values": pixels}).logits
    return logits
