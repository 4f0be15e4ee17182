"""What `llavaforge data preview` shows, before it becomes a page or terminal text: samples as cards, packs as bars.

Comes in: micro-batches of a plan, and the index. Goes out: a `Preview`.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from llavaforge.data.faults import Fault
from llavaforge.data.index.index import Row, SampleIndex
from llavaforge.data.load.loader import BadImage, PackDataset
from llavaforge.data.order.plan import MicroBatch
from llavaforge.data.pixels.decode import inspect
from llavaforge.data_preview.tokens import Reader, TokenGroup
from llavaforge.report.page import count


@dataclass(frozen=True)
class Picture:
    """An image as the model sees it, or why it cannot be seen.

    Attributes:
        name: of the file.
        url: a PNG as a data URL; None when the image is faulty.
        caption: its size now and before; or what is wrong with it.
    """

    name: str
    url: str | None
    caption: str


class StepPosition(NamedTuple):
    """Where in the run a sample is seen, counted from 1."""

    step: int
    micro_batch: int


@dataclass(frozen=True)
class Card:
    """One sample.

    Attributes:
        number: of the card, from 1.
        position: the micro-batch that it is part of.
        id: the record's own id, or an empty text.
        where: its file and row.
        data_set: what the user calls its data set.
        length: tokens, image tokens included.
        num_supervised: supervised tokens.
        pictures: its images.
        groups: its tokens.
        shortened: what was left out to fit `max_length`, or an empty text.
    """

    number: int
    position: StepPosition
    id: str
    where: str
    data_set: str
    length: int
    num_supervised: int
    pictures: list[Picture]
    groups: list[TokenGroup]
    shortened: str


class Segment(NamedTuple):
    """A sample's part of a bar; the three kinds of tokens add up to its length.

    `card` is the number of its card, or None when it has none.
    """

    card: int | None
    image: int
    prompt: int
    supervised: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.image + self.prompt + self.supervised


@dataclass(frozen=True)
class Bar:
    """One micro-batch."""

    position: StepPosition
    segments: list[Segment]

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return sum(segment.length for segment in self.segments)

    @property
    def has_card(self) -> bool:
        """Whether one of its samples has a card."""
        return any(segment.card for segment in self.segments)

    def total(self, kind: str) -> int:
        """Return the number of tokens of a kind: `image`, `prompt` or `supervised`."""
        return sum(getattr(segment, kind) for segment in self.segments)


@dataclass(frozen=True)
class Preview:
    """All that is shown.

    Attributes:
        facts: about the data, the model and the options, by name.
        data_sets: name, records, samples per epoch and supervised tokens in them, per data set.
        faults: of the records that cannot be trained on.
        cards: the first samples.
        bars: the micro-batches of the steps that these samples are part of.
        num_more_bars: how many of them are left out, having no card.
        most_tokens: tokens that a bar of full width stands for.
    """

    facts: dict[str, str]
    data_sets: list[tuple[str, int, int, int]]
    faults: list[Fault]
    cards: list[Card]
    bars: list[Bar]
    num_more_bars: int
    most_tokens: int


class CardMaker:
    """Reads samples of an index as cards.

    Args:
        dataset: reads pixels the way that training does.
        tokenizer: the model's.
    """

    def __init__(self, dataset: PackDataset, tokenizer: Any) -> None:
        self._dataset = dataset
        self._reader = Reader(tokenizer, dataset.image_token_id, dataset.num_image_tokens)

    def __call__(self, number: int, sample: int, position: StepPosition) -> Card:
        """Return the card of one sample.

        Args:
            number: of the card, from 1.
            sample: number of the sample in the index.
            position: its micro-batch.
        """
        index = self._dataset.index
        row = index.row(sample)
        return Card(
            number=number,
            position=position,
            id=row.id,
            where=row._replace(id="").where,
            data_set=index.data_sets[row.data_set].source.name,
            length=row.length,
            num_supervised=int(index.num_supervised[sample]),
            pictures=[self._picture(row, image) for image in range(len(row.images))],
            groups=self._reader.groups(row.ids.tolist(), row.supervised_spans.tolist()),
            shortened=_shortened(index, sample),
        )

    def _picture(self, row: Row, number: int) -> Picture:
        image = row.images[number]
        name = image.name if not image.name.startswith("data:") else "inline image"
        try:
            (pixels_CHW,) = self._dataset.pixels(row._replace(images=(image,)))
        except BadImage as error:
            return Picture(name, None, error.fault.message)
        facts = inspect(*self._dataset.index.read_image(row, number))
        height, width = pixels_CHW.shape[1:]
        caption = f"{width} x {height} pixels, from {facts.width:,} x {facts.height:,} ({facts.format})"
        return Picture(name, _png_url(pixels_CHW), caption)


def bars_of(
    micro_batches: Sequence[MicroBatch], index: SampleIndex, num_image_tokens: int, cards: Mapping[int, int]
) -> list[Bar]:
    """Return micro-batches as bars.

    Args:
        micro_batches: successive, the first one begins a step.
        index: their samples.
        num_image_tokens: tokens per image.
        cards: from samples to the numbers of their cards; others have none.
    """

    def segment(sample: int) -> Segment:
        image = int(index.num_images[sample]) * num_image_tokens
        supervised = int(index.num_supervised[sample])
        return Segment(cards.get(sample), image, int(index.lengths[sample]) - image - supervised, supervised)

    return [
        Bar(position, [segment(sample) for sample in micro_batch.samples])
        for micro_batch, position in zip(micro_batches, positions_of(micro_batches), strict=True)
    ]


def positions_of(micro_batches: Sequence[MicroBatch]) -> list[StepPosition]:
    """Return where in the run each of some successive micro-batches is; the first one begins a step."""
    found: list[StepPosition] = []
    for micro_batch in micro_batches:
        step = micro_batch.step + 1
        found.append(StepPosition(step, found[-1].micro_batch + 1 if found and found[-1].step == step else 1))
    return found


def _shortened(index: SampleIndex, sample: int) -> str:
    turns, tokens = (int(index.column(name)[sample]) for name in ("num_turns_dropped", "num_tokens_cut"))
    cuts = [f"{count(turns)} turns dropped"] * bool(turns) + [f"{count(tokens)} tokens cut"] * bool(tokens)
    return " and ".join(cuts) + " to fit max_length" if cuts else ""


def _png_url(pixels_CHW: npt.NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels_CHW.transpose(1, 2, 0)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
