"""What a machine is: versions, devices, memory, what the environment says. What a report of a fault needs.

Comes in: nothing. Goes out: plain values. No user name, no path of a home, no address: it can be pasted anywhere.
"""

import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from llavaforge.device import compute_dtype, pick_device, total_memory
from llavaforge.model.attention import has_varlen
from llavaforge.model.compile import missing_for_compile
from llavaforge.processes.workers import num_cores
from llavaforge.version import __version__

LIBRARIES = (
    "torch", "transformers", "tokenizers", "peft", "safetensors", "deepspeed", "accelerate", "triton", "numpy",
    "pillow", "pyarrow", "torchao", "liger-kernel",
)  # fmt: skip
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "SLURM_MEM_PER_NODE",
)  # fmt: skip


def machine_facts() -> dict[str, Any]:
    """Return what this machine is."""
    device = pick_device()
    missing = missing_for_compile(device)
    return {
        "llavaforge": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libraries": {**{name: _version(name) for name in LIBRARIES}, "torch": torch.__version__},
        "cpu": cpu_model(),
        "cores": num_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(total_memory(torch.device("cpu")) / 2**30, 1),
        "shm_gib": _gib("/dev/shm"),
        "device": device.type,
        "devices": [_device(number) for number in range(torch.cuda.device_count())],
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "nccl": _nccl(),
        "compute_dtype": str(compute_dtype("auto")).removeprefix("torch."),
        "attention": _attention(device),
        "compiles": f"no: {missing}" if missing else "yes",
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def cpu_model() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(folder: str) -> float | None:
    return round(shutil.disk_usage(folder).total / 2**30, 1) if os.path.isdir(folder) else None


def _device(number: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(number)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def _driver() -> str | None:
    """Return the version of NVIDIA's kernel module."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", file.read_text()) if file.is_file() else None
    return found[1] if found else None


def _nccl() -> str | None:
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _attention(device: torch.device) -> str:
    """Return which attention a packed step takes here in its compute type."""
    if device.type == "cpu" and compute_dtype("auto") == torch.bfloat16:
        return "blocks of matrix products"
    kernel = torch.empty(1, 1, 1, 64, device=device, dtype=compute_dtype("auto"))
    return "variable-length FlashAttention" if has_varlen(kernel, 0.0) else "SDPA, sample by sample"
