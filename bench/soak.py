"""`make soak`: runs that are killed, asked to stop, damaged and starved of disk at random, again and again.

Comes in: minutes and a seed. Goes out: one JSON object: what was done, and what was lost by it. Every run must end with
the weights of the undisturbed one (to the bit on one process, within 1e-4 on two), lose at most twice `save_steps`
steps to a kill (the newest checkpoint may not be written yet) and none to a signal, and leave no process and no
temporary file; descriptors and memory stay flat.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import torch

from llavaforge import customize_model, make_shapes
from llavaforge.checkpoint.state import steps_of
from llavaforge.model_folder.tensors import open_tensors
from llavaforge.training.metrics import read_metrics

TRAIN_TYPES = ("projector", "use_lora", "freeze_vision", "full")
STEPS, SAVE_STEPS = 30, 4
SIGNALS = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1, "HUP": signal.SIGHUP, "INT": signal.SIGINT}
# After a kill, so that the next start meets it. What of the newest checkpoint's steps is lost is lost by right.
DAMAGES = ("none", "none", "none", "flip in the newest checkpoint", "cut metrics", "cut run.json", "cut index")
_PATIENCE_S = 300
# Of two processes against one: they add up in another order. Undisturbed runs differ by up to 3e-5 after 30 steps at
# 1e-3, in biases of keys, whose gradient is zero but for rounding.
_TOLERANCE = 1e-4
_FULL_DISK_BYTES = 30_000
_FIRST_S = 2.0  # before that Python itself starts, and a signal ends it as it ends any program


@dataclass
class Tally:
    """What a soak has done and seen."""

    starts: int = 0
    finished_runs: int = 0
    steps: int = 0
    events: Counter[str] = field(default_factory=Counter)
    lost_steps: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    leaked_processes: int = 0
    leftover_files: int = 0
    descriptors: list[int] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)


class Soak:
    """Disturbs runs of small models in a folder until the time is up."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.tally = folder, random.Random(seed), Tally()
        starter = files("llavaforge") / "starter"
        customize_model(
            vision_tower=str(starter / "small-clip"), language_model=str(starter / "small-qwen2"),
            output_dir=folder / "model", torch_dtype="float32",
        )  # fmt: skip
        make_shapes(output_dir=folder / "data", num_samples=120, seed=0)
        self.undisturbed: dict[str, dict[str, torch.Tensor]] = {}

    def run(self, minutes: float) -> dict[str, Any]:
        """Disturb runs for so many minutes; return the report."""
        end = time.monotonic() + 60 * minutes
        number = 0
        while time.monotonic() < end:
            train_type = TRAIN_TYPES[number % len(TRAIN_TYPES)]
            number += 1
            if train_type not in self.undisturbed:
                self.undisturbed[train_type] = self._reference(train_type)
            self._life(self.folder / f"run-{number}", train_type, end)
        return self._report(minutes)

    def _flags(self, output_dir: Path, train_type: str) -> list[str]:
        values: dict[str, Any] = dict(
            model_name_or_path=self.folder / "model", data_path=self.folder / "data" / "train", output_dir=output_dir,
            train_type=train_type, max_steps=STEPS, save_steps=SAVE_STEPS, global_batch_size=4, bf16="false",
            per_device_train_batch_size=2, learning_rate=1e-3, lora_r=4, dataloader_num_workers=1,
            cache_dir=self.folder / "cache", stuck_timeout_s=60,
        )  # fmt: skip
        return [sys.executable, "-m", "llavaforge", "train", *(f"--{name}={value}" for name, value in values.items())]

    def _reference(self, train_type: str) -> dict[str, torch.Tensor]:
        output_dir = self.folder / f"undisturbed-{train_type}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(self._flags(output_dir, train_type), env=environment, check=True, capture_output=True)
        return _tensors(output_dir / "final")

    def _life(self, output_dir: Path, train_type: str, end: float) -> None:
        """Start one run again and again, disturbed, until it is finished."""
        sizes: set[int] = set()
        saved, most_lost, killed_s = None, 0, 0.0
        while time.monotonic() < end:
            size = self.random.choice((1, 1, 2))
            sizes.add(size)
            starved = self.random.random() < 0.1
            before = read_metrics(output_dir)[-1]["step"] if read_metrics(output_dir) else 0
            ranks = self._start(output_dir, train_type, size, starved)
            went_on = self._wait(ranks, output_dir, before, killed_s)
            self.tally.steps += max(0, _newest_step(output_dir) - before)
            event = "starved" if starved else self._disturb(ranks)
            codes = self._end(ranks, event)
            self.tally.events[event] += 1
            if went_on is not None and (lost := before - went_on) > 0:
                self.tally.lost_steps.append(lost)
                if lost > most_lost:
                    self.tally.failures.append(f"{output_dir.name}: {lost} steps lost, at most {most_lost} were to be")
            if went_on is not None and saved is not None and went_on < saved:
                self.tally.failures.append(f"{output_dir.name}: went on from {went_on}, when {saved} was saved")
            if set(codes) == {0}:
                self._compare(output_dir, train_type, sizes)
                shutil.rmtree(output_dir)
                return
            allowed = {"starved": {2}, "TERM": {75}, "USR1": {75}, "HUP": {75}, "INT": {130}}.get(event)
            if allowed is not None and not set(codes) <= allowed | {0}:
                self.tally.failures.append(f"{output_dir.name}: exit codes {codes} after {event}")
            killed_s, told = time.monotonic(), (self.folder / "rank-0.log").read_text()
            found = re.search(r"saved in \S*checkpoint-(\d+)", told) if event in SIGNALS else None
            flipped = self._damage(output_dir) == "flip in the newest checkpoint"
            saved = int(found[1]) if found and not flipped else None
            # After a flip the one before may be as old again; a start that got nowhere leaves it so to the next.
            most_lost = max(SAVE_STEPS * (4 if flipped else 2), 0 if went_on is not None else most_lost)

    def _start(self, output_dir: Path, train_type: str, size: int, starved: bool) -> list["subprocess.Popen[str]"]:
        self.tally.starts += 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        port = _free_port()
        ranks = []
        for rank in range(size):
            mine = dict(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            ranks.append(
                subprocess.Popen(
                    self._flags(output_dir, train_type),
                    env=environment | ({name: str(value) for name, value in mine.items()} if size > 1 else {}),
                    stdout=subprocess.DEVNULL,
                    stderr=(self.folder / f"rank-{rank}.log").open("w"),
                    start_new_session=True,
                    text=True,
                    preexec_fn=_starve if starved else None,
                )
            )
        return ranks

    def _wait(self, ranks: list["subprocess.Popen[str]"], output_dir: Path, before: int, killed_s: float) -> int | None:
        """Wait a random time; return the step that the run went on from, when it got so far."""
        until = time.monotonic() + self.random.uniform(_FIRST_S, 12.0 * len(ranks))
        went_on: int | None = None
        while time.monotonic() < until and all(rank.poll() is None for rank in ranks):
            steps = [line["step"] for line in read_metrics(output_dir)]
            log = (self.folder / "rank-0.log").read_text()
            if went_on is None and "going on from" in log:
                went_on = int(log.split("going on from")[1].split()[0].rsplit("-", 1)[1])
            if went_on is not None and steps and steps[-1] > went_on and killed_s:
                self.tally.recovery_s.append(time.monotonic() - killed_s)
                killed_s = 0.0
            self._look_at(ranks[0])
            time.sleep(0.2)
        return went_on

    def _look_at(self, rank: "subprocess.Popen[str]") -> None:
        with contextlib.suppress(psutil.Error):  # it ends at any time
            process = psutil.Process(rank.pid)
            self.tally.descriptors.append(process.num_fds())
            self.tally.memory_bytes.append(process.memory_info().rss)

    def _disturb(self, ranks: list["subprocess.Popen[str]"]) -> str:
        kinds = ("kill all", "kill all", "kill one", *SIGNALS, "nothing")
        event = self.random.choice(kinds)
        victims = ranks if event != "kill one" else [self.random.choice(ranks)]
        for rank in victims:
            if rank.poll() is None and event != "nothing":
                number = SIGNALS.get(event, signal.SIGKILL)
                os.killpg(rank.pid, number) if event != "kill one" else rank.send_signal(number)
        return event

    def _end(self, ranks: list["subprocess.Popen[str]"], event: str) -> list[int]:
        sessions = {rank.pid for rank in ranks}
        codes = []
        for rank in ranks:
            try:
                codes.append(rank.wait(_PATIENCE_S))
            except subprocess.TimeoutExpired:
                self.tally.failures.append(f"a rank did not end within {_PATIENCE_S} s after {event}")
                os.killpg(rank.pid, signal.SIGKILL)
                codes.append(rank.wait())
        deadline = time.monotonic() + 20
        while (left := _of_sessions(sessions)) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.tally.leaked_processes += len(left)
        for process in left:
            process.kill()
        return codes

    def _damage(self, output_dir: Path) -> str:
        damage = self.random.choice(DAMAGES)
        steps = steps_of(output_dir) if output_dir.is_dir() else []
        indexes = sorted((self.folder / "cache" / "index").glob("*.arrow"))
        if damage == "flip in the newest checkpoint" and len(steps) > 1:
            path = output_dir / f"checkpoint-{steps[-1]}" / "train_state.json"
            path.write_bytes(path.read_bytes()[:-3] + b"   ")
        elif damage == "cut metrics" and (output_dir / "metrics.jsonl").is_file():
            with (output_dir / "metrics.jsonl").open("a") as file:
                file.write('{"step": 3, "lo')
        elif damage == "cut run.json" and steps:
            os.truncate(output_dir / "run.json", 40)
        elif damage == "cut index" and indexes:
            os.truncate(indexes[-1], 1000)
        else:
            return "none"
        self.tally.events[damage] += 1
        return damage

    def _compare(self, output_dir: Path, train_type: str, sizes: set[int]) -> None:
        self.tally.finished_runs += 1
        found, expected = _tensors(output_dir / "final"), self.undisturbed[train_type]
        tolerance = 0.0 if sizes == {1} else _TOLERANCE
        for name, tensor in expected.items():
            if float((tensor.float() - found[name].float()).abs().max()) > tolerance:
                self.tally.failures.append(f"{output_dir.name} ({train_type}, {sizes} processes): {name} differs")
                break
        allowed = {"run.json", "metrics.jsonl", "loss.png", "report.html", "latest", "final", ".llavaforge.lock"}
        left = [path for path in output_dir.iterdir() if path.name not in allowed]
        left = [path for path in left if not path.name.startswith("checkpoint-")]
        self.tally.leftover_files += len(left)

    def _report(self, minutes: float) -> dict[str, Any]:
        tally = self.tally
        third = max(1, len(tally.memory_bytes) // 3)
        return {
            "minutes": minutes, "starts": tally.starts, "finished_runs": tally.finished_runs, "steps": tally.steps,
            "events": dict(tally.events), "lost_steps": sum(tally.lost_steps),
            "most_lost_steps": max(tally.lost_steps, default=0), "leaked_processes": tally.leaked_processes,
            "leftover_files": tally.leftover_files,
            "most_descriptors": [
                max(part, default=0) for part in (tally.descriptors[:third], tally.descriptors[-third:])
            ],
            "most_memory_mb": [
                max(part, default=0) // 2**20 for part in (tally.memory_bytes[:third], tally.memory_bytes[-third:])
            ],
            "median_recovery_s": round(statistics.median(tally.recovery_s), 1) if tally.recovery_s else None,
            "failures": tally.failures,
        }  # fmt: skip


def _starve() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL_DISK_BYTES, _FULL_DISK_BYTES))


def _newest_step(output_dir: Path) -> int:
    lines = read_metrics(output_dir)
    return int(lines[-1]["step"]) if lines else 0


def _tensors(final: Path) -> dict[str, torch.Tensor]:
    stem = "adapter_model" if (final / "adapter_model.safetensors").is_file() else "model"
    tensors = open_tensors(final, stem)
    return {name: tensors[name] for name in tensors}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _of_sessions(sessions: set[int]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a soak and print its report; exit 1 when something was lost."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ["LLAVAFORGE_CACHE"] = str(Path(folder) / "cache")
        report = Soak(Path(folder), options.seed).run(options.minutes)
    print(json.dumps(report, indent=1))
    return int(bool(report["failures"] or report["leaked_processes"] or report["leftover_files"]))


if __name__ == "__main__":
    sys.exit(main())
