"""Making a run fit its device: how many tokens a micro-batch holds and how many layers are recomputed, before step 1.

Comes in: options of which some say `auto`. Goes out: the same with numbers. The global batch, and so what is learnt,
stays as it is. Total memory counts, not what is free now, so that every start of a run decides alike.
"""

import logging

from llavaforge.config.schema import TrainConfig
from llavaforge.device import compute_dtype, total_memory
from llavaforge.engine.memory import Counts, engine_memory, engine_name
from llavaforge.engine.zero_config import settings_of_run
from llavaforge.errors import reason
from llavaforge.model.activations import Activations
from llavaforge.model.load import LoadedModel
from llavaforge.model.memory import activations
from llavaforge.processes.world import World
from llavaforge.training.pack_memory import FEW_TOKENS, USABLE_SHARE, Sizes, decide

logger = logging.getLogger(__name__)


def fitted(config: TrainConfig, loaded: LoadedModel, sizes: Sizes, world: World) -> TrainConfig:
    """Return the options with max_tokens_per_batch and gradient_checkpointing decided; all processes call it.

    On a CPU nothing is recomputed unasked: its memory is the host's, and compiled layers gain more there.
    """
    if "auto" not in (config.gradient_checkpointing, config.max_tokens_per_batch):
        return config
    if world.device.type == "cpu":
        tokens = max(FEW_TOKENS, sizes.longest) if config.max_tokens_per_batch == "auto" else config.most_tokens
        return _decided(config, tokens, config.recompute_every)
    kept, budget = world.run_on_all(lambda: _kept_and_budget(config, loaded, world))
    if kept is None:
        return _decided(config, sizes.longest if config.max_tokens_per_batch == "auto" else config.most_tokens, 1)
    budget = -world.all_reduce_max([-budget])[0]  # of the smallest device: all do the same
    tokens, recompute = decide(config, kept, budget, sizes)
    needed = sizes.bytes(kept, tokens or sizes.largest_pack(config.max_samples_per_batch), recompute)
    if world.is_writer:
        level = logging.INFO if needed <= budget else logging.WARNING
        layers = {0: "no layer", 1: "every layer"}.get(recompute, f"one of {recompute} layers")
        told = "memory: the largest micro-batch takes an estimated %.1f GB of %.1f GB; %s is recomputed%s%s"
        bound = f", max_tokens_per_batch is {tokens}" if config.max_tokens_per_batch == "auto" else ""
        tight = "" if needed <= budget else ". It may not fit: see `Memory` in docs/training.md"
        logger.log(level, told, needed / 1e9, budget / 1e9, layers, bound, tight)
    return _decided(config, tokens, recompute)


def _kept_and_budget(config: TrainConfig, loaded: LoadedModel, world: World) -> tuple[Activations | None, float]:
    """Return what a token takes and what is there for it; nothing of a model whose shapes alone do not compute."""
    dtype, settings = compute_dtype(config.bf16), settings_of_run(config, None, world.size)
    counts, in_8_bits = Counts.of(loaded.model), config.optim == "adamw_8bit"
    weights = engine_memory(engine_name(settings), counts, world.size, dtype.itemsize, in_8_bits).total
    budget = USABLE_SHARE * total_memory(world.device) - weights
    try:
        return activations(loaded.model.config, config, loaded.preprocessing, dtype), budget
    except (NotImplementedError, RuntimeError) as error:  # an operation that torch does not know on `meta`
        told = "memory is not forecast for this model (%s), so every layer is recomputed: see gradient_checkpointing"
        logger.warning(told, reason(error))
        return None, budget


def _decided(config: TrainConfig, tokens: int | None, recompute: int) -> TrainConfig:
    return config.model_copy(update={"max_tokens_per_batch": tokens, "gradient_checkpointing": recompute})
