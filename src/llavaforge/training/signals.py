"""A request to stop: honoured at once while a run gets ready, at the end of a step while it trains.

SIGTERM, SIGUSR1 (what SLURM sends before a time limit) and SIGHUP (the terminal was closed) ask for exit 75, start me
again; ctrl-C for exit 130. A second ctrl-C stops at once.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from llavaforge.errors import StoppedEarly

EXIT_START_AGAIN = 75
EXIT_BY_HAND = 130
_WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """While entered, signals raise `StoppedEarly`, or within `postponed` only set `exit_code`.

    Args:
        is_last: only the process's own end comes after it, which a signal that comes late must not turn into a failure:
            from its end on they are ignored.
    """

    def __init__(self, is_last: bool = False) -> None:
        self.exit_code = 0
        self._is_last = is_last
        self._postponed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in _WATCHED:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # under `nohup`
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._is_last else handler)

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Within the block, whoever runs it looks at `exit_code` and saves before it stops."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False

    def check(self) -> None:
        """Stop if that was asked for while it was postponed.

        Raises:
            StoppedEarly: it was.
        """
        if self.exit_code:
            raise StoppedEarly("stopped where nothing is lost: start again to go on", self.exit_code)

    def _note(self, number: int, frame: FrameType | None) -> None:
        by_hand = number == signal.SIGINT
        if number == signal.SIGHUP:
            _leave_terminal()
        if by_hand and self.exit_code == EXIT_BY_HAND:
            raise KeyboardInterrupt
        self.exit_code = EXIT_BY_HAND if by_hand else EXIT_START_AGAIN
        if not self._postponed:
            self.check()
        again = " (ctrl-C again: stop at once, what is not saved is lost)" if by_hand else ""
        sys.stderr.write(f"\nasked to stop: this step is finished and saved first{again}\n")


def _leave_terminal() -> None:
    """Write nowhere from now on: what is written to a terminal that is gone fails, and would end the run."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            os.dup2(nowhere, stream.fileno())
