"""The loop: packs in, optimizer steps, held-out loss, checkpoints, a graceful stop.

Comes in: an opened stage and an engine. Goes out: the run's result. All ranks run the same code; what differs between
engines is in `engine/`.
"""

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavaforge.checkpoint.resume import find_checkpoint
from llavaforge.checkpoint.state import ParameterStates, load_run, load_train_state
from llavaforge.data.load.pack import Pack
from llavaforge.device import compute_dtype
from llavaforge.engine.base import AdamWOptions, Engine, StepResult
from llavaforge.errors import UserError, is_out_of_memory
from llavaforge.model.compile import compile_layers, compiles
from llavaforge.model.liger import has_liger, use_liger
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import learning_rate
from llavaforge.progress import Bar
from llavaforge.results import TrainResult
from llavaforge.training.contract import Contract
from llavaforge.training.evaluation import held_out_loss
from llavaforge.training.guards import Guards
from llavaforge.training.metrics import MetricsFile
from llavaforge.training.opening import OpenedStage
from llavaforge.training.rehearsal import rehearse
from llavaforge.training.saving import Saver
from llavaforge.training.schedule import rate_factor, warmup
from llavaforge.training.signals import StopRequest
from llavaforge.training.state import TrainState
from llavaforge.training.step import OptimizerStep
from llavaforge.training.trackers import open_tracker

logger = logging.getLogger(__name__)


def prepare_or_resume(opened: OpenedStage, engine: Engine) -> TrainState:
    """Give the model to the engine, with the weights and moments of a checkpoint where there is one.

    Returns:
        Where the run stands.
    """
    config, world, loaded = opened.config, engine.world, opened.loaded
    world.at("preparing the model")
    step_module = StepModule(
        loaded.model, loaded.preprocessing, config.recompute_every, features_given=bool(opened.features)
    )
    if world.run_on_all(lambda: _compiles(opened, engine)):
        compile_layers(loaded.model, must=config.compile is True)
        logger.info("layers are compiled: the first step takes up to some minutes")
    elif engine.has_whole_weights and has_liger(world.device):  # under ZeRO-3 they gained nothing (LOG.md)
        logger.info("%d norms and MLPs use liger's kernels", use_liger(loaded.model))
    options = AdamWOptions.of(config)
    engine.prepare(step_module, opened.groups, options, compute_dtype(config.bf16))
    world.at("looking for a checkpoint")
    asked, allowed = config.resume_from_checkpoint, config.allow_changes
    folder = find_checkpoint(config.output_dir, asked, opened.run, allowed, world)
    if folder is None:
        return TrainState()
    world.at(f"loading {folder.name}")
    state, weights = world.run_on_all(lambda: _read(folder, opened))
    engine.restore(weights, state.step - state.num_skipped)
    logger.info("going on from %s", folder)
    _tell_of_schedule(folder, opened, state.step)
    return state


def _compiles(opened: OpenedStage, engine: Engine) -> bool:
    config, plan = opened.config, opened.plan
    return compiles(
        config.compile,
        engine.world.device,
        float(plan.costs.mean()) * plan.global_batch_size * plan.num_steps,
        has_whole_weights=engine.has_whole_weights,
        gradient_checkpointing=bool(config.recompute_every),
    )


def _read(folder: Path, opened: OpenedStage) -> tuple[TrainState, ParameterStates]:
    """Open a checkpoint, and check that it holds what learns here.

    Raises:
        UserError: it holds something else.
    """
    state, weights = TrainState.of(load_train_state(folder), folder), ParameterStates(folder)
    shapes = {name: shape for group in opened.groups for name, shape in group.shapes.items()}
    if different := weights.different(shapes):
        raise UserError(
            f"{folder}: holds other parameters than learn here (`{different[0]}`, {len(different)} in all). "
            "Give another output_dir."
        )
    if state.step > opened.plan.num_steps:
        raise UserError(
            f"{folder}: {state.step} steps were taken already, more than the {opened.plan.num_steps} asked for. Ask "
            "for more, or give another output_dir."
        )
    return state, weights


def _tell_of_schedule(folder: Path, opened: OpenedStage, step: int) -> None:
    """Say how the learning rate goes on where the number of steps was changed."""
    before, now, config = load_run(folder).get("num_steps"), opened.plan.num_steps, opened.config
    if before is None or before == now:
        return
    old, new = (
        rate_factor(step, number, warmup(number, config.warmup_ratio, config.warmup_steps), config.lr_scheduler_type)
        for number in (before, now)
    )
    rate = learning_rate(config)
    logger.warning(
        "the run has %d steps now instead of %d: from step %d on the learning rate follows the schedule of %d steps "
        "(%.3g there, where it was %.3g)", now, before, step + 1, now, rate * new, rate * old,
    )  # fmt: skip


