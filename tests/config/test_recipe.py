"""Every verb that takes a recipe reads the same stages out of it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llavaforge.cli import parse
from llavaforge.config.recipe import one_stage, override_all, stage_values, training_stages
from llavaforge.config.schema import DataCheckConfig, DataPreviewConfig, SlurmConfig, TrainConfig
from llavaforge.errors import UserError
from llavaforge.sbatch import slurm

RECIPE: dict[str, Any] = {
    "model_name_or_path": "model",
    "data_path": "captions",
    "image_folder": "images",
    "eval_data_path": "held-out",
    "output_dir": "run",
    "global_batch_size": 8,
    "stages": [
        {"name": "one", "train_type": "projector", "lora_r": 3},
        {"name": "two", "train_type": "use_lora", "data": [{"path": "a"}, {"path": "b", "images": "c"}]},
        {"name": "three", "train_type": "full", "data_path": "d", "eval_data": [{"path": "e"}]},
    ],
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def paths(config: TrainConfig | DataCheckConfig | DataPreviewConfig) -> tuple[list[str], list[str], list[str | None]]:
    return (
        [str(entry.path) for entry in config.entries],
        [str(entry.path) for entry in config.eval_entries],
        [str(entry.images) if entry.images else None for entry in config.entries],
    )


EXPECTED = {
    "one": (["captions"], ["held-out"], ["images"]),
    "two": (["a", "b"], ["held-out"], [None, "c"]),
    "three": (["d"], ["e"], ["images"]),
}


def test_train_and_the_data_verbs_read_the_same_data_out_of_each_stage(recipe: Path) -> None:
    config = parse("train", [str(recipe)])
    assert isinstance(config, TrainConfig)
    stages = {stage.output_dir.name: stage for stage in training_stages(config)}
    assert {name: paths(stage) for name, stage in stages.items()} == EXPECTED
    for verb in ("data check", "data preview"):
        for name, stage in stages.items():
            found = parse(verb, [str(recipe), "--stage", name])
            assert isinstance(found, DataCheckConfig | DataPreviewConfig)
            assert paths(found) == EXPECTED[name]
            for field in ("train_type", "lora_r", "max_samples_per_batch"):  # what packing depends on
                assert getattr(found, field) == getattr(stage, field)


def test_slurm_takes_what_train_takes(recipe: Path, tmp_path: Path) -> None:
    assert slurm(SlurmConfig(recipe=recipe, output=tmp_path / "job.sh", gpus_per_node=2))["processes"] == 2
    with pytest.raises(UserError, match=r"stages\[0\] \(one\): global_batch_size 8 does not divide over 1 x 3"):
        slurm(SlurmConfig(recipe=recipe, output=tmp_path / "other.sh", gpus_per_node=3))


def test_stages_are_chained_unless_they_name_a_model(recipe: Path) -> None:
    config = parse("train", [str(recipe)])
    assert isinstance(config, TrainConfig)
    one, two, three = training_stages(config)
    assert one.model_name_or_path == "model" and two.model_name_or_path == "run/one/final"
    assert three.model_name_or_path == "run/two/merged"  # after a LoRA
    own = config.model_copy(update={"stages": [*config.stages[:2], config.stages[2] | {"model_name_or_path": "m"}]})
    assert training_stages(own)[2].model_name_or_path == "m"


@pytest.mark.parametrize("verb", ["train", "data check", "data preview"])
def test_a_flag_for_the_data_wins_over_every_way_of_every_stage(verb: str, recipe: Path) -> None:
    config = parse(verb, [str(recipe), "--data_path", "mine", "--eval_data_path", "other"])
    stages = training_stages(config) if isinstance(config, TrainConfig) else [config]
    for stage in stages:
        assert [str(entry.path) for entry in stage.entries] == ["mine"]  # type: ignore[attr-defined]
        assert [str(entry.path) for entry in stage.eval_entries] == ["other"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "stages", [{"name": "one"}, ["one"], [{"lora_r": 3}], [{"name": ""}], [{"name": "a"}, {"name": "a"}], [{"name": 3}]]
)
def test_stages_that_are_none_are_refused_by_all(stages: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "stages": stages}))

    def train() -> None:
        config = parse("train", [str(recipe)])
        assert isinstance(config, TrainConfig)
        training_stages(config)

    for act in (train, lambda: parse("data check", [str(recipe)]), lambda: slurm(SlurmConfig(recipe=recipe))):
        with pytest.raises(UserError, match=r"stages|stage needs"):
            act()


def test_nothing_is_changed_in_place() -> None:
    before = yaml.safe_dump(RECIPE)
    override_all(RECIPE, {"lora_r": 1, "data_path": "x"})
    stage_values(RECIPE, "recipe")
    one_stage(RECIPE, "two", "recipe")
    assert yaml.safe_dump(RECIPE) == before
    with pytest.raises(UserError, match=r"no stage 'four'\. Its stages: one, two, three"):
        one_stage(RECIPE, "four", "recipe")
