"""Pixels equal the saved processor's; odd files are handled or refused by name."""

import io
import pickle
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llavaforge.data.pixels import decode as images
from llavaforge.data.pixels.decode import (
    ImageError,
    ImageFacts,
    ImageTooLarge,
    NotAnImage,
    TruncatedImage,
    decode,
    inspect,
)
from llavaforge.data.pixels.preprocessing import Preprocessing
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


@settings(deadline=None, max_examples=150)
@given(
    width=st.integers(1, 900), height=st.integers(1, 900), edge=st.integers(8, 64), crop=st.integers(8, 64),
    resample=st.sampled_from(list(Image.Resampling)),
)  # fmt: skip
@example(480, 640, 168, 84, Image.Resampling.NEAREST)  # where this filter would round a part's pixels differently
def test_resizing_the_part_that_stays_gives_the_same_pixels(
    width: int, height: int, edge: int, crop: int, resample: Image.Resampling
) -> None:
    width, height = max(width, height // 50 + 1), max(height, width // 50 + 1)
    image, short = picture(width, height), min(width, height)
    size = (edge, edge * height // short) if width <= height else (edge * width // short, edge)
    left, top = (size[0] - crop) // 2, (size[1] - crop) // 2
    expected = np.asarray(image.resize(size, resample).crop((left, top, left + crop, top + crop)))
    preprocessing = Preprocessing(None, edge, (crop, crop), int(resample), 1 / 255, (0.5,) * 3, (0.5,) * 3)
    np.testing.assert_array_equal(preprocessing(image), expected.transpose(2, 0, 1))


def test_an_image_that_padding_would_blow_up_is_refused() -> None:
    preprocessing = Preprocessing.of(PROCESSORS["clip, pad"])
    wide = decode(as_file(Image.new("L", (13_378, 100)), "PNG"), "wide.png")  # 13,378 squared is over 179 million
    with pytest.raises(ImageTooLarge, match=r"^wide\.png: 13378x100 pixels, padded to a square"):
        preprocessing(wide)


def test_a_processor_without_one_output_size_is_refused() -> None:
    odd = CLIPImageProcessorPil(size={"shortest_edge": 28}, do_center_crop=False)
    with pytest.raises(UserError, match="does not give all images one size"):
        Preprocessing.of(odd)
    with pytest.raises(UserError, match="must be on to train"):
        Preprocessing.of(CLIPImageProcessorPil(do_normalize=False))


# Two rows of three colours that survive JPEG with 4:4:4 sampling when each is a block of 16x16.
CORNERS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255], [128, 128, 128]]], np.uint8)
R, G, B, K, W, Y = (tuple(int(value) for value in color) for row in CORNERS for color in row)
Colors = list[list[tuple[int, ...]]]
# What each EXIF value asks for (EXIF 2.32, tag 274), written by hand: where the first row and column are seen.
UPRIGHT: dict[int, Colors] = {
    1: [[R, G, B], [K, W, Y]],
    2: [[B, G, R], [Y, W, K]],
    3: [[Y, W, K], [B, G, R]],
    4: [[K, W, Y], [R, G, B]],
    5: [[R, K], [G, W], [B, Y]],
    6: [[K, R], [W, G], [Y, B]],
    7: [[Y, B], [W, G], [K, R]],
    8: [[B, Y], [G, W], [R, K]],
}


