"""Multiple choice by likelihood: which of the offered answers the model finds likeliest.

Comes in: records whose questions offer lettered options, and what the model has seen of them. Goes out: a letter each.

    What is it?
    A. a dog
    B. a cat
    Answer with the option's letter from the given choices directly.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from llavaforge.answers.prefill import Prefill, expanded
from llavaforge.data.rows.records import Record
from llavaforge.data.rows.turns import Turn
from llavaforge.data.text.sample import Sample, SampleBuilder
from llavaforge.model.attention import stock_attention

_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*)$", re.MULTILINE)
_LETTER = re.compile(r"\W*([A-Z])(?=\s*$|[.):,\n])")
_AT_ONCE = 4  # samples, whose keys and values are copied
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
        model: a stock Llava.
        builder: makes samples of records.
    """

    def __init__(self, model: Any, builder: SampleBuilder) -> None:
        self._model, self._builder = model, replace(builder, max_length=_UNBOUNDED)

    def __call__(self, records: Sequence[Record], prefill: Prefill) -> list[str]:
        """Return a letter for each record of a pack that the model has seen; an empty text where nothing is offered."""
        offered = [candidates(record) if options_of(record) else {} for record in records]
        likelihoods: list[dict[str, float]] = [{} for _ in records]
        for letter in sorted(set().union(*offered)):
            asked = [(number, mine[letter]) for number, mine in enumerate(offered) if letter in mine]
            for begin in range(0, len(asked), _AT_ONCE):
                some = dict(asked[begin : begin + _AT_ONCE])
                for number, value in zip(some, self._log_likelihoods(some, prefill), strict=True):
                    likelihoods[number][letter] = value
        return [max(mine, key=lambda letter: mine[letter]) if mine else "" for mine in likelihoods]

    @torch.no_grad()
    def _log_likelihoods(self, asked: dict[int, Record], prefill: Prefill) -> list[float]:
        """Return the log-probability of each record's last answer; what was said before is the same for all options."""
        samples = [self._expanded(self._builder.build(record)) for record in asked.values()]
        numbers = list(asked)
        num_kept = [
            min(prefill.num_common(number, ids), start - 1)
            for number, (ids, start, _) in zip(numbers, samples, strict=True)
        ]
        rest = [ids[kept:] for kept, (ids, _, _) in zip(num_kept, samples, strict=True)]
        longest, device = max(map(len, rest)), self._model.device
        ids_NR = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rest], device=device)
        kept_N1 = torch.tensor(num_kept, device=device)[:, None]
        most = max(num_kept)
        mask = torch.arange(most, device=device) >= most - kept_N1  # what fills up on the right comes after all
        with stock_attention(self._model):
            hidden_NRD = self._model.model(
                input_ids=ids_NR,
                attention_mask=torch.cat([mask, torch.ones_like(ids_NR, dtype=torch.bool)], dim=1).long(),
                position_ids=kept_N1 + torch.arange(longest, device=device),
                past_key_values=prefill.cache(numbers, num_kept),
                **prefill.images(numbers, num_kept),
            ).last_hidden_state
        found = []
        for hidden_RD, ids_R, kept, (_, start, end) in zip(hidden_NRD, ids_NR, num_kept, samples, strict=True):
            logits = self._model.lm_head(hidden_RD[start - 1 - kept : end - 1 - kept]).float()
            found.append(-float(cross_entropy(logits, ids_R[start - kept : end - kept], reduction="sum")))
        return found

    def _expanded(self, sample: Sample) -> tuple[list[int], int, int]:
        """Return a sample's ids with every image token written out, and where its last answer begins and ends."""
        repeats, (begin, end) = self._builder.num_image_tokens, sample.supervised_spans[-2:]
        more = sample.num_images * (repeats - 1)  # all images come before the last answer
        return expanded(sample.ids, self._builder.image_token_id, repeats), begin + more, end + more
