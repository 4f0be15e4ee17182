"""The process that hears all ranks of a run (`heartbeat.py`) and says which one ends it.

Comes in, as lines of JSON: who a rank is, `{"rank": 5, "host": "gpu07", "machine": "...", "pid": 31337}`; where it is,
`{"at": "step 12: backward", "count": 9310, "timed": true}`; how it leaves, `{"left": "peer", "code": 1, "message":
"..."}`. Goes out: one message on rank 0's stderr, unless the rank to blame prints its own, and one verdict to all.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Wait for better evidence, best first. A dead rank closes its sockets one by one, with seconds of CUDA in between.
_EVIDENCE_WAIT_S = {"died": 0.0, "left": 1.0, "silent": 1.0, "stuck": 0.0, "peer": 4.0}
_TICK_S = 0.05
_FROZEN_S = 5.0  # of silence, when the run ends
_DRAIN_S = 2.0
SPEECH_S = 1.0  # start of the rank that prints: torchrun ends all ranks of a host after the first one


@dataclass
class _Rank:
    """What a rank has said of itself."""

    rank: int
    host: str = "unknown"
    machine: str = ""
    pid: int = 0
    at: str = "start"
    count: int = 0
    timed: bool = False
    left: str = ""
    code: int = 0
    message: str = ""
    line: bytes = b""
    heard_s: float = 0.0
    writer: asyncio.StreamWriter | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


class _Judge:
    """Hears all ranks and finds the one to blame."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ranks = [_Rank(rank) for rank in range(size)]
        self._faults: list[tuple[int, float, int, str]] = []  # order of the evidence, when it is due, rank, text
        # Seconds counted, not clocked: a job that was frozen (`scontrol suspend`) must not take its pause for silence.
        self._now_s = self._moved_s = 0.0

    async def run(self, listener: socket.socket) -> None:
        """Listen until one is to blame or rank 0 says goodbye: a launcher may end this process with rank 0."""
        await asyncio.start_server(self._hear, sock=listener)
        while not any(due_s <= self._now_s for _, due_s, _, _ in self._faults):
            await asyncio.sleep(_TICK_S)
            self._now_s += _TICK_S
            if self._ranks[0].left and not self._faults:
                await self._tell({}, self._ranks[1:])
                return await self._tell({}, self._ranks[:1])
            self._inspect([rank for rank in self._ranks if not rank.left])
        order, _, number, text = min(self._faults)
        await self._end_run(list(_EVIDENCE_WAIT_S)[order] in ("left", "peer"), self._ranks[number], text)

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Note what a rank says until it hangs up or says goodbye."""
        try:
            hello = json.loads(await reader.readline())
            rank = self._ranks[hello["rank"]]
            if rank.writer:
                raise ValueError("taken")
        except (OSError, ValueError, LookupError, TypeError):  # a port scanner
            return writer.close()
        vars(rank).update(hello, writer=writer)
        with contextlib.suppress(OSError, ValueError):  # it may die in the middle of a line
            async for line in reader:
                rank.heard_s = self._now_s
                if line == rank.line:
                    continue
                rank.line, self._moved_s = line, self._now_s
                vars(rank).update(json.loads(line))
                if rank.code:
                    text = f"{rank} ended with exit code {rank.code}; it was at: {rank.at}\n{rank.message}"
                    self._blame(rank.left, rank, text)
                elif rank.left and rank.rank > 0:
                    break
        rank.writer = None
        writer.close()
        if not rank.left:
            self._blame("died", rank, f"{rank} died; it was at: {rank.at}")

    def _inspect(self, here: Sequence[_Rank]) -> None:
        """Look for ranks that are silent, and for a run that stands still."""
        for rank in here:
            if self._now_s - rank.heard_s >= self._timeout_s:
                self._blame("silent", rank, f"{rank} has not answered for {self._timeout_s:g} s; it was at: {rank.at}")
        if here and all(rank.timed for rank in here) and self._now_s - self._moved_s >= self._timeout_s:
            fewest = min(rank.count for rank in here)
            behind, others = [r for r in here if r.count == fewest], [r for r in here if r.count > fewest]
            names = f"ranks {', '.join(str(r.rank) for r in behind)} are" if behind[1:] else f"{behind[0]} is"
            text = f"no progress for {self._timeout_s:g} s: {names} at: {_where_most_are(behind)}"
            text += f", while the others are at: {_where_most_are(others)}" if others else ""
            self._blame("stuck", behind[0], text)

    def _blame(self, kind: str, rank: _Rank, text: str) -> None:
        """Note a fault; better evidence may come until it is due."""
        self._faults.append((list(_EVIDENCE_WAIT_S).index(kind), self._now_s + _EVIDENCE_WAIT_S[kind], rank.rank, text))

    async def _end_run(self, prints_itself: bool, culprit: _Rank, text: str) -> None:
        """Print, tell all ranks, kill what is frozen here."""
        threading.Timer(10.0, os._exit, [1]).start()  # stderr may be a full pipe whose reader hangs
        if not prints_itself or culprit.host != self._ranks[0].host:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"error: {text}\n" if prints_itself else with_hint(text, culprit.host))
                sys.stderr.flush()
        silent_s = self._now_s - min(_FROZEN_S, self._timeout_s)
        frozen = [(r.machine, r.pid) for r in self._ranks if not r.left and r.heard_s <= silent_s]
        wait_s = SPEECH_S if prints_itself else 0.0
        verdict = {"rank": culprit.rank, "code": culprit.code or 1, "wait_s": wait_s, "frozen": frozen}
        await self._tell(verdict, self._ranks[::-1])
        kill(self._ranks[0].machine, [(r.machine, r.pid) for r in self._ranks if r.writer and not r.left])
        os._exit(0)

    async def _tell(self, verdict: dict[str, Any], ranks: Sequence[_Rank]) -> None:
        """Give a verdict (an empty one lets them go) and wait until the ranks hang up."""
        for rank in ranks:
            if rank.writer:
                with contextlib.suppress(OSError):  # one that the others have killed by now
                    rank.writer.write(json.dumps(verdict).encode())
                    rank.writer.write_eof()
        end_s = time.monotonic() + _DRAIN_S
        while any(rank.writer for rank in ranks) and time.monotonic() < end_s:
            await asyncio.sleep(_TICK_S)


def _where_most_are(ranks: Sequence[_Rank]) -> str:
    return Counter(rank.at for rank in ranks).most_common(1)[0][0]


def with_hint(text: str, host: str) -> str:
    """Return the message of a lost rank."""
    hint = "The last checkpoint is intact: start the same command again to go on from it. If it happens again, look at"
    return f"error: {text}.\n{hint} host {host} (dmesg, GPU, memory).\n"


def kill(machine: str, processes: Sequence[Sequence[Any]]) -> None:
    """Kill those `(machine, pid)` that are here: a stopped process does not end otherwise."""
    for its_machine, pid in processes:
        if its_machine == machine and pid > 1 and pid != os.getpid():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def start(size: int, timeout_s: float) -> tuple["subprocess.Popen[bytes]", int]:
    """Start the judge of a run of `size` ranks; return its process and the port where it listens."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both) as listener:
        command = [sys.executable, "-P", __file__, str(listener.fileno()), str(size), str(timeout_s)]
        # A session of its own: Ctrl-C and a launcher's signals to a process group are not for the judge.
        process = subprocess.Popen(
            command, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        return process, int(listener.getsockname()[1])


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # SLURM signals all processes of a job
    asyncio.run(_Judge(int(sys.argv[2]), float(sys.argv[3])).run(socket.socket(fileno=int(sys.argv[1]))))
