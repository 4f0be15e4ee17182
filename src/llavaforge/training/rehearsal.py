"""The largest micro-batch early in a run: what does not fit fails in the first minute, not in the first night.

Comes in: a plan and an engine that has taken a step, so that its moments exist. Goes out: nothing; the loss is
multiplied by zero, so no gradient changes.
"""

import numpy as np

from llavaforge.data.load.pack import make_pack
from llavaforge.data.order.plan import MicroBatch
from llavaforge.engine.base import Engine
from llavaforge.training.opening import OpenedStage

_NUM_STEPS = 200
"""Steps that are looked at, evenly taken from the run: the most of so many is hardly ever surpassed."""


def rehearse(opened: OpenedStage, engine: Engine) -> None:
    """Run forward and backward of the largest micro-batch with grey images; all processes call this together."""
    largest, world = largest_micro_batch(opened, engine.world.rank), engine.world
    rows = [opened.data.index.row(number) for number in largest.samples]
    blank = opened.dataset(opened.data.index, masks_bad=False).blank()
    images = [blank for row in rows for _ in row.images]
    source = MicroBatch(largest.step, largest.samples, False, 1)
    world.at("rehearsing the largest micro-batch", timed=False)
    ids = opened.loaded.image_token_id, opened.loaded.num_image_tokens
    engine.micro_step(make_pack(rows, images, *ids, source), 0.0)


def largest_micro_batch(opened: OpenedStage, rank: int) -> MicroBatch:
    """Return the one with most tokens among those of many steps."""
    plan, lengths = opened.plan, opened.plan.lengths
    steps = np.unique(np.linspace(0, plan.num_steps - 1, _NUM_STEPS).astype(int))
    every = (micro for step in steps for micro in plan.micro_batches(int(step), rank))
    return max(every, key=lambda micro: int(lengths[list(micro.samples)].sum()))
