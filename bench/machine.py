"""The machine and its libraries, as far as they explain the figures (nothing names it); the time of `--help`."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

import llavaforge
from llavaforge.machine.facts import cpu_model

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "numpy", "pillow")


def describe(dtype: torch.dtype) -> dict[str, Any]:
    """Return CPU, cores, memory, threads, type of the computation, versions, and the load at the start."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def source_sha256() -> str:
    """Return the SHA-256 of the measured package's Python files, so that figures can be matched with their source."""
    package = Path(llavaforge.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def help_seconds(repeats: int = 7) -> float:
    """Return the median time of `llavaforge --help` as a whole process."""
    binary = shutil.which("llavaforge", path=str(Path(sys.executable).parent))
    command = [binary] if binary else [sys.executable, "-m", "llavaforge.cli"]
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
