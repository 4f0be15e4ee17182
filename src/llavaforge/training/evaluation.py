"""The held-out loss while a run goes on."""

from llavaforge.data.faults import Fault
from llavaforge.data.order.plan import deal_in_order, in_order
from llavaforge.data.order.run_data import HeldOut
from llavaforge.engine.base import Engine
from llavaforge.training.opening import OpenedStage


def held_out_loss(opened: OpenedStage, held_out: HeldOut, engine: Engine, step: int) -> tuple[float, list[Fault]]:
    """Return the loss per supervised token over all processes, and the faults of images that this one could not read.

    Args:
        opened: the stage.
        held_out: what is evaluated.
        engine: prepared; all processes call it equally often.
        step: steps done, for the message when a process is lost.
    """
    config, index, world = opened.config, held_out.index, engine.world
    batches = in_order(index.lengths, held_out.rows, config.max_samples_per_batch, config.most_tokens)
    mine = deal_in_order(batches, world.rank, world.size)
    loss, count = 0.0, 0
    faults: list[Fault] = []
    with opened.packs(index, [batch for batch, _ in mine], world.device.type == "cuda") as packs:
        for (_, counts), pack in zip(mine, packs, strict=True):
            world.at_step(step + 1, "held-out loss")
            pack_loss = engine.loss_sum(pack)
            loss, count = loss + counts * pack_loss, count + counts * pack.num_supervised
            faults += [one.fault for one in pack.bad]
    total_loss, total_count = world.all_reduce_sum([loss, count])
    return total_loss / total_count, faults
