"""What may end a run before its last step: a request to stop, a fault of the data, gradients that are not finite.

All processes agree first, and what is done so far is saved, so that nothing is lost.
"""

import logging
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

from llavaforge.config.schema import TrainConfig
from llavaforge.data.faults import Fault
from llavaforge.data.load.pack import Pack
from llavaforge.engine.base import Engine, StepResult
from llavaforge.errors import RunFailed, StoppedEarly, UserError, reason
from llavaforge.files import append_line
from llavaforge.training.bad_samples import BadSamples
from llavaforge.training.opening import OpenedStage
from llavaforge.training.saving import Saver
from llavaforge.training.signals import EXIT_BY_HAND, EXIT_START_AGAIN, StopRequest
from llavaforge.training.state import TrainState

logger = logging.getLogger(__name__)

_SPIKE_WINDOW, _SPIKE_SIGMAS = 128, 6
_MOST_RECORDS_SHOWN = 8
_UNUSUAL = "unusual_steps.jsonl"


class Guards:
    """Looks at every step before and after it is taken; all processes call its methods together.

    Args:
        opened: the stage.
        engine: prepared.
        state: where the run stands.
        saver: saves what is done.
    """

    def __init__(self, opened: OpenedStage, engine: Engine, state: TrainState, saver: Saver) -> None:
        config, self._world = opened.config, engine.world
        self.state, self._saver, self._skips_bad = state, saver, config.on_bad_sample == "skip"
        self.bad_samples = BadSamples(
            config.output_dir, opened.data.left_out, config.max_bad_samples, self._world.is_writer
        )
        self.bad_samples.resume(state.step, state.bad_samples)
        self._opened, self._unusual = opened, config.output_dir / _UNUSUAL
        self._num_lost_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=_SPIKE_WINDOW)

    def agree(self, packs: Sequence[Pack], fault: UserError | None, stop: StopRequest) -> tuple[int, bool]:
        """Stop on all processes when one must; else count and list the samples of a step that could not be read.

        What processes must know of each other before a step is told in one small reduction, after all have read their
        images. It cannot travel with the sums of the step before: evaluation, saving and a stop come between.

        Args:
            packs: this process's part of the step.
            fault: of a pack of this process.
            stop: a request to this process.

        Returns:
            The supervised tokens of the whole step, without those of samples that could not be read; whether no process
            is still writing a checkpoint.

        Raises:
            UserError: the data of one process is at fault; too many samples could not be read, or all.
            StoppedEarly: one process was asked to stop.
        """
        step, code = self.state.step + 1, stop.exit_code
        bad = [one for pack in packs for one in pack.bad]
        mine = [
            fault is not None,
            code == EXIT_START_AGAIN,
            code == EXIT_BY_HAND,
            sum(one.num_supervised for one in bad),
            self._saver.is_writing,
        ]
        self._world.at_step(step, "waiting for the other processes to have read their images")
        num_faults, num_start_again, num_by_hand, lost, num_writing = self._world.all_reduce_sum(mine)
        if num_faults:
            faults = self._world.all_gather_objects((str(fault), fault.exit_code) if fault else None)
            text, exit_code = next(one for one in faults if one)
            self._stop_for(text, RunFailed if exit_code == RunFailed.exit_code else UserError)
        if num_start_again or num_by_hand:
            saved = self._saver.save_what_is_done()
            text = f"stopped after step {self.state.step}. {saved} Start again to go on."
            self._world.fail(StoppedEarly(text, EXIT_BY_HAND if num_by_hand else EXIT_START_AGAIN))
        planned = packs[0].source.num_supervised_in_step
        if lost:
            self.list_bad(step, [one.fault for one in bad])
            if lost == planned:
                self._stop_for(f"step {step}: not one of its samples can be read")
        return planned - int(lost), not num_writing

    def list_bad(self, step: int, faults: Sequence[Fault], held_out: bool = False) -> None:
        """List samples that could not be read, of all processes.

        Raises:
            UserError: they are too many now.
        """
        if not self._skips_bad:
            return
        everywhere = [fault for mine in self._world.all_gather_objects(list(faults)) for fault in mine]
        try:
            self.bad_samples.add(step, everywhere, held_out)
        except UserError as error:
            self._stop_for(str(error))
        self.state.bad_samples = self.bad_samples.in_images

    def look_at(self, result: StepResult, line: dict[str, Any]) -> None:
        """Look at a step that was taken: count it if it was skipped, list it if its loss is unusual.

        Args:
            result: of the step.
            line: its metrics.

        Raises:
            RunFailed: too many steps in a row were not finite.
        """
        is_dead = not result.skipped and line["grad_norm"] == 0 and self._should_learn_from(line["step"])
        self._num_lost_in_a_row = self._num_lost_in_a_row + 1 if result.skipped or is_dead else 0
        if self._num_lost_in_a_row:
            self.state.num_skipped += result.skipped
            what = "its gradient is exactly 0" if is_dead else "its loss or gradient is not finite, so it is skipped"
            self._list_unusual(line, what)
            if self._num_lost_in_a_row > self._opened.config.max_skipped_steps:
                self._world.fail(
                    RunFailed(
                        f"{self._num_lost_in_a_row} steps in a row had a loss or gradient that is not finite, or a "
                        f"gradient of 0 (max_skipped_steps {self._opened.config.max_skipped_steps}): the run has "
                        f"diverged (lower the learning rate), or its data or precision is at fault: look "
                        f"at the records in {self._unusual}, and try --bf16 false. {self._saver.newest()}"
                    )
                )
            return
        loss = float(line["loss"])
        if len(self._losses) == _SPIKE_WINDOW:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > mean + _SPIKE_SIGMAS * deviation:
                self._list_unusual(line, f"its loss {loss:.4g} is far above the last {_SPIKE_WINDOW} steps' {mean:.4g}")
        self._losses.append(loss)

    def _should_learn_from(self, step: int) -> bool:
        """Say whether a step can have a gradient: a projector alone learns nothing from texts."""
        index, opened = self._opened.data.index, self._opened
        return opened.config.train_type != "projector" or bool(
            index.num_images[opened.plan.global_batch(step - 1)].any()
        )

    def check_learnt(self) -> None:
        """Check at the end of a run that it learnt something.

        Raises:
            RunFailed: all of its steps were skipped.
        """
        if self.state.step and self.state.num_skipped == self.state.step:
            self._world.fail(
                RunFailed(
                    f"all {self.state.step} steps were skipped, since loss or gradient was not finite: nothing was "
                    "learnt, and no finished model is written. Look at the data, the image processor's numbers "
                    "(image_std) and the learning rate; --bf16 false tells whether the precision is at fault."
                )
            )

    def out_of_memory(self, error: BaseException, weights_are_whole: bool) -> NoReturn:
        """End the run when a step finds no memory.

        Args:
            error: says what was asked for.
            weights_are_whole: the step had not begun to change them. They are saved then, if this is the only process
                (others wait for this one in the middle of a step).

        Raises:
            RunFailed: with what to lower.
        """
        saved = self._saver.newest()
        if self._world.size == 1 and weights_are_whole:
            saved = self._saver.save_what_is_done()
        raise RunFailed(
            f"step {self.state.step + 1}: out of memory ({reason(error)}). {saved} Lower what a step holds, and start "
            f"again: {'; '.join(_savings(self._opened.config))}."
        ) from error

    def _list_unusual(self, line: dict[str, Any], what: str) -> None:
        """Tell of a step, and list its records in `unusual_steps.jsonl`."""
        rows = (self._opened.data.index.row(int(number)) for number in self._opened.plan.global_batch(line["step"] - 1))
        records = [row.where for row in rows]
        shown = ", ".join(records[:_MOST_RECORDS_SHOWN]) + ", ..." * (len(records) > _MOST_RECORDS_SHOWN)
        if self._world.is_writer:
            logger.warning("step %d: %s. Its records: %s", line["step"], what, shown)
            told = {"step": line["step"], "loss": line["loss"], "grad_norm": line["grad_norm"], "what": what}
            append_line(self._unusual, told | {"records": records})

    def _stop_for(self, fault: str, kind: type[UserError] = UserError) -> NoReturn:
        """Stop on all processes for a fault of the data, or of its reading."""
        self._world.fail(kind(f"{fault}\n{self._saver.save_what_is_done()} Mend that and start again."))


def _savings(config: TrainConfig) -> list[str]:
    """Return what would lower the memory of a step, the cheapest first; the global batch stays what it is."""
    found = []
    if config.recompute_every != 1:
        found.append("--gradient_checkpointing true")
    if config.most_tokens:
        found.append(f"--max_tokens_per_batch {config.most_tokens // 2}")
    elif config.max_samples_per_batch > 1:
        found.append(f"--per_device_train_batch_size {config.max_samples_per_batch // 2}")
    found.append(f"--max_length below {config.max_length}")
    if config.train_type == "full":
        found.append("--train_type freeze_vision or use_lora")
    elif config.train_type == "freeze_vision":
        found.append("--train_type use_lora")
    found.append("more GPUs with --deepspeed zero3, or zero3-offload")
    return found
