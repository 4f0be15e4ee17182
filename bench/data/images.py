"""From JPEG bytes to the tower's pixels: ours against transformers' Pillow processor, image by image in turns.

    python -m bench.data.images [folder]

Both sides start from the same bytes in memory, at CLIP-L's geometry (shortest edge 336, bicubic, centre crop 336), and
run in one process. Theirs ends with normalised floats; ours with `uint8`, which the device normalises after a quarter
of the bytes has travelled. For fairness ours is also measured with a normalisation on the host. Times are processor
time, so that other work on the machine shows less.

Legend: C channels, H and W pixels.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llavaforge.data.pixels.decode import decode
from llavaforge.data.pixels.preprocessing import Preprocessing

SIZE = 336
# One level of 256 is 0.0145 after normalisation: this tells equal pixels from unequal ones.
_TOLERANCE = 1e-4

Floats = npt.NDArray[np.float32]


class _Sides:
    """The ways to do the same, each from bytes."""

    def __init__(self) -> None:
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
        self.preprocessing = Preprocessing.of(self.processor)
        levels = np.arange(256, dtype=np.float32) * np.float32(self.preprocessing.rescale)
        self._table_CV = np.stack(
            [(levels - mean) / std for mean, std in zip(self.preprocessing.mean, self.preprocessing.std, strict=True)]
        ).astype(np.float32)

    def ours(self, data: bytes) -> npt.NDArray[np.uint8]:
        """Return `uint8` pixels (C, H, W)."""
        return self.preprocessing(decode(data, "image"))

    def ours_normalized(self, data: bytes) -> Floats:
        """Return normalised pixels (C, H, W), looked up in a table of 3 x 256 values."""
        return np.stack([table[pixels] for table, pixels in zip(self._table_CV, self.ours(data), strict=True)])

    def theirs(self, data: bytes) -> Floats:
        """Return normalised pixels (C, H, W)."""
        with Image.open(io.BytesIO(data)) as image:
            pixels: Floats = self.processor(image.convert("RGB"), return_tensors="np")["pixel_values"][0]
        return pixels


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Race both sides over all JPEG files of a folder.

    Args:
        folder: searched in depth.
        repeats: how often all images are processed; ratios are of one repeat's sums.

    Returns:
        Images per second of processor time (medians over the repeats), the ratio's median, lowest and highest value,
        the shares of our time, and the number of images whose pixels differ.
    """
    files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    if not files:
        raise SystemExit(f"{folder}: no .jpg files.")
    sides = _Sides()
    unequal = sum(not _equal(sides, data) for data in files)  # warms both up as well
    names = ("ours", "ours_normalized", "theirs")
    rounds = [_round({name: getattr(sides, name) for name in names}, files) for _ in range(repeats)]
    speeds = {name: len(files) / statistics.median(seconds[name] for seconds in rounds) for name in names}
    return {
        "images": len(files),
        "repeats": repeats,
        **{f"{name}_images_per_s": round(speed, 1) for name, speed in speeds.items()},
        "ratio": _spread([seconds["theirs"] / seconds["ours"] for seconds in rounds]),
        "ratio_normalized": _spread([seconds["theirs"] / seconds["ours_normalized"] for seconds in rounds]),
        "share_of_our_time": _shares(sides.preprocessing, files),
        "images_with_unequal_pixels": unequal,
    }


def _equal(sides: _Sides, data: bytes) -> bool:
    return bool(np.abs(sides.ours_normalized(data) - sides.theirs(data)).max() < _TOLERANCE)


def _round(sides: dict[str, Callable[[bytes], Any]], files: list[bytes]) -> dict[str, float]:
    seconds = dict.fromkeys(sides, 0.0)
    for number, data in enumerate(files):
        # Who goes first changes from image to image: the second finds the bytes in the cache.
        for name in list(sides) if number % 2 else reversed(sides):
            begin = time.process_time()
            sides[name](data)
            seconds[name] += time.process_time() - begin
    return seconds


def _shares(preprocessing: Preprocessing, files: list[bytes]) -> dict[str, float]:
    seconds = {"decode": 0.0, "resize": 0.0, "rest": 0.0}
    for data in files:
        begin = time.process_time()
        image = decode(data, "image")
        decoded = time.process_time()
        preprocessing.fit(image)
        resized = time.process_time()
        preprocessing(image)
        end = time.process_time()
        seconds["decode"] += decoded - begin
        seconds["resize"] += resized - decoded
        seconds["rest"] += (end - resized) - (resized - decoded)  # the array in the tower's layout
    total = sum(seconds.values())
    return {name: round(value / total, 3) for name, value in seconds.items()}


def _spread(ratios: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.data.images", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("images"), help="of JPEG files (default: images)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(measure(options.folder, options.repeats), indent=1))


if __name__ == "__main__":
    main()
