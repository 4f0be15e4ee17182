"""`llavaforge quickstart`: the generated shapes, the small pre-trained parts, and the story told with them."""

from pathlib import Path

SMALL_CLIP = Path(__file__).parent / "small-clip"
SMALL_QWEN2 = Path(__file__).parent / "small-qwen2"
