"""The loop: packs in, optimizer steps, held-out loss, checkpoints, a graceful stop.

Comes in: an opened stage and an engine. Goes out: the run's result. All ranks run the same code; what differs between
engines is in `engine/`.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from llavaforge.checkpoint.identity import note_earlier
from llavaforge.checkpoint.resume import find_checkpoint, leave_others
from llavaforge.checkpoint.state import ParameterStates, load_run, load_train_state
from llavaforge.clock import COMMUNICATION, DATA, EVALUATION, OTHER, SAVING, Clock
from llavaforge.data.load.pack import Pack
from llavaforge.device import compute_dtype
from llavaforge.engine.base import AdamWOptions, Engine, StepResult
from llavaforge.errors import StoppedEarly, UserError, is_out_of_memory
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
from llavaforge.training.profile import Profiler
from llavaforge.training.rehearsal import rehearse
from llavaforge.training.report import Reporter
from llavaforge.training.sample_answers import SampleAnswers
from llavaforge.training.saving import Saver
from llavaforge.training.schedule import rate_factor, warmup
from llavaforge.training.signals import StopRequest
from llavaforge.training.state import TrainState
from llavaforge.training.step import OptimizerStep
from llavaforge.training.trackers import open_trackers
from llavaforge.training.usage import Usage, memory_by_part

logger = logging.getLogger(__name__)


def prepare_or_resume(opened: OpenedStage, engine: Engine, clock: Clock) -> TrainState:
    """Give the model to the engine, with the weights and moments of a checkpoint where there is one.

    Args:
        opened: the stage.
        engine: takes the model over.
        clock: that the model is to tell what it is at.

    Returns:
        Where the run stands.
    """
    config, world, loaded = opened.config, engine.world, opened.loaded
    world.at("preparing the model")
    step_module = StepModule(
        loaded.model, loaded.preprocessing, config.recompute_every, clock, features_given=bool(opened.features)
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
    world.run_on_all(lambda: note_earlier(opened.run, load_run(folder)))
    engine.restore(weights, state.step - state.num_skipped)
    world.run_on_all(lambda: leave_others(config.output_dir, folder, state.step) if world.is_writer else None)
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
        clock: that the model tells what it is at.
    """

    def __init__(self, opened: OpenedStage, engine: Engine, state: TrainState, clock: Clock) -> None:
        self._opened, self._engine, self._world, self._state = opened, engine, engine.world, state
        self._saver = Saver(opened, engine, state)
        self._guards = Guards(opened, engine, state, self._saver)
        self._contract = Contract(opened.loaded.model, opened.groups, engine, state.num_moving_steps)
        self._step = OptimizerStep(opened, engine, state, clock)
        self._clock, self._shown = clock, Usage()
        held_out, num_asked = opened.data.held_out, opened.config.eval_generate_samples
        self._sample_answers: SampleAnswers | None = None
        if held_out is not None and state.judge_by(f"{opened.config.metric_for_best_model} of {held_out.identity}"):
            logger.warning("evaluations are judged otherwise than before: the best step is looked for anew")
        if held_out is not None and num_asked:
            asked = partial(SampleAnswers, opened, held_out, engine.world, state.step)
            self._sample_answers = engine.world.run_on_all(asked)
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
        trackers = [name for name in config.report_to if name != "none"] if world.is_writer else []
        order, pin_memory = plan.iterate(world.rank, state.step), world.device.type == "cuda"
        with (
            self._opened.packs(self._opened.data.index, order, pin_memory) as packs,
            Bar("training", not world.is_writer, state.step / max(1, plan.num_steps), log_ends=True) as bar,
            open_trackers(trackers, config.output_dir, self._opened.run["config"], state.step) as tracker,
            self._saver,
            self._reported() as reported,
            self._profiled() as profiled,
        ):
            self._clock.read()  # what came before the first step is none of its parts
            while state.step < plan.num_steps and not self._ends_early():
                begin_s = time.perf_counter()
                world.at_step(state.step + 1, "reading images")
                self._clock.begin(DATA)
                mine, fault = _fetch(packs)
                with self._clock.during(COMMUNICATION):
                    num_supervised, is_written = self._guards.agree(mine, fault, stop)
                self._clock.begin(OTHER)
                result, line = self._take(mine, num_supervised, begin_s)
                if is_written:
                    with self._clock.during(SAVING):
                        self._saver.finish()  # after the step, whose time it is no part of
                self._guards.look_at(result, line)
                self._contract.prove_when_due(state)
                is_best = False
                if self._is_due(config.eval_steps) or self._is_last():
                    with self._clock.during(EVALUATION):
                        is_best = self._evaluate(line)
                if self._is_due(config.save_steps) or (is_best and config.load_best_model_at_end):
                    with self._clock.during(SAVING):
                        self._saver.save()
                if self._is_due(config.logging_steps) or "eval_loss" in line:
                    line |= self._saver.take_times()
                    self._show(bar, line)
                    if trackers:
                        world.at("sending metrics")  # untimed: a server may not answer
                        tracker(line)
                    if file is not None:
                        file.write(**line)
                    reported()
                profiled()
        if self._ends_early() and not self._is_last():
            told = "stopped early at step %d of %d: no better %s than %s, at step %s"
            best = config.metric_for_best_model, state.best_metric, state.best_step
            logger.info(told, state.step, plan.num_steps, *best)
        self._step.usage.add(self._clock.read())
        logger.info("time: %s", self._step.usage)
        self._guards.check_learnt()
        self._contract.warn_unless_proved()
        self._guards.bad_samples.log_summary()
        self._saver.draw()
        return self._result()

    def _take(self, packs: list[Pack], num_supervised: int, begin_s: float) -> tuple[StepResult, dict[str, Any]]:
        """Take a step with its packs."""
        try:
            taken = self._step(packs, num_supervised, begin_s)
            if self._rehearses and not self._is_last():
                rehearse(self._opened, self._engine)
                logger.info(memory_by_part(self._opened, self._engine))
            self._rehearses = False
            return taken
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._guards.out_of_memory(error, weights_are_whole=not self._step.is_updating)

    def _evaluate(self, line: dict[str, Any]) -> bool:
        """Put the held-out loss and metrics, if there is held-out data, into a line; say whether they are the best."""
        if (held_out := self._opened.data.held_out) is None:
            return False
        state = self._state
        loss, faults = held_out_loss(self._opened, held_out, self._engine, state.step)
        self._guards.list_bad(state.step, faults, held_out=True)
        line["eval_loss"] = state.eval_loss = loss
        if self._sample_answers is not None:
            line |= self._sample_answers(state.step)
        name = f"eval_{self._opened.config.metric_for_best_model.removeprefix('eval_')}"
        if name not in line:  # no image of the samples that are asked can be read
            logger.warning("step %d: %s was not measured, so this step is not judged", state.step, name)
            return False
        return state.add_evaluation(line[name], lowest_is_best=name == "eval_loss")

    def _ends_early(self) -> bool:
        patience = self._opened.config.early_stopping_patience
        return bool(patience) and self._state.num_worse >= patience

    @contextmanager
    def _reported(self) -> Iterator[Callable[[], None]]:
        """Give a function to call after every line of metrics; at the end of the block the run's page is written."""
        if not self._world.is_writer:
            yield lambda: None
            return
        reporter = Reporter(self._opened, self._sample_answers)
        try:
            yield reporter.write_when_due
        except (StoppedEarly, UserError) as stop:
            reporter.write(f"has ended before its last step: {stop}")
            raise
        reporter.write("is finished" if self._is_last() else "was stopped early")

    @contextmanager
    def _profiled(self) -> Iterator[Callable[[], None]]:
        """Give a function to call after every step; within the block some of them are recorded if that is asked for."""
        config, state = self._opened.config, self._state
        if not config.profile or state.step == self._opened.plan.num_steps:
            yield lambda: None
            return
        profiler = Profiler(config.output_dir, self._clock, self._world, state.step, self._opened.plan.num_steps)
        with profiler.recording(lambda: f"{self._step.usage}\n{memory_by_part(self._opened, self._engine)}"):
            yield profiler.step

    def _show(self, bar: Bar, line: dict[str, Any]) -> None:
        """Put into a line what was used since the last one, and show it."""
        self._step.usage.add(self._clock.read())
        usage = self._step.usage.since(self._shown)
        self._shown = self._step.usage.copy()
        line |= usage.metrics(self._step.peak_flops / self._world.size)
        num_steps = self._opened.plan.num_steps
        position = f"step {line['step']}/{num_steps}"
        if self._world.is_writer and "eval_loss" in line:
            logger.info("%s  held-out loss %.4f", position, line["eval_loss"])
        status = f"{position}  loss {line['loss']:.3f}  {line['tokens_per_s']:.0f} tokens/s  "
        status += usage.waiting()
        bar.update(line["step"] / num_steps, status)

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self._state.step % every == 0 or self._is_last() or self._ends_early())

    def _is_last(self) -> bool:
        return self._state.step == self._opened.plan.num_steps

    def _result(self) -> TrainResult:
        state, seconds = self._state, max(self._state.train_time_s, math.ulp(1.0))
        return {
            "output_dir": str(self._opened.config.output_dir),
            "global_step": state.step,
            "train_loss": state.train_loss,
            "eval_loss": state.eval_loss,
            "best_metric": state.best_metric,
            "best_step": state.best_step,
            "stopped_early": self._ends_early() and not self._is_last(),
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
