"""Multiple choice by likelihood: which of the offered answers the model finds likeliest.

Comes in: records whose questions offer lettered options, and their packs. Goes out: a letter for each.

    What is it?
    A. a dog
    B. a cat
    Answer with the option's letter from the given choices directly.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from llavaforge.data.index.index import Row
from llavaforge.data.load.pack import Pack, make_pack
from llavaforge.data.rows.records import Record
from llavaforge.data.rows.turns import Turn
from llavaforge.data.text.sample import SampleBuilder
from llavaforge.model.step import StepModule

_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*)$", re.MULTILINE)
_LETTER = re.compile(r"\W*([A-Z])(?=\s*$|[.):,\n])")
_UNBOUNDED = 1 << 31  # tokens: an option is never cut, however near to `max_length` the reference is


def options_of(record: Record) -> dict[str, str]:
    """Return the options that a record's last question offers, by letter; empty where it offers fewer than two.

    They are lines of their own that begin with `A.`, `(A)`, `A)` or `A:`, in the alphabet's order.
    """
    found: dict[str, str] = {}
    for letter, text in _OPTION.findall(record.turns[-2].text):
        if letter == chr(ord("A") + len(found)):
            found[letter] = text.strip()
    return found if len(found) > 1 else {}


def right_choice(record: Record) -> str:
    """Return the letter of the option that is a record's answer, by its text or by its letter; empty where none is."""
    options, answer = options_of(record), record.turns[-1].text
    by_text = [letter for letter, text in options.items() if text.casefold() == answer.strip().casefold()]
    own = _LETTER.match(answer)
    return by_text[0] if by_text else own[1] if own is not None and own[1] in options else ""


def candidates(record: Record) -> dict[str, Record]:
    """Return the record with each option as its answer, by letter; in the form of its own: `B`, `(B)`, `B. a cat`."""
    options, answer, right = options_of(record), record.turns[-1].text, right_choice(record)
    own = _LETTER.match(answer)
    if own is None or own[1] != right or options[right].casefold() == answer.strip().casefold():
        texts = options  # the reference is an option's text
    else:
        before, after = answer[: own.start(1)], answer[own.end(1) :]
        texts = {letter: before + letter + after.replace(options[right], text) for letter, text in options.items()}
    return {
        letter: replace(record, turns=(*record.turns[:-1], Turn("assistant", text))) for letter, text in texts.items()
    }


class Chooser:
    """Chooses the likeliest option: the one whose tokens have the largest summed log-probability.

    Args:
        step_module: the model.
        builder: makes samples of records.
        image_token_id: id of `<image>`.
    """

    def __init__(self, step_module: StepModule, builder: SampleBuilder, image_token_id: int) -> None:
        self._step_module, self._image_token_id = step_module, image_token_id
        self._builder = replace(builder, max_length=_UNBOUNDED)

    def __call__(self, records: Sequence[Record], pack: Pack) -> list[str]:
        """Return a letter for each record of a pack; an empty text where nothing is offered.

        All records with an option of a letter are one pack, so no pack is much larger than the one that came in.
        """
        offered = [candidates(record) if options_of(record) else {} for record in records]
        ends = np.cumsum([len(record.images) for record in records])
        likelihoods: list[dict[str, float]] = [{} for _ in records]
        for letter in sorted(set().union(*offered)):
            numbers = [number for number, mine in enumerate(offered) if letter in mine]
            images = [
                pack.pixels_ICHW[image].cpu().numpy()
                for number in numbers
                for image in range(ends[number] - len(records[number].images), ends[number])
            ]
            found = self._log_likelihoods([offered[number][letter] for number in numbers], images, pack.ids_T.device)
            for number, value in zip(numbers, found, strict=True):
                likelihoods[number][letter] = value
        return [max(mine, key=lambda letter: mine[letter]) if mine else "" for mine in likelihoods]

    def _log_likelihoods(
        self, records: Sequence[Record], images: Sequence[np.ndarray], device: torch.device
    ) -> list[float]:
        rows = []
        for record in records:
            sample = self._builder.build(record)
            # The last answer alone: what was said before is the same for all options.
            spans = np.array(sample.supervised_spans[-2:], dtype=np.int32)
            ids = np.array(sample.ids, dtype=np.int32)
            rows.append(Row(0, "", 0, record.id, record.images, ids, spans, sample.length))
        pack = make_pack(rows, images, self._image_token_id, self._builder.num_image_tokens).to(device)
        return [-loss * count for loss, count in sample_losses(self._step_module, pack)]


@torch.no_grad()
def sample_losses(step_module: StepModule, pack: Pack) -> list[tuple[float, int]]:
    """Return mean loss and number of supervised tokens of each sample of a pack."""
    losses = step_module.token_losses(pack)
    sample_of = torch.searchsorted(pack.cu_seqlens_N1, pack.predictors_S.to(torch.int32), right=True) - 1
    count = torch.bincount(sample_of, minlength=len(pack.lengths))
    total = torch.zeros(len(pack.lengths), device=losses.device).index_add_(0, sample_of, losses)
    return list(zip((total / count).tolist(), count.tolist(), strict=True))
