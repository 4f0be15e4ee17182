"""A request to stop, noted when it comes and honoured at the end of a step.

SIGTERM and SIGUSR1 (what SLURM sends before a time limit) ask for exit 75, start me again; ctrl-C for exit 130. A
second ctrl-C stops at once.
"""

import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_START_AGAIN = 75
EXIT_BY_HAND = 130
_WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """While entered, signals only set `exit_code`; on leaving, the old handlers are back."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in _WATCHED:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.exit_code == EXIT_BY_HAND:
            raise KeyboardInterrupt
        self.exit_code = EXIT_BY_HAND if number == signal.SIGINT else EXIT_START_AGAIN
