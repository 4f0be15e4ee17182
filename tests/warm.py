"""Whole processes that start in a fifth of a second: forked from a server that has imported everything.

The server is the one of `processes/workers.py`; `conftest.py` adds to what it imports.

A start of the command line costs six seconds of a core, most of it for the imports of torch and transformers. What is
tested with these processes comes after that: signals, kills, folders, other ranks. That a start from nothing works is
tested elsewhere, by processes of `subprocess` (`test_run_sh.py`, `test_imports.py`, the README's commands).
"""

import atexit
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavaforge.processes import workers


class WarmProcess:
    """What tests need of `subprocess.Popen`, for a function; it leads a session of its own."""

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """Start it.

        Args:
            function: what it does; its exit code is what it returns, or 0.
            arguments: of the function.
            env: all of its environment; ours by default.
            log: its stderr.
        """
        folder = Path(tempfile.mkdtemp())
        self._stdout, self._stderr = folder / "stdout", log or folder / "stderr"
        environment = dict(os.environ if env is None else env)
        given = (function, arguments, environment, os.getcwd(), str(self._stdout), str(self._stderr))
        self._process = workers.context().Process(target=_become, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, minus the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return what it has said on stdout and stderr."""
        self.wait(timeout)
        out, err = (path.read_text(errors="replace") for path in (self._stdout, self._stderr))
        return out, err

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def command_line(arguments: Sequence[str], before: str = "") -> int:
    """Do what `llavaforge ARGUMENTS` does, after running a piece of Python."""
    from llavaforge.cli import main

    exec(before, {})
    return main(list(arguments))


def _become(
    function: Callable[..., Any], arguments: tuple[Any, ...], env: dict[str, str], folder: str, stdout: str, stderr: str
) -> None:
    """Be as a process is that the shell starts; then call the function, and end as a script ends."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    for signal_number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signal_number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # of the server, which is started with signals blocked
    try:
        sys.exit(function(*arguments))
    finally:
        atexit._run_exitfuncs()  # which multiprocessing does not
