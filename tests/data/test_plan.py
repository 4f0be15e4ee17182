"""The order of samples depends on seed and data alone, and bins respect both bounds."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavaforge.data.plan import Plan, in_order, num_steps
from llavaforge.errors import UserError


def plan(num_samples: int = 50, **changes: Any) -> Plan:
    lengths = np.random.default_rng(1).integers(5, 40, num_samples)
    values: dict[str, Any] = {
        "samples": np.arange(num_samples),
        "lengths": lengths,
        "num_supervised": lengths // 2,
        "global_batch_size": 8,
        "num_steps": 13,
        "seed": 0,
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


def test_resuming_continues_the_same_order() -> None:
    made = plan()
    whole = list(made.iterate(0))
    assert list(made.iterate(0, start_step=7)) == [batch for batch in whole if batch.step >= 7]


def test_bins_are_balanced() -> None:
    made = plan(world_size=4, max_samples=2)
    tokens = [made.lengths[list(batch.samples)].sum() for rank in range(4) for batch in made.micro_batches(0, rank)]
    assert max(tokens) - min(tokens) < made.lengths.max()


def test_impossible_sizes_are_the_users_fault() -> None:
    with pytest.raises(UserError, match="does not divide over 3 processes"):
        plan(world_size=3)
    with pytest.raises(UserError, match=r"longest sample has .* over max_tokens_per_batch 20"):
        plan(max_tokens=20)


def test_number_of_steps_covers_the_epochs() -> None:
    assert num_steps(100, 8, 1.0, 0) == 13
    assert num_steps(100, 8, 0.5, 0) == 7
    assert num_steps(100, 8, 3.0, 5) == 5


def test_batches_in_order_keep_order_and_bounds() -> None:
    lengths = np.array([5, 5, 9, 1, 1, 1, 1])
    assert in_order(lengths, np.arange(7), 3, 10) == [(0, 1), (2, 3), (4, 5, 6)]
