"""One lost rank ends the whole run, in minutes and with one message that names it.

Comes in: where each rank is (`Heartbeat.at`) and how it ends (`Heartbeat.leave`). Goes out: a `Verdict`, and the end of
the process.

Rank 0's process runs the `Hub`; every rank, 0 too, has one TCP connection to it and a daemon thread that sends a line
per second: `{"at": "step 12: backward", "count": 9310, "timed": true}`. Main threads may hang in C++, so threads do
everything, and a process is ended by `os._exit`. Start the heartbeat before CUDA, NCCL or gloo.

Who prints: why a rank left, that rank itself (and rank 0, if that runs on another host); a lost rank, rank 0; a lost
rank 0, the one rank that the hub chose before: the lowest on another host than rank 0's, else the lowest. If that one
is lost in the same second nobody prints: better than a message from every rank.

Past 300 lines because both ends of one protocol are read together.
"""

import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

_Line = dict[str, Any]
# Wait for better evidence, best first. A dead rank closes its sockets one by one, with seconds of CUDA in between.
_EVIDENCE_WAIT_S = {"died": 0.0, "left": 1.0, "silent": 1.0, "stuck": 0.0, "peer": 4.0}
_SPEECH_S = 1.0  # start of the rank that prints: torchrun ends all ranks of a host after the first one
_DRAIN_S = 2.0  # for the others to close their connections
_LEAVE_S = 12.0  # longer than any verdict takes
_EXIT_S = 30.0  # a failed rank that hangs at its exit (in NCCL's destructors) is ended then
_MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True)
class Verdict:
    """Who ended the run (the first of several) and why; `pid` is 0 for a rank that never came."""

    rank: int
    host: str
    pid: int
    exit_code: int
    message: str


