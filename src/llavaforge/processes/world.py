"""The processes of a run, and what they tell each other outside of a step.

Comes in: rank and world size as `launch.py` read them from the environment. Goes out: sums, messages, a common end. A
process-wide thing, like torch's process group: it is opened by the first run of a process and stays open for the next.

Two groups: the default one (NCCL or gloo) carries the steps and their sums; a gloo group of its own carries the rest.
That one may wait for a day (a rank that tokenises 100 million records lets the others wait), because the heartbeat
notices a rank that is dead or stuck.
"""

import atexit
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from llavaforge.device import pick_device
from llavaforge.errors import EndedElsewhere, StoppedEarly, UserError, as_user_error
from llavaforge.processes import workers
from llavaforge.processes.heartbeat import Heartbeat

T = TypeVar("T")

_STEP_TIMEOUT = timedelta(minutes=30)  # of a collective within a step; the heartbeat ends a stuck run long before
_CONTROL_TIMEOUT = timedelta(days=1)


class World:
    """One process among those of its run; alone when it was started alone.

    Attributes:
        rank: number of this process.
        size: number of processes.
        device: where its tensors live.
        rank_on_host: number of this process among those on its host.
        size_on_host: how many of the run's processes are on its host.
        num_cores: processor cores of its own, once it has joined; the launcher may have set fewer threads.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.device = device or pick_device()
        self.rank_on_host, self.size_on_host, self.num_cores = 0, 1, 1
        self._control_group: dist.ProcessGroup | None = None
        self._heartbeat: Heartbeat | None = None
        self._has_failed = False

    @property
    def is_writer(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def at(self, where: str, timed: bool = False) -> None:
        """Say where this process is, for the message when it is lost.

        Args:
            where: such as `step 12: reading images`.
            timed: it must get on within the stuck timeout; untimed places may last.
        """
        if self._heartbeat is not None:
            self._heartbeat.at(where, timed)

    def at_step(self, step: int, where: str) -> None:
        """Say where within a step, counted from 1, this process is; a step must get on within the stuck timeout."""
        self.at(f"step {step}: {where}", timed=True)

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of some numbers over all processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """Return the maxima of some numbers over all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def all_gather_objects(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self._control_group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control_group)
        return values

    def broadcast_object(self, value: T) -> T:
        """Return the writer's value on every process."""
        if self._control_group is None:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, group=self._control_group)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self._control_group is not None:
            dist.barrier(group=self._control_group)

    def run_on_all(self, function: Callable[[], T]) -> T:
        """Do something on every process; when it fails on one, fail on all of them.

        Args:
            function: must not wait for other processes.

        Returns:
            What it returned here.

        Raises:
            UserError, StoppedEarly, OSError: as raised by `function`, on the lowest rank where it failed.
            EndedElsewhere: on the others.
        """
        error: BaseException | None = None
        try:
            value = function()
        except (UserError, StoppedEarly, OSError) as caught:
            error = caught
        told = as_user_error(error) or error if isinstance(error, OSError) else error  # as `cli.main` tells it
        codes = self.all_gather_objects(None if told is None else getattr(told, "exit_code", 1))
        failed = [(rank, code) for rank, code in enumerate(codes) if code is not None]
        if not failed:
            return value
        rank, code = failed[0]
        raise agreed(error if error is not None and rank == self.rank else EndedElsewhere(code))

    def run_on_first_of_host(self, function: Callable[[], T]) -> T:
        """Do something on the first process of each host, and then on the others (which find it done)."""
        if self.rank_on_host == 0:
            value = self.run_on_all(function)
            self.run_on_all(lambda: None)
            return value
        self.run_on_all(lambda: None)
        return self.run_on_all(function)

    def fail(self, error: BaseException) -> NoReturn:
        """Raise an error that every process has met: the writer's, which tells the user, and `EndedElsewhere`."""
        raise agreed(error if self.is_writer else EndedElsewhere(getattr(error, "exit_code", 1)))

    def report(self, error: BaseException) -> None:
        """Tell the others why this process ends, unless all of them know."""
        if self._heartbeat is None or getattr(error, "agreed", False):
            return
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        first_line = (str(error).splitlines() or [""])[0]
        text = str(error) if isinstance(error, UserError | StoppedEarly) else f"{type(error).__name__}: {first_line}"
        self._heartbeat.leave(code, text, because_of_peer=_is_lost_peer(error))
        self._has_failed = True

    def close(self) -> None:
        """Leave the run, quietly unless that was reported; called when this process exits."""
        if self._heartbeat is not None and not self._has_failed:
            self._heartbeat.leave()
        if dist.is_initialized() and not self._has_failed:
            dist.destroy_process_group()

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self._control_group is None:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        # By the group of the steps: NCCL does it at once, where a gloo ring takes one hop a rank.
        dist.all_reduce(totals, operation)
        return [float(total) for total in totals]

    def join(self, timeout_s: float) -> None:
        """Meet the other processes.

        Raises:
            UserError: some did not come in time.
        """
        store, self.rank, self.size = _meet(self.rank, self.size, timeout_s)
        if self.size > 1:
            self._heartbeat = Heartbeat(store, os.environ["MASTER_ADDR"], self.rank, self.size, timeout_s)
        self.device = _own_device()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.size, timeout=_STEP_TIMEOUT,
            device_id=self.device if backend == "nccl" else None,
        )  # fmt: skip
        self._control_group = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
        mine = socket.gethostname(), _device_id(self.device), workers.own_cores()
        names, devices, cores = zip(*self.all_gather_objects(mine), strict=True)
        self.rank_on_host = names[: self.rank].count(names[self.rank])
        self.size_on_host = names.count(names[self.rank])
        self.num_cores = share_of_cores(list(zip(names, cores, strict=True)), self.rank)
        self.run_on_all(lambda: _check_devices(list(zip(names, devices, strict=True)), self.rank))