def colors(image: Image.Image, block: int = 1) -> Colors:
    """The colour in the middle of each block."""
    values = np.asarray(image)[block // 2 :: block, block // 2 :: block]
    return [[tuple(int(v) for v in pixel) for pixel in row] for row in values]


def decoded(image: Image.Image, kind: str, **options: Any) -> Colors:
    return colors(decode(as_file(image, kind, **options), "a"))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    blocks = Image.fromarray(CORNERS.repeat(16, axis=0).repeat(16, axis=1))
    options = {"quality": 100, "subsampling": 0} if kind in ("JPEG", "MPO") else {}
    options |= {"lossless": True} if kind == "WEBP" else {}
    data = as_file(blocks, kind, exif=exif(orientation), **options)
    found = np.array(colors(decode(data, "a"), 16), dtype=int)
    np.testing.assert_allclose(found, UPRIGHT[orientation], atol=0 if kind in ("PNG", "WEBP", "TIFF") else 2)
    facts = inspect(data)
    assert (facts.height, facts.width) == (found.shape[0] * 16, found.shape[1] * 16)


@pytest.mark.parametrize("value", [0, 9, 700])
def test_an_orientation_outside_of_exif_is_ignored(value: int) -> None:
    assert decoded(Image.fromarray(CORNERS), "PNG", exif=exif(value)) == UPRIGHT[1]


def test_corrupt_exif_costs_no_image() -> None:
    assert decoded(Image.fromarray(CORNERS), "PNG", exif=b"Exif\0\0 no TIFF header") == UPRIGHT[1]


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand (PNG specification, 5.3): `rows` with their filter bytes, `chunks` before the data."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


WHITE = (255, 255, 255)
PALETTE = bytes([10, 20, 30, 40, 50, 60])
HAND_MADE: dict[str, tuple[bytes, list[tuple[int, ...]]]] = {
    # black at half transparency on white: 255 * (1 - 128/255) = 127
    "rgba": (png(2, 1, 8, 6, bytes([0, 0, 0, 0, 128, 9, 9, 9, 0])), [(127,) * 3, WHITE]),
    "grey with alpha": (png(2, 1, 8, 4, bytes([0, 200, 255, 0, 51])), [(200,) * 3, (204,) * 3]),
    "16-bit grey with alpha": (png(2, 1, 16, 4, struct.pack(">xHHHH", 0x8000, 0xFFFF, 7, 0)), [(128,) * 3, WHITE]),
    "16-bit grey": (png(3, 1, 16, 0, struct.pack(">xHHH", 0, 0x80FF, 0xFFFF)), [(0,) * 3, (128,) * 3, WHITE]),
    "16-bit grey, key": (png(2, 1, 16, 0, struct.pack(">xHH", 0x1234, 0x1235), (b"tRNS", b"\x12\x34")),
                         [WHITE, (0x12,) * 3]),
    "16-bit colour": (png(1, 1, 16, 2, struct.pack(">xHHH", 0x1234, 0x5678, 0x9ABC)), [(0x12, 0x56, 0x9A)]),
    "16-bit colour, key": (png(2, 1, 16, 2, struct.pack(">x6H", 0x1234, 0x5678, 0x9ABC, 0, 0, 0),
                               (b"tRNS", struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC))), [WHITE, (0, 0, 0)]),
    "colour, key": (png(2, 1, 8, 2, bytes([0, 1, 2, 3, 1, 2, 4]), (b"tRNS", struct.pack(">HHH", 1, 2, 3))),
                    [WHITE, (1, 2, 4)]),
    "grey, key": (png(2, 1, 8, 0, bytes([0, 7, 8]), (b"tRNS", b"\0\x07")), [WHITE, (8,) * 3]),
    # four bits 0..15 are 0..255 in steps of 17, two bits 0..3 in steps of 85
    "4-bit grey, key": (png(2, 1, 4, 0, bytes([0, 0x3C]), (b"tRNS", b"\0\x03")), [WHITE, (204,) * 3]),
    "2-bit grey, key": (png(4, 1, 2, 0, bytes([0, 0b00011011]), (b"tRNS", b"\0\x01")),
                        [(0,) * 3, WHITE, (170,) * 3, WHITE]),
    "1-bit grey": (png(2, 1, 1, 0, bytes([0, 0b01000000])), [(0,) * 3, WHITE]),
    "1-bit grey, key": (png(2, 1, 1, 0, bytes([0, 0b01000000]), (b"tRNS", b"\0\0")), [WHITE, WHITE]),
    "palette": (png(2, 1, 8, 3, bytes([0, 1, 0]), (b"PLTE", PALETTE)), [(40, 50, 60), (10, 20, 30)]),
    "palette, one entry clear": (png(2, 1, 8, 3, bytes([0, 1, 0]), (b"PLTE", PALETTE), (b"tRNS", b"\xff\0")),
                                 [WHITE, (10, 20, 30)]),
    # 10 * 51/255 + 255 * 204/255 = 206, and so on in steps of two
    "palette, half clear": (png(2, 1, 8, 3, bytes([0, 1, 0]), (b"PLTE", PALETTE), (b"tRNS", b"\x33\xff")),
                            [(40, 50, 60), (206, 208, 210)]),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_MADE)
