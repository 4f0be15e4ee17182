"""Photographs of all shapes: our pixels are those of transformers' Pillow processors."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.data.images import measure
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llavaforge.data.pixels.decode import decode
from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.model.tower import normalize

PHOTOS = Path(os.environ.get("LLAVAFORGE_PHOTOS", Path(__file__).parents[3] / "shared" / "data" / "photos")) / "images"
# Every third of 258, of many sizes. All of them are equal too, in half a minute.
FILES = sorted(PHOTOS.glob("*.jpg"))[::3]
CLIP_L: dict[str, Any] = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
PROCESSORS: dict[str, Any] = {
    "crop": CLIPImageProcessorPil(**CLIP_L),
    "pad": LlavaImageProcessorPil(**CLIP_L, do_pad=True),
    "siglip": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FILES, reason="the photographs are not at hand")]


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_pixel_of_a_photograph_is_the_processors(name: str) -> None:
    processor = PROCESSORS[name]
    preprocessing = Preprocessing.of(processor)
    for path in FILES:
        pixels = preprocessing(decode(path.read_bytes(), path.name))
        found = normalize(torch.from_numpy(pixels)[None], preprocessing, torch.float32)
        expected = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        # One level of 256 is over 0.007 in normalised values, so all levels are identical.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, path=path: f"{path}: {text}")


def test_the_benchmark_reports_what_it_measures(tmp_path: Path) -> None:
    for path in FILES[:3]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    figures = measure(tmp_path, repeats=2)
    assert (figures["images"], figures["images_with_unequal_pixels"]) == (3, 0)
    assert sum(figures["share_of_our_time"].values()) == pytest.approx(1, abs=0.01)
    assert figures["ratio"]["lowest"] <= figures["ratio"]["median"] <= figures["ratio"]["highest"]
