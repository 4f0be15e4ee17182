"""The training run, as a story: each act is a named function, in the order in which it happens.

meet the other processes -> for each stage: settle DeepSpeed's settings, load the model, choose what learns, open the
data, plan the order, claim the folder, go on from a checkpoint, show and prove the contract, train, leave the finished
model
"""

import logging
import math
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from llavaforge.checkpoint import resume
from llavaforge.checkpoint.identity import checksum_of_rows, identity
from llavaforge.checkpoint.state import load_run
from llavaforge.config.recipe import FINAL, training_stages
from llavaforge.config.schema import TrainConfig
from llavaforge.data.order.plan import Plan, check_world, num_steps
from llavaforge.engine import zero_config
from llavaforge.engine.open import open_engine
from llavaforge.files import differences
from llavaforge.join.projector import check_projector, read_projector
from llavaforge.model.flops import FlopCounter
from llavaforge.model.load import LoadedModel, compute_dtype, load_model
from llavaforge.model.lora import LoraOptions
from llavaforge.model.trainable import learning_rate, lora_options, parameter_groups
from llavaforge.model_folder.hub import find_model_folder
from llavaforge.model_folder.read import read_config
from llavaforge.processes.launch import num_processes
from llavaforge.processes.world import World, open_world
from llavaforge.results import TrainResult
from llavaforge.training import finish
from llavaforge.training.bad_samples import BadSamples
from llavaforge.training.opening import OpenedData, open_data
from llavaforge.training.signals import StopRequest
from llavaforge.training.trainer import Trainer
from llavaforge.version import __version__

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
    stages = training_stages(config)
    size = num_processes()
    needs_group = any(stage.deepspeed for stage in stages)
    with StopRequest() as stop, open_world(size, config.stuck_timeout_s, needs_group) as world:
        for number, stage in enumerate(stages, 1):
            world.run_on_all(stop.check)
            if stage is not config and world.is_writer:
                logger.info("stage %d of %d: %s (%s)", number, len(stages), stage.output_dir.name, stage.train_type)
            result = _run_stage(stage, world, stop)
            world.at("between stages")
            if stage is not config and world.is_writer:
                finish.leave_result(stage, config.output_dir)
            world.barrier()
    return result


def _run_stage(config: TrainConfig, world: World, stop: StopRequest) -> TrainResult:
    logging.getLogger("llavaforge").setLevel(logging.INFO if world.is_writer else logging.WARNING)
    console = Console(stderr=True, quiet=not world.is_writer)
    world.at("checking the recipe")
    settings = world.run_on_all(lambda: _settle(config, world))
    world.at("loading the model")
    loaded = world.run_on_all(lambda: _load(config))
    groups = world.run_on_all(lambda: parameter_groups(loaded.model, config))
    flops = FlopCounter.of(loaded.model, loaded.num_image_tokens)
    world.at("opening the data")
    data = world.run_on_first_of_host(lambda: open_data(config, loaded, quiet=not world.is_writer))
    if len(config.entries) > 1:
        console.print(data.mixture.table(config.entries, data.index.num_supervised))
    plan = world.run_on_all(lambda: _plan(config, data, flops, world))
    lora = lora_options(config)
    run = _describe(config, loaded, data, plan, lora)
    with resume.claimed(config.output_dir, run, world):
        final = config.output_dir / FINAL
        if world.broadcast_object(final.is_dir() and not differences(final) if world.is_writer else False):
            logger.info("%s is finished already: skipped", config.output_dir)
            return load_run(final)["result"] | {"output_dir": str(config.output_dir)}
        engine = open_engine(world, settings)
        bad_samples = BadSamples(config.output_dir, data.left_out, config.max_bad_samples, world.is_writer)
        trainer = Trainer(
            config, engine, loaded, groups, flops, data.index, plan, data.held_out, bad_samples, run, console
        )
        trainer.resume()
        with stop.postponed():
            result = trainer.train(stop)
            world.at("writing the finished model")
            finish.write_final(final, loaded, engine, {**run, "result": result}, lora)
    return result


