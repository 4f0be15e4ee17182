"""`on_bad_sample: skip` leaves out exactly what cannot be read: counted, listed, bounded, never replaced."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llavaforge.cli import main
from llavaforge.data.load.loader import PackDataset
from llavaforge.data.order.plan import MicroBatch
from llavaforge.errors import UserError
from llavaforge.model.load import load_model
from llavaforge.model.step import StepModule
from llavaforge.training.bad_samples import BAD_SAMPLES
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from train_tools import open_packs, tensors_of, train_config


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """A private copy of the training data, 40 records."""
    return Path(shutil.copytree(shapes / "train", tmp_path / "data"))


def rows_of(data: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((data / "chat.json").read_text())
    return rows


def spoil_image(data: Path, number: int) -> None:
    (data / "images" / rows_of(data)[number]["image"]).write_bytes(b"<html>not found</html>")


def listed(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / BAD_SAMPLES).read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_is_left_out_of_the_loss_counted_and_listed(
    num_workers: int, tiny_llava: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil_image(data, 3)
    spoil_image(data, 17)
    config = train_config(
        tiny_llava, data, tmp_path / "run", on_bad_sample="skip", max_steps=10, dataloader_num_workers=num_workers
    )
    result = train(config)
    assert result["global_step"] == 10 and result["num_bad_samples"] == 2
    bad = listed(tmp_path / "run")
    assert sorted(line["row"] for line in bad) == [3, 17] and {line["kind"] for line in bad} == {"not_an_image"}
    assert "left out 2 bad records" in caplog.text and "chat.json row 3" in caplog.text
    sound = train_config(tiny_llava, data, tmp_path / "sound", max_steps=10)
    with pytest.raises(UserError, match="cannot be decoded"):
        train(sound)
    index, _ = open_packs(load_model(str(tiny_llava)), config)
    by_step = {line["step"]: line["row"] for line in bad}
    for line in read_metrics(tmp_path / "run"):
        if line["step"] in by_step:
            lost = int(index.num_supervised[by_step[line["step"]]])
            assert line["num_supervised"] + lost == index.num_supervised[_batch(config, index, line["step"])].sum()


def _batch(config: Any, index: Any, step: int) -> Any:
    order = np.random.default_rng([config.seed, 0]).permutation(len(index))
    return order[4 * (step - 1) : 4 * step]


def test_a_muted_sample_gives_no_loss_and_no_gradient(tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    loaded = load_model(str(tiny_llava))
    index, sound = open_packs(loaded, train_config(tiny_llava, data, tmp_path / "run"))
    muting = PackDataset(index, loaded.preprocessing, loaded.image_token_id, loaded.num_image_tokens, masks_bad=True)
    module = StepModule(loaded.model, loaded.preprocessing)

    def gradients(pack: Any) -> tuple[float, dict[str, torch.Tensor]]:
        loaded.model.zero_grad()
        loss = module(pack)
        loss.backward()
        found = {name: p.grad.clone() for name, p in loaded.model.named_parameters() if p.grad is not None}
        return loss.item(), found

    source = MicroBatch(0, (5, 6, 7), True, 0)
    loss, wanted = gradients(sound[MicroBatch(0, (5, 7), True, 0)])
    spoil_image(data, 6)
    pack = muting[source]
    assert [one.number for one in pack.bad] == [6] and pack.bad[0].num_supervised == index.num_supervised[6]
    muted_loss, found = gradients(pack)
    assert muted_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_more_than_the_bound_stops_with_what_is_done_saved(tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    for number in range(0, 40, 6):
        spoil_image(data, number)
    config = train_config(tiny_llava, data, tmp_path / "run", on_bad_sample="skip", max_bad_samples=2, max_steps=10)
    with pytest.raises(UserError, match=r"over max_bad_samples 2.*(.|\n)*saved in") as caught:
        train(config)
    assert "not an image" in str(caught.value).lower() or "HTML page" in str(caught.value)
    assert len(listed(tmp_path / "run")) <= 2


def test_a_step_of_bad_samples_only_stops(tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    for number in range(40):
        spoil_image(data, number)
    config = train_config(tiny_llava, data, tmp_path / "run", on_bad_sample="skip", max_steps=10)
    with pytest.raises(UserError, match="not one of its samples can be read"):
        train(config)


def test_a_resumed_run_keeps_the_list_and_ends_as_the_uninterrupted_one(
    tiny_llava: Path, data: Path, tmp_path: Path
) -> None:
    for number in (1, 11, 21, 31):
        spoil_image(data, number)
    options: dict[str, Any] = {"on_bad_sample": "skip", "max_steps": 12, "save_steps": 5}
    whole = train(train_config(tiny_llava, data, tmp_path / "whole", **options))
    train(train_config(tiny_llava, data, tmp_path / "parts", **options))
    shutil.rmtree(tmp_path / "parts" / "final")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-12")
    (tmp_path / "parts" / "latest").unlink(missing_ok=True)
    result = train(train_config(tiny_llava, data, tmp_path / "parts", **options))
    assert result["num_bad_samples"] == whole["num_bad_samples"] == 4
    assert listed(tmp_path / "parts") == listed(tmp_path / "whole")
    one, two = tensors_of(tmp_path / "parts" / "final"), tensors_of(tmp_path / "whole" / "final")
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows[3]["conversations"][1].update(value=""),
        lambda rows: rows[3].update(image="absent.png"),
        lambda rows: rows.__setitem__(3, "no object"),
    ],
)
def test_faulty_records_are_left_out_under_the_same_policy(
    spoil: Callable[[list[dict[str, Any]]], None], tiny_llava: Path, data: Path, tmp_path: Path
) -> None:
    rows = rows_of(data)
    spoil(rows)
    (data / "chat.json").write_text(json.dumps(rows))
    flags = ["train", f"--model_name_or_path={tiny_llava}", f"--data_path={data}", "--dataloader_num_workers=0"]
    flags += ["--train_type=projector", "--max_steps=2", "--bf16=false"]
    assert main([*flags, f"--output_dir={tmp_path / 'stop'}"]) == 2
    assert main([*flags, f"--output_dir={tmp_path / 'run'}", "--on_bad_sample=skip"]) == 0
    assert [(line["step"], line["row"]) for line in listed(tmp_path / "run")] == [(0, 3)]
    assert main([*flags, f"--output_dir={tmp_path / 'none'}", "--on_bad_sample=skip", "--max_bad_samples=0"]) == 2


def test_held_out_samples_are_left_out_too(tiny_llava: Path, shapes: Path, data: Path, tmp_path: Path) -> None:
    held_out = Path(shutil.copytree(shapes / "heldout", tmp_path / "held-out"))
    spoil_image(held_out, 2)
    config = train_config(
        tiny_llava, data, tmp_path / "run", on_bad_sample="skip", max_steps=2, eval_data_path=held_out, eval_steps=1
    )
    result = train(config)
    assert result["num_bad_samples"] == 1
    assert [(line["held_out"], line["row"]) for line in listed(tmp_path / "run")] == [(True, 2)]
