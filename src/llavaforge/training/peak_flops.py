"""The FLOP/s that MFU is measured against.

Comes in: a device and the type that is computed in. Goes out: the data sheet's rate of a known card, else the best rate
of a large matrix product.
"""

import logging
import re
import time

import torch

logger = logging.getLogger(__name__)

# Dense bfloat16 with float32 sums, in TFLOP/s, by words of the device's name; the first row that fits counts. From the
# makers' data sheets and white papers; where a sheet gives the rate with sparsity, half of it.
_BF16_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H800 PCIe": 756.5,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "RTX PRO 6000 Blackwell": 503.8,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090 Ti": 80.0,
    "RTX 3090": 71.0,
    "MI325X": 1307.4,
    "MI300X": 1307.4,
}
# Of a chip with such a word in its name the sheet of the whole card says nothing: other clocks, or a slice of it.
_OTHERS = {"Laptop", "Mobile", "Max", "D", "MIG", "VF"}

# Sides of square products: a small one tells whether a large one would take for ever (bfloat16 on a CPU without units
# for it: 2 GFLOP/s), and a card needs a larger one than a CPU to be busy.
_SIZES = {"cpu": (256, 1536), "other": (1024, 4096, 8192)}
_REPEATS = 5
_LONGEST_S = 0.5  # of one product


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
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    if dtype != torch.bfloat16 or words & _OTHERS:
        return None
    return next((1e12 * peak for known, peak in _BF16_TFLOPS.items() if words >= set(known.split())), None)


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
