"""The statistics against their formulas, tables and worked examples."""

import math

import pytest

from llavaforge.comparison.spread import compare_all, difference, holm, t_probability, t_quantile


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 40.0])
def test_students_t_is_that_of_the_closed_forms(t: float) -> None:
    assert t_probability(t, 1) == pytest.approx(2 / math.pi * math.atan(t))
    assert t_probability(t, 2) == pytest.approx(t / math.sqrt(2 + t * t))
    assert t_probability(t, 3) == pytest.approx(
        2 / math.pi * (math.atan(t / math.sqrt(3)) + t * math.sqrt(3) / (t * t + 3))
    )
    assert t_probability(t, 4) == pytest.approx(t * (t * t + 6) / (t * t + 4) ** 1.5)
    assert t_probability(-t, 4) == t_probability(t, 4)
    assert t_probability(t, 100_000) == pytest.approx(math.erf(t / math.sqrt(2)), abs=1e-4)


@pytest.mark.parametrize(
    ("probability", "freedom", "printed"),  # of any table
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 4, 2.776), (0.95, 5, 2.571), (0.99, 9, 3.250), (0.999, 20, 3.850)],
)
def test_quantiles_are_those_of_the_tables(probability: float, freedom: int, printed: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(printed, abs=6e-4)
    assert t_probability(t_quantile(probability, freedom), freedom) == pytest.approx(probability)


def test_a_paired_comparison_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt 3; with two degrees of freedom P = t / sqrt(2 + t^2).
    found = difference("loss", "a", "b", {0: 11.0, 1: 22.0, 2: 33.0}, {2: 30.0, 1: 20.0, 0: 10.0})
    assert (found.num_seeds, found.mean) == (3, 2.0)
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3))
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3))


def test_holms_example() -> None:
    # Four at 5 %: 0.005 * 4, 0.01 * 3, then 0.03 * 2, and 0.04 no less than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_many_comparisons_ask_for_more_than_one() -> None:
    near = {"a": {0: 1.0, 1: 1.1, 2: 0.9}, "b": {0: 1.5, 1: 1.75, 2: 1.3}}
    (alone,) = compare_all({"loss": near})
    assert (alone.verdict, alone.p) == ("exceeds", alone.p_among_all)
    noise = {"c": {0: 1.0, 1: 9.0, 2: 4.0}, "d": {0: 5.0, 1: 2.0, 2: 3.0}}
    among = compare_all({"loss": near | noise})
    assert len(among) == 6
    assert (among[0].p, among[0].verdict) == (alone.p, "alone")
    assert {one.verdict for one in among[1:]} == {"within"}


def test_what_is_not_known_is_not_claimed() -> None:
    (one_seed,) = compare_all({"loss": {"a": {0: 1.0}, "b": {0: 2.0}}})
    assert (one_seed.verdict, one_seed.p) == ("too few seeds", None)
    (no_spread,) = compare_all({"exact_match": {"a": {0: 0.2, 1: 0.4}, "b": {0: 0.5, 1: 0.7}}})
    assert (no_spread.verdict, no_spread.low) == ("no spread", None)
    (equal,) = compare_all({"exact_match": {"a": {0: 0.2, 1: 0.4}, "b": {0: 0.2, 1: 0.4}}})
    assert (equal.verdict, equal.mean) == ("within", 0.0)
    assert not compare_all({"loss": {"a": {0: 1.0}, "b": {1: 2.0}}})  # no seed in common


def test_the_same_noise_seldom_exceeds() -> None:
    """Of 400 comparisons of two variants that are the same, five seeds each, about one in twenty."""
    import numpy as np

    draws = np.random.default_rng(0).normal(size=(400, 2, 5))
    of = [{name: dict(enumerate(map(float, row))) for name, row in zip("ab", pair, strict=True)} for pair in draws]
    false = sum(compare_all({"loss": one})[0].verdict == "exceeds" for one in of)
    assert 8 <= false <= 35
