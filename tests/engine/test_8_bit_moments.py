"""AdamW with 8-bit moments: what is saved is what goes on, and what it does not go with is refused."""

from pathlib import Path

import pytest
import torch
from torchao.optim.subclass_8bit import OptimState8bit

from llavaforge.engine.base import AdamWOptions
from llavaforge.engine.moments import fill, to_float
from llavaforge.engine.plain import PlainEngine
from llavaforge.engine.zero_config import settings_of_run
from llavaforge.errors import UserError
from llavaforge.machine.random_model import TINY, preprocessing, random_model, random_packs, train_options
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import parameter_groups
from llavaforge.processes.world import World
from train_tools import train_config

OPTIONS = train_options("freeze_vision", optim="adamw_8bit")


def engine() -> PlainEngine:
    made = PlainEngine(World(device=torch.device("cpu")))
    model = random_model(TINY, torch.device("cpu"), torch.float32)
    groups = parameter_groups(model, OPTIONS)
    made.prepare(StepModule(model, preprocessing(TINY)), groups, AdamWOptions.of(OPTIONS), torch.float32)
    return made


def advance(made: PlainEngine, steps: range) -> None:
    # torchao compiles its update, which would cost a minute; what it computes is the same.
    with torch.compiler.set_stance("force_eager"):
        for step in steps:
            pack = next(random_packs(TINY, 1, 2, (20, 40), seed=step))
            made.micro_step(pack, 1.0 / pack.num_supervised)
            made.step(1.0)


def test_a_resumed_run_has_the_bytes_of_a_whole_one() -> None:
    whole, half, resumed = engine(), engine(), engine()
    advance(whole, range(4))
    advance(half, range(2))
    state = dict(half.trainable_state())
    resumed.restore(state, 2)
    again = dict(resumed.trainable_state())
    assert all(torch.equal(again[name].exp_avg_sq, one.exp_avg_sq) for name, one in state.items())
    assert any(one.exp_avg.any() for one in state.values())
    advance(resumed, range(2, 4))
    theirs = dict(whole.masters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in resumed.masters())


@pytest.mark.parametrize("size", [1e-20, 1e-13, 1e-9, 1e-4, 1.0, 1e5])
@pytest.mark.parametrize("signed", [True, False])
def test_what_was_saved_is_what_is_kept(size: float, signed: bool) -> None:
    """Numbers of every size and spread, zeros among them, and blocks whose largest number is negative."""
    torch.manual_seed(0)
    numbers = size * torch.randn(64, 256) * torch.logspace(-6, 0, 64)[:, None] * torch.rand(64, 256).gt(0.2)
    kept, again = (OptimState8bit.zeros(numbers.shape, signed=signed) for _ in range(2))
    kept.copy_(numbers if signed else numbers.square())
    saved = to_float(kept)
    fill(again, saved)
    assert torch.equal(to_float(again), saved)


def test_moments_take_2_bytes_and_steps_are_near_those_of_32_bits() -> None:
    made = engine()
    advance(made, range(2))
    states = [state["exp_avg"] for state in made._optimizer.state.values()]
    assert sum(hasattr(moment, "codes") for moment in states) > 0.5 * len(states)
    exact = PlainEngine(World(device=torch.device("cpu")))
    model = random_model(TINY, torch.device("cpu"), torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OPTIONS)
    exact.prepare(StepModule(model, preprocessing(TINY)), groups, AdamWOptions(0.9, 0.999, 1e-8, 1.0), torch.float32)
    advance(exact, range(2))
    moves = [torch.cat([(weight - before[name]).flatten() for name, weight in one.masters()]) for one in (made, exact)]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0).item() > 0.95


@pytest.mark.parametrize("processes", [1, 2])
def test_deepspeed_is_refused(processes: int, tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    deepspeed = "zero2" if processes == 1 else None
    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", optim="adamw_8bit", deepspeed=deepspeed)
    with pytest.raises(UserError, match="single process without DeepSpeed"):
        settings_of_run(config, 8, processes)
