"""Runs of several processes: they stop, go on with other numbers of processes, and are told once what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llavaforge.config.schema import CustomizeModelConfig, shipped_deepspeed
from llavaforge.errors import StoppedEarly
from llavaforge.join.parts import customize_model
from llavaforge.model_folder.tensors import open_tensors
from llavaforge.training.run import train
from rank_worker import injected
from ranks import RankPool
from tiny_parts import save_language_model
from train_tools import TRAIN_TYPES, tensors_of, train_config
from zero_tools import STEPS, Alone, assert_close_tensors, assert_same_curve, held_out, options


@pytest.fixture(scope="module")
def mixed(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with and without an image, in equal parts, of very different lengths."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = json.loads((shapes / "train" / "chat.json").read_text())
    for number, row in enumerate(rows):
        if number % 2:
            del row["image"]
            row["conversations"][0]["value"] = "Hello. " * (number % 5 + 1)
            row["conversations"][1]["value"] *= 1 + 3 * (number % 4 == 1)
    (folder / "chat.json").write_text(json.dumps(rows))
    (folder / "images").symlink_to(shapes / "train" / "images")
    return folder


@pytest.fixture(scope="module")
def zero3_of_real_size(tmp_path_factory: pytest.TempPathFactory) -> str:
    """ZeRO-3 that lets go of every weight after its use, as it must where not all of them fit."""
    settings = json.loads(shipped_deepspeed()["zero3"].read_text())
    settings["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    path = tmp_path_factory.mktemp("deepspeed") / "zero3.json"
    path.write_text(json.dumps(settings))
    return str(path)


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_rank_that_has_only_text_keeps_up(
    stage: str, train_type: str, zero3_of_real_size: str, alone: Alone, two_ranks: RankPool, tiny_llava: Path,
    mixed: Path, tmp_path: Path,
) -> None:  # fmt: skip
    values = options(train_type=train_type, global_batch_size=2, per_device_train_batch_size=1, max_steps=10)
    values |= {"gradient_checkpointing": True, "validation_split": 7, "eval_steps": 5}
    faults = {"chunk": 50}  # so that ranks differ in the pieces of their loss as well
    one, _ = alone(tiny_llava, mixed, faults, **values)
    values |= {"deepspeed": zero3_of_real_size if stage == "zero3" else stage}
    answers = two_ranks.run(train_config(tiny_llava, mixed, tmp_path / "two", **values), **faults)
    assert [answer.get("invalid_traces") for answer in answers] == [0, 0], answers
    assert_same_curve(one, tmp_path / "two")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_processes_tell_each_other_two_things_a_step(
    stage: str, two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    """Whether and on what the step can be taken, and what it came to; a counter that may only go down."""
    values = options(deepspeed=stage, on_bad_sample="skip")
    answers = two_ranks.run(train_config(tiny_llava, shapes / "train", tmp_path / "two", **values))
    assert [answer["messages"][3:6] for answer in answers] == [[2, 2, 2], [2, 2, 2]]  # steps 4 to 6 of 6


@pytest.mark.parametrize(("stage", "kind"), [("zero2", "memory"), ("zero3", "disk")])
def test_ranks_share_kept_features(
    stage: str, kind: str, alone: Alone, two_ranks: RankPool, tiny_llava: Path, mixed: Path, tmp_path: Path
) -> None:
    """Half of the records are text, so that some packs of one rank have no image where the other's have."""
    values = options(train_type="freeze_vision", global_batch_size=2, per_device_train_batch_size=1, max_steps=10)
    values |= {"validation_split": 7, "eval_steps": 5}
    one, _ = alone(tiny_llava, mixed, **values)
    kept = {"cache_vision_features": kind, "cache_dir": tmp_path / "cache", "dataloader_num_workers": 1}
    two_ranks.train(train_config(tiny_llava, mixed, tmp_path / "two", deepspeed=stage, **values, **kept))
    assert_same_curve(one, tmp_path / "two")
    files = list((tmp_path / "cache" / "features").glob("*.features"))
    assert len(files) == (kind == "disk")


