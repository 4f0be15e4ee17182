"""`llavaforge env`: what this machine is, and with `--check` the proof that it trains rightly, and how fast.

Comes in: the options. Goes out: facts, one line per check, one JSON. Under torchrun all processes check at once: each
its own device, then all of them together.
"""

import gc
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llavaforge.config.schema import EnvConfig
from llavaforge.config.train_types import TRAIN_TYPES
from llavaforge.device import compute_dtype, total_memory
from llavaforge.engine.memory import Counts, engine_memory
from llavaforge.errors import is_out_of_memory, reason
from llavaforge.files import replace_text, to_json
from llavaforge.machine.facts import machine_facts
from llavaforge.machine.proofs import (
    Figures,
    prove_attention,
    prove_resume,
    prove_train_type,
    prove_zero,
)
from llavaforge.machine.random_model import PUBLISHED, REPLICA, random_model, train_options
from llavaforge.machine.speed import Work, measure
from llavaforge.model.trainable import set_trainable
from llavaforge.processes.bandwidth import sent_bytes_per_s
from llavaforge.processes.launch import num_processes
from llavaforge.processes.world import World, open_world
from llavaforge.results import EnvResult
from llavaforge.training.peak_flops import measured_flops

logger = logging.getLogger(__name__)

Check = tuple[str, Callable[[], Figures]]

_TIMEOUT_S = 600.0
_OWN = r"\{\s*\"llavaforge\": "  # how our JSON begins
_COPY_BYTES = 2**28
_REPEATS = 5
_HEADROOM = 0.95  # of the device's memory, for what is forecast


def env(config: EnvConfig) -> EnvResult:
    """Show the machine, and check it where that is asked for."""
    facts = machine_facts()
    is_writer = os.environ.get("RANK", "0") == "0"
    if is_writer:
        _write(config.output, _result(facts, []))  # before the minutes of checking: it may not be possible
        _show(facts, Console(stderr=True))
    checks: list[dict[str, Any]] = []
    size, has_deepspeed = num_processes(), importlib.util.find_spec("deepspeed") is not None
    if config.check:
        with open_world(size, _TIMEOUT_S, needs_group=has_deepspeed) as world:
            console = Console(stderr=True, quiet=not world.is_writer)
            for name, check in _checks(world, has_deepspeed):
                world.at(name)
                checks.append(_outcome(name, check, world))
                console.print(_line(checks[-1]), markup=False, highlight=False, soft_wrap=True)
    result = _result(facts, checks)
    if is_writer:
        _write(config.output, result)
    return result


def _result(facts: dict[str, Any], checks: list[dict[str, Any]]) -> EnvResult:
    num_failed = sum(not check["ok"] for check in checks)
    return {**facts, "checks": checks, "num_failed": num_failed}  # type: ignore[typeddict-item]


def _write(output: Path | None, result: EnvResult) -> None:
    if output is not None:
        replace_text(output, to_json(result, indent=1) + "\n", own=_OWN)


def _checks(world: World, has_deepspeed: bool) -> Iterator[Check]:
    """Yield all checks of a machine, the quickest first."""
    device, low = world.device, compute_dtype("auto")
    types = [torch.float32] if low == torch.float32 else [torch.float32, low]
    for dtype in types:
        yield f"attention, {_name(dtype)}", partial(prove_attention, device, dtype)
    for train_type in TRAIN_TYPES:
        for dtype in types:
            yield (
                f"steps of {train_type}, {_name(dtype)}",
                partial(prove_train_type, device, train_type, dtype),
            )
    yield f"resume, {_name(low)}", partial(prove_resume, device, low)
    if has_deepspeed:
        for stage in ("zero1", "zero2", "zero3"):
            yield f"DeepSpeed {stage}", partial(prove_zero, world, stage)
    for dtype in types:
        yield (
            f"matrix product, {_name(dtype)}",
            partial(_product, device, dtype),
        )
    yield "copies", partial(_copies, device)
    if world.size > 1:
        yield "all-reduce", partial(_all_reduce, device)
    for work in _works(world):
        yield _title(work), partial(_speed, work, world)


