"""A run of a comparison that waits after its first step until it is asked to stop."""

import signal
import time
from pathlib import Path
from typing import Any

from llavaforge.comparison import child
from llavaforge.training.step import OptimizerStep

RUN = "lora/seed-0"
SIGN = "waiting"  # made in the comparison's folder when the run waits

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
