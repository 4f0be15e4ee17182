"""Ranks that are asked to stop, freeze or die, as whole processes of the command line."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from llavaforge.folders import differences
from llavaforge.training.metrics import read_metrics
from ranks import free_port, rank_environment
from train_tools import arguments_of, train_config
from warm import WarmProcess, command_line


class Run:
    """Two ranks of `llavaforge train`, each with its log and a loader worker."""

    def __init__(self, config: Any, log_dir: Path) -> None:
        self.output_dir, port = config.output_dir, free_port()
        self.logs = [log_dir / f"rank-{rank}.log" for rank in range(2)]
        self.ranks = [
            WarmProcess(command_line, arguments_of(config), env=rank_environment(rank, 2, port), log=self.logs[rank])
            for rank in range(2)
        ]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if any(line["step"] >= step for line in read_metrics(self.output_dir)):
                self.processes = [
                    process
                    for rank in self.ranks
                    for process in [psutil.Process(rank.pid), *psutil.Process(rank.pid).children(recursive=True)]
                ]
                return
            assert all(rank.poll() is None for rank in self.ranks), self.said()
            time.sleep(0.02)
        pytest.fail(f"step {step} was not reached: {self.said()}")

    def end(self, timeout_s: float) -> list[int]:
        """Wait for both ranks; return their exit codes. Nothing that they started is left a little later."""
        codes = [rank.wait(timeout_s) for rank in self.ranks]
        assert len(self.processes) >= 4, "each rank has a loader worker"
        _, left = psutil.wait_procs(self.processes, timeout=15)
        assert not left
        return codes

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def close(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()


@pytest.fixture
def endless(tiny_llava: Path, shapes: Path, tmp_path: Path) -> Any:
    """A run that does not end by itself."""
    return train_config(
        tiny_llava, shapes / "train", tmp_path / "run", max_steps=1_000_000, save_steps=20,
        lr_scheduler_type="constant", per_device_train_batch_size=2, dataloader_num_workers=1, stuck_timeout_s=10.0,
    )  # fmt: skip


def start(config: Any, tmp_path: Path, request: pytest.FixtureRequest, step: int) -> Run:
    run = Run(config, tmp_path)
    request.addfinalizer(run.close)
    run.wait_for_step(step)
    return run


def newest_checkpoint(output_dir: Path) -> Path:
    return output_dir / (output_dir / "latest").read_text().strip()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_its_name_and_a_signal_to_one_saves_on_all(
    endless: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = start(endless, tmp_path, request, step=25)
    run.ranks[1].kill()
    assert run.end(timeout_s=60) == [1, -signal.SIGKILL]
    told = re.findall(r"rank 1 \(.*\) died; it was at: .+", run.said())
    assert len(told) == 1, run.said()
    assert "Traceback" not in run.said()
    before = newest_checkpoint(endless.output_dir)
    assert not differences(before)

    again = start(endless, tmp_path, request, step=int(before.name.split("-")[1]) + 10)
    again.ranks[1].terminate()
    assert again.end(timeout_s=60) == [75, 75], again.said()
    assert f"going on from {before}" in again.said()
    assert again.said().count("Start again to go on") == 1
    saved = newest_checkpoint(endless.output_dir)
    assert saved != before and not differences(saved)
    assert read_metrics(endless.output_dir)[-1]["step"] == int(saved.name.split("-")[1])


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_ends_the_run_with_its_name(
    frozen: int, endless: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = start(endless, tmp_path, request, step=25)
    os.kill(run.ranks[frozen].pid, signal.SIGSTOP)
    begin = time.monotonic()
    codes = run.end(timeout_s=60)
    assert codes[1 - frozen] == 1 and codes[frozen] == -signal.SIGKILL
    assert 5 < time.monotonic() - begin < 45  # stuck_timeout_s is 10
    told = re.findall(rf"rank {frozen} \(.*\) has not answered for .*; it was at: .+", run.said())
    assert len(told) == 1, run.said()
    assert not differences(newest_checkpoint(endless.output_dir))


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(endless: Any, tmp_path: Path) -> None:
    process = WarmProcess(command_line, arguments_of(endless), env=rank_environment(0, 2, free_port()))
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "1 of 2 processes came within 10 s; missing: 1" in told
