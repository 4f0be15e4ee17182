"""DeepSpeed on real processes takes the steps that one process takes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llavaforge.model_folder.tensors import open_tensors
from llavaforge.processes.workers import num_cores
from rank_worker import threads_after
from ranks import RankPool, free_port, rank_environment
from train_tools import TRAIN_TYPES, tensors_of, train_config
from warm import WarmProcess
from zero_tools import STAGES, STEPS, Alone, assert_close_tensors, assert_same_curve, curve, held_out, options

OFFLOAD = "offload"
BUILD = "from llavaforge.engine.cpu_adam import load_cpu_adam; load_cpu_adam()"


@pytest.fixture(scope="module", autouse=True)
def cpu_adam(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Have DeepSpeed compile its optimizer for the CPU while the other tests run; call it to wait for the end.

    Once per machine (torch keeps it), and 90 s of a core. Who fails here fails in the test that needs it, with
    the reason.
    """
    if not any(OFFLOAD in item.name or "on_the_cpu" in item.name for item in request.session.items):
        yield lambda: None
        return
    build = subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield lambda: build.wait() and None
    finally:
        build.wait()


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


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_no_number_on_one_rank_skips_the_step_on_all(
    stage: str, alone: Alone, two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    single, _ = alone(tiny_llava, shapes / "train", {"nan": [0, 3]}, **options())
    values = options(deepspeed=stage, save_steps=6)
    two_ranks.train(train_config(tiny_llava, shapes / "train", tmp_path / "two", **values), nan=[1, 3])
    one, two = (curve(run, "loss") for run in (single, tmp_path / "two"))
    assert one[3] is two[3] is curve(tmp_path / "two", "grad_norm")[3] is None
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


def test_an_optimizer_on_the_cpu_uses_all_cores_although_torchrun_allows_one_thread(
    cpu_adam: Callable[[], None], tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    config = train_config(
        tiny_llava, shapes / "train", tmp_path / "run", **options(max_steps=1, deepspeed=f"zero2-{OFFLOAD}")
    )
    cpu_adam()
    environment = rank_environment(0, 1, free_port())
    assert environment["OMP_NUM_THREADS"] == "1"
    process = WarmProcess(threads_after, config, env=environment, log=tmp_path / "log")
    assert process.wait() == num_cores(), (tmp_path / "log").read_text()
