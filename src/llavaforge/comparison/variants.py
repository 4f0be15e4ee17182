"""What is compared: each variant as a training recipe, with what it learns, costs and reads.

Comes in: the comparison's options. Goes out: a `Variant` each. All are opened before the first is trained, so whatever
is wrong with one of them is told within seconds.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llavaforge.answers.metrics import METRICS, chosen
from llavaforge.checkpoint.identity import describe_run
from llavaforge.config.load import build
from llavaforge.config.recipe import override
from llavaforge.config.schema import OF_COMPARISON, OF_HELD_OUT, CompareConfig, EvaluateConfig, TrainConfig
from llavaforge.config.train_types import TRAIN_TYPES
from llavaforge.data.index.records import records_of_rows
from llavaforge.data.load.loader import PackDataset
from llavaforge.data.order.plan import Plan
from llavaforge.data.order.run_data import HeldOut, open_data
from llavaforge.data.rows.records import Record
from llavaforge.device import compute_dtype, pick_device, total_memory
from llavaforge.engine.memory import Counts, engine_memory, stage_of
from llavaforge.engine.zero_config import settings_of_run
from llavaforge.errors import UserError
from llavaforge.files import to_json
from llavaforge.inference.evaluate import references_of
from llavaforge.model.flops import FlopCounter
from llavaforge.model.load import load_without_weights
from llavaforge.model.trainable import learning_rate, set_trainable

logger = logging.getLogger(__name__)

_RATES = ("learning_rate", "projector_learning_rate", "vision_learning_rate")
_ONLY_OURS = CompareConfig.model_fields.keys() - TrainConfig.model_fields.keys()
# They change what a run costs, not what comes of it; and a comparison is of both.
_OF_COST = (
    "compile", "deterministic", "gradient_checkpointing", "per_device_train_batch_size", "max_tokens_per_batch",
    "deepspeed", "cache_vision_features", "eval_steps",
)  # fmt: skip
_ON_THE_WAY = ("eval_generate_samples", "eval_metrics", "eval_max_new_tokens")


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to train.

    Attributes:
        name: as the recipe calls it.
        overrides: what it changes of the recipe.
        values: its whole recipe, but for what each run gets (seed, folder, length).
        batch_size: samples per step.
        learning: number of parameters that learn, by part.
        rates: their peak learning rates, by part.
        num_parameters: of the whole model.
        flops_per_sample: model FLOPs of the mean sample in training.
        memory_bytes: what the weights and the optimizer take, without activations.
        held_out: the records that it is measured on.
        dataset: of these, as its model sees them.
        identity: all that its results depend on, but for the seed, as JSON.
    """

    name: str
    overrides: dict[str, Any]
    values: dict[str, Any]
    batch_size: int
    learning: dict[str, int]
    rates: dict[str, float]
    num_parameters: int
    flops_per_sample: float
    memory_bytes: float
    held_out: HeldOut
    dataset: PackDataset
    identity: dict[str, Any]

    @property
    def num_learning(self) -> int:
        """Number of parameters that learn."""
        return sum(self.learning.values())


def open_variants(config: CompareConfig) -> tuple[list[Variant], dict[str, str]]:
    """Open all variants.

    Returns:
        The variants, and why others of the four train types are left out, by name.

    Raises:
        UserError: a variant, the model or the data is at fault.
    """
    left_out: dict[str, str] = {}
    if config.variants is not None:
        variants = [_open(config, name, overrides) for name, overrides in config.variants.items()]
        _check_same_records(variants)
        return variants, left_out
    budget, variants = total_memory(pick_device()), []
    for name, overrides in _train_types(config).items():
        variant = _open(config, name, overrides)
        if variant.memory_bytes > budget:
            needed = f"{variant.memory_bytes / 1e9:.1f} GB for weights and optimizer"
            left_out[name] = f"{needed}, and the device has {budget / 1e9:.1f} GB"
            logger.warning("%s is left out: it takes %s", name, left_out[name])
        else:
            variants.append(variant)
    if len(variants) < 2:
        raise UserError("compare: fewer than two train types fit this device. Name other `variants` in the recipe.")
    return variants, left_out


def _check_same_records(variants: Sequence[Variant]) -> None:
    """Check that all variants hold out the same records.

    Raises:
        UserError: one holds out others.
    """
    for variant in variants[1:]:
        if variant.held_out.records != variants[0].held_out.records:
            raise UserError(
                f"variants, {variant.name}: its data, quarantine or max_length makes it hold out other records than "
                f"{variants[0].name} does, so their losses could not be compared. Give the held-out records as "
                "eval_data_path, and let none of them be faulty."
            )


def _train_types(config: CompareConfig) -> dict[str, dict[str, Any]]:
    """Return the train types as variants: the recipe's rates are its own train type's, the others have the defaults."""
    variants: dict[str, dict[str, Any]] = {}
    for name, what in TRAIN_TYPES.items():
        variants[name] = {"train_type": name}
        if name != config.train_type:
            variants[name] |= dict.fromkeys(set(_RATES) & config.model_fields_set)
        if "vision_tower" in what.parts and config.cache_vision_features != "off":
            variants[name]["cache_vision_features"] = "off"
    return variants


