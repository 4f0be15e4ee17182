"""Opening all that a stage of training works with: the model, what of it learns, the data, and their order.

Comes in: the stage's options. Goes out: an `OpenedStage`, checked, before anything is written.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from llavaforge.checkpoint.identity import describe_run
from llavaforge.checkpoint.resume import batch_size_of_begun
from llavaforge.config.schema import TrainConfig
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.load.features import ImageFeatures
from llavaforge.data.load.loader import PackDataset, loading
from llavaforge.data.load.pack import Pack
from llavaforge.data.order.plan import MicroBatch, Plan, check_world, num_steps
from llavaforge.data.order.run_data import OpenedData, open_data
from llavaforge.engine.memory import Counts
from llavaforge.errors import UserError
from llavaforge.files import real_path
from llavaforge.model.flops import FlopCounter
from llavaforge.model.load import LoadedModel, load_model
from llavaforge.model.trainable import Group, parameter_groups
from llavaforge.processes.workers import start_server
from llavaforge.processes.world import World
from llavaforge.training.fitting import fitted
from llavaforge.training.pack_memory import Sizes

logger = logging.getLogger(__name__)

_WAIT_SHARE = 0.8  # of `stuck_timeout_s`, for images: then what is done can be saved before the run is ended


@dataclass(frozen=True)
class OpenedStage:
    """What a stage of training works with; none of it is replaced any more.

    Attributes:
        config: the stage's options.
        loaded: the model to train.
        groups: what of it learns; everything else is frozen.
        counts: its parameters, counted before an engine deals them out.
        flops: counts the work of packs.
        data: what is trained on and evaluated.
        plan: the order of the samples.
        run: what is written into every `run.json`.
        features: kept ones of each index (`training/features.py`); empty when the tower runs in every step.
    """

    config: TrainConfig
    loaded: LoadedModel
    groups: Sequence[Group]
    counts: Counts
    flops: FlopCounter
    data: OpenedData
    plan: Plan
    run: dict[str, Any]
    features: tuple[ImageFeatures, ...] = ()

    def dataset(self, index: SampleIndex, masks_bad: bool) -> PackDataset:
        """Return what makes packs of an index, of kept features where there are some."""
        features = next((kept for kept in self.features if kept.index is index), None)
        ids = self.loaded.image_token_id, self.loaded.num_image_tokens
        return PackDataset(index, self.loaded.preprocessing, *ids, masks_bad=masks_bad, features=features)

    @contextmanager
    def packs(
        self, index: SampleIndex, order: Iterable[MicroBatch], pin_memory: bool, masks_bad: bool | None = None
    ) -> Iterator[Iterator[Pack]]:
        """Give an iterator over packs of an index, made by the stage's loader workers.

        Args:
            index: of the samples.
            order: what to load.
            pin_memory: for a GPU.
            masks_bad: as in `PackDataset`; None: as `on_bad_sample` says.
        """
        dataset = self.dataset(index, self.config.on_bad_sample == "skip" if masks_bad is None else masks_bad)
        timeout_s = _WAIT_SHARE * self.config.stuck_timeout_s
        with loading(dataset, order, self.config.dataloader_num_workers, pin_memory, timeout_s) as packs:
            yield packs


def open_stage(config: TrainConfig, world: World, console: Console) -> OpenedStage:
    """Open the model and the data of a stage, and plan the order; all processes call this.

    Raises:
        UserError: one of them is at fault, or they do not fit together.
    """
    world.at("loading the model")
    if config.dataloader_num_workers:
        start_server()
    loaded = world.run_on_all(lambda: load_model(config.model_name_or_path, projector_from=config.projector_from))
    groups = world.run_on_all(lambda: parameter_groups(loaded.model, config))
    if real_path(config.output_dir).is_relative_to(real_path(loaded.path)):
        world.fail(UserError(f"{config.output_dir}: lies inside the model's folder. Give an output_dir outside of it."))
    flops = FlopCounter.of(loaded.model, loaded.num_image_tokens)
    world.at("opening the data")
    quiet = not world.is_writer
    data = world.run_on_first_of_host(lambda: open_data(config, loaded.processor, loaded.num_image_tokens, quiet))
    if len(config.entries) > 1:
        console.print(data.mixture.table(config.entries, data.index.num_supervised))
    config = fitted(config, loaded, Sizes.of(data.index, data.mixture), world)
    plan = world.run_on_all(lambda: _plan(config, data, flops, world))
    run = describe_run(config, loaded, data, plan)
    return OpenedStage(config, loaded, groups, Counts.of(loaded.model), flops, data, plan, run)


def _plan(config: TrainConfig, data: OpenedData, flops: FlopCounter, world: World) -> Plan:
    index, num_samples = data.index, len(data.mixture)
    global_batch_size = batch_size_of_begun(config) or config.samples_per_step(world.size)
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
