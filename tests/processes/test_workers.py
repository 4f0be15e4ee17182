"""Workers are started whole or not at all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

MOMENTS = [
    ("_launch", "return", 1),  # the server
    ("_launch", "return", 2),  # a pool's first worker, and another
    ("_launch", "return", 3),
    ("start", "call", 3),  # the pool's thread
]


@pytest.mark.parametrize(("function", "event", "number"), MOMENTS)
def test_ctrl_c_while_workers_start_leaves_none_half_started(function: str, event: str, number: int) -> None:
    script = Path(__file__).with_name("interrupted.py")
    command = [sys.executable, script, function, event, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"interrupted in {function}\n", "")


def test_a_worker_whose_process_died_as_it_took_a_pack_ends_without_a_word() -> None:
    command = [sys.executable, Path(__file__).with_name("orphaned.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, "", "")