_open: list[World] = []  # at most one


@contextmanager
def open_world(size: int, timeout_s: float, needs_group: bool) -> Iterator[World]:
    """Give the world of this process; what the block raises is told to the other processes.

    Args:
        size: number of processes (`launch.num_processes`).
        timeout_s: how long a process may be silent, or stand still in a step, before the run is ended.
        needs_group: a process group is wanted even for one process (DeepSpeed).
    """
    if size > 1 or needs_group:
        if not _open:
            if not torch.cuda.is_available():
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
                # Or DeepSpeed starts `numactl` to count the devices of a CPU, once per gradient under ZeRO-3.
                os.environ.setdefault("LOCAL_SIZE", "1")
            world = World(int(os.environ.get("RANK", "0")), size)
            atexit.register(world.close)
            try:
                world.join(timeout_s)
            except BaseException as error:
                world.report(error)
                raise
            _open.append(world)
        world = _open[0]
    else:
        world = World()
    try:
        yield world
    except BaseException as error:
        world.report(error)
        raise


def agreed(error: BaseException) -> BaseException:
    """Mark an error that every process raises at this point, so that none takes another's end for a fault."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def _meet(rank: int, size: int, timeout_s: float) -> tuple[Any, int, int]:
    """Return the store in which all processes have put their names, the rank and the world size."""
    if size == 1:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_PORT", "0")  # DeepSpeed wants the variables to be there
        return dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = _open_store(rank, size, timedelta(seconds=timeout_s))
    except (dist.DistStoreError, dist.DistNetworkError, TimeoutError, ValueError) as error:
        raise UserError(
            f"process {rank} of {size} on {socket.gethostname()} cannot reach process 0 at {where} within "
            f"{timeout_s:.0f} s ({str(error).splitlines()[0]}). Check that it runs, that the address is one that all "
            "hosts reach (set MASTER_ADDR), and that no other program uses the port (set MASTER_PORT)."
        ) from None
    store.set(f"here/{rank}", socket.gethostname())
    deadline = time.monotonic() + timeout_s
    keys = [f"here/{other}" for other in range(size)]
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
            if rank == min(set(range(size)) - {int(other) for other in missing}):
                raise UserError(
                    f"{size - len(missing)} of {size} processes came within {timeout_s:.0f} s; missing: "
                    f"{', '.join(missing[:20])}. Look at the hosts where they should run, or raise stuck_timeout_s."
                )
            raise EndedElsewhere(UserError.exit_code)
        time.sleep(0.1)
    return store, rank, size


def _open_store(rank: int, size: int, timeout: timedelta) -> tuple[Any, int, int]:
    """Return the store of the run; torchrun has opened one, under srun process 0 does."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(rendezvous("env://", timeout=timeout))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
    return store, rank, size


def _own_device() -> torch.device:
    """Return this process's GPU: its local rank's, or the only one it sees when SLURM shows it no other."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, num_visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    return torch.device("cuda", 0 if num_visible == 1 else local_rank % num_visible)


def _device_id(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def share_of_cores(cores: Sequence[tuple[str, set[int]]], rank: int) -> int:
    """Return how many cores a process has for itself.

    Args:
        cores: host of each rank, and the cores that it may run on: all of them under torchrun, its own under srun.
        rank: of the process.
    """
    return max(1, len(cores[rank][1]) // cores.count(cores[rank]))


def _check_devices(hosts: Sequence[tuple[str, str]], rank: int) -> None:
    """Check that no lower rank has this rank's GPU.

    Raises:
        UserError: one has.
    """
    host, device = hosts[rank]
    if device and (host, device) in hosts[:rank]:
        other = hosts.index((host, device))
        raise UserError(
            f"processes {other} and {rank} share one GPU of {host}: more processes than GPUs were started there. Start "
            "one process per GPU (torchrun --nproc_per_node, srun --ntasks-per-node)."
        )


def _is_lost_peer(error: BaseException) -> bool:
    """Say whether an error looks like another process's death: the words of gloo, NCCL and the store."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError | dist.DistStoreError):
        return True
    words = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting", "Read error", "NCCL")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
