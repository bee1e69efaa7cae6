"""metrics: the formulas against slow, obvious oracles; intervals and their degenerate inputs."""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal import metrics

settings.register_profile("untimed", deadline=None)  # a timed assertion is never a test
settings.load_profile("untimed")

SCORES = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0])  # few values: ties are the hard part
ROWS = st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=8)
GROUPED = st.lists(st.tuples(SCORES, st.booleans(), st.integers(0, 3)), min_size=1, max_size=30)
PREDICTED = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40)


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def quick(values, **options):
    return metrics.bootstrap_interval(values, resamples=200, **options)


# ---- pass@k and best-of-k --------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_equals_brute_force(passed, data):
    k = data.draw(st.integers(1, len(passed)))
    draws = list(itertools.combinations(passed, k))
    assert metrics.pass_at_k(len(passed), sum(passed), k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 0), (5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)])
def test_pass_at_k_refuses_nonsense(n, c, k):
    with pytest.raises(ValueError, match="pass_at_k"):
        metrics.pass_at_k(n, c, k)


def test_pass_at_k_of_many_samples_neither_overflows_nor_rounds_to_zero():
    assert metrics.pass_at_k(100_000, 1, 1) == pytest.approx(1e-5)
    assert metrics.pass_at_k(5000, 2500, 2500) == 1.0


@given(ROWS, st.data())
def test_best_of_k_equals_brute_force(rows, data):
    """Every draw of k, and within each the mean over those that share the highest score."""
    k = data.draw(st.integers(1, len(rows)))
    outcomes = []
    for draw in itertools.combinations(rows, k):
        top = max(score for score, _ in draw)
        tied = [passed for score, passed in draw if score == top]
        outcomes.append(sum(tied) / len(tied))
    assert metrics.best_of_k(*columns(rows), k) == pytest.approx(sum(outcomes) / len(outcomes))


@given(ROWS, st.data())
def test_best_of_k_joins_the_quantities_beside_it(rows, data):
    """k = 1 is random; knowing the labels is pass@k; one score for all is random at any k."""
    scores, passed = columns(rows)
    k = data.draw(st.integers(1, len(rows)))
    assert metrics.best_of_k(scores, passed, 1) == pytest.approx(np.mean(passed))
    assert metrics.best_of_k(passed, passed, k) == pytest.approx(metrics.pass_at_k(len(passed), sum(passed), k))
    assert metrics.best_of_k([1.0] * len(passed), passed, k) == pytest.approx(np.mean(passed))


@given(ROWS, st.randoms(), st.data())
def test_best_of_k_ignores_order_and_scale(rows, random, data):
    k = data.draw(st.integers(1, len(rows)))
    scores, passed = columns(rows)
    shuffled = random.sample(rows, len(rows))
    assert metrics.best_of_k(*columns(shuffled), k) == pytest.approx(metrics.best_of_k(scores, passed, k))
    assert metrics.best_of_k(np.exp(scores), passed, k) == pytest.approx(metrics.best_of_k(scores, passed, k))


def test_best_of_k_ranks_unknown_last():
    assert metrics.best_of_k([-math.inf, -9.0, -math.inf], [True, False, True], 3) == 0


@pytest.mark.parametrize(
    ("scores", "passed", "k"),
    [
        ([1.0], [True], 0),
        ([1.0], [True], 2),
        ([math.nan], [True], 1),
        ([1.0, 2.0], [True], 1),
        ([], [], 1),
        ([1], [2], 1),
    ],
)
def test_best_of_k_refuses_nonsense(scores, passed, k):
    with pytest.raises(ValueError, match=r"k=|NaN|lengths|at least one|neither"):
        metrics.best_of_k(scores, passed, k)


# ---- ordering --------------------------------------------------------------------------------------------------------


@given(ROWS)
def test_auc_equals_counting_pairs(rows):
    scores, passed = columns(rows)
    pairs = [(a, b) for (a, right), (b, wrong) in itertools.product(rows, rows) if right and not wrong]
    expected = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs) if pairs else None
    assert metrics.auc(scores, passed) == (None if expected is None else pytest.approx(expected))


@settings(max_examples=50)
@given(GROUPED)
def test_within_problem_auc_equals_counting_pairs(rows):
    scores, passed, groups = columns(rows)
    pairs = [
        (a, b, g) for (a, right, g), (b, wrong, h) in itertools.product(rows, rows) if g == h and right and not wrong
    ]
    found = metrics.within_problem_auc(scores, passed, groups)
    assert found.pairs == len(pairs)
    assert found.problems == len({g for _, _, g in pairs})
    if pairs:
        assert found.auc == pytest.approx(sum((a > b) + (a == b) / 2 for a, b, _ in pairs) / len(pairs))
        assert found.accuracy == pytest.approx(sum(a > b for a, b, _ in pairs) / len(pairs))
        assert found.interval.low <= found.auc <= found.interval.high
    else:
        assert (found.auc, found.accuracy, found.interval) == (None, None, None)


