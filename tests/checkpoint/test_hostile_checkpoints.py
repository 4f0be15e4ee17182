"""Runs whose files are damaged: nothing of it is trained on in silence, and whatever is refused is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llavaforge.checkpoint.trained import open_model
from llavaforge.cli import main
from llavaforge.config.schema import TrainConfig
from llavaforge.errors import UserError
from llavaforge.folders import write_manifest
from llavaforge.training.run import train
from mutations import draw_damaged
from train_tools import arguments_of, tensors_of, train_config

FILES = ("train_state.json", "run.json", "manifest.json", "state.safetensors")
whole: dict[str, torch.Tensor] = {}


def config_of(tiny_llava: Path, shapes: Path, output_dir: Path) -> TrainConfig:
    return train_config(
        tiny_llava, shapes / "train", output_dir, train_type="projector", max_steps=4, save_steps=1, save_total_limit=2
    )


@pytest.fixture(scope="module")
def stopped(tiny_llava: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints 3 and 4 whose `final` is not there yet."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(config_of(tiny_llava, shapes, folder))
    whole.update(tensors_of(folder / "final"))
    shutil.rmtree(folder / "final")
    return folder


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_happened_to_the_files_of_a_run_it_ends_with_the_same_weights_or_is_refused(
    stopped: Path, tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    data: st.DataObject,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(stopped, run, symlinks=True)
    names = data.draw(st.lists(st.sampled_from([*FILES, "3/manifest.json", "../run.json", "../latest"]), min_size=1))
    for name in set(names):
        path = run / "checkpoint-3" / name[2:] if name.startswith("3/") else run / "checkpoint-4" / name
        path.write_bytes(draw_damaged(data, path.read_bytes(), path.suffix == ".json"))
    code = main(arguments_of(config_of(tiny_llava, shapes, run)))
    told = capsys.readouterr().err
    assert code in (0, 2) and "Traceback" not in told, told[-2000:]
    if code == 0:
        found = tensors_of(run / "final")
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from([name for name in FILES if name != "manifest.json"]))
def test_a_checkpoint_that_something_else_wrote_is_opened_or_refused_by_name(
    stopped: Path, tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    data: st.DataObject, name: str,
) -> None:  # fmt: skip
    """As above, but the manifest speaks for the damaged file: only its own reader can refuse it."""
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(stopped, run, symlinks=True)
    path = run / "checkpoint-4" / name
    path.write_bytes(draw_damaged(data, path.read_bytes(), path.suffix == ".json"))
    write_manifest(path.parent, {})
    code = main(arguments_of(config_of(tiny_llava, shapes, run)))
    told = capsys.readouterr().err
    assert code in (0, 2) and "Traceback" not in told, told[-2000:]
    assert code == 0 or str(run) in told, told
    try:
        open_model(str(path.parent))
    except UserError as error:
        assert str(path.parent) in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"r": "4", "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj"]}}, "lora.r: Input should be"),
        ({"train_type": "use_lora"}, "train_type use_lora and lora do not go together"),
        ({"base_model": 5}, "base_model: Input should be a valid string, found 5"),
        ({"num_steps": ""}, "num_steps: Input should be a valid integer"),
    ],
)
def test_what_a_run_says_of_itself_is_read_strictly_and_told_in_a_line(
    change: dict[str, object], message: str, stopped: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stopped / "checkpoint-4", tmp_path / "checkpoint-4"))
    (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | change))
    write_manifest(folder, {})
    with pytest.raises(UserError, match=rf"run.json: cannot be read \({message}") as caught:
        open_model(str(folder))
    assert "pydantic" not in str(caught.value)
