"""What the packs of a run take of a device's memory, and how much of it they may take: arithmetic, without torch.

Comes in: what samples are like, and what a token keeps. Goes out: bytes.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavaforge.config.schema import EstimateConfig, TrainConfig
from llavaforge.model.activations import Activations

if TYPE_CHECKING:
    from llavaforge.data.index.index import SampleIndex
    from llavaforge.data.order.mixture import Mixture

USABLE_SHARE = 0.9
"""Of the device's memory. The forecast was 1 to 4 % above what an H200 took, with compiled layers up to 11 % (LOG.md);
beside it CUDA, NCCL and the gaps of the allocator take a share."""
RECOMPUTE_CHOICES = (0, 4, 2, 1)
"""Every how many layers one is recomputed (0: none), the fastest first."""

# A card is busy from a few thousand tokens on; more than these gain nothing and cost memory.
FEW_TOKENS, _MANY_TOKENS = 8_192, 16_384
_GRAIN = 64


@dataclass(frozen=True)
class Sizes:
    """What the samples of a run are like.

    Attributes:
        longest: tokens of the longest.
        mean: tokens of the mean one.
        images_per_token: over all of them.
        supervised_per_token: over all of them.
    """

    longest: int
    mean: float
    images_per_token: float
    supervised_per_token: float

    @classmethod
    def of(cls, index: "SampleIndex", mixture: "Mixture") -> "Sizes":
        """Measure the samples of a mixture."""
        rows = mixture.all_rows
        lengths = index.lengths[rows]
        images, supervised = (
            numbers[rows].sum() / lengths.sum() for numbers in (index.num_images, index.num_supervised)
        )
        return cls(int(lengths.max()), float(lengths.mean()), float(images), float(supervised))

    def largest_pack(self, num_samples: int) -> int:
        """Return the most tokens of a pack of so many samples: dealt by size, at most mean + longest (Graham 1969)."""
        return int(min(num_samples * self.longest, num_samples * self.mean * 1.1 + self.longest))

    def num_images(self, num_tokens: int) -> int:
        """Return the images of a pack of so many tokens."""
        return math.ceil(round(num_tokens * self.images_per_token, 6))

    def num_supervised(self, num_tokens: int) -> int:
        """Return the supervised tokens of a pack of so many tokens."""
        return math.ceil(round(num_tokens * self.supervised_per_token, 6))

    def bytes(self, kept: Activations, num_tokens: int, recompute: int, compiled: bool = False) -> float:
        """Return what a pack of so many tokens takes."""
        images, supervised = self.num_images(num_tokens), self.num_supervised(num_tokens)
        return kept.bytes(num_tokens, images, supervised, recompute, compiled)


def decide(
    config: TrainConfig | EstimateConfig, kept: Activations, budget: float, sizes: Sizes
) -> tuple[int | None, int]:
    """Choose the tokens of a micro-batch (None: no bound) and which layers are recomputed.

    Args:
        config: what it does not leave to `auto` stays.
        kept: what a token takes.
        budget: bytes that activations may take.
        sizes: of the samples.
    """
    choices = RECOMPUTE_CHOICES if config.gradient_checkpointing == "auto" else (config.recompute_every,)
    if config.max_tokens_per_batch != "auto":
        most = config.most_tokens or sizes.largest_pack(config.max_samples_per_batch)
        return config.most_tokens, next((one for one in choices if sizes.bytes(kept, most, one) <= budget), choices[-1])
    enough = max(FEW_TOKENS, sizes.longest)
    tokens = 0
    for recompute in choices:
        tokens = next((n for n in range(_MANY_TOKENS, 0, -_GRAIN) if sizes.bytes(kept, n, recompute) <= budget), 0)
        if tokens >= enough:
            break
    return max(tokens, sizes.longest), recompute
