"""`llavaforge export`: from a checkpoint to a plain transformers folder that is proved to be the trained model.

Comes in: a checkpoint-N or a `final`. Goes out: a model folder, and the largest difference between its logits under
plain transformers and those of the trained model (LoRA unmerged), while both answer real samples. With `--format gguf`
that folder is the way to one for llama.cpp, whose tensors and image embeddings are proved to be its. `push_to_hub`
uploads what is proved.
"""

import gc
import logging
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from llavaforge.checkpoint.state import load_run
from llavaforge.checkpoint.trained import Trained, merge, open_model, own_run, read_trained
from llavaforge.config.schema import DataEntry, ExportConfig
from llavaforge.data.faults import RecordError
from llavaforge.data.index.prepare import records_of
from llavaforge.data.pixels.decode import decode
from llavaforge.data.rows.records import Record
from llavaforge.data.rows.sources import Source, find_source
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER
from llavaforge.errors import UserError
from llavaforge.files import cache_dir
from llavaforge.folders import publishing
from llavaforge.model_folder.card import RUN
from llavaforge.model_folder.push import Repository
from llavaforge.model_folder.verify import load_verified
from llavaforge.model_folder.write import check_output_dir, update_model_folder
from llavaforge.results import ExportResult

logger = logging.getLogger(__name__)

_QUESTIONS = ("What?", "What is in this image, where is it, and what is around it?")
_NUM_SAMPLES, _NUM_NEW_TOKENS, _MOST_RECORDS = 2, 6, 1000

# Largest difference allowed, as a share of the largest logit: for float32 rounding alone; for half precision a merged
# LoRA rounds each weight once more (2^-9 relative for bfloat16): 5.6 % were seen of a tiny model with AMX.
_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 1e-2}


def export(config: ExportConfig) -> ExportResult:
    """Write and verify the exported model.

    Returns:
        output_dir, max_logit_difference, max_embedding_difference, url.

    Raises:
        UserError: the checkpoint is at fault, `output_dir` is not empty, GGUF cannot hold such a model, or the hub
            would refuse the upload, or did.
        RunFailed: the hub cannot be reached; says whether the export is finished.
        RuntimeError: the exported folder does not compute what was trained. As a transformers folder it is left in
            place for inspection.
    """
    check_output_dir(config.output_dir, config.overwrite, [config.checkpoint])
    trained = read_trained(config.checkpoint, config.base_model) if config.checkpoint.is_dir() else None
    if trained is None and not (config.checkpoint / "config.json").is_file():
        raise UserError(f"{config.checkpoint}: neither a checkpoint-N nor a final. Give one of a run's output_dir.")
    if trained is not None:
        check_output_dir(config.output_dir, config.overwrite, [trained.base])
    repository = None
    if config.push_to_hub is not None:
        repository = Repository(config.push_to_hub, config.private, config.overwrite)
        repository.check()
    if config.format == "transformers":
        difference = _export_transformers(config, trained, config.output_dir, overwrite=config.overwrite)
        embedding_difference = None
    else:
        difference, embedding_difference = _export_gguf(config, trained)
    return {
        "output_dir": str(config.output_dir),
        "max_logit_difference": difference,
        "max_embedding_difference": embedding_difference,
        "url": repository.push(config.output_dir) if repository is not None else None,
    }


def _export_gguf(config: ExportConfig, trained: Trained | None) -> tuple[float, float]:
    """Write and verify a folder for llama.cpp; return the largest difference of a logit and of an image embedding."""
    if find_spec("gguf") is None:
        raise UserError("--format gguf needs the gguf package: pip install 'llavaforge[gguf]'.")
    from llavaforge.gguf_folder.write import check_gguf, write_gguf_folder

    check_gguf(config.checkpoint if trained is None else trained.base)
    with publishing(config.output_dir, overwrite=config.overwrite) as folder:
        plain = folder / "transformers"
        difference = _export_transformers(config, trained, plain)
        embedding_difference = write_gguf_folder(folder, plain, config.gguf_type)
        shutil.rmtree(plain)
    return difference, embedding_difference


