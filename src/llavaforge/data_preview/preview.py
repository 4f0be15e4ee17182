"""`llavaforge data preview`: the first samples of a run as the model sees them, as a page and in the terminal.

Comes in: data and a model, or a training recipe. Goes out: a self-contained HTML page (`report/preview.html.jinja`) and
text on stdout. The model's weights are not read: its config and processor say all that the samples depend on.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from llavaforge.config.schema import DataEntry, DataPreviewConfig
from llavaforge.data.faults import Fault
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_index
from llavaforge.data.load.loader import PackDataset
from llavaforge.data.order.mixture import Mixture, deal, drop_quarantined
from llavaforge.data.order.plan import MicroBatch, Plan
from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.data_preview.cards import CardMaker, Preview, StepPosition, bars_of, positions_of
from llavaforge.data_preview.terminal import show
from llavaforge.errors import UserError
from llavaforge.model.flops import FlopCounter
from llavaforge.model.load import LoadedModel, load_without_weights
from llavaforge.model.trainable import set_trainable
from llavaforge.report.page import count, render
from llavaforge.results import DataPreviewResult

# Of a step of thousands of micro-batches; those with samples that are shown come on top.
_MOST_BARS = 64


def data_preview(config: DataPreviewConfig) -> DataPreviewResult:
    """Show the first samples of a run of one process, in its own order, and how they are packed.

    Returns:
        output (the page, or None) and num_samples (how many are shown).

    Raises:
        UserError: the model or the data is at fault, no record is sound, or the page cannot be written. Faulty records
        and images are shown, not raised.
    """
    loaded = load_without_weights(config.model_name_or_path)
    data = _open_data(config, loaded)
    plan = _plan(config, data, loaded)
    preview = _preview(config, loaded, data, plan)
    output = str(config.output) if config.output is not None else None
    if config.output is not None:
        _write(config.output, render(Path(__file__).parent / "preview.html.jinja", preview=preview))
    show(preview, Console(file=sys.stdout), output)
    return {"output": output, "num_samples": len(preview.cards)}


@dataclass(frozen=True)
class _Data:
    """The training samples, what of them an epoch holds, and the records that are at fault or held out."""

    index: SampleIndex
    mixture: Mixture
    faults: list[Fault]
    num_held_out: int


def _open_data(config: DataPreviewConfig, loaded: LoadedModel) -> _Data:
    index = open_index(config.entries, loaded.processor, loaded.num_image_tokens, config)
    rows, faults_of_data_sets = drop_quarantined(index, config.quarantine)
    faults = [fault for mine in faults_of_data_sets for fault in mine]
    if not any(len(mine) for mine in rows):
        raise UserError(_nothing_sound(config.entries, faults))
    mixture, held_out = deal(config, index, rows)
    return _Data(index, mixture, faults, len(held_out))


def _nothing_sound(entries: Sequence[DataEntry], faults: list[Fault]) -> str:
    names = " and ".join(str(entry.path) for entry in entries)
    first = f" The first fault: {faults[0]}" if faults else ""
    return f"{names}: no sound record, so there is nothing to show.{first} `llavaforge data check` names all faults."


def _plan(config: DataPreviewConfig, data: _Data, loaded: LoadedModel) -> Plan:
    set_trainable(loaded.model, config)
    costs = FlopCounter.of(loaded.model, loaded.num_image_tokens).of_index(data.index)
    return Plan.of(config, data.mixture, data.index, costs, config.samples_per_step(), num_steps=1)


def _preview(config: DataPreviewConfig, loaded: LoadedModel, data: _Data, plan: Plan) -> Preview:
    tokens = loaded.num_image_tokens
    dataset = PackDataset(data.index, loaded.preprocessing, loaded.image_token_id, tokens)
    make_card = CardMaker(dataset, loaded.processor.tokenizer)
    micro_batches = _first_micro_batches(plan, config.num_samples)
    positions: dict[int, StepPosition] = {}  # a sample that comes again keeps its first position
    for micro_batch, position in zip(micro_batches, positions_of(micro_batches), strict=True):
        positions |= {sample: positions.get(sample, position) for sample in micro_batch.samples}
    shown = {sample: number for number, sample in enumerate(list(positions)[: config.num_samples], 1)}
    bars = bars_of(micro_batches, data.index, tokens, shown)
    kept = [bar for number, bar in enumerate(bars) if number < _MOST_BARS or bar.has_card]
    return Preview(
        facts=_facts(config, loaded, data, plan),
        data_sets=_data_sets(data),
        faults=data.faults,
        cards=[make_card(number, sample, positions[sample]) for sample, number in shown.items()],
        bars=kept,
        num_more_bars=len(bars) - len(kept),
        most_tokens=config.max_tokens_per_batch or max(bar.num_tokens for bar in bars),
    )


def _first_micro_batches(plan: Plan, num_samples: int) -> list[MicroBatch]:
    """Return the micro-batches of the first steps: so many that they hold `num_samples` samples, or an epoch."""
    found: list[MicroBatch] = []
    seen: set[int] = set()
    step = 0
    while len(seen) < num_samples and step * plan.global_batch_size < len(plan.mixture):
        found += plan.micro_batches(step, rank=0)
        seen.update(plan.global_batch(step).tolist())
        step += 1
    return found


def _facts(config: DataPreviewConfig, loaded: LoadedModel, data: _Data, plan: Plan) -> dict[str, str]:
    index, rows = data.index, data.mixture.all_rows
    tokens, supervised = int(index.lengths[rows].sum()), int(index.num_supervised[rows].sum())
    facts = {
        "data": ", ".join(str(entry.path) for entry in config.entries),
        "model": config.model_name_or_path,
        "records": count(len(rows)) + (f" (and {count(data.num_held_out)} held out)" if data.num_held_out else ""),
        "samples per epoch": count(len(data.mixture)),
        "samples per step": count(plan.global_batch_size),
        "tokens": count(tokens),
        "supervised": f"{count(supervised)} ({supervised / tokens:.1%} of the tokens)",
        "images": f"{count(int(index.num_images[rows].sum()))}, {loaded.num_image_tokens} tokens each",
        "image processor": _steps(loaded.preprocessing),
        "prompt style": config.prompt_style,
        "max_length": count(config.max_length),
    }
    if config.system_prompt is not None:
        facts["system prompt"] = config.system_prompt
    return facts


def _steps(preprocessing: Preprocessing) -> str:
    size = preprocessing.resize
    resized = f"shortest edge to {size}" if isinstance(size, int) else f"resized to {size[1]} x {size[0]}"
    padded = "padded to a square, " if preprocessing.pad_color is not None else ""
    crop = preprocessing.crop
    return padded + resized + (f", cropped to {crop[1]} x {crop[0]}" if crop is not None else "")


def _data_sets(data: _Data) -> list[tuple[str, int, int, int]]:
    means = [float(data.index.num_supervised[rows].mean()) for rows in data.mixture.rows]
    return [
        (data_set.source.name, len(rows), draws, round(draws * mean))
        for data_set, rows, draws, mean in zip(
            data.index.data_sets, data.mixture.rows, data.mixture.draws, means, strict=True
        )
    ]


def _write(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the page cannot be written ({error.strerror}). Give another --output.") from None