class Heartbeat:
    """A rank's side.

    Args:
        rank: number of this process.
        world_size: number of processes.
        hub: host and port of rank 0's `Hub`.
        timeout_s: silence, or no progress at timed places, after which the run ends. The same on all ranks, and longer
            than any call that keeps Python's global lock.

    Raises:
        ConnectionError: no hub answered within `timeout_s`, or it refused this rank.
    """

    def __init__(self, rank: int, world_size: int, hub: tuple[str, int], timeout_s: float) -> None:
        self._rank, self._timeout_s, self._beat_s = rank, timeout_s, _beat_s(world_size, timeout_s)
        self._count = 0
        self._place = ("start", 0, False)
        self._leaving = self._quiet = False
        self._verdict: Verdict | None = None
        self._over = threading.Event()
        self._hub: _Line = {}  # its host, machine, pid, place, and who prints when it is lost
        hello = {"rank": rank, "world_size": world_size} | _self()
        self._link, lines = _join(hub, hello, timeout_s, self._beat_s / 4)
        threading.Thread(target=self._watch, args=(lines,), name="heartbeat", daemon=True).start()

    def at(self, where: str, timed: bool = False) -> None:
        """Say where the main thread is; costs nothing. All ranks should call it equally often: fewest calls is behind.

        Args:
            where: the place, for messages.
            timed: this place must be left within `timeout_s`; others may last as long as they like.
        """
        self._count += 1
        self._place = (where, self._count, timed)  # one assignment: the thread never sees half of it

    def leave(self, exit_code: int = 0, message: str = "", because_of_peer: bool = False) -> None:
        """End this rank's part: without a code or a message a quiet goodbye, otherwise the end of all ranks.

        Call it before printing: it returns when this rank may print its message and end with `exit_code` (30 s later it
        is ended). If another rank is to blame it does not return; the process ends silently, like all others.

        Args:
            exit_code: of all ranks.
            message: why, for the other hosts.
            because_of_peer: it looks like a lost peer ("Connection closed by peer"): blame any other fault first.
        """
        if not self._leaving:
            self._quiet, self._leaving = not (exit_code and message), True
            self._link.send({"leave": exit_code, "message": message[:4000], "because_of_peer": because_of_peer})
            self._over.wait(_LEAVE_S)

    def verdict(self, wait_s: float) -> Verdict | None:
        """Wait for the end of the run, which ends this process unless it left; None if all is well after `wait_s`."""
        self._over.wait(wait_s)
        return self._verdict

    def _watch(self, lines: list[_Line] | None) -> None:
        """Send and listen until the hub or the end of the connection says how it ends; `lines` began with a welcome."""
        clock = _AwakeClock()
        heard_s = next_beat_s = 0.0
        while clock.now_s() - heard_s < self._timeout_s:
            if lines is None:
                return self._lose_hub("died", frozen=False)
            for line in lines:
                if "verdict" in line:
                    return self._obey(Verdict(**line["verdict"]), line["wait_s"], line["kill"])
                if "bye" in line:
                    return self._stop()
                self._hub |= line
                heard_s = clock.now_s()
            if clock.now_s() >= next_beat_s:
                next_beat_s = clock.now_s() + self._beat_s
                where, count, timed = self._place
                self._link.send({"at": where[:300], "count": count, "timed": timed})
            lines = self._link.receive()
        self._lose_hub(f"has not answered for {self._timeout_s:g} s", frozen=True)

    def _lose_hub(self, how: str, frozen: bool) -> None:
        """Rank 0 is gone without a goodbye, and the hub with it."""
        if self._quiet:
            return self._stop()
        host, pid, prints = self._hub["host"], self._hub["pid"], self._hub["speaker"] == self._rank
        text = f"rank 0 (host {host}, pid {pid}) {how}; it was at: {self._hub['at']}"
        verdict = Verdict(0, host, pid, 1, _with_hint(text, host))
        if prints:
            _print(f"error: {verdict.message}\n")
        self._obey(verdict, 0.0 if prints else _SPEECH_S, [[self._hub["machine"], pid]] if frozen else [])

    def _obey(self, verdict: Verdict, wait_s: float, frozen: list[list[Any]]) -> None:
        """End this process, or let it end of itself when it has left and may."""
        self._verdict = verdict
        _kill(frozen)
        may_speak = self._leaving and verdict.rank == self._rank
        if may_speak or self._quiet:
            self._stop()
        if not self._quiet:
            time.sleep(_EXIT_S if may_speak else wait_s)
            _end(verdict.exit_code)

    def _stop(self) -> None:
        self._link.close()
        self._over.set()


