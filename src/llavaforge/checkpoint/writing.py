"""Save a checkpoint while training goes on.

Comes in: an engine and the run's counts. Goes out: `output_dir/checkpoint-N/` (see `state.py`), whole or not at all.

The tensors are copied to host memory, so that later steps change nothing of them; threads write, sum and flush the
copy, each process its share. Publishing needs all processes: their main threads do it together, once all have written.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from llavaforge.checkpoint.state import LATEST, PREFIX, STEM, TRAIN_STATE, steps_of
from llavaforge.engine.base import Engine
from llavaforge.errors import EndedElsewhere
from llavaforge.files import naming, replace_text, to_json
from llavaforge.folders import not_published, publishing
from llavaforge.model_folder.card import RUN
from llavaforge.model_folder.tensors import in_shards, name_shards

logger = logging.getLogger(__name__)

_NUM_THREADS = 2  # SHA-256 passes 1 to 2 GB/s on a core, less than a fast disk takes
_BLOCK_BYTES = 16 * 1000**2


@dataclass(frozen=True)
class _File:
    name: str
    tensors: list[str]
    entry: dict[str, Any]  # of the manifest
    end_s: float  # seconds from the beginning of the save until it was on the disk


class _GivenUp(Exception):
    """The run ends, and what is being written with it."""


class Save:
    """One checkpoint, from the copy of its tensors to its publication; all processes do the same with it.

    Made, it is copied and being written. All call `publish` then, sooner or later, or `give_up`.

    Args:
        output_dir: of the run; `checkpoint-STEP` is not there yet.
        engine: gives the tensors.
        step: steps done.
        train_state: where the run stands.
        run: what run this is.
        num_bytes: of all tensors, looked for on the disk before anything is written.
        at_once: write each shard as soon as it is copied, and hold no more than one.

    Attributes:
        step: steps done.
        folder: its name when it is published.
        write_time_s: once it is published, seconds until the slowest process had written its share.

    Raises:
        OSError: the disk is full, say; nothing is left then.
    """

    def __init__(
        self,
        output_dir: Path,
        engine: Engine,
        step: int,
        train_state: dict[str, Any],
        run: dict[str, Any],
        num_bytes: int,
        at_once: bool,
    ) -> None:
        self.step, self.folder, self.write_time_s = step, output_dir / f"{PREFIX}{step}", 0.0
        self._best_step = train_state.get("best_step")  # as this checkpoint has it: a later one is not published yet
        texts = {TRAIN_STATE: train_state, RUN: run}
        self._texts = {name: to_json(value, indent=1) + "\n" for name, value in texts.items()}
        self._world, self._begin_s = engine.world, time.perf_counter()
        self._entries: dict[str, dict[str, Any]] = {}
        self._is_given_up = threading.Event()
        with ExitStack() as published:

            def begin() -> str:
                if not self._world.is_writer:
                    return ""
                _check_free_space(output_dir, num_bytes)
                return str(published.enter_context(publishing(self.folder, self._entries)))

            self._temporary = Path(self._world.broadcast_object(self._world.run_on_all(begin)))
            self._files: list[Future[_File]] = []
            pool = ThreadPoolExecutor(_NUM_THREADS, "checkpoint")
            shards = in_shards(_tensors(engine))
            # All are copied before the first is written: training waits for the copy, and writing would slow it down.
            for number, shard in enumerate(shards if at_once else list(shards), start=1):
                name = f"{STEM}-of-{self._world.rank:05d}-{number:05d}.safetensors"
                self._files.append(pool.submit(self._write, name, shard))
                if at_once:
                    wait(self._files)  # a fault is raised later: the other processes wait for this one in each tensor
            pool.shutdown(wait=False)
            self._published = published.pop_all()

    @property
    def is_written(self) -> bool:
        """Whether this process has written its share, or could not."""
        return all(file.done() for file in self._files)

    def publish(self, keep: int) -> None:
        """Wait until it is written, publish it, move the `latest` pointer, and remove all but the newest and the best.

        Args:
            keep: how many of the newest stay.

        Raises:
            OSError: the disk is full, say; nothing is published then.
            EndedElsewhere: that happened to another process.
        """
        world = self._world
        failure: OSError | None = None
        try:
            with self._published:
                mine = world.run_on_all(lambda: [file.result() for file in self._files])
                files = [file for files in world.all_gather_objects(mine) for file in files]
                self.write_time_s = max(file.end_s for file in files)
                if world.is_writer:
                    paths = name_shards(self._temporary, STEM, [(file.name, file.tensors) for file in files])
                    self._entries |= {path.name: file.entry for path, file in zip(paths, files, strict=True)}
                    for name, text in self._texts.items():
                        (self._temporary / name).write_text(text)
            if world.is_writer:
                replace_text(self.folder.parent / LATEST, self.folder.name + "\n")
                _rotate(self.folder.parent, keep, self._best_step)
        except OSError as error:
            failure = error
        except EndedElsewhere:  # another process's fault: it is raised again below, on all of them
            pass

        def check() -> None:
            if failure is not None:
                raise failure

        world.run_on_all(check)

    def give_up(self) -> None:
        """Remove what is written of it, without a word to the other processes."""
        self._is_given_up.set()
        with suppress(_GivenUp), self._published:
            raise _GivenUp

    def _write(self, name: str, shard: dict[str, torch.Tensor]) -> _File:
        with naming(self.folder):
            entry = _write_and_sum(self._temporary / name, shard, self._is_given_up)
        names = list(shard)
        shard.clear()
        return _File(name, names, entry, time.perf_counter() - self._begin_s)


def _write_and_sum(path: Path, tensors: Mapping[str, torch.Tensor], is_given_up: threading.Event) -> dict[str, Any]:
    """Write float32 tensors as `safetensors` does, to the byte, and flush them; return the file's manifest entry.

    Its own functions cannot sum what they write: every byte would be read once more.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        assert tensors[name].dtype == torch.float32, name
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    blocks: Iterator[bytes | memoryview] = chain([len(text).to_bytes(8, "little"), text], _blocks(tensors))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in blocks:
            if is_given_up.is_set():
                raise _GivenUp
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _blocks(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    for name in sorted(tensors):
        content = memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, len(content), _BLOCK_BYTES):
            yield content[start : start + _BLOCK_BYTES]


def _check_free_space(folder: Path, num_bytes: int) -> None:
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        needed = f"a checkpoint takes {num_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, needed, str(folder))


def _tensors(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    for name, state in engine.trainable_state():
        yield f"weight/{name}", state.weight
        yield f"exp_avg/{name}", state.exp_avg
        yield f"exp_avg_sq/{name}", state.exp_avg_sq


def _rotate(output_dir: Path, keep: int, best_step: int | None) -> None:
    for step in steps_of(output_dir)[:-keep]:
        if step == best_step:
            continue
        folder = output_dir / f"{PREFIX}{step}"
        try:
            if strangers := not_published(folder):
                logger.warning("%s is kept: it holds what llavaforge did not write (%s)", folder, strangers[0])
            else:
                shutil.rmtree(folder)
        except OSError as error:
            logger.warning("%s could not be removed: %s", folder, error)
