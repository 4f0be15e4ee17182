"""`llavaforge evaluate`: held-out loss and metrics of answers, with one line per sample.

Comes in: a model and a data set. Goes out: the summary, a page of the worst samples, and `samples.jsonl`:

    {"id": "17", "image": "17.png", "question": "What colour is the circle?", "reference": "red", "loss": 0.02,
     "num_supervised": 2, "answer": "red", "correct": true, "exact_match": 1.0}
"""

import gc
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llavaforge.answers.choices import Chooser, options_of, right_choice
from llavaforge.answers.generate import Answerer, Question
from llavaforge.answers.metrics import METRICS, References, chosen, interval, measure
from llavaforge.answers.prefill import Prefill
from llavaforge.checkpoint.trained import open_model
from llavaforge.config.schema import DataEntry, EvaluateConfig, SampleOptions
from llavaforge.data.index.open import open_checked_index, sample_builder
from llavaforge.data.index.records import records_of_rows
from llavaforge.data.load.loader import PackDataset, loading
from llavaforge.data.order.plan import MicroBatch, in_order
from llavaforge.data.order.run_data import HeldOut
from llavaforge.data.rows.records import Record
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER
from llavaforge.device import compute_dtype
from llavaforge.errors import UserError
from llavaforge.files import check_own, replace_text, to_json
from llavaforge.inference.evaluation_page import evaluation_page
from llavaforge.inference.held_out import open_what_run_held_out, run_of
from llavaforge.inference.lmms import check_lmms, run_lmms
from llavaforge.model.load import LoadedModel
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import cast_parameters
from llavaforge.processes.launch import num_processes
from llavaforge.processes.world import World, open_world
from llavaforge.progress import Bar
from llavaforge.report.page import OWN_PAGE
from llavaforge.results import EvaluateResult

logger = logging.getLogger(__name__)

