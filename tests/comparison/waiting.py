"""Runs of a comparison that wait after their first step until they are asked to stop, or that end at once."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from llavaforge.comparison import child
from llavaforge.training.step import OptimizerStep

RUN = "lora/seed-0"
SIGN = "waiting"  # made in the comparison's folder when the run waits

_FAILED = 1

become_as_ever = child._become
step_as_ever = OptimizerStep.__call__


def become(arguments: list[str], log: str) -> None:
    """Do what a child does; to be put in the place of `child._become`."""
    sign = Path(log).parents[2] / SIGN

    def wait_and_step(self: OptimizerStep, *given: Any) -> Any:
        if self.state.step == 1:
            sign.touch()
            stop: Any = signal.getsignal(signal.SIGTERM)
            while not stop.__self__.exit_code:
                time.sleep(0.01)
        return step_as_ever(self, *given)

    if arguments[0] == "train" and RUN in arguments[1]:
        OptimizerStep.__call__ = wait_and_step  # type: ignore[method-assign]
    become_as_ever(arguments, log)


def end_at_once(arguments: list[str], log: str) -> None:
    """Fail; to be put in the place of `child._become`."""
    os._exit(_FAILED)
