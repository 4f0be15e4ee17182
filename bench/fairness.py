"""The benchmark's proof that all sides do the same work; without it no figure is reported."""

import math
from collections.abc import Mapping, Sequence

from bench.scenarios import Side

# The same weights and samples: float32 sums in another order, or bfloat16 by autocast against bfloat16 weights.
FIRST_LOSS_BOUND = {False: 1e-4, True: 2e-2}
# After some updates with the same optimizer; under LoRA the sides draw their own starting matrices.
LATER_LOSS_BOUND = {False: 5e-3, True: 5e-2}


class Unfair(RuntimeError):
    """The sides do not do the same work, so comparing their speed would mean nothing."""


def check_first_loss(first: Mapping[Side, float], bf16: bool = False) -> None:
    """Check that all sides begin with the same loss on the same samples.

    Raises:
        Unfair: they do not.
    """
    _check_close(first, FIRST_LOSS_BOUND[bf16], "step 1")


def check_losses(losses: Mapping[Side, Sequence[float]], bf16: bool = False) -> None:
    """Check that the losses of all steps stay together: same samples, same learning rates.

    Raises:
        Unfair: they part.
    """
    check_first_loss({side: values[0] for side, values in losses.items()}, bf16)
    for step in range(1, min(len(values) for values in losses.values())):
        _check_close(
            {side: values[step] for side, values in losses.items()}, LATER_LOSS_BOUND[bf16], f"step {step + 1}"
        )


def check_counts(
    counts: Mapping[Side, Mapping[str, Sequence[int]]],
    num_learning: Mapping[Side, int],
    supervised: Sequence[int],
    tokens: Sequence[int],
    batch_size: int,
) -> None:
    """Check that as many parameters learn, from as many tokens.

    Of all tokens llavaforge has one more per sample: the newline that the chat template writes after the last answer.

    Args:
        counts: `supervised` and `tokens` of each step, as told by each side.
        num_learning: parameters in each side's optimizer.
        supervised: of each step, from the index.
        tokens: of each step, from the index.
        batch_size: samples per step.

    Raises:
        Unfair: they differ.
    """
    if len(set(num_learning.values())) != 1:
        raise Unfair(f"different numbers of parameters learn: {dict(num_learning)}")
    for side, told in counts.items():
        if list(told["supervised"]) != list(supervised[: len(told["supervised"])]):
            raise Unfair(f"supervised tokens per step: {side} {told['supervised']}, the index {list(supervised)}")
        if any(not 0 <= ours - theirs <= batch_size for ours, theirs in zip(tokens, told["tokens"], strict=False)):
            raise Unfair(f"tokens per step: {side} {told['tokens']}, the index {list(tokens)}")


def _check_close(values: Mapping[Side, float], bound: float, where: str) -> None:
    low, high = min(values.values()), max(values.values())
    if not all(map(math.isfinite, values.values())) or high - low > bound * abs(low):
        raise Unfair(f"{where}: the losses differ by more than {bound:g} relative: {dict(values)}")
