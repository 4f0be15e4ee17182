"""A lost rank ends the whole run with one message. Real processes, real signals."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from folder_store import FolderStore
from heartbeat_runs import HOST, Run, has_ended
from llavaforge.processes.heartbeat import Heartbeat


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs = []

    def begin(size: int = 3, timeout_s: float = 30, hosts: Sequence[str] = (), missing: int = 0) -> Run:
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        runs.append(Run(folder, size, timeout_s, list(hosts), missing))
        return runs[-1]

    yield begin
    left = [process.pid for run in runs for process in run.ranks if process.poll() is None]
    left += [run.judge.pid for run in runs if not has_ended(run.judge, within_s=5)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, ("processes were left behind", [run.said() for run in runs])


def only_message(run: Run, speaker: int = 0) -> str:
    """Return what was said; the judge speaks on rank 0's stderr."""
    said = run.said()
    assert [rank for rank, text in enumerate(said) if text] == [speaker], said
    assert said[speaker].count("rank ") == 1, said[speaker]
    return said[speaker]


def test_a_normal_end_raises_no_alarm(start: Callable[..., Run]) -> None:
    orders = [[0, 1, 2], [2, 1, 0], [1, 0, 2]] * 2
    runs = [start(timeout_s=2) for _ in orders]
    suspended = start(timeout_s=2)  # as `scontrol suspend` does
    for process in (*suspended.ranks, suspended.judge):
        process.send_signal(signal.SIGSTOP)
    for run, order in zip(runs[:3], orders, strict=False):  # at once
        for rank in order:
            run.tell(rank, "close")
    for turn in range(3):  # one after the other
        for run, order in zip(runs[3:], orders[3:], strict=True):
            run.tell(order[turn], "close")
        time.sleep(0.75)  # three times: longer than the limit
    for process in (*suspended.ranks, suspended.judge):
        process.send_signal(signal.SIGCONT)
    time.sleep(0.7)
    for rank in (1, 2, 0):
        suspended.tell(rank, "close")
    for run in [*runs, suspended]:
        assert run.codes(within_s=2) == [0, 0, 0]
        assert run.said() == ["", "", ""]


def test_a_killed_rank_ends_all(start: Callable[..., Run]) -> None:
    second, forked = start(), {lost: start(size=2) for lost in (0, 1)}
    second.ranks[2].send_signal(signal.SIGSTOP)
    second.ranks[1].kill()
    for lost, run in forked.items():  # a loader worker does not hide the death of its rank
        for rank in (0, 1):
            run.tell(rank, "fork")
            run.answer(rank)
        run.ranks[lost].kill()
        assert sorted(run.codes(within_s=2)) == [-9, 1]
        assert f"rank {lost} " in only_message(run)

    runs = {lost: start(timeout_s=4) for lost in range(3)}
    for run in runs.values():
        run.everybody_at("step 12: backward of micro-step 3")
    time.sleep(1.5)  # until the place has been told
    for lost, run in runs.items():
        run.ranks[lost].kill()
    for lost, run in runs.items():
        assert run.codes(within_s=3) == [-9 if rank == lost else 1 for rank in range(3)]
        message = only_message(run)
        assert f"rank {lost} (host {HOST}, pid {run.ranks[lost].pid}) died; " in message
        assert "it was at: step 12: backward of micro-step 3.\nThe last checkpoint is intact" in message
    assert second.codes(within_s=3) == [1, -9, -9]  # the stopped one is not left behind
    assert "rank 1 " in only_message(second)


def test_a_stopped_rank_ends_all_and_is_killed(start: Callable[..., Run]) -> None:
    runs, missing = {lost: start(timeout_s=2) for lost in (0, 1)}, start(size=4, timeout_s=2, missing=2)
    for run in runs.values():
        run.everybody_at("loading weights")
    time.sleep(0.9)
    for lost, run in runs.items():
        run.ranks[lost].send_signal(signal.SIGSTOP)
    for lost, run in runs.items():
        assert run.codes(within_s=7) == [-9 if rank == lost else 1 for rank in range(3)]
        message = only_message(run)
        assert f"rank {lost} (host {HOST}, pid {run.ranks[lost].pid}) has not answered for 2 s; " in message
        assert "it was at: loading weights.\n" in message
    assert missing.codes(within_s=4) == [1, 1]
    assert "rank 2 (host unknown, pid 0) has not answered for 2 s; it was at: start.\n" in only_message(missing)