def _export_transformers(
    config: ExportConfig, trained: Trained | None, output_dir: Path, overwrite: bool = False
) -> float:
    """Write and verify a plain transformers folder; return the largest difference of a logit."""
    model = open_model(str(config.checkpoint), config.base_model).model  # before anything is written: does it fit?
    if trained is None:
        update_model_folder(output_dir, config.checkpoint, {}, overwrite=overwrite)
    else:
        merge(output_dir, trained, overwrite=overwrite)
    processor, samples = AutoProcessor.from_pretrained(output_dir), _samples(config.checkpoint)
    expected = [_generate(processor, model, [sample]) for sample in samples]
    bound = _BOUND[model.lm_head.weight.dtype] * max(1.0, *(float(answer.logits.abs().max()) for answer in expected))
    del model
    gc.collect()  # one model at a time
    exported = load_verified(output_dir)
    found = [_generate(processor, exported, [sample]) for sample in samples]
    difference = max(
        _compare(output_dir, "the answer to {!r} is not the trained model's", sample, one, other, bound)
        for sample, one, other in zip(samples, expected, found, strict=True)
    )
    logger.info(
        "verified: plain transformers answers %d samples as the trained model does (largest difference %.2g, at most "
        "%.2g in %s)",
        *(len(samples), difference, bound, str(exported.dtype).removeprefix("torch.")),
    )
    check_batch(output_dir, exported, samples, found, bound)
    return difference


def check_batch(folder: Path, model: Any, samples: Sequence["Sample"], alone: Sequence["Answer"], bound: float) -> None:
    """Let plain transformers answer samples as one batch, padded as the folder's files say.

    Args:
        folder: the exported one.
        model: as plain transformers opens it.
        samples: the longest one needs no padding, the others do.
        alone: the model's answer to each of them by itself.
        bound: largest difference of a logit that is taken.

    Raises:
        RuntimeError: the answers differ.
    """
    together = _generate(AutoProcessor.from_pretrained(folder), model, samples)
    for number, (sample, one) in enumerate(zip(samples, alone, strict=True)):
        other = Answer(together.ids[number : number + 1], together.logits[number : number + 1])
        _compare(folder, "in a batch the answer to {!r} differs from the answer to it alone", sample, one, other, bound)
    logger.info("verified: plain transformers answers them in a padded batch as one by one")


class Sample(NamedTuple):
    """What is asked."""

    image: Image.Image
    question: str


class Answer(NamedTuple):
    """New ids, (B, N), and the logits by which they were chosen, (B, N, V)."""

    ids: torch.Tensor
    logits: torch.Tensor


def _compare(folder: Path, what: str, sample: Sample, one: Answer, other: Answer, bound: float) -> float:
    """Return the largest difference between two answers to a sample, up to the first token that they do not share.

    From there on they continue other texts: two tokens were as likely as each other, within the bound.

    Raises:
        RuntimeError: it is above the bound.
    """
    largest = 0.0
    for step in range(min(one.ids.shape[1], other.ids.shape[1])):
        difference = float((one.logits[0, step].float() - other.logits[0, step].float()).abs().max())
        if not difference <= bound:
            raise RuntimeError(
                f"{folder}: {what.format(sample.question)} (a logit by {difference:.3g}, more than {bound:.3g})."
            )
        largest = max(largest, difference)
        if one.ids[0, step] != other.ids[0, step]:
            break
    return largest


@torch.no_grad()
def _generate(processor: Any, model: Any, samples: Sequence[Sample]) -> Answer:
    texts = [_prompt(processor, sample.question) for sample in samples]
    inputs = processor(images=[sample.image for sample in samples], text=texts, padding=True, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(next(model.model.vision_tower.parameters()).dtype)
    output = model.eval().generate(
        **inputs, max_new_tokens=_NUM_NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return Answer(output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, dim=1))


def _prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def _samples(checkpoint: Path) -> list[Sample]:
    """Return what both models are asked: the first samples of the training data, when it is at hand.

    Beside them a question of one word, so that a batch has to be padded.
    """
    generated = [Sample(_noise(), question) for question in _QUESTIONS]
    try:
        if not (checkpoint / RUN).is_file():
            return generated
        run = own_run(checkpoint, load_run(checkpoint))
        entry = DataEntry.model_validate(run["data"][0])  # absent in runs of llavaforge 0.1.0 of before December 2026
        source = find_source(entry, cache_dir())
        records = [record for record in islice(records_of(source), _MOST_RECORDS) if len(record.images) == 1]
        real = [_sample(source, record) for record in records[:_NUM_SAMPLES]]
        if real:
            return [*real, generated[0]]
        logger.warning("verifying on generated images: none of the first records of the data has one image")
        return generated
    except (UserError, RecordError, LookupError, OSError, ValueError) as error:
        logger.warning("verifying on a generated image, the training data is not at hand: %s", error)
        return generated


def _sample(source: Source, record: Record) -> Sample:
    image = decode(source.images.read(record.images[0]), source.images.name(record.images[0]))
    asked = next(turn.text for turn in record.turns if IMAGE_PLACEHOLDER in turn.text)
    return Sample(image, asked.replace(IMAGE_PLACEHOLDER, "").strip() or _QUESTIONS[1])


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 336, 3), dtype=np.uint8))