def test_within_problem_auc_sees_through_knowing_only_the_problem():
    """A score per problem looks good when pooled and orders nothing within a problem."""
    passed = [True, True, True, False, True, False, False, False]
    groups = [1] * 4 + [2] * 4
    scores = [2.0] * 4 + [-2.0] * 4
    assert metrics.auc(scores, passed) == 0.75
    assert metrics.within_problem_auc(scores, passed, groups).auc == 0.5
    assert metrics.problem_mean_accuracy(passed, groups) == 0.75


# ---- accuracy and calibration ----------------------------------------------------------------------------------------


@given(GROUPED)
def test_knowing_the_problem_beats_the_majority_and_one_problem_equals_it(rows):
    _, passed, groups = columns(rows)
    assert metrics.problem_mean_accuracy(passed, groups) >= metrics.majority_accuracy(passed) - 1e-12 >= 0.5 - 1e-12
    assert metrics.problem_mean_accuracy(passed, [0] * len(passed)) == pytest.approx(metrics.majority_accuracy(passed))


@given(PREDICTED)
def test_calibration_error_equals_a_loop_over_bins(rows):
    """Bins are (low, high], the first one closed; edges as numpy spaces them."""
    edges = list(np.linspace(0, 1, 16))
    expected = 0.0
    for low, high in itertools.pairwise(edges):
        inside = [(q, p) for q, p in rows if low < q <= high or (low == 0 and q == 0)]
        if inside:
            expected += abs(sum(q for q, _ in inside) - sum(p for _, p in inside)) / len(rows)
    assert metrics.expected_calibration_error(*columns(rows)) == pytest.approx(expected)
    assert sum(one.samples for one in metrics.reliability(*columns(rows))) == len(rows)


@given(PREDICTED)
def test_brier_and_accuracy_are_perfect_for_the_labels_themselves(rows):
    _, passed = columns(rows)
    assert metrics.brier(passed, passed) == metrics.expected_calibration_error(passed, passed) == 0
    assert metrics.accuracy(passed, passed) == 1
    assert metrics.brier([0.5] * len(passed), passed) == 0.25


@pytest.mark.parametrize("measure", [metrics.brier, metrics.accuracy, metrics.expected_calibration_error])
@pytest.mark.parametrize("bad", [1.5, -0.1, math.nan])
def test_a_probability_outside_0_to_1_is_refused(measure, bad):
    with pytest.raises(ValueError, match="outside"):
        measure([0.5, bad], [True, False])


# ---- intervals -------------------------------------------------------------------------------------------------------

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20)


@settings(max_examples=50)
@given(VALUES)
def test_interval_contains_the_mean_and_stays_within_the_values(values):
    found = quick(values)
    assert found.low <= found.mean <= found.high
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert min(values) - 1e-9 <= found.low
    assert found.high <= max(values) + 1e-9


def test_interval_equals_scipy():
    from scipy import stats

    values = np.random.default_rng(1).binomial(1, 0.4, 60).astype(float)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    ours = metrics.bootstrap_interval(values, resamples=20_000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_interval_does_not_depend_on_how_resamples_are_chunked(monkeypatch):
    values = np.random.default_rng(2).random(37)
    whole = quick(values)
    monkeypatch.setattr(metrics, "_CHUNK", 100)
    assert quick(values) == whole


def test_a_weighted_mean_divides_each_resample_by_its_own_weights():
    found = quick([1.0, 0.0], weights=[3, 1])
    assert (found.mean, found.low, found.high) == (0.75, 0.0, 1.0)


@given(VALUES)
def test_a_difference_from_itself_is_zero(values):
    assert metrics.bootstrap_difference(values, values) == metrics.Interval(0, 0, 0)


def test_a_paired_difference_is_narrower_than_either_interval():
    hardness = np.random.default_rng(3).random(50)
    gain = metrics.bootstrap_difference(hardness + 0.1, hardness)
    alone = metrics.bootstrap_interval(hardness)
    assert gain.mean == pytest.approx(0.1)
    assert gain.high - gain.low < 0.01 < alone.high - alone.low


@pytest.mark.parametrize("values", [[0.3], [1.0] * 9, [0.0, 0.0], [0.1] * 7])
def test_degenerate_values_give_a_point_without_a_warning(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.bootstrap_interval(values) == metrics.Interval(values[0], values[0], values[0])


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ([], {}),
        ([math.nan], {}),
        ([math.inf, 1], {}),
        ([[1.0]], {}),
        ([1, 2], {"level": 1}),
        ([1, 2], {"resamples": 0}),
        ([1, 2], {"weights": [1, 0]}),
        ([1, 2], {"weights": [1]}),
    ],
)
def test_interval_refuses_nonsense(values, options):
    with pytest.raises(ValueError, match=r"."):
        metrics.bootstrap_interval(values, **options)
