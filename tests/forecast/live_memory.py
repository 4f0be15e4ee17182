"""The bytes of all tensors that are alive at a time, on any device, `meta` included: a measured peak without a GPU."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


class LiveMemory(TorchDispatchMode):
    """Counts storages from when an operation makes them to when nothing holds them any more; views count once.

    Attributes:
        now: bytes alive, beside what was there before.
        peak: the most that there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._take, result)
        return result

    def ignore(self, *modules: torch.nn.Module) -> None:
        """Leave out what is there already."""
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._known[tensor.untyped_storage()] = True

    def _take(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())
        return tensor

    def _free(self, size: int) -> None:
        self.now -= size
