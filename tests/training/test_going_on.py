"""What a second start of a run does: goes on, writes anew, refuses; never begins again in silence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llavaforge import folders
from llavaforge.config.schema import TrainConfig
from llavaforge.errors import UserError, as_user_error
from llavaforge.folders import read_manifest
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from train_tools import tensors_of, train_config

Config = Callable[..., TrainConfig]


@pytest.fixture
def config(tiny_llava: Path, shapes: Path, tmp_path: Path) -> Config:
    """A run of four steps with two checkpoints, in `tmp_path / "run"`."""

    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = dict(max_steps=4, save_steps=2, lr_scheduler_type="constant")
        return train_config(tiny_llava, shapes / "train", **({"output_dir": tmp_path / "run"} | values | changes))

    return make


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_equal_models(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("more", [{"max_steps": 8}, {"max_steps": 0, "num_train_epochs": 0.8}], ids=["steps", "epochs"])
def test_a_finished_run_goes_on_to_more_steps_as_if_they_had_been_asked_for_at_once(
    more: dict[str, Any], config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(config())["global_step"] == 4
    result = train(config(**more))  # 40 samples, 4 a step: 0.8 epochs are 8 steps
    assert result["global_step"] == 8
    assert "8 steps now instead of 4: from step 5 on the learning rate follows" in caplog.text
    train(config(max_steps=8, output_dir=tmp_path / "whole"))
    assert_equal_models(tmp_path / "run" / "final", tmp_path / "whole" / "final")
    assert json.loads((tmp_path / "run" / "final" / "run.json").read_text())["result"]["global_step"] == 8


def test_fewer_steps_than_were_taken_are_refused(config: Config, tmp_path: Path) -> None:
    train(config())
    before = content_of(tmp_path / "run" / "final")
    with pytest.raises(UserError, match="4 steps were taken already, more than the 3 asked for"):
        train(config(max_steps=3))
    assert content_of(tmp_path / "run" / "final") == before


def test_a_finished_run_without_checkpoints_cannot_go_on(config: Config) -> None:
    train(config(save_steps=0))
    with pytest.raises(UserError, match="trained for 4 of 8 steps, and no checkpoint is left"):
        train(config(max_steps=8))


def test_a_damaged_final_is_written_again_from_the_last_checkpoint(config: Config, tmp_path: Path) -> None:
    train(config())
    whole = content_of(tmp_path / "run" / "final")
    for number in (1, 2):  # twice: what was moved aside is in nobody's way
        flip(tmp_path / "run" / "final" / "model.safetensors")
        train(config())
        again = content_of(tmp_path / "run" / "final")
        assert [name for name in whole if name.endswith(".safetensors") and whole[name] != again[name]] == []
        aside = tmp_path / "run" / f"final.corrupt{'-2' * (number == 2)}"
        assert content_of(aside).keys() == whole.keys()


def test_what_the_user_put_into_final_is_kept_when_it_is_replaced(config: Config, tmp_path: Path) -> None:
    train(config())
    (tmp_path / "run" / "final" / "notes.txt").write_text("precious")
    train(config(max_steps=6))
    assert (tmp_path / "run" / "final.corrupt" / "notes.txt").read_text() == "precious"
    assert not folders.differences(tmp_path / "run" / "final")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_final_that_is_the_users_is_refused_before_a_step_is_taken(kind: str, config: Config, tmp_path: Path) -> None:
    train(config(max_steps=2))
    final, theirs = tmp_path / "run" / "final", tmp_path / "theirs"
    shutil.rmtree(final)
    theirs.mkdir()
    (theirs / "notes").write_text("precious")
    if kind == "folder":
        theirs.rename(final)
    elif kind == "file":
        final.write_text("precious")
    else:
        final.symlink_to(theirs)
    with pytest.raises(UserError, match="is in the way of the finished model"):
        train(config())
    assert final.read_text() == "precious" if kind == "file" else (final / "notes").read_text() == "precious"


def test_with_every_checkpoint_damaged_it_is_refused_at_every_start(config: Config, tmp_path: Path) -> None:
    train(config())
    shutil.rmtree(tmp_path / "run" / "final")
    for step in (2, 4):
        flip(tmp_path / "run" / f"checkpoint-{step}" / "state.safetensors")
    before = content_of(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no sound checkpoint is left(.|\n)*checkpoint-4: (.|\n)*checkpoint-2: "):
            train(config())
    after = content_of(tmp_path / "run")
    assert [name for name in before if before[name] != after[name]] == [".llavaforge.lock"]


def test_removed_checkpoints_are_not_begun_again_in_silence(config: Config, tmp_path: Path) -> None:
    train(config())
    for name in ("final", "checkpoint-2", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    with pytest.raises(UserError, match="no sound checkpoint is left to go on from:\n  none is there\n"):
        train(config())
    (tmp_path / "run" / "latest").unlink()
    assert train(config())["global_step"] == 4


def test_a_checkpoint_that_cannot_be_read_just_now_stays_what_it_is(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config())
    shutil.rmtree(tmp_path / "run" / "final")

    def fails(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(folders, "sha256", fails)  # the disk's fault is injected; what it leads to is tested
        train(config())
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert train(config())["global_step"] == 4


def test_a_change_that_identifies_the_run_is_taken_over_when_it_is_named(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config())
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(UserError, match=r"seed: 42 there, 7 now(.|\n)*--allow_changes seed"):
        train(config(seed=7))
    with pytest.raises(UserError, match=r"`sead` does not identify a run. Did you mean `seed`"):
        train(config(seed=7, allow_changes=["sead"]))
    assert train(config(seed=7, allow_changes=["seed"], max_steps=6))["global_step"] == 6
    assert "seed changes from 42 to 7" in caplog.text
    assert train(config(seed=7, max_steps=6))["global_step"] == 6


def test_what_learns_cannot_be_changed_by_name(config: Config, tmp_path: Path) -> None:
    train(config())
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(UserError, match="holds other parameters than learn here"):
        train(config(train_type="projector", allow_changes=["train_type"], max_steps=6))


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


CHANGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights": ("model.safetensors", flip, "base_model"),
    "config": (
        "config.json",
        lambda path: change_json(path, lambda c: c["text_config"].update(rms_norm_eps=0.5)),
        "base",
    ),
    "image mean": (
        "preprocessor_config.json",
        lambda path: change_json(path, lambda content: content.update(image_mean=[0.1, 0.1, 0.1])),
        "preprocessing",
    ),
    "tokenizer": ("tokenizer.json", lambda path: path.write_text(path.read_text() + " "), "base_model"),
    "template": (
        "chat_template.jinja",
        lambda path: path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|>the ", 1)),
        "data",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_base_model_that_changed_between_two_starts_is_noticed(
    name: str, config: Config, tiny_llava: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llava, tmp_path / "model"))
    train(config(model_name_or_path=str(model)))
    file, change, identity = CHANGES[name]
    change(model / file)
    with pytest.raises(UserError, match=f"belongs to another run, which differs in\n  {identity}"):
        train(config(model_name_or_path=str(model), max_steps=6))


def test_a_damaged_description_is_taken_from_a_checkpoint_or_refused(config: Config, tmp_path: Path) -> None:
    train(config())
    for text in ("", '{"identity": ', "[1]", '{"identity": 3}'):
        (tmp_path / "run" / "run.json").write_text(text)
        assert train(config())["global_step"] == 4
    (tmp_path / "run" / "run.json").unlink()
    assert train(config())["global_step"] == 4
    assert (tmp_path / "run" / "run.json").is_file()
    for path in (tmp_path / "run").rglob("run.json"):
        path.write_text("{")
    with pytest.raises(UserError, match=r"run.json: is damaged, and no checkpoint says what run this is"):
        train(config())


def test_a_checkpoint_that_is_none_is_refused(config: Config, tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no checkpoint. Give a run's checkpoint-N, or `auto`"):
        train(config(resume_from_checkpoint=tiny_llava))
    train(config(max_steps=4, save_steps=2))
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "checkpoint-3")
    with pytest.raises(UserError, match=r"train_state.json: cannot be read \(ValueError: it is of step 2\)"):
        train(config(resume_from_checkpoint=tmp_path / "checkpoint-3", max_steps=6))


def test_an_older_checkpoint_that_is_asked_for_sets_the_newer_ones_aside(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(save_steps=1, save_total_limit=4))
    before = {step: read_manifest(run / f"checkpoint-{step}") for step in (2, 3, 4)}
    options = dict(save_steps=1, save_total_limit=4, learning_rate=0.5, allow_changes=["learning_rate"])
    shutil.rmtree(run / "final")
    train(config(**options, resume_from_checkpoint=run / "checkpoint-2"))
    for step in (3, 4):
        assert read_manifest(run / f"checkpoint-{step}.superseded") == before[step]
        assert read_manifest(run / f"checkpoint-{step}") != before[step]
    assert read_manifest(run / "checkpoint-2") == before[2]
    assert (run / "latest").read_text() == "checkpoint-4\n"
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]
    shutil.rmtree(run / "final")
    train(config(**options, resume_from_checkpoint=run / "checkpoint-3.superseded"))
    assert read_manifest(run / "checkpoint-3.superseded") == before[3]
    assert read_manifest(run / "checkpoint-4") != read_manifest(run / "checkpoint-4.superseded-2")
    assert (run / "checkpoint-2.superseded").is_dir()  # not on the way of what was gone on from


def test_a_link_that_leads_to_itself_is_no_place_for_a_run(config: Config, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop") as caught:
        train(config(output_dir=tmp_path / "loop"))
    assert as_user_error(caught.value) is not None


def test_another_version_of_llavaforge_is_told(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config())
    change_json(tmp_path / "run" / "run.json", lambda run: run.update(llavaforge="0.0.1"))
    train(config())
    assert "was begun with llavaforge 0.0.1; this is" in caplog.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "bad_samples.jsonl"])
def test_half_a_line_in_a_list_is_left_out(name: str, config: Config, tmp_path: Path) -> None:
    train(config())
    shutil.rmtree(tmp_path / "run" / "final")
    with (tmp_path / "run" / name).open("a") as file:
        file.write('{"step": 3, "held_')
    assert train(config())["global_step"] == 4
    for line in (tmp_path / "run" / name).read_text().splitlines():
        json.loads(line)


def test_a_folder_that_holds_only_dotfiles_is_the_users_and_stays_as_it_was(config: Config, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("precious")
    with pytest.raises(UserError, match=r"not a run of llavaforge \(it holds .bashrc\)"):
        train(config(output_dir=home))
    assert [path.name for path in home.iterdir()] == [".bashrc"]


def test_old_checkpoints_with_something_of_the_users_are_kept(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config(save_total_limit=1, max_steps=2))
    (tmp_path / "run" / "checkpoint-2" / "notes.txt").write_text("precious")
    train(config(save_total_limit=1, max_steps=6))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert "is kept: it holds what llavaforge did not write (notes.txt)" in caplog.text


def test_a_model_s_folder_is_no_place_for_a_run(config: Config, tiny_llava: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llava, tmp_path / "model"))
    with pytest.raises(UserError, match="lies inside the model's folder"):
        train(config(model_name_or_path=str(model), output_dir=model / "runs"))
    assert not (model / "runs").exists()
