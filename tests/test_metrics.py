"""metrics: the formulas against slow, obvious oracles; intervals and their degenerate inputs."""

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score, roc_curve

from fractal.selection import metrics

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


# ---- curves, abstaining, tests of significance, ratios ---------------------------------------------------------------


@given(ROWS)
def test_the_curve_is_best_of_k_at_every_k_by_exact_fractions(rows):
    """Group by group, with the binomials as whole numbers."""
    scores, passed = columns(rows)
    n = len(rows)
    for k, found in enumerate(metrics.best_of_k_curve(scores, passed), 1):
        expected, above = Fraction(0), 0
        for score in sorted(set(scores), reverse=True):
            tied = [p for s, p in rows if s == score]
            chance = Fraction(math.comb(n - above, k) - math.comb(n - above - len(tied), k), math.comb(n, k))
            expected += chance * Fraction(sum(tied), len(tied))
            above += len(tied)
        assert found == pytest.approx(float(expected), abs=1e-12)
        assert metrics.best_of_k(scores, passed, k) == found


def test_the_curve_of_a_thousand_samples_ends_at_the_top_one():
    rng = np.random.default_rng(0)
    scores, passed = rng.normal(size=1000), rng.random(1000) < 0.3
    curve = metrics.best_of_k_curve(scores, passed)
    assert curve[0] == pytest.approx(passed.mean())
    assert curve[-1] == passed[scores.argmax()]


def slow_bands(table, resamples, seed):
    """Column by column, resample by resample."""
    return [metrics.bootstrap_interval(column, resamples=resamples, seed=seed) for column in np.array(table).T]


@settings(max_examples=30)
@given(st.lists(st.tuples(*[st.floats(-1, 1)] * 3), min_size=1, max_size=12), st.integers(0, 3))
def test_bands_equal_a_bootstrap_of_each_column(table, seed):
    found = metrics.bootstrap_bands(table, resamples=200, seed=seed)
    for one, expected in zip(found, slow_bands(table, 200, seed), strict=True):
        assert (one.mean, one.low, one.high) == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-9)
        assert one.low <= one.mean <= one.high


def test_bands_do_not_depend_on_the_order_of_adding():
    """The same columns in another place of the matrix, so that the product blocks them differently: the same bits."""
    table = np.random.default_rng(3).random((173, 50))
    found = metrics.bootstrap_bands(table, resamples=500)
    for k in (0, 7, 31, 49):
        (alone,) = metrics.bootstrap_bands(table[:, [k]], resamples=500)
        assert (alone.low, alone.high) == (found[k].low, found[k].high)


@pytest.mark.parametrize("table", [[], [[]], [1.0], [[2.0]], [[math.nan]]])
def test_bands_refuse_nonsense(table):
    with pytest.raises(ValueError, match="bands"):
        metrics.bootstrap_bands(table)


@settings(max_examples=60)
@given(GROUPED)
def test_the_mean_curve_within_a_problem_has_the_within_problem_auc_as_its_area(rows):
    scores, passed, groups = columns(rows)
    curve = metrics.within_problem_roc(scores, passed, groups)
    expected = metrics.within_problem_auc(scores, passed, groups).auc
    if expected is None:
        assert curve is None
        return
    x, y = curve.false_positive_rate, curve.true_positive_rate
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert curve.area == pytest.approx(expected)
    assert sum((b - a) * (y[i] + y[i + 1]) / 2 for i, (a, b) in enumerate(itertools.pairwise(x))) == pytest.approx(
        expected
    )
    assert x == sorted(x)
    assert y == sorted(y)


def test_the_mean_curve_weighs_problems_by_their_pairs():
    """A perfect problem of 1 pair and an upside-down one of 3: at a rate of 0, one quarter is found."""
    scores, passed, groups = [2, 1, 5, 6, 7, 4], [1, 0, 0, 0, 0, 1], [1, 1, 2, 2, 2, 2]
    curve = metrics.within_problem_roc(scores, passed, groups)
    assert curve.area == pytest.approx(0.25)
    assert dict(zip(curve.false_positive_rate, curve.true_positive_rate, strict=True))[0.0] == pytest.approx(0.25)


@given(ROWS)
def test_one_problem_s_mean_curve_is_its_roc_curve(rows):
    scores, passed = columns(rows)
    pooled, within = metrics.roc(scores, passed), metrics.within_problem_roc(scores, passed, [0] * len(rows))
    if pooled is None:
        assert within is None
        return
    assert pooled.area == pytest.approx(metrics.auc(scores, passed))
    corners = set(zip(within.false_positive_rate, np.round(within.true_positive_rate, 9), strict=True))
    on_jump = {x: [y for a, y in corners if a == x] for x, _ in corners}
    for x, y in zip(pooled.false_positive_rate, pooled.true_positive_rate, strict=True):
        assert min(on_jump[x]) - 1e-9 <= y <= max(on_jump[x]) + 1e-9


@given(st.integers(2, 40), st.integers(2, 60), st.integers(0, 5))
def test_thinning_keeps_the_ends_and_the_area_and_stays_on_the_curve(points, samples, seed):
    rng = np.random.default_rng(seed)
    whole = metrics.roc(rng.normal(size=samples), np.arange(samples) % 2)
    thin = metrics.thin_roc(whole, points)
    pairs = list(zip(thin.false_positive_rate, thin.true_positive_rate, strict=True))
    assert len(pairs) <= points
    assert (pairs[0], pairs[-1]) == ((0, 0), (1, 1))
    assert set(pairs) <= set(zip(whole.false_positive_rate, whole.true_positive_rate, strict=True))
    assert thin.area == whole.area


