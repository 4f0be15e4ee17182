"""A recipe as the values of single runs: what its stages override, and what flags override in all of them.

Comes in: raw values of a YAML recipe and of flags. Goes out: raw values for each stage, or a `TrainConfig` for each.
All verbs that take a recipe expand it here.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavaforge.config.load import build
from llavaforge.config.schema import TrainConfig
from llavaforge.errors import UserError

logger = logging.getLogger(__name__)

FINAL = "final"
MERGED = "merged"
_STAGE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_TAKEN = {FINAL, MERGED}

# Where the data is can be said in two ways: who says one of them takes back the other.
_OTHER_WAY = {"data": ("data_path", "image_folder"), "data_path": ("data",)}
_OTHER_WAY |= {"eval_data": ("eval_data_path",), "eval_data_path": ("eval_data",)}


def override(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with some of them replaced, and those that the new ones contradict left out."""
    dropped = {other for key in overrides for other in _OTHER_WAY.get(key, ())}
    return {key: value for key, value in values.items() if key not in dropped} | dict(overrides)


def override_all(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's values with flags put over them and over each of its stages; says what they replace."""
    merged = override(values, flags)
    for key in values.keys() - merged.keys():
        logger.info("the flags take the place of the recipe's %s", key)
    if isinstance(stages := values.get("stages"), list):
        merged["stages"] = [_without(stage, flags) for stage in stages]
    return merged


def stage_values(values: Mapping[str, Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    """Split a recipe into its stages.

    Args:
        values: of the recipe, flags included.
        where: what to call it in messages.

    Returns:
        Name and values of each stage, in order; one without a name for a recipe without stages.

    Raises:
        UserError: `stages` is no list of mappings, or a name is missing or comes twice.
    """
    stages = values.get("stages") or []
    shared = {key: value for key, value in values.items() if key != "stages"}
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"{where}: `stages` is a list of mappings, each with a `name`.")
    names = [stage.get("name") for stage in stages]
    if any(not isinstance(name, str) or not name for name in names) or len(set(names)) != len(names):
        raise UserError(f"{where}: each stage needs a `name` of its own, found {names}.")
    for stage in stages:
        if "stages" in stage:
            raise UserError(f"{where}: stage {stage['name']!r} has `stages` of its own. List all stages in one list.")
        if not _STAGE_NAME.fullmatch(stage["name"]) or stage["name"].lower() in _TAKEN:
            raise UserError(
                f"{where}: stage {stage['name']!r:.100}: its name is that of a folder in output_dir: letters, digits, "
                f"`-`, `_` and `.`, beginning with a letter or digit, and not {' or '.join(sorted(_TAKEN))}."
            )
    if not stages:
        return [("", shared)]
    return [
        (stage["name"], override(shared, {key: value for key, value in stage.items() if key != "name"}))
        for stage in stages
    ]


def one_stage(values: Mapping[str, Any], name: str | None, where: str) -> dict[str, Any]:
    """Return the values of one stage of a recipe (the first, unless named).

    Raises:
        UserError: there is no stage of that name.
    """
    stages = dict(stage_values(values, where))
    chosen = next(iter(stages)) if name is None else name
    if chosen not in stages:
        raise UserError(f"{where}: no stage {name!r}. Its stages: {', '.join(filter(None, stages)) or 'none'}.")
    if chosen:
        logger.info("stage %s of %s", chosen, where)
    return stages[chosen]


def check_own_model(values: Mapping[str, Any], flags: Mapping[str, Any], where: str) -> None:
    """Check that the stage that is chosen names the model it begins with, where `train` would take the one before's.

    Args:
        values: of the recipe, without the flags.
        flags: `stage` among them.
        where: what to call the recipe in messages.

    Raises:
        UserError: it does not.
    """
    chosen, stages = flags.get("stage", values.get("stage")), values.get("stages") or []
    names = [name for name, _ in stage_values(values, where)]
    if chosen in names[1:] and "model_name_or_path" not in flags.keys() | stages[names.index(chosen)].keys():
        raise UserError(
            f"{where}: stage {chosen!r} goes on from what {names[names.index(chosen) - 1]!r} leaves. Train that, and "
            "name its model with --model_name_or_path (its `final`, or after a LoRA its `merged`)."
        )


def training_stages(config: TrainConfig) -> list[TrainConfig]:
    """Return the runs of a training: `output_dir/<name>` each, each starting from the model that the one before leaves.

    Raises:
        UserError: an unknown key in a stage, a missing or repeated name.
    """
    if not config.stages:
        return [config]
    runs: list[TrainConfig] = []
    given = config.model_dump(exclude_unset=True)
    for (name, values), stage in zip(stage_values(given, "recipe"), config.stages, strict=True):
        if runs and "model_name_or_path" not in stage:
            values["model_name_or_path"] = str(result_of(runs[-1]))
        if "output_dir" not in stage:
            values["output_dir"] = config.output_dir / name
        runs.append(build(TrainConfig, values, f"stages[{len(runs)}] ({name})"))
    return runs


def result_of(config: TrainConfig) -> Path:
    """Return the folder of the plain model that a run leaves: `final`, or for LoRA the merged one."""
    return config.output_dir / (MERGED if config.uses_lora else FINAL)


def _without(stage: Any, flags: Mapping[str, Any]) -> Any:
    """Return a stage without the keys that a flag sets or contradicts."""
    if not isinstance(stage, dict):
        return stage
    kept = {key: value for key, value in override(stage, flags).items() if key not in flags}
    for key in stage.keys() - kept.keys():
        logger.info("the flags override %s = %r of stage %s", key, stage[key], stage.get("name"))
    return kept
