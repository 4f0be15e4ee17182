"""Saving a run: checkpoints, and the curve of what was done so far."""

import logging
from pathlib import Path

from llavaforge.checkpoint import state as checkpoints
from llavaforge.engine.base import Engine
from llavaforge.errors import EndedElsewhere, UserError, as_user_error, reason
from llavaforge.processes.world import agreed
from llavaforge.training.metrics import draw_curve
from llavaforge.training.opening import OpenedStage
from llavaforge.training.state import TrainState

logger = logging.getLogger(__name__)

_BYTES_PER_PARAMETER = 12  # a weight and two moments in float32


class Saver:
    """Saves a stage; all processes call its methods together.

    Args:
        opened: the stage.
        engine: prepared.
        state: where the run stands.
    """

    def __init__(self, opened: OpenedStage, engine: Engine, state: TrainState) -> None:
        self._opened, self._engine, self._state = opened, engine, state

    def save(self) -> Path | None:
        """Publish a checkpoint of the step that was taken last.

        Returns:
            Its folder; None when it could not be saved and the run goes on (`on_save_error`).

        Raises:
            UserError: it could not be saved.
        """
        config, step = self._opened.config, self._state.step
        self._engine.world.at(f"saving checkpoint-{step}")
        num_bytes = sum(group.num_parameters for group in self._opened.groups) * _BYTES_PER_PARAMETER
        state, run = self._state.as_json(), self._opened.run
        try:
            return checkpoints.save(
                config.output_dir, self._engine, step, state, run, num_bytes, config.save_total_limit
            )
        except OSError as error:
            message = f"checkpoint-{step} is not saved: {as_user_error(error) or reason(error)} {self.newest()}"
            if config.on_save_error == "stop":
                raise agreed(UserError(f"{message} Then start again, or let it go on with on_save_error.")) from error
            logger.warning("%s The run goes on (on_save_error: continue).", message)
        except EndedElsewhere:
            if config.on_save_error == "stop":
                raise
        return None

    def save_what_is_done(self) -> str:
        """Save before the run ends early; return a sentence that says what is saved."""
        self.draw()
        if not self._state.step:
            return "No step was done yet."
        try:
            saved = self.save()
        except UserError as error:
            return str(error)
        except EndedElsewhere:
            saved = None
        where = f"saved in {saved}" if saved else "not saved"
        return f"The {self._state.step} steps done so far are {where}."

    def newest(self) -> str:
        """Return a sentence that names the newest checkpoint."""
        steps = checkpoints.steps_of(self._opened.config.output_dir)
        return f"checkpoint-{steps[-1]} is intact." if steps else "No checkpoint was saved before."

    def draw(self) -> None:
        """Draw the loss over the steps."""
        if self._engine.world.is_writer:
            draw_curve(self._opened.config.output_dir)
