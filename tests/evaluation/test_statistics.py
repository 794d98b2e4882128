import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_kit.evaluation.statistics import agreement, bootstrap_mean, holm, mcnemar, sign_flip, wilson


def test_wilson_against_published_figures():
    # Brown, Cai and DasGupta 2001, and R's binom.confint(method = "wilson").
    found = wilson(5, 50)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0435, 0.2136)
    found = wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 0) is None
    with pytest.raises(ValueError):
        wilson(3, 2)


@given(st.integers(0, 400), st.integers(1, 400))
def test_wilson_holds_its_rate_and_mirrors(events, number):
    events = min(events, number)
    found, mirrored = wilson(events, number), wilson(number - events, number)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert math.isclose(found.low, 1 - mirrored.high, abs_tol=1e-9)
    if events == 0:
        assert found.high == min(1, 3 / number) and found.low == 0


def test_wilson_covers_the_truth_in_repeated_trials():
    random = np.random.default_rng(1)
    for rate in (0.02, 0.1, 0.5):
        events = random.binomial(150, rate, 2000)
        covered = np.mean([wilson(int(count), 150).low <= rate <= wilson(int(count), 150).high for count in events])
        assert covered > 0.92, rate


def test_bootstrap_draws_whole_clusters():
    alone = bootstrap_mean([0.0, 1.0] * 50, [str(number) for number in range(100)])
    assert alone.value == 0.5 and alone == bootstrap_mean([0.0, 1.0] * 50, [str(number) for number in range(100)])
    assert math.isclose(alone.high - alone.low, 2 * 1.96 * 0.05, rel_tol=0.1), "the textbook interval of 100 independent values"
    # Ten hazards of ten equal outcomes say no more than ten outcomes.
    together = bootstrap_mean([0.0] * 50 + [1.0] * 50, [str(number // 10) for number in range(100)])
    assert together.high - together.low > 2.5 * (alone.high - alone.low)
    assert bootstrap_mean([], []) is None
    with pytest.raises(ValueError):
        bootstrap_mean([1.0], [])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_intervals_and_p_values_stay_in_range(values):
    clusters = [str(index % 7) for index in range(len(values))]
    found = bootstrap_mean(values, clusters)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert 0 < sign_flip(values, clusters) <= 1
    assert math.isclose(sign_flip(values, clusters), sign_flip([-value for value in values], clusters))


def test_sign_flip_knows_a_clear_difference_from_none():
    clusters = [str(number) for number in range(30)]
    assert sign_flip([0.3] * 30, clusters) < 0.001
    assert sign_flip([0.3, -0.3] * 15, clusters) > 0.5
    assert sign_flip([0.0] * 30, clusters) == 1.0
    assert sign_flip([0.3] * 30, ["one hazard"] * 30) > 0.3, "one cluster is one observation"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar_equals_the_exact_sum(pairs):
    first, second = [one for one, _ in pairs], [other for _, other in pairs]
    b, c = sum(one and not other for one, other in pairs), sum(other and not one for one, other in pairs)
    exact = min(Fraction(1), 2 * sum((Fraction(math.comb(b + c, k), 2 ** (b + c)) for k in range(min(b, c) + 1)), Fraction(0))) if b + c else 1
    assert math.isclose(mcnemar(first, second), exact, rel_tol=1e-9)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_of_many_scenarios_does_not_overflow():
    assert mcnemar([True] * 3000, [False] * 3000) == 0 or mcnemar([True] * 3000, [False] * 3000) < 1e-300
    assert mcnemar([True, False] * 1500, [False, True] * 1500) == 1


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({}) == {} and holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_none_and_bonferroni(values):
    given_values = {str(number): value for number, value in enumerate(values)}
    for name, adjusted in holm(given_values).items():
        assert given_values[name] - 1e-12 <= adjusted <= min(1, given_values[name] * len(values)) + 1e-12


def test_agreement():
    assert agreement([1, 2, 3], [1, 2, 3]) == 1 and agreement([1, 1], [1, 1]) is None
    assert agreement([0, 100, 0, 100], [100, 0, 100, 0]) < 0
    assert abs(agreement([0, 0, 100, 100], [0, 100, 0, 100])) < 1e-9
