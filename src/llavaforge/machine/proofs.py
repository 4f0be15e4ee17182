"""Proofs that a machine computes rightly: against float32 on the CPU, against itself, with and without DeepSpeed.

Each proof returns its figures, or raises `ProofFailed` with what was expected and what came out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llavaforge.data.load.pack import Pack
from llavaforge.engine.base import AdamWOptions, Engine, ParameterState
from llavaforge.engine.open import open_engine
from llavaforge.engine.zero_config import build_settings, decided
from llavaforge.machine.random_model import TINY, preprocessing, random_model, random_packs, train_options
from llavaforge.model.attention import Borders, packed_attention
from llavaforge.model.compile import compile_layers
from llavaforge.model.liger import use_liger
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import parameter_groups
from llavaforge.processes.world import World
from llavaforge.training.run import deterministic

Figures = dict[str, float]

# Relative errors ||out - reference|| / ||reference||. bfloat16 has 8 bits: 2^-9 = 0.002 per rounding, of which results
# here have seen a few; float32 sums in another order differ by about 1e-6.
_MOST_ERROR = {torch.bfloat16: 0.02, torch.float32: 1e-4}
# Of what the weights moved, with what they moved on the CPU. AdamW divides by the gradient's own size: where that is
# near zero, rounding decides the direction.
_LEAST_COSINE = {torch.bfloat16: 0.9, torch.float32: 0.999}
_NUM_STEPS = 4
_RATE = 1e-3


class ProofFailed(Exception):
    """The machine, its driver or its libraries do not compute what they should."""


# Heads, heads of keys and values, head size, sliding window.
_ATTENTIONS = (
    (4, 4, 64, None),
    (8, 2, 128, None),
    (4, 4, 64, 50),
    (8, 2, 128, 50),
    (4, 4, 80, None),
    (4, 2, 256, None),
)
_LENGTHS = (1, 7, 130, 64, 600)


def prove_attention(device: torch.device, dtype: torch.dtype) -> Figures:
    """Compare packed attention, forward and backward, with float64 on the CPU, sample by sample."""
    generator = torch.Generator().manual_seed(0)
    borders = Borders(
        _LENGTHS,
        torch.tensor([0, *_LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
        max(_LENGTHS),
    )
    worst = 0.0
    for num_heads, num_key_heads, head_size, window in _ATTENTIONS:
        inputs = [
            torch.randn(1, heads, sum(_LENGTHS), head_size, generator=generator).to(dtype)
            for heads in (num_heads, num_key_heads, num_key_heads)
        ]
        grad = torch.randn(1, sum(_LENGTHS), num_heads, head_size, generator=generator).to(dtype)
        ours = [tensor.to(device, copy=True).requires_grad_() for tensor in inputs]
        query, key, value = ours
        output, _ = packed_attention(nn.Module(), query, key, value, None, borders=borders, sliding_window=window)
        output.backward(grad.to(device))
        exact = [tensor.double().requires_grad_() for tensor in inputs]
        query, key, value = exact
        expected = _exact_attention(query, key, value, window)
        expected.backward(grad.double())
        pairs = [(output, expected), *((mine.grad, theirs.grad) for mine, theirs in zip(ours, exact, strict=True))]
        error = max(_error(mine, theirs) for mine, theirs in pairs)
        _bound(error, dtype, f"attention of {num_heads}/{num_key_heads} heads of {head_size}, window {window}")
        worst = max(worst, error)
    return {"relative_error": worst}


def _exact_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return causal attention within each of the samples, (1, T, H, D), straight from its definition."""
    outputs = []
    repeats = query.shape[1] // key.shape[1]
    for q, k, v in zip(*(x[0].split(_LENGTHS, 1) for x in (query, key, value)), strict=True):
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None, :]
        seen = (distance >= 0) & (distance < (window or q.shape[1]))
        scores = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
        outputs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, 1).transpose(0, 1).unsqueeze(0)


