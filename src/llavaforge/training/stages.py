"""A recipe with `stages:` as a list of single runs, each starting from what the one before left.

Comes in: a `TrainConfig` with stages. Goes out: one `TrainConfig` per stage, in order.
"""

import logging
from pathlib import Path
from typing import Any

from llavaforge.checkpoint.trained import merge, read_trained
from llavaforge.config.load import build
from llavaforge.config.schema import TrainConfig
from llavaforge.errors import UserError

logger = logging.getLogger(__name__)

FINAL = "final"
MERGED = "merged"


def expand(config: TrainConfig) -> list[TrainConfig]:
    """Return the stages of a run: `output_dir/<name>` each, the model of each being the one before's result.

    A stage that follows a LoRA stage starts from the merged model.

    Raises:
        UserError: an unknown key in a stage, a missing or repeated name.
    """
    if not config.stages:
        return [config]
    shared = config.model_dump(exclude={"stages"}, exclude_unset=True)
    names = [stage.get("name") for stage in config.stages]
    if any(not isinstance(name, str) or not name for name in names) or len(set(names)) != len(names):
        raise UserError(f"stages: each stage needs a `name` of its own, found {names}.")
    stages: list[TrainConfig] = []
    for number, stage in enumerate(config.stages):
        name = str(stage["name"])
        overrides = {key: value for key, value in stage.items() if key != "name"}
        if stages:
            overrides.setdefault("model_name_or_path", str(result_of(stages[-1])))
        theirs = {key: value for key, value in shared.items() if not _replaces(overrides, key)}
        values = {**theirs, "output_dir": config.output_dir / name, **overrides}
        stages.append(build(TrainConfig, values, f"stages[{number}] ({name})"))
    return stages


def _replaces(overrides: dict[str, Any], key: str) -> bool:
    """Say whether a stage gives its data in the other of the two ways."""
    return (key == "data" and "data_path" in overrides) or (key == "data_path" and "data" in overrides)


def result_of(config: TrainConfig) -> Path:
    """Return the folder of the plain model that a run leaves: `final`, or for LoRA the merged one."""
    return config.output_dir / (MERGED if config.train_type == "use_lora" else FINAL)


def leave_result(stage: TrainConfig, output_dir: Path) -> None:
    """After a stage: merge a LoRA for the stage that follows, and point `output_dir/final` to the newest result."""
    if stage.train_type == "use_lora" and not (stage.output_dir / MERGED).is_dir():
        trained = read_trained(stage.output_dir / FINAL)
        assert trained is not None
        merge(stage.output_dir / MERGED, trained)
        logger.info("%s: LoRA merged into %s", stage.output_dir.name, stage.output_dir / MERGED)
    pointer = output_dir / FINAL
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(Path(stage.output_dir.name) / FINAL, target_is_directory=True)
