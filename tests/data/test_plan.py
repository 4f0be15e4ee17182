"""The order of samples depends on seed and data alone, and bins respect both bounds."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavaforge.data.order.mixture import Mixture
from llavaforge.data.order.plan import Plan, deal_in_order, in_order, num_steps
from llavaforge.errors import UserError


def plan(num_samples: int = 50, **changes: Any) -> Plan:
    lengths = np.random.default_rng(1).integers(5, 40, num_samples)
    values: dict[str, Any] = {
        "mixture": Mixture([np.arange(num_samples)], [num_samples], seed=0),
        "lengths": lengths,
        "num_supervised": lengths // 2,
        "costs": lengths.astype(float) ** 2,
        "global_batch_size": 8,
        "num_steps": 13,
        "world_size": 1,
        "max_samples": 8,
        "max_tokens": None,
    }
    return Plan(**{**values, **changes})


@settings(max_examples=60, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 4]),
    max_samples=st.integers(1, 8),
    max_tokens=st.one_of(st.none(), st.integers(40, 200)),
    step=st.integers(0, 12),
)
def test_any_split_holds_the_same_global_batch_within_bounds(
    world_size: int, max_samples: int, max_tokens: int | None, step: int
) -> None:
    made = plan(world_size=world_size, max_samples=max_samples, max_tokens=max_tokens)
    ranks = [made.micro_batches(step, rank) for rank in range(world_size)]
    assert len({len(micro) for micro in ranks}) == 1  # every rank works the same number of times
    batches = [batch for micro in ranks for batch in micro]
    assert sorted(s for batch in batches for s in batch.samples) == sorted(plan().global_batch(step).tolist())
    for batch in batches:
        assert 0 < len(batch.samples) <= max_samples
        assert max_tokens is None or made.lengths[list(batch.samples)].sum() <= max_tokens
        assert batch.num_supervised_in_step == made.num_supervised[plan().global_batch(step)].sum()
    for micro in ranks:
        assert [batch.is_last_of_step for batch in micro] == [False] * (len(micro) - 1) + [True]


def test_each_epoch_sees_every_sample_once_in_a_new_order() -> None:
    made = plan(num_samples=48)
    epochs = [np.concatenate([made.global_batch(step) for step in range(e * 6, e * 6 + 6)]) for e in range(2)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert not np.array_equal(*epochs)


def test_a_batch_larger_than_the_data_wraps_around() -> None:
    made = plan(num_samples=3, global_batch_size=8)
    counts = np.bincount(np.concatenate([made.global_batch(step) for step in range(3)]), minlength=3)
    assert counts.tolist() == [8, 8, 8]


@pytest.mark.parametrize("num_steps", [0, 3, 6, 13, 40])
@pytest.mark.parametrize("draws", [17, 50, 120])
def test_the_rows_of_a_run_are_those_of_its_steps(num_steps: int, draws: int) -> None:
    made = plan(num_steps=num_steps, mixture=Mixture([np.arange(3, 50)], [draws], seed=0))
    steps = [made.global_batch(step) for step in range(num_steps)]
    assert made.rows().tolist() == sorted({int(row) for batch in steps for row in batch})


def test_resuming_continues_the_same_order() -> None:
    made = plan()
    whole = list(made.iterate(0))
    assert list(made.iterate(0, start_step=7)) == [batch for batch in whole if batch.step >= 7]


def spread_of_a_plain_split(made: Plan) -> float:
    """Busiest rank over the mean when samples are dealt in their order, as a distributed sampler deals them."""
    works = [
        [made.costs[made.global_batch(step)[rank :: made.world_size]].sum() for rank in range(made.world_size)]
        for step in range(made.num_steps)
    ]
    return float(np.mean([max(work) / np.mean(work) for work in works]))


def test_work_is_even_over_ranks_and_within_each_micro_step() -> None:
    made = plan(num_samples=2000, world_size=4, max_samples=4, global_batch_size=64)
    assert spread_of_a_plain_split(made) > 1.15
    assert made.mean_spread() < 1.01
    ranks = [made.micro_batches(0, rank) for rank in range(4)]
    for together in zip(*ranks, strict=True):  # what runs at the same time
        work = [made.costs[list(batch.samples)].sum() for batch in together]
        assert max(work) / np.mean(work) < 1.05


def test_tokens_alone_may_bound_a_micro_batch() -> None:
    made = plan(num_samples=400, global_batch_size=64, max_samples=2**31, max_tokens=200, world_size=2)
    sizes = {len(batch.samples) for step in range(5) for rank in range(2) for batch in made.micro_batches(step, rank)}
    assert max(sizes) > min(sizes) > 2
    assert len(made.micro_batches(0, 0)) == 4  # 64 samples of 22 tokens on average: 1,400 tokens over 2 x 200


def test_impossible_sizes_are_the_users_fault() -> None:
    with pytest.raises(UserError, match=r"does not divide over 3 processes: choose a multiple .* \(6 or 9\)"):
        plan(world_size=3)
    with pytest.raises(UserError, match="8 processes are more than the 5 samples"):
        plan(num_samples=5, world_size=8)
    with pytest.raises(UserError, match=r"longest sample has .* over max_tokens_per_batch 20"):
        plan(max_tokens=20)


def test_number_of_steps_covers_the_epochs() -> None:
    assert num_steps(100, 8, 1.0, 0) == 13
    assert num_steps(100, 8, 0.5, 0) == 7
    assert num_steps(100, 8, 3.0, 5) == 5


def test_evaluation_gives_every_rank_as_many_batches_and_counts_each_once() -> None:
    batches = [(0, 1), (2,), (3, 4), (5,), (6,)]
    dealt = [deal_in_order(batches, rank, 2) for rank in range(2)]
    assert [len(mine) for mine in dealt] == [3, 3]
    assert sorted(batch.samples for mine in dealt for batch, counts in mine if counts) == batches


def test_batches_in_order_keep_order_and_bounds() -> None:
    lengths = np.array([5, 5, 9, 1, 1, 1, 1])
    assert in_order(lengths, np.arange(7), 3, 10) == [(0, 1), (2, 3), (4, 5, 6)]
