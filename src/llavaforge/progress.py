"""Progress of long work: a bar on a terminal, else a log line every few seconds."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0


class Bar:
    """Shows how much is done, and the time left.

    Args:
        status: shown until the first update.
        quiet: show nothing (all processes but one).
        done: share that was done before (a resumed run).
        log_ends: without a terminal, log the first and the last status too, however soon they come.
    """

    def __init__(self, status: str, quiet: bool = False, done: float = 0.0, log_ends: bool = False) -> None:
        self._quiet, self._done, self._log_ends = quiet, done, log_ends
        self._begin = time.monotonic()
        self._next_line = self._begin + (0.0 if log_ends else _LINE_EVERY_S)
        self._bar = Progress(
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet or not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(status, total=1.0)
        self._bar.update(self._task, completed=done)

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, share: float, status: str) -> None:
        """Show that this share of all is done (0 to 1); the time left is put behind the status."""
        self._bar.update(self._task, completed=share, description=status)
        now = time.monotonic()
        is_due = now >= self._next_line or (self._log_ends and share == 1)
        if self._bar.disable and not self._quiet and is_due:
            self._next_line = now + _LINE_EVERY_S
            left = (now - self._begin) / max(share - self._done, 1e-6) * (1 - share)
            logger.info("%s%.0f s left", status, left)
