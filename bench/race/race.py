"""Contenders take turns: every one does step 1, then every one step 2, and so on, each alone on the machine.

Comes in: a scenario, a model folder, samples. Goes out: what each contender reported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.fairness import check_first_loss, check_losses
from bench.scenarios import Scenario, Side, Task

MODULES: dict[Side, str] = {
    "ours": "bench.race.our_way",
    "usual": "bench.race.usual_way",
    "usual_workers": "bench.race.usual_way",
    "trl": "bench.race.trl_way",
}
WARMUP_STEPS = 2
# Loader workers keep up to 8 batches ready. So many steps lie beyond the last one measured that they work all the time.
SPARE_STEPS = 16


@dataclass
class Report:
    """What a contender told: one entry per step, warm-up included, and its last words."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, list[int]] = field(default_factory=dict)

    @property
    def seconds(self) -> list[float]:
        """Time of each measured step."""
        return [step["seconds"] for step in self.steps[WARMUP_STEPS:]]

    @property
    def losses(self) -> list[float]:
        """Losses of all steps but the last (a step's loss is logged after its clock stopped)."""
        losses: list[float] = self.steps[-1]["losses"]
        return losses

    @property
    def cpu_seconds(self) -> list[float]:
        """Processor time of each measured step, loader workers included."""
        return [step["cpu_seconds"] for step in self.steps[WARMUP_STEPS:]]


class ContenderFailed(RuntimeError):
    """A contender's process ended before its time; the message has the end of its log."""


class Contender:
    """One side's process.

    Args:
        side: which.
        task: what it does.
        log: where its output goes.
    """

    def __init__(self, side: Side, task: Task, log: Path) -> None:
        self.side, self.report, self._log = side, Report(), log
        self._output: IO[bytes] = log.open("wb")
        reading, writing = os.pipe()
        self._channel = os.fdopen(reading)
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULES[side], json.dumps(asdict(task)), str(writing)],
            stdin=subprocess.PIPE,
            stdout=self._output,  # libraries print there
            stderr=self._output,
            pass_fds=[writing],
            text=True,
            # A CPU benchmark, and the same environment for all.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"},
        )
        os.close(writing)

    def wait_for_step(self) -> None:
        """Wait until the step under way is done."""
        self.report.steps.append(self._listen())

    def step(self) -> None:
        """Let it do one step."""
        self._tell("go\n")
        self.wait_for_step()

    def stop(self) -> None:
        """Take its last words and let it end."""
        self._tell("stop\n")
        self.report.counts = self._listen()

    def close(self) -> None:
        """End the process whatever its state."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()
        self._channel.close()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None

    def _listen(self) -> dict[str, Any]:
        line = self._channel.readline()
        if not line:
            raise self._failed()
        message: dict[str, Any] = json.loads(line)
        return message

    def _failed(self) -> ContenderFailed:
        end = self._log.read_text(errors="replace")[-3000:]
        return ContenderFailed(f"{self.side} ended before its time. The end of its log:\n{end}")


def race(scenario: Scenario, tasks: dict[Side, Task], num_measured: int, log_dir: Path) -> dict[Side, Report]:
    """Run all contenders of a scenario.

    Args:
        scenario: what is raced.
        tasks: per side.
        num_measured: steps that count, after `WARMUP_STEPS`.
        log_dir: where the processes' logs go.

    Raises:
        Unfair: the sides do not do the same work.
        ContenderFailed: a process ended early.
    """
    with ExitStack() as stack:
        contenders = [stack.enter_context(_contender(side, tasks[side], log_dir)) for side in scenario.sides]
        for contender in contenders:
            contender.wait_for_step()  # they load side by side; nothing of this step is measured
        for number in range(1, WARMUP_STEPS + num_measured):
            # Who goes first changes from round to round, so that a drift of the machine hits both alike.
            for contender in contenders if number % 2 else reversed(contenders):
                contender.step()
            if number == WARMUP_STEPS - 1:
                check_first_loss({c.side: c.report.losses[0] for c in contenders}, tasks["ours"].bf16)
        for contender in contenders:
            contender.stop()
        reports = {contender.side: contender.report for contender in contenders}
    check_losses({side: report.losses for side, report in reports.items()}, tasks["ours"].bf16)
    return reports


@contextmanager
def _contender(side: Side, task: Task, log_dir: Path) -> Iterator[Contender]:
    log_dir.mkdir(parents=True, exist_ok=True)
    contender = Contender(side, task, log_dir / f"{side}.log")
    try:
        yield contender
    finally:
        contender.close()
