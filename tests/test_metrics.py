"""selection's figures: the formulas against slow, obvious oracles; intervals and their degenerate inputs."""

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fractal.selection import bootstrap, curves, metrics
from fractal.selection.bootstrap import Interval, bootstrap_bands, bootstrap_interval, gap_closed
from fractal.selection.curves import best_of_k_curve

settings.register_profile("untimed", deadline=None, max_examples=60)  # a timed assertion is never a test
settings.load_profile("untimed")

SCORES = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0])  # few values: ties are the hard part
ROWS = st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=8)
GROUPED = st.lists(st.tuples(SCORES, st.booleans(), st.integers(0, 3)), min_size=1, max_size=30)
PREDICTED = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40)
VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20)
SURE = st.lists(st.tuples(st.sampled_from([0.1, 0.4, 0.9]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=5)


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def close(interval, mean, low, high):
    """The interval holds its mean, whatever the resamples are."""
    return (interval.mean, interval.low, interval.high) == pytest.approx(
        (mean, min(low, mean), max(high, mean)), abs=1e-9
    )


# ---- pass@k and best of k --------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_equals_brute_force(passed, data):
    k = data.draw(st.integers(1, len(passed)))
    draws = list(itertools.combinations(passed, k))
    assert metrics.pass_at_k(len(passed), sum(passed), k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_of_many_samples_neither_overflows_nor_rounds_to_zero():
    assert metrics.pass_at_k(100_000, 1, 1) == pytest.approx(1e-5)
    assert metrics.pass_at_k(5000, 2500, 2500) == 1.0


@given(ROWS)
def test_best_of_k_equals_brute_force_and_joins_the_quantities_beside_it(rows):
    """Every draw of k, and within each the mean over those that share the highest score."""
    scores, passed = columns(rows)
    curve, top = best_of_k_curve(scores, passed), best_of_k_curve(passed, passed)
    for k in range(1, len(rows) + 1):
        draws = []
        for draw in itertools.combinations(rows, k):
            tied = [verdict for score, verdict in draw if score == max(score for score, _ in draw)]
            draws.append(sum(tied) / len(tied))
        assert curve[k - 1] == pytest.approx(sum(draws) / len(draws))
        assert top[k - 1] == pytest.approx(metrics.pass_at_k(len(passed), sum(passed), k))
    assert curve[0] == pytest.approx(np.mean(passed))
    assert best_of_k_curve([1.0] * len(passed), passed) == pytest.approx(np.full(len(passed), np.mean(passed)))


@given(ROWS, st.randoms())
def test_best_of_k_ignores_order_and_scale_and_equals_exact_fractions(rows, random):
    """Group by group, with the binomials as whole numbers."""
    scores, passed = columns(rows)
    curve, n = best_of_k_curve(scores, passed), len(rows)
    assert best_of_k_curve(*columns(random.sample(rows, n))) == pytest.approx(curve)
    assert best_of_k_curve(np.exp(scores), passed) == pytest.approx(curve)
    for k in range(1, n + 1):
        expected, above = Fraction(0), 0
        for score in sorted(set(scores), reverse=True):
            tied = [p for s, p in rows if s == score]
            chance = Fraction(math.comb(n - above, k) - math.comb(n - above - len(tied), k), math.comb(n, k))
            expected += chance * Fraction(sum(tied), len(tied))
            above += len(tied)
        assert curve[k - 1] == pytest.approx(float(expected), abs=1e-12)


def test_best_of_k_ranks_unknown_last_and_a_thousand_samples_end_at_the_top_one():
    assert best_of_k_curve([-math.inf, -9.0, -math.inf], [True, False, True])[2] == 0
    rng = np.random.default_rng(0)
    scores, passed = rng.normal(size=1000), rng.random(1000) < 0.3
    curve = best_of_k_curve(scores, passed)
    assert (curve[0], curve[-1]) == (pytest.approx(passed.mean()), passed[scores.argmax()])


# ---- order within and across problems --------------------------------------------------------------------------------


@given(GROUPED)
def test_within_problem_auc_equals_counting_pairs_and_is_the_area_of_the_mean_curve(rows):
    scores, passed, groups = columns(rows)
    pairs = [
        (a, b, g) for (a, right, g), (b, wrong, h) in itertools.product(rows, rows) if g == h and right and not wrong
    ]
    within = metrics.within_problem_auc(scores, passed, groups)
    curve = curves.within_problem_roc(scores, passed, groups)
    assert (within.pairs, within.problems) == (len(pairs), len({g for _, _, g in pairs}))
    if not pairs:
        assert (within.auc, within.accuracy, within.interval, curve) == (None, None, None, None)
        return
    assert within.auc == pytest.approx(sum((a > b) + (a == b) / 2 for a, b, _ in pairs) / len(pairs))
    assert within.accuracy == pytest.approx(sum(a > b for a, b, _ in pairs) / len(pairs))
    assert within.interval.low <= within.auc <= within.interval.high
    x, y = curve.false_positive_rate, curve.true_positive_rate
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert curve.area == pytest.approx(within.auc)
    assert np.trapezoid(y, x) == pytest.approx(within.auc)
    assert (x, y) == (sorted(x), sorted(y))


@given(ROWS)
def test_the_pooled_curve_and_its_area_are_those_of_every_threshold(rows):
    scores, passed = columns(rows)
    positives, negatives = sum(passed), len(passed) - sum(passed)
    curve = curves.roc(scores, passed)
    within = curves.within_problem_roc(scores, passed, [0] * len(rows))
    if curve is None:
        assert len(set(passed)) == 1
        assert (metrics.auc(scores, passed), within) == (None, None)
        return
    thresholds = [math.inf, *sorted(set(scores), reverse=True)]
    above = [[one for score, one in zip(scores, passed, strict=True) if score >= limit] for limit in thresholds]
    x = [(len(taken) - sum(taken)) / negatives for taken in above]
    y = [sum(taken) / positives for taken in above]
    area = sum(
        (b - a) * (low + high) / 2
        for (a, b), (low, high) in zip(itertools.pairwise(x), itertools.pairwise(y), strict=True)
    )
    assert curve.false_positive_rate == pytest.approx(x)
    assert curve.true_positive_rate == pytest.approx(y)
    assert curve.area == metrics.auc(scores, passed) == pytest.approx(area)
    for rate, height in zip(x, y, strict=True):  # of one problem, the mean curve is its ROC curve
        at = [b for a, b in zip(within.false_positive_rate, within.true_positive_rate, strict=True) if a == rate]
        assert min(at) - 1e-9 <= height <= max(at) + 1e-9


def test_within_problem_auc_sees_through_knowing_only_the_problem():
    """A score per problem looks good when pooled and orders nothing within a problem."""
    passed = [True, True, True, False, True, False, False, False]
    groups, scores = [1] * 4 + [2] * 4, [2.0] * 4 + [-2.0] * 4
    assert metrics.auc(scores, passed) == metrics.problem_mean_accuracy(passed, groups) == 0.75
    assert metrics.within_problem_auc(scores, passed, groups).auc == 0.5


def test_the_mean_curve_weighs_problems_by_their_pairs():
    """A perfect problem of 1 pair and an upside-down one of 3: at a rate of 0, one quarter is found."""
    curve = curves.within_problem_roc([2, 1, 5, 6, 7, 4], [1, 0, 0, 0, 0, 1], [1, 1, 2, 2, 2, 2])
    assert curve.area == pytest.approx(0.25)
    assert dict(zip(curve.false_positive_rate, curve.true_positive_rate, strict=True))[0.0] == pytest.approx(0.25)


@given(st.integers(2, 40), st.integers(2, 60), st.integers(0, 5))
def test_thinning_keeps_the_ends_and_the_area_and_stays_on_the_curve(points, samples, seed):
    rng = np.random.default_rng(seed)
    whole = curves.roc(rng.normal(size=samples), np.arange(samples) % 2)
    thin = curves.thin_roc(whole, points)
    pairs = list(zip(thin.false_positive_rate, thin.true_positive_rate, strict=True))
    assert len(pairs) <= max(points, 2)
    assert (pairs[0], pairs[-1], thin.area) == ((0, 0), (1, 1), whole.area)
    assert set(pairs) <= set(zip(whole.false_positive_rate, whole.true_positive_rate, strict=True))


# ---- accuracy and calibration ----------------------------------------------------------------------------------------


@given(GROUPED)
def test_knowing_the_problem_beats_the_majority_and_one_problem_equals_it(rows):
    _, passed, groups = columns(rows)
    majority = metrics.majority_accuracy(passed)
    assert metrics.problem_mean_accuracy(passed, groups) >= majority - 1e-12 >= 0.5 - 1e-12
    assert metrics.problem_mean_accuracy(passed, [0] * len(passed)) == pytest.approx(majority)


@given(PREDICTED)
def test_calibration_and_accuracy_equal_loops(rows):
    """Bins are (low, high], the first one closed; edges as numpy spaces them."""
    expected = 0.0
    for low, high in itertools.pairwise(np.linspace(0, 1, 16)):
        inside = [(q, p) for q, p in rows if low < q <= high or (low == 0 and q == 0)]
        expected += abs(sum(q for q, _ in inside) - sum(p for _, p in inside)) / len(rows)
    predicted, passed = columns(rows)
    assert metrics.expected_calibration_error(predicted, passed) == pytest.approx(expected)
    assert sum(part.samples for part in metrics.reliability(predicted, passed)) == len(rows)
    assert metrics.accuracy(predicted, passed) == sum((q >= 0.5) == p for q, p in rows) / len(rows)
    assert metrics.brier(predicted, passed) == pytest.approx(sum((q - p) ** 2 for q, p in rows) / len(rows))
    assert metrics.brier(passed, passed) == metrics.expected_calibration_error(passed, passed) == 0


# ---- intervals -------------------------------------------------------------------------------------------------------


@given(VALUES)
def test_interval_contains_the_mean_and_stays_within_the_values(values):
    interval = bootstrap_interval(values, resamples=200)
    assert min(values) - 1e-9 <= interval.low <= interval.mean <= interval.high <= max(values) + 1e-9
    assert interval.mean == pytest.approx(np.mean(values), abs=1e-9)


def test_interval_equals_scipy_and_does_not_depend_on_chunks_or_the_cache(monkeypatch):
    values = np.random.default_rng(1).binomial(1, 0.4, 60).astype(float)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    ours = bootstrap_interval(values, resamples=20_000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    for name, value in (("CHUNK", 100), ("CACHED", 0)):
        monkeypatch.setattr(bootstrap, name, value)
        bootstrap._counts.cache_clear()
        assert bootstrap_interval(values, resamples=20_000) == ours


def test_weights_and_pairs():
    """A weighted mean divides each resample by its own weights; a paired difference is narrower than either interval."""
    assert bootstrap_interval([1.0, 0.0], weights=[3, 1], resamples=200) == Interval(0.75, 0.0, 1.0)
    hardness = np.random.default_rng(3).random(50)
    gain, alone = bootstrap_interval(hardness + 0.1 - hardness), bootstrap_interval(hardness)
    assert gain.mean == pytest.approx(0.1)
    assert gain.high - gain.low < 0.01 < alone.high - alone.low


def test_an_end_that_is_zero_is_zero_in_whatever_order_it_was_added():
    """Gains of 0.38 and -0.38 cancel; left-over bits must not decide whether zero is inside."""
    values = [0.38, -0.38, 1 - 0.62, 0.62 - 1] * 8
    interval = bootstrap_interval(values)
    assert (interval.low, interval.high) == (round(interval.low, 12), round(interval.high, 12))


@pytest.mark.parametrize("values", [[0.3], [1.0] * 9, [0.0, 0.0], [0.1] * 7])
def test_degenerate_values_give_a_point_without_a_warning(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap_interval(values) == Interval(values[0], values[0], values[0])


@settings(max_examples=30)
@given(st.lists(st.tuples(*[st.floats(-1, 1)] * 3), min_size=1, max_size=12))
def test_bands_equal_a_bootstrap_of_each_column(table):
    bands = bootstrap_bands(table, resamples=200)
    for band, column in zip(bands, np.array(table).T, strict=True):
        expected = bootstrap_interval(column, resamples=200)
        assert close(band, expected.mean, expected.low, expected.high)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=15
    )
)  # fmt: skip
def test_gap_closed_equals_a_loop_over_resamples(rows):
    critic = [c if 0 < r < 1 else r for c, r in rows]
    random = [r for _, r in rows]
    oracle = [float(r > 0) for r in random]
    interval = gap_closed(critic, random, oracle, resamples=100)
    gain, room = np.subtract(critic, random), np.subtract(oracle, random)
    if not room.sum():
        assert interval is None
        return
    draws = np.random.default_rng(0).integers(0, len(rows), size=(100, len(rows)), dtype=np.int32)
    shares = [gain[draw].sum() / room[draw].sum() for draw in draws if room[draw].sum()]
    assert close(interval, gain.sum() / room.sum(), *np.quantile(shares, [0.025, 0.975]))


def test_gap_closed_is_zero_for_random_and_one_for_the_oracle():
    random, oracle = [0.25, 0.5, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]
    assert gap_closed(random, random, oracle) == Interval(0, 0, 0)
    assert gap_closed(oracle, random, oracle) == Interval(1, 1, 1)


# ---- abstaining, tests of significance -------------------------------------------------------------------------------


@given(SURE, st.randoms())
def test_selective_equals_the_mean_over_all_orders_of_ties(rows, random):
    falling = sorted((confidence for confidence, _ in rows), reverse=True)
    orders = [order for order in itertools.permutations(rows) if [c for c, _ in order] == falling]
    curve = curves.selective("critic", *columns(rows), resamples=20)
    assert curve == curves.selective("critic", *columns(random.sample(rows, len(rows))), resamples=20)
    for i, rate in enumerate(curve.pass_rate, 1):
        assert rate.mean == pytest.approx(sum(sum(p for _, p in order[:i]) / i for order in orders) / len(orders))
        assert rate.low <= rate.mean <= rate.high
        assert (curve.coverage[i - 1], curve.threshold[i - 1]) == (i / len(rows), falling[i - 1])
    assert curve.area == pytest.approx(sum(rate.mean for rate in curve.pass_rate) / len(rows))


def test_selective_bands_equal_a_slow_bootstrap_and_ties_have_a_band():
    rng = np.random.default_rng(5)
    sure, passed = rng.permutation(40).astype(float), (rng.random(40) < 0.6).astype(float)
    curve = curves.selective("critic", sure, passed, resamples=400)
    by_rank = passed[np.argsort(-sure)]
    rows = np.random.default_rng(0).integers(0, 40, size=(400, 40), dtype=np.int32)
    for i in (1, 10, 40):
        rates = [by_rank[sorted(row)][:i].mean() for row in rows]
        assert close(curve.pass_rate[i - 1], curve.pass_rate[i - 1].mean, *np.quantile(rates, [0.025, 0.975]))
    tied = curves.selective("critic", [1.0] * 20, [0.0, 1.0] * 10, resamples=500)
    assert all(rate.mean == 0.5 and rate.low < 0.4 and rate.high > 0.6 for rate in tied.pass_rate)


@given(st.integers(0, 30), st.integers(0, 30))
def test_the_sign_test_is_the_exact_binomial_test(wins, losses):
    expected = pytest.approx(stats.binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else None
    assert metrics.sign_test(wins, losses) == expected


@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), min_size=1, max_size=8), st.data())
def test_the_test_of_picks_equals_every_outcome_counted(chances, data):
    passes = data.draw(st.integers(0, len(chances)))
    below = above = 0.0
    for verdicts in itertools.product([0, 1], repeat=len(chances)):
        chance = math.prod(c if v else 1 - c for c, v in zip(chances, verdicts, strict=True))
        below += chance * (sum(verdicts) <= passes)
        above += chance * (sum(verdicts) >= passes)
    expected = None if set(chances) <= {0.0, 1.0} else pytest.approx(min(1, 2 * min(below, above)))
    assert metrics.picks_test(passes, chances) == expected
    assert metrics.picks_test(14, [0.5] * 20) == pytest.approx(metrics.sign_test(14, 6))
