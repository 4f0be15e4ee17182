"""A run is told from another by what its result depends on, and goes on after options were added."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llavaforge.checkpoint.identity import check_same_run
from llavaforge.checkpoint.trained import open_model, read_trained
from llavaforge.cli import parse
from llavaforge.config.schema import EvaluateConfig, ExportConfig, TrainConfig, identifying
from llavaforge.errors import UserError
from llavaforge.inference.evaluate import evaluate
from llavaforge.inference.export import export
from llavaforge.model.lora import adapter_tensors
from llavaforge.training.run import train
from train_tools import train_config

OLD_RUN = Path(__file__).parent.parent / "fixtures" / "run-0.1.0"
"""A run that llavaforge 0.1.0 of 2026-11-25 began: six steps of `recipe.yaml`, stopped after the fourth."""


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(OLD_RUN, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_an_older_run_goes_on_although_options_were_added(old_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = parse("train", ["recipe.yaml", "--allow_changes", "data"])  # since then records are prepared otherwise
    assert isinstance(config, TrainConfig)
    assert train(config)["global_step"] == 6
    assert "going on from run/checkpoint-4" in caplog.text
    found, expected = load_file("run/final/adapter_model.safetensors"), load_file("adapter_after_6_steps.safetensors")
    assert found.keys() == expected.keys()
    trained = read_trained(old_run / "run" / "checkpoint-4", base_model=old_run / "model")
    assert trained is not None
    start = adapter_tensors(trained.tensors)
    for name in expected:  # not equal: some questions had their image at the end then
        difference, moved = (found[name] - expected[name]).norm(), (expected[name] - start[name]).norm()
        assert difference < 0.8 * moved, (name, difference, moved)


def test_a_checkpoint_of_an_older_run_is_read(old_run: Path) -> None:
    trained = read_trained(old_run / "run" / "checkpoint-4", base_model=old_run / "model")
    assert trained is not None and trained.lora is not None
    assert (trained.lora.r, trained.lora.alpha, trained.lora.target_modules[:2]) == (2, 4, ("q_proj", "k_proj"))


def identity(**changes: Any) -> dict[str, Any]:
    return {**identifying(), "base_model": "b", "data": [1], **changes}


def test_an_option_that_an_older_run_lacks_had_its_default() -> None:
    old = identity()
    del old["adam_beta2"]
    check_same_run(Path("run"), old, identity())
    with pytest.raises(UserError, match=r"adam_beta2: 0.999 there, 0.9 now"):
        check_same_run(Path("run"), old, identity(adam_beta2=0.9))


def test_what_only_an_older_run_knows_does_not_stop_it_and_what_both_know_does() -> None:
    check_same_run(Path("run"), identity(an_option_that_is_gone=3), identity())
    for name, value in (("seed", 3), ("base_model", "other"), ("data", [2]), ("learning_rate", 1.0)):
        with pytest.raises(UserError, match=rf"belongs to another run.*\n  {name}: "):
            check_same_run(Path("run"), identity(), identity(**{name: value}))


def test_options_that_say_how_a_run_is_carried_out_do_not_identify_it() -> None:
    for name in ("output_dir", "save_steps", "dataloader_num_workers", "deepspeed", "stuck_timeout_s", "max_steps"):
        assert name not in identifying()
    for name in ("seed", "train_type", "learning_rate", "lora_r", "max_length", "prompt_style"):
        assert name in identifying()


def test_a_lora_run_with_warmup_steps_can_be_opened_exported_and_trained_on(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    """Nothing reads the command line's schema back: both ways of a warm-up in one dump would be refused there."""
    values = train_config(tiny_llava, shapes / "train", tmp_path / "run", train_type="use_lora", save_steps=5)
    given = values.model_dump(exclude_unset=True, exclude={"warmup_ratio"})
    config = TrainConfig.model_validate({**given, "warmup_steps": 1})
    train(config)
    for name in ("checkpoint-5", "final"):
        open_model(str(tmp_path / "run" / name))
        export(ExportConfig(checkpoint=tmp_path / "run" / name, output_dir=tmp_path / name))
    found = evaluate(
        EvaluateConfig(
            model_name_or_path=str(tmp_path / "run" / "final"), data_path=shapes / "heldout", max_samples=4,
            dataloader_num_workers=0,
        )
    )  # fmt: skip
    assert found["num_samples"] == 4
