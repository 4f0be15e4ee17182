"""Start the processes of a run as torchrun does, one thread each, and collect their reports.

A single process is started without a group: llavaforge then trains in plain PyTorch.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llavaforge.config.schema import TrainConfig

_PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ProcessFailed(RuntimeError):
    """A process of a run ended badly; the message has the end of its log."""


def run(config: TrainConfig, num_processes: int, threshold: int, folder: Path) -> list[dict[str, Any]]:
    """Train in so many processes.

    Args:
        config: of the run.
        num_processes: 1 for the plain engine.
        threshold: see `bench/scaling/rank.py`.
        folder: for logs and reports.

    Returns:
        The reports of `bench/scaling/rank.py`, by rank.

    Raises:
        ProcessFailed: one ended with a code other than 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = config.model_dump_json(exclude_unset=True)
    reports = [folder / f"rank-{rank}.json" for rank in range(num_processes)]
    logs = [folder / f"rank-{rank}.log" for rank in range(num_processes)]
    port = _free_port()
    with ExitStack() as stack:
        processes = []
        for rank, (report, log) in enumerate(zip(reports, logs, strict=True)):
            report.unlink(missing_ok=True)
            process = start([values, str(threshold), str(report)], _environment(rank, num_processes, port), log)
            stack.callback(_end, process)
            processes.append(process)
        codes = [process.wait() for process in processes]
    if any(codes):
        rank = next(rank for rank, code in enumerate(codes) if code)
        end = logs[rank].read_text(errors="replace")[-3000:]
        raise ProcessFailed(f"process {rank} of {num_processes} ended with {codes[rank]}. The end of its log:\n{end}")
    return [json.loads(report.read_text()) for report in reports]


def start(arguments: list[str], environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """Start `bench/scaling/rank.py`; what it says goes to the log."""
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.scaling.rank", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _PLACES}
    shared = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    if size == 1:
        return {**inherited, **shared}
    places = (str(rank), str(rank), str(size), "127.0.0.1", str(port))
    return {**inherited, **shared, **dict(zip(_PLACES, places, strict=True))}


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
