"""Held-out data is as free as training data, and what is forecast is what is trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llavaforge.config.schema import DataCheckConfig, DataPreviewConfig, TrainConfig
from llavaforge.data.order.plan import Plan
from llavaforge.data.order.run_data import HeldOut, open_data
from llavaforge.data_check.check import data_check
from llavaforge.data_preview.preview import data_preview
from llavaforge.errors import UserError
from llavaforge.model.load import LoadedModel
from llavaforge.training.run import train
from train_tools import TRAIN_TYPES, train_config


@pytest.fixture
def apart(shapes: Path, tmp_path: Path) -> Path:
    """Annotations in one folder and all images in another, under names that no folder tells."""
    folder = tmp_path / "data"
    (folder / "anno").mkdir(parents=True)
    (folder / "pixels").mkdir()
    for split in ("train", "heldout"):
        rows = json.loads((shapes / split / "chat.json").read_text())[:12]
        (folder / "anno" / f"{split}.json").write_text(json.dumps(rows))
        for row in rows:
            shutil.copy(shapes / split / "images" / row["image"], folder / "pixels")
    return folder


def config_of(model: Path, apart: Path, **options: Any) -> TrainConfig:
    return train_config(
        model, apart / "anno" / "train.json", apart / "run", image_folder=apart / "pixels", max_steps=2, **options
    )


def held_out_of(config: TrainConfig, loaded: LoadedModel) -> HeldOut | None:
    return open_data(config, loaded.processor, loaded.num_image_tokens, quiet=True).held_out


def test_runs_of_all_seeds_hold_out_the_same(loaded_llava: LoadedModel, tiny_llava: Path, apart: Path) -> None:
    found = [
        held_out_of(config_of(tiny_llava, apart, validation_split=3, seed=seed), loaded_llava) for seed in (1, 2, 3)
    ]
    assert len({one.identity for one in found if one is not None}) == 1
    assert len({tuple(one.rows.tolist()) for one in found if one is not None}) == 1


def test_held_out_data_finds_its_images_in_the_image_folder(
    loaded_llava: LoadedModel, tiny_llava: Path, apart: Path
) -> None:
    config = config_of(tiny_llava, apart, eval_data_path=apart / "anno" / "heldout.json")
    held_out = held_out_of(config, loaded_llava)
    assert held_out is not None and len(held_out.rows) == 12
    found = data_check(
        DataCheckConfig(
            data_path=config.data_path, image_folder=config.image_folder, eval_data_path=config.eval_data_path
        )
    )
    assert (found["num_records"], found["num_errors"]) == (24, 0)


def test_held_out_data_with_images_of_its_own_keeps_them(
    loaded_llava: LoadedModel, tiny_llava: Path, apart: Path, shapes: Path
) -> None:
    config = config_of(tiny_llava, apart, eval_data_path=shapes / "heldout")
    held_out = held_out_of(config, loaded_llava)
    assert held_out is not None and len(held_out.rows) == 100


def test_held_out_data_is_a_list_of_data_sets_like_training_data(
    loaded_llava: LoadedModel, tiny_llava: Path, apart: Path, shapes: Path
) -> None:
    entries = [
        {"path": apart / "anno" / "heldout.json", "images": apart / "pixels", "format": "llava"},
        {"path": shapes / "heldout", "max_samples": 5},
    ]
    config = config_of(tiny_llava, apart, eval_data=entries)
    held_out = held_out_of(config, loaded_llava)
    assert held_out is not None and held_out.rows.tolist() == list(range(17))
    assert train(config)["eval_loss"] > 0
    with pytest.raises(ValueError, match="weight and repeat have no place"):
        config_of(tiny_llava, apart, eval_data=[entries[0] | {"repeat": 2}])
    with pytest.raises(ValueError, match="one of eval_data_path, eval_data and validation_split"):
        config_of(tiny_llava, apart, eval_data=entries, validation_split=0.5)
    (apart / "anno" / "heldout.json").write_text("[]")
    with pytest.raises(UserError, match="no rows"):
        held_out_of(config, loaded_llava)


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_check_and_preview_plan_what_training_plans(
    train_type: str, tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.loads((shapes / "train" / "chat.json").read_text())[:24]
    for number, row in enumerate(rows):  # lengths and images of many kinds, so that costs decide the packing
        row["conversations"][1]["value"] += " And more." * (number % 7)
        if number % 5 == 4:
            row["conversations"][0]["value"] = "What?"
            del row["image"]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    (tmp_path / "images").symlink_to(shapes / "train" / "images")
    plans: list[Plan] = []
    make = Plan.of

    def remember(*args: Any, **kwargs: Any) -> Plan:
        plans.append(make(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(Plan, "of", remember)
    config = train_config(
        tiny_llava, tmp_path, tmp_path / "run", train_type=train_type, global_batch_size=12, lora_r=16, max_steps=1,
        per_device_train_batch_size=5, max_tokens_per_batch=300,
    )  # fmt: skip
    given = config.model_dump(exclude_unset=True)
    train(config)
    for verb, schema in ((data_check, DataCheckConfig), (data_preview, DataPreviewConfig)):
        options = {key: value for key, value in given.items() if key in schema.model_fields}
        verb(schema.model_validate(options))  # type: ignore[operator]
    trained, *others = plans
    assert len(others) == 2
    for plan in others:
        assert plan.costs.tolist() == trained.costs.tolist()
        for step in range(2):
            expected = [micro.samples for micro in trained.micro_batches(step, 0)]
            assert [micro.samples for micro in plan.micro_batches(step, 0)] == expected
