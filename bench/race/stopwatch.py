"""The clock of a contender, the same for all: it stops after every optimizer step and waits for its next turn.

It hangs on torch's own hook for optimizer steps, so neither side's code is changed for the measurement. From one
optimizer step's end to the next lies everything a step costs: waiting for the batch, moving it, forward, backward,
clipping, logging, the optimizer.

A contender is a process; it speaks JSON lines on a pipe of its own, and goes on when it reads a line "go" on its
standard input.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

Losses = Callable[[], list[float]]


class Stopwatch:
    """Reports each step and waits.

    Args:
        channel: file descriptor of the pipe.
        losses: returns the losses of the steps logged so far.
        last_words: returns what is reported at the end.
    """

    def __init__(self, channel: int, losses: Losses, last_words: Callable[[], dict[str, Any]] = dict) -> None:
        self._losses, self._last_words = losses, last_words
        self._out = os.fdopen(channel, "w")
        self._start()
        register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        seconds, cpu_seconds = time.perf_counter() - self._released, cpu_time_s() - self._cpu_before
        parameters = {id(p): p.numel() for group in optimizer.param_groups for p in group["params"]}
        self._say(
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            losses=self._losses(),
            num_learning=sum(parameters.values()),
            peak_memory_bytes=peak_memory_bytes(),
            worker_memory_bytes=worker_memory_bytes(),
        )
        if sys.stdin.readline() != "go\n":
            self._say(**self._last_words())
            raise SystemExit(0)
        self._start()

    def _start(self) -> None:
        self._cpu_before = cpu_time_s()
        self._released = time.perf_counter()

    def _say(self, **values: Any) -> None:
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()


def peak_memory_bytes() -> int:
    """Return the most resident memory that this process has had."""
    # Linux hands `ru_maxrss` down through exec, so a child starts with its parent's; VmHWM starts anew (proc(5)).
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes


def worker_memory_bytes() -> int:
    """Return the resident memory of this process's children, loader workers in the main."""
    return sum(_of_children(lambda child: int(child.memory_info().rss)))


def cpu_time_s() -> float:
    """Return the processor time of this process and its children so far: less at the mercy of other work than a clock.

    Threads that wait for each other in a loop count as well, so it is no measure of pure work either.
    """
    children: float = sum(_of_children(lambda child: child.cpu_times().user + child.cpu_times().system))
    return time.process_time() + children


def _of_children(read: Callable[[psutil.Process], float]) -> Iterator[Any]:
    for child in psutil.Process().children(recursive=True):
        try:
            yield read(child)
        except psutil.NoSuchProcess:
            continue
