"""The projector: new weights as transformers would draw them, or those of an earlier training.

Comes in: shapes and a seed, or a source of trained weights. Goes out: tensors by their name inside the projector.

    {"linear_1.weight": (text width, tower width), "linear_1.bias": (text width,), "linear_2.weight": ..., ...}
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from llavaforge.errors import UserError
from llavaforge.model_folder.hub import find_model_folder
from llavaforge.model_folder.tensors import TensorFiles, open_pickle, open_tensors

PROJECTOR = "model.multi_modal_projector."

# `multi_modal_projector.linear_1.weight` under any prefix (transformers, PEFT), `mm_projector.0.weight` (LLaVA).
_NAME = re.compile(r"(?:^|\.)(?:multi_modal_projector|mm_projector)\.(linear_1|linear_2|0|2)\.(weight|bias)$")
_LAYERS = {"0": "linear_1", "2": "linear_2"}


def new_projector(
    shapes: Mapping[str, torch.Size], std: float, seed: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Draw a projector's initial weights: normal with `std` around zero, biases zero (transformers' own way).

    `std` is the language model's `initializer_range`. The values are drawn in float32 and rounded to `dtype`.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, torch.Tensor] = {}
    for name in sorted(shapes):
        tensor = torch.zeros(shapes[name])
        drawn[name] = (tensor if name.endswith("bias") else tensor.normal_(0.0, std, generator=generator)).to(dtype)
    return drawn


def read_projector(source: str) -> dict[str, torch.Tensor]:
    """Read a trained projector.

    Args:
        source: a LLaVA folder with file names of any style, a finished run's `final` (a model or a PEFT adapter), the
            run's folder itself, a hub name, or a file such as LLaVA's `mm_projector.bin`.

    Returns:
        Tensors by name inside the projector: `linear_1.weight`, `linear_1.bias`, ...

    Raises:
        UserError: there is no projector of two layers.
    """
    tensors = _open(source)
    found: dict[str, torch.Tensor] = {}
    for stored in tensors:
        match = _NAME.search(stored)
        if match:
            found[f"{_LAYERS.get(match[1], match[1])}.{match[2]}"] = tensors[stored].clone()
    if not {"linear_1.weight", "linear_2.weight"} <= set(found):
        raise UserError(
            f"{source}: holds no projector of two layers (`multi_modal_projector.linear_1` and `linear_2`, or LLaVA's "
            "`mm_projector.0` and `mm_projector.2`)."
        )
    return found


def check_projector(source: str, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Check that a projector that was read fits the model.

    Raises:
        UserError: another shape, or a bias too many or too few.
    """
    if set(tensors) != set(shapes):
        has_bias = str("linear_1.bias" in tensors).lower()
        raise UserError(f"{source}: its projector was trained with --projector_bias {has_bias}; give that here too.")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{source}: projector tensor `{name}` has shape {list(tensors[name].shape)}; tower and language model "
                f"ask for {list(shape)}. It belongs to other parts."
            )


def _open(source: str) -> TensorFiles:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix == ".safetensors":
            return open_tensors(path.parent, path.stem)
        return open_pickle(path)
    folder = find_model_folder(source)
    if (folder / "final").is_dir():
        folder = folder / "final"
    if (folder / "adapter_model.safetensors").is_file():
        return open_tensors(folder, "adapter_model")
    if (folder / "mm_projector.bin").is_file():
        return open_pickle(folder / "mm_projector.bin")
    return open_tensors(folder)
