"""`llavaforge data preview`: the first samples of a run as the model sees them, as a page and in the terminal.

Comes in: data and a model, or a training recipe. Goes out: a self-contained HTML page (`report/preview.html.jinja`) and
text on stdout. The model's weights are not read: its config and processor say all that the samples depend on.
"""

import sys
from itertools import chain
from pathlib import Path

from rich.console import Console

from llavaforge.config.schema import DataPreviewConfig
from llavaforge.data.faults import Fault
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_index
from llavaforge.data.load.loader import PackDataset
from llavaforge.data.order.mixture import Mixture, deal, drop_quarantined
from llavaforge.data.order.plan import MicroBatch, Plan
from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.data_preview.cards import Preview, StepPosition, make_bar, make_card
from llavaforge.data_preview.terminal import show
from llavaforge.data_preview.tokens import Reader
from llavaforge.errors import UserError
from llavaforge.files import check_own, replace_text
from llavaforge.model.flops import FlopCounter
from llavaforge.model.load import LoadedModel, load_without_weights
from llavaforge.model.trainable import set_trainable
from llavaforge.report.page import OWN_PAGE, count, render
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
    if config.output is not None:
        check_own(config.output, OWN_PAGE)
    loaded = load_without_weights(config.model_name_or_path)
    index = open_index(config.entries, loaded.processor, loaded.num_image_tokens, config)
    rows, faults_of_data_sets = drop_quarantined(index, config.quarantine)
    faults = list(chain(*faults_of_data_sets))
    if not any(len(mine) for mine in rows):
        names = " and ".join(str(entry.path) for entry in config.entries)
        first = f" The first fault: {faults[0]}" if faults else ""
        raise UserError(
            f"{names}: no sound record, so there is nothing to show.{first} `llavaforge data check` names all faults."
        )
    mixture, held_out = deal(config, index, rows)
    set_trainable(loaded.model, config)
    costs = FlopCounter.of(loaded.model, loaded.num_image_tokens).of_index(index)
    plan = Plan.of(config, mixture, index, costs, config.samples_per_step(), num_steps=1)
    preview = _preview(config, loaded, index, plan, faults, len(held_out))
    output = str(config.output) if config.output is not None else None
    if config.output is not None:
        page = render(Path(__file__).parent / "preview.html.jinja", preview=preview)
        replace_text(config.output, page, OWN_PAGE)
    show(preview, Console(file=sys.stdout), output)
    return {"output": output, "num_samples": len(preview.cards)}


def _preview(
    config: DataPreviewConfig,
    loaded: LoadedModel,
    index: SampleIndex,
    plan: Plan,
    faults: list[Fault],
    num_held_out: int,
) -> Preview:
    tokens = loaded.num_image_tokens
    dataset = PackDataset(index, loaded.preprocessing, loaded.image_token_id, tokens)
    reader = Reader(loaded.processor.tokenizer, loaded.image_token_id, tokens)
    micro_batches = _first_micro_batches(plan, config.num_samples)
    positions: dict[int, StepPosition] = {}  # a sample that comes again keeps its first position
    for position, micro_batch in micro_batches.items():
        positions |= {sample: positions.get(sample, position) for sample in micro_batch.samples}
    shown = {sample: number for number, sample in enumerate(list(positions)[: config.num_samples], 1)}
    bars = [make_bar(one, position, index, tokens, shown) for position, one in micro_batches.items()]
    kept = [bar for number, bar in enumerate(bars) if number < _MOST_BARS or bar.has_card]
    return Preview(
        facts=_facts(config, loaded, index, plan, num_held_out),
        data_sets=_data_sets(index, plan.mixture),
        faults=faults,
        cards=[make_card(dataset, reader, number, sample, positions[sample]) for sample, number in shown.items()],
        bars=kept,
        num_more_bars=len(bars) - len(kept),
        most_tokens=config.most_tokens or max(bar.num_tokens for bar in bars),
    )


def _first_micro_batches(plan: Plan, num_samples: int) -> dict[StepPosition, MicroBatch]:
    """Return the micro-batches of the first steps: so many that they hold `num_samples` samples, or an epoch."""
    found: dict[StepPosition, MicroBatch] = {}
    seen: set[int] = set()
    step = 0
    while len(seen) < num_samples and step * plan.global_batch_size < len(plan.mixture):
        micro_batches = plan.micro_batches(step, rank=0)
        step += 1
        found |= {StepPosition(step, number): one for number, one in enumerate(micro_batches, 1)}
        seen.update(*(one.samples for one in micro_batches))
    return found


def _facts(
    config: DataPreviewConfig, loaded: LoadedModel, index: SampleIndex, plan: Plan, num_held_out: int
) -> dict[str, str]:
    rows = plan.mixture.all_rows
    tokens, supervised = int(index.lengths[rows].sum()), int(index.num_supervised[rows].sum())
    facts = {
        "data": ", ".join(str(entry.path) for entry in config.entries),
        "model": config.model_name_or_path,
        "records": count(len(rows)) + (f" (and {count(num_held_out)} held out)" if num_held_out else ""),
        "samples per epoch": count(len(plan.mixture)),
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


def _data_sets(index: SampleIndex, mixture: Mixture) -> list[tuple[str, int, int, int]]:
    return [
        (data_set.source.name, len(rows), draws, round(draws * float(index.num_supervised[rows].mean())))
        for data_set, rows, draws in zip(index.data_sets, mixture.rows, mixture.draws, strict=True)
    ]
