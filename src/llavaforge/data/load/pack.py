"""A padding-free pack: samples laid end to end, none of which sees another.

Comes in: rows of the index, and of each image its pixels or its kept features. Goes out: a `Pack`.

Legend: T tokens of the pack, M image tokens, S supervised tokens, N samples, I images, C channels, H and W pixels,
P image tokens of one image, D tower width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from llavaforge.data.faults import Fault
from llavaforge.data.index.index import Row
from llavaforge.data.order.plan import MicroBatch


class BadSample(NamedTuple):
    """A sample of a pack that could not be read, and is masked: nothing of it is supervised.

    Its tokens stay, so that every process does the work that was planned for it.
    """

    number: int
    num_supervised: int
    fault: Fault


@dataclass
class Pack:
    """One micro-batch as tensors.

    Attributes:
        ids_T: token ids with every image token written out.
        image_positions_M: where in T the image tokens are.
        position_ids_T: positions, restarting at 0 with each sample.
        cu_seqlens_N1: `int32` borders of the samples: 0, len(0), len(0)+len(1), ...
        lengths: the samples' lengths, as plain numbers.
        predictors_S: positions in T whose hidden state predicts a supervised token (the position before it).
        targets_S: the token predicted there.
        pixels_ICHW: `uint8` pixels, in the order of their placeholders.
        source: what this pack is part of.
        bad: faults of its masked samples, with their numbers and the supervised tokens they would have had.
        features_IPD: what the vision tower makes of the images, where that is kept (`data/load/features.py`); then
            there are no pixels.
    """

    ids_T: torch.Tensor
    image_positions_M: torch.Tensor
    position_ids_T: torch.Tensor
    cu_seqlens_N1: torch.Tensor
    lengths: tuple[int, ...]
    predictors_S: torch.Tensor
    targets_S: torch.Tensor
    pixels_ICHW: torch.Tensor
    source: MicroBatch = field(default_factory=lambda: MicroBatch(0, (), True, 0))
    bad: tuple[BadSample, ...] = ()
    features_IPD: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def num_tokens(self) -> int:
        """Number of tokens, image tokens included."""
        return sum(self.lengths)

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens."""
        return len(self.targets_S)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.pixels_ICHW) + len(self.features_IPD)

    def to(self, device: torch.device) -> "Pack":
        """Return the pack with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Pack":
        """Return the pack in page-locked memory (called by the `DataLoader`)."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Any) -> "Pack":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


def make_pack(
    rows: Sequence[Row],
    images: Sequence[np.ndarray | torch.Tensor],
    image_token_id: int,
    num_image_tokens: int,
    source: MicroBatch | None = None,
    bad: Sequence[BadSample] = (),
) -> Pack:
    """Lay samples end to end.

    `images` are `uint8` pixels (C, H, W) as arrays or features (P, D) as tensors, one per image, in the order of the
    rows and of the images in each; `bad` is what of the micro-batch `source` is masked.

    Raises:
        ValueError: a sample's placeholders do not match its images (our own invariant: the index checked it).
    """
    samples = [_expand(row, image_token_id, num_image_tokens) for row in rows]
    num_images = sum(len(row.images) for row in rows)
    if num_images != len(images):
        raise ValueError(f"{len(images)} images for placeholders of {num_images}")
    source = source or MicroBatch(0, tuple(range(len(rows))), True, sum(len(positions) for _, positions in samples))
    masked = {one.number for one in bad}
    lengths = tuple(len(ids) for ids, _ in samples)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    supervised = np.concatenate(
        [
            start + (positions[:0] if number in masked else positions)
            for start, (_, positions), number in zip(starts, samples, source.samples, strict=False)
        ]
    )
    ids = np.concatenate([ids for ids, _ in samples])
    none = torch.zeros(0, dtype=torch.uint8)
    stacked = torch.stack([torch.as_tensor(image) for image in images]) if images else none
    are_features = bool(images) and isinstance(images[0], torch.Tensor)
    return Pack(
        ids_T=torch.from_numpy(ids),
        image_positions_M=torch.from_numpy(np.flatnonzero(ids == image_token_id)),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens_N1=torch.from_numpy(starts.astype(np.int32)),
        lengths=lengths,
        predictors_S=torch.from_numpy(supervised - 1),
        targets_S=torch.from_numpy(ids[supervised]),
        pixels_ICHW=none if are_features else stacked,
        source=source,
        bad=tuple(bad),
        features_IPD=stacked if are_features else none,
    )


def _expand(row: Row, image_token_id: int, num_image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a sample's ids with image tokens written out, and the positions of its supervised tokens."""
    ids = np.asarray(row.ids, dtype=np.int64)
    is_image = ids == image_token_id
    if is_image.sum() != len(row.images):
        raise ValueError(f"{row.where}: {is_image.sum()} placeholders for {len(row.images)} images")
    supervised = np.zeros(len(ids), dtype=bool)
    for start, end in zip(row.supervised_spans[::2], row.supervised_spans[1::2], strict=True):
        supervised[start:end] = True
    repeats = np.where(is_image, num_image_tokens, 1)
    positions = np.flatnonzero(np.repeat(supervised, repeats))
    if len(positions) == 0 or positions[0] == 0:
        raise ValueError(f"{row.where}: supervised tokens must exist and follow a prompt")
    return np.repeat(ids, repeats), positions
