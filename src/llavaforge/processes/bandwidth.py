"""How fast processes exchange tensors."""

import time

import torch
import torch.distributed as dist


def sent_bytes_per_s(device: torch.device, num_bytes: int = 2**28, repeats: int = 5) -> float:
    """Return the best rate at which each process sends in a ring all-reduce, 2 (N-1)/N of the tensor; all call it.

    Source: Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002.
    """
    tensor, size = torch.zeros(num_bytes // 4, device=device), dist.get_world_size()
    best = 0.0
    for _ in range(repeats + 1):  # the first one opens connections
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        float(tensor[0])  # waits for the device
        best = max(best, 2 * (size - 1) / size * num_bytes / (time.perf_counter() - begin))
    return best
