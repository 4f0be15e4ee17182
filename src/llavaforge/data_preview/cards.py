"""What `llavaforge data preview` shows, before it becomes a page or terminal text: samples as cards, packs as bars.

Comes in: micro-batches of a plan, and the index. Goes out: a `Preview`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from llavaforge.data.faults import Fault
from llavaforge.data.index.index import Row, SampleIndex
from llavaforge.data.load.loader import BadImage, PackDataset
from llavaforge.data.order.plan import MicroBatch
from llavaforge.data.pixels.decode import inspect
from llavaforge.data_preview.tokens import Reader, TokenGroup
from llavaforge.report.page import count
from llavaforge.report.pictures import png_url


@dataclass(frozen=True)
class Picture:
    """An image as the model sees it, or why it cannot be seen."""

    name: str
    url: str | None  # a PNG as a data URL; None when the image is faulty
    caption: str  # its size now and before, or what is wrong with it


class StepPosition(NamedTuple):
    """Where in the run a sample is seen, counted from 1."""

    step: int
    micro_batch: int


@dataclass(frozen=True)
class Card:
    """One sample."""

    number: int  # from 1
    position: StepPosition
    id: str  # the record's own id, or an empty text
    where: str  # its file and row
    data_set: str  # what the user calls it
    length: int  # tokens, image tokens included
    num_supervised: int
    pictures: list[Picture]
    groups: list[TokenGroup]
    shortened: str  # what was left out to fit `max_length`, or an empty text


class Segment(NamedTuple):
    """A sample's part of a bar; the three kinds of tokens add up to its length."""

    card: int | None  # the number of its card, if it has one
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
    """All that is shown."""

    facts: dict[str, str]  # about the data, the model and the options, by name
    data_sets: list[tuple[str, int, int, int]]  # name, records, samples per epoch, supervised tokens in them
    faults: list[Fault]  # of the records that cannot be trained on
    cards: list[Card]  # the first samples
    bars: list[Bar]  # the micro-batches of the steps that these samples are part of
    num_more_bars: int  # how many of them are left out, having no card
    most_tokens: int  # tokens that a bar of full width stands for


def make_card(dataset: PackDataset, reader: Reader, number: int, sample: int, position: StepPosition) -> Card:
    """Return the card of a sample, by its number in the index; pixels are read the way that training does."""
    index = dataset.index
    row = index.row(sample)
    return Card(
        number=number,
        position=position,
        id=row.id,
        where=row._replace(id="").where,
        data_set=index.data_sets[row.data_set].source.name,
        length=row.length,
        num_supervised=int(index.num_supervised[sample]),
        pictures=[_picture(dataset, row, image) for image in range(len(row.images))],
        groups=reader.groups(row.ids.tolist(), row.supervised_spans.tolist()),
        shortened=_shortened(index, sample),
    )


def make_bar(
    micro_batch: MicroBatch,
    position: StepPosition,
    index: SampleIndex,
    num_image_tokens: int,
    cards: Mapping[int, int],
) -> Bar:
    """Return a micro-batch as a bar; `cards` leads from samples to the numbers of their cards."""
    segments = []
    for sample in micro_batch.samples:
        image = int(index.num_images[sample]) * num_image_tokens
        supervised = int(index.num_supervised[sample])
        prompt = int(index.lengths[sample]) - image - supervised
        segments.append(Segment(cards.get(sample), image, prompt, supervised))
    return Bar(position, segments)


def _picture(dataset: PackDataset, row: Row, number: int) -> Picture:
    image = row.images[number]
    name = image.name if not image.name.startswith("data:") else "inline image"
    try:
        (pixels_CHW,) = dataset.pixels(row._replace(images=(image,)))
    except BadImage as error:
        return Picture(name, None, error.fault.message)
    facts = inspect(*dataset.index.read_image(row, number))
    height, width = pixels_CHW.shape[1:]
    caption = f"{width} x {height} pixels, from {facts.width:,} x {facts.height:,} ({facts.format})"
    return Picture(name, png_url(pixels_CHW), caption)


def _shortened(index: SampleIndex, sample: int) -> str:
    turns, tokens = (int(index.column(name)[sample]) for name in ("num_turns_dropped", "num_tokens_cut"))
    cuts = [f"{count(turns)} turns dropped"] * bool(turns) + [f"{count(tokens)} tokens cut"] * bool(tokens)
    return " and ".join(cuts) + " to fit max_length" if cuts else ""
