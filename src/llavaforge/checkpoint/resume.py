"""Whose folder is this, and from which checkpoint does the run go on?

Comes in: `output_dir` and the run's identity. Goes out: a valid checkpoint or None.
"""

import fcntl
import logging
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from llavaforge.checkpoint.identity import check_same_run
from llavaforge.checkpoint.state import LATEST, PREFIX, TRAIN_STATE, load_run, steps_of
from llavaforge.config.schema import TrainConfig
from llavaforge.errors import UserError
from llavaforge.files import NEW, replace_text, to_json
from llavaforge.files import PREFIX as OWN_PREFIX
from llavaforge.folders import differences, remove_leftovers, set_aside
from llavaforge.model_folder.card import RUN
from llavaforge.processes.world import World

logger = logging.getLogger(__name__)

_LOCK = f"{OWN_PREFIX}.lock"
_SHARED_WITHIN_S = 60.0  # NFS caches attributes of a folder for up to 60 s by default (nfs(5), acdirmax)


@contextmanager
def claimed(output_dir: Path, run: dict[str, Any], allowed: Collection[str], world: World) -> Iterator[None]:
    """Hold `output_dir` for this run while the block lasts.

    Args:
        output_dir: made when absent; `run.json` is put there.
        run: has `identity`: everything that the result depends on.
        allowed: what of that may differ from before.
        world: its writer writes and locks, the others look whether they see the same folder.

    Raises:
        UserError: the folder holds something else, belongs to another run, is being written by another process, or is
        not on a file system that all hosts share.
    """
    with ExitStack() as held:
        world.run_on_all(lambda: _claim(output_dir, run, allowed, held) if world.is_writer else None)
        token = world.broadcast_object((output_dir / _LOCK).read_text() if world.is_writer else "")
        world.run_on_all(lambda: _check_shared(output_dir / _LOCK, token))
        yield


