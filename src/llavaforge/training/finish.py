"""What a finished run leaves: `output_dir/final/`.

Comes in: the engine's float32 weights. Goes out: a plain model folder, or for LoRA a peft adapter that carries the
projector.
"""

import json
import logging
import os
from pathlib import Path

from llavaforge.checkpoint.state import RUN, without_private_paths
from llavaforge.checkpoint.trained import merge, read_trained
from llavaforge.config.recipe import FINAL, result_of
from llavaforge.config.schema import TrainConfig
from llavaforge.engine.base import Engine
from llavaforge.errors import UserError
from llavaforge.files import publishing
from llavaforge.model.lora import adapter_tensors, peft_config
from llavaforge.model.trainable import lora_options
from llavaforge.model_folder.processor_files import write_processor
from llavaforge.model_folder.tensors import write_shards
from llavaforge.model_folder.write import update_model_folder
from llavaforge.results import TrainResult
from llavaforge.training.opening import OpenedStage

logger = logging.getLogger(__name__)


def write_final(folder: Path, opened: OpenedStage, engine: Engine, result: TrainResult) -> None:
    """Publish the finished model. All processes call this; the writer writes.

    Args:
        folder: `output_dir/final`.
        opened: the stage; what was frozen is copied from the files of its model, byte for byte.
        engine: gives the trained weights.
        result: put into `run.json`.
    """
    run, base, lora = {**opened.run, "result": result}, opened.loaded.path, lora_options(opened.config)
    trained = dict(engine.masters())
    if engine.world.is_writer:
        if lora is None:
            shared = json.dumps(without_private_paths(run), indent=1) + "\n"
            update_model_folder(folder, base, trained, extra_files={RUN: shared})
        else:
            with publishing(folder) as temporary:
                write_shards(temporary, "adapter_model", adapter_tensors(trained).items(), max_shard_bytes=2**62)
                peft_config(lora, _portable(opened.config.model_name_or_path)).save_pretrained(temporary)
                write_processor(temporary, opened.loaded.processor)
                (temporary / RUN).write_text(json.dumps(run, indent=1) + "\n")
        logger.info("finished model: %s", folder)
    engine.world.barrier()


def _portable(name_or_path: str) -> str:
    """Return a model's name for other people's eyes: as the user gave it, an absolute path relative to this folder."""
    path = Path(name_or_path).expanduser()
    return os.path.relpath(path) if path.is_absolute() else name_or_path


def check_pointer(output_dir: Path) -> None:
    """Check that `final` of a run with stages, which points to the newest stage's, is free or such a pointer.

    Raises:
        UserError: a file or folder of that name is in the way.
    """
    pointer = output_dir / FINAL
    if pointer.exists() and not pointer.is_symlink():
        raise UserError(f"{pointer}: is in the way of the link to the last stage's model. Move it, or train elsewhere.")


def leave_result(stage: TrainConfig, output_dir: Path) -> None:
    """After a stage: merge a LoRA for the stage that follows, and point `output_dir/final` to the newest result."""
    if stage.uses_lora and not result_of(stage).is_dir():
        trained = read_trained(stage.output_dir / FINAL)
        assert trained is not None
        merge(result_of(stage), trained)
        logger.info("%s: LoRA merged into %s", stage.output_dir.name, result_of(stage))
    check_pointer(output_dir)
    pointer = output_dir / FINAL
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(Path(stage.output_dir.name) / FINAL, target_is_directory=True)
