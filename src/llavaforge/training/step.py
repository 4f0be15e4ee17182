"""One optimizer step: forward and backward of every pack of a global batch, the update, and what is counted of it."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from llavaforge.clock import COMMUNICATION, LANGUAGE_MODEL, OPTIMIZER, OTHER, Clock
from llavaforge.data.load.pack import Pack
from llavaforge.device import compute_dtype
from llavaforge.engine.base import Engine, StepResult
from llavaforge.model.compile import is_compiled
from llavaforge.model.trainable import learning_rate
from llavaforge.training.opening import OpenedStage
from llavaforge.training.peak_flops import peak_flops
from llavaforge.training.schedule import rate_factor, warmup
from llavaforge.training.state import TrainState
from llavaforge.training.usage import Usage

logger = logging.getLogger(__name__)


class OptimizerStep:
    """Takes steps, and keeps the counts of `state`.

    Args:
        opened: the stage.
        engine: prepared.
        state: where the run stands; advanced by each step.
        clock: told what is done when.

    Attributes:
        is_updating: weights are being changed, or were when a step failed.
        usage: of all steps of this start.
    """

    def __init__(self, opened: OpenedStage, engine: Engine, state: TrainState, clock: Clock) -> None:
        self._opened, self._engine, self._world, self.state = opened, engine, engine.world, state
        config, self.is_updating = opened.config, False
        self._clock, self.usage = clock, Usage()
        self._compiles = is_compiled(opened.loaded.model)  # in the first micro-step, which may take longer than others
        self._warmup = warmup(opened.plan.num_steps, config.warmup_ratio, config.warmup_steps)
        self.peak_flops = peak_flops(self._world.device, compute_dtype(config.bf16)) * self._world.size

    def __call__(self, packs: Sequence[Pack], num_supervised: int, begin_s: float) -> tuple[StepResult, dict[str, Any]]:
        """Do one step.

        Args:
            packs: this process's part of the global batch.
            num_supervised: supervised tokens of the whole of it.
            begin_s: `time.perf_counter()` when its images were asked for.

        Returns:
            What the engine did, and the step's line of metrics; loss and tokens are those of the whole global batch.
        """
        opened, state, world = self._opened, self.state, self._world
        # Dropout differs per step and rank but not between a resumed and an uninterrupted run.
        torch.manual_seed((opened.config.seed << 32) + state.step * world.size + world.rank)
        losses: list[torch.Tensor] = []
        for number, pack in enumerate(packs, 1):
            where = f"step {state.step + 1}: forward and backward of micro-step {number} of {len(packs)}"
            world.at(where, timed=not self._compiles)
            self._compiles = False
            self._clock.begin(LANGUAGE_MODEL)
            losses.append(self._engine.micro_step(pack, 1.0 / num_supervised))
        world.at_step(state.step + 1, "optimizer step")
        factor = rate_factor(state.step, opened.plan.num_steps, self._warmup, opened.config.lr_scheduler_type)
        self._clock.begin(OPTIMIZER)
        self.is_updating = True
        result = self._engine.step(factor)
        self.is_updating = False
        self._clock.begin(OTHER)
        mine = sum(torch.stack(losses).tolist())  # the one wait for the device
        flops = self._count(packs)
        with self._clock.during(COMMUNICATION):
            loss_sum, num_tokens, flops = world.all_reduce_sum([mine, sum(pack.num_tokens for pack in packs), flops])
        seconds = time.perf_counter() - begin_s
        if not result.skipped:
            state.loss_sum += loss_sum
            state.num_supervised += num_supervised
        state.step += 1
        state.num_samples += opened.plan.global_batch_size
        state.num_moving_steps += factor > 0 and not result.skipped
        state.num_tokens += int(num_tokens)
        state.model_flops += flops
        state.train_time_s += seconds
        return result, {
            "step": state.step,
            "epoch": round(state.num_samples / len(opened.plan.mixture), 4),
            "loss": loss_sum / num_supervised,
            "grad_norm": result.grad_norm,
            "learning_rate": learning_rate(opened.config) * factor,
            "num_supervised": num_supervised,
            "spread": packs[0].source.spread,
            "num_tokens": int(num_tokens),
            "step_time_s": seconds,
            "samples_per_s": opened.plan.global_batch_size / seconds,
            "tokens_per_s": num_tokens / seconds,
            "mfu": self._mfu(flops / seconds),
        }

    def _count(self, packs: Sequence[Pack]) -> float:
        """Add this process's packs, and the time until here, to its usage; return the model FLOPs."""
        flops: Counter[str] = Counter()
        again = 0.0
        for pack in packs:
            flops.update(self._opened.flops.by_part(pack.lengths, pack.num_images, pack.num_supervised))
            again += self._opened.flops.recomputed(pack.lengths, self._opened.config.recompute_every)
        self.usage.add(self._clock.read(), flops, again)
        return sum(flops.values())

    def _mfu(self, rate: float) -> float:
        """Return the share of the peak that a step reached; a peak that it passed was too low, and is raised."""
        if rate > self.peak_flops:
            if self._world.is_writer:
                told = "a step reached %.3g FLOP/s, more than the peak of %.3g: MFU is against that from now on"
                logger.warning(told, rate, self.peak_flops)
            self.peak_flops = rate
        return rate / self.peak_flops