def _claim(output_dir: Path, run: dict[str, Any], allowed: Collection[str], held: ExitStack) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir}: is a file. Give another output_dir.")
    output_dir.mkdir(parents=True, exist_ok=True)
    _check_strangers(output_dir)  # before anything is written there
    lock = held.enter_context((output_dir / _LOCK).open("a"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"{output_dir}: another process is training here. Wait for it, or give another output_dir."
        ) from None
    _check_strangers(output_dir)
    _check_same(output_dir, run, allowed)
    lock.truncate(0)
    lock.write(secrets.token_hex(8))
    lock.flush()
    remove_leftovers(output_dir)
    for unfinished in output_dir.glob(f"{OWN_PREFIX}-*-{NEW}-{PREFIX}*"):
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that another machine was killed in: the lock is ours
    replace_text(output_dir / RUN, to_json(run, indent=1) + "\n")


def _check_shared(lock: Path, token: str) -> None:
    """Check that this host sees what the writer has just written (a network drive may take a minute)."""
    deadline = time.monotonic() + _SHARED_WITHIN_S
    while True:
        try:
            if lock.read_text() == token:
                return
        except OSError as error:
            logger.debug("not yet: %s", error)
        if time.monotonic() > deadline:
            raise UserError(
                f"{lock.parent}: {socket.gethostname()} does not see there what process 0 writes. Give an output_dir "
                "on a file system that all hosts share."
            )
        time.sleep(0.2)


def begun(output_dir: Path) -> dict[str, Any] | None:
    """Return the `run.json` of a run that has left something there; one that failed before step 1 claims nothing.

    Raises:
        UserError: it is damaged, and no checkpoint has one.
    """
    if not _is_run(output_dir):
        return None
    left = {path.name for path in output_dir.iterdir() if not path.name.startswith(".")} - {RUN}
    left -= {path.name for path in output_dir.glob("*.jsonl") if not path.stat().st_size}
    if not left:
        return None
    folders = [output_dir, *(output_dir / f"{PREFIX}{step}" for step in reversed(steps_of(output_dir)))]
    for folder in folders:
        try:
            return load_run(folder)
        except UserError as error:
            logger.warning("%s", error)
    raise UserError(
        f"{output_dir / RUN}: is damaged, and no checkpoint says what run this is. Restore it, or give another "
        "output_dir."
    )


def batch_size_of_begun(config: TrainConfig) -> int | None:
    """Return the global batch of a run that has begun, when the recipe gives only the per-device trio.

    So a run that goes on with 2 instead of 4 processes keeps its batch.
    """
    run = begun(config.output_dir)
    if config.global_batch_size is not None or run is None:
        return None
    return int(run["identity"]["global_batch_size"])


def find_checkpoint(
    output_dir: Path, asked: Path | str, run: dict[str, Any], allowed: Collection[str], world: World
) -> Path | None:
    """Return the checkpoint to go on from; all processes call this and get the same answer.

    Args:
        output_dir: the run's folder.
        asked: `auto`, or a checkpoint folder.
        run: has `identity`, which must be the checkpoint's.
        allowed: what of that may differ.
        world: its processes divide the reading; the writer renames a corrupt checkpoint.

    Returns:
        The newest valid one (newer ones that are damaged are renamed `.corrupt`, with a warning), or None to start.

    Raises:
        UserError: the one asked for is missing, corrupt, or of another run; or none of those that were saved is sound.
        OSError: one cannot be read just now.
    """

    def differences_of(folder: Path) -> list[str]:
        shares = world.all_gather_objects(world.run_on_all(lambda: differences(folder, world.rank, world.size)))
        return list(dict.fromkeys(line for share in shares for line in share))

    def check(folder: Path) -> None:
        check_same_run(folder, load_run(folder)["identity"], run["identity"], allowed)

    if isinstance(asked, Path):
        if not (asked / TRAIN_STATE).is_file():
            world.fail(UserError(f"{asked}: is no checkpoint. Give a run's checkpoint-N, or `auto`."))
        if found := differences_of(asked):
            message = f"{asked} cannot be resumed from: {'; '.join(found)}. Give another checkpoint-N or `auto`."
            world.fail(UserError(message))
        world.run_on_all(lambda: check(asked))
        return asked
    damaged: dict[Path, list[str]] = {}
    for step in reversed(world.broadcast_object(steps_of(output_dir) if world.is_writer else [])):
        folder = output_dir / f"{PREFIX}{step}"
        if found := differences_of(folder):
            damaged[folder] = found
            continue
        world.run_on_all(partial(check, folder))
        if world.is_writer:
            for other, lines in damaged.items():
                logger.warning("%s is damaged (%s): renamed %s", other, "; ".join(lines), set_aside(other).name)
        return folder
    if world.broadcast_object((output_dir / LATEST).exists() if world.is_writer else False):
        listed = [f"  {folder.name}: {'; '.join(lines)}" for folder, lines in damaged.items()] or ["  none is there"]
        world.fail(
            UserError(
                f"{output_dir}: steps were saved here, and no sound checkpoint is left to go on from:\n"
                + "\n".join(listed)
                + f"\nRestore one of them; or remove {LATEST} and them to begin at step 1; or give another output_dir."
            )
        )
    return None


def leave_others(output_dir: Path, checkpoint: Path, step: int) -> None:
    """Rename the checkpoints that are not on the way to the one that a run goes on from: all, or those of later steps.

    Else these steps would not be saved anew, and `auto` would go on from the way that was left.

    Args:
        output_dir: the run's folder.
        checkpoint: that it goes on from, there or elsewhere.
        step: of that.
    """
    is_own = checkpoint.resolve().parent == output_dir.resolve() and checkpoint.name == f"{PREFIX}{step}"
    for other in steps_of(output_dir):
        if other > step or not is_own:
            folder = output_dir / f"{PREFIX}{other}"
            told = "the run goes on from %s: %s is kept as %s"
            logger.warning(told, checkpoint, folder, set_aside(folder, "superseded").name)
    if is_own:
        replace_text(output_dir / LATEST, f"{PREFIX}{step}\n")
    else:
        (output_dir / LATEST).unlink(missing_ok=True)


def _is_run(output_dir: Path) -> bool:
    """Say whether a folder is a run's: it says so, or a checkpoint in it does."""
    folders = [output_dir, *(output_dir / f"{PREFIX}{step}" for step in steps_of(output_dir))]
    return any((folder / RUN).is_file() for folder in folders)


def _check_strangers(output_dir: Path) -> None:
    strangers = sorted(path.name for path in output_dir.iterdir() if not path.name.startswith(OWN_PREFIX))
    if strangers and not _is_run(output_dir):
        raise UserError(
            f"{output_dir}: not empty and not a run of llavaforge (it holds {', '.join(strangers[:3])}). "
            "Give another output_dir."
        )


def _check_same(output_dir: Path, run: dict[str, Any], allowed: Collection[str]) -> None:
    if (owner := begun(output_dir)) is None:
        return
    check_same_run(output_dir, owner["identity"], run["identity"], allowed)
    if owner.get("llavaforge") != run["llavaforge"]:
        before, now = owner.get("llavaforge"), run["llavaforge"]
        logger.warning("%s was begun with llavaforge %s; this is %s", output_dir, before, now)
