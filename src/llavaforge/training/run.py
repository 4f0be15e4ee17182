"""The training run, as a story: each act is a named function, in the order in which it happens.

meet the other processes -> for each stage: settle DeepSpeed's settings, open the model and the data, claim the folder,
keep the images' features, go on from a checkpoint, show and prove the contract, train, leave the finished model
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console

from llavaforge.checkpoint.resume import batch_size_of_begun, claimed
from llavaforge.clock import Clock
from llavaforge.config.recipe import FINAL, training_stages
from llavaforge.config.schema import TrainConfig
from llavaforge.data.order.plan import check_world
from llavaforge.engine.open import open_engine
from llavaforge.engine.zero_config import settings_of_run
from llavaforge.errors import UserError
from llavaforge.processes.launch import num_processes
from llavaforge.processes.world import World, open_world
from llavaforge.results import TrainResult
from llavaforge.training.contract import show_contract
from llavaforge.training.features import keeping_features
from llavaforge.training.finish import check_pointer, finished_result, leave_result, restore_best, write_final
from llavaforge.training.opening import open_stage
from llavaforge.training.signals import StopRequest
from llavaforge.training.trainer import Trainer, prepare_or_resume

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> TrainResult:
    """Run all stages in order; finished ones are skipped, an interrupted one goes on.

    Returns:
        output_dir, global_step, train_loss, eval_loss, samples_per_s, tokens_per_s, mfu, peak_memory_bytes of the
        last stage.

    Raises:
        UserError: the recipe, the model or the data is at fault; the steps done so far are saved.
        StoppedEarly: a signal asked for it; a checkpoint is saved.
    """
    stages, size = training_stages(config), num_processes()
    needs_group = any(stage.deepspeed for stage in stages)
    with (
        StopRequest() as stop,
        deterministic(any(stage.deterministic for stage in stages)),
        open_world(size, config.stuck_timeout_s, needs_group) as world,
    ):
        for number, stage in enumerate(stages, 1):
            world.run_on_all(stop.check)
            if config.stages:
                world.run_on_all(lambda: check_pointer(config.output_dir, stages))
            if config.stages and world.is_writer:
                logger.info("stage %d of %d: %s (%s)", number, len(stages), stage.output_dir.name, stage.train_type)
            result = _run_stage(stage, world, stop)
            world.at("between stages")
            if config.stages and world.is_writer:
                leave_result(stage, config.output_dir, stages)
            world.barrier()
    return result


@contextmanager
def deterministic(is_on: bool) -> Iterator[None]:
    """Within the block let torch take only algorithms that give the same bytes every time."""
    before = torch.are_deterministic_algorithms_enabled()
    if is_on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _run_stage(config: TrainConfig, world: World, stop: StopRequest) -> TrainResult:
    logging.getLogger("llavaforge").setLevel(logging.INFO if world.is_writer else logging.WARNING)
    console = Console(stderr=True, quiet=not world.is_writer)
    world.at("checking the recipe")
    settings = world.run_on_all(lambda: _deepspeed_settings(config, world))
    opened = open_stage(config, world, console)
    with claimed(config.output_dir, opened.run, config.allow_changes, world):
        final, num_steps = config.output_dir / FINAL, opened.plan.num_steps
        patience = config.early_stopping_patience
        result = world.run_on_all(lambda: finished_result(final, num_steps, patience) if world.is_writer else None)
        if (finished := world.broadcast_object(result)) is not None:
            logger.info("%s is finished already: skipped", config.output_dir)
            return {**finished, "output_dir": str(config.output_dir)}
        show_contract(opened, console)  # before the engine: ZeRO-3 leaves no process a whole parameter to count
        with keeping_features(opened, world) as opened:
            engine, clock = open_engine(world, settings), Clock(world.device)
            state = prepare_or_resume(opened, engine, clock)
            with stop.postponed():
                result = Trainer(opened, engine, state, clock).train(stop)
                if config.load_best_model_at_end:
                    restore_best(opened, engine, state)
                world.at("writing the finished model")
                write_final(final, opened, engine, result)
    return result


def _deepspeed_settings(config: TrainConfig, world: World) -> dict[str, Any] | None:
    batch = batch_size_of_begun(config) or config.global_batch_size
    if batch is not None:
        check_world(batch, None, world.size)
    settings = settings_of_run(config, batch, world.size)
    if config.eval_generate_samples and settings is not None and settings["zero_optimization"]["stage"] == 3:
        raise UserError(
            "eval_generate_samples: under ZeRO-3 no process has the whole model, so none answers while training. Use "
            "zero2, or leave it out and `evaluate` the checkpoints."
        )
    return settings
