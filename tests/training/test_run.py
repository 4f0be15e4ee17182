"""Runs of a few steps: what learns, what stays, what is left behind, and who owns a folder."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llavaforge.config import train_types
from llavaforge.data.load.pack import Pack
from llavaforge.errors import RunFailed, UserError
from llavaforge.files import read_json_lines
from llavaforge.folders import differences
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import part_of
from llavaforge.model_folder.tensors import open_tensors
from llavaforge.training.contract import Contract, ContractError
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from train_tools import TRAIN_TYPES, tensors_of, train_config


@pytest.mark.parametrize("train_type", [name for name in TRAIN_TYPES if name != "use_lora"])
def test_what_should_move_moved_and_the_rest_is_equal_bit_for_bit(
    train_type: str, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    train(train_config(tiny_llava, shapes / "train", tmp_path / "run", train_type=train_type))
    before, after = tensors_of(tiny_llava), tensors_of(tmp_path / "run" / "final")
    assert before.keys() == after.keys()
    never = ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm")  # after the feature layer
    for name, tensor in before.items():
        learns = part_of(name) in train_types.TRAIN_TYPES[train_type].parts and not any(part in name for part in never)
        # A token that no sample contains has no gradient: embeddings move in the rows that are used.
        assert torch.equal(tensor, after[name]) != learns, name


def test_lora_leaves_the_base_alone_and_an_adapter_that_plain_peft_opens(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    bytes_before = (tiny_llava / "model.safetensors").read_bytes()
    train(train_config(tiny_llava, shapes / "train", tmp_path / "run", train_type="use_lora"))
    assert (tiny_llava / "model.safetensors").read_bytes() == bytes_before
    final = tmp_path / "run" / "final"
    adapter = dict(open_tensors(final, "adapter_model").items())
    for name, tensor in adapter.items():
        assert "language_model" in name or "multi_modal_projector" in name
        if "lora_B" in name:
            assert tensor.any(), f"{name} did not move from zero"
    projector = tensors_of(tiny_llava)["model.multi_modal_projector.linear_1.weight"]
    assert not torch.equal(adapter["base_model.model.model.multi_modal_projector.linear_1.weight"], projector)
    base = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    opened = PeftModel.from_pretrained(base, final)
    loaded = {name: p for name, p in opened.named_parameters() if "lora" in name or "modules_to_save" in name}
    assert loaded and all("vision_tower" not in name for name in loaded)
    assert any(torch.equal(p, adapter[n.replace(".default", "")]) for n, p in loaded.items() if "lora_B" in n)
    AutoProcessor.from_pretrained(final)


def test_metrics_curve_and_result_are_left(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    config = train_config(
        tiny_llava, shapes / "train", tmp_path / "run", max_steps=20, eval_data_path=shapes / "heldout", eval_steps=10
    )
    result = train(config)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [line["step"] for line in lines if "eval_loss" in line] == [10, 20]
    assert result["eval_loss"] == lines[-1]["eval_loss"] < lines[9]["eval_loss"]
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5_000
    assert set(result) == {
        "output_dir", "global_step", "train_loss", "eval_loss", "best_metric", "best_step", "stopped_early",
        "samples_per_s", "tokens_per_s", "mfu", "peak_memory_bytes", "num_bad_samples",
    }  # fmt: skip
    assert 0 < result["mfu"] < 1.5 and result["tokens_per_s"] > 0
    total = sum(line["loss"] * line["num_supervised"] for line in lines)
    assert result["train_loss"] == pytest.approx(total / sum(line["num_supervised"] for line in lines))


def test_holdout_rows_are_not_trained_on(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", max_steps=1, validation_split=10)
    assert math.isfinite(train(config)["eval_loss"])
    with pytest.raises(UserError, match="holds out 40 of 40 records"):
        train(train_config(tiny_llava, shapes / "train", tmp_path / "other", validation_split=40))


def test_a_finished_run_is_skipped_and_a_different_one_refused(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", max_steps=2)
    first = train(config)
    weights = tmp_path / "run" / "final" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert train(config) == first
    assert weights.stat().st_mtime_ns == written
    other = train_config(tiny_llava, shapes / "train", tmp_path / "run", max_steps=2, learning_rate=1e-5)
    with pytest.raises(UserError, match=r"belongs to another run(.|\n)*learning_rate: 0.01 there, 1e-05 now"):
        train(other)
    assert not differences(tmp_path / "run" / "final")


def test_a_folder_with_something_else_is_refused(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match=r"not a run of llavaforge \(it holds thesis.tex\)"):
        train(train_config(tiny_llava, shapes / "train", tmp_path / "run"))
    assert (tmp_path / "run" / "thesis.tex").read_text() == "dear"


def test_stages_run_in_order_merge_lora_between_and_skip_what_is_done(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    config = train_config(
        tiny_llava,
        shapes / "train",
        tmp_path / "run",
        max_steps=3,
        stages=[
            {"name": "align", "train_type": "projector"},
            {"name": "tune", "train_type": "use_lora", "data_path": str(shapes / "train" / "questions.json")},
            {"name": "polish", "train_type": "freeze_vision"},
        ],
    )
    result = train(config)
    assert result["output_dir"] == str(tmp_path / "run" / "polish")
    aligned, merged = tensors_of(tmp_path / "run" / "align" / "final"), tensors_of(tmp_path / "run" / "tune" / "merged")
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(aligned[name], tensors_of(tiny_llava)[name])
    assert not torch.equal(merged[name], aligned[name])
    run = json.loads((tmp_path / "run" / "polish" / "run.json").read_text())
    assert run["base_model"].endswith("tune/merged")
    assert (tmp_path / "run" / "final").resolve() == (tmp_path / "run" / "polish" / "final").resolve()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    assert train(config) == result
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")} == stamps


def test_unknown_key_in_a_stage_names_the_nearest(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    config = train_config(tiny_llava, shapes / "train", tmp_path, stages=[{"name": "a", "learning_rat": 1e-3}])
    with pytest.raises(UserError, match=r"unknown key `learning_rat`.*Did you mean `learning_rate`"):
        train(config)


def test_the_contract_stops_a_part_that_does_not_move(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", projector_learning_rate=0.0)
    with pytest.raises(UserError, match="projector should learn but did not move"):
        train(config)


def test_the_contract_sees_a_frozen_tensor_change(
    tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove = Contract.prove

    def meddle_then_prove(self: Contract) -> None:
        next(iter(self._frozen.values())).data[0] += 1e-6
        prove(self)

    monkeypatch.setattr(Contract, "prove", meddle_then_prove)
    with pytest.raises(ContractError, match="1 frozen tensors changed"):
        train(train_config(tiny_llava, shapes / "train", tmp_path / "run", train_type="projector"))


def test_steps_without_a_finite_gradient_end_the_run_and_name_their_records(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = dict(learning_rate=1e30, max_grad_norm=0, max_skipped_steps=2)
    with pytest.raises(RunFailed, match=r"3 steps in a row.*lower the learning rate"):
        train(train_config(tiny_llava, shapes / "train", tmp_path / "run", **values))
    assert not (tmp_path / "run" / "final").exists()
    unusual = read_json_lines(tmp_path / "run" / "unusual_steps.jsonl")
    assert [len(line["records"]) for line in unusual] == [4, 4, 4]
    assert all(line["records"][0].startswith("chat.json row ") for line in unusual)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1], parse_constant=pytest.fail)["grad_norm"] is None


def test_a_run_whose_every_step_was_skipped_leaves_no_finished_model(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llava, tmp_path / "model"))
    path = model / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_std": [0, 0, 0]}))
    with pytest.raises(RunFailed, match="all 2 steps were skipped"):
        train(train_config(model, shapes / "train", tmp_path / "run", max_steps=2))
    assert not (tmp_path / "run" / "final").exists()


def test_nothing_of_the_model_runs_outside_the_step_module(
    tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bool] = []
    num_calls = 0
    init, forward = StepModule.__init__, StepModule.forward

    def watched_init(self: StepModule, model: torch.nn.Module, *arguments: object, **options: object) -> None:
        def check(*_: object) -> None:
            nonlocal num_calls
            num_calls += 1
            assert inside, "a module of the model ran outside the step module"

        for module in model.modules():
            module.register_forward_pre_hook(check)
        init(self, model, *arguments, **options)

    def watched_forward(self: StepModule, pack: Pack) -> torch.Tensor:
        inside.append(True)
        try:
            return forward(self, pack)
        finally:
            inside.pop()

    monkeypatch.setattr(StepModule, "__init__", watched_init)
    monkeypatch.setattr(StepModule, "forward", watched_forward)
    options = dict(eval_data_path=shapes / "heldout", eval_steps=2, save_steps=2, train_type="full")
    train(train_config(tiny_llava, shapes / "train", tmp_path / "run", **options))
    assert num_calls > 100


def test_bfloat16_keeps_float32_masters(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    exact = train(train_config(tiny_llava, shapes / "train", tmp_path / "a", max_steps=10))
    rounded = train(train_config(tiny_llava, shapes / "train", tmp_path / "b", max_steps=10, bf16=True))
    assert rounded["train_loss"] == pytest.approx(exact["train_loss"], rel=0.02)
    tiny_rate = train_config(
        tiny_llava, shapes / "train", tmp_path / "c", bf16=True, learning_rate=1e-6, projector_learning_rate=1e-6
    )
    train(tiny_rate)  # updates far below bfloat16's resolution: the contract proves that the masters moved


def test_a_file_of_the_users_named_final_is_not_replaced_by_the_link_to_the_last_stage(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    config = train_config(
        tiny_llava, shapes / "train", tmp_path / "run", stages=[{"name": "one", "train_type": "projector"}], max_steps=2
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").write_text("precious")
    with pytest.raises(UserError, match="final: is in the way"):
        train(config)
    assert (tmp_path / "run" / "final").read_text() == "precious" and not (tmp_path / "run" / "one").exists()


def test_deterministic_algorithms_do_all_that_a_run_needs_and_are_switched_off_again(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    for option in (False, True):
        values: dict[str, Any] = dict(train_type="full", deterministic=option, max_steps=3)
        train(train_config(tiny_llava, shapes / "train", tmp_path / str(option), **values))
    one, other = (tensors_of(tmp_path / str(option) / "final") for option in (False, True))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.are_deterministic_algorithms_enabled()
