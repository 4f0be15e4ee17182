"""Several real processes that train together, kept for the whole session."""

import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from llavaforge.config.schema import TrainConfig
from rank_worker import serve
from warm import WarmProcess


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun gives a process."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


class RankPool:
    """`size` ranks over gloo that do one job after the other."""

    def __init__(self, size: int, log_dir: Path) -> None:
        self.size, port = size, free_port()
        self._logs = [log_dir / f"rank-{rank}-of-{size}.log" for rank in range(size)]
        self._ranks = []
        for rank in range(size):
            ours, theirs = multiprocessing.Pipe()
            process = WarmProcess(serve, theirs, env=rank_environment(rank, size, port), log=self._logs[rank])
            theirs.close()
            self._ranks.append((process, ours))

    def run(self, config: TrainConfig, **faults: Any) -> list[dict[str, Any]]:
        """Train on all ranks and return their answers, by rank."""
        for _, connection in self._ranks:
            connection.send((config.model_dump(mode="json", exclude_unset=True), faults))
        try:
            return [connection.recv() for _, connection in self._ranks]
        except EOFError:
            pytest.fail("\n".join(log.read_text()[-2000:] for log in self._logs))

    def train(self, config: TrainConfig, **faults: Any) -> dict[str, Any]:
        """Train on all ranks, which must succeed, and return the result."""
        answers = self.run(config, **faults)
        assert all("result" in answer for answer in answers), answers
        return dict(answers[0]["result"])

    def close(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
