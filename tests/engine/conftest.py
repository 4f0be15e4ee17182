from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llavaforge.training.run import train
from rank_worker import injected
from ranks import RankPool
from train_tools import train_config
from zero_tools import STEPS, Alone, held_out, options


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(2, Path(tmp_path_factory.mktemp("ranks")))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(4, Path(tmp_path_factory.mktemp("ranks")))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """A function that trains in one process, once for the same arguments: the run (read only) and its result."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def run(
        model: Path, data: Path, faults: dict[str, Any] | None = None, **values: Any
    ) -> tuple[Path, dict[str, Any]]:
        key = repr((model, data, faults, sorted(values.items())))
        if key not in done:
            folder = tmp_path_factory.mktemp("one") / "run"
            with injected(faults or {}):
                done[key] = folder, train(train_config(model, data, folder, **values))
        return done[key]

    return run


@pytest.fixture(scope="module")
def one_process(alone: Alone, tiny_llava: Path, shapes: Path) -> Path:
    """20 steps of everything in one process, float32; with a held-out loss. Read only."""
    return alone(tiny_llava, shapes / "train", **options(max_steps=STEPS, **held_out(shapes)))[0]
