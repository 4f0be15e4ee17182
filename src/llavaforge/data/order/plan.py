"""The order of samples: a pure function of (seed, epoch, number of samples), the same for every world size.

Comes in: lengths and sizes. Goes out: for each step the micro-batches of one rank.
Resuming at step 1,000,000 costs nothing: a step is computed from its number.

The stream of samples is the shuffled epochs one after the other; step b takes samples b*G .. (b+1)*G of it (G the
global batch). Which rank and which micro-batch a sample lands in is decided per step from lengths alone, so that the
bins carry about the same work, and those that run at the same time most of all.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llavaforge.config.schema import DataOptions
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.order.mixture import Mixture
from llavaforge.errors import UserError

_MOST_STEPS = 2**31 - 1


@dataclass(frozen=True)
class MicroBatch:
    """What one `micro_step` works on.

    Attributes:
        step: number of the step it belongs to.
        samples: numbers of its samples.
        is_last_of_step: whether an optimizer step follows.
        num_supervised_in_step: supervised tokens of the whole global batch.
        spread: work of the busiest rank in this step, divided by the mean over ranks.
    """

    step: int
    samples: tuple[int, ...]
    is_last_of_step: bool
    num_supervised_in_step: int
    spread: float = 1.0


@dataclass(frozen=True, eq=False)
class Plan:
    """The whole run's order.

    Attributes:
        mixture: which samples an epoch holds, and their order.
        lengths: tokens per row of the index.
        num_supervised: supervised tokens per row of the index.
        costs: work per row of the index, in any unit (`model/flops.py`).
        global_batch_size: samples per step over all ranks.
        num_steps: steps of the run.
        world_size: number of ranks.
        max_samples: most samples in a micro-batch.
        max_tokens: most tokens in a micro-batch, or None.
    """

    mixture: Mixture
    lengths: npt.NDArray[np.int64]
    num_supervised: npt.NDArray[np.int64]
    costs: npt.NDArray[np.float64]
    global_batch_size: int
    num_steps: int
    world_size: int
    max_samples: int
    max_tokens: int | None

    @classmethod
    def of(
        cls,
        options: DataOptions,
        mixture: Mixture,
        index: SampleIndex,
        costs: npt.NDArray[np.float64],
        global_batch_size: int,
        num_steps: int,
        world_size: int = 1,
    ) -> "Plan":
        """Return the plan of a run with these options: the only way that training, forecast and preview make one."""
        return cls(
            mixture=mixture,
            lengths=index.lengths,
            num_supervised=index.num_supervised,
            costs=costs,
            global_batch_size=global_batch_size,
            num_steps=num_steps,
            world_size=world_size,
            max_samples=options.max_samples_per_batch,
            max_tokens=options.most_tokens,
        )

    def __post_init__(self) -> None:
        check_world(self.global_batch_size, len(self.mixture), self.world_size)
        longest = int(self.lengths[self.mixture.all_rows].max())
        if self.max_tokens is not None and longest > self.max_tokens:
            raise UserError(
                f"the longest sample has {longest} tokens, over max_tokens_per_batch {self.max_tokens}: "
                "raise max_tokens_per_batch or lower max_length."
            )

    def global_batch(self, step: int) -> npt.NDArray[np.int64]:
        """Return the sample numbers of one step (0-based), over all ranks."""
        size = len(self.mixture)
        positions = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs = positions // size
        return np.concatenate([self.mixture.epoch(int(e))[positions[epochs == e] % size] for e in np.unique(epochs)])

    def rows(self) -> npt.NDArray[np.int64]:
        """Return the rows that the run takes at least once."""
        epochs, rest = divmod(self.num_steps * self.global_batch_size, len(self.mixture))
        taken = np.zeros(len(self.lengths), dtype=bool)
        for epoch in range(epochs):
            if taken[self.mixture.all_rows].all():
                break
            taken[self.mixture.epoch(epoch)] = True
        taken[self.mixture.epoch(epochs)[:rest]] = True
        return np.flatnonzero(taken)

    def micro_batches(self, step: int, rank: int) -> list[MicroBatch]:
        """Return the micro-batches of one rank for one step; every rank gets the same number of them."""
        batch = self.global_batch(step)
        num_bins = self.world_size * max(
            math.ceil(self.global_batch_size / (self.world_size * self.max_samples)),
            math.ceil(int(self.lengths[batch].sum()) / (self.world_size * (self.max_tokens or 2**62))),
        )
        while (bins := self._fill(batch, num_bins)) is None:
            num_bins += self.world_size
        rounds = self._rounds(bins)
        works = np.array([[self.costs[samples].sum() for samples in round_] for round_ in rounds])
        totals = works.sum(axis=0)
        supervised = int(self.num_supervised[batch].sum())
        return [
            MicroBatch(
                step,
                tuple(round_[rank]),
                number == len(rounds) - 1,
                supervised,
                spread=float(totals.max() / max(totals.mean(), 1e-300)),
            )
            for number, round_ in enumerate(rounds)
        ]

    def mean_spread(self, num_steps: int = 100) -> float:
        """Return the mean spread of (up to) so many steps, evenly taken from the whole run."""
        steps = np.unique(np.linspace(0, self.num_steps - 1, num_steps, dtype=np.int64))
        return float(np.mean([self.micro_batches(int(step), 0)[0].spread for step in steps]))

    def iterate(self, rank: int, start_step: int = 0) -> Iterator[MicroBatch]:
        """Yield all micro-batches of one rank from `start_step` on."""
        for step in range(start_step, self.num_steps):
            yield from self.micro_batches(step, rank)

    def _fill(self, batch: npt.NDArray[np.int64], num_bins: int) -> list[list[int]] | None:
        """Spread a batch over bins, costliest first into the least busy bin that has room; None when it does not fit.

        (Longest-processing-time rule, Graham 1969, with bounds on the samples and tokens of a bin.)
        """
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        num_tokens = [0] * num_bins
        least_busy = [(0.0, number) for number in range(num_bins)]
        for sample in sorted(batch.tolist(), key=lambda s: (-float(self.costs[s]), s)):
            length, too_full = int(self.lengths[sample]), []
            while (
                least_busy and self.max_tokens is not None and num_tokens[least_busy[0][1]] + length > self.max_tokens
            ):
                too_full.append(heapq.heappop(least_busy))
            if not least_busy:
                return None
            work, number = heapq.heappop(least_busy)
            bins[number].append(sample)
            num_tokens[number] += length
            if len(bins[number]) < self.max_samples:
                heapq.heappush(least_busy, (work + float(self.costs[sample]), number))
            for entry in too_full:
                heapq.heappush(least_busy, entry)
        return bins

    def _rounds(self, bins: list[list[int]]) -> list[list[list[int]]]:
        """Deal bins to micro-steps and ranks: `rounds[micro_step][rank]`.

        Bins that cost about the same run at the same time, since ranks wait for each other in every micro-step; within
        a round the costliest bin goes to the rank that has had least so far.
        """
        ordered = sorted(bins, key=lambda samples: (-float(self.costs[samples].sum()), samples))
        done = [0.0] * self.world_size
        rounds = []
        for start in range(0, len(ordered), self.world_size):
            round_: list[list[int]] = [[] for _ in range(self.world_size)]
            ranks = sorted(range(self.world_size), key=lambda rank: (done[rank], rank))
            for rank, samples in zip(ranks, ordered[start : start + self.world_size], strict=True):
                round_[rank] = samples
                done[rank] += float(self.costs[samples].sum())
            rounds.append(round_)
        return rounds


def check_world(global_batch_size: int, num_samples: int | None, world_size: int) -> None:
    """Check that a global batch can be dealt to so many processes.

    Raises:
        UserError: it does not divide, or there are more processes than samples.
    """
    if global_batch_size % world_size:
        below = global_batch_size // world_size * world_size
        nearest = f"{below} or {below + world_size}" if below else str(world_size)
        raise UserError(
            f"global_batch_size {global_batch_size} does not divide over {world_size} processes: choose a multiple of "
            f"the number of processes ({nearest}), or start another number of processes."
        )
    if num_samples is not None and num_samples < world_size:
        raise UserError(
            f"{world_size} processes are more than the {num_samples} samples to train on: start at most {num_samples} "
            "processes, or add data."
        )


def deal_in_order(batches: list[tuple[int, ...]], rank: int, world_size: int) -> list[tuple[MicroBatch, bool]]:
    """Deal batches to ranks for evaluation, the same number to each.

    Returns:
        This rank's batches, and whether each counts: some ranks repeat the last one to keep the others company.
    """
    num_rounds = math.ceil(len(batches) / world_size)
    mine = []
    for number in range(rank, num_rounds * world_size, world_size):
        counts = number < len(batches)
        mine.append((MicroBatch(0, batches[number] if counts else batches[-1], True, 0), counts))
    return mine


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

    Raises:
        UserError: they are too many to count.
    """
    steps = max_steps or math.ceil(num_samples * num_train_epochs / global_batch_size)
    if steps > _MOST_STEPS:
        raise UserError(f"num_train_epochs = {num_train_epochs:g}: {steps:.3g} steps. At most {_MOST_STEPS} are taken.")
    return steps
