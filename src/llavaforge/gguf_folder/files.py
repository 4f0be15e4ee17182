"""One GGUF file, written a tensor at a time and read back.

Comes in: key-value fields and a plan of tensors, read from a model folder as they are written. Goes out: a file with
matrices in the chosen type, and everything else (norms, biases, position tables) in float32, as llama.cpp wants it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType

from llavaforge.errors import UserError
from llavaforge.model_folder.names import is_buffer, to_module_name
from llavaforge.model_folder.tensors import TensorFiles

_KINDS = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


class ModelTensors(Mapping[str, torch.Tensor]):
    """A model folder's tensors by their in-memory names; each access reads that tensor alone."""

    def __init__(self, files: TensorFiles) -> None:
        self._files = files
        self._stored = {to_module_name(name): name for name in files if not is_buffer(name)}

    def __getitem__(self, module: str) -> torch.Tensor:
        return self._files[self._stored[module]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, module: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        return self._files.shape(self._stored[module])

    def dtype(self, module: str) -> torch.dtype:
        """Return a tensor's type without reading its data."""
        return self._files.dtype(self._stored[module])


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: in the file.
        source: its in-memory name in the model; the file's own values where it is a tensor.
        shape: as torch has it.
        dtype: in the file.
        change: from the model's tensor to the file's, before it is cast.
    """

    name: str
    source: str | torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    change: Callable[[torch.Tensor], torch.Tensor] = _same

    def value(self, model: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what the file holds.

        Args:
            model: tensors by in-memory name.

        Raises:
            UserError: a number is too large for the file's type, or is none.
        """
        tensor = self.source if isinstance(self.source, torch.Tensor) else model[self.source]
        cast = self.change(tensor).to(self.dtype).contiguous()
        if not cast.isfinite().all():
            raise UserError(
                f"tensor `{self.source if isinstance(self.source, str) else self.name}` has numbers that "
                f"{str(self.dtype).removeprefix('torch.')} does not hold. Give --gguf_type f32 or bf16."
            )
        return cast


def write_gguf(
    path: Path,
    architecture: str,
    dtype: torch.dtype,
    add_fields: Callable[[GGUFWriter], None],
    plan: Iterable[GgufTensor],
    model: Mapping[str, torch.Tensor],
) -> None:
    """Write a file.

    Args:
        path: of a new file.
        architecture: as `general.architecture` names it.
        dtype: of the matrices.
        add_fields: adds the fields.
        plan: the tensors, in the order in which they are stored.
        model: tensors by in-memory name; one of them is held at a time.

    Raises:
        UserError: see `GgufTensor.value`.
    """
    tensors = list(plan)
    writer = GGUFWriter(path, architecture)
    try:
        writer.add_file_type(_KINDS[dtype][1])
        add_fields(writer)
        for tensor in tensors:
            num_bytes = tensor.dtype.itemsize * int(np.prod(tensor.shape))
            # The writer takes types that numpy lacks as bytes: the last axis counts them.
            shape = (*tensor.shape[:-1], tensor.shape[-1] * tensor.dtype.itemsize)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), num_bytes, raw_dtype=_KINDS[tensor.dtype][0])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            value = tensor.value(model)
            assert tuple(value.shape) == tensor.shape, f"{tensor.name}: {tuple(value.shape)}, planned {tensor.shape}"
            writer.write_tensor_data(value.view(torch.uint8).numpy())
    finally:
        writer.close()


class GgufFile(Mapping[str, torch.Tensor]):
    """A file, read: tensors by name as torch shapes them, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.path = path
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._tensors[name]
        dtype = next(dtype for dtype, (kind, _) in _KINDS.items() if kind == stored.tensor_type)
        shape = tuple(int(length) for length in reversed(stored.shape.tolist()))
        return torch.from_numpy(np.array(stored.data).view(np.uint8).reshape(-1)).view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def check_tensors(path: Path, plan: Iterable[GgufTensor], model: Mapping[str, torch.Tensor]) -> int:
    """Read a file and compare every tensor with the model's, bit for bit in the file's type.

    Returns:
        The number of tensors.

    Raises:
        RuntimeError: one is missing, unknown or another.
    """
    file, planned = GgufFile(path), {tensor.name: tensor for tensor in plan}
    if unlike := sorted(set(file) ^ set(planned)):
        raise RuntimeError(f"{path}: `{unlike[0]}` is missing or unknown ({len(unlike)} such tensors)")
    for name, tensor in planned.items():
        found = file[name]
        if found.dtype != tensor.dtype or not torch.equal(found, tensor.value(model)):
            raise RuntimeError(f"{path}: `{name}` is not what the model has")
    return len(planned)