def test_every_kind_of_png_becomes_the_rgb_that_a_viewer_shows(name: str) -> None:
    data, expected = HAND_MADE[name]
    assert colors(decode(data, "a")) == [expected]


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_wide_grey_of_a_tiff_is_scaled(dtype: str) -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=dtype)
    assert decoded(Image.fromarray(values), "TIFF") == [[(0,) * 3, (1,) * 3, (128,) * 3, WHITE]]


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_every_kind_of_tiff_becomes_rgb(mode: str, compression: str | None) -> None:
    image = Image.new("RGBA" if mode in ("RGBA", "LA") else "RGB", (2, 2), "white").convert(mode)
    assert decoded(image, "TIFF", compression=compression) == [[WHITE] * 2] * 2


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg"])  # uncompressed, Pillow reads it from version 13 on
def test_ycbcr_becomes_rgb(compression: str) -> None:
    # JFIF: R = Y + 1.402 (Cr - 128), G = Y - 0.344 (Cb - 128) - 0.714 (Cr - 128), B = Y + 1.772 (Cb - 128)
    image = Image.new("YCbCr", (2, 2), (100, 138, 118))
    found = decoded(image, "TIFF", compression=compression)
    np.testing.assert_allclose(found, [[(86.0, 103.7, 117.7)] * 2] * 2, atol=1)


@pytest.mark.parametrize(
    ("ink", "expected"),
    [((0, 0, 0, 0), WHITE), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 255, 255, 0), R)],
)
def test_cmyk_is_seen_as_printed(ink: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Adobe stores the inks of a JPEG inverted, and so does Pillow when it writes one."""
    inks = Image.new("CMYK", (16, 16), ink)
    data = as_file(inks, "JPEG", quality=100)
    assert b"Adobe" in data
    np.testing.assert_allclose(np.asarray(decode(data, "a"))[8, 8], expected, atol=2)
    assert decoded(inks, "TIFF")[0][0] == expected


def test_ycck_is_seen_as_printed() -> None:
    """Adobe's other way, transform 2: the three colour inks are stored as luminance and colour, black as it is."""
    data = as_file(Image.new("CMYK", (16, 16), (55, 127, 127, 0)), "JPEG", quality=100)
    place = data.index(b"Adobe") + 11
    ycck = data[:place] + b"\x02" + data[place + 1 :]
    # Stored inverted: (200, 128, 128, 255), now read as luminance 200 without colour: 200 of each ink, no black.
    np.testing.assert_allclose(np.asarray(decode(ycck, "a"))[8, 8], (55, 55, 55), atol=2)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (R, B)]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = as_file(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as file:
        assert (file.format, file.n_frames) == (kind, 2)
    np.testing.assert_allclose(np.asarray(decode(data, "a"))[8, 8], R, atol=0 if kind != "MPO" else 2)
    assert inspect(data).format == kind


def test_a_clear_gif_is_white_where_it_is_clear() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette(PALETTE)
    image.putpixel((1, 0), 1)
    assert decoded(image, "GIF", transparency=1) == [[(10, 20, 30), WHITE]]


@pytest.mark.parametrize("kind", images.FORMATS)
def test_each_format_is_told_by_content(kind: str) -> None:
    assert inspect(as_file(picture(30, 20), kind)) == ImageFacts(kind, 30, 20)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 2)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_tiny_and_narrow_images_get_the_towers_size(name: str, size: tuple[int, int]) -> None:
    preprocessing = Preprocessing.of(PROCESSORS[name])
    side = 32 if name == "siglip" else 28
    assert preprocessing(decode(as_file(Image.new("RGB", size, R), "PNG"), "a")).shape == (3, side, side)


