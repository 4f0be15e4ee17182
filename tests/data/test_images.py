"""Pixels equal the saved processor's; odd files are handled or refused by name."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llavaforge.data.images import Preprocessing, decode
from llavaforge.errors import UserError
from llavaforge.model.tower import normalize

CROP = {"height": 28, "width": 28}
PROCESSORS: dict[str, Any] = {
    "clip, crop": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=CROP),
    "clip, pad": LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=CROP, do_pad=True),
    "siglip": SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    "clip, crop larger than resize": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=CROP),
}


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def as_file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(40, 60), (61, 33), (28, 28), (500, 31), (27, 200)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_equal_the_processors(name: str, size: tuple[int, int]) -> None:
    processor, image = PROCESSORS[name], picture(*size)
    preprocessing = Preprocessing.of(processor)
    found = normalize(torch.from_numpy(preprocessing(image))[None], preprocessing, torch.float32)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_processor_without_one_output_size_is_refused() -> None:
    odd = CLIPImageProcessorPil(size={"shortest_edge": 28}, do_center_crop=False)
    with pytest.raises(UserError, match="does not give all images one size"):
        Preprocessing.of(odd)
    with pytest.raises(UserError, match="must be on to train"):
        Preprocessing.of(CLIPImageProcessorPil(do_normalize=False))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees
    assert decode(as_file(picture(40, 20), "JPEG", exif=exif), "a").size == (20, 40)


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert decode(as_file(clear, "PNG"), "a").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled() -> None:
    grey = Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16))
    assert decode(as_file(grey, "PNG"), "a").getpixel((0, 0)) == (128, 128, 128)


def test_cmyk_and_palette_and_animation_become_rgb() -> None:
    frames = [picture(8, 8).convert("P"), picture(8, 9).resize((8, 8)).convert("P")]
    animated = as_file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for data in (as_file(picture(8, 8).convert("CMYK"), "JPEG"), animated):
        assert decode(data, "a").mode == "RGB"


@pytest.mark.parametrize(
    "data", [as_file(picture(64, 64), "JPEG")[:900], b"<html>not found</html>", b"", b"%PDF-1.4"],
    ids=["truncated", "html", "empty", "pdf"],
)  # fmt: skip
def test_what_is_no_image_is_named(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^some\.jpg: cannot be decoded.*Replace the file"):
        decode(data, "some.jpg")


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = as_file(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(UserError, match="bomb\\.png"):
        decode(bomb, "bomb.png")
