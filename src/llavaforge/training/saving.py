"""Saving a run: checkpoints while it goes on, and the curve of what was done so far."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from llavaforge.checkpoint import state as checkpoints
from llavaforge.checkpoint.writing import Save
from llavaforge.engine.base import Engine
from llavaforge.errors import EndedElsewhere, UserError, as_user_error, reason
from llavaforge.processes.host_memory import free_host_memory
from llavaforge.processes.world import agreed
from llavaforge.training.metrics import draw_curve
from llavaforge.training.opening import OpenedStage
from llavaforge.training.state import TrainState

logger = logging.getLogger(__name__)

_BYTES_PER_PARAMETER = 12  # a weight and two moments in float32
_RESERVE = 1.25  # times the copy must be free: training and the loader take more at times, and too much ends the run


class Saver:
    """Saves a stage; all processes call its methods together. At the end of the block everything is saved.

    Args:
        opened: the stage.
        engine: prepared.
        state: where the run stands.
    """

    def __init__(self, opened: OpenedStage, engine: Engine, state: TrainState) -> None:
        self._opened, self._engine, self._state = opened, engine, state
        self._save: Save | None = None  # not published yet
        self._times: dict[str, float] = {}
        self._has_told_of_memory = False

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif self._save is not None and self._all_end_for(error):
            try:
                self.finish()
            except (UserError, EndedElsewhere) as fault:  # what ended the run is what the user is told last
                logger.warning("%s", fault)
        elif self._save is not None:
            self._save.give_up()

    def save(self) -> None:
        """Begin a checkpoint of the step that was taken last; the one before is finished first.

        Raises:
            UserError: it, or the one before, cannot be saved; unless the run goes on then (`on_save_error`).
        """
        self.finish()
        config, step, world = self._opened.config, self._state.step, self._engine.world
        world.at(f"saving checkpoint-{step}")
        num_bytes = sum(group.num_parameters for group in self._opened.groups) * _BYTES_PER_PARAMETER
        at_once = not self._has_room_for_a_copy(num_bytes)
        with self._held_up(), self._faults_told(step):
            if world.broadcast_object(self._folder.exists()):
                return
            state, run = self._state.as_json(), self._opened.run
            self._save = Save(config.output_dir, self._engine, step, state, run, num_bytes, at_once)
        if at_once:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this process is still writing its share of a checkpoint."""
        return self._save is not None and not self._save.is_written

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and publish it.

        Raises:
            UserError: it cannot be saved; unless the run goes on then (`on_save_error`).
        """
        if (save := self._save) is None:
            return
        self._save = None
        self._engine.world.at(f"waiting for {save.folder.name} to be written")
        with self._held_up(), self._faults_told(save.step):
            save.publish(self._opened.config.save_total_limit)
            self._add_time("save_write_time_s", save.write_time_s)

    def take_times(self) -> dict[str, float]:
        """Return what saving took since this was called last, for a line of metrics; empty when there was no saving.

        `save_time_s` are the seconds for which training was held up; `save_write_time_s` those from the beginning of
        a checkpoint until all processes had written it, added up over those that were published.
        """
        times, self._times = self._times, {}
        return times

    def save_what_is_done(self) -> str:
        """Save before the run ends early; return a sentence that says what is saved."""
        self.draw()
        if not self._state.step:
            return "No step was done yet."
        try:
            self.save()
            self.finish()
        except UserError as error:
            return str(error)
        except EndedElsewhere:  # another process tells why
            pass
        where = f"saved in {self._folder}" if self._folder.exists() else "not saved"
        step = self._state.step
        return f"The {step} steps done so far are {where}." if step > 1 else f"The first step is {where}."

    def newest(self) -> str:
        """Return a sentence that names the newest checkpoint."""
        steps = checkpoints.steps_of(self._opened.config.output_dir)
        return f"checkpoint-{steps[-1]} is intact." if steps else "No checkpoint was saved before."

    def draw(self) -> None:
        """Draw the loss over the steps."""
        if self._engine.world.is_writer:
            draw_curve(self._opened.config.output_dir)

    @property
    def _folder(self) -> Path:
        return self._opened.config.output_dir / f"{checkpoints.PREFIX}{self._state.step}"

    def _all_end_for(self, error: BaseException) -> bool:
        """Say whether all processes can still publish together: they raise this error at the same point."""
        is_alone = self._engine.world.size == 1 and isinstance(error, Exception)  # not ctrl-C, pressed twice
        return is_alone or getattr(error, "agreed", False)

    def _has_room_for_a_copy(self, num_bytes: int) -> bool:
        """Say whether every host has the memory for its processes' shares of a checkpoint; tell once when not."""
        world = self._engine.world
        needed = num_bytes / world.size * world.size_on_host * _RESERVE
        missing = world.all_reduce_max([needed - free_host_memory()])[0]
        if missing > 0 and world.is_writer and not self._has_told_of_memory:
            told = "training waits while checkpoints are written: for a copy of one, a host lacks %s MB of memory"
            logger.warning(told, f"{missing / 1e6:,.0f}")
            self._has_told_of_memory = True
        return missing <= 0

    @contextmanager
    def _held_up(self) -> Iterator[None]:
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            self._add_time("save_time_s", time.perf_counter() - begin_s)

    def _add_time(self, name: str, seconds: float) -> None:
        self._times[name] = self._times.get(name, 0.0) + seconds

    @contextmanager
    def _faults_told(self, step: int) -> Iterator[None]:
        """Make the user's error of a checkpoint that cannot be saved, or go on without it (`on_save_error`)."""
        stops = self._opened.config.on_save_error == "stop"
        try:
            yield
        except OSError as error:
            message = f"checkpoint-{step} is not saved: {as_user_error(error) or reason(error)} {self.newest()}"
            if stops:
                raise agreed(UserError(f"{message} Then start again, or let it go on with on_save_error.")) from error
            logger.warning("%s The run goes on (on_save_error: continue).", message)
        except EndedElsewhere:
            if stops:
                raise
