"""The FLOP/s that MFU is measured against.

Comes in: a device and the type that is computed in. Goes out: the data sheet's rate of a known card, else the best rate
of a large matrix product.
"""

import logging
import time
from functools import cache

import torch

from llavaforge.training.cards import known_card

logger = logging.getLogger(__name__)

# Sides of square products: a small one tells whether a large one would take for ever (bfloat16 on a CPU without units
# for it: 2 GFLOP/s), and a card needs a larger one than a CPU to be busy.
_SIZES = {"cpu": (256, 1536), "other": (1024, 4096, 8192)}
_REPEATS = 5
_LONGEST_S = 0.5  # of one product


@cache  # a measurement takes a second: once for all stages of a process
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s that a device can reach: by its data sheet, or of another one by a measurement."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = known_flops(name, dtype)
        if known is not None:
            return known
        logger.info("%s is not in the table of peak rates: MFU is against its best matrix product", name)
    return measured_flops(device, dtype)


def known_flops(name: str, dtype: torch.dtype) -> float | None:
    """Return the peak of a card by its name, as `torch.cuda.get_device_name` gives it, where it is known."""
    card = known_card(name)
    return None if card is None or dtype != torch.bfloat16 else 1e12 * card.bf16_tflops


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best FLOP/s of square matrix products on this device."""
    best = 0.0
    for size in _SIZES.get(device.type, _SIZES["other"]):
        if best and 2.0 * size**3 / best > _LONGEST_S:
            break
        best = max(best, *(_product_flops(device, dtype, size) for _ in range(_REPEATS)))
    return best


def _product_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a = torch.randn(size, size, device=device, dtype=dtype)
    float(a[0, 0])  # waits for the device
    begin = time.perf_counter()
    b = a @ a
    float(b[0, 0])
    return 2.0 * size**3 / (time.perf_counter() - begin)