_LARGEST_EXPONENT = 700  # of e, in float64
_TIMEOUT_S = 600.0  # for processes to meet
_START_OF_WORKERS_S = 5.0  # on two cores: mostly imports
_SAMPLES, _SUMMARY, _PAGE = "samples.jsonl", "summary.json", "report.html"
# How the files begin that may be replaced (`files.check_own`).
_OWN = {
    _SAMPLES: r'\{"id": ".*", "image": .*, "question": ',
    _SUMMARY: r'\{\s*"num_samples": \d+,\s*"loss": ',
    _PAGE: OWN_PAGE,
}


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Measure a model on a data set; under torchrun the processes share the samples.

    Returns:
        num_samples, loss (per supervised token), perplexity, exact_match (None when not measured), the other metrics
        that were measured, intervals, and what was measured: model_name_or_path, data_path, held_out, blank_image.

    Raises:
        UserError: the model or the data is at fault, or a metric does not suit the data.
    """
    if config.output_dir is not None and (config.output_dir / "run.json").is_file():
        raise UserError(f"{config.output_dir}: is a training run's folder. Give another --output_dir.")
    for name, own in _OWN.items():
        if config.output_dir is not None:
            check_own(config.output_dir / name, own)
    if config.lmms:
        check_lmms(Path(config.model_name_or_path), config.lmms_python)
    has_samples = config.held_out or config.data_path is not None
    with open_world(num_processes(), _TIMEOUT_S, needs_group=False) as world:
        summary = _measure(config, world) if has_samples else _nothing(config)
        if world.is_writer and config.lmms:
            gc.collect()
            torch.cuda.empty_cache()  # of our model, for theirs
            summary["lmms"] = _lmms(config)
            if config.output_dir is not None and has_samples:
                _write_summary(config.output_dir, summary)  # once more, with theirs
        return world.broadcast_object(summary)


def _lmms(config: EvaluateConfig) -> dict[str, dict[str, float]]:
    assert config.output_dir is not None
    folder, bf16 = config.output_dir / "lmms-eval", compute_dtype(config.bf16) == torch.bfloat16
    return run_lmms(
        Path(config.model_name_or_path), config.lmms, folder, config.max_samples, bf16, config.lmms_python,
        config.lmms_include_path,
    )  # fmt: skip


def _nothing(config: EvaluateConfig) -> EvaluateResult:
    """Return the summary of no samples of ours."""
    return {
        "num_samples": 0,
        "loss": None,
        "perplexity": None,
        "exact_match": None,
        "lmms": {},
        "intervals": {},
        "model_name_or_path": config.model_name_or_path,
        "held_out": False,
        "data_path": None,
        "blank_image": config.blank_image,
    }


def _measure(config: EvaluateConfig, world: World) -> EvaluateResult:
    """Measure on samples, write it down and return the summary."""
    run = world.run_on_all(lambda: run_of(config)) if config.held_out else None
    if run is not None:
        as_there = {name: getattr(run[0], name) for name in SampleOptions.model_fields}
        config = config.model_copy(update=as_there)
    loaded = world.run_on_all(lambda: open_model(config.model_name_or_path, config.base_model))
    step_module = StepModule(loaded.model, loaded.preprocessing).eval()
    cast_parameters(step_module, compute_dtype(config.bf16))
    step_module.to(world.device)
    data = world.run_on_first_of_host(
        lambda: open_what_run_held_out(*run, loaded, config.max_samples) if run else _open_data(config, loaded)
    )
    index, rows = data.index, data.rows
    records = records_of_rows(index, rows)
    dataset = PackDataset(
        index, loaded.preprocessing, loaded.image_token_id, loaded.num_image_tokens, config.blank_image
    )
    references = [references_of(record) for record in records]
    metrics = chosen(config.metrics, references)
    if world.is_writer:
        logger.info("metrics of answers: %s", ", ".join(metrics) or "none that suits the references (--metrics NAME)")
    judged = {METRICS[name].of for name in metrics}
    answerer = Answerer(loaded, config, config.max_new_tokens) if "answer" in judged else None
    chooser = None
    if "likeliest_choice" in judged:
        _check_options(records)
        builder = sample_builder(loaded.processor, loaded.num_image_tokens, config)
        chooser = Chooser(loaded.model, builder)
    by_row = dict(zip(rows.tolist(), records, strict=True))
    mine = dict(_lines(config, step_module, dataset, by_row, answerer, chooser, world))
    found: dict[int, dict[str, Any]] = {}
    for theirs in world.all_gather_objects(mine):
        found |= theirs
    lines = [found[row] for row in rows.tolist()]
    paths = [str(data_set.source.entry.path) for data_set in index.data_sets]
    summary = _summary(config, lines, metrics, records, references, ", ".join(paths))
    if config.output_dir is not None and world.is_writer:
        _write(config.output_dir, lines, summary, evaluation_page(dataset, rows, lines, summary, metrics))
    return summary


def _open_data(config: EvaluateConfig, loaded: LoadedModel) -> HeldOut:
    """Open all records of `data_path`."""
    assert config.data_path is not None
    entry = DataEntry(
        path=config.data_path,
        images=config.image_folder,
        image_roots=config.image_roots,
        max_samples=config.max_samples,
    )
    index = open_checked_index([entry], loaded.processor, loaded.num_image_tokens, config)
    return HeldOut(index, np.arange(len(index)))


def references_of(record: Record) -> References:
    """Return what the last answer of a record may be: what several people answered, or its own."""
    return record.answers or (record.turns[-1].text,)


def _check_options(records: Sequence[Record]) -> None:
    for number, record in enumerate(records):
        where = f"--metrics multiple_choice_likelihood: sample {record.id or number}"
        if not (options := options_of(record)):
            raise UserError(f"{where} offers no options. Its question needs a line for each: `A. a dog`, `B. a cat`.")
        if not right_choice(record):
            offered = ", ".join(f"{letter}. {text}" for letter, text in options.items())
            raise UserError(f"{where}: its answer {record.turns[-1].text!r:.80} is none of its options ({offered}).")


def _lines(
    config: EvaluateConfig,
    step_module: StepModule,
    dataset: PackDataset,
    records: Mapping[int, Record],
    answerer: Answerer | None,
    chooser: Chooser | None,
    world: World,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield this process's samples, by their rows: the longest first, so that those of a batch end together."""
    lengths = dataset.index.lengths
    longest_first = np.array(sorted(records, key=lambda row: -lengths[row]))
    batches = in_order(lengths, longest_first, config.per_device_eval_batch_size, None)
    order = [MicroBatch(0, batch, True, 0) for batch in batches[world.rank :: world.size]]
    is_cuda = world.device.type == "cuda"
    with (
        loading(dataset, order, _num_workers(dataset, order, config.dataloader_num_workers), is_cuda) as packs,
        Bar("evaluating", not world.is_writer) as bar,
    ):
        for number, pack in enumerate(packs, 1):
            asked = [records[sample] for sample in pack.source.samples]
            prefill = Prefill(step_module, pack.to(world.device), is_continued=bool(answerer or chooser))
            choices = chooser(asked, prefill) if chooser else None
            answers = answerer.after(prefill, [Question(record.turns[:-1]) for record in asked]) if answerer else None
            for place, (sample, record, (loss, count)) in enumerate(
                zip(pack.source.samples, asked, prefill.losses, strict=True)
            ):
                line = _line(record, loss, count)
                line |= {"answer": answers[place]} if answers else {}
                line |= {"likeliest_choice": choices[place]} if choices else {}
                yield sample, line
            del prefill  # its keys and values, before the next ones
            bar.update(number / len(order), f"{number * world.size} of {len(batches)} batches  ")


