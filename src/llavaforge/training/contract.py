"""The trainability contract: what learns is shown before step 1, and proved after the second step that moves.

(Two steps: LoRA's A has no gradient before B has moved.) Every part that should learn must have moved in its float32
masters; no frozen tensor may have changed. The commonest silent faults of LLaVA training end here: a projector that
stays random, a "frozen" tower that trains, rates that are ignored.
"""

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from llavaforge.data.text.sample import Sample
from llavaforge.engine.base import Engine
from llavaforge.errors import UserError
from llavaforge.model.trainable import Group
from llavaforge.report.glyphs import visible
from llavaforge.training.opening import OpenedStage
from llavaforge.training.state import TrainState

logger = logging.getLogger(__name__)

_STEPS_BEFORE_PROOF = 2


class ContractError(RuntimeError):
    """What is frozen changed: the run is stopped."""


class Contract:
    """Remembers the state before training and compares.

    Args:
        model: the stock Llava after `select`.
        groups: what learns.
        engine: prepared. Each process compares what it holds; all build and prove together.
        num_moving_steps: steps with a learning rate above zero that a resumed run has done.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], engine: Engine, num_moving_steps: int = 0) -> None:
        self._engine = engine
        self._due = num_moving_steps + _STEPS_BEFORE_PROOF
        self._is_proved = False
        self._part = {name: group.part for group in groups for name in group.parameters}
        self._frozen = {n: p for n, p in model.named_parameters() if n not in self._part}
        self._frozen_before = self._frozen_sums()
        self._masters_before = self._master_sums()

    def prove_when_due(self, state: TrainState) -> None:
        """Prove the contract after the step that is the second to move; nothing before and after it."""
        if not self._is_proved and state.num_moving_steps == self._due:
            self.prove()
            self._is_proved = True
            logger.info("contract proved after step %d: what should learn moved, what is frozen did not", state.step)

    def warn_unless_proved(self) -> None:
        """Say at the end of a run that was too short to prove it."""
        if not self._is_proved:
            logger.warning("contract not proved: that takes %d steps with a learning rate above 0", _STEPS_BEFORE_PROOF)

    def prove(self) -> None:
        """Compare with the state at construction.

        Raises:
            ContractError: names a frozen tensor that changed.
            UserError: names the parts that did not move.
        """
        frozen, masters = self._frozen_sums(), self._master_sums()
        changed = [name for name, before in self._frozen_before.items() if frozen[name] != before]
        moved = sorted({self._part[name] for name, before in self._masters_before.items() if masters[name] != before})
        world = self._engine.world
        everywhere = world.all_gather_objects((changed, moved))
        changed = sorted({name for names, _ in everywhere for name in names})
        if changed:
            world.fail(ContractError(f"{len(changed)} frozen tensors changed, for example {changed[0]}."))
        still = sorted(set(self._part.values()) - {part for _, parts in everywhere for part in parts})
        if still:
            world.fail(
                UserError(
                    f"{', '.join(still)} should learn but did not move in {_STEPS_BEFORE_PROOF} steps. Its learning "
                    "rate is 0, or no sample reached it (few records with images): check learning_rate and the data."
                )
            )

    def _frozen_sums(self) -> dict[str, int]:
        return {name: checksum(self._engine.local(parameter)) for name, parameter in self._frozen.items()}

    def _master_sums(self) -> dict[str, int]:
        return {name: checksum(share) for name, share in self._engine.local_masters()}


def checksum(tensor: torch.Tensor) -> int:
    """Return the sum of a tensor's bit patterns; any change of one element changes it."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(words).sum(dtype=torch.int64))


def show_contract(opened: OpenedStage, console: Console) -> None:
    """Print what learns, and one sample as the model sees it."""
    model, row = opened.loaded.model, opened.data.index.row(int(opened.plan.global_batch(0)[0]))
    show_groups(opened.groups, sum(parameter.numel() for parameter in model.parameters()), console)
    sample = Sample(row.ids.tolist(), row.supervised_spans.tolist(), row.length)
    show_sample(sample, opened.loaded.processor.tokenizer.decode, console)


def show_groups(groups: Sequence[Group], num_total: int, console: Console) -> None:
    """Print the table of what learns."""
    table = Table(title="What learns", title_justify="left")
    for heading in ("part", "parameters", "peak learning rate"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in dict.fromkeys(group.part for group in groups):
        mine = [group for group in groups if group.part == part]
        number = sum(group.num_parameters for group in mine)
        table.add_row(part, f"{number:,}", f"{mine[0].learning_rate:g}")
    learning = sum(group.num_parameters for group in groups)
    table.add_section()
    table.add_row("all that learns", f"{learning:,}", f"{learning / num_total:.2%} of {num_total:,}")
    console.print(table)


def show_sample(sample: Sample, decode: Callable[[list[int]], str], console: Console) -> None:
    """Print one sample as the model sees it, the supervised text in green and, outside a terminal, in [[ ]]."""
    text, mark = Text(), "{}" if console.is_terminal else "[[{}]]"
    for supervised, ids in _runs(sample):
        shown = visible(decode(ids))
        text.append(mark.format(shown) if supervised else shown, "black on green" if supervised else "")
    how = "marked" if console.is_terminal else "in [[ ]]"
    console.print(
        Text(f"One sample ({sample.length} tokens, {sample.num_supervised} supervised, {how}):", style="bold")
    )
    console.print(text)


def _runs(sample: Sample) -> Iterable[tuple[bool, list[int]]]:
    start = 0
    borders = sample.supervised_spans
    for first, last in zip(borders[::2], borders[1::2], strict=True):
        yield False, sample.ids[start:first]
        yield True, sample.ids[first:last]
        start = last
    yield False, sample.ids[start:]