def test_a_rank_that_fails_takes_all_with_its_exit_code_but_blames_a_lost_peer(start: Callable[..., Run]) -> None:
    runs = {(rank, exit_code): start() for rank, exit_code in [(0, 2), (2, 75)]}
    together, victims, alone, mistaken = start(), start(), start(size=2), start(size=2)
    for rank in (2, 0):
        victims.tell(rank, "fail", 1, "Connection closed by peer", True)
    alone.tell(1, "fail", 1, "Connection closed by peer", True)
    mistaken.tell(0, "fail", 1, "RuntimeError: NCCL")
    for rank in range(3):
        together.tell(rank, "fail", 2, "no such folder")
    for (rank, exit_code), run in runs.items():
        run.tell(rank, "fail", exit_code, "image 7 is broken")

    time.sleep(0.3)
    mistaken.ranks[1].kill()
    assert mistaken.codes(within_s=3) == [1, -9]
    assert "rank 1 " in only_message(mistaken)

    assert runs[2, 75].ranks[2].wait(5) == 75
    assert runs[2, 75].ranks[0].poll() is None  # torchrun would have ended rank 2 before it could speak
    time.sleep(0.4)  # longer than an unflagged failure waits
    victims.ranks[1].kill()
    assert victims.codes(within_s=3) == [1, -9, 1]
    assert f"rank 1 (host {HOST}, pid {victims.ranks[1].pid}) died" in only_message(victims)

    for (rank, exit_code), run in runs.items():
        assert run.codes(within_s=5) == [exit_code] * 3
        assert only_message(run, rank) == f"rank {rank} fails: image 7 is broken"
    assert together.codes(within_s=5) == [2, 2, 2]
    assert "".join(together.said()).count("fails: no such folder") == 1
    assert alone.codes(within_s=9) == [1, 1]
    assert only_message(alone, 1) == "rank 1 fails: Connection closed by peer"


def test_no_progress_names_the_rank_behind_unless_a_place_is_untimed(start: Callable[..., Run]) -> None:
    run, alike, untimed = start(timeout_s=2), start(size=2, timeout_s=2), start(size=2, timeout_s=2)
    run.everybody_at("step 12: reading images", True)
    for rank in (0, 2):
        run.tell(rank, "at", "step 12: gradients", True)
    alike.everybody_at("step 12: gradients", True)
    untimed.everybody_at("step 12: gradients", True)
    untimed.tell(0, "at", "writing the checkpoint")
    assert run.codes(within_s=6) == [1, 1, 1]
    message = only_message(run)
    assert (
        f"no progress for 2 s: rank 1 (host {HOST}, pid {run.ranks[1].pid}) is at: step 12: reading images" in message
    )
    assert "images, while the others are at: step 12: gradients.\n" in message
    assert alike.codes(within_s=6) == [1, 1]
    assert "no progress for 2 s: ranks 0, 1 are at: step 12: gradients.\n" in alike.said()[0]
    time.sleep(0.5)
    for rank in (0, 1):
        untimed.tell(rank, "close")
    assert untimed.codes(within_s=2) == [0, 0]
    assert untimed.said() == ["", ""]


def test_ranks_on_several_hosts(start: Callable[..., Run]) -> None:
    need_hostnames()
    failed, lost = start(hosts=["n1", "n1", "n2"]), start(size=4, hosts=["n1", "n1", "n2", "n2"])
    failed.tell(2, "fail", 2, "image 7 is broken")
    for process in (lost.judge, *lost.ranks[:2]):  # the whole host of rank 0, with no time for the judge to notice
        process.send_signal(signal.SIGSTOP)
    for process in (lost.judge, *lost.ranks[:2]):
        process.kill()
    assert lost.codes(within_s=4) == [-9, -9, 1, 1]
    message = "error: rank 0 (host n1) or the judge beside it is lost.\nThe last checkpoint is intact"
    assert [text[: len(message)] for text in lost.said()] == ["", "", message, ""]
    assert failed.codes(within_s=4) == [2, 2, 2]
    said = failed.said()
    assert said[0].startswith("error: rank 2 (host n2, pid ") and "image 7 is broken" in said[0]
    assert said[1:] == ["", "rank 2 fails: image 7 is broken"]


def need_hostnames() -> None:
    with contextlib.suppress(OSError):
        if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode == 0:
            return
    pytest.skip("needs unshare --uts to give processes a host name")


def test_a_rank_without_a_judge_says_where_it_looked(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.set("judge", "1")
    with pytest.raises(ConnectionError, match=r"rank 1 cannot reach rank 0's judge at localhost:1: .*refused"):
        Heartbeat(store, "localhost", 1, 2, timeout_s=0.6)


def test_a_rank_that_dies_in_the_middle_of_a_line_died(start: Callable[..., Run]) -> None:
    run = start(size=2, missing=1)
    with socket.create_connection(("127.0.0.1", int(run.store.get("judge")))) as rank_1:
        rank_1.sendall(b'{"rank": 1, "host": "n7", "pid": 5}\n{"at": "step 3", "count": 1, "timed": true}\n{"at": "st')
    assert run.codes(within_s=3) == [1]
    assert "rank 1 (host n7, pid 5) died; it was at: step 3.\n" in only_message(run)


def test_strangers_are_ignored(start: Callable[..., Run]) -> None:
    run = start(size=2)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b'{"left": "left"}\n', b"[1]\n", b"\xff\n", b"x" * (1 << 17)):
        with socket.create_connection(("127.0.0.1", int(run.store.get("judge")))) as stranger:
            stranger.sendall(garbage)
    with socket.create_connection(("127.0.0.1", int(run.store.get("judge"))), timeout=5) as stranger:
        stranger.sendall(b'{"rank": 1}\n')  # is taken
        assert stranger.recv(1) == b""
    for rank in (0, 1):
        run.tell(rank, "close")
    assert run.codes(within_s=2) == [0, 0]
    assert run.said() == ["", ""]
