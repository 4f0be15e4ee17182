"""A Llava of random weights and samples of random words, of any size: what proofs and speeds of a machine train.

Comes in: a `ModelSize`. Goes out: a stock Llava on a device, packs, and the options of a run of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from llavaforge.config.schema import TrainConfig
from llavaforge.data.index.index import Row
from llavaforge.data.load.pack import Pack, make_pack
from llavaforge.data.order.plan import MicroBatch
from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.data.storage.image_ref import ImageRef

# CLIP's, of openai/clip-vit-large-patch14-336.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the two parts; heads are `width / num_heads` wide."""

    image_size: int
    tower_width: int
    tower_intermediate: int
    tower_layers: int
    tower_heads: int
    width: int
    intermediate: int
    layers: int
    heads: int
    vocab_size: int
    patch_size: int = 14

    @property
    def num_image_tokens(self) -> int:
        """Tokens that one image takes."""
        return (self.image_size // self.patch_size) ** 2


# The published configs of openai/clip-vit-large-patch14-336 and Qwen/Qwen1.5-4B.
PUBLISHED = ModelSize(336, 1024, 4096, 24, 16, 2560, 6912, 40, 20, 151_936)
# The same share of work per part at a 120th of the parameters, for CPUs.
REPLICA = ModelSize(336, 192, 768, 6, 3, 512, 1408, 8, 8, 6_170)
# Seconds on any machine; heads of 64, as the published sizes' kind of kernel needs.
TINY = ModelSize(56, 128, 256, 3, 2, 256, 512, 3, 4, 1_000)


def vision_config(size: ModelSize) -> CLIPVisionConfig:
    """Return the tower's config."""
    return CLIPVisionConfig(
        hidden_size=size.tower_width,
        intermediate_size=size.tower_intermediate,
        num_hidden_layers=size.tower_layers,
        num_attention_heads=size.tower_heads,
        image_size=size.image_size,
        patch_size=size.patch_size,
    )


def text_config(size: ModelSize) -> Qwen2Config:
    """Return the language model's config."""
    return Qwen2Config(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def llava_config(size: ModelSize) -> LlavaConfig:
    """Return the whole model's config; its image token is the last of the vocabulary."""
    return LlavaConfig(
        vision_config=vision_config(size), text_config=text_config(size), image_token_index=size.vocab_size - 1
    )


def random_model(size: ModelSize, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """Return a stock Llava; its weights are drawn where they live."""
    torch.manual_seed(seed)
    with device:
        return LlavaForConditionalGeneration._from_config(llava_config(size), dtype=dtype)


def preprocessing(size: ModelSize) -> Preprocessing:
    """Return what CLIP's image processor does at this size."""
    square = (size.image_size, size.image_size)
    return Preprocessing(None, size.image_size, square, resample=3, rescale=1 / 255, mean=_MEAN, std=_STD)


def random_packs(
    size: ModelSize, number: int, num_samples: int, text_tokens: tuple[int, int], seed: int = 0
) -> Iterator[Pack]:
    """Draw the micro-batches of one step: each sample is an image, a prompt and an answer.

    Args:
        size: of the model.
        number: of micro-batches.
        num_samples: of each of them.
        text_tokens: fewest and most tokens of a sample beside its image; half of them are the answer.
        seed: of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(text_tokens[0], text_tokens[1] + 1, (number, num_samples))
    num_supervised = lengths // 2
    for micro, mine in enumerate(lengths):
        rows, pixels = [], []
        for count, length in enumerate(mine):
            ids = rng.integers(0, size.vocab_size - 1, length + 1, dtype=np.int32)
            ids[1] = size.vocab_size - 1
            spans = np.array([length + 1 - length // 2, length + 1], np.int32)
            total = int(length) + size.num_image_tokens
            rows.append(Row(0, "", count, "", (ImageRef(""),), ids, spans, total))
            pixels.append(rng.integers(0, 256, (3, size.image_size, size.image_size), dtype=np.uint8))
        source = MicroBatch(0, tuple(range(num_samples)), micro == number - 1, int(num_supervised.sum()))
        yield make_pack(rows, pixels, size.vocab_size - 1, size.num_image_tokens, source)


def train_options(train_type: str, **options: Any) -> TrainConfig:
    """Return the options of a run that reads and writes nothing."""
    nowhere = {"model_name_or_path": "random", "data_path": "random", "output_dir": "random"}
    return TrainConfig.model_validate({**nowhere, "train_type": train_type, **options})
