"""`llavaforge evaluate`: held-out loss and metrics of answers, with one line per sample.

Comes in: a model and a data set. Goes out: the summary, and `samples.jsonl`:

    {"id": "17", "question": "What colour is the circle?", "reference": "red", "loss": 0.02, "num_supervised": 2,
     "answer": "red", "correct": true, "exact_match": 1.0}
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llavaforge.checkpoint.trained import open_model
from llavaforge.config.schema import DataEntry, EvaluateConfig
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_checked_index
from llavaforge.data.index.prepare import records_of
from llavaforge.data.load.loader import PackDataset, loading
from llavaforge.data.load.pack import Pack
from llavaforge.data.order.plan import MicroBatch, in_order
from llavaforge.data.rows.records import Record
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER
from llavaforge.device import compute_dtype, pick_device
from llavaforge.errors import UserError
from llavaforge.files import check_own, replace_text, to_json
from llavaforge.inference.generate import Answerer, Question
from llavaforge.inference.metrics import METRICS, interval
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import cast_parameters
from llavaforge.results import EvaluateResult

logger = logging.getLogger(__name__)

_LARGEST_EXPONENT = 700  # of e, in float64
_SAMPLES, _SUMMARY = "samples.jsonl", "summary.json"
# How the files begin that may be replaced (`files.check_own`).
_OWN = {_SAMPLES: r'\{"id": ".*", "image": .*, "question": ', _SUMMARY: r'\{\s*"num_samples": \d+,\s*"loss": '}


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Measure a model on a data set.

    Returns:
        num_samples, loss (per supervised token), perplexity, exact_match (None when not measured), the other metrics
        that were measured, intervals, and what was measured: model_name_or_path, data_path, blank_image.

    Raises:
        UserError: the model or the data is at fault.
    """
    if config.output_dir is not None and (config.output_dir / "run.json").is_file():
        raise UserError(f"{config.output_dir}: is a training run's folder. Give another --output_dir.")
    for name, own in _OWN.items():
        if config.output_dir is not None:
            check_own(config.output_dir / name, own)
    loaded = open_model(config.model_name_or_path, config.base_model)
    step_module = StepModule(loaded.model, loaded.preprocessing).eval()
    cast_parameters(step_module, compute_dtype(config.bf16))
    step_module.to(pick_device())
    entry = DataEntry(
        path=config.data_path,
        images=config.image_folder,
        image_roots=config.image_roots,
        max_samples=config.max_samples,
    )
    index = open_checked_index([entry], loaded.processor, loaded.num_image_tokens, config)
    records = _as_cut(records_of(index.data_sets[0].source), index)
    dataset = PackDataset(
        index, loaded.preprocessing, loaded.image_token_id, loaded.num_image_tokens, config.blank_image
    )
    metrics = _chosen(config.metrics, [record.turns[-1].text for record in records])
    answerer = Answerer(loaded, config, config.max_new_tokens) if metrics else None
    lines = list(_lines(config, step_module, dataset, records, answerer, metrics))
    num_supervised = [line["num_supervised"] for line in lines]
    loss = sum(line["loss"] * line["num_supervised"] for line in lines) / sum(num_supervised)
    intervals = {"loss": interval([line["loss"] for line in lines], num_supervised)}
    means: dict[str, float | None] = {"exact_match": None}
    for name in metrics:
        values = [line[name] for line in lines]
        means[name], intervals[name] = sum(values) / len(values), interval(values)
        texts = ([line[key] for line in lines] for key in ("answer", "reference"))
        means |= {f"{name}_{share}": value for share, value in METRICS[name].of_all(*texts).items()}
    summary: EvaluateResult = {
        "num_samples": len(lines),
        "loss": loss,
        "perplexity": math.exp(min(loss, _LARGEST_EXPONENT)),
        "exact_match": means.pop("exact_match"),
        "intervals": {name: list(ends) for name, ends in intervals.items()},
        "model_name_or_path": config.model_name_or_path,
        "data_path": str(config.data_path),
        "blank_image": config.blank_image,
        **means,  # type: ignore[typeddict-item]  # each metric under its own name
    }
    if config.output_dir is not None:
        _write(config.output_dir, lines, summary)
    return summary


