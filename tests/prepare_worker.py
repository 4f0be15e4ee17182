"""What tests/data/test_prepare.py does in processes of their own; imports little, so that they start quickly."""

import logging
import os
import signal
import time
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow

from llavaforge.config.schema import DataEntry, SampleOptions
from llavaforge.data.index import prepare
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_index
from llavaforge.data.rows import kinds


def open_unread(folder: Path, cache: Path, **entry: Any) -> SampleIndex:
    """Open without a model: records only."""
    options = SampleOptions(cache_dir=cache)
    return open_index([DataEntry.model_validate({"path": folder, **entry})], None, 0, options, quiet=True)


def prepare_and_wait(folder: Path, cache: Path, log: Path, go: Path, chunk: int, wait_at: int) -> None:
    """Prepare in chunks of a size; at one of them wait for a file."""
    logging.getLogger("llavaforge").setLevel(logging.INFO)
    logging.getLogger("llavaforge").addHandler(logging.FileHandler(log))
    real = kinds.read_chunks

    def read_and_wait(*arguments: Any) -> Any:
        for number, found in enumerate(real(*arguments)):
            while number == wait_at and not go.exists():
                time.sleep(0.01)
            yield found

    vars(prepare).update(_CHUNK=chunk, read_chunks=read_and_wait)
    open_unread(folder, cache)


def prepare_and_die(folder: Path, cache: Path, name: str, calls_before: int) -> None:
    """Prepare, and be killed at the given call of a function that `prepare` uses."""
    owner: Any = next(owner for owner in (prepare, os, pyarrow) if hasattr(owner, name))
    real, calls = getattr(owner, name), count()

    def call_or_die(*arguments: Any) -> Any:
        if next(calls) == calls_before:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(owner, name, call_or_die)
    open_unread(folder, cache)
