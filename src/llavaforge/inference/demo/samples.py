"""The held-out samples that can be chosen on the page.

Comes in: a data set. Goes out: images with a question and its answer, undecoded.
"""

from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from llavaforge.config.schema import DataEntry, DemoConfig, has_images_beside
from llavaforge.data.faults import RecordError
from llavaforge.data.index.prepare import records_of
from llavaforge.data.pixels.decode import ImageError, decode
from llavaforge.data.rows.records import Record
from llavaforge.data.rows.sources import Source, find_source
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER
from llavaforge.errors import UserError
from llavaforge.files import cache_dir

_MOST_RECORDS = 1000  # looked at


@dataclass(frozen=True)
class HeldOut:
    """A sample to choose on the page: the bytes of its image file, a question about it, and the right answer."""

    image: bytes
    question: str
    answer: str


def held_out(config: DemoConfig) -> list[HeldOut]:
    """Return the first sound samples with one image, each image once.

    Raises:
        UserError: there are none, or no such data.
    """
    assert config.eval_data_path is not None
    images = None if has_images_beside(config.eval_data_path) else config.image_folder
    source = find_source(DataEntry(path=config.eval_data_path, images=images), cache_dir())
    found: dict[bytes, HeldOut] = {}
    for record in islice(records_of(source), _MOST_RECORDS):
        if len(found) == config.num_samples:
            break
        if len(record.images) == 1:
            with suppress(RecordError, ImageError):  # `data check` lists them
                sample = _sample(source, record)
                found.setdefault(sample.image, sample)
    if not found:
        raise UserError(
            f"{config.eval_data_path}: none of its first {_MOST_RECORDS} records is sound and has one image. "
            "`llavaforge data check` says what is wrong; leave --eval_data_path out for a page without samples."
        )
    return list(found.values())


def _sample(source: Source, record: Record) -> HeldOut:
    image = source.images.read(record.images[0])
    decode(image, record.images[0].name)
    first = next(number for number, turn in enumerate(record.turns) if turn.role == "user")
    question = record.turns[first].text.replace(IMAGE_PLACEHOLDER, "").strip()
    return HeldOut(image, question or "Describe the image.", record.turns[first + 1].text)