JPEG, PNG = as_file(picture(64, 64), "JPEG"), as_file(picture(64, 64), "PNG")
FLOATS = as_file(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")
FAULTS: dict[str, tuple[bytes, type[ImageError], str]] = {
    "empty": (b"", NotAnImage, "it is empty"),
    "html": (b" \n<!DOCTYPE HTML><html>not found</html>", NotAnImage, "it is an HTML page"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NotAnImage, "it is an SVG drawing"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", NotAnImage, "it is an XML file"),
    "json": (b'{"error": 404}', NotAnImage, "it is JSON"),
    "text": ("Zugriff verweigert: größer".encode(), NotAnImage, "it is text"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", NotAnImage, "Git LFS pointer"),
    "pdf": (b"%PDF-1.4", NotAnImage, "it is a PDF"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NotAnImage, "it is PostScript"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", NotAnImage, "it is a HEIC, AVIF or video file"),
    "ppm": (as_file(picture(20, 20), "PPM"), NotAnImage, "unknown format; allowed are JPEG, PNG"),
    "floats": (FLOATS, NotAnImage, "pixels of mode F have no defined range"),
    "lab": (as_file(Image.new("LAB", (2, 2)), "TIFF"), NotAnImage, "pixels of mode LAB"),
    "negative grey": (as_file(Image.fromarray(np.array([[-5, 70_000]], np.int32)), "TIFF"), NotAnImage,
                      "grey values from -5 to 70000"),
    "cut jpeg": (JPEG[:900], TruncatedImage, "truncated"),
    "jpeg cut in its header": (JPEG[:30], TruncatedImage, "cut or corrupt"),
    "cut png": (PNG[:900], TruncatedImage, "truncated"),
    "png cut in its header": (PNG[:12], TruncatedImage, "cut or corrupt"),
    **{f"cut {kind}": (as_file(picture(64, 64), kind)[:900], TruncatedImage, "cut or corrupt")
       for kind in ("GIF", "BMP", "WEBP", "TIFF", "MPO")},
    "no pixels": (png(0, 5, 8, 0, b""), TruncatedImage, "cut or corrupt|0x5 pixels"),
    "too narrow": (as_file(Image.new("1", (1, 5000)), "PNG"), ImageTooLarge, "of 1x5000 pixels, one side is over 200"),
    "over our bound": (png(20_000, 10_000, 1, 0, b""), ImageTooLarge, "20000x10000 pixels|exceeds limit"),
    "over Pillow's bound": (png(60_000, 60_000, 1, 0, b""), ImageTooLarge, "3600000000 pixels"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_by_kind_and_by_name(fault: str) -> None:
    data, kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message) as caught:
        decode(data, "some.jpg")
    text = str(caught.value)
    assert text.startswith("some.jpg: ")
    assert any(remedy in text for remedy in ("Replace the file", "Save it as", "Scale it down", "Crop it"))
    again = pickle.loads(pickle.dumps(caught.value))  # the way back from a loader worker
    assert (str(again), again.kind) == (text, kind.kind)


CUT = {
    **{kind: as_file(picture(64, 50), kind) for kind in images.FORMATS},
    **{name: as_file(picture(64, 50), "TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "packbits")},
    "progressive": as_file(picture(64, 50), "JPEG", progressive=True),
    "lossless": as_file(picture(64, 50), "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", CUT)
def test_a_cut_file_never_passes_with_other_pixels(kind: str) -> None:
    """A cut is refused, unless it takes only what follows the pixels (GIF's trailer, PNG's end chunk)."""
    data, num_refused = CUT[kind], 0
    whole = np.asarray(decode(data, "a"))
    for length in [*range(0, len(data), len(data) // 40), *range(len(data) - 20, len(data))]:
        try:
            np.testing.assert_array_equal(np.asarray(decode(data[:length], "a")), whole)
        except ImageError:
            num_refused += 1
    assert num_refused >= 40


def test_kinds_are_those_that_the_doctor_counts() -> None:
    assert {kind.kind for kind in ImageError.__subclasses__()} == {"not_an_image", "image_too_large", "truncated_image"}


def test_a_header_is_read_without_the_pixels() -> None:
    assert inspect(JPEG[:900]) == ImageFacts("JPEG", 64, 64)
    assert inspect(PNG[:900]) == ImageFacts("PNG", 64, 64)
    for fault in ("html", "floats", "too narrow", "over our bound"):
        with pytest.raises(FAULTS[fault][1], match=r"^some\.jpg: "):
            inspect(FAULTS[fault][0], "some.jpg")


def test_no_warning_leaks() -> None:
    """Pillow warns of bombs from half of its bound on, and of corrupt metadata."""
    large = as_file(Image.new("1", (10_000, 9_000)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect(large).width == 10_000
        decode(as_file(picture(8, 8), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"), "a")
        decode(large, "a")


def test_pillow_is_not_told_to_forgive_cut_files() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


SEEDS = [
    *(as_file(picture(24, 17), kind) for kind in images.FORMATS),
    *(as_file(picture(24, 17), "TIFF", compression=compression) for compression in ("tiff_lzw", "jpeg")),
    as_file(picture(24, 17), "MPO", save_all=True, append_images=[picture(24, 17)], exif=exif(6)),
    as_file(picture(24, 17), "GIF", save_all=True, append_images=[picture(24, 18)]),
    as_file(picture(24, 17).convert("CMYK"), "JPEG", exif=exif(3)),
    HAND_MADE["palette, half clear"][0],
    HAND_MADE["16-bit grey, key"][0],
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """An image file with some bytes changed, cut somewhere."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    near = st.one_of(st.integers(0, min(200, len(data) - 1)), st.integers(0, len(data) - 1))  # headers break most
    for place in draw(st.lists(near, max_size=6)):
        data[place] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=64), mutated()))
def test_any_bytes_are_decoded_or_refused_in_words(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 1_000_000)  # a changed header would ask for gigabytes
    try:
        image = decode(data, "some.jpg")
    except ImageError as error:
        assert str(error).startswith("some.jpg: ")
    else:
        assert image.mode == "RGB"
        assert np.asarray(image).shape == (image.height, image.width, 3)
