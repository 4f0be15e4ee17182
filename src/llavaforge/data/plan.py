"""The order of samples: a pure function of (seed, epoch, number of samples), the same for every world size.

Comes in: lengths and sizes. Goes out: for each step the micro-batches of one rank. Called by `train/run.py`.
Resuming at step 1,000,000 costs nothing: a step is computed from its number.

The stream of samples is the shuffled epochs one after the other; step b takes samples b*G .. (b+1)*G of it (G the
global batch). Which rank and which micro-batch a sample lands in is decided per step from lengths alone, so that the
bins carry about the same number of tokens.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from llavaforge.errors import UserError


@dataclass(frozen=True)
class MicroBatch:
    """What one `micro_step` works on: sample numbers, and the step they belong to."""

    step: int
    samples: tuple[int, ...]
    is_last_of_step: bool
    num_supervised_in_step: int


@dataclass(frozen=True, eq=False)
class Plan:
    """The whole run's order.

    Attributes:
        samples: the numbers (rows of the index) that take part.
        lengths: tokens per row of the index.
        num_supervised: supervised tokens per row of the index.
        global_batch_size: samples per step over all ranks.
        num_steps: steps of the run.
        seed: of the shuffling.
        world_size: number of ranks.
        max_samples: most samples in a micro-batch.
        max_tokens: most tokens in a micro-batch, or None.
    """

    samples: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    num_supervised: npt.NDArray[np.int64]
    global_batch_size: int
    num_steps: int
    seed: int
    world_size: int
    max_samples: int
    max_tokens: int | None

    def __post_init__(self) -> None:
        if self.global_batch_size % self.world_size:
            raise UserError(
                f"global_batch_size {self.global_batch_size} does not divide over {self.world_size} processes: "
                "choose a multiple of the number of processes."
            )
        longest = int(self.lengths[self.samples].max())
        if self.max_tokens is not None and longest > self.max_tokens:
            raise UserError(
                f"the longest sample has {longest} tokens, over max_tokens_per_batch {self.max_tokens}: "
                "raise max_tokens_per_batch or lower max_length."
            )

    def global_batch(self, step: int) -> npt.NDArray[np.int64]:
        """Return the sample numbers of one step (0-based), over all ranks."""
        size = len(self.samples)
        places = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs = places // size
        return np.concatenate([self._epoch(int(e))[places[epochs == e] % size] for e in np.unique(epochs)])

    def micro_batches(self, step: int, rank: int) -> list[MicroBatch]:
        """Return the micro-batches of one rank for one step; every rank gets the same number of them."""
        batch = self.global_batch(step)
        num_bins = self.world_size * max(
            math.ceil(self.global_batch_size / (self.world_size * self.max_samples)),
            math.ceil(int(self.lengths[batch].sum()) / (self.world_size * (self.max_tokens or 2**62))),
        )
        while (bins := self._fill(batch, num_bins)) is None:
            num_bins += self.world_size
        mine = bins[rank :: self.world_size]
        supervised = int(self.num_supervised[batch].sum())
        return [
            MicroBatch(step, tuple(samples), number == len(mine) - 1, supervised) for number, samples in enumerate(mine)
        ]

    def iterate(self, rank: int, start_step: int = 0) -> Iterator[MicroBatch]:
        """Yield all micro-batches of one rank from `start_step` on."""
        for step in range(start_step, self.num_steps):
            yield from self.micro_batches(step, rank)

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        return self.samples[_permutation(len(self.samples), self.seed, epoch)]

    def _fill(self, batch: npt.NDArray[np.int64], num_bins: int) -> list[list[int]] | None:
        """Spread a batch over bins, longest first into the lightest bin that has room; None when it does not fit.

        (Longest-processing-time rule, Graham 1969, with a bound on the samples of a bin.)
        """
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        lightest = [(0, number) for number in range(num_bins)]
        for sample in sorted(batch.tolist(), key=lambda s: (-int(self.lengths[s]), s)):
            if not lightest:
                return None
            tokens, number = heapq.heappop(lightest)
            tokens += int(self.lengths[sample])
            if self.max_tokens is not None and tokens > self.max_tokens:
                return None
            bins[number].append(sample)
            if len(bins[number]) < self.max_samples:
                heapq.heappush(lightest, (tokens, number))
        return bins


def in_order(
    lengths: npt.NDArray[np.int64], samples: npt.NDArray[np.int64], max_samples: int, max_tokens: int | None
) -> list[tuple[int, ...]]:
    """Group samples, in their order, into batches within both bounds (for evaluation)."""
    batches: list[list[int]] = []
    tokens = 0
    for sample in samples.tolist():
        tokens += int(lengths[sample])
        full = not batches or len(batches[-1]) == max_samples or (max_tokens is not None and tokens > max_tokens)
        if full:
            batches.append([])
            tokens = int(lengths[sample])
        batches[-1].append(sample)
    return [tuple(batch) for batch in batches]


def num_steps(num_samples: int, global_batch_size: int, num_train_epochs: float, max_steps: int) -> int:
    """Return the number of optimizer steps: `max_steps`, or enough to see every sample `num_train_epochs` times.

    The last step is filled up with the first samples of the next epoch.
    """
    return max_steps or math.ceil(num_samples * num_train_epochs / global_batch_size)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)
