"""What a finished run leaves: `output_dir/final/`.

Comes in: the engine's float32 weights. Goes out: a plain model folder, or for LoRA a peft adapter that carries the
projector.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from llavaforge.checkpoint.state import RUN, without_private_paths
from llavaforge.checkpoint.trained import merge, read_trained
from llavaforge.config.recipe import FINAL, result_of
from llavaforge.config.schema import TrainConfig
from llavaforge.engine.base import Engine
from llavaforge.files import publishing
from llavaforge.model.load import LoadedModel
from llavaforge.model.lora import LoraOptions, adapter_tensors, peft_config
from llavaforge.model_folder.processor_files import write_processor
from llavaforge.model_folder.tensors import write_shards
from llavaforge.model_folder.write import update_model_folder

logger = logging.getLogger(__name__)


def write_final(
    folder: Path, loaded: LoadedModel, engine: Engine, run: dict[str, Any], lora: LoraOptions | None
) -> None:
    """Publish the finished model. All processes call this; the writer writes.

    Args:
        folder: `output_dir/final`.
        loaded: the model the run started from; what was frozen is copied from its files, byte for byte.
        engine: gives the trained weights.
        run: what is written to `run.json`.
        lora: the run's LoRA options, or None when it trained plain weights.
    """
    trained = dict(engine.masters())
    if engine.world.is_writer:
        if lora is None:
            shared = json.dumps(without_private_paths(run), indent=1) + "\n"
            update_model_folder(folder, loaded.path, trained, extra_files={RUN: shared})
        else:
            with publishing(folder) as temporary:
                write_shards(temporary, "adapter_model", adapter_tensors(trained).items(), max_shard_bytes=2**62)
                base = _portable(run["config"]["model_name_or_path"])
                peft_config(lora, base).save_pretrained(temporary)
                write_processor(temporary, loaded.processor)
                (temporary / RUN).write_text(json.dumps(run, indent=1) + "\n")
        logger.info("finished model: %s", folder)
    engine.world.barrier()


def _portable(name_or_path: str) -> str:
    """Return a model's name for other people's eyes: as the user gave it, an absolute path relative to this folder."""
    path = Path(name_or_path).expanduser()
    return os.path.relpath(path) if path.is_absolute() else name_or_path


def leave_result(stage: TrainConfig, output_dir: Path) -> None:
    """After a stage: merge a LoRA for the stage that follows, and point `output_dir/final` to the newest result."""
    if stage.uses_lora and not result_of(stage).is_dir():
        trained = read_trained(stage.output_dir / FINAL)
        assert trained is not None
        merge(result_of(stage), trained)
        logger.info("%s: LoRA merged into %s", stage.output_dir.name, result_of(stage))
    pointer = output_dir / FINAL
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(Path(stage.output_dir.name) / FINAL, target_is_directory=True)
