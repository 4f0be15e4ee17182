"""Runs of small ranks that only have a heartbeat: real processes that do what the test tells them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from folder_store import FolderStore

HOST = socket.gethostname()

# A rank that does what its stdin says; its main thread hangs in `readline`, as others hang in a collective.
RANK = """
import json, os, sys, time
from llavaforge.processes.heartbeat import Heartbeat
from folder_store import FolderStore
rank, size, timeout_s, folder, host = json.loads(sys.argv[1])
if host:
    import socket
    socket.sethostname(host)
heartbeat = Heartbeat(FolderStore(folder), "localhost", rank, size, timeout_s)
print("ready", flush=True)
for line in sys.stdin:
    verb, *arguments = json.loads(line)
    if verb == "fork":  # a loader worker
        if os.fork() == 0:
            time.sleep(2.5)
            os._exit(0)
    elif verb == "fail":
        heartbeat.leave(*arguments)
        time.sleep(0.3)  # a traceback takes its time
        sys.stderr.write(f"rank {rank} fails: {arguments[1]}")
        sys.exit(arguments[0])
    elif verb == "close":
        heartbeat.leave()
        sys.exit(0)
    else:
        getattr(heartbeat, verb)(*arguments)
    print("done", flush=True)
"""


class Run:
    """The processes of a run."""

    def __init__(self, folder: Path, size: int, timeout_s: float, hosts: list[str], missing: int) -> None:
        self.errors = [folder / f"{rank}.err" for rank in range(size - missing)]
        self.store = FolderStore(folder)
        for rank in range(size):
            self.store.set(f"here/{rank}", hosts[rank] if hosts else HOST)
        self.ranks: list[subprocess.Popen[str]] = []
        for rank, path in enumerate(self.errors):
            host = hosts[rank] if hosts else ""
            arguments = json.dumps([rank, size, timeout_s, str(folder), host])
            with path.open("w") as stderr:
                self.ranks.append(
                    subprocess.Popen(
                        [*(["unshare", "--uts"] if host else []), sys.executable, "-c", RANK, arguments],
                        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=stderr,
                        text=True,
                    )
                )
        for rank in range(size - missing):
            assert self.answer(rank) == "ready\n"
        (self.judge,) = psutil.Process(self.ranks[0].pid).children()

    def answer(self, rank: int) -> str:
        stdout = self.ranks[rank].stdout
        assert stdout
        return stdout.readline()

    def tell(self, rank: int, *command: str | int | bool) -> None:
        """Send a command without waiting for it."""
        stdin = self.ranks[rank].stdin
        assert stdin
        stdin.write(json.dumps(command) + "\n")
        stdin.flush()

    def everybody_at(self, where: str, timed: bool = False) -> None:
        for rank in range(len(self.ranks)):
            self.tell(rank, "at", where, timed)
            self.answer(rank)

    def codes(self, within_s: float) -> list[int]:
        """Wait for the end of all."""
        end_s = time.monotonic() + within_s
        return [process.wait(max(0.01, end_s - time.monotonic())) for process in self.ranks]

    def said(self) -> list[str]:
        return [path.read_text() for path in self.errors]


def has_ended(process: psutil.Process, within_s: float) -> bool:
    end_s = time.monotonic() + within_s
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:  # nobody's child any more: init takes its time
            if time.monotonic() > end_s:
                return False
            time.sleep(0.05)
    return True
