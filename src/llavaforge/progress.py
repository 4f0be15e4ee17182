"""Progress of long work that is not training: a bar on a terminal, else a log line every few seconds."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0


class Bar:
    """Shows how much is done.

    Args:
        what: names the work.
        unit: what is counted.
        quiet: show nothing (all processes but one).
    """

    def __init__(self, what: str, unit: str, quiet: bool = False) -> None:
        self._what, self._unit, self._quiet = what, unit, quiet
        self._begin = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[count]:,} " + unit),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet or not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(what, total=1.0, count=0)

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, count: int, share: float) -> None:
        """Show that `count` are done, which is this share of all (0 to 1)."""
        self._bar.update(self._task, completed=share, count=count)
        now = time.monotonic()
        if self._bar.disable and not self._quiet and now - self._last_line > _LINE_EVERY_S:
            self._last_line = now
            left = (now - self._begin) / max(share, 1e-6) * (1 - share)
            logger.info("%s: %d %s, %.0f %%, %.0f s left", self._what, count, self._unit, 100 * share, left)
