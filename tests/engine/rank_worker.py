"""One rank of `ranks.RankPool`: does `train(config)` for each job and answers with its result.

A job is the options of a run, and faults, which are injected on the ranks that they name.
"""

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from llavaforge.config.schema import TrainConfig
from llavaforge.data.load.pack import Pack
from llavaforge.errors import StoppedEarly
from llavaforge.model import loss
from llavaforge.model.step import StepModule
from llavaforge.processes.world import World, agreed
from llavaforge.training import saving
from llavaforge.training.guards import Guards
from llavaforge.training.run import train
from llavaforge.training.step import OptimizerStep
from llavaforge.training.trainer import Trainer


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def injected(faults: dict[str, Any]) -> Iterator[None]:
    """Do to a run what the world does to runs.

    `nan`: [rank, step] whose loss is not a number; `stop`: [rank, step] at which that rank is asked to stop; `chunk`: a
    number of supervised tokens from which the loss is computed in pieces; `die`: a step before which all ranks end;
    `free`: bytes that the disk says are free; `memory`: bytes that the host says are; `write_after`: [rank, step] that
    must be taken before that rank writes anything of a checkpoint; `write_fails`: a rank that can open no file of
    a checkpoint.
    """
    forward, agree, chunk, usage = StepModule.forward, Guards.agree, loss.CHUNK, shutil.disk_usage
    open_path, free_memory, is_taken = Path.open, saving.free_host_memory, threading.Event()

    def poisoned(self: StepModule, pack: Pack) -> torch.Tensor:
        total = forward(self, pack)
        return (
            total * float("nan") if faults.get("nan") == [_rank(), pack.source.step] and total.requires_grad else total
        )

    def open_for(self: Path, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name.startswith("checkpoint"):
            if faults.get("write_fails") == _rank():
                raise OSError(errno.EIO, "Input/output error")
            if faults.get("write_after", [None])[0] == _rank():
                assert is_taken.wait(120), "training waits for the checkpoint"
        return open_path(self, *arguments, **options)

    def stopped(self: Guards, packs: list[Pack], fault: Any, stop: Any) -> tuple[int, bool]:
        if faults.get("write_after") == [_rank(), self.state.step]:
            is_taken.set()
        if faults.get("die") == self.state.step:
            raise agreed(RuntimeError("killed"))  # of all ranks at once, so that none reports another's death
        if faults.get("stop") == [_rank(), self.state.step]:
            stop.exit_code = 75
        return agree(self, packs, fault, stop)

    StepModule.forward, Guards.agree = poisoned, stopped  # type: ignore[method-assign]
    Path.open = open_for  # type: ignore[assignment,method-assign]
    loss.CHUNK = faults.get("chunk", chunk)
    if "free" in faults:
        shutil.disk_usage = lambda path: usage(path)._replace(free=faults["free"])
    if "memory" in faults:
        saving.free_host_memory = lambda: faults["memory"]
    try:
        yield
    finally:
        shutil.disk_usage, saving.free_host_memory = usage, free_memory
        Path.open = open_path  # type: ignore[method-assign]
        StepModule.forward, Guards.agree, loss.CHUNK = forward, agree, chunk  # type: ignore[method-assign]


@contextlib.contextmanager
def before_step_1(act: Callable[[], Any]) -> Iterator[None]:
    """Call `act` when all is loaded and training begins."""
    begin = Trainer.train

    def acted(self: Trainer, stop: Any) -> dict[str, Any]:
        act()
        return begin(self, stop)

    Trainer.train = acted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.train = begin  # type: ignore[method-assign]


class AnonymousMemory:
    """The most memory of this process's own (not mapped from a file) while it is watched, beyond what it began with."""

    def __init__(self) -> None:
        self.grown_bytes, self._begin, self._is_over = 0, self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) * 1024

    def _watch(self) -> None:
        while not self._is_over.wait(0.005):
            self.grown_bytes = max(self.grown_bytes, self._now() - self._begin)

    def end(self) -> int:
        self._is_over.set()
        self._thread.join()
        return self.grown_bytes


@contextlib.contextmanager
def counted() -> Iterator[dict[str, Any]]:
    """Count what ranks wait for each other for in a run.

    `invalid_traces`: how often ZeRO-3 found that a pass calls other modules than the one before, so that it cannot
    fetch weights ahead; `messages`: what `World` told the others in each step, from the end of the last one on.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    counts: dict[str, Any] = {"invalid_traces": 0, "messages": [0]}
    invalidate, step = Coordinator._invalidate_trace, OptimizerStep.__call__

    def invalidated(self: Any) -> None:
        counts["invalid_traces"] += 1
        invalidate(self)

    def stepped(self: OptimizerStep, *arguments: Any) -> Any:
        taken = step(self, *arguments)
        counts["messages"].append(0)
        return taken

    def telling(function: Any) -> Any:
        def told(*arguments: Any) -> Any:
            counts["messages"][-1] += 1
            return function(*arguments)

        return told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coordinator, "_invalidate_trace", invalidated)
        patch.setattr(OptimizerStep, "__call__", stepped)
        for name in ("_reduce", "all_gather_objects", "broadcast_object", "barrier"):
            patch.setattr(World, name, telling(getattr(World, name)))
        yield counts


def serve(jobs: "Connection[Any, Any]") -> None:
    """Do one job after the other, until there is nobody any more to give one."""
    while True:
        try:
            config, faults = jobs.recv()
        except EOFError:
            return
        torch.set_num_threads(1)
        memory = AnonymousMemory()
        try:
            with injected(faults), counted() as counts, before_step_1(memory.end):
                answer: dict[str, Any] = {"result": train(TrainConfig.model_validate(config)), **counts}
        except (Exception, StoppedEarly) as error:
            answer = {"error": type(error).__name__, "message": str(error), "code": getattr(error, "exit_code", 1)}
        jobs.send(answer | {"loading_bytes": memory.end()})


def threads_after(config: TrainConfig) -> int:
    """Train, and return how many threads torch uses then."""
    train(config)
    return torch.get_num_threads()
