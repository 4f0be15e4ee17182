"""Where tensors live: the one place that asks torch what this machine has."""

import os
from contextlib import suppress
from pathlib import Path

import torch


def pick_device() -> torch.device:
    """Return this process's device: a CUDA or ROCm card, Apple's GPU (MPS), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def compute_dtype(bf16: bool | str) -> torch.dtype:
    """Return the type to compute in.

    `auto` is bfloat16 on NVIDIA's GPUs from Ampere on, on AMD's, on Apple's from macOS 14 on, and on CPUs with bfloat16
    products (AVX512-BF16, AMX), where a matrix product is 2.3 times as fast as in float32 (LOG.md).
    """
    if bf16 == "auto":
        device = pick_device().type
        if device == "cuda":
            bf16 = torch.cuda.get_device_capability() >= (8, 0)
        elif device == "mps":
            bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
        else:
            bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if bf16 else torch.float32


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has, the host's for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_host_memory(root: Path = Path("/")) -> int:
    """Return the bytes that processes of this host may still take: what the system can free, and what a cgroup allows.

    Args:
        root: of the file system, on Linux (proc(5), and the kernel's admin-guide/cgroup-v2).
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    groups = (root / "proc/self/cgroup").read_text().splitlines()
    own = next((line[3:] for line in groups if line.startswith("0::")), "/")
    for group in (own, *map(str, Path(own).parents)):
        folder = root / "sys/fs/cgroup" / group.lstrip("/")
        with suppress(OSError, ValueError):  # no group of version 2, or one without a limit
            free.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return max(0, min(free))
