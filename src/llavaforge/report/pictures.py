"""Pictures as data URLs, so that a page needs no other file.

Comes in: pixels. Goes out: the URL as text.
"""

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt


def png_url(pixels_CHW: npt.NDArray[np.uint8]) -> str:
    """Return an image as it is."""
    return _url(pixels_CHW, None, "png")


def thumbnail_url(pixels_CHW: npt.NDArray[np.uint8], largest_side: int = 224) -> str:
    """Return a small picture of an image, 5 to 20 KB."""
    return _url(pixels_CHW, largest_side, "jpeg", quality=85)


def _url(pixels_CHW: npt.NDArray[np.uint8], largest_side: int | None, kind: str, **options: Any) -> str:
    from PIL import Image

    image, file = Image.fromarray(pixels_CHW.transpose(1, 2, 0)), io.BytesIO()
    if largest_side is not None:
        image.thumbnail((largest_side, largest_side))
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
