"""What training on prepared data would look like: steps, packs, tokens.

Comes in: a plan. Goes out: a `Forecast`.
"""

from dataclasses import dataclass

import numpy as np

from llavaforge.data.order.plan import Plan

_NUM_STEPS = 100  # looked at, evenly over an epoch


@dataclass(frozen=True)
class Forecast:
    """Numbers of one epoch on one process."""

    samples_per_epoch: int
    tokens_per_epoch: int  # with image tokens, without any padding
    steps_per_epoch: int  # optimizer steps
    global_batch_size: int
    micro_batches_per_step: float  # mean
    tokens_per_micro_batch: float  # mean
    most_tokens_per_micro_batch: int  # largest seen
    padding_avoided: float  # share that would be padding if all samples of a micro-batch were as long as its longest


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
