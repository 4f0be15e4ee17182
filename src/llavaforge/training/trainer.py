"""The loop: packs in, optimizer steps, held-out loss, checkpoints, a graceful stop.

Comes in: everything that `training/run.py` opened. Goes out: the run's result. All ranks run the same code; what
differs between engines is in `engine/`.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from llavaforge.checkpoint import state as checkpoints
from llavaforge.checkpoint.resume import find_checkpoint
from llavaforge.config.schema import TrainConfig
from llavaforge.data.faults import Fault
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.load.loader import PackDataset, loading
from llavaforge.data.load.pack import Pack
from llavaforge.data.order.plan import Plan, deal_in_order, in_order
from llavaforge.data.text.sample import Sample
from llavaforge.engine.base import AdamWOptions, Engine
from llavaforge.errors import StoppedEarly, UserError
from llavaforge.model.flops import FlopCounter
from llavaforge.model.load import LoadedModel, compute_dtype
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import Group, learning_rate
from llavaforge.progress import Bar
from llavaforge.results import TrainResult
from llavaforge.training.bad_samples import BadSamples
from llavaforge.training.contract import STEPS_BEFORE_PROOF, Contract, show_groups, show_sample
from llavaforge.training.metrics import MetricsFile, draw_curve, peak_flops
from llavaforge.training.opening import HeldOut
from llavaforge.training.schedule import rate_factor, warmup
from llavaforge.training.signals import StopRequest
from llavaforge.training.state import TrainState
from llavaforge.training.trackers import open_tracker

logger = logging.getLogger(__name__)

_MOST_SKIPPED_IN_A_ROW = 3


class Trainer:
    """One stage of training.

    Args:
        config: the stage.
        engine: not yet prepared.
        loaded: the model to train.
        groups: what of it learns; everything else is frozen.
        flops: counts the work of packs.
        index: training samples.
        plan: their order.
        held_out: what the held-out loss is measured on, or None.
        bad_samples: what is left out.
        run: written into every checkpoint.
        console: for tables (quiet on all processes but the writer).
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        loaded: LoadedModel,
        groups: Sequence[Group],
        flops: FlopCounter,
        index: SampleIndex,
        plan: Plan,
        held_out: HeldOut | None,
        bad_samples: BadSamples,
        run: dict[str, Any],
        console: Console,
    ) -> None:
        self._config, self._engine, self._world = config, engine, engine.world
        self._loaded, self._groups, self._flops, self._index = loaded, groups, flops, index
        self._plan, self._held_out, self._run, self._console = plan, held_out, run, console
        self._bad_samples = bad_samples
        self._state = TrainState()
        self._dtype = compute_dtype(config.bf16)
        self._warmup = warmup(plan.num_steps, config.warmup_ratio, config.warmup_steps)
        self._skipped_in_a_row = 0

    def resume(self) -> None:
        """Prepare the engine, go on from a checkpoint, show the contract."""
        config, model, world = self._config, self._loaded.model, self._world
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        step_module = StepModule(model, self._loaded.preprocessing, config.gradient_checkpointing)
        options = AdamWOptions(config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.max_grad_norm)
        world.at("preparing the model")
        self._engine.prepare(step_module, self._groups, options, self._dtype)
        world.at("looking for a checkpoint")
        folder = find_checkpoint(config.output_dir, config.resume_from_checkpoint, self._run, world)
        if folder is not None:
            world.at(f"loading {folder.name}")
            self._state = TrainState(**checkpoints.load_train_state(folder))
            applied = self._state.step - self._state.num_skipped
            self._engine.restore(checkpoints.ParameterStates(folder), applied)
            logger.info("going on from %s", folder)
        self._bad_samples.resume(self._state.step, self._state.bad_samples)
        show_groups(self._groups, num_parameters, self._console)
        self._show_first_sample()
        self._contract = Contract(model, self._groups, self._engine)
        self._prove_at = self._state.num_moving_steps + STEPS_BEFORE_PROOF

    def train(self, stop: StopRequest) -> TrainResult:
        """Take all steps that are left.

        Args:
            stop: looked at before every step.

        Returns:
            The JSON line of `llavaforge train`.
        """
        config, world, plan = self._config, self._world, self._plan
        peak = peak_flops(world.device, self._dtype) * world.size
        writer = MetricsFile(config.output_dir, self._state.step) if world.is_writer else None
        order = plan.iterate(world.rank, self._state.step)
        with (
            loading(self._dataset(self._index), order, config.dataloader_num_workers, self._pins()) as packs,
            Bar("training", not world.is_writer, self._state.step / max(1, plan.num_steps), log_ends=True) as bar,
            open_tracker(config.report_to if world.is_writer else "none", config.output_dir) as tracker,
        ):
            while self._state.step < plan.num_steps:
                begin = time.perf_counter()
                self._at("reading images")
                step_packs, fault = self._fetch(packs)
                self._agree(fault, stop)
                line = self._step(step_packs, self._leave_out(step_packs))
                line |= self._measure(step_packs, time.perf_counter() - begin, line["loss"], peak)
                if self._held_out is not None and (self._is_due(config.eval_steps) or self._is_last()):
                    line["eval_loss"] = self._state.eval_loss = self._evaluate()
                if self._is_due(config.logging_steps) or "eval_loss" in line:
                    self._show(bar, line)
                    tracker(line)
                    if writer is not None:
                        writer.write(**line)
                if self._is_due(config.save_steps):
                    self._save()
        if self._state.num_moving_steps < self._prove_at:
            logger.warning("contract not proved: that takes %d steps with a learning rate above 0", STEPS_BEFORE_PROOF)
        self._bad_samples.log_summary()
        self._draw()
        return self._result(peak)

    def _step(self, packs: list[Pack], num_supervised: int) -> dict[str, Any]:
        """Do one optimizer step and return its line of metrics; the loss is that of the whole global batch."""
        config, state = self._config, self._state
        # Dropout differs per step and rank but not between a resumed and an uninterrupted run.
        torch.manual_seed((config.seed << 32) + state.step * self._world.size + self._world.rank)
        loss_sum = 0.0
        for number, pack in enumerate(packs, 1):
            self._at(f"forward and backward of micro-step {number} of {len(packs)}")
            loss_sum += self._engine.micro_step(pack, 1.0 / num_supervised)
        self._at("optimizer step")
        factor = rate_factor(state.step, self._plan.num_steps, self._warmup, config.lr_scheduler_type)
        result = self._engine.step(factor)
        loss_sum = self._world.all_reduce_sum([loss_sum])[0]
        self._count_skips(result.skipped)
        if not result.skipped:
            state.loss_sum += loss_sum
            state.num_supervised += num_supervised
        state.step += 1
        state.num_samples += self._plan.global_batch_size
        state.num_moving_steps += factor > 0
        if state.num_moving_steps == self._prove_at and factor > 0:
            self._contract.prove()
            logger.info("contract proved after step %d: what should learn moved, what is frozen did not", state.step)
        return {
            "step": state.step,
            "epoch": round(state.num_samples / len(self._plan.mixture), 4),
            "loss": loss_sum / num_supervised,
            "grad_norm": result.grad_norm,
            "learning_rate": learning_rate(config) * factor,
            "num_supervised": num_supervised,
            "spread": packs[0].source.spread,
        }

    def _show(self, bar: Bar, line: dict[str, Any]) -> None:
        place = f"step {line['step']}/{self._plan.num_steps}"
        if self._world.is_writer and "eval_loss" in line:
            logger.info("%s  held-out loss %.4f", place, line["eval_loss"])
        share = line["step"] / self._plan.num_steps
        bar.update(share, f"{place}  loss {line['loss']:.3f}  {line['tokens_per_s']:.0f} tokens/s  ")

    def _at(self, what: str) -> None:
        self._world.at(f"step {self._state.step + 1}: {what}", timed=True)

    def _measure(self, packs: list[Pack], seconds: float, loss: float, peak: float) -> dict[str, Any]:
        flops = sum(self._flops.step(pack.lengths, pack.num_images, pack.num_supervised) for pack in packs)
        tokens, flops = self._world.all_reduce_sum([sum(pack.num_tokens for pack in packs), flops])
        self._state.num_tokens += int(tokens)
        self._state.model_flops += flops
        self._state.train_time_s += seconds
        return {
            "num_tokens": int(tokens),
            "step_time_s": seconds,
            "samples_per_s": self._plan.global_batch_size / seconds,
            "tokens_per_s": tokens / seconds,
            "mfu": flops / seconds / peak,
        }

    def _fetch(self, packs: Iterator[Pack]) -> tuple[list[Pack], UserError | None]:
        """Return all packs of the next step, or the fault that one of them has."""
        fetched: list[Pack] = []
        try:
            while not fetched or not fetched[-1].source.is_last_of_step:
                fetched.append(next(packs))
        except UserError as error:
            return [], error
        return fetched, None

    def _agree(self, fault: UserError | None, stop: StopRequest) -> None:
        """Stop on all processes when one must: save first, so that nothing is lost."""
        self._at("waiting for the other processes to have read their images")
        has_fault, code = self._world.all_reduce_max([float(fault is not None), float(stop.exit_code)])
        if has_fault:
            self._stop_for(next(text for text in self._world.all_gather_objects(str(fault) if fault else "") if text))
        if code:
            step, where = self._state.step, self._save_what_is_done()
            go_on = f"after step {step}; start again to go on from {where}" if where else "before step 1; start again"
            self._world.fail(StoppedEarly(f"stopped {go_on}", int(code)))

    def _leave_out(self, packs: list[Pack]) -> int:
        """Count and list the samples of this step that could not be read; return its supervised tokens without them."""
        planned = packs[0].source.num_supervised_in_step
        if self._config.on_bad_sample == "stop":
            return planned
        bad = [one for pack in packs for one in pack.bad]
        lost = int(self._world.all_reduce_sum([sum(one.num_supervised for one in bad)])[0])
        if not lost:
            return planned
        self._list(self._state.step + 1, [one.fault for one in bad])
        if lost == planned:
            self._stop_for(f"step {self._state.step + 1}: not one of its samples can be read")
        return planned - lost

    def _list(self, step: int, faults: list[Fault], held_out: bool = False) -> None:
        everywhere = [fault for share in self._world.all_gather_objects(faults) for fault in share]
        try:
            self._bad_samples.add(step, everywhere, held_out)
        except UserError as error:
            self._stop_for(str(error))
        self._state.bad_samples = self._bad_samples.in_images

    def _stop_for(self, fault: str) -> NoReturn:
        """Stop on all processes, which all call this, for a fault of the data."""
        step, where = self._state.step, self._save_what_is_done()
        done = f"The {step} steps done so far are saved in {where}" if where else "No step was done yet"
        self._world.fail(UserError(f"{fault}\n{done}; mend the data and start again."))

    def _save_what_is_done(self) -> Path | None:
        where = self._save() if self._state.step else None
        self._draw()
        return where

    def _count_skips(self, skipped: bool) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        self._state.num_skipped += 1
        logger.warning("step %d skipped: its gradient is not finite", self._state.step)
        if self._skipped_in_a_row == _MOST_SKIPPED_IN_A_ROW:
            error = FloatingPointError(
                f"{_MOST_SKIPPED_IN_A_ROW} steps in a row had a gradient that is not finite: lower the learning rate, "
                "or train with --bf16 false to see whether the model or the precision is at fault."
            )
            self._world.fail(error)

    def _evaluate(self) -> float:
        """Return the held-out loss per supervised token."""
        assert self._held_out is not None
        index, rows = self._held_out.index, self._held_out.rows
        config, world = self._config, self._world
        batches = in_order(index.lengths, rows, config.max_samples_per_batch, config.max_tokens_per_batch)
        mine = deal_in_order(batches, index.num_supervised, world.rank, world.size)
        loss, count = 0.0, 0
        order = [batch for batch, _ in mine]
        faults: list[Fault] = []
        with loading(self._dataset(index), order, config.dataloader_num_workers, self._pins()) as packs:
            for (_, counts), pack in zip(mine, packs, strict=True):
                self._at("held-out loss")
                pack_loss = self._engine.loss_sum(pack)
                loss, count = loss + counts * pack_loss, count + counts * pack.num_supervised
                faults += [one.fault for one in pack.bad]
        if config.on_bad_sample == "skip":
            self._list(self._state.step, faults, held_out=True)
        total_loss, total_count = world.all_reduce_sum([loss, count])
        return total_loss / total_count

    def _save(self) -> Path:
        self._world.at(f"saving checkpoint-{self._state.step}")
        return checkpoints.save(
            self._config.output_dir,
            self._engine,
            self._state.step,
            self._state.as_json(),
            self._run,
            self._config.save_total_limit,
        )

    def _draw(self) -> None:
        if self._world.is_writer:
            draw_curve(self._config.output_dir)

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self._state.step % every == 0 or self._is_last())

    def _is_last(self) -> bool:
        return self._state.step == self._plan.num_steps

    def _dataset(self, index: SampleIndex) -> PackDataset:
        loaded = self._loaded
        return PackDataset(
            index, loaded.preprocessing, loaded.image_token_id, loaded.num_image_tokens,
            masks_bad=self._config.on_bad_sample == "skip",
        )  # fmt: skip

    def _pins(self) -> bool:
        return self._world.device.type == "cuda"

    def _show_first_sample(self) -> None:
        row = self._index.row(int(self._plan.global_batch(0)[0]))
        sample = Sample(row.ids.tolist(), row.supervised_spans.tolist(), row.length)
        show_sample(sample, self._loaded.processor.tokenizer.decode, self._console)

    def _result(self, peak: float) -> TrainResult:
        state, seconds = self._state, max(self._state.train_time_s, math.ulp(1.0))
        return {
            "output_dir": str(self._config.output_dir),
            "global_step": state.step,
            "train_loss": state.train_loss,
            "eval_loss": state.eval_loss,
            "samples_per_s": state.num_samples / seconds,
            "tokens_per_s": state.num_tokens / seconds,
            "mfu": state.model_flops / seconds / peak,
            "peak_memory_bytes": self._engine.peak_memory_bytes(),
            "num_bad_samples": len(self._bad_samples),
        }
