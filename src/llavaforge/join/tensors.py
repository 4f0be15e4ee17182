"""Every tensor of the joined model, streamed from the parts' files.

Comes in: where each tensor is (`sources.match_tensors`), the projector, and how far the embedding grows. Goes out:
names and tensors of the stock LLaVA, in the parts' own bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llavaforge.join.sources import BODY, HEAD, TOWER
from llavaforge.model_folder.names import to_file_name
from llavaforge.model_folder.projector import PROJECTOR
from llavaforge.model_folder.tensors import TensorFiles

EMBEDDING = BODY + "embed_tokens.weight"

# The mean of an embedding's rows is summed over so many rows at a time, in float32 (about 160 MB at width 2560).
_MEAN_ROWS = 16384


def stock_shapes(config: LlavaConfig) -> dict[str, torch.Size]:
    """Return name and shape of every stored tensor of the stock model (a tied head has none); allocates nothing."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.text_config.tie_word_embeddings:
        shapes.pop(HEAD)
    return shapes


def part_parameters(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """Count the parameters of each part, and all of them."""
    prefixes = {"vision_tower": (TOWER,), "projector": (PROJECTOR,), "language_model": (BODY, HEAD)}
    counts = {
        part: sum(shape.numel() for name, shape in shapes.items() if name.startswith(prefix))
        for part, prefix in prefixes.items()
    }
    return counts | {"total": sum(counts.values())}


@dataclass(frozen=True)
class JoinedTensors:
    """The tensors of the joined model; each iteration reads them anew, one at a time.

    Attributes:
        sources: name in the stock model -> (files of the part, name in them).
        projector: name in the stock model -> tensor.
        num_embeddings: rows of the embedding (and of an untied head) in the joined model.
        dtype: type of all tensors; None keeps each one's own.
    """

    sources: Mapping[str, tuple[TensorFiles, str]]
    projector: Mapping[str, torch.Tensor]
    num_embeddings: int
    dtype: torch.dtype | None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, (files, stored) in self.sources.items():
            tensor = files[stored] if self.dtype is None else files.converted(stored, self.dtype)
            if name in (EMBEDDING, HEAD) and len(tensor) < self.num_embeddings:
                tensor = _grow(tensor, self.num_embeddings)
            yield to_file_name(name), tensor
            del tensor
        for name, tensor in self.projector.items():
            yield to_file_name(name), tensor if self.dtype is None else tensor.to(self.dtype)


def compare_files(folder: TensorFiles, joined: JoinedTensors) -> None:
    """Compare every written tensor with its source, byte by byte.

    Raises:
        RuntimeError: one differs, is missing or is too many.
    """
    left = set(folder)
    for name, tensor in joined:
        if name not in left:
            raise RuntimeError(f"{folder.folder}: tensor `{name}` was not written")
        written = folder[name]
        if written.dtype != tensor.dtype or not torch.equal(_bytes(written), _bytes(tensor)):
            raise RuntimeError(f"{folder.folder}: tensor `{name}` was written with other bytes than its source has")
        left.remove(name)
    if left:
        raise RuntimeError(f"{folder.folder}: tensor `{min(left)}` was written and has no source")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _grow(tensor_VD: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Append rows that are the mean of the old ones: a new token starts as an average one, not as noise."""
    sums = [rows.float().sum(0) for rows in tensor_VD.split(_MEAN_ROWS)]
    mean_D = (torch.stack(sums).sum(0) / len(tensor_VD)).to(tensor_VD.dtype)
    return torch.cat([tensor_VD, mean_D.expand(num_rows - len(tensor_VD), -1)])
