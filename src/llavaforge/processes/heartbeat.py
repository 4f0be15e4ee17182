"""One lost rank ends the whole run, in minutes and with one message that names it.

Comes in: where each rank is (`Heartbeat.at`) and how it ends (`Heartbeat.leave`). Goes out: the end of the process.

A daemon thread of each rank sends a line per second to `judge.py`, a process that rank 0 starts and that outlives it.
The kernel hangs up for a rank that dies; a frozen one falls silent. The judge sends nothing but its verdict, then it
hangs up. Main threads may hang in C++, so the thread ends the process, by `os._exit`.
"""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from llavaforge.processes import judge

_LEAVE_S = 12.0  # longer than any verdict takes
_EXIT_S = 30.0  # a failed rank that hangs at its exit (in NCCL's destructors) is ended then


class Heartbeat:
    """A rank's side.

    Args:
        store: torch's, with the host's name of each rank at `here/<rank>`.
        address: rank 0's host.
        rank: number of this process.
        size: number of processes.
        timeout_s: silence, or no progress where that is timed, after which the run ends. The same on all ranks, and
            longer than any call that keeps Python's global lock.

    Raises:
        ConnectionError: the judge cannot be reached.
    """

    def __init__(self, store: Any, address: str, rank: int, size: int, timeout_s: float) -> None:
        self._rank = rank
        self._where: dict[str, Any] = {"at": "start", "count": 0, "timed": False}
        self._leaving = self._quiet = False
        self._over = threading.Event()
        if rank == 0:
            self._judge, port = judge.start(size, timeout_s)
            store.set("judge", str(port))
        port = int(store.get("judge"))
        try:
            self._link = socket.create_connection((address, port), timeout_s)
        except OSError as error:
            raise ConnectionError(f"rank {rank} cannot reach rank 0's judge at {address}:{port}: {error}") from error
        os.register_at_fork(after_in_child=self._link.close)  # a loader worker must not hide the death of its parent
        self._link.settimeout(min(max(1.0, size / 256), timeout_s / 4))  # from line to line: each wakes the judge
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # a host that lost its power does not hang up
            timeout_ms = int(min(timeout_s * 1000, 2**31 - 1))
            self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        # Who prints when rank 0's host is lost: the lowest rank on another one.
        self._host = store.get("here/0").decode()
        away = (other for other in range(1, size) if store.get(f"here/{other}").decode() != self._host)
        self._prints = rank == next(away, 1)
        self._say({"rank": rank, "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()})
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def at(self, where: str, timed: bool = False) -> None:
        """Say where the main thread is; costs nothing. All ranks should call it equally often: fewest calls is behind.

        Args:
            where: such as `step 12: backward`, for messages.
            timed: the thread must move on within `timeout_s`; others may last as long as they like.
        """
        # One assignment: the thread never sees half of it.
        self._where = {"at": where[:300], "count": self._where["count"] + 1, "timed": timed}

    def leave(self, code: int = 0, message: str = "", because_of_peer: bool = False) -> None:
        """End this rank's part: without an exit code a quiet goodbye, otherwise the end of all ranks.

        Call it before printing: it returns when this rank may print its message and end with `code` (30 s later it is
        ended). If another rank is to blame it does not return; the process ends silently, like all others.

        Args:
            code: exit code of all ranks.
            message: why, for the other hosts.
            because_of_peer: it looks like a lost peer ("Connection closed by peer"): blame any other fault first.
        """
        if not self._leaving:
            self._quiet, self._leaving = code == 0, True
            self._say({"left": "peer" if because_of_peer else "left", "code": code, "message": message[:4000]})
            self._over.wait(_LEAVE_S)

    def _say(self, line: dict[str, Any]) -> None:
        """Send a line, small enough for the kernel to take at once: those of two threads do not mix."""
        with contextlib.suppress(OSError):  # only reading tells that the judge is lost: its verdict may be waiting
            self._link.sendall(json.dumps(line).encode() + b"\n")

    def _watch(self) -> None:
        """Say where this rank is until the judge hangs up; do what it said."""
        said, more = b"", b"nothing yet"
        while more:
            self._say(self._where)
            try:
                more = self._link.recv(1 << 16)
                said += more
            except TimeoutError:
                pass  # all is well
            except OSError:
                more = b""
        self._link.close()
        if self._quiet or said == b"{}":
            return self._over.set()
        if not said:
            time.sleep(0.0 if self._prints else judge.SPEECH_S)
            text = f"rank 0 (host {self._host}) or the judge beside it is lost"
            _end(1, judge.with_hint(text, self._host) if self._prints else "")
        verdict = json.loads(said)
        judge.kill(_machine(), verdict["frozen"])
        if self._leaving and verdict["rank"] == self._rank:
            self._over.set()
            time.sleep(_EXIT_S)
        time.sleep(verdict["wait_s"])
        _end(verdict["code"])


@functools.cache
def _machine() -> str:
    """Return what process numbers belong to: containers may share a host's name but not its processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def _end(code: int, message: str = "") -> NoReturn:
    """End this process, whatever its main thread hangs in."""
    threading.Timer(2.0, os._exit, [code]).start()  # stderr may be a full pipe whose reader hangs
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(message)
        sys.stderr.flush()
    os._exit(code)
