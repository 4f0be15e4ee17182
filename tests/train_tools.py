"""What several tests of training need: quick configs, packs, and comparisons of folders."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llavaforge.config.schema import Schema, TrainConfig
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_index
from llavaforge.data.load.loader import PackDataset
from llavaforge.data.load.pack import Pack
from llavaforge.data.order.plan import MicroBatch
from llavaforge.data.rows.records import Record
from llavaforge.model.load import LoadedModel
from llavaforge.model.tower import normalize
from llavaforge.model_folder.names import to_module_name
from llavaforge.model_folder.tensors import open_tensors

TRAIN_TYPES = ("projector", "freeze_vision", "use_lora", "full")


def train_config(model: Path, data: Path, output_dir: Path, **overrides: Any) -> TrainConfig:
    """A run of a few quick, visible steps in float32."""
    values: dict[str, Any] = {
        "model_name_or_path": str(model),
        "data_path": data,
        "output_dir": output_dir,
        "train_type": "freeze_vision",
        "max_steps": 5,
        "global_batch_size": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "projector_learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "lora_r": 4,
        "lora_alpha": 8,
        "bf16": False,
        "dataloader_num_workers": 0,
        "save_steps": 0,
    }
    return TrainConfig.model_validate({**values, **overrides})


def open_packs(loaded: LoadedModel, config: TrainConfig) -> tuple[SampleIndex, PackDataset]:
    """The training data of a config, as the trainer opens it."""
    index = open_index(config.data_path, loaded.processor, loaded.num_image_tokens, config)
    return index, PackDataset(index, loaded.preprocessing, loaded.image_token_id, loaded.num_image_tokens)


def pack_of(dataset: PackDataset, *samples: int) -> Pack:
    return dataset[MicroBatch(0, samples, True, 0)]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """A model folder's tensors by in-memory name."""
    files = open_tensors(folder)
    return {to_module_name(name): files[name] for name in files}


def arguments_of(config: Schema, verb: str = "train") -> list[str]:
    """The arguments of `llavaforge` that start this run."""
    values = config.model_dump(exclude_unset=True).items()
    return [verb, *(f"--{key}={value}" for key, value in values if value is not None)]


def command(config: TrainConfig) -> list[str]:
    """The command line that starts this run in a process of its own, from nothing."""
    return [sys.executable, "-m", "llavaforge", *arguments_of(config)]


def stock_log_likelihood(stock: LoadedModel, builder: Any, record: Record, pixels: torch.Tensor) -> float:
    """Return the log-probability of a record's last answer by transformers' own forward pass."""
    sample = builder.build(record)
    repeats = [stock.num_image_tokens if token == stock.image_token_id else 1 for token in sample.ids]
    ids = np.repeat(sample.ids, repeats)
    begin, end = sample.supervised_spans[-2:]
    places = range(sum(repeats[:begin]), sum(repeats[:end]))
    with torch.no_grad():
        values = normalize(pixels, stock.preprocessing, torch.float32)
        logits = stock.model(input_ids=torch.tensor(ids)[None], pixel_values=values).logits[0].log_softmax(-1)
    return float(sum(logits[place - 1, ids[place]] for place in places))
