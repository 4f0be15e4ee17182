"""A verb in a process of its own, so that its memory and its time are its own.

Comes in: the words of a command line. Goes out: its exit code; what it says is in a log. It is forked from the server
of `processes/workers.py`, which has imported what it needs: imports take longer than a small run.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path

from llavaforge.cli import main
from llavaforge.errors import StoppedEarly
from llavaforge.processes import workers
from llavaforge.training.signals import EXIT_BY_HAND, EXIT_START_AGAIN, StopRequest

_PRELOADED = "llavaforge.comparison.preload"
_POLL_S = 0.1
_PROMPT = "$ llavaforge "  # before each command in a log


def prepare_children() -> None:
    """Let the server import what children need while this process does other work."""
    if _PRELOADED not in workers.PRELOADED:
        workers.PRELOADED.append(_PRELOADED)
    workers.start_server()


def run_child(arguments: Sequence[str], log: Path, stop: StopRequest, watch: Callable[[], None]) -> int:
    """Do what `llavaforge ARGUMENTS` does, in a process of its own.

    Args:
        arguments: of the command line.
        log: what it says is appended there.
        stop: postponed by the caller. A request to stop is passed on; the child answers it as it does on its own.
        watch: called while it runs, several times a second.

    Returns:
        Its exit code, or minus the signal that ended it.

    Raises:
        StoppedEarly: it, or this process, was asked to stop.
    """
    stop.check()
    with log.open("a") as file:
        file.write(f"{_PROMPT}{' '.join(arguments)}\n")
    process = workers.context().Process(target=_become, args=(list(arguments), str(log)))
    with workers.signals_blocked():
        process.start()
    assert process.pid is not None
    told = False
    try:
        while process.exitcode is None:
            process.join(_POLL_S)
            watch()
            if stop.exit_code and not told and process.exitcode is None:
                os.kill(process.pid, signal.SIGINT if stop.exit_code == EXIT_BY_HAND else signal.SIGTERM)
                told = True
    except BaseException:  # ctrl-C once more: the child is to stop at once too
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGINT)
            process.join()
        raise
    stop.check()
    if process.exitcode in (EXIT_BY_HAND, EXIT_START_AGAIN):
        raise StoppedEarly("a run was stopped from outside: start again to go on", process.exitcode)
    return process.exitcode


def last_words(log: Path) -> str:
    """Return why the newest child of a log failed: its error, or else the last line that it wrote."""
    lines = [line for line in log.read_text(errors="replace").rpartition(_PROMPT)[2].splitlines()[1:] if line.strip()]
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if errors:
        return "\n".join(lines[errors[-1] :]).removeprefix("error: ")
    return lines[-1] if lines else "it ended without a word, perhaps because memory is used up"


def _become(arguments: list[str], log: str) -> None:
    """Be as a process is that a shell starts, but that a signal to our group does not reach it: it is passed on."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    for signal_number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signal_number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # of the server, which is started with signals blocked
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        sys.exit(main(arguments))
    finally:
        atexit._run_exitfuncs()  # which multiprocessing does not


def _stop_with_parent() -> None:
    """When the process that asked for this one is killed, stop as on SIGTERM: what is done so far is saved."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
