"""DeepSpeed on real processes takes the steps that one process takes."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.errors import StoppedEarly
from llavaforge.join.parts import customize_model
from llavaforge.model_folder.tensors import open_tensors
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from rank_worker import injected
from ranks import RankPool
from tiny_parts import save_language_model
from train_tools import TRAIN_TYPES, tensors_of, train_config

STEPS = 20
STAGES = ("zero1", "zero2", "zero3")
OFFLOAD = "offload"
BUILD = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)"
Alone = Callable[..., tuple[Path, dict[str, Any]]]


def options(**changes: Any) -> dict[str, Any]:
    """Clipping and weight decay at work, two micro-steps per rank, and a bad start for whoever guesses defaults."""
    values: dict[str, Any] = dict(
        max_steps=6, global_batch_size=8, per_device_train_batch_size=2, learning_rate=1e-3, train_type="full",
        max_grad_norm=0.5, weight_decay=0.1, adam_beta2=0.95,
    )  # fmt: skip
    return values | changes


def curve(folder: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(folder) if key in line]


def assert_same_curve(one: Path, other: Path, rel: float = 1e-4) -> None:
    assert len(read_metrics(one)) == len(read_metrics(other)) > 0
    for key in ("loss", "grad_norm", "eval_loss"):
        assert curve(other, key) == pytest.approx(curve(one, key), rel=rel), key


def assert_close_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-3) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (other[name] - tensor).abs().max() < atol, name


@pytest.fixture(scope="module", autouse=True)
def cpu_adam(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Have DeepSpeed compile its optimizer for the CPU while the other tests run; call it to wait for the end.

    Once per machine (DeepSpeed keeps it), and 90 s of a core. Who fails here fails in the test that needs it, with
    the reason.
    """
    if not any(OFFLOAD in item.name for item in request.session.items):
        yield lambda: None
        return
    build = subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield lambda: build.wait() and None
    finally:
        build.wait()  # a killed one would leave its lock behind


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """A function that trains in one process, once for the same arguments: the run (read only) and its result."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def run(
        model: Path, data: Path, faults: dict[str, Any] | None = None, **values: Any
    ) -> tuple[Path, dict[str, Any]]:
        key = repr((model, data, faults, sorted(values.items())))
        if key not in done:
            folder = tmp_path_factory.mktemp("one") / "run"
            with injected(faults or {}):
                done[key] = folder, train(train_config(model, data, folder, **values))
        return done[key]

    return run


@pytest.fixture(scope="module")
def one_process(alone: Alone, tiny_llava: Path, shapes: Path) -> Path:
    """20 steps of everything in one process, float32; with a held-out loss. Read only."""
    return alone(tiny_llava, shapes / "train", **options(max_steps=STEPS, **held_out(shapes)))[0]


def held_out(shapes: Path) -> dict[str, Any]:
    return {"eval_data_path": shapes / "heldout", "eval_steps": 10}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_equals_one_process_over_20_steps(
    stage: str, one_process: Path, two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    values = options(max_steps=STEPS, deepspeed=stage, **held_out(shapes))
    two_ranks.train(train_config(tiny_llava, shapes / "train", tmp_path / "two", **values))
    assert_same_curve(one_process, tmp_path / "two")
    assert max(curve(one_process, "grad_norm")) > 0.5, "nothing was clipped"
    assert_close_tensors(tensors_of(one_process / "final"), tensors_of(tmp_path / "two" / "final"))


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_every_train_type_equals_one_process_over_20_steps_at_zero_2(
    train_type: str, alone: Alone, two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    values = options(max_steps=STEPS, train_type=train_type, max_grad_norm=0)
    one, _ = alone(tiny_llava, shapes / "train", **values)
    two_ranks.train(train_config(tiny_llava, shapes / "train", tmp_path / "two", deepspeed="zero2", **values))
    assert_same_curve(one, tmp_path / "two")


@pytest.mark.parametrize("stage", STAGES)
def test_lora_saves_the_adapter_that_one_process_saves(
    stage: str, alone: Alone, two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    values = options(train_type="use_lora", learning_rate=1e-2)
    one, _ = alone(tiny_llava, shapes / "train", **values)
    two_ranks.train(train_config(tiny_llava, shapes / "train", tmp_path / "two", deepspeed=stage, **values))
    adapters = [dict(open_tensors(run / "final", "adapter_model").items()) for run in (one, tmp_path / "two")]
    assert_close_tensors(*adapters)
    for name, tensor in adapters[1].items():
        assert tensor.numel() and tensor.any(), f"{name} is empty"


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


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_rank_that_has_only_text_keeps_up(
    stage: str, train_type: str, alone: Alone, two_ranks: RankPool, tiny_llava: Path, mixed: Path, tmp_path: Path
) -> None:
    values = options(train_type=train_type, global_batch_size=2, per_device_train_batch_size=1, max_steps=10)
    values |= {"gradient_checkpointing": True, "validation_split": 7, "eval_steps": 5}
    faults = {"chunk": 50}  # so that ranks differ in the pieces of their loss as well
    one, _ = alone(tiny_llava, mixed, faults, **values)
    two_ranks.train(train_config(tiny_llava, mixed, tmp_path / "two", deepspeed=stage, **values), **faults)
    assert_same_curve(one, tmp_path / "two")


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_no_number_on_one_rank_skips_the_step_on_all(
    stage: str, alone: Alone, two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    single, _ = alone(tiny_llava, shapes / "train", {"nan": [0, 3]}, **options())
    values = options(deepspeed=stage, save_steps=6)
    two_ranks.train(train_config(tiny_llava, shapes / "train", tmp_path / "two", **values), nan=[1, 3])
    one, two = (curve(run, "loss") for run in (single, tmp_path / "two"))
    assert math.isnan(one[3]) and math.isnan(two[3]) and not math.isfinite(curve(tmp_path / "two", "grad_norm")[3])
    assert two[4:] == pytest.approx(one[4:], rel=1e-4)
    assert json.loads((tmp_path / "two" / "checkpoint-6" / "train_state.json").read_text())["num_skipped"] == 1


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_keeps_float32_masters_and_accumulates_in_float32(
    stage: str, alone: Alone, two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    values = options(bf16=True, global_batch_size=40, per_device_train_batch_size=1, max_grad_norm=0, max_steps=2)
    values |= {"learning_rate": 1e-6, "projector_learning_rate": 1e-6, "weight_decay": 0.0}
    single, _ = alone(tiny_llava, shapes / "train", **values)
    two_ranks.train(train_config(tiny_llava, shapes / "train", tmp_path / "two", deepspeed=stage, **values))
    # 20 micro-steps added up in bfloat16 would err by 1e-2 and more.
    assert curve(tmp_path / "two", "grad_norm") == pytest.approx(curve(single, "grad_norm"), rel=1e-3)
    before, one, two = (tensors_of(p) for p in (tiny_llava, single / "final", tmp_path / "two" / "final"))
    moved = "model.multi_modal_projector.linear_1.weight"
    assert 0 < (two[moved] - before[moved]).abs().max() < 1e-5, "far below bfloat16's resolution"
    assert_close_tensors(one, two, atol=1e-5)


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
    # On a CPU a rank keeps its half in host memory, beside the layer that is being dealt; on a GPU it would not.
    assert max(loading) < 0.85, loading


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


@pytest.mark.parametrize("stage", [f"zero2-{OFFLOAD}", f"zero3-{OFFLOAD}"])
def test_an_optimizer_on_the_cpu_takes_the_same_steps(
    stage: str,
    cpu_adam: Callable[[], None],
    alone: Alone,
    two_ranks: RankPool,
    tiny_llava: Path,
    shapes: Path,
    tmp_path: Path,
) -> None:  # the last of the file: what it needs has been built meanwhile
    one, _ = alone(tiny_llava, shapes / "train", **options())
    cpu_adam()
    two_ranks.train(train_config(tiny_llava, shapes / "train", tmp_path / "two", deepspeed=stage, **options()))
    assert_same_curve(one, tmp_path / "two")
