"""An end for what may never end: other people's templates, a network drive that does not answer."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Ended(BaseException):
    """Raised where the program is, also where a library catches every `Exception`."""


@contextmanager
def alarm(timeout_s: float) -> Iterator[None]:
    """End the block after so many seconds, wherever it is; 0 lets it go on for ever. Blocks do not nest.

    Only the main thread hears signals: elsewhere the block is not bounded.

    Raises:
        TimeoutError: it took longer.
    """
    if not timeout_s or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise _Ended

    before = signal.signal(signal.SIGALRM, end)
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        yield
    except _Ended:
        raise TimeoutError(f"it does not end within {timeout_s:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
