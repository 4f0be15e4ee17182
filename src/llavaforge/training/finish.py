"""What a finished run leaves: `output_dir/final/`.

Comes in: the engine's float32 weights. Goes out: a plain model folder, or for LoRA a peft adapter that carries the
projector.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from llavaforge.checkpoint.state import PREFIX, ParameterStates, load_run, steps_of, without_private_paths
from llavaforge.checkpoint.trained import merge, read_trained
from llavaforge.config.recipe import FINAL, result_of
from llavaforge.config.schema import TrainConfig
from llavaforge.engine.base import Engine
from llavaforge.errors import UserError
from llavaforge.files import to_json
from llavaforge.folders import MANIFEST, differences, not_published, publishing, set_aside
from llavaforge.model.lora import adapter_tensors, peft_config
from llavaforge.model.trainable import lora_options
from llavaforge.model_folder.card import PARTS, RUN, adapter_card, read_records
from llavaforge.model_folder.processor_files import write_processor
from llavaforge.model_folder.tensors import write_shards
from llavaforge.model_folder.write import update_model_folder
from llavaforge.results import TrainResult
from llavaforge.training.metrics import curve
from llavaforge.training.opening import OpenedStage
from llavaforge.training.state import TrainState

logger = logging.getLogger(__name__)


def write_final(folder: Path, opened: OpenedStage, engine: Engine, result: TrainResult) -> None:
    """Publish the finished model. All processes call this; the writer writes.

    Args:
        folder: `output_dir/final`.
        opened: the stage; what was frozen is copied from the files of its model, byte for byte.
        engine: gives the trained weights.
        result: put into `run.json`.
    """
    points = curve(opened.config.output_dir) if engine.world.is_writer else []
    run = without_private_paths({**opened.run, "result": result, "curve": points})
    base, lora = opened.loaded.path, lora_options(opened.config)
    trained = dict(engine.masters())
    if engine.world.is_writer:
        if lora is None:
            update_model_folder(folder, base, trained, _makes_room(folder), records={RUN: run})
        else:
            with publishing(folder, overwrite=_makes_room(folder)) as temporary:
                write_shards(temporary, "adapter_model", adapter_tensors(trained).items(), max_shard_bytes=2**62)
                named = _portable(opened.config.model_name_or_path)
                peft_config(lora, named).save_pretrained(temporary)
                card = adapter_card(named, read_records(base).get(PARTS), run)
                (temporary / "README.md").write_text(card, encoding="utf-8")
                write_processor(temporary, opened.loaded.processor)
                (temporary / RUN).write_text(to_json(run, indent=1) + "\n")
        logger.info("finished model: %s", folder)
    engine.world.barrier()


def restore_best(opened: OpenedStage, engine: Engine, state: TrainState) -> None:
    """Give the engine the weights of the best evaluation's checkpoint; all processes call this.

    Raises:
        UserError: it cannot be read.
    """
    if state.best_step in (None, state.step):
        return
    folder, world = opened.config.output_dir / f"{PREFIX}{state.best_step}", engine.world
    if not world.broadcast_object(folder.is_dir()):
        told = "%s, the best by %s, is gone: the finished model is that of the last step"
        logger.warning(told, folder, opened.config.metric_for_best_model)
        return
    world.at(f"loading {folder.name}")
    weights = world.run_on_all(lambda: ParameterStates(folder))
    engine.restore(weights, state.step - state.num_skipped)
    logger.info(
        "the finished model is that of step %d, the best by %s", state.best_step, opened.config.metric_for_best_model
    )


def _portable(name_or_path: str) -> str:
    """Return a model's name for other people's eyes: as the user gave it, an absolute path relative to this folder."""
    path = Path(name_or_path).expanduser()
    return os.path.relpath(path) if path.is_absolute() else name_or_path


def check_pointer(output_dir: Path, stages: Sequence[TrainConfig]) -> None:
    """Check that `final` of a run with stages, which points to the newest stage's, is free or such a pointer.

    Raises:
        UserError: a file or folder of that name is in the way, or a link to something else.
    """
    pointer = output_dir / FINAL
    ours = {str(Path(stage.output_dir.name) / FINAL) for stage in stages}
    if os.path.lexists(pointer) and not (pointer.is_symlink() and os.readlink(pointer) in ours):
        raise UserError(f"{pointer}: is in the way of the link to the last stage's model. Move it, or train elsewhere.")


def leave_result(stage: TrainConfig, output_dir: Path, stages: Sequence[TrainConfig]) -> None:
    """After a stage: merge a LoRA for the stage that follows, and point `output_dir/final` to the newest result."""
    final, merged = stage.output_dir / FINAL, result_of(stage)
    if stage.uses_lora and not _is_merged(final, merged):
        trained = read_trained(final)
        assert trained is not None
        merge(merged, trained, overwrite=_makes_room(merged))
        logger.info("%s: LoRA merged into %s", stage.output_dir.name, merged)
    check_pointer(output_dir, stages)
    pointer = output_dir / FINAL
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(Path(stage.output_dir.name) / FINAL, target_is_directory=True)


def finished_result(final: Path, num_steps: int, patience: int) -> TrainResult | None:
    """Return the result of a run that has taken all its steps; a damaged `final` is moved aside, to be written again.

    Args:
        final: `output_dir/final`.
        num_steps: that the run is to take.
        patience: `early_stopping_patience`; with as much or less, and as many steps or fewer, a run that was stopped
            early is finished.

    Returns:
        None when steps are left to take, or only `final` is to be written.

    Raises:
        UserError: more steps were taken than asked for, there is no checkpoint to go on from, or something else is in
        the way of `final`.
    """
    if not os.path.lexists(final) or (final.is_dir() and not any(final.iterdir())):
        return None
    if final.is_symlink() or not final.is_dir() or not any((final / name).is_file() for name in (RUN, MANIFEST)):
        raise UserError(f"{final}: is in the way of the finished model. Move it, or give another output_dir.")
    found = differences(final)
    run = {} if found else load_run(final)
    result: TrainResult | None = run.get("result")
    num_done = 0 if result is None else int(result["global_step"])
    before = run.get("config", {}).get("early_stopping_patience", 0)
    stays = num_steps <= run.get("num_steps", 0) and 0 < patience <= before
    if result is not None and (num_done == num_steps or (stays and result.get("stopped_early"))):
        return {**result, "output_dir": str(final.parent)}
    if num_done > num_steps:
        raise UserError(
            f"{final}: {num_done} steps were taken already, more than the {num_steps} asked for. Ask for more, or give "
            "another output_dir."
        )
    if not steps_of(final.parent):
        what = f"is damaged ({'; '.join(found)})" if found else f"was trained for {num_done} of {num_steps} steps"
        raise UserError(f"{final}: {what}, and no checkpoint is left to go on from. Give another output_dir.")
    if found:
        logger.warning("%s is damaged (%s): written again, kept as %s", final, "; ".join(found), set_aside(final).name)
    return None


def _makes_room(folder: Path) -> bool:
    """Move a folder aside in which something is not ours; say whether one is left that may be replaced."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not_published(folder):
        logger.warning("%s holds more than llavaforge wrote: kept as %s", folder, set_aside(folder).name)
        return False
    return True


def _is_merged(final: Path, merged: Path) -> bool:
    """Say whether a merged folder is there, sound and of this very `final`."""
    if not merged.is_dir() or differences(merged):
        return False
    keys = ("global_step", "train_loss")
    one, other = (load_run(folder)["result"] for folder in (final, merged))
    return all(one[key] == other[key] for key in keys)
