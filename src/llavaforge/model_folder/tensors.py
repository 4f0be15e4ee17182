"""Read and write files of tensors without ever holding a whole model.

Comes in: a folder with `model.safetensors`, shards with an index, or `pytorch_model.bin`; or a stream of named tensors.
Goes out: a lazy mapping from name to tensor; or files under Hugging Face's names.
"""

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llavaforge.errors import UserError, reason
from llavaforge.files import is_inside
from llavaforge.model_folder.json_files import read_json

MAX_SHARD_BYTES = 2 * 1000**3
# A file mapped by torch.load keeps every page it touched; mapping it anew after this many bytes lets them go.
_REMAP_BYTES = 64 * 1000**2
_BLOCK_BYTES = 16 * 1000**2


class TensorFiles(Mapping[str, torch.Tensor]):
    """A lazy mapping from tensor name to tensor; each access reads that tensor alone and caches nothing."""

    def __init__(self, folder: Path, files: "list[_SafetensorsFile | _PickleFile]") -> None:
        self.folder = folder
        self._file_of: dict[str, _SafetensorsFile | _PickleFile] = {}
        for file in files:
            for name in file.shapes:
                if name in self._file_of:
                    first = self._file_of[name].path.name
                    raise UserError(f"{folder}: tensor `{name}` is both in {first} and in {file.path.name}.")
                self._file_of[name] = file

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._file_of

    def converted(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in another type, converting a block of rows at a time.

        An embedding of 1.6 GB in float32 would else stand whole beside its copy.
        """
        file, shape = self._file_of[name], self.shape(name)
        if file.dtypes[name] == dtype or not shape:
            return file.read(name).to(dtype)
        whole = torch.empty(shape, dtype=dtype)
        num_rows = max(1, _BLOCK_BYTES * shape[0] // max(1, whole.nbytes))
        for start in range(0, shape[0], num_rows):
            stop = min(start + num_rows, shape[0])
            whole[start:stop] = file.read(name, slice(start, stop))
        return whole

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        return self._file_of[name].shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type without reading its data."""
        return self._file_of[name].dtypes[name]


def open_tensors(folder: Path, stem: str = "model") -> TensorFiles:
    """Open the tensors of a folder.

    Args:
        folder: holds `{stem}.safetensors` or its shards; for the stem `model` also `pytorch_model.bin` or its
            shards, which are read with `weights_only=True`.
        stem: first part of the files' names.

    Raises:
        UserError: no such file, a shard is missing or unreadable, or a .bin file holds more than tensors.
    """
    paths = _find(folder, stem)
    files = [_SafetensorsFile(path) if path.suffix == ".safetensors" else _PickleFile(path) for path in paths]
    return TensorFiles(folder, files)


def open_pickle(path: Path) -> TensorFiles:
    """Open one file of `torch.save`, such as LLaVA's `mm_projector.bin`, with `weights_only=True`.

    Raises:
        UserError: the file is unreadable or holds more than tensors.
    """
    return TensorFiles(path.parent, [_PickleFile(path)])


def write_shards(
    folder: Path, stem: str, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write a stream of tensors as `{stem}.safetensors`, or as shards with an index; hold one shard at most.

    Args:
        folder: an existing folder.
        stem: first part of the files' names.
        tensors: names and tensors, in the order in which they are stored.
        max_shard_bytes: a shard is closed before it grows past this (a larger tensor gets its own shard).

    Returns:
        The files that hold tensors, in order.
    """
    shards = []
    for number, shard in enumerate(in_shards(tensors, max_shard_bytes), start=1):
        path = folder / f"{stem}-{number:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        shards.append((path.name, list(shard)))
        shard.clear()
    return name_shards(folder, stem, shards)


def in_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> Iterator[dict[str, torch.Tensor]]:
    """Gather a stream of tensors into one file's after the other; there is at least one, which may be empty.

    Args:
        tensors: names and tensors.
        max_shard_bytes: a shard ends before it grows past this (a larger tensor gets its own shard).

    Yields:
        A shard; clear it when it is written, and only one is ever held.
    """
    shard: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    shard_bytes = 0
    for name, tensor in tensors:
        assert name not in seen, f"tensor {name} is written twice"
        seen.add(name)
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, shard_bytes = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        shard_bytes += tensor.nbytes
        del tensor
    yield shard


def name_shards(folder: Path, stem: str, shards: Sequence[tuple[str, Sequence[str]]]) -> list[Path]:
    """Give shards their final names, now that their number is known, and write the index when there are several.

    Args:
        folder: where they are.
        stem: first part of the final names.
        shards: names of the files as they are, and of the tensors in each.

    Returns:
        The files that hold tensors, in order.
    """
    num_shards = len(shards)
    paths: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, (file_name, names) in enumerate(shards, start=1):
        final = f"{stem}-{number:05d}-of-{num_shards:05d}.safetensors" if num_shards > 1 else f"{stem}.safetensors"
        paths.append((folder / file_name).rename(folder / final))
        weight_map.update(dict.fromkeys(names, final))
    if num_shards > 1:
        index = {"metadata": {"total_size": sum(_tensor_bytes(path) for path in paths)}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return paths


class _SafetensorsFile:
    """One safetensors file. It is opened anew for each tensor, so that pages are let go with the tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    stored = file.get_slice(name)
                    self.shapes[name] = tuple(stored.get_shape())
                    self.dtypes[name] = _DTYPES[stored.get_dtype()]
        except (SafetensorError, OSError) as error:
            told = reason(error)
            raise UserError(f"{path}: not a readable safetensors file ({told}). Download or copy it again.") from None
        except KeyError as error:
            raise UserError(f"{path}: tensor `{name}` has the type {error}; quantised weights are not taken.") from None

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]


class _PickleFile:
    """One file of `torch.save`, memory-mapped, unpickled with `weights_only=True`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, torch.Tensor] = {}
        self._read_bytes = _REMAP_BYTES
        tensors = self._map()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        if self._read_bytes >= _REMAP_BYTES:
            self._tensors, self._read_bytes = self._map(), 0
        tensor = self._tensors[name][... if rows is None else rows]
        self._read_bytes += tensor.nbytes
        return tensor

    def _map(self) -> dict[str, torch.Tensor]:
        try:
            loaded = _load_pickle(self.path)
        except pickle.UnpicklingError:  # whose text advises to switch the safety off
            raise UserError(
                f"{self.path}: holds more than tensors, such as code, which is never run. Give safetensors files, or a "
                ".bin written by torch.save that holds tensors only."
            ) from None
        except Exception as error:
            raise UserError(
                f"{self.path}: cannot be read as tensors ({reason(error)}). "
                "Give safetensors files, or a .bin written by torch.save that holds tensors only."
            ) from None
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise UserError(f"{self.path}: expected a dict from name to tensor, as `torch.save(state_dict)` writes.")
        return loaded


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format of torch < 1.6 cannot be mapped


def _find(folder: Path, stem: str) -> list[Path]:
    bases = [f"{stem}.safetensors", *(["pytorch_model.bin"] if stem == "model" else [])]
    for base in bases:
        index = folder / f"{base}.index.json"
        if index.is_file():
            return _indexed(index)
        if (folder / base).is_file():
            return [folder / base]
    raise UserError(f"{folder}: holds no weights; expected {' or '.join(bases)} (or shards with an index).")


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = list(dict.fromkeys(weight_map.values())) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and is_inside(name) for name in names):
        raise UserError(f"{index}: not an index of shards (a `weight_map` to files of its folder). Copy it again.")
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: missing, but {index.name} names it. Download or copy it again.")
    return [index.parent / name for name in names]


def _tensor_bytes(path: Path) -> int:
    """Return the bytes of a safetensors file's tensors: all but the header and the 8 bytes that tell its length."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
