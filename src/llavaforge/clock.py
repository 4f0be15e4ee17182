"""Where the time goes: a device's own time, divided among named parts, without waiting for the device.

Comes in: `begin(part)` in the order in which the parts are reached. Goes out: seconds per part.

On a GPU the marks are CUDA events of the current stream. A GPU that has nothing to do waits between two of them, so
waiting for data counts only where the GPU did wait.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

DATA, TOWER, LANGUAGE_MODEL, OPTIMIZER = "data", "vision_tower", "language_model", "optimizer"
COMMUNICATION, SAVING, EVALUATION, OTHER = "communication", "saving", "evaluation", "other"
PARTS = (DATA, TOWER, LANGUAGE_MODEL, OPTIMIZER, COMMUNICATION, SAVING, EVALUATION, OTHER)
"""`data` is waiting for images; `language_model` is it and the projector, forward and backward, without the tower;
`communication` is what processes tell each other between forward and backward passes, and waiting for the slowest."""


class Clock:
    """Divides the time of one process among `PARTS`.

    Args:
        device: that the parts run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._is_held = False
        self._marks: deque[tuple[str, Any]] = deque()
        self._thread, self._traces = threading.get_ident(), False
        self._range: record_function | None = None
        self.begin(OTHER)

    def begin(self, part: str) -> None:
        """Let the time from here on count for a part."""
        if self._is_held:
            return
        self._marks.append((part, self._now()))
        if self._traces and threading.get_ident() == self._thread:  # a range begins and ends in one thread
            self._end_range()
            self._range = record_function(f"part: {part}")
            self._range.__enter__()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Let all time within count for a part, whatever begins within; then for the part of before."""
        before = self._marks[-1][0]
        if self._is_held:
            yield
            return
        self.begin(part)
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            self.begin(before)

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last reading, as far as the device has come."""
        seconds = dict.fromkeys(PARTS, 0.0)
        self._marks.append((self._marks[-1][0], self._now()))
        while len(self._marks) > 1 and self._has_passed(self._marks[1][1]):
            part, begin = self._marks.popleft()
            end = self._marks[0][1]
            seconds[part] += begin.elapsed_time(end) / 1000 if self._is_cuda else end - begin
        return seconds

    @contextmanager
    def in_traces(self) -> Iterator[None]:
        """Within the block let parts have names in a trace of torch's profiler."""
        self._traces = True
        try:
            yield
        finally:
            self._traces = False
            self._end_range()

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _has_passed(self, moment: Any) -> bool:
        return bool(moment.query()) if self._is_cuda else True