def _open(config: CompareConfig, name: str, overrides: Mapping[str, Any]) -> Variant:
    where = f"variants, {name}"
    base = {
        key: value
        for key, value in config.model_dump(mode="json", exclude_unset=True).items()
        if key not in _ONLY_OURS | OF_COMPARISON.keys()
    }
    values = (
        override(base, overrides)
        | _held_out(config)
        | {
            "logging_steps": 1,  # the curves' times are sums over steps
            "save_total_limit": values_or(base, overrides, "save_total_limit", config.save_total_limit),
        }
    )
    if config.budget_minutes is not None and values_or(base, overrides, "compile", "auto") == "auto":
        values["compile"] = False  # `auto` would leave the short rehearsal uncompiled and the run not
    train = build(TrainConfig, {**values, "output_dir": config.output_dir, "seed": config.seeds[0]}, where)
    loaded = load_without_weights(train.model_name_or_path)
    learning = set_trainable(loaded.model, train)
    data = open_data(train, loaded.processor, loaded.num_image_tokens, quiet=True)
    assert data.held_out is not None
    index = data.held_out.index
    costs = FlopCounter.of(loaded.model, loaded.num_image_tokens).of_index(data.index)
    batch_size, counts = train.samples_per_step(), Counts.of(loaded.model)
    memory = engine_memory("plain", counts, 1, compute_dtype(train.bf16).itemsize, train.optim == "adamw_8bit")
    values |= _on_the_way(config, values, train, records_of_rows(index, data.held_out.rows))
    plan = Plan.of(train, data.mixture, data.index, costs, batch_size, num_steps=1)
    run = describe_run(train.model_copy(update={"projector_from": None}), loaded, data, plan)
    identity = {key: value for key, value in run["identity"].items() if key != "seed"}
    identity |= {key: run["config"][key] for key in _OF_COST} | {"projector_from": train.projector_from}
    identity |= {key: values.get(key) for key in _ON_THE_WAY}
    identity |= {"held-out data": index.fingerprint, "held-out records": data.held_out.records}
    identity |= {"metrics": config.metrics, "max_new_tokens": config.max_new_tokens}
    identity |= budget_of(config)
    return Variant(
        name=name,
        overrides=dict(overrides),
        values=values,
        batch_size=batch_size,
        learning={part: sum(one.numel() for one in those.values()) for part, those in learning.items()},
        rates={part: learning_rate(train, part) for part in learning},
        num_parameters=counts.total,
        flops_per_sample=float(costs[data.mixture.all_rows].mean()),
        memory_bytes=memory.total,
        held_out=data.held_out,
        dataset=PackDataset(index, loaded.preprocessing, loaded.image_token_id, loaded.num_image_tokens),
        identity=json.loads(to_json(identity)),
    )


def values_or(base: Mapping[str, Any], overrides: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return an option of a variant, or a default of ours where neither it nor the recipe names it."""
    return overrides.get(key, base.get(key, default))


def budget_of(config: CompareConfig) -> dict[str, float]:
    """Return the one budget that is given, by name."""
    budgets = {name: getattr(config, name) for name in ("budget_samples", "budget_minutes", "budget_flops")}
    return {name: value for name, value in budgets.items() if value is not None}


def evaluate_options(config: CompareConfig, values: Mapping[str, Any], model: str) -> EvaluateConfig:
    """Return how a model of a variant is measured.

    Args:
        config: of the comparison.
        values: the variant's recipe.
        model: its folder.
    """
    names = EvaluateConfig.model_fields.keys() - OF_HELD_OUT
    own = {
        "model_name_or_path": model,
        "held_out": True,
        "max_new_tokens": config.max_new_tokens,
        "metrics": config.metrics,
    }
    return build(EvaluateConfig, {name: values[name] for name in names & values.keys()} | own, "compare")


def _on_the_way(
    config: CompareConfig, values: Mapping[str, Any], train: TrainConfig, held_out: Sequence[Record]
) -> dict[str, Any]:
    """Return what a run measures of answers as it goes: the first metric that suits, unless the recipe says more.

    Raises:
        UserError: a metric does not suit the held-out records.
    """
    if "none" in config.metrics:
        return {"eval_generate_samples": 0}
    references = [references_of(record) for record in held_out]
    metrics = [name for name in chosen(config.metrics, references) if METRICS[name].of == "answer"][:1]
    metrics = values.get("eval_metrics", metrics)
    settings = settings_of_run(train, train.samples_per_step(), 1)
    is_whole = settings is None or stage_of(settings) < 3  # the model, of which ZeRO-3 leaves no process all
    num_asked = config.eval_generate_samples if metrics and is_whole else 0
    return {
        "eval_generate_samples": values.get("eval_generate_samples", num_asked),
        "eval_metrics": metrics or ["none"],
        "eval_max_new_tokens": values.get("eval_max_new_tokens", config.max_new_tokens),
    }


def _held_out(config: CompareConfig) -> dict[str, Any]:
    """Return what of a recipe says which records are held out: the same ones for all variants and seeds."""
    if config.validation_split:
        return {"validation_split": config.validation_split}
    entries = config.eval_entries
    if config.max_eval_samples is not None:
        bounds = [bound for bound in (entries[0].max_samples, config.max_eval_samples) if bound is not None]
        entries = [entries[0].model_copy(update={"max_samples": min(bounds)})]
    return {"eval_data": [entry.model_dump(mode="json", exclude_defaults=True) for entry in entries]}