SURE = st.lists(st.tuples(st.sampled_from([0.1, 0.4, 0.9]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=5)


@settings(max_examples=60)
@given(SURE)
def test_selective_equals_the_mean_over_all_orders_of_ties(rows):
    orders = [
        o for o in itertools.permutations(rows) if [c for c, _ in o] == sorted((c for c, _ in rows), reverse=True)
    ]
    found = metrics.selective(*columns(rows), resamples=20)
    for i, rate in enumerate(found.pass_rate, 1):
        expected = sum(sum(p for _, p in o[:i]) / i for o in orders) / len(orders)
        assert rate.mean == pytest.approx(expected)
        assert rate.low <= rate.mean <= rate.high
        assert found.coverage[i - 1] == i / len(rows)
        assert found.threshold[i - 1] == orders[0][i - 1][0]
    assert found.area == pytest.approx(sum(rate.mean for rate in found.pass_rate) / len(rows))


@settings(max_examples=30)
@given(SURE, st.randoms())
def test_selective_ignores_the_order_of_the_problems(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert metrics.selective(*columns(rows), resamples=50) == metrics.selective(*columns(shuffled), resamples=50)


def test_selective_bands_equal_a_slow_bootstrap():
    rng = np.random.default_rng(5)
    sure, passed = rng.permutation(40).astype(float), (rng.random(40) < 0.6).astype(float)
    found = metrics.selective(sure, passed, resamples=400, seed=2)
    by_rank = passed[np.argsort(-sure)]
    rows = np.random.default_rng(2).integers(0, 40, size=(400, 40), dtype=np.int32)
    for i in (1, 10, 40):
        rates = [by_rank[sorted(row)][:i].mean() for row in rows]
        low, high = np.quantile(rates, [0.025, 0.975])
        assert (found.pass_rate[i - 1].low, found.pass_rate[i - 1].high) == pytest.approx((low, high), abs=1e-9)


def test_equal_confidences_still_have_a_band():
    found = metrics.selective([1.0] * 20, [0.0, 1.0] * 10, resamples=500)
    assert all(rate.mean == 0.5 and rate.low < 0.4 and rate.high > 0.6 for rate in found.pass_rate)


@given(st.integers(0, 30), st.integers(0, 30))
def test_the_sign_test_is_the_exact_binomial_test(wins, losses):
    found = metrics.sign_test(wins, losses)
    if not wins + losses:
        assert found is None
    else:
        assert found == pytest.approx(binomtest(wins, wins + losses, 0.5).pvalue)


@settings(max_examples=50)
@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), min_size=1, max_size=8), st.data())
def test_the_test_of_picks_equals_every_outcome_counted(chances, data):
    passes = data.draw(st.integers(0, len(chances)))
    total = dict.fromkeys(range(len(chances) + 1), 0.0)
    for verdicts in itertools.product([0, 1], repeat=len(chances)):
        total[sum(verdicts)] += math.prod(c if v else 1 - c for c, v in zip(chances, verdicts, strict=True))
    expected = min(1, 2 * min(sum(total[j] for j in total if j <= passes), sum(total[j] for j in total if j >= passes)))
    found = metrics.picks_test(passes, chances)
    if set(chances) <= {0.0, 1.0}:
        assert found is None
    else:
        assert found == pytest.approx(expected)


def test_the_test_of_picks_is_the_binomial_test_where_all_chances_are_one_half():
    assert metrics.picks_test(14, [0.5] * 20) == pytest.approx(metrics.sign_test(14, 6))


TRIPLES = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=15
)


@settings(max_examples=40)
@given(TRIPLES)
def test_gap_closed_equals_a_loop_over_resamples(rows):
    critic = [c if 0 < r < 1 else r for c, r in rows]
    random = [r for _, r in rows]
    oracle = [float(r > 0) for r in random]
    found = metrics.gap_closed(critic, random, oracle, resamples=100)
    gain, room = np.subtract(critic, random), np.subtract(oracle, random)
    if not room.sum():
        assert found is None
        return
    rng, shares = np.random.default_rng(0), []
    for row in rng.integers(0, len(rows), size=(100, len(rows)), dtype=np.int32):
        if room[row].sum():
            shares.append(gain[row].sum() / room[row].sum())
    low, high = np.quantile(shares, [0.025, 0.975])
    mean = gain.sum() / room.sum()
    assert (found.mean, found.low, found.high) == pytest.approx((mean, min(low, mean), max(high, mean)))


def test_gap_closed_is_zero_for_random_and_one_for_the_oracle():
    random, oracle = [0.25, 0.5, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]
    assert metrics.gap_closed(random, random, oracle) == metrics.Interval(0, 0, 0)
    assert metrics.gap_closed(oracle, random, oracle) == metrics.Interval(1, 1, 1)


@settings(max_examples=30)
@given(ROWS)
def test_the_pooled_curve_and_its_area_are_scikit_learn_s(rows):
    scores, passed = columns(rows)
    found = metrics.roc(scores, passed)
    if found is None:
        assert len(set(passed)) == 1
        return
    x, y, _ = roc_curve(passed, scores, drop_intermediate=False)
    assert found.false_positive_rate == pytest.approx(x)
    assert found.true_positive_rate == pytest.approx(y)
    assert found.area == pytest.approx(roc_auc_score(passed, scores))
