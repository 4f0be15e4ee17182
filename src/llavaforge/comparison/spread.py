"""Which differences exceed the spread over seeds: paired t intervals, and Holm's correction for many comparisons.

Comes in: a measure of each variant by seed. Goes out: a `Difference` for each pair of variants.

Runs of the same seed see the same samples in the same order, so a variant is compared with another seed by seed: the
differences are what varies. Their mean is judged by Student's t (n - 1 degrees of freedom). Looking at many pairs and
measures, some differ by chance: Holm's step-down procedure (1979) holds the chance of even one false finding among all
of them at 5 %, whatever they have to do with each other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean, stdev
from typing import Literal

LEVEL = 0.05
Verdict = Literal["exceeds", "alone", "within", "no spread", "too few seeds"]
"""`exceeds`: also among all comparisons; `alone`: it would if it were the only one; `no spread`: the difference is the
same with every seed, so that nothing is known of how it varies."""


@dataclass(frozen=True)
class Difference:
    """How two variants differ in one measure.

    Attributes:
        measure: its name.
        one: a variant.
        other: the variant that is subtracted.
        num_seeds: with which both have a result.
        mean: of the differences, seed by seed.
        low: lower end of its own 95 % interval; None where there is no spread to judge by, as with the next three.
        high: upper end.
        p: chance of a mean this far from 0, or farther, if the variants were the same.
        p_among_all: the same by Holm's procedure over all comparisons.
    """

    measure: str
    one: str
    other: str
    num_seeds: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_among_all: float | None = None

    @property
    def verdict(self) -> Verdict:
        """What may be said of it."""
        if self.num_seeds < 2:
            return "too few seeds"
        if self.p is None or self.p_among_all is None:
            return "no spread" if self.mean else "within"
        if self.p_among_all <= LEVEL:
            return "exceeds"
        return "alone" if self.p <= LEVEL else "within"


def compare_all(values: Mapping[str, Mapping[str, Mapping[int, float]]]) -> list[Difference]:
    """Compare every two variants in every measure.

    Args:
        values: by measure, variant and seed.
    """
    found = [
        difference(measure, one, other, of_variants[one], of_variants[other])
        for measure, of_variants in values.items()
        for one, other in combinations(of_variants, 2)
        if of_variants[one].keys() & of_variants[other].keys()
    ]
    judged = [number for number, one in enumerate(found) if one.p is not None]
    for number, p in zip(judged, holm([found[number].p or 0.0 for number in judged]), strict=True):
        found[number] = replace(found[number], p_among_all=p)
    return found


def difference(
    measure: str, one: str, other: str, of_one: Mapping[int, float], of_other: Mapping[int, float]
) -> Difference:
    """Compare two variants by the seeds that both have."""
    seeds = sorted(of_one.keys() & of_other.keys())
    differences = [of_one[seed] - of_other[seed] for seed in seeds]
    plain = Difference(measure, one, other, len(seeds), fmean(differences))
    if len(seeds) < 2 or max(differences) - min(differences) <= 1e-12 * max(map(abs, differences)):  # rounding
        return plain
    error, freedom = stdev(differences) / math.sqrt(len(seeds)), len(seeds) - 1
    reach = t_quantile(1 - LEVEL, freedom) * error
    p = 1 - t_probability(plain.mean / error, freedom)
    return replace(plain, low=plain.mean - reach, high=plain.mean + reach, p=p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values as they count among all of these (Holm 1979, Scandinavian Journal of Statistics 6)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda one: p_values[one])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = highest
    return adjusted


def t_probability(t: float, freedom: int) -> float:
    """Return the chance that Student's t lies between -t and t (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4).

    Args:
        t: of either sign.
        freedom: degrees of freedom, a whole number above 0.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for power in range(1 if freedom % 2 else 0, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total


def t_quantile(probability: float, freedom: int) -> float:
    """Return the t with which `t_probability` is so much (by bisection)."""
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, freedom) < probability else (low, middle)
    return high
