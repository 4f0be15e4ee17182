"""Several real processes that train together, kept for the whole session: starting one takes ten seconds."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from llavaforge.config.schema import TrainConfig

WORKER = Path(__file__).parent / "rank_worker.py"


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
        self._ranks = []
        self._logs = [log_dir / f"rank-{rank}-of-{size}.log" for rank in range(size)]
        for rank in range(size):
            read_end, write_end = os.pipe()
            process = subprocess.Popen(
                [sys.executable, str(WORKER), str(write_end)],
                env=rank_environment(rank, size, port),
                stdin=subprocess.PIPE,
                stderr=self._logs[rank].open("w"),
                pass_fds=[write_end],
                start_new_session=True,
                text=True,
            )
            os.close(write_end)
            self._ranks.append((process, os.fdopen(read_end)))

    def run(self, config: TrainConfig, **faults: Any) -> list[dict[str, Any]]:
        """Train on all ranks and return their answers, by rank."""
        job = {"config": json.loads(config.model_dump_json(exclude_unset=True)), "faults": faults}
        for process, _ in self._ranks:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        lines = [answers.readline() for _, answers in self._ranks]
        assert all(lines), "\n".join(log.read_text()[-2000:] for log in self._logs)
        return [json.loads(line) for line in lines]

    def train(self, config: TrainConfig, **faults: Any) -> dict[str, Any]:
        """Train on all ranks, which must succeed, and return the result."""
        answers = self.run(config, **faults)
        assert all("result" in answer for answer in answers), answers
        return dict(answers[0]["result"])

    def close(self) -> None:
        for process, answers in self._ranks:
            answers.close()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
