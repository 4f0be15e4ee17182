"""The learning rate over the run, as a factor of each group's peak rate."""

import math
from typing import Literal


def rate_factor(step: int, num_steps: int, warmup_steps: int, kind: Literal["cosine", "linear", "constant"]) -> float:
    """Return the factor for one step, as transformers' schedules of the same names give it.

    It rises linearly from 0 over `warmup_steps`, then falls to 0 at `num_steps` (or stays, for `constant`).

    Args:
        step: 0-based number of the step about to be taken.
        num_steps: steps of the run.
        warmup_steps: steps of the rise.
        kind: shape after the rise; cosine is Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0 - done if kind == "linear" else 1.0


def warmup(num_steps: int, warmup_ratio: float, warmup_steps: int | None) -> int:
    """Return the number of warm-up steps: as given, or the ratio rounded up."""
    return math.ceil(num_steps * warmup_ratio) if warmup_steps is None else warmup_steps
