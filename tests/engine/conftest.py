from collections.abc import Iterator
from pathlib import Path

import pytest

from ranks import RankPool


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