def _works(world: World) -> Iterator[Work]:
    """Yield what is timed: the published sizes where they fit, the replica on a CPU."""
    if world.device.type == "cpu":
        yield from (Work(REPLICA, kind, 4) for kind in ("projector", "use_lora", "freeze_vision"))
        return
    for kind in TRAIN_TYPES:
        work = Work(PUBLISHED, kind, 8)
        model = random_model(PUBLISHED, torch.device("meta"), torch.bfloat16)
        set_trainable(model, train_options(kind))
        engine = "plain" if world.size == 1 else "zero2"
        weights = engine_memory(engine, Counts.of(model), world.size).total
        if weights > _HEADROOM * total_memory(world.device):
            continue
        yield work
        if kind == "projector" and world.size == 1:
            yield Work(PUBLISHED, kind, 8, compile=True)
            yield Work(PUBLISHED, kind, 8, recompute_every=1)


def _title(work: Work) -> str:
    how = ", compiled" * work.compile + ", all layers recomputed" * (work.recompute_every == 1)
    return f"{work.train_type} at {'real size' if work.size == PUBLISHED else 'a 120th of the size'}{how}"


def _speed(work: Work, world: World) -> Figures:
    speed = measure(work, world)
    gc.collect()
    torch._dynamo.reset()  # compiled graphs hold the weights of the model before
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    figures = {name: value for name, value in asdict(speed).items() if name not in ("loss", "forecast_bytes")}
    if world.device.type != "cpu":  # where the peak is that of the whole process
        figures["forecast_of_peak"] = speed.forecast_bytes / speed.peak_memory_bytes
    return figures


def _product(device: torch.device, dtype: torch.dtype) -> Figures:
    return {"tflops": measured_flops(device, dtype) / 1e12}


def _copies(device: torch.device) -> Figures:
    """Return the rates of copies on the device (bytes read and written) and from the host to it."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    figures = {"on_device_gb_per_s": 2 * _rate(device, lambda: source.clone())}
    if device.type == "cuda":
        host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        figures["from_host_gb_per_s"] = _rate(device, lambda: source.copy_(host, non_blocking=True))
    return figures


def _all_reduce(device: torch.device) -> Figures:
    return {"sent_gb_per_s": sent_bytes_per_s(device) / 1e9}


def _rate(device: torch.device, copy: Callable[[], Any]) -> float:
    """Return the best GB/s of something that handles `_COPY_BYTES`."""
    best = 0.0
    for _ in range(_REPEATS):
        _wait(device)
        begin = time.perf_counter()
        copy()
        _wait(device)
        best = max(best, _COPY_BYTES / 1e9 / (time.perf_counter() - begin))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _outcome(name: str, check: Callable[[], Figures], world: World) -> dict[str, Any]:
    """Do a check on all processes; it holds where it holds on each of them."""
    begin = time.perf_counter()
    figures, failed = {}, ""
    try:
        figures = check()
    except Exception as error:  # whatever a machine may do
        failed = "out of memory" if is_out_of_memory(error) else reason(error)
        logger.debug("%s", name, exc_info=error)
    seconds = round(time.perf_counter() - begin, 2)
    failures = [f"process {rank}: {told}" for rank, told in enumerate(world.all_gather_objects(failed)) if told]
    return {"name": name, "ok": not failures, "seconds": seconds, "figures": figures, "failures": failures}


def _line(check: dict[str, Any]) -> str:
    figures = "  ".join(f"{key} {value:.4g}" for key, value in check["figures"].items())
    told = figures if check["ok"] else "; ".join(check["failures"])
    return f"{'ok    ' if check['ok'] else 'FAILED'}  {check['name']:<45}{check['seconds']:>7.1f} s  {told}"


def _show(facts: dict[str, Any], console: Console) -> None:
    for name, value in facts.items():
        if isinstance(value, dict):
            value = "  ".join(f"{key} {one}" for key, one in value.items() if one is not None)
        elif isinstance(value, list):
            value = "  ".join(str(one) for one in value)
        text = "-" if value in (None, "") else str(value)
        console.print(f"{name:<16}{text}", markup=False, highlight=False, soft_wrap=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
