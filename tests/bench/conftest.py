"""The benchmark is a package at the repository's root, not an installed one."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """A benchmark silences llavaforge's log, which tests that come later read."""
    logger = logging.getLogger("llavaforge")
    before = logger.level
    yield
    logger.setLevel(before)
