"""What training on prepared data would look like: steps, packs, tokens.

Comes in: a plan. Goes out: a `Forecast`.
"""

from dataclasses import dataclass

import numpy as np

from llavaforge.data.order.plan import Plan

_NUM_STEPS = 100  # looked at, evenly over an epoch


@dataclass(frozen=True)
class Forecast:
    """Numbers of one epoch on one process.

    Attributes:
        samples_per_epoch: of the mixture.
        tokens_per_epoch: with image tokens, without any padding.
        steps_per_epoch: optimizer steps.
        global_batch_size: samples per step.
        micro_batches_per_step: mean.
        tokens_per_micro_batch: mean.
        most_tokens_per_micro_batch: largest seen.
        padding_avoided: share of a micro-batch that would be padding if all samples had the length of its longest.
    """

    samples_per_epoch: int
    tokens_per_epoch: int
    steps_per_epoch: int
    global_batch_size: int
    micro_batches_per_step: float
    tokens_per_micro_batch: float
    most_tokens_per_micro_batch: int
    padding_avoided: float


def forecast(plan: Plan) -> Forecast:
    """Look at steps of a plan of one epoch."""
    steps = np.unique(np.linspace(0, plan.num_steps - 1, _NUM_STEPS, dtype=np.int64))
    packs = [[plan.lengths[list(micro.samples)] for micro in plan.micro_batches(int(step), 0)] for step in steps]
    lengths = [pack for step in packs for pack in step]
    tokens = np.array([pack.sum() for pack in lengths])
    padded = sum(len(pack) * int(pack.max()) for pack in lengths)
    return Forecast(
        samples_per_epoch=len(plan.mixture),
        tokens_per_epoch=int(plan.lengths[plan.mixture.epoch(0)].sum()),
        steps_per_epoch=plan.num_steps,
        global_batch_size=plan.global_batch_size,
        micro_batches_per_step=float(np.mean([len(step) for step in packs])),
        tokens_per_micro_batch=float(tokens.mean()),
        most_tokens_per_micro_batch=int(tokens.max()),
        padding_avoided=1 - float(tokens.sum()) / padded,
    )