class Trainer:
    """One stage of training.

    Args:
        opened: what it works with.
        engine: prepared.
        state: where the run stands.
    """

    def __init__(self, opened: OpenedStage, engine: Engine, state: TrainState) -> None:
        self._opened, self._engine, self._world, self._state = opened, engine, engine.world, state
        self._saver = Saver(opened, engine, state)
        self._guards = Guards(opened, engine, state, self._saver)
        self._contract = Contract(opened.loaded.model, opened.groups, engine, state.num_moving_steps)
        self._step = OptimizerStep(opened, engine, state)
        self._rehearses = engine.world.device.type != "cpu"  # whose memory ends in swapping, not in an error

    def train(self, stop: StopRequest) -> TrainResult:
        """Take all steps that are left.

        Args:
            stop: looked at before every step.

        Returns:
            The JSON line of `llavaforge train`.
        """
        config, state, world, plan = self._opened.config, self._state, self._world, self._opened.plan
        file = MetricsFile(config.output_dir, state.step) if world.is_writer else None
        order, pin_memory = plan.iterate(world.rank, state.step), world.device.type == "cuda"
        with (
            self._opened.packs(self._opened.data.index, order, pin_memory) as packs,
            Bar("training", not world.is_writer, state.step / max(1, plan.num_steps), log_ends=True) as bar,
            open_tracker(config.report_to if world.is_writer else "none", config.output_dir) as tracker,
        ):
            while state.step < plan.num_steps:
                begin_s = time.perf_counter()
                world.at_step(state.step + 1, "reading images")
                mine, fault = _fetch(packs)
                self._guards.agree(fault, stop)
                result, line = self._take(mine, begin_s)
                self._guards.look_at(result, line)
                self._contract.prove_when_due(state)
                if self._is_due(config.eval_steps) or self._is_last():
                    self._evaluate(line)
                if self._is_due(config.logging_steps) or "eval_loss" in line:
                    self._show(bar, line)
                    tracker(line)
                    if file is not None:
                        file.write(**line)
                if self._is_due(config.save_steps):
                    self._saver.save()
        self._guards.check_learnt()
        self._contract.warn_unless_proved()
        self._guards.bad_samples.log_summary()
        self._saver.draw()
        return self._result()

    def _take(self, packs: list[Pack], begin_s: float) -> tuple[StepResult, dict[str, Any]]:
        """Take a step with its packs."""
        num_supervised = self._guards.leave_out(packs)
        try:
            taken = self._step(packs, num_supervised, begin_s)
            if self._rehearses and not self._is_last():
                rehearse(self._opened, self._engine)
            self._rehearses = False
            return taken
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._guards.out_of_memory(error, weights_are_whole=not self._step.is_updating)

    def _evaluate(self, line: dict[str, Any]) -> None:
        """Put the held-out loss, if there is held-out data, into a line of metrics."""
        if (held_out := self._opened.data.held_out) is not None:
            loss, faults = held_out_loss(self._opened, held_out, self._engine, self._state.step)
            self._guards.list_bad(self._state.step, faults, held_out=True)
            line["eval_loss"] = self._state.eval_loss = loss

    def _show(self, bar: Bar, line: dict[str, Any]) -> None:
        num_steps = self._opened.plan.num_steps
        position = f"step {line['step']}/{num_steps}"
        if self._world.is_writer and "eval_loss" in line:
            logger.info("%s  held-out loss %.4f", position, line["eval_loss"])
        status = f"{position}  loss {line['loss']:.3f}  {line['tokens_per_s']:.0f} tokens/s  "
        bar.update(line["step"] / num_steps, status)

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self._state.step % every == 0 or self._is_last())

    def _is_last(self) -> bool:
        return self._state.step == self._opened.plan.num_steps

    def _result(self) -> TrainResult:
        state, seconds = self._state, max(self._state.train_time_s, math.ulp(1.0))
        return {
            "output_dir": str(self._opened.config.output_dir),
            "global_step": state.step,
            "train_loss": state.train_loss,
            "eval_loss": state.eval_loss,
            "samples_per_s": state.num_samples / seconds,
            "tokens_per_s": state.num_tokens / seconds,
            "mfu": min(1.0, state.model_flops / seconds / self._step.peak_flops),  # may have begun on a faster device
            "peak_memory_bytes": self._engine.peak_memory_bytes(),
            "num_bad_samples": len(self._guards.bad_samples),
        }


def _fetch(packs: Iterator[Pack]) -> tuple[list[Pack], UserError | None]:
    """Return all packs of the next step, or the fault that one of them has."""
    fetched: list[Pack] = []
    try:
        while not fetched or not fetched[-1].source.is_last_of_step:
            fetched.append(next(packs))
    except UserError as error:
        return [], error
    return fetched, None
