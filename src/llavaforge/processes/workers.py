"""Worker processes that cost little: forked from one server that has imported everything and done nothing.

A spawned worker imports torch by itself: 3 s and 150 MB that it shares with nobody; a forked one takes milliseconds,
and its imports are the server's pages. Forking the training process instead would copy its threads' locks and its CUDA
context.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from types import TracebackType
from typing import Any, TypeVar

from llavaforge.errors import RunFailed

T = TypeVar("T")
R = TypeVar("R")

PRELOADED = ["llavaforge.data.load.preload"]  # what the fork server imports
_END_S = 5.0  # a process that is ending closes its connections one after the other
_ready: list[bool] = []  # whether the server of this process has answered


def start_server() -> None:
    """Let the fork server import what it needs while this process does other work; signals are blocked in it."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with signals_blocked():
        forkserver.ensure_running()


def context() -> ForkServerContext:
    """Return the multiprocessing context of all workers, once their server is there."""
    found = multiprocessing.get_context("forkserver")
    start_server()
    with signals_blocked():
        # A first worker, so that ctrl-C while the server still imports does not leave it with workers to start whose
        # parent is gone: they would fail with a traceback each.
        if not _ready:
            first = found.Process(target=_nothing)
            first.start()
            first.join()
            _ready.append(True)
    return found


def _nothing() -> None:
    """Do nothing, in a worker."""


def each(task: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Do a task for each item on all cores; yields items with their results, in order.

    Only a few items are taken ahead, so memory does not grow with their number.

    Args:
        task: sent to each worker process once.
        items: sent to the workers one by one.
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ProcessPoolExecutor(num_cores(), mp_context=context(), initializer=_remember, initargs=(task,)) as pool:
        try:
            for item in items:
                with signals_blocked():  # a worker that is half started would be waited for, for ever
                    waiting.append((item, pool.submit(_do_remembered, item)))
                if len(waiting) > 2 * num_cores():
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise RunFailed(
                "a worker process was ended from outside, most often by the system, when memory is used up. Give it "
                "more memory, or fewer cores (taskset)."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_remembered: list[Callable[[Any], Any]] = []


def _remember(task: Callable[[Any], Any]) -> None:
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _remembered[:] = [task]


def _do_remembered(item: Any) -> Any:
    return _remembered[0](item)


def end_with_parent() -> None:
    """End this worker when the process that asked for it ends, however that ends; to be called in the worker.

    Its parent is the fork server, which lives as long as any worker does. A connection that breaks as that process ends
    may be seen before its end is: then it is no error of this worker's, and nothing is printed.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()
        sys.excepthook = partial(_print_unless_ended, parent.sentinel)


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _print_unless_ended(
    sentinel: int, kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    if issubclass(kind, ConnectionError | EOFError) and wait([sentinel], timeout=_END_S):
        os._exit(1)
    sys.__excepthook__(kind, error, where)


def own_cores() -> set[int]:
    """Return the processor cores that this process may use; all where the system does not tell (macOS)."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def num_cores() -> int:
    """Return their number."""
    return len(own_cores())


_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Start processes that never see a request to stop, and start them whole.

    A signal to the process group asks the trainer to stop at a step's end: the fork server and its workers must live
    until then, also while they start. A process inherits the mask; ours is lifted again, and what came meanwhile is
    then delivered. The mask is this thread's: where another thread (a library's) takes the signal, Python would still
    run the handler here, so the handlers are put aside as well.
    """
    came: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    resource_tracker.ensure_running()  # blocked, since USR1 and HUP would end it; its start lifts a part of the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for request in came:
            signal.raise_signal(request)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
