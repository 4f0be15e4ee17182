"""Where one image is: what a record names and an index keeps."""

from typing import NamedTuple

IMAGE_KEYS = ("images", "image", "jpg", "jpeg", "png", "webp")
"""Names of the fields that may hold a row's images."""


_LONGEST = 80


def short(text: str, longest: int = _LONGEST) -> str:
    """Return a text of a row for a message: an image can be there as base64, megabytes of it."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"


class ImageRef(NamedTuple):
    """Where an image is.

    Attributes:
        name: file name below the image root, or how messages call it.
        container: number of the container (`data/storage/image_store.py`), or -1 when only the name is known.
        offset: first byte in a zip or tar; number of the row in Parquet and Arrow.
        size: bytes in a zip or tar; number of the image within the row in Parquet and Arrow.
        crc: CRC-32 that a zip gives for the contents, or -1.
    """

    name: str
    container: int = -1
    offset: int = 0
    size: int = 0
    crc: int = -1
