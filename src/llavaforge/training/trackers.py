"""Where metrics go besides metrics.jsonl: to other people's trackers, each by its own client.

Comes in: lines of metrics. Goes out: what the client makes of them; its own environment variables say where
(`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`, ...). `report_to` chooses by name.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from llavaforge.errors import UserError, reason

logger = logging.getLogger(__name__)

Tracker = Callable[[dict[str, Any]], None]
_PROJECT = "llavaforge"


@contextmanager
def open_trackers(
    names: Sequence[str], output_dir: Path, recipe: Mapping[str, Any], start_step: int = 0
) -> Iterator[Tracker]:
    """Give a function that takes one line of metrics.

    A tracker that fails later, or as it is closed, is dropped with a warning: it ends no run.

    Args:
        names: of `TRACKERS`.
        output_dir: of the run; its name is the run's.
        recipe: that the trackers show.
        start_step: steps done before.

    Raises:
        UserError: a client is not installed, or does not start.
    """
    with ExitStack() as opened:
        trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                context = TRACKERS[name](output_dir, recipe, start_step)
                trackers[name] = context.__enter__()
                opened.callback(_close, name, context)
            except ImportError as error:
                told = f"report_to {name} needs {error.name or name}: pip install 'llavaforge[{EXTRAS[name]}]'."
                raise UserError(told) from None
            except Exception as error:  # any client's own
                raise UserError(f"report_to {name}: its client does not start ({reason(error)}).") from error

        def track(line: dict[str, Any]) -> None:
            numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
            for name in list(trackers):
                try:
                    trackers[name](numbers)
                except Exception as error:
                    del trackers[name]
                    logger.warning("report_to %s: no more metrics are sent (%s)", name, reason(error))

        yield track


def _close(name: str, context: AbstractContextManager[Tracker]) -> None:
    try:
        context.__exit__(None, None, None)
    except Exception as error:  # any client's own
        logger.warning("report_to %s: was not closed (%s)", name, reason(error))


@contextmanager
def _tensorboard(output_dir: Path, recipe: Mapping[str, Any], start_step: int) -> Iterator[Tracker]:
    from torch.utils.tensorboard import SummaryWriter

    # What a killed start wrote of steps that are done again is dropped.
    writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def track(line: dict[str, Any]) -> None:
        for key, value in line.items():
            if key != "step":
                writer.add_scalar(key, value, line["step"])

    try:
        yield track
    finally:
        writer.close()


@contextmanager
def _wandb(output_dir: Path, recipe: Mapping[str, Any], start_step: int) -> Iterator[Tracker]:
    import wandb

    project = os.environ.get("WANDB_PROJECT", _PROJECT)
    options: dict[str, Any] = {"name": output_dir.name, "dir": str(output_dir), "config": dict(recipe)}
    # Every start of a run is one of its group: a run that was deleted over there could not be gone on with.
    with wandb.init(project=project, group=output_dir.name, **options) as run:
        yield lambda line: run.log(line, step=line["step"])


@contextmanager
def _trackio(output_dir: Path, recipe: Mapping[str, Any], start_step: int) -> Iterator[Tracker]:
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
    with redirect_stdout(sys.stderr):  # what it says is no result
        trackio.init(project=project, name=output_dir.name, group=output_dir.name, config=dict(recipe))
    try:
        # `step` is a word of its own.
        yield lambda line: trackio.log({key: line[key] for key in line if key != "step"}, step=line["step"])
    finally:
        with redirect_stdout(sys.stderr):
            trackio.finish()


@contextmanager
def _mlflow(output_dir: Path, recipe: Mapping[str, Any], start_step: int) -> Iterator[Tracker]:
    import mlflow

    with mlflow.start_run(run_name=output_dir.name):
        mlflow.log_dict(dict(recipe), "recipe.json")
        yield lambda line: mlflow.log_metrics(line, step=line["step"])


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], AbstractContextManager[Tracker]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
EXTRAS = {"tensorboard": "tracking", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""The extras of pyproject.toml that bring the clients."""
