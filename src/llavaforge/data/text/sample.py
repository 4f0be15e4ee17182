"""A record's token ids and labels, built together.

Comes in: a `Record`. Goes out: a `Sample`: ids with one `<image>` placeholder per image (its image tokens are written
out when the pack is made) and the spans of ids that the loss sees.

    ids               [151644, 872, 198, 151646, 198, 3838, 30, 151645, ..., 32, 2518, 9334, 13, 151645, 198]
    supervised_spans  [25, 30]       # "A red square.<|im_end|>": the answer and its end token, nothing else
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from llavaforge.data.faults import RecordError
from llavaforge.data.rows.records import Record
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER, Turn
from llavaforge.data.text.template import ChatTemplate, TextSpan

IGNORE_INDEX = -100
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Token ids and what of them is supervised.

    Attributes:
        ids: token ids, one placeholder per image.
        supervised_spans: flat [start, end, start, end, ...] over `ids`.
        length: number of tokens once the image tokens are written out.
        num_turns_dropped: turns left out to fit `max_length`.
        num_tokens_cut: text tokens cut from the last answer to fit `max_length`.
        num_images: placeholders among the ids.
        num_special_tokens: special tokens of the model in its texts (`special_tokens_in_text`).
    """

    ids: list[int]
    supervised_spans: list[int]
    length: int
    num_turns_dropped: int = 0
    num_tokens_cut: int = 0
    num_images: int = 0
    num_special_tokens: int = 0

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
            RecordError: labels cannot be proved, a placeholder is lost, or nothing supervised fits `max_length`.
        """
        (sample,) = self.build_all([record])
        if isinstance(sample, RecordError):
            raise sample
        return sample

    def build_all(self, records: Sequence[Record]) -> list[Sample | RecordError]:
        """Build many samples, tokenised as one batch (quicker than one by one); a fault takes its sample's place."""
        spans = [_result_or_error(self.chat.spans, record.turns) for record in records]
        texts = ["" if isinstance(found, RecordError) else _text(found) for found in spans]
        encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        return [
            found if isinstance(found, RecordError) else _result_or_error(self._fitted, record, found, text, encoding)
            for record, found, text, encoding in zip(records, spans, texts, encodings, strict=True)
        ]

    def identity(self) -> dict[str, Any]:
        """Return everything that the ids depend on, besides the record."""
        return {
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "template": self.chat.template,
            "style": self.chat.style,
            "system_prompt": self.chat.system_prompt,
            "eos_token": self.tokenizer.eos_token,
            "image": [self.image_token_id, self.num_image_tokens],
            "max_length": self.max_length,
            **({"special_tokens_in_text": "keep"} if self.chat.keeps_special_tokens else {}),
            **({"spaces_before_answers": "supervised"} if self.chat.begins_answers_with_spaces else {}),
        }

    def _fitted(self, record: Record, spans: list[TextSpan], text: str, encoding: Any) -> Sample:
        """Return a record's sample without the last exchanges that do not fit; its only answer may be cut."""
        sample, num_turns = self._sample(spans, text, encoding, len(record.images)), len(record.turns)
        least = 2 + (record.turns[0].role == "system")
        if sample.length > self.max_length and num_turns > least:
            # Rendered once for each exchange that is dropped, a conversation of 800 turns took 41 s.
            num_turns = min(self._estimated_turns(record, spans, encoding) + 2, num_turns - 2)
            while (sample := self._of_turns(record, num_turns)).length > self.max_length and num_turns > least:
                num_turns -= 2
        if sample.length > self.max_length:
            sample = self._cut(sample)
        return replace(
            sample,
            num_turns_dropped=len(record.turns) - num_turns,
            num_special_tokens=self.chat.num_special_tokens(record.turns[:num_turns]),
        )

    def _of_turns(self, record: Record, num_turns: int) -> Sample:
        """Return the sample of a record's first turns."""
        turns = record.turns[:num_turns]
        spans = self.chat.spans(turns)
        text = _text(spans)
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return self._sample(spans, text, encoding, _num_placeholders(turns))

    def _estimated_turns(self, record: Record, spans: list[TextSpan], encoding: Any) -> int:
        """Return how many turns fit by the tokens of the whole conversation; the first exchange at least."""
        ends, token_ends = _character_spans(spans), [end for _, end in encoding.offsets]
        num_turns, num_images = 0, 0
        for number, turn in enumerate(record.turns, 1):
            if turn.role == "user":
                num_images += turn.text.count(IMAGE_PLACEHOLDER)
            elif turn.role == "assistant":
                num_tokens = bisect_left(token_ends, next(ends)[1]) + 1
                if num_turns and num_tokens + num_images * (self.num_image_tokens - 1) > self.max_length:
                    break
                num_turns = number
        return num_turns

    def _sample(self, spans: list[TextSpan], text: str, encoding: Any, num_images: int) -> Sample:
        ids: list[int] = encoding.ids
        supervised_spans = _token_spans(text, encoding.offsets, _character_spans(spans))
        if ids.count(self.image_token_id) != num_images:
            raise RecordError(
                "image_count",
                f"{ids.count(self.image_token_id)} image tokens after tokenising, not {num_images}. "
                "The chat template or tokenizer does not keep `<image>`: write the model with customize-model.",
            )
        length = len(ids) + num_images * (self.num_image_tokens - 1)
        sample = Sample(ids, supervised_spans, length, num_images=num_images)
        if not sample.num_supervised:
            raise RecordError(
                "no_supervised_tokens", "no supervised tokens, so there is nothing to learn from this record."
            )
        return sample

    def _cut(self, sample: Sample) -> Sample:
        """Cut text from the end of the only answer; image tokens and the question stay whole."""
        excess = sample.length - self.max_length
        kept = len(sample.ids) - excess
        start = sample.supervised_spans[0]
        if kept <= start or self.image_token_id in sample.ids[kept:]:
            raise RecordError(
                "too_long",
                f"{sample.length} tokens, and without its answer still over max_length "
                f"{self.max_length}. Raise max_length or remove the record.",
            )
        end = min(sample.supervised_spans[1], kept)
        return replace(
            sample, ids=sample.ids[:kept], supervised_spans=[start, end], length=self.max_length, num_tokens_cut=excess
        )


def _num_placeholders(turns: Sequence[Turn]) -> int:
    return sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")


def _result_or_error(act: Callable[..., T], *arguments: Any) -> T | RecordError:
    try:
        return act(*arguments)
    except RecordError as error:
        return error


def _text(spans: Sequence[TextSpan]) -> str:
    return "".join(span.text for span in spans)


def _character_spans(spans: Sequence[TextSpan]) -> Iterator[tuple[int, int]]:
    position = 0
    for span in spans:
        if span.supervised:
            yield position, position + len(span.text)
        position += len(span.text)


def _token_spans(text: str, offsets: Sequence[tuple[int, int]], spans: Iterator[tuple[int, int]]) -> list[int]:
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
                "unprovable_labels",
                f"a token spans the border between prompt and answer ({early + late!r}), so labels cannot be exact. "
                "Give a chat template that ends the prompt with white space or a special token "
                "(customize-model --chat_template).",
            )
        flat += [first, token]
    return flat
