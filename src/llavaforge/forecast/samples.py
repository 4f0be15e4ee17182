"""What the samples of an epoch are like: as the options say, or as a prepared data set has them.

Comes in: `--num_samples` and sizes, or `--data_index`. Goes out: `Samples`, as arrays of one or of all.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llavaforge.config.schema import EstimateConfig
from llavaforge.errors import UserError, reading
from llavaforge.training.pack_memory import Sizes

_COLUMNS = ("length", "num_supervised", "images")


@dataclass(frozen=True)
class Samples:
    """Samples of an epoch; one stands for all where only a mean is known.

    Attributes:
        number: of an epoch.
        lengths: tokens, image tokens included.
        num_images: of each.
        num_supervised: tokens of each.
    """

    number: int
    lengths: npt.NDArray[Any]
    num_images: npt.NDArray[Any]
    num_supervised: npt.NDArray[Any]

    @property
    def sizes(self) -> Sizes:
        """What packs of them take."""
        total = float(self.lengths.sum())
        return Sizes(
            longest=int(np.ceil(self.lengths.max())),
            mean=total / len(self.lengths),
            images_per_token=float(self.num_images.sum()) / total,
            supervised_per_token=float(self.num_supervised.sum()) / total,
        )


def read_samples(config: EstimateConfig, num_image_tokens: int) -> Samples:
    """Return the samples that the options name.

    Raises:
        UserError: `data_index` is no prepared data set, or an empty one.
    """
    if config.data_index is not None:
        return _of_index(config.data_index)
    length = config.text_tokens + config.images_per_sample * num_image_tokens
    supervised = config.supervised_tokens or max(1, config.text_tokens // 2)
    one = (np.array([value], dtype=np.float64) for value in (length, config.images_per_sample, supervised))
    return Samples(config.num_samples, *one)


def _of_index(path: Path) -> Samples:
    import pyarrow as pa
    import pyarrow.compute

    remedy = "Give an `index/*.arrow` of the cache, as `train` and `data check` leave it."
    if not path.is_file():
        raise UserError(f"{path}: no such file. {remedy}")
    with reading(path, remedy):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    if missing := [name for name in _COLUMNS if name not in table.column_names]:
        raise UserError(f"{path}: has no column `{missing[0]}`. {remedy}")
    lengths, supervised = (table.column(name).to_numpy().astype(np.int64) for name in _COLUMNS[:2])
    images = pa.compute.list_value_length(table.column("images")).to_numpy().astype(np.int64)
    if not len(lengths) or not lengths.any():
        raise UserError(f"{path}: holds no tokenised sample. Prepare it with a model: `llavaforge data check`.")
    return Samples(len(lengths), lengths, images, supervised)
