"""`llavaforge data check`: the doctor. What is wrong with the data, where, and what to do about it.

Comes in: data as in a recipe, and the model it is for. Goes out: the findings on stderr, the result, `report.html` and
`findings.jsonl` with `--report`, and the list that `train --quarantine` takes. One line of findings.jsonl:

    {"kind": "truncated_image", "severity": "error", "source": "data", "record": "chat.json row 17 (id 'a')",
     "file": "chat.json", "row": 17, "id": "a", "path": "a.jpg", "message": "..."}
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from llavaforge.config.schema import DataCheckConfig
from llavaforge.data.faults import KINDS
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_index, refuse
from llavaforge.data.order.mixture import RowNumbers, mix, split_held_out
from llavaforge.data.order.plan import Plan, num_steps
from llavaforge.data_check.charts import histogram
from llavaforge.data_check.findings import Diagnosis, Finding, examine
from llavaforge.data_check.forecast import Forecast, forecast
from llavaforge.files import check_own, replace_text
from llavaforge.model.flops import FlopCounter
from llavaforge.model.load import LoadedModel, load_without_weights
from llavaforge.model.trainable import set_trainable
from llavaforge.report.glyphs import visible
from llavaforge.report.page import OWN_PAGE, render
from llavaforge.results import DataCheckResult

Mask = npt.NDArray[np.bool_]

_EXAMPLES_SHOWN, _EXAMPLES_IN_REPORT = 3, 20
_PAGE, _FINDINGS = "report.html", "findings.jsonl"
# How the files begin that may be replaced (`files.check_own`).
_OWN_FINDINGS = r'\{"kind": "\w+", "severity": "'
_OWN_QUARANTINE = r'\{"source": ".*", "contents": "'


def data_check(config: DataCheckConfig) -> DataCheckResult:
    """Examine data.

    Returns:
        num_records, num_images, num_errors, num_warnings, errors_by_kind, warnings_by_kind, steps_per_epoch (None
        without a model), and the paths that were written.

    Raises:
        UserError: the data cannot be read at all, or the options contradict each other.
    """
    if config.report is not None:
        check_own(config.report / _PAGE, OWN_PAGE)
        check_own(config.report / _FINDINGS, _OWN_FINDINGS)
    if config.quarantine is not None:
        check_own(config.quarantine, _OWN_QUARANTINE)
    loaded = load_without_weights(config.model_name_or_path) if config.model_name_or_path is not None else None
    index, held_out = _open(config, loaded)
    crops = loaded is not None and loaded.preprocessing.crop is not None and loaded.preprocessing.pad_color is None
    found = examine(index, held_out, config.check_images, crops)
    outlook = _outlook(config, loaded, index, held_out)
    errors, warnings = found.by_severity("error"), found.by_severity("warning")
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    _show(found, console)
    _summarize(config, index, outlook, console)
    if config.report is not None:
        _write_report(config, index, held_out, found, outlook)
    if config.quarantine is not None:
        _write_quarantine(config.quarantine, found.errors)
    return {
        "num_records": index.num_records,
        "num_images": int(index.num_images.sum()),
        "num_errors": sum(errors.values()),
        "num_warnings": sum(warnings.values()),
        "errors_by_kind": errors,
        "warnings_by_kind": warnings,
        "steps_per_epoch": outlook.steps_per_epoch if outlook else None,
        "report": str(config.report / _PAGE) if config.report else None,
        "quarantine": str(config.quarantine) if config.quarantine else None,
    }


def _open(config: DataCheckConfig, loaded: LoadedModel | None) -> tuple[SampleIndex, Mask]:
    """Return all data, and for each row whether it is held out."""
    processor, num_image_tokens = (loaded.processor, loaded.num_image_tokens) if loaded is not None else (None, 0)
    index = open_index([*config.entries, *config.eval_entries], processor, num_image_tokens, config)
    for data_set in index.data_sets:
        refuse([], data_set.num_records, data_set.source.name)
    held_out = np.zeros(len(index), dtype=bool)
    if config.eval_entries:
        held_out[index.starts[len(config.entries)] :] = True
    elif config.validation_split and len(index):
        held_out[split_held_out(index, np.arange(len(index)), config.validation_split)[1]] = True
    return index, held_out


def _outlook(
    config: DataCheckConfig, loaded: LoadedModel | None, index: SampleIndex, held_out: Mask
) -> Forecast | None:
    """Return what an epoch on these records would be; None without a model, or without a sound record."""
    if loaded is None or held_out.all():
        return None
    rows: list[RowNumbers] = [
        first + np.flatnonzero(~held_out[first:last])
        for first, last in pairwise(index.starts[: len(config.entries) + 1])
    ]
    if not all(len(mine) for mine in rows):  # the findings say why
        return None
    mixture = mix(config.entries, rows, config.seed)
    batch = min(config.samples_per_step(), len(mixture))
    set_trainable(loaded.model, config)
    costs = FlopCounter.of(loaded.model, loaded.num_image_tokens).of_index(index)
    return forecast(Plan.of(config, mixture, index, costs, batch, num_steps(len(mixture), batch, 1.0, 0)))


def _show(found: Diagnosis, console: Console) -> None:
    """Print what was found, by kind, with remedies and examples."""
    if not found.counts:
        console.print("No faults found.", style="green")
    several = len({finding.source for finding in (*found.errors, *found.warnings)}) > 1
    for kind, count, examples in _by_kind(found):
        known = KINDS[kind]
        style = "bold red" if known.severity == "error" else "bold yellow"
        console.print(
            Text.assemble((f"{count:,} x {known.title}", style), f"  ({known.severity}: {kind})  {known.remedy}")
        )
        for finding in examples[:_EXAMPLES_SHOWN]:
            console.print(Text(visible(f"    {finding.source + ': ' if several else ''}{finding.fault}")))
        if count > _EXAMPLES_SHOWN:
            console.print(f"    ... and {count - _EXAMPLES_SHOWN:,} more (--report DIR lists them)")


def _summarize(config: DataCheckConfig, index: SampleIndex, outlook: Forecast | None, console: Console) -> None:
    """Print what was looked at, and what was not."""
    looked_at = f"{index.num_records:,} records, {int(index.num_images.sum()):,} images"
    if outlook is not None:
        looked_at += f"; an epoch: {outlook.tokens_per_epoch:,} tokens, {outlook.steps_per_epoch:,} steps"
    console.print(looked_at)
    if config.model_name_or_path is None:
        console.print("Not checked: tokens, lengths and labels (no --model_name_or_path).")
    if not config.check_images:
        console.print("Not checked: what images hold, and copies of them under other names (--check_images false).")


def _by_kind(found: Diagnosis) -> Iterable[tuple[str, int, list[Finding]]]:
    for kind in KINDS:
        if found.counts[kind]:
            examples = [one for one in (*found.errors, *found.warnings) if one.fault.kind == kind]
            yield kind, found.counts[kind], examples


def _write_report(
    config: DataCheckConfig,
    index: SampleIndex,
    held_out: Mask,
    found: Diagnosis,
    outlook: Forecast | None,
) -> None:
    assert config.report is not None
    lines = []
    for finding in (*found.errors, *found.warnings):
        kind, where = finding.fault.kind, finding.fault.where
        told = {"kind": kind, "severity": KINDS[kind].severity, "source": finding.source, "record": where}
        lines.append(json.dumps(told | asdict(finding.fault)) + "\n")
    replace_text(config.report / _FINDINGS, "".join(lines), _OWN_FINDINGS)
    kinds = [(kind, KINDS[kind], count, examples[:_EXAMPLES_IN_REPORT]) for kind, count, examples in _by_kind(found)]
    page = render(
        Path(__file__).parent / "check.html.jinja",
        facts=_facts(config, index, held_out),
        several=len(index.data_sets) > 1,
        kinds=kinds,
        num_errors=sum(found.by_severity("error").values()),
        num_warnings=sum(found.by_severity("warning").values()),
        outlook=outlook,
        charts=_charts(config, index, found),
    )
    replace_text(config.report / _PAGE, page, OWN_PAGE)


def _facts(config: DataCheckConfig, index: SampleIndex, held_out: Mask) -> dict[str, str]:
    return {
        "data": ", ".join(data_set.source.name for data_set in index.data_sets),
        "model": config.model_name_or_path or "none given: tokens and labels were not checked",
        "prompt style": config.prompt_style,
        "records": f"{index.num_records:,}",
        "held out": f"{int(held_out.sum()):,}",
        "images": f"{int(index.num_images.sum()):,}" + ("" if config.check_images else " (not decoded)"),
        "text-only records": f"{int((index.num_images == 0).sum()):,}",
        "tokens": f"{int(index.lengths.sum()):,}",
        "supervised": f"{int(index.num_supervised.sum()):,}",
    }


def _charts(config: DataCheckConfig, index: SampleIndex, found: Diagnosis) -> list[Any]:
    charts = []
    if config.model_name_or_path is not None:
        charts += [
            histogram(index.lengths, "Length of samples, image tokens included", "tokens", config.max_length),
            histogram(index.num_supervised, "Supervised tokens per sample", "tokens"),
        ]
    sizes = found.image_sizes[found.image_sizes[:, 0] > 0]
    if len(sizes):
        charts += [
            histogram(sizes.min(axis=1), "Shorter side of images", "pixels"),
            histogram(sizes.max(axis=1), "Longer side of images", "pixels"),
        ]
    return charts


def _write_quarantine(path: Path, errors: list[Finding]) -> None:
    lines = [{"source": one.source, "contents": one.contents, **asdict(one.fault)} for one in errors]
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines), _OWN_QUARANTINE)