def _settle(config: TrainConfig, world: World) -> dict[str, Any] | None:
    """Check what must fit together before a weight is read; return DeepSpeed's settings, None for plain PyTorch."""
    batch = _frozen_batch_size(config) or config.global_batch_size
    if batch is not None:
        check_world(batch, None, world.size)
    if world.size == 1 and config.deepspeed is None:
        return None
    hidden_size = int(read_config(find_model_folder(config.model_name_or_path)).get_text_config().hidden_size)
    settings = zero_config.build_settings(config.deepspeed, _decided(config, batch, world.size), hidden_size)
    zero_config.check_installed(settings)
    return settings


def _decided(config: TrainConfig, global_batch_size: int | None, num_processes: int) -> dict[str, Any]:
    """Return what the recipe decides of DeepSpeed's settings, by dotted key."""
    micro = config.per_device_train_batch_size
    accumulation = config.gradient_accumulation_steps
    if micro and global_batch_size:
        accumulation = math.ceil(global_batch_size / (micro * num_processes))
    return {
        "train_batch_size": global_batch_size or (micro or 0) * (accumulation or 1) * num_processes or None,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.max_grad_norm,
        "bf16.enabled": compute_dtype(config.bf16) == torch.bfloat16,
        "bf16.check_grad_overflow": True,
        "fp16.enabled": False,
        "data_types.grad_accum_dtype": "fp32",
        "optimizer.type": "AdamW",
        "optimizer.params.lr": learning_rate(config),
        "optimizer.params.betas": [config.adam_beta1, config.adam_beta2],
        "optimizer.params.eps": config.adam_epsilon,
        "optimizer.params.weight_decay": config.weight_decay,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": True,
    }


def _load(config: TrainConfig) -> LoadedModel:
    loaded = load_model(config.model_name_or_path)
    if config.projector_from:
        projector = loaded.model.model.multi_modal_projector
        tensors = read_projector(config.projector_from)
        check_projector(config.projector_from, tensors, {n: t.shape for n, t in projector.state_dict().items()})
        projector.load_state_dict(tensors)
    return loaded


def _plan(config: TrainConfig, data: OpenedData, flops: FlopCounter, world: World) -> Plan:
    index, num_samples = data.index, len(data.mixture)
    global_batch_size = _frozen_batch_size(config) or config.samples_per_step(world.size)
    check_world(global_batch_size, num_samples, world.size)
    if global_batch_size > num_samples and world.is_writer:
        logger.warning("a global batch of %d is more than all %d records: some repeat", global_batch_size, num_samples)
    steps = num_steps(num_samples, global_batch_size, config.num_train_epochs, config.max_steps)
    plan = Plan.of(config, data.mixture, index, flops.of_index(index), global_batch_size, steps, world.size)
    if world.size > 1 and world.is_writer:
        more = plan.mean_spread() - 1
        logger.info(
            "work per step over %d processes: the busiest has %.1f %% more than the mean", world.size, 100 * more
        )
    return plan


def _frozen_batch_size(config: TrainConfig) -> int | None:
    """Return the global batch of a run that has begun, when the recipe gives only the per-device trio.

    So a run that goes on with 2 instead of 4 processes keeps its batch.
    """
    begun = resume.begun(config.output_dir)
    if config.global_batch_size is not None or begun is None:
        return None
    return int(begun["identity"]["global_batch_size"])


def _describe(
    config: TrainConfig, loaded: LoadedModel, data: OpenedData, plan: Plan, lora: LoraOptions | None
) -> dict[str, Any]:
    """Return what identifies the run, and what a reader of its folders needs."""
    projector = loaded.model.model.multi_modal_projector if config.projector_from else None
    samples = [data.index.fingerprint, *data.mixture.draws, checksum_of_rows(data.mixture.rows)]
    return {
        "llavaforge": __version__,
        "train_type": config.train_type,
        "base_model": str(loaded.path.absolute()),
        "lora": asdict(lora) if lora is not None else None,
        "data": [entry.model_dump(mode="json", exclude_defaults=True) for entry in config.entries],
        "identity": identity(config, loaded.path, projector, samples, plan.global_batch_size),
        "config": config.model_dump(mode="json"),
    }
