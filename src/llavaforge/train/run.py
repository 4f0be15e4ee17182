"""The training run, as a story: each act is a named function, in the order in which it happens.

read the recipe -> for each stage: open the engine, load the model, open the data, plan the order, claim the
folder, choose what learns, go on from a checkpoint, show and prove the contract, train, leave the finished model
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llavaforge import __version__
from llavaforge.checkpoint import resume
from llavaforge.checkpoint.publish import faults, fingerprint
from llavaforge.checkpoint.state import load_run
from llavaforge.config.schema import TrainConfig
from llavaforge.data.index import SampleIndex, open_index
from llavaforge.data.plan import Plan, num_steps
from llavaforge.engine.base import Engine
from llavaforge.engine.launch import open_engine
from llavaforge.errors import UserError
from llavaforge.join.projector import check_projector, read_projector
from llavaforge.model.load import LoadedModel, load_model
from llavaforge.model.trainable import lora_options
from llavaforge.train import finish, stages
from llavaforge.train.signals import StopRequest
from llavaforge.train.trainer import HeldOut, Trainer

logger = logging.getLogger(__name__)

# Fields that change how a run is carried out but not what comes of it; all others identify the run.
_NOT_IDENTITY = frozenset(
    """output_dir cache_dir image_folder model_name_or_path projector_from data_path eval_data_path eval_steps
    global_batch_size per_device_train_batch_size max_tokens_per_batch gradient_accumulation_steps
    gradient_checkpointing deepspeed dataloader_num_workers save_steps save_total_limit logging_steps report_to
    resume_from_checkpoint stages""".split()
)


def train(config: TrainConfig) -> dict[str, Any]:
    """Run all stages in order; finished ones are skipped, an interrupted one goes on.

    Returns:
        output_dir, global_step, train_loss, eval_loss, samples_per_s, tokens_per_s, mfu, peak_memory_bytes of the
        last stage.

    Raises:
        UserError: the recipe, the model or the data is at fault; the steps done so far are saved.
        StoppedEarly: a signal asked for it; a checkpoint is saved.
    """
    result: dict[str, Any] = {}
    expanded = stages.expand(config)
    with StopRequest() as stop:
        for number, stage in enumerate(expanded, 1):
            stop.check()
            engine = open_engine(stage.deepspeed)
            if stage is not config and engine.rank == 0:
                logger.info("stage %d of %d: %s (%s)", number, len(expanded), stage.output_dir.name, stage.train_type)
            result = _run_stage(stage, engine, stop, quiet=engine.rank > 0)
            if stage is not config and engine.rank == 0:
                stages.leave_result(stage, config.output_dir)
            engine.barrier()
    engine.close()
    return result


def _run_stage(config: TrainConfig, engine: Engine, stop: StopRequest, quiet: bool) -> dict[str, Any]:
    logging.getLogger("llavaforge").setLevel(logging.WARNING if quiet else logging.INFO)
    console = Console(stderr=True, quiet=quiet)
    loaded = _load(config)
    index, train_rows, held_out = _open_data(config, loaded)
    plan = _plan(config, index, train_rows, engine)
    run = _describe(config, loaded, index, plan)
    with resume.claimed(config.output_dir, run, is_writer=engine.rank == 0):
        final = config.output_dir / stages.FINAL
        if final.is_dir() and not faults(final):
            logger.info("%s is finished already: skipped", config.output_dir)
            return dict(load_run(final)["result"])
        trainer = Trainer(config, engine, loaded, index, plan, held_out, run, console)
        trainer.take_up()
        with stop.postponed():
            result = trainer.train(stop)
            lora = lora_options(config) if config.train_type == "use_lora" else None
            finish.write_final(final, loaded, engine, {**run, "result": result}, lora)
    return result


def _load(config: TrainConfig) -> LoadedModel:
    loaded = load_model(config.model_name_or_path)
    if config.projector_from:
        projector = loaded.model.model.multi_modal_projector
        tensors = read_projector(config.projector_from)
        check_projector(config.projector_from, tensors, {n: t.shape for n, t in projector.state_dict().items()})
        projector.load_state_dict(tensors)
    return loaded


def _open_data(
    config: TrainConfig, loaded: LoadedModel
) -> tuple[SampleIndex, np.ndarray[Any, np.dtype[np.int64]], HeldOut | None]:
    """Return the training index, the rows of it to train on, and the held-out data if any."""

    def opened(path: Path) -> SampleIndex:
        return open_index(path, loaded.processor, loaded.num_image_tokens, config)

    index = opened(config.data_path)
    if not index.has_images:
        raise UserError(
            f"{config.data_path}: no record has an image, so the projector would learn nothing. Add image-text data."
        )
    rows = np.arange(len(index))
    if config.eval_data_path is not None:
        other = opened(config.eval_data_path)
        return index, rows, HeldOut(other, np.arange(len(other)))
    if not config.eval_holdout:
        return index, rows, None
    if config.eval_holdout >= len(index):
        raise UserError(
            f"eval_holdout {config.eval_holdout} leaves nothing of {len(index)} records to train on. Give less."
        )
    shuffled = np.random.default_rng(config.seed).permutation(len(index))
    held_out, rows = np.sort(shuffled[: config.eval_holdout]), np.sort(shuffled[config.eval_holdout :])
    return index, rows, HeldOut(index, held_out)


def _plan(config: TrainConfig, index: SampleIndex, rows: np.ndarray[Any, np.dtype[np.int64]], engine: Engine) -> Plan:
    per_step = config.per_device_train_batch_size * (config.gradient_accumulation_steps or 1) * engine.world_size
    global_batch_size = _frozen_batch_size(config) or config.global_batch_size or per_step
    if global_batch_size > len(rows):
        logger.warning("a global batch of %d is more than all %d records: some repeat", global_batch_size, len(rows))
    steps = num_steps(len(rows), global_batch_size, config.num_train_epochs, config.max_steps)
    return Plan(
        samples=rows,
        lengths=index.lengths,
        num_supervised=index.num_supervised,
        global_batch_size=global_batch_size,
        num_steps=steps,
        seed=config.seed,
        world_size=engine.world_size,
        max_samples=config.per_device_train_batch_size,
        max_tokens=config.max_tokens_per_batch,
    )


def _frozen_batch_size(config: TrainConfig) -> int | None:
    """Return the global batch of a run that has begun, when the recipe gives only the per-device trio.

    So a run that goes on with 2 instead of 4 processes keeps its batch.
    """
    begun = resume.begun(config.output_dir)
    if config.global_batch_size is not None or begun is None:
        return None
    return int(begun["identity"]["global_batch_size"])


def _describe(config: TrainConfig, loaded: LoadedModel, index: SampleIndex, plan: Plan) -> dict[str, Any]:
    """Return what identifies the run, and what a reader of its folders needs."""
    values = config.model_dump(mode="json")
    identity = {key: value for key, value in values.items() if key not in _NOT_IDENTITY}
    identity |= {
        "base_model": fingerprint(loaded.path),
        "projector": _checksum_of_projector(loaded) if config.projector_from else None,
        "data": index.fingerprint,
        "global_batch_size": plan.global_batch_size,
    }
    return {
        "llavaforge": __version__,
        "train_type": config.train_type,
        "base_model": str(loaded.path.absolute()),
        "identity": identity,
        "config": values,
    }


def _checksum_of_projector(loaded: LoadedModel) -> float:
    projector = loaded.model.model.multi_modal_projector
    return sum(float(tensor.double().sum()) for tensor in projector.parameters())
