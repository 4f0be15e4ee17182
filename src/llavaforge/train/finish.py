"""What a finished run leaves: `output_dir/final/`.

Comes in: the engine's float32 weights. Goes out: a plain model folder, or for LoRA a peft adapter that carries the
projector. Called by `train/run.py`.
"""

import json
import logging
from pathlib import Path
from typing import Any

from llavaforge.checkpoint.publish import publishing
from llavaforge.checkpoint.state import RUN
from llavaforge.engine.base import Engine
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
            update_model_folder(folder, loaded.path, trained, extra_files={RUN: json.dumps(run, indent=1) + "\n"})
        else:
            with publishing(folder) as temporary:
                write_shards(temporary, "adapter_model", adapter_tensors(trained).items(), max_shard_bytes=2**62)
                peft_config(lora, str(loaded.path.absolute())).save_pretrained(temporary)
                write_processor(temporary, loaded.processor)
                (temporary / RUN).write_text(json.dumps(run, indent=1) + "\n")
        logger.info("finished model: %s", folder)
    engine.world.barrier()
