"""`train --profile`: a few steps looked at closely.

Comes in: a run's steps. Goes out: in `output_dir/profile` a trace for Perfetto and a table of operations.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from llavaforge.clock import Clock
from llavaforge.files import NEW, replace_text, temporary_path
from llavaforge.processes.world import World

logger = logging.getLogger(__name__)

FOLDER = "profile"
_NUM_STEPS, _NUM_BEFORE = 3, 2  # the first steps compile, and warm caches up
_NUM_ROWS = 30


class Profiler:
    """Records steps 3 to 5 of this start, or of a shorter run its last ones; every process writes its own files.

    Args:
        output_dir: of the stage.
        clock: names its parts in the trace.
        world: all processes.
        step: steps done before this start.
        num_steps: of the whole run.
    """

    def __init__(self, output_dir: Path, clock: Clock, world: World, step: int, num_steps: int) -> None:
        self._folder, self._clock, self._world = output_dir / FOLDER, clock, world
        active = max(1, min(_NUM_STEPS, num_steps - step - _NUM_BEFORE))
        before = max(0, min(_NUM_BEFORE, num_steps - step - active))
        self._first, self._last = step + before + 1, step + before + active
        warnings.filterwarnings("ignore", "Profiler won't be using warmup")  # there is no step for it
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (world.device.type == "cuda")
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=max(0, before - 1), warmup=min(1, before), active=active, repeat=1),
            on_trace_ready=self._write,
        )

    @contextmanager
    def recording(self, about: Callable[[], str]) -> Iterator[None]:
        """Record within the block; `about` gives the text above the table."""
        self._about = about
        with self._profile, self._clock.in_traces():
            yield

    def step(self) -> None:
        """Call this after every step."""
        self._profile.step()

    def _write(self, recorded: Any) -> None:
        self._folder.mkdir(exist_ok=True)
        trace = self._folder / f"trace-rank{self._world.rank}.json.gz"
        part = temporary_path(trace, NEW)
        recorded.export_chrome_trace(str(part))
        part.replace(trace)
        key = "self_device_time_total" if self._world.device.type == "cuda" else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=key, row_limit=_NUM_ROWS, max_name_column_width=60)
        replace_text(self._folder / f"table-rank{self._world.rank}.txt", f"{self._about()}\n\n{table}")
        told = "profile of steps %d to %d: %s (open it in https://ui.perfetto.dev) and the table beside it"
        logger.info(told, self._first, self._last, trace)