class Hub:
    """Rank 0's listener, in rank 0's process, which it ends. It judges all ranks.

    Args:
        world_size: number of ranks, each of which must come within `timeout_s`.
        timeout_s: see `Heartbeat`.
        host: address to listen on; "" is all of them.
    """

    def __init__(self, world_size: int, timeout_s: float, host: str = "") -> None:
        self._world_size, self._timeout_s, self._beat_s = world_size, timeout_s, _beat_s(world_size, timeout_s)
        both = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family, backlog=1024, dualstack_ipv6=both)
        self._server.settimeout(0.0)
        _our_sockets.add(self._server)
        self.port = int(self._server.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._members: dict[int, _Member] = {}
        self._faults: dict[tuple[str, int], _Fault] = {}
        self._clock = _AwakeClock()
        self._moved_s = 0.0  # when a rank last came, went, or made progress
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="heartbeat hub", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching; the members do so too, quietly. Rank 0 calls it after `leave`, whatever its exit code."""
        self._closing = True
        self._thread.join(_LEAVE_S)

    def _run(self) -> None:
        """Watch until a fault is proven or rank 0 says goodbye."""
        next_beat_s = 0.0
        while not self._closing and not any(f.due_s <= self._clock.now_s() for f in self._faults.values()):
            self._poll(min(self._beat_s / 4, 0.5))
            if self._clock.now_s() >= next_beat_s:
                next_beat_s = self._clock.now_s() + self._beat_s
                self._inspect(self._clock.now_s())
                self._tell(self._members.values(), self._news())
        self._selector.unregister(self._server)
        self._server.close()
        if self._faults:
            return self._end_run()
        self._tell((m for m in self._members.values() if m.rank > 0), {"bye": True})
        self._drain(_DRAIN_S)
        self._tell((m for m in self._members.values() if m.rank == 0), {"bye": True})

    def _poll(self, wait_s: float) -> None:
        """Read what has come, after at most `wait_s`."""
        for key, _ in self._selector.select(wait_s):
            if key.data is None:
                with contextlib.suppress(OSError):  # it hung up
                    link = _Link(self._server.accept()[0], wait_s=0.0)
                    self._selector.register(link.socket, selectors.EVENT_READ, _Member(link))
                continue
            lines = key.data.link.receive()
            try:
                for line in lines or []:
                    self._take(key.data, line)
            except (KeyError, TypeError, ValueError):  # not one of ours: a port scanner
                lines = None
            if lines is None:
                self._drop(key.data)

    def _take(self, member: "_Member", line: _Line) -> None:
        """Note what a member says."""
        member.heard_s = self._clock.now_s()
        if member.rank < 0:
            self._welcome(member, line)
        elif "leave" in line:
            kind = "peer" if line["because_of_peer"] else "left"
            self._let_go(member, int(line["leave"]), str(line["message"]), kind)
        else:
            if line["count"] != member.count:
                self._moved_s = member.heard_s
            member.where, member.count, member.timed = str(line["at"]), int(line["count"]), bool(line["timed"])

    def _welcome(self, member: "_Member", hello: _Line) -> None:
        """Take a rank in, or say why not."""
        rank, size = int(hello["rank"]), int(hello["world_size"])
        if size != self._world_size or not 0 <= rank < size or rank in self._members:
            taken = self._members.get(rank, "no such rank")
            member.link.send({"refused": f"its world size is {self._world_size} (here {size}), it has {taken}"})
            return self._drop(member)
        member.host, member.machine, member.pid = str(hello["host"]), str(hello["machine"]), int(hello["pid"])
        member.rank, self._moved_s = rank, member.heard_s
        self._members[rank] = member
        member.link.send({"welcome": True} | _self() | self._news())

    def _let_go(self, member: "_Member", exit_code: int, message: str, kind: str) -> None:
        """A member leaves. Only what is not quiet waits for a verdict, and rank 0 for the others."""
        member.left, member.quiet, self._moved_s = True, not (exit_code and message), member.heard_s
        if not member.quiet:
            text = f"{member} ended with exit code {exit_code}; it was at: {member.where}\n{message}"
            self._blame(kind, member.rank, text, exit_code)
        elif member.rank == 0:
            self._closing = True
        else:
            member.link.send({"bye": True})

    def _news(self) -> _Line:
        """What members must know when rank 0 is lost: where it was and who prints."""
        ranks = [m for m in self._members.values() if m.rank > 0 and m.open and not m.left]
        speaker = min(ranks, key=lambda m: (m.machine == _machine(), m.rank), default=None)
        where = self._members[0].where if 0 in self._members else "start"
        return {"at": where, "speaker": speaker.rank if speaker else 1}

    def _drop(self, member: "_Member") -> None:
        """Forget a connection; a rank that had not said goodbye died."""
        if member.open:
            self._selector.unregister(member.link.socket)
            member.link.close()
            member.open = False
            if member.rank >= 0 and not member.left:
                self._blame("died", member.rank, f"{member} died; it was at: {member.where}")

    def _inspect(self, now_s: float) -> None:
        """Look for ranks that are silent, and for a run that stands still."""
        limit = f"{self._timeout_s:g} s"
        ranks = [m for m in self._members.values() if not m.left]
        for member in ranks:
            if now_s - member.heard_s >= self._timeout_s:
                text = f"{member} has not answered for {limit}; it was at: {member.where}"
                self._blame("silent", member.rank, text)
        missing = sorted(set(range(self._world_size)) - self._members.keys())
        if missing and now_s >= self._timeout_s:
            text = f"no sign of rank {', '.join(map(str, missing))} within {limit} after the start"
            self._blame("silent", missing[0], text)
        elif not missing and ranks and now_s - self._moved_s >= self._timeout_s and all(m.timed for m in ranks):
            fewest = min(m.count for m in ranks)
            behind, others = [m for m in ranks if m.count == fewest], [m for m in ranks if m.count > fewest]
            text = f"no progress for {limit}: {_names(behind)} at: {_common_place(behind)}"
            text += f", while the others are at: {_common_place(others)}" if others else ""
            self._blame("stuck", behind[0].rank, text)

    def _blame(self, kind: str, rank: int, text: str, exit_code: int = 1) -> None:
        """Note a fault, the first of its kind and rank; better evidence may come until it is due."""
        due_s = self._clock.now_s() + _EVIDENCE_WAIT_S[kind]
        self._faults.setdefault((kind, rank), _Fault(kind, rank, text, exit_code, due_s))

    def _end_run(self) -> None:
        """Print, tell everybody, kill what is frozen, end this process."""
        order = list(_EVIDENCE_WAIT_S)
        fault = min(self._faults.values(), key=lambda f: (order.index(f.kind), f.due_s, f.rank))
        speaks = fault.kind in ("left", "peer")  # the rank itself, once it has the verdict
        culprit, zero = self._members.get(fault.rank), self._members.get(0)
        host, pid = (culprit.host, culprit.pid) if culprit else ("", 0)
        text = fault.text if speaks else _with_hint(fault.text, host)
        if not speaks or host != socket.gethostname():
            _print(f"error: {text}\n")
        frozen_s = self._clock.now_s() - min(5 * self._beat_s, self._timeout_s)
        frozen = [[m.machine, m.pid] for m in self._members.values() if not m.left and m.heard_s <= frozen_s]
        verdict = asdict(Verdict(fault.rank, host, pid, fault.exit_code, text))
        wait_s = _SPEECH_S if speaks else 0.0
        zero_may_go = zero is not None and zero.left and (zero.quiet or fault.rank == 0)
        # Rank 0 last: once it knows, its process may end, and this thread with it.
        told = sorted((m for m in self._members.values() if m is not zero or zero_may_go), key=lambda m: -m.rank)
        self._tell(told, {"verdict": verdict, "wait_s": wait_s, "kill": frozen})
        self._drain(_DRAIN_S + wait_s)
        _kill([[m.machine, m.pid] for m in self._members.values() if m.open and not m.left])
        if not zero_may_go:
            _end(fault.exit_code)

    def _tell(self, members: Iterable["_Member"], line: _Line) -> None:
        for member in members:
            member.link.send(line)

    def _drain(self, seconds: float) -> None:
        """Read on until all ranks but 0 have closed: closing with unread lines would reset a connection."""
        end_s = time.monotonic() + seconds
        while any(m.open and m.rank > 0 for m in self._members.values()) and time.monotonic() < end_s:
            self._poll(0.05)


class _Link:
    """JSON lines over a connection. Only reading says that it is lost: what came before the end is still read."""

    def __init__(self, connection: socket.socket, wait_s: float) -> None:
        connection.settimeout(wait_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _our_sockets.add(connection)
        self.socket = connection
        self.close = connection.close
        self._rest = b""
        self._lock = threading.Lock()
        self._clogged = False

    def send(self, line: _Line) -> None:
        """Send a line; after one that did not fit into the kernel's buffer, none."""
        with self._lock:
            try:
                if not self._clogged:
                    self.socket.sendall(json.dumps(line).encode() + b"\n")
            except OSError:
                self._clogged = True

    def receive(self) -> list[_Line] | None:
        """Return the whole lines that have come; None: the connection is lost or carries something else."""
        try:
            data = self.socket.recv(_MAX_LINE_BYTES)
            *lines, self._rest = (self._rest + data).split(b"\n")
            values = [json.loads(line) for line in lines]
        except (TimeoutError, BlockingIOError):
            return []
        except (OSError, ValueError):
            return None
        sane = data and len(self._rest) < _MAX_LINE_BYTES and all(isinstance(value, dict) for value in values)
        return values if sane else None


@dataclass(eq=False)
class _Member:
    """What the hub knows of a connection; rank -1 until its hello."""

    link: _Link
    rank: int = -1
    host: str = ""
    machine: str = ""
    pid: int = 0
    where: str = "start"
    count: int = 0
    timed: bool = False
    heard_s: float = 0.0
    left: bool = False
    quiet: bool = False
    open: bool = True

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


@dataclass(frozen=True)
class _Fault:
    kind: str
    rank: int
    text: str
    exit_code: int
    due_s: float


class _AwakeClock:
    """Seconds awake: a process that was frozen (`scontrol suspend`) must not take its pause for the others' silence."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()
        self._awake_s = 0.0

    def now_s(self) -> float:
        now_s = time.monotonic()
        self._awake_s += min(now_s - self._last_s, 1.0)  # the loops come by every second
        self._last_s = now_s
        return self._awake_s


_our_sockets: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked loader worker would keep the connection of its dead parent open."""
    for connection in list(_our_sockets):
        connection.close()


os.register_at_fork(after_in_child=_close_in_child)


def _beat_s(world_size: int, timeout_s: float) -> float:
    """Return the seconds between lines: one, more for many ranks, each of which wakes rank 0's interpreter."""
    return min(max(1.0, world_size / 256), timeout_s / 4)


@functools.cache
def _machine() -> str:
    """Return what process numbers belong to: containers may share a host's name but not its processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def _self() -> _Line:
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}


def _join(hub: tuple[str, int], hello: _Line, timeout_s: float, wait_s: float) -> tuple[_Link, list[_Line]]:
    """Try until the hub has said welcome; return the connection and the lines that came over it."""
    end_s = time.monotonic() + timeout_s
    problem: object = "no answer"
    while time.monotonic() < end_s:
        lines: list[_Line] | None = []
        try:
            link = _Link(socket.create_connection(hub, timeout=min(5.0, timeout_s)), wait_s)
            link.send(hello)
            while lines == [] and time.monotonic() < end_s:
                lines = link.receive()
        except OSError as error:
            problem = error
        if lines and "welcome" in lines[0]:
            return link, lines
        if lines and "refused" in lines[0]:
            problem = lines[0]["refused"]
            break
        time.sleep(0.2)
    raise ConnectionError(f"rank {hello['rank']} cannot join rank 0's heartbeat at {hub[0]}:{hub[1]}: {problem}")


def _with_hint(text: str, host: str) -> str:
    hint = "The last checkpoint is intact: start the same command again to go on from it. If it happens again, look at"
    return f"{text}.\n{hint} {f'host {host}' if host else 'the hosts'} (dmesg, GPU, memory)."


def _names(members: Sequence[_Member]) -> str:
    return f"{members[0]} is" if len(members) == 1 else f"ranks {', '.join(str(m.rank) for m in members)} are"


def _common_place(members: Sequence[_Member]) -> str:
    return Counter(m.where for m in members).most_common(1)[0][0]


def _print(text: str) -> None:
    """Write to stderr; a full pipe whose reader is gone holds the caller up only for a while."""

    def write() -> None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.write(text)
            sys.stderr.flush()

    with contextlib.suppress(RuntimeError):  # no more threads
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(_DRAIN_S)


def _kill(processes: list[list[Any]]) -> None:
    """Kill those `[machine, pid]` that are here: a stopped process does not end otherwise."""
    for machine, pid in processes:
        if machine == _machine() and pid > 1 and pid != os.getpid():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _end(exit_code: int) -> NoReturn:
    """End this process, whatever its main thread hangs in."""
    _print("")
    os._exit(exit_code)