def prove_train_type(device: torch.device, train_type: str, dtype: torch.dtype, **how: Any) -> Figures:
    """Compare some steps with the same in float32 on the CPU: the losses, and the way that the weights took.

    `how` is as in a recipe: compile, liger, recompute_every.
    """
    cpu = World(device=torch.device("cpu"))
    _, start = _trained(cpu, train_type, torch.float32, num_steps=0)
    losses, engine = _trained(World(device=device), train_type, dtype, **how)
    expected, reference = _trained(cpu, train_type, torch.float32)
    error = _error(torch.tensor(losses), torch.tensor(expected))
    _bound(error, dtype, f"the losses of {train_type}")
    before = dict(start.masters())
    mine, theirs = (
        torch.cat([(weight - before[name]).flatten() for name, weight in one.masters()]) for one in (engine, reference)
    )
    cosine = float(nn.functional.cosine_similarity(mine, theirs, dim=0))
    if not cosine > _LEAST_COSINE[dtype]:
        raise ProofFailed(f"{train_type} in {dtype}: the weights moved elsewhere than on the CPU, cosine {cosine:.4f}")
    return {"loss_error": error, "cosine_of_updates": cosine}


def prove_resume(device: torch.device, dtype: torch.dtype) -> Figures:
    """Compare a run in one piece with one that goes on from its state: the same bytes, as with `--deterministic`."""
    with deterministic(True):
        _, whole = _trained(World(device=device), "full", dtype)
        _, half = _trained(World(device=device), "full", dtype, num_steps=_NUM_STEPS // 2)
        state = dict(half.trainable_state())
        _, resumed = _trained(World(device=device), "full", dtype, state=state, first=_NUM_STEPS // 2)
    weights = dict(whole.masters())
    different = sum(not torch.equal(mine, weights[name]) for name, mine in resumed.masters())
    if different:
        raise ProofFailed(f"{different} of {len(weights)} weights differ after a run that went on from its state")
    return {"different_weights": 0}


def prove_zero(world: World, stage: str) -> Figures:
    """Compare some steps under DeepSpeed with plain ones of the whole batch."""
    dtype = torch.float32
    config = train_options("full", bf16=False)
    known = decided(config, 2 * world.size, world.size)
    settings = build_settings(stage, known, TINY.width)
    losses, _ = _trained(world, "full", dtype, settings=settings)
    expected, _ = _trained(World(device=world.device), "full", dtype, num_packs=world.size)
    error = _error(torch.tensor(losses), torch.tensor(expected))
    _bound(error, dtype, f"the losses under {stage}")
    return {"loss_error": error}


def _trained(
    world: World,
    train_type: str,
    dtype: torch.dtype,
    *,
    num_steps: int = _NUM_STEPS,
    first: int = 0,
    state: dict[str, ParameterState] | None = None,
    settings: dict[str, Any] | None = None,
    num_packs: int = 1,
    compile: bool = False,
    liger: bool = False,
    recompute_every: int = 0,
) -> tuple[list[float], Engine]:
    """Train the tiny model and return the losses and the engine; the CPU draws the weights, so that all are the same.

    A step is one pack of every process, or `num_packs` packs of a single one.
    """
    config = train_options(train_type, learning_rate=_RATE, projector_learning_rate=_RATE, lora_r=8)
    model = random_model(TINY, torch.device("cpu"), torch.float32)
    groups = parameter_groups(model, config)
    module = StepModule(model, preprocessing(TINY), recompute_every)
    if compile:
        compile_layers(model)
    if liger:
        use_liger(model)
    engine = open_engine(world, settings)
    engine.prepare(module, groups, AdamWOptions(0.9, 0.999, 1e-8, 1.0), dtype)
    if state is not None:
        engine.restore(state, first)
    losses = []
    for step in range(first, num_steps):
        packs = [_pack(step, place) for place in range(max(num_packs, world.size))]
        supervised = sum(pack.num_supervised for pack in packs)
        mine = packs[world.rank :: world.size]
        summed = [float(engine.micro_step(pack, 1.0 / supervised)) for pack in _closed(mine)]
        engine.step(1.0)
        losses.append(world.all_reduce_sum([sum(summed)])[0] / supervised)
    return losses, engine


def _pack(step: int, place: int) -> Pack:
    return next(random_packs(TINY, 1, 3, (20, 60), seed=100 * step + place))


def _closed(packs: Sequence[Pack]) -> Sequence[Pack]:
    for number, pack in enumerate(packs, 1):
        pack.source = type(pack.source)(0, pack.source.samples, number == len(packs), 0)
    return packs


def _error(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    assert mine is not None and theirs is not None
    exact = theirs.detach().double().cpu()
    return float((mine.detach().double().cpu() - exact).norm() / exact.norm().clamp_min(1e-12))


def _bound(error: float, dtype: torch.dtype, what: str) -> None:
    if not error <= _MOST_ERROR[dtype]:  # NaN too
        raise ProofFailed(f"{what}: {error:.2g} off the reference, more than {_MOST_ERROR[dtype]:g} of {dtype}")
