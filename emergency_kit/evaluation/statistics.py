"""Statistics: how sure a rate or a difference between two models is.

In: outcomes, one a scenario; a scenario counts once, however many answers were drawn for it. Out: intervals and
p-values, from 0 to 1. Differences are paired (the same scenario answered by both models); the bootstrap draws
whole hazards, since two reports of one hazard are not two independent ones. Everything is seeded: equal in,
equal out. Limits: fewer than about ten hazards make a bootstrap interval too narrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Mapping, Sequence

import numpy as np

Z_95 = 1.959964
DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bounds."""

    value: float
    low: float
    high: float


def wilson(events: int, number: int) -> Interval | None:
    """A rate with Wilson's interval (Wilson 1927); None over nothing.

    Where no event was seen in n trials the upper bound is 3/n instead (the rule of three, Hanley and Lippman-Hand 1983: 95 %
    one-sided); likewise the lower bound is 1 - 3/n where every trial had one.
    """
    if not 0 <= events <= number:
        raise ValueError(f"{events} events in {number} trials")
    if number == 0:
        return None
    share, squared = events / number, Z_95 ** 2
    middle = (share + squared / (2 * number)) / (1 + squared / number)
    half = Z_95 * math.sqrt(share * (1 - share) / number + squared / (4 * number ** 2)) / (1 + squared / number)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    if events == 0:
        low, high = 0.0, min(1.0, 3 / number)
    if events == number:
        low, high = max(0.0, 1 - 3 / number), 1.0
    return Interval(share, low, high)


def bootstrap_mean(values: Sequence[float], clusters: Sequence[str], seed: int = 0) -> Interval | None:
    """Mean with its percentile interval over whole clusters drawn with replacement; None over nothing.

    Differences of two models are `values` of one minus those of the other, scenario by scenario.
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values in {len(clusters)} clusters")
    if not values:
        return None
    numbers = np.asarray(values, float)
    _, groups = np.unique(np.asarray(clusters), return_inverse=True)
    if not groups.any():  # of a single cluster its scenarios are drawn, or the interval would have no width
        groups = np.arange(len(numbers))
    sums, sizes = np.bincount(groups, numbers), np.bincount(groups)
    drawn = np.random.default_rng(seed).integers(0, len(sizes), (DRAWS, len(sizes)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(numbers.mean()), float(low), float(high))


def sign_flip(differences: Sequence[float], clusters: Sequence[str], seed: int = 0) -> float:
    """Two-sided p-value of a paired mean difference: signs of whole clusters flipped at random (a permutation test)."""
    numbers = np.asarray(differences, float)
    if not len(numbers) or not numbers.any():
        return 1.0
    _, groups = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(groups, numbers)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (DRAWS, len(sums)))
    extreme = np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12
    return float((extreme.sum() + 1) / (DRAWS + 1))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p-value that two flags of the same scenarios are equally frequent (McNemar 1947, binomial form)."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} flags beside {len(second)}")
    only_first = sum(one and not other for one, other in zip(first, second))
    only_second = sum(other and not one for one, other in zip(first, second))
    number, fewer = only_first + only_second, min(only_first, only_second)
    if number == 0:
        return 1.0
    # In logarithms: 2 ** number overflows a float from 1,024 scenarios on.
    logs = [math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1) - number * math.log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for their number (Holm 1979), in the order given: below 0.05, the family's error stays at 5 %."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, (name, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, value * (len(p_values) - rank)))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def agreement(first: Sequence[int], second: Sequence[int]) -> float | None:
    """Cohen's weighted kappa with squared weights over integer scores (Cohen 1968); None where both never vary."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} scores beside {len(second)}")
    one, other = np.asarray(first, float), np.asarray(second, float)
    expected = ((one[:, None] - other[None, :]) ** 2).mean() if len(one) else 0.0
    return None if expected == 0 else float(1 - ((one - other) ** 2).mean() / expected)