def _num_workers(dataset: PackDataset, order: Sequence[MicroBatch], most: int) -> int:
    """Return how many processes read images: none where that is done here before they have started."""
    if not most or not order:
        return 0
    num_images = dataset.index.num_images
    begin_s = time.perf_counter()
    dataset[max(order, key=lambda batch: sum(num_images[sample] for sample in batch.samples))]
    return most if (time.perf_counter() - begin_s) * len(order) > _START_OF_WORKERS_S else 0


def _line(record: Record, loss: float, num_supervised: int) -> dict[str, Any]:
    return {
        "id": record.id,
        "image": record.images[0].name if len(record.images) == 1 else [image.name for image in record.images],
        "question": record.turns[-2].text.replace(IMAGE_PLACEHOLDER, "").strip(),
        "reference": record.turns[-1].text,
        **({"answers": list(record.answers)} if record.answers else {}),
        "loss": loss,
        "num_supervised": num_supervised,
    }


def _summary(
    config: EvaluateConfig,
    lines: Sequence[dict[str, Any]],
    metrics: Sequence[str],
    records: Sequence[Record],
    references: Sequence[References],
    data_path: str,
) -> EvaluateResult:
    """Sum up, and put each sample's values into its line."""
    num_supervised = [line["num_supervised"] for line in lines]
    losses = [line["loss"] for line in lines]
    loss = float(np.dot(losses, num_supervised)) / sum(num_supervised)
    answers = {key: [line.get(key, "") for line in lines] for key in ("answer", "likeliest_choice")}
    right = {"answer": references, "likeliest_choice": [[right_choice(record)] for record in records]}
    scores = measure(metrics, answers, right)
    for number, line in enumerate(lines):
        if metrics:
            line["correct"] = scores.of_samples[metrics[0]][number] == 1
        line |= {name: values[number] for name, values in scores.of_samples.items()}
    values: Mapping[str, Any] = {"exact_match": None, **scores.of_all}
    return {
        "num_samples": len(lines),
        "loss": loss,
        "perplexity": math.exp(min(loss, _LARGEST_EXPONENT)),
        "exact_match": values["exact_match"],
        "lmms": {},
        "intervals": {
            name: list(ends) for name, ends in {"loss": interval(losses, num_supervised), **scores.intervals}.items()
        },
        "model_name_or_path": config.model_name_or_path,
        "held_out": config.held_out,
        "data_path": data_path,
        "blank_image": config.blank_image,
        **{name: value for name, value in values.items() if name != "exact_match"},  # type: ignore[typeddict-item]  # each under its own name
    }


def _write(output_dir: Path, lines: Sequence[dict[str, Any]], summary: EvaluateResult, page: str) -> None:
    replace_text(output_dir / _SAMPLES, "".join(to_json(line) + "\n" for line in lines), _OWN[_SAMPLES])
    replace_text(output_dir / _PAGE, page, _OWN[_PAGE])
    _write_summary(output_dir, summary)


def _write_summary(output_dir: Path, summary: EvaluateResult) -> None:
    replace_text(output_dir / _SUMMARY, to_json(summary, indent=1) + "\n", _OWN[_SUMMARY])
