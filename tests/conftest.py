"""Fixtures that every test may use: tiny random parts on the disk, made once per session."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

import tiny_parts
from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.join.parts import customize_model
from llavaforge.model.load import LoadedModel, load_model
from llavaforge.processes import workers
from llavaforge.starter.shapes import write_shapes

# These take half a minute and more each, the longest first, so that the two workers end together.
_LONG = (
    "test_training.py", "test_zero.py", "test_zero_runs.py", "test_kill_points.py",
    "test_quickstart.py", "test_compare.py", "test_faults.py", "test_lost_rank.py", "test_scaling.py", "test_run_sh.py",
    "test_features.py", "test_zero_saving.py", "test_writing.py",
    "test_resume.py", "test_bench.py", "test_heartbeat.py", "test_engines.py", "test_data.py", "test_memory.py",
    "test_run_faults.py", "test_kills.py", "test_workers.py", "test_hostile.py", "test_files.py", "test_going_on.py",
    "test_readers.py", "test_data_check.py", "test_mixture.py", "test_photos.py", "test_published_recipe.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


# What `warm.WarmProcess` starts has imported these already.
workers.PRELOADED += ["llavaforge.inference.export", "llavaforge.join.parts", "deepspeed"]
workers.PRELOADED += ["llavaforge.comparison.preload"]  # last: it tells the collector to leave alone what is there
torch.set_num_threads(1)  # tiny matrices: threads only get in each other's way, here and in the processes started
os.environ["OMP_NUM_THREADS"] = "1"
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def parts_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="session")
def tiny_clip(parts_dir: Path) -> Path:
    """A whole CLIP, 28 pixels, patch 14: four image tokens."""
    return tiny_parts.save_clip(parts_dir / "clip")


@pytest.fixture(scope="session")
def tiny_clip_vision(parts_dir: Path) -> Path:
    return tiny_parts.save_clip(parts_dir / "clip-vision", whole=False)


@pytest.fixture(scope="session")
def tiny_siglip(parts_dir: Path) -> Path:
    """A SigLIP vision model, 32 pixels, patch 8: sixteen image tokens."""
    return tiny_parts.save_siglip(parts_dir / "siglip")


@pytest.fixture(scope="session")
def tiny_lm(parts_dir: Path) -> Callable[[str], Path]:
    """A function from a family of `tiny_parts.FAMILIES` to a folder with such a language model."""
    made: dict[str, Path] = {}

    def make(family: str = "qwen2") -> Path:
        if family not in made:
            made[family] = tiny_parts.save_language_model(parts_dir / family, family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_llava(parts_dir: Path, tiny_clip: Path, tiny_lm: Callable[[str], Path]) -> Path:
    """A joined model folder: `tiny_clip` and the tiny Qwen2; `<image>` has id 303. Read only."""
    output_dir = parts_dir / "llava"
    config = CustomizeModelConfig(
        vision_tower=str(tiny_clip), language_model=str(tiny_lm("qwen2")), output_dir=output_dir
    )
    customize_model(config)
    return output_dir


@pytest.fixture(scope="session", autouse=True)
def index_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tokenised indexes out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVAFORGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated world: `train/` and `heldout/`, each with chat.json, questions.json and images/. Read only."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, num_samples=40, seed=0)
    return folder


@pytest.fixture(scope="session")
def loaded_llava(tiny_llava: Path) -> LoadedModel:
    """`tiny_llava` in memory. Do not change it: load your own to train."""
    return load_model(str(tiny_llava))
