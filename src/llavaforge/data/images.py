"""From the bytes of an image file to the tower's pixels.

Comes in: what `data/image_store.py` read. Goes out: `uint8` pixels of the tower's size. Called by loader workers.
Normalisation to floats happens on the device (`model/tower.py`): a quarter of the bytes travel.

Legend: N images, C channels, H and W pixels.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from llavaforge.errors import UserError

# The raster formats of image-text data. Anything else that Pillow could open (PDF, EPS, ...) is attack surface.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_IMAGE_PIXELS = 178_956_970  # Pillow's own bound for a decompression bomb

Pixels = npt.NDArray[np.uint8]


def decode(data: bytes, name: str) -> Image.Image:
    """Decode an image file to upright RGB.

    The EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits
    (a plain conversion would clip it to white), and the first frame of an animation is taken.

    Raises:
        UserError: truncated, not an image, of a format outside `FORMATS`, or over `MAX_IMAGE_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise UserError(
                    f"{name}: {image.width}x{image.height} pixels exceed {MAX_IMAGE_PIXELS}. Scale it down."
                )
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise UserError(
            f"{name}: cannot be decoded (not a {', '.join(FORMATS)} file, whatever its name). "
            "Replace the file, or remove its record from the data."
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{name}: cannot be decoded ({error}). Replace the file, or remove its record from the data."
        ) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64) / 256
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


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
        """Return `uint8` pixels (C, H, W), equal to the processor's before it rescales."""
        if self.pad_color is not None:
            image = _pad_to_square(image, self.pad_color)
        image = image.resize(self._target(image), resample=Image.Resampling(self.resample))
        if self.crop is not None:
            image = _center_crop(image, self.crop)
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))

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
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _center_crop(image: Image.Image, crop: tuple[int, int]) -> Image.Image:
    height, width = crop
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))  # Pillow fills with black outside the image
