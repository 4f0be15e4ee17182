"""What `llavaforge env` shows, and that its proofs hold here and fail where something is wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llavaforge
from llavaforge.config.schema import EnvConfig
from llavaforge.config.train_types import TRAIN_TYPES
from llavaforge.engine.plain import PlainEngine
from llavaforge.errors import UserError
from llavaforge.files import to_json
from llavaforge.machine import check, proofs
from llavaforge.machine.random_model import TINY, random_packs
from llavaforge.machine.speed import Work, measure
from llavaforge.processes.world import World
from warm import WarmProcess

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_the_machine_is_described_with_the_documented_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "env.json"
    shown = llavaforge.env(output=output)
    assert shown.keys() == llavaforge.EnvResult.__annotations__.keys()
    assert json.loads(output.read_text()) == json.loads(to_json(shown))
    assert torch.__version__ in capsys.readouterr().err
    llavaforge.env(output=output)  # its own file is replaced
    output.write_text("mine")
    with pytest.raises(UserError, match="did not write it"):
        llavaforge.env(output=output)
    assert output.read_text() == "mine"


def checked_small(output: str) -> int:
    """In a process of its own, since DeepSpeed's group stays open."""

    def works(world: World) -> Iterator[Work]:
        yield Work(TINY, "projector", 2)

    check._works = works
    return int(check.env(EnvConfig(check=True, output=Path(output)))["num_failed"])


@pytest.mark.slow
def test_all_checks_hold_here(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = WarmProcess(checked_small, str(tmp_path / "env.json"), env=environment, log=tmp_path / "log")
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    checks = {one["name"]: one for one in json.loads((tmp_path / "env.json").read_text())["checks"]}
    assert all(one["ok"] for one in checks.values())
    assert {"DeepSpeed zero1", "DeepSpeed zero2", "DeepSpeed zero3", "attention, float32"} <= checks.keys()
    assert all(f"steps of {kind}, float32" in checks for kind in TRAIN_TYPES)
    assert checks["projector at a 120th of the size"]["figures"]["samples_per_s"] > 0


def test_attention_that_looks_across_samples_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs.prove_attention(CPU, torch.float32)
    whole = proofs.packed_attention

    def leaking(*inputs: Any, borders: Any, **options: Any) -> Any:
        total = sum(borders.lengths)
        one = type(borders)((total,), torch.tensor([0, total], dtype=torch.int32), total)
        return whole(*inputs, borders=one, **options)

    monkeypatch.setattr(proofs, "packed_attention", leaking)
    with pytest.raises(proofs.ProofFailed, match="off the reference"):
        proofs.prove_attention(CPU, torch.float32)


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_steps_in_the_wrong_direction_are_found_out(train_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = proofs.prove_train_type(CPU, train_type, torch.bfloat16)
    assert good["cosine_of_updates"] > 0.95
    micro_step = PlainEngine.micro_step

    def careless(self: PlainEngine, pack: Any, scale: float) -> torch.Tensor:
        if self._module.model.dtype == torch.bfloat16:
            pack.targets_S = pack.targets_S.roll(1)
        return micro_step(self, pack, scale)

    monkeypatch.setattr(PlainEngine, "micro_step", careless)
    with pytest.raises(proofs.ProofFailed):
        proofs.prove_train_type(CPU, train_type, torch.bfloat16)


def test_a_check_that_fails_is_told_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, float]:
        raise proofs.ProofFailed("the losses: 0.5 off")

    def full() -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    outcome = check._outcome("steps", broken, World(device=CPU))
    assert not outcome["ok"] and outcome["failures"] == ["process 0: ProofFailed: the losses: 0.5 off"]
    assert check._line(outcome).startswith("FAILED  steps")
    assert check._outcome("real size", full, World(device=CPU))["failures"] == ["process 0: out of memory"]


def test_random_packs_hold_what_they_say() -> None:
    first, second = random_packs(TINY, 2, 3, (10, 20))
    assert [pack.source.is_last_of_step for pack in (first, second)] == [False, True]
    assert first.source.num_supervised_in_step == first.num_supervised + second.num_supervised
    for pack in (first, second):
        assert pack.num_images == 3 and len(pack.image_positions_M) == 3 * TINY.num_image_tokens
        assert all(TINY.num_image_tokens + 10 <= length <= TINY.num_image_tokens + 20 for length in pack.lengths)


def test_a_speed_is_of_the_whole_step() -> None:
    speed = measure(Work(TINY, "projector", 2, num_micro_batches=3), World(device=CPU), num_steps=2, num_warmup=1)
    assert speed.samples_per_s == pytest.approx(6 / speed.step_s)
    assert 0 < speed.mfu < 1 and speed.loss == pytest.approx(6.9, abs=1)


# What the first user with a GPU runs: the same checks, and the real size.


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_on_a_gpu(dtype: torch.dtype) -> None:
    assert 0 < proofs.prove_attention(torch.device("cuda"), dtype)["relative_error"] < 0.02


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("how", ["float32", "bfloat16", "compiled", "liger", "every second layer recomputed"])
@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_steps_on_a_gpu_are_the_cpus(train_type: str, how: str) -> None:
    if how == "liger":
        pytest.importorskip("liger_kernel")
    options: dict[str, Any] = {
        "compiled": {"compile": True}, "liger": {"liger": True}, "every second layer recomputed": {"recompute_every": 2}
    }.get(how, {})  # fmt: skip
    dtype = torch.float32 if how == "float32" else torch.bfloat16
    assert proofs.prove_train_type(torch.device("cuda"), train_type, dtype, **options)["cosine_of_updates"] > 0.9


@pytest.mark.gpu
@needs_gpu
def test_a_resumed_run_on_a_gpu_is_the_uninterrupted_one() -> None:
    assert proofs.prove_resume(torch.device("cuda"), torch.bfloat16)["different_weights"] == 0
