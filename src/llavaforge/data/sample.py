"""A record's token ids and labels, built together.

Comes in: a `Record`. Goes out: a `Sample`: ids with one `<image>` placeholder per image (its image tokens are written
out when the pack is made) and the spans of ids that the loss sees. Called by `data/index.py`.

    ids               [151644, 872, 198, 151646, 198, 3838, 30, 151645, ..., 32, 2518, 9334, 13, 151645, 198]
    supervised_spans  [25, 30]       # "A red square.<|im_end|>": the answer and its end token, nothing else
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llavaforge.data.records import Record, RecordError
from llavaforge.data.template import ChatTemplate, Piece

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Sample:
    """Token ids and what of them is supervised.

    Attributes:
        ids: token ids, one placeholder per image.
        supervised_spans: flat [start, end, start, end, ...] over `ids`.
        length: number of tokens once the image tokens are written out.
        num_turns_dropped: turns left out to fit `max_length`.
        num_tokens_cut: text tokens cut from the last answer to fit `max_length`.
    """

    ids: list[int]
    supervised_spans: list[int]
    length: int
    num_turns_dropped: int = 0
    num_tokens_cut: int = 0

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(self.supervised_spans[1::2]) - sum(self.supervised_spans[::2])

    def labels(self) -> list[int]:
        """Return ids where supervised, `IGNORE_INDEX` elsewhere; aligned with `ids` (the model shifts)."""
        labels = [IGNORE_INDEX] * len(self.ids)
        for start, end in zip(self.supervised_spans[::2], self.supervised_spans[1::2], strict=True):
            labels[start:end] = self.ids[start:end]
        return labels


@dataclass(frozen=True)
class SampleBuilder:
    """Builds samples for one model and one set of options.

    Attributes:
        tokenizer: the model's fast tokenizer.
        chat: its template.
        image_token_id: id of `<image>`.
        num_image_tokens: tokens that one image takes in the language model.
        max_length: longest sample, image tokens included.
    """

    tokenizer: Any
    chat: ChatTemplate
    image_token_id: int
    num_image_tokens: int
    max_length: int

    def build(self, record: Record) -> Sample:
        """Build one sample.

        Raises:
            RecordError: labels cannot be proved, the placeholder is lost, or nothing supervised fits `max_length`.
        """
        turns = record.turns
        pieces = self.chat.pieces(turns, record.where)
        sample = self._encode(pieces, record)
        while sample.length > self.max_length and sum(turn.role == "assistant" for turn in turns) > 1:
            turns = turns[:-2]
            sample = self._encode(self.chat.pieces(turns, record.where), record)
        if sample.length > self.max_length:
            sample = self._cut(sample, record)
        dropped = len(record.turns) - len(turns)
        return Sample(sample.ids, sample.supervised_spans, sample.length, dropped, sample.num_tokens_cut)

    def _encode(self, pieces: Sequence[Piece], record: Record) -> Sample:
        text = "".join(piece.text for piece in pieces)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoding.input_ids
        spans = _token_spans(text, encoding.offset_mapping, _character_spans(pieces), record.where)
        num_images = ids.count(self.image_token_id)
        if num_images != (record.image is not None):
            raise RecordError(
                f"{record.where}: {num_images} image tokens after tokenising, not {int(record.image is not None)}. "
                "The chat template or tokenizer does not keep `<image>`: write the model with customize-model."
            )
        sample = Sample(ids, spans, len(ids) + num_images * (self.num_image_tokens - 1))
        if not sample.num_supervised:
            raise RecordError(f"{record.where}: no supervised tokens, so there is nothing to learn from this record.")
        return sample

    def _cut(self, sample: Sample, record: Record) -> Sample:
        """Cut text from the end of the only answer; image tokens and the question stay whole."""
        excess = sample.length - self.max_length
        kept = len(sample.ids) - excess
        start = sample.supervised_spans[0]
        if kept <= start or self.image_token_id in sample.ids[kept:]:
            raise RecordError(
                f"{record.where}: {sample.length} tokens, and without its answer still over max_length "
                f"{self.max_length}. Raise max_length or remove the record."
            )
        end = min(sample.supervised_spans[1], kept)
        return Sample(sample.ids[:kept], [start, end], self.max_length, num_tokens_cut=excess)


def _character_spans(pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    position = 0
    for piece in pieces:
        if piece.supervised:
            yield position, position + len(piece.text)
        position += len(piece.text)


def _token_spans(
    text: str, offsets: Sequence[tuple[int, int]], spans: Iterator[tuple[int, int]], where: str
) -> list[int]:
    """Turn character spans into token spans, and prove that no token has one foot in each."""
    flat: list[int] = []
    token = 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(offsets) and offsets[token][0] < end:
            token += 1
        # A token may begin with the white space before the answer ("▁red"); any other text of the prompt may not be
        # in it.
        early = text[offsets[first][0] : start] if first < token else ""
        late = text[end : offsets[token - 1][1]] if first < token else ""
        if early.strip() or late.strip():
            raise RecordError(
                f"{where}: a token spans the border between prompt and answer ({early + late!r}), so labels cannot be "
                "exact. Give a chat template that ends the prompt with white space or a special token "
                "(customize-model --chat_template)."
            )
        flat += [first, token]
    return flat
