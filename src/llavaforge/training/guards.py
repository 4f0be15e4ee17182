"""What may end a run before its last step: a request to stop, a fault of the data, gradients that are not finite.

All processes agree first, and what is done so far is saved, so that nothing is lost.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from llavaforge.data.faults import Fault
from llavaforge.data.load.pack import Pack
from llavaforge.engine.base import Engine, StepResult
from llavaforge.errors import StoppedEarly, UserError
from llavaforge.training.bad_samples import BadSamples
from llavaforge.training.opening import OpenedStage
from llavaforge.training.saving import Saver
from llavaforge.training.signals import StopRequest
from llavaforge.training.state import TrainState

logger = logging.getLogger(__name__)

_MOST_SKIPPED_IN_A_ROW = 3


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
        self._num_skipped_in_a_row = 0

    def agree(self, fault: UserError | None, stop: StopRequest) -> None:
        """Stop on all processes when one must.

        Args:
            fault: of a pack of this process.
            stop: a request to this process.

        Raises:
            UserError: the data of one process is at fault.
            StoppedEarly: one process was asked to stop.
        """
        self._world.at_step(self.state.step + 1, "waiting for the other processes to have read their images")
        has_fault, code = self._world.all_reduce_max([float(fault is not None), float(stop.exit_code)])
        if has_fault:
            texts = self._world.all_gather_objects(str(fault) if fault else "")
            self._stop_for(next(text for text in texts if text))
        if code:
            saved = self._saver.save_what_is_done()
            where = f"after step {self.state.step}; start again to go on from {saved}" if saved else ""
            self._world.fail(StoppedEarly(f"stopped {where or 'before step 1; start again'}", int(code)))

    def leave_out(self, packs: Sequence[Pack]) -> int:
        """Count and list the samples of this step that could not be read; return its supervised tokens without them.

        Raises:
            UserError: they are too many, or all.
        """
        planned = packs[0].source.num_supervised_in_step
        if not self._skips_bad:
            return planned
        bad = [one for pack in packs for one in pack.bad]
        lost = int(self._world.all_reduce_sum([sum(one.num_supervised for one in bad)])[0])
        if not lost:
            return planned
        self.list_bad(self.state.step + 1, [one.fault for one in bad])
        if lost == planned:
            self._stop_for(f"step {self.state.step + 1}: not one of its samples can be read")
        return planned - lost

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

    def count_skip(self, result: StepResult) -> None:
        """Count a step that did not happen, and stop after several in a row.

        Raises:
            FloatingPointError: that many gradients were not finite.
        """
        self._num_skipped_in_a_row = self._num_skipped_in_a_row + 1 if result.skipped else 0
        if not result.skipped:
            return
        self.state.num_skipped += 1
        logger.warning("step %d skipped: its gradient is not finite", self.state.step)
        if self._num_skipped_in_a_row == _MOST_SKIPPED_IN_A_ROW:
            error = FloatingPointError(
                f"{_MOST_SKIPPED_IN_A_ROW} steps in a row had a gradient that is not finite: lower the learning rate, "
                "or train with --bf16 false to see whether the model or the precision is at fault."
            )
            self._world.fail(error)

    def _stop_for(self, fault: str) -> NoReturn:
        """Stop on all processes for a fault of the data."""
        saved: Path | None = self._saver.save_what_is_done()
        done = f"The {self.state.step} steps done so far are saved in {saved}" if saved else "No step was done yet"
        self._world.fail(UserError(f"{fault}\n{done}; mend the data and start again."))
