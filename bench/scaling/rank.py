"""One process of a scaling run: `train(config)`, its collectives counted, its checkpoints timed.

Comes in: a config as JSON and where the report goes. Goes out: that file:

    {"weights": {...}, "steps": [{"tensors": {"all_reduce": 142712832, ...}, "tcp_bytes": 214069248}, ...],
     "checkpoints": [{"bytes": 391057408, "save_s": 1.2, "load_s": 0.9}, ...]}

Started by `bench/scaling/processes.py`, alone or as one of several. Nothing of llavaforge is changed: counters hang
around torch's collectives and the engine's `step`.
"""

import json
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.scaling.wire import Weights
from llavaforge.checkpoint.resume import find_checkpoint
from llavaforge.checkpoint.state import ParameterStates
from llavaforge.clock import Clock
from llavaforge.config.schema import TrainConfig
from llavaforge.engine.base import Engine
from llavaforge.engine.plain import PlainEngine
from llavaforge.engine.zero import ZeroEngine
from llavaforge.training import run
from llavaforge.training.opening import OpenedStage
from llavaforge.training.saving import Saver

# Where each collective has its whole tensor: keyword and place of the argument.
_WHOLE = {
    "all_reduce": ("tensor", 0),
    "all_gather_into_tensor": ("output_tensor", 0),
    "reduce_scatter_tensor": ("input", 1),
    "broadcast": ("tensor", 0),
    "reduce": ("tensor", 0),
}
_BYTES_SENT = 200  # offset of `tcpi_bytes_sent` in Linux's struct tcp_info, `tcpi_bytes_retrans` after it (since 4.19)


class Meter:
    """Counts what this process hands to torch.distributed and what TCP carried for it, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._tensors: Counter[str] = Counter()
        self._before: tuple[Counter[str], int | None] = (Counter(), None)
        for name in _WHOLE:
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def mark(self) -> None:
        """End a step."""
        tensors, tcp = Counter(self._tensors), tcp_bytes()
        before, tcp_before = self._before
        self.steps.append(
            {
                "tensors": dict(tensors - before),
                "tcp_bytes": None if tcp is None or tcp_before is None else tcp - tcp_before,
            }
        )
        self._before = tensors, tcp

    def _counting(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        keyword, place = _WHOLE[name]

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs[keyword] if keyword in kwargs else args[place]
            self._tensors[name] += tensor.numel() * tensor.element_size()
            return act(*args, **kwargs)

        return counted


def tcp_bytes() -> int | None:
    """Return the bytes that this process's open TCP connections have sent, each counted once; None where not Linux."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile, or no TCP
            continue
        if len(info) >= _BYTES_SENT + 16:
            sent, again = struct.unpack_from("QQ", info, _BYTES_SENT)
            total += sent - again
    return total


def time_checkpoints(report: list[dict[str, Any]]) -> None:
    """Let every checkpoint that is saved be loaded at once, and put both times into `report`."""
    save = Saver.save

    def timed(saver: Saver) -> None:
        engine, opened, state = saver._engine, saver._opened, saver._state
        engine.world.barrier()
        begin = time.perf_counter()
        save(saver)
        saver.finish()
        saved = time.perf_counter()
        folder = find_checkpoint(opened.config.output_dir, "auto", opened.run, (), engine.world)
        assert folder is not None and folder.name == f"checkpoint-{state.step}"
        engine.restore(ParameterStates(folder), state.step - state.num_skipped)
        engine.world.barrier()
        loaded = time.perf_counter()
        size = sum(path.stat().st_size for path in folder.iterdir())
        report.append({"bytes": size, "save_s": saved - begin, "load_s": loaded - saved})

    Saver.save = timed  # type: ignore[method-assign]


def main(arguments: Sequence[str]) -> None:
    """Train and write the report.

    Args:
        arguments: the config of the run as JSON; up to which size parameters stay whole under ZeRO-3; the file of the
            report.
    """
    config, threshold = TrainConfig.model_validate(json.loads(arguments[0])), int(arguments[1])
    torch.set_num_threads(1)
    meter, timings, weights = Meter(), list[dict[str, Any]](), dict[str, int]()
    time_checkpoints(timings)

    def marking(step: Callable[..., Any]) -> Callable[..., Any]:
        def marked(self: Engine, rate_factor: float) -> Any:
            result = step(self, rate_factor)
            meter.mark()
            return result

        return marked

    def counting(prepare: Callable[..., Any]) -> Callable[..., Any]:
        def counted(opened: OpenedStage, engine: Engine, clock: Clock) -> Any:  # before ZeRO-3 deals the parameters out
            weights.update(asdict(Weights.of(opened.loaded.model, threshold, config.gradient_checkpointing)))
            return prepare(opened, engine, clock)

        return counted

    for engine in (PlainEngine, ZeroEngine):
        engine.step = marking(engine.step)
    run.prepare_or_resume = counting(run.prepare_or_resume)
    run.train(config)
    Path(arguments[2]).write_text(json.dumps({"weights": weights, "steps": meter.steps, "checkpoints": timings}))


if __name__ == "__main__":
    main(sys.argv[1:])
