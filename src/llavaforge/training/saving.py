"""Saving a run: checkpoints, and the curve of what was done so far."""

from pathlib import Path

from llavaforge.checkpoint import state as checkpoints
from llavaforge.engine.base import Engine
from llavaforge.training.metrics import draw_curve
from llavaforge.training.opening import OpenedStage
from llavaforge.training.state import TrainState


class Saver:
    """Saves a stage; all processes call its methods together.

    Args:
        opened: the stage.
        engine: prepared.
        state: where the run stands.
    """

    def __init__(self, opened: OpenedStage, engine: Engine, state: TrainState) -> None:
        self._opened, self._engine, self._state = opened, engine, state

    def save(self) -> Path:
        """Publish a checkpoint of the step that was taken last, and return its folder."""
        config, step = self._opened.config, self._state.step
        self._engine.world.at(f"saving checkpoint-{step}")
        return checkpoints.save(
            config.output_dir, self._engine, step, self._state.as_json(), self._opened.run, config.save_total_limit
        )

    def save_what_is_done(self) -> Path | None:
        """Save before the run ends early; return the checkpoint, None before step 1."""
        saved = self.save() if self._state.step else None
        self.draw()
        return saved

    def draw(self) -> None:
        """Draw the loss over the steps."""
        if self._engine.world.is_writer:
            draw_curve(self._opened.config.output_dir)