def test_tied_embeddings_under_zero_3(
    two_ranks: RankPool, tiny_clip: Path, tiny_lm: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    source = tiny_lm("qwen2")
    folder = tmp_path / "tied"
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {k: v for k, v in load_file(source / "model.safetensors").items() if k != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = tmp_path / "llava"
    customize_model(CustomizeModelConfig(vision_tower=str(tiny_clip), language_model=str(folder), output_dir=model))
    train(train_config(model, shapes / "train", tmp_path / "one", **options()))
    two_ranks.train(train_config(model, shapes / "train", tmp_path / "two", deepspeed="zero3", **options()))
    assert_same_curve(tmp_path / "one", tmp_path / "two")


def stopped(pool: RankPool, config: Any, step: int) -> None:
    """Train until the last rank alone is asked to stop at `step`; every rank must end with 75."""
    answers = pool.run(config, stop=[pool.size - 1, step])
    assert [answer["code"] for answer in answers] == [75] * pool.size, answers
    assert "checkpoint" in answers[0]["message"] and answers[1]["error"] == "EndedElsewhere"


def test_a_run_goes_on_with_any_number_of_processes_and_any_stage(
    one_process: Path, two_ranks: RankPool, four_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    def config(**changes: Any) -> Any:
        return train_config(
            tiny_llava, shapes / "train", tmp_path / "run", **options(max_steps=STEPS, **held_out(shapes), **changes)
        )

    stopped(four_ranks, config(deepspeed="zero3"), step=4)
    shards = sorted(path.name for path in (tmp_path / "run" / "checkpoint-4").glob("state-*"))
    assert shards == [f"state-{number:05d}-of-00004.safetensors" for number in range(1, 5)]  # one from each rank
    stopped(two_ranks, config(deepspeed="zero2"), step=8)
    with injected({"stop": [0, 12]}), pytest.raises(StoppedEarly):
        train(config())
    stopped(four_ranks, config(deepspeed="zero1"), step=16)
    two_ranks.train(config(deepspeed="zero3"))
    assert_same_curve(one_process, tmp_path / "run")
    assert_close_tensors(tensors_of(one_process / "final"), tensors_of(tmp_path / "run" / "final"))


def test_a_checkpoint_holds_what_learns_in_full_and_nothing_else(
    four_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    values = options(train_type="use_lora", save_steps=2, max_steps=2, deepspeed="zero3")
    four_ranks.train(train_config(tiny_llava, shapes / "train", tmp_path / "run", **values))
    folder = tmp_path / "run" / "checkpoint-2"
    state = open_tensors(folder, "state")
    names = [key.removeprefix("weight/") for key in state if key.startswith("weight/")]
    assert names and all("lora_" in name or "multi_modal_projector" in name for name in names)
    assert sorted(state) == sorted(f"{kind}/{name}" for kind in ("weight", "exp_avg", "exp_avg_sq") for name in names)
    assert all(state.dtype(key) == torch.float32 and state[key].any() for key in state if "exp_avg" in key)
    adapter = open_tensors(tmp_path / "run" / "final", "adapter_model")
    for name in names:
        saved = adapter["base_model.model." + name.replace(".default.", ".")]
        assert torch.equal(saved, state[f"weight/{name}"]), name
    written = {path.suffix for path in folder.rglob("*")}
    assert written == {".safetensors", ".json"}, "no pickle"


@pytest.mark.parametrize("stage", ["zero2", None])
def test_a_recipe_that_every_rank_refuses_is_refused_once(
    stage: str | None, two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    odd = train_config(tiny_llava, shapes / "train", tmp_path / "run", **options(global_batch_size=7, deepspeed=stage))
    answers = two_ranks.run(odd)
    assert [answer["code"] for answer in answers] == [2, 2]
    assert "does not divide over 2 processes" in answers[0]["message"]
    assert answers[1]["error"] == "EndedElsewhere"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_free_space_is_looked_at_before_a_save_also_where_no_process_holds_a_whole_parameter(
    two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", **options(deepspeed="zero3", save_steps=2))
    answers = two_ranks.run(config, free=12 * 1000)  # 42,080 parameters learn, 12 bytes each
    assert [answer["code"] for answer in answers] == [2, 2]
    told = next(answer["message"] for answer in answers if answer["error"] == "UserError")
    assert "checkpoint-2 is not saved" in told and "a checkpoint takes 1 MB, 0 MB are free" in told
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_loading_never_holds_a_whole_copy_of_the_weights_in_host_memory(
    two_ranks: RankPool, tiny_llava: Path, tiny_clip: Path, shapes: Path, tmp_path: Path
) -> None:
    sizes = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=8)
    text = save_language_model(tmp_path / "text", **sizes)
    model = tmp_path / "llava"
    customize_model(CustomizeModelConfig(vision_tower=str(tiny_clip), language_model=str(text), output_dir=model))
    whole = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert whole > 250e6
    values = options(train_type="projector", deepspeed="zero3", max_steps=1)
    two_ranks.train(train_config(tiny_llava, shapes / "train", tmp_path / "first", **values))  # imports, buffers
    answers = two_ranks.run(train_config(model, shapes / "train", tmp_path / "run", **values))
    loading = [answer["loading_bytes"] / whole for answer in answers]
    # On a CPU a rank keeps its half in host memory, beside the layer that is being dealt; on a GPU it would not. What
    # the allocator keeps differs from run to run: 0.66 to 0.93 were seen. With a whole copy it is 1.5.
    assert max(loading) < 1.0, loading


def test_the_contract_is_told_once(two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    values = options(projector_learning_rate=0.0, deepspeed="zero2")
    answers = two_ranks.run(train_config(tiny_llava, shapes / "train", tmp_path / "run", **values))
    assert [answer["code"] for answer in answers] == [2, 2]
    assert "projector should learn but did not move" in answers[0]["message"]
    assert answers[1]["error"] == "EndedElsewhere"


@pytest.fixture(scope="module")
def spoilt(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven of the first twenty images are none."""
    data = Path(shutil.copytree(shapes / "train", tmp_path_factory.mktemp("spoilt") / "data"))
    rows = json.loads((data / "chat.json").read_text())
    for row in rows[:20:3]:  # with two samples a micro-batch, some hold bad ones only
        (data / "images" / row["image"]).write_bytes(b"<html>not found</html>")
    return data


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_bad_images_are_left_out_as_in_one_process(
    stage: str, alone: Alone, two_ranks: RankPool, tiny_llava: Path, spoilt: Path, tmp_path: Path
) -> None:
    values = options(on_bad_sample="skip", max_grad_norm=0, eval_data_path=spoilt, eval_steps=3)
    one, whole = alone(tiny_llava, spoilt, **values)
    result = two_ranks.train(train_config(tiny_llava, spoilt, tmp_path / "two", deepspeed=stage, **values))
    assert result["num_bad_samples"] == whole["num_bad_samples"] == 7
    assert_same_curve(one, tmp_path / "two")
    listed = [sorted((run / "bad_samples.jsonl").read_text().splitlines()) for run in (one, tmp_path / "two")]
    assert listed[0] == listed[1] and len(listed[0]) == 7
