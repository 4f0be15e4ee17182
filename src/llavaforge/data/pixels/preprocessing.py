"""From an RGB image to the tower's pixels: what an image processor does before it normalises.

Comes in: what `data/pixels/decode.py` decoded. Goes out: `uint8` pixels of the tower's size.
Normalisation to floats happens on the device (`model/tower.py`): a quarter of the bytes travel.

Legend: N images, C channels, H and W pixels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from llavaforge.data.pixels.decode import MAX_IMAGE_PIXELS, ImageTooLarge
from llavaforge.errors import UserError

_MOST_PIXELS = 8192  # of an edge: a hundredfold of the image tokens of the largest towers

Pixels = npt.NDArray[np.uint8]

# Filters that fade to zero at their ends: resizing a part of an image gives its pixels, in 2248 of 2248 trials. BOX and
# NEAREST round a neighbour in or out now and then.
_CONTINUOUS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Preprocessing:
    """What an image processor does before it normalises, as plain numbers.

    `pad_color` is None for no padding to a square; `resize` is (height, width), or one number for the shortest edge;
    `crop` is (height, width) of the centre crop or None. `mean` and `std` are per channel, for pixels scaled by
    `rescale`.
    """

    pad_color: tuple[int, ...] | None
    resize: tuple[int, int] | int
    crop: tuple[int, int] | None
    resample: int
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any) -> "Preprocessing":
        """Read the settings of a transformers image processor.

        Raises:
            UserError: a setting that we do not reproduce, or output sizes that vary from image to image.
        """
        if not (processor.do_resize and processor.do_rescale and processor.do_normalize):
            raise UserError(
                f"{type(processor).__name__}: do_resize, do_rescale and do_normalize must be on to train "
                "(preprocessor_config.json)."
            )
        size, crop = dict(processor.size), getattr(processor, "crop_size", None)
        resize = size["shortest_edge"] if size.get("shortest_edge") else (size.get("height"), size.get("width"))
        crops = bool(getattr(processor, "do_center_crop", False)) and crop is not None
        pads = bool(getattr(processor, "do_pad", False))
        if (isinstance(resize, tuple) and None in resize) or (isinstance(resize, int) and not crops and not pads):
            raise UserError(f"{type(processor).__name__}: size {size} does not give all images one size.")
        edges = [*(resize if isinstance(resize, tuple) else (resize,)), *(dict(crop or {}).values() if crops else ())]
        if not all(isinstance(edge, int) and 1 <= edge <= _MOST_PIXELS for edge in edges):
            raise UserError(
                f"{type(processor).__name__}: sizes {edges} are no numbers of pixels from 1 to {_MOST_PIXELS}."
            )
        return cls(
            pad_color=tuple(int(mean * 255) for mean in processor.image_mean) if pads else None,
            resize=resize,
            crop=(crop["height"], crop["width"]) if crops and crop is not None else None,
            resample=int(processor.resample),
            rescale=float(processor.rescale_factor),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
        )

    def __call__(self, image: Image.Image) -> Pixels:
        """Return `uint8` pixels (C, H, W) of an RGB image, equal to the processor's before it rescales.

        Raises:
            ImageTooLarge: padded to a square it would exceed `MAX_IMAGE_PIXELS`.
        """
        return np.ascontiguousarray(np.asarray(self.fit(image), dtype=np.uint8).transpose(2, 0, 1))

    def blank(self) -> Pixels:
        """Return mid-grey pixels of the tower's size."""
        size = self.crop or self.resize
        height, width = size if isinstance(size, tuple) else (size, size)
        return np.full((3, height, width), 127, dtype=np.uint8)

    def fit(self, image: Image.Image) -> Image.Image:
        """Pad, resize and crop an image as `__call__` does, without turning it into an array."""
        if self.pad_color is not None:
            image = _pad_to_square(image, self.pad_color)
        size, resample = self._target(image), Image.Resampling(self.resample)
        if self.crop is None:
            return image.resize(size, resample)
        return _resize_and_crop(image, size, self.crop, resample)

    def _target(self, image: Image.Image) -> tuple[int, int]:
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        short, long = sorted(image.size)
        new_long = int(self.resize * long / short)
        return (self.resize, new_long) if image.width <= image.height else (new_long, self.resize)


def _pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    if image.width == image.height:
        return image
    side = max(image.size)
    if side * side > MAX_IMAGE_PIXELS:
        raise ImageTooLarge(
            f"{image.info.get('name', 'image')}: {image.width}x{image.height} pixels, padded to a square, exceed "
            f"{MAX_IMAGE_PIXELS}. Scale it down, or train with image_aspect_ratio crop."
        )
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _resize_and_crop(
    image: Image.Image, size: tuple[int, int], crop: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """Resize to `size` (width, height) and cut out the central `crop` (height, width).

    Only the part of the image that stays is resized where its pixels are then the same.
    """
    (width, height), (crop_height, crop_width) = size, crop
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    right, bottom = left + crop_width, top + crop_height
    if size == image.size:
        return image.crop((left, top, right, bottom))
    x0, x1 = _exact_span(image.width, width, left, right)
    y0, y1 = _exact_span(image.height, height, top, bottom)
    part = (x1 - x0, y1 - y0)
    if resample not in _CONTINUOUS or _rows_first(image.size, part) != _rows_first(image.size, size):
        x0, x1, y0, y1, part = 0, width, 0, height, size
    box = (x0 * image.width / width, y0 * image.height / height, x1 * image.width / width, y1 * image.height / height)
    resized = image.resize(part, resample, box)
    return resized.crop((left - x0, top - y0, right - x0, bottom - y0))  # Pillow fills with black outside the image


def _exact_span(source: int, target: int, low: int, high: int) -> tuple[int, int]:
    """Widen `low` to `high` (of `target` resized pixels) until Pillow can hold the same edges in the source exactly.

    Pillow takes the part's edges as float32. Rounded ones shift all filter weights a little: that changed pixels of 115
    of 200 photographs, by up to 2. Multiples of 1/grid below 2**bits fit into a float32's 24 bits; the image's own
    edges always do, so the search ends.
    """
    low, high = max(low, 0), min(high, target)
    grid = 1 << (24 - source.bit_length())
    while low * source * grid % target:
        low -= 1
    while high * source * grid % target:
        high += 1
    return low, high


def _rows_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Say whether Pillow resizes the height before the width; it rounds to 8 bits in between, so the order shows.

    The rule is that of Pillow 13 (`ImagingResampleInner` in its Resample.c); older ones never do.
    """
    fewer_columns, fewer_rows = source[0] - target[0], source[1] - target[1]
    return fewer_rows > 0 and fewer_rows > 2 * fewer_columns
