"""Whose folder is this, and from which checkpoint does the run go on?

Comes in: `output_dir` and the run's identity. Goes out: a valid checkpoint or None. Called by `train/run.py`.
"""

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llavaforge.checkpoint.publish import faults, remove_leftovers, replace_text
from llavaforge.checkpoint.state import PREFIX, RUN, load_run, steps_of
from llavaforge.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def claimed(output_dir: Path, run: dict[str, Any], is_writer: bool) -> Iterator[None]:
    """Hold `output_dir` for this run while the block lasts.

    Args:
        output_dir: made when absent; `run.json` is put there.
        run: has `identity`: everything that the result depends on.
        is_writer: rank 0 writes and locks, the others only look.

    Raises:
        UserError: the folder holds something else, belongs to another run, or is being written by another process.
    """
    if not is_writer:
        yield
        return
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir}: is a file. Give another output_dir.")
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{output_dir}: another process is training here. Wait for it, or give another output_dir."
            ) from None
        _check_owner(output_dir, run)
        remove_leftovers(output_dir)
        replace_text(output_dir / RUN, json.dumps(run, indent=1) + "\n")
        yield


def begun(output_dir: Path) -> dict[str, Any] | None:
    """Return the `run.json` of a run that has left something there; one that failed before step 1 claims nothing."""
    if not (output_dir / RUN).is_file():
        return None
    left = {path.name for path in output_dir.iterdir() if not path.name.startswith(".")} - {RUN}
    left -= {path.name for path in output_dir.glob("*.jsonl") if not path.stat().st_size}
    return load_run(output_dir) if left else None


def find_checkpoint(output_dir: Path, asked: Path | str, run: dict[str, Any], is_writer: bool) -> Path | None:
    """Return the checkpoint to go on from.

    Args:
        output_dir: the run's folder.
        asked: `auto`, or a checkpoint folder.
        run: has `identity`, which must be the checkpoint's.
        is_writer: only rank 0 renames a corrupt checkpoint.

    Returns:
        The newest valid one (invalid ones are renamed `.corrupt`, with a warning), or None to start anew.

    Raises:
        UserError: the one asked for is missing, corrupt, or of another run.
    """
    if isinstance(asked, Path):
        found = faults(asked)
        if found:
            raise UserError(f"{asked} cannot be resumed from: {'; '.join(found)}. Give another checkpoint-N or `auto`.")
        _check_identity(asked, load_run(asked), run)
        return asked
    for step in reversed(steps_of(output_dir)):
        folder = output_dir / f"{PREFIX}{step}"
        found = faults(folder)
        if not found:
            _check_identity(folder, load_run(folder), run)
            return folder
        logger.warning("%s is corrupt (%s); falling back to the one before", folder, "; ".join(found))
        if is_writer:
            folder.rename(folder.with_name(folder.name + ".corrupt"))
    return None


def _check_owner(output_dir: Path, run: dict[str, Any]) -> None:
    if (output_dir / RUN).is_file():
        owner = begun(output_dir)
        if owner is not None:
            _check_identity(output_dir, owner, run)
        return
    strangers = sorted(path.name for path in output_dir.iterdir() if not path.name.startswith("."))
    if strangers:
        raise UserError(
            f"{output_dir}: not empty and not a run of llavaforge (it holds {', '.join(strangers[:3])}). "
            "Give another output_dir."
        )


def _check_identity(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    before, now = theirs["identity"], ours["identity"]
    different = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if different:
        lines = [f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in different]
        raise UserError(
            f"{folder}: belongs to another run, which differs in\n"
            + "\n".join(lines)
            + "\nGive another output_dir, or the same options."
        )
