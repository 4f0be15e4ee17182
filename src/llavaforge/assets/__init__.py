"""The two small pre-trained parts of `llavaforge quickstart`, and the script that trained them."""

from pathlib import Path

SMALL_CLIP = Path(__file__).parent / "small-clip"
SMALL_QWEN2 = Path(__file__).parent / "small-qwen2"
