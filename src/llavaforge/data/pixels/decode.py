"""From the bytes of an image file to an upright RGB image.

Comes in: what `data/storage/image_store.py` read. Goes out: an image for `data/pixels/preprocessing.py`, or an
`ImageError` that says what is wrong with the file.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from llavaforge.errors import UserError

# The raster formats of image-text data. Anything else that Pillow could open (PDF, EPS, ...) is attack surface.
# A phone's JPEG of several frames is opened as JPEG and calls itself "MPO".
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_IMAGE_PIXELS = 178_956_970  # Pillow's own bound for a decompression bomb
# The shortest edge is resized to the tower's size, so 1x5000 pixels would become 336x1,680,000: 2 GB for a stripe.
MAX_ASPECT_RATIO = 200

_REMEDY = "Replace the file, or remove its record from the data."
_ORIENTATION = 0x0112  # the EXIF tag
# What turns the image upright, by the tag's value; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow brings a PNG's samples to 8 bits (grey of 2 and 4 bits, colour of 16), but not its transparent colour.
_KEY_TO_8_BITS = {"L;2": lambda v: v * 85, "L;4": lambda v: v * 17, "RGB;16B": lambda v: tuple(c >> 8 for c in v)}
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")
# What stands in an image's place when a download went wrong. Matched in this order, in lower case.
_IMPOSTORS = {
    b"version https://git-lfs": "is a Git LFS pointer: `git lfs pull` fetches the file",
    b"<!doctype html": "is an HTML page",
    b"<html": "is an HTML page",
    b"<svg": "is an SVG drawing",
    b"<?xml": "is an XML file",
    b"%pdf": "is a PDF",
    b"%!ps": "is PostScript",
    b"{": "is JSON",
    b"[": "is JSON",
}


class ImageError(UserError):
    """An image file is at fault. `kind` tells the faults apart where they are counted."""

    kind: ClassVar[str]


class NotAnImage(ImageError):
    """The file is something else: an error page, text, an unsupported format, measurements without a range."""

    kind = "not_an_image"


class ImageTooLarge(ImageError):
    """The header promises more pixels than a worker should hold."""

    kind = "image_too_large"


class TruncatedImage(ImageError):
    """The file begins like an image, but is cut or corrupt."""

    kind = "truncated_image"


@dataclass(frozen=True)
class ImageFacts:
    """What a header says. `width` and `height` are those of the upright image."""

    format: str
    width: int
    height: int


def inspect(data: bytes, name: str = "image") -> ImageFacts:
    """Read an image file's header; no pixel is decoded, so cut data may go unnoticed.

    Raises:
        ImageError: as `decode` does, for what a header shows.
    """
    with _opened(data, name) as image:
        width, height = image.size
        if _orientation(image) >= 5 and image.format != "TIFF":  # Pillow turns the size of a TIFF when it opens it
            width, height = height, width
        return ImageFacts(str(image.format), width, height)


def decode(data: bytes, name: str) -> Image.Image:
    """Decode an image file to upright RGB.

    The EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits
    (a plain conversion would clip it to white), and the first frame of an animation is taken. Flipped bits go unnoticed
    where the format has no checksum, as in JPEG.

    Returns:
        An RGB image; its `info["name"]` is `name`, for the errors of later steps.

    Raises:
        NotAnImage: of no format in `FORMATS`, whatever its name, or without a defined way to RGB.
        ImageTooLarge: over `MAX_IMAGE_PIXELS` or `MAX_ASPECT_RATIO`; refused before it is decoded.
        TruncatedImage: cut or corrupt.
    """
    with _opened(data, name) as image:
        _scale_transparent_color(image)
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image, name)
        rgb = rgb if turn is None else rgb.transpose(turn)
        rgb.info["name"] = name
        return rgb


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[ImageFile]:
    """Open a file and check its header; whatever Pillow raises, then or later, becomes an `ImageError`."""
    try:
        # Pillow warns of corrupt metadata and from half of its bomb limit on; we either take an image or refuse it.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image, name)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data, name) from None
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{name}: {error} Scale it down, or remove its record from the data.") from None
    except Exception as error:
        # Corrupt files make Pillow's plug-ins raise anything: OSError, KeyError, struct.error, ZeroDivisionError, ...
        reason = str(error) or type(error).__name__
        raise TruncatedImage(f"{name}: cannot be decoded, cut or corrupt ({reason}). {_REMEDY}") from None


def _check_header(image: ImageFile, name: str) -> None:
    short, long = sorted(image.size)
    if short < 1:
        raise TruncatedImage(f"{name}: cannot be decoded ({image.width}x{image.height} pixels). {_REMEDY}")
    if short * long > MAX_IMAGE_PIXELS:
        raise ImageTooLarge(f"{name}: {image.width}x{image.height} pixels exceed {MAX_IMAGE_PIXELS}. Scale it down.")
    if long > MAX_ASPECT_RATIO * short:
        raise ImageTooLarge(
            f"{name}: of {image.width}x{image.height} pixels, one side is over {MAX_ASPECT_RATIO} times the other. "
            "Crop it, or remove its record from the data."
        )
    if image.mode in ("F", "LAB"):
        raise NotAnImage(
            f"{name}: cannot be decoded (pixels of mode {image.mode} have no defined range). Save it as 8-bit RGB."
        )


def _unidentified(data: bytes, name: str) -> ImageError:
    if data.startswith(_SIGNATURES) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP"):
        return TruncatedImage(f"{name}: cannot be decoded, cut or corrupt (no valid header). {_REMEDY}")
    return NotAnImage(
        f"{name}: cannot be decoded (it {_what_it_is(data)}; allowed are {', '.join(FORMATS)}, whatever the name). "
        f"{_REMEDY}"
    )


def _what_it_is(data: bytes) -> str:
    if not data:
        return "is empty"
    if data[4:8] == b"ftyp":
        return "is a HEIC, AVIF or video file"
    head = data[:1000].lstrip().lower()
    for beginning, what in _IMPOSTORS.items():
        if head.startswith(beginning):
            return what
    is_text = all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)
    return "is text" if is_text else "is of an unknown format"


def _orientation(image: ImageFile) -> int:
    try:
        # Not PNG's own `getexif`, which decodes the pixels first.
        value = Image.Image.getexif(image).get(_ORIENTATION)
    except Exception:  # corrupt EXIF raises anything, and the pixels are good without it
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _scale_transparent_color(image: ImageFile) -> None:
    key = image.info.get("transparency")
    if image.format == "PNG" and key is not None and image.tile:
        to_8_bits = _KEY_TO_8_BITS.get(str(image.tile[0].args))
        image.info["transparency"] = to_8_bits(key) if to_8_bits else key


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # `convert` would copy it
    if image.mode.startswith("I"):
        return _wide_grey_to_rgb(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _wide_grey_to_rgb(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise NotAnImage(
            f"{name}: cannot be decoded (grey values from {low} to {high}; 0 to 65535 are allowed). "
            "Save it as 8-bit grey."
        )
    grey = (values >> 8).astype(np.uint8)  # the high byte, as Pillow does for 16-bit colour
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")