def _chosen(metrics: Sequence[str], references: Sequence[str]) -> list[str]:
    """Return the names of what is measured."""
    if "none" in metrics:
        return []
    suiting = {name for name, metric in METRICS.items() if "auto" in metrics and metric.suits(references)}
    chosen = [name for name in METRICS if name in suiting or name in metrics]
    logger.info("metrics of answers: %s", ", ".join(chosen) or "none that suits the references (--metrics NAME)")
    return chosen


def _as_cut(records: Iterable[Record], index: SampleIndex) -> list[Record]:
    """Return records without the turns, and their images, that did not fit `max_length`."""
    columns = zip(records, index.column("num_turns_dropped"), index.num_images, strict=True)
    return [
        replace(record, turns=record.turns[: len(record.turns) - dropped], images=record.images[:num_images])
        for record, dropped, num_images in columns
    ]


def _lines(
    config: EvaluateConfig,
    step_module: StepModule,
    dataset: PackDataset,
    records: list[Record],
    answerer: Answerer | None,
    metrics: Sequence[str],
) -> Iterator[dict[str, Any]]:
    index = dataset.index
    batches = in_order(index.lengths, np.arange(len(records)), config.per_device_eval_batch_size, None)
    order = [MicroBatch(0, batch, True, 0) for batch in batches]
    device = next(step_module.parameters()).device
    with loading(dataset, order, config.dataloader_num_workers, device.type == "cuda") as packs:
        for number, pack in enumerate(packs, 1):
            losses = _sample_losses(step_module, pack.to(device))
            chosen = [records[sample] for sample in pack.source.samples]
            answers = _answers(answerer, chosen, pack) if answerer else [None] * len(chosen)
            for record, (loss, count), answer in zip(chosen, losses, answers, strict=True):
                yield _line(record, loss, count, answer, metrics)
            if number % 20 == 0:
                logger.info("evaluated %d of %d batches", number, len(order))


@torch.no_grad()
def _sample_losses(step_module: StepModule, pack: Pack) -> list[tuple[float, int]]:
    """Return mean loss and number of supervised tokens of each sample of a pack."""
    losses = step_module.token_losses(pack)
    sample_of = torch.searchsorted(pack.cu_seqlens_N1, pack.predictors_S.to(torch.int32), right=True) - 1
    count = torch.bincount(sample_of, minlength=len(pack.lengths))
    total = torch.zeros(len(pack.lengths), device=losses.device).index_add_(0, sample_of, losses)
    return list(zip((total / count).tolist(), count.tolist(), strict=True))


def _answers(answerer: Answerer, records: list[Record], pack: Pack) -> list[str]:
    pixels = iter(pack.pixels_ICHW.numpy())
    return answerer([Question(record.turns[:-1], [next(pixels) for _ in record.images]) for record in records])


def _line(
    record: Record, loss: float, num_supervised: int, answer: str | None, metrics: Sequence[str]
) -> dict[str, Any]:
    line = {
        "id": record.id,
        "image": record.images[0].name if len(record.images) == 1 else [image.name for image in record.images],
        "question": record.turns[-2].text.replace(IMAGE_PLACEHOLDER, "").strip(),
        "reference": record.turns[-1].text,
        "loss": loss,
        "num_supervised": num_supervised,
    }
    if answer is not None:
        values = {name: METRICS[name].of_answer(answer, record.turns[-1].text) for name in metrics}
        line |= {"answer": answer, "correct": values[metrics[0]] == 1, **values}
    return line


def _write(output_dir: Path, lines: list[dict[str, Any]], summary: EvaluateResult) -> None:
    replace_text(output_dir / _SAMPLES, "".join(to_json(line) + "\n" for line in lines), _OWN[_SAMPLES])
    replace_text(output_dir / _SUMMARY, to_json(summary, indent=1) + "\n", _OWN[_SUMMARY])
