"""The numbers: pass@k, best-of-k, AUC and ROC, calibration, abstaining, tests, and bootstrap intervals over problems.

Pure functions of plain sequences; nothing is read, written or remembered. A value that does not exist (an AUC of one
class) is None; an input that makes no sense is a ValueError.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

BINS = 15  # Guo et al. 2017, section 4.1
RESAMPLES = 10_000
ROC_POINTS = 300  # kept of a curve
_CHUNK = 1 << 20  # resampled values held at a time: 8 MiB
_KEPT = 1 << 22  # of drawn counts, kept for the next interval over as many problems: 8 MiB


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over problems and its bootstrap interval: low <= mean <= high."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ProblemPairs:
    """One problem's pairs of a passing and a failing sample, and how their scores stand."""

    pairs: int
    right: int  # the passing sample has the higher score
    tied: int


@dataclass(frozen=True, slots=True)
class WithinProblemAuc:
    """How well scores order the samples of the same problem, over all pairs of a passing and a failing one."""

    auc: float | None  # ties count one half; None if there is no pair
    accuracy: float | None  # pairwise accuracy: ties count as wrong; None if there is no pair
    interval: Interval | None  # of auc, over the problems that have pairs; its mean is auc
    pairs: int
    problems: int  # that have at least one pair


@dataclass(frozen=True, slots=True)
class Bin:
    """The samples whose predicted probability falls into (low, high]; the first bin includes its low end."""

    low: float
    high: float
    samples: int
    probability: float | None  # mean prediction; None if the bin is empty
    pass_rate: float | None


@dataclass(frozen=True, slots=True)
class Roc:
    """A ROC curve from (0, 0) to (1, 1): true positive rate over false positive rate, by falling score."""

    false_positive_rate: list[float]
    true_positive_rate: list[float]
    area: float  # of all points, also where some have been left out since


@dataclass(frozen=True, slots=True)
class Selective:
    """One entry per number of problems answered, 1..P: the surest ones."""

    coverage: list[float]  # 1/P .. 1
    pass_rate: list[Interval]  # of the answered ones
    threshold: list[float]  # the lowest confidence among them
    area: float  # mean pass rate over the coverages; 1 - area is the area under the risk-coverage curve


# ---- best of n -------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples passes, estimated from n samples of which c passed.

    Unbiased: 1 - C(n-c, k) / C(n, k), Chen et al. 2021, arXiv:2107.03374, section 2.1; exact integers, then one
    division. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: n={n}, c={c}, k={k}: expected 0 <= c <= n and 1 <= k <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def best_of_k(scores: ArrayLike, passed: ArrayLike, k: int) -> float:
    """Expected pass of the highest-scoring of k samples drawn without replacement from one problem's n.

    Exact: with a samples scored above a group of m ties, the best of the draw lies in the group with probability
    (C(n-a, k) - C(n-a-m, k)) / C(n, k), and by symmetry each tied sample is then equally likely to be taken. A score
    may be -inf (nothing known: ranks last). k = 1 is the mean of `passed`; `passed` as the score gives pass@k.
    Raises ValueError unless 1 <= k <= n, or if a score is NaN or +inf.
    """
    curve = best_of_k_curve(scores, passed)
    if not 1 <= k <= len(curve):
        raise ValueError(f"best_of_k: k={k}, expected 1..{len(curve)}, the number of samples")
    return float(curve[k - 1])


def best_of_k_curve(scores: ArrayLike, passed: ArrayLike) -> Floats:
    """(n,) `best_of_k` of one problem for k = 1..n."""
    s, p = _floats("scores", scores), _flags(passed)
    _same_length(s, p)
    if np.isnan(s).any() or np.isposinf(s).any():
        raise ValueError("best_of_k: a score is NaN or +inf")
    order = np.argsort(-s, kind="stable")
    s, p = s[order], p[order]
    starts = np.flatnonzero(np.r_[True, s[1:] != s[:-1]])  # first position of each group of equal scores
    ends = np.r_[starts[1:], len(s)]
    missed = _all_below(len(s))
    rates = np.add.reduceat(p, starts) / (ends - starts)
    curve: Floats = ((missed[starts] - missed[ends]) * rates[:, None]).sum(axis=0)
    return curve.clip(0, 1)  # rounding can leave it just outside


@lru_cache(maxsize=64)
def _all_below(n: int) -> Floats:
    """(n+1, n) chance that a draw of k from n has none of the top a, for a = 0..n, k = 1..n: C(n-a, k) / C(n, k)."""
    a, k = np.arange(n)[:, None], np.arange(1, n + 1)
    return np.vstack([np.ones(n), np.cumprod(np.maximum(n - a - k, 0) / (n - a), axis=0)])


# ---- ordering --------------------------------------------------------------------------------------------------------


def auc(scores: ArrayLike, passed: ArrayLike) -> float | None:
    """Area under the ROC curve over all samples pooled; None if they are all of one class.

    Pooled AUC also rewards knowing which problems are easy; see `within_problem_auc` for what selection needs.
    """
    curve = roc(scores, passed)
    return None if curve is None else curve.area


def within_problem_auc(scores: ArrayLike, passed: ArrayLike, groups: Sequence[Hashable]) -> WithinProblemAuc:
    """Share of the pairs of a passing and a failing sample of the same problem that the scores order rightly.

    `groups` names each sample's problem. All pairs count the same, so a problem counts by its number of pairs
    (c * (n - c)); ties count one half. The interval resamples problems (`bootstrap_interval`).
    """
    s, p = _finite("scores", scores), _flags(passed)
    _same_length(s, p, groups)
    found = [_pairs(s[rows], p[rows]) for rows in _rows_by_group(groups)]
    found = [one for one in found if one.pairs]
    if not found:
        return WithinProblemAuc(None, None, None, 0, 0)
    pairs = sum(one.pairs for one in found)
    shares = [(one.right + one.tied / 2) / one.pairs for one in found]
    interval = bootstrap_interval(shares, weights=[one.pairs for one in found])
    return WithinProblemAuc(interval.mean, sum(one.right for one in found) / pairs, interval, pairs, len(found))


def _pairs(scores: Floats, passed: Floats) -> ProblemPairs:
    above, below = scores[passed == 1], scores[passed == 0]
    right, tied = above[:, None] > below, above[:, None] == below
    return ProblemPairs(right.size, int(right.sum()), int(tied.sum()))


def roc(scores: ArrayLike, passed: ArrayLike) -> Roc | None:
    """The ROC curve of all samples pooled, with a point for every threshold; None if they are all of one class."""
    s, p = _finite("scores", scores), _flags(passed)
    _same_length(s, p)
    if p.all() or not p.any():
        return None
    return _roc(*_steps(s, p))


def within_problem_roc(scores: ArrayLike, passed: ArrayLike, groups: Sequence[Hashable]) -> Roc | None:
    """The mean of the problems' own ROC curves at each false positive rate, weighted by their pairs c * (n - c).

    Vertical averaging, Fawcett 2006 (An introduction to ROC analysis), section 9.1, at every rate where one of the
    curves has a corner, so nothing is lost: the area is `within_problem_auc(...).auc`. None if no problem has both
    classes.
    """
    s, p = _finite("scores", scores), _flags(passed)
    _same_length(s, p, groups)
    curves = []
    for rows in _rows_by_group(groups):
        own_s, own_p = s[rows], p[rows]
        if own_p.any() and not own_p.all():
            curves.append((float(own_p.sum() * (1 - own_p).sum()), *_corners(own_s, own_p)))
    if not curves:
        return None
    # the same rate, i / m, is the same float in every problem, as division rounds correctly
    rates = np.unique(np.concatenate([corner for _, corner, _, _ in curves]))
    total = math.fsum(weight for weight, *_ in curves)
    lower, upper = np.zeros_like(rates), np.zeros_like(rates)
    for weight, corner, low, high in curves:
        at = np.searchsorted(corner, rates, side="right") - 1
        after = np.minimum(at + 1, len(corner) - 1)
        hit = corner[at] == rates
        with np.errstate(invalid="ignore"):
            part = np.where(hit, 0.0, (rates - corner[at]) / (corner[after] - corner[at]))
        rising = high[at] + np.where(hit, 0.0, part * (low[after] - high[at]))
        upper += weight / total * rising
        lower += weight / total * np.where(hit, low[at], rising)
    return _roc(np.repeat(rates, 2), np.ravel(np.column_stack([lower, upper])))


def _steps(scores: Floats, passed: Floats) -> tuple[Floats, Floats]:
    """False and true positive rates from (0, 0) on, a step for each group of equal scores: a tie is a slope."""
    order = np.argsort(-scores, kind="stable")
    scores, passed = scores[order], passed[order]
    last = np.r_[np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1]  # of each group
    right, wrong = np.cumsum(passed)[last], np.cumsum(1 - passed)[last]
    return np.r_[0.0, wrong / wrong[-1]], np.r_[0.0, right / right[-1]]


def _corners(scores: Floats, passed: Floats) -> tuple[Floats, Floats, Floats]:
    """A ROC curve's false positive rates, and the lowest and highest true positive rate at each."""
    wrong, right = _steps(scores, passed)
    rates, first = np.unique(wrong, return_index=True)
    return rates, right[first], right[np.r_[first[1:], len(wrong)] - 1]


def _roc(false_positive: Floats, true_positive: Floats) -> Roc:
    area = math.fsum(np.diff(false_positive) * (true_positive[1:] + true_positive[:-1]) / 2)
    # rounding may leave the means just outside; the ends are what the definition says
    true_positive = np.clip(np.maximum.accumulate(true_positive), 0, 1)
    true_positive[-1] = 1.0
    return Roc(false_positive.tolist(), true_positive.tolist(), area)


def thin_roc(curve: Roc, points: int = ROC_POINTS) -> Roc:
    """At most `points` of a curve's points, evenly along its way, both ends among them; the area stays the whole's."""
    x, y = np.array(curve.false_positive_rate), np.array(curve.true_positive_rate)
    if points < 2:
        raise ValueError(f"points={points}, expected at least 2")
    if len(x) <= points:
        return curve
    way = x + y  # both rise, so this is the distance walked
    kept = np.unique(np.searchsorted(way, np.linspace(0, way[-1], points), side="left").clip(0, len(x) - 1))
    kept[0], kept[-1] = 0, len(x) - 1
    return Roc(x[kept].tolist(), y[kept].tolist(), curve.area)


# ---- accuracy and calibration ----------------------------------------------------------------------------------------


def accuracy(probabilities: ArrayLike, passed: ArrayLike) -> float:
    """Share of samples whose prediction (probability >= 0.5 means "passes") is right. Read it beside the two below."""
    q, p = _probabilities(probabilities), _flags(passed)
    _same_length(q, p)
    return float(np.mean((q >= 0.5) == (p == 1)))


def majority_accuracy(passed: ArrayLike) -> float:
    """Accuracy of always predicting the more frequent label."""
    share = float(_flags(passed).mean())
    return max(share, 1 - share)


def problem_mean_accuracy(passed: ArrayLike, groups: Sequence[Hashable]) -> float:
    """Accuracy of predicting each problem's own majority label for all of its samples.

    What an oracle reaches that knows how hard each problem is and never looks at a program.
    """
    p = _flags(passed)
    _same_length(p, groups)
    counts = [(p[rows].sum(), len(rows)) for rows in _rows_by_group(groups)]
    return float(sum(max(c, n - c) for c, n in counts) / len(p))


def brier(probabilities: ArrayLike, passed: ArrayLike) -> float:
    """Mean squared difference of predicted probability and label: Brier 1950. 0 is perfect, 0.25 is always 0.5."""
    q, p = _probabilities(probabilities), _flags(passed)
    _same_length(q, p)
    return float(np.mean((q - p) ** 2))


def reliability(probabilities: ArrayLike, passed: ArrayLike, bins: int = BINS) -> list[Bin]:
    """Mean prediction and pass rate of the samples in each of `bins` equal-width bins of predicted probability."""
    q, p = _probabilities(probabilities), _flags(passed)
    _same_length(q, p)
    if bins < 1:
        raise ValueError(f"bins={bins}, expected at least 1")
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, q, side="left") - 1, 0, bins - 1)
    found = []
    for i in range(bins):
        inside = place == i
        count = int(inside.sum())
        means = (float(q[inside].mean()), float(p[inside].mean())) if count else (None, None)
        found.append(Bin(float(edges[i]), float(edges[i + 1]), count, *means))
    return found


def expected_calibration_error(probabilities: ArrayLike, passed: ArrayLike, bins: int = BINS) -> float:
    """Mean distance of prediction and pass rate over equal-width bins, weighted by the samples in each.

    Guo et al. 2017, arXiv:1706.04599, equation 3, on the probability of passing (not of the predicted class).
    """
    gap, samples = 0.0, 0
    for one in reliability(probabilities, passed, bins):
        if one.probability is not None and one.pass_rate is not None:
            gap += one.samples * abs(one.probability - one.pass_rate)
            samples += one.samples
    return gap / samples


# ---- abstaining ------------------------------------------------------------------------------------------------------


def selective(
    confidences: ArrayLike, passed: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Selective:
    """Pass rate against coverage when only the surest problems are answered.

    One confidence and one verdict (0..1) of the chosen sample per problem. Selective classification: El-Yaniv and
    Wiener 2010; the curve and its area as in Geifman and El-Yaniv 2017, arXiv:1705.08500. Where the edge falls among
    equal confidences, the mean over all orders of them is taken, so the order of the problems changes nothing.
    Intervals resample problems and rank each resample anew, equal confidences in random order.
    """
    c, p = _finite("confidences", confidences), _finite("passed", passed)
    _same_length(c, p)
    order = np.lexsort((p, -c))  # a function of the pairs, not of their order
    c, p = c[order], p[order]
    count = np.arange(1, len(c) + 1)
    starts = np.flatnonzero(np.r_[True, c[1:] != c[:-1]])
    sizes = np.diff(np.r_[starts, len(c)])
    group = np.repeat(np.arange(len(starts)), sizes)
    expected = np.repeat(np.add.reduceat(p, starts) / sizes, sizes)
    before = np.r_[0.0, np.cumsum(p)][starts][group]
    means = (before + (count - starts[group]) * expected) / count
    rates = np.empty((resamples, len(c)))
    rng, done = np.random.default_rng((seed, 1)), 0
    for rows in _resampled(len(c), resamples, seed):
        rank = group[rows] + rng.random(rows.shape)
        ranked = np.take_along_axis(rows, np.argsort(rank, axis=1), axis=1)
        rates[done : done + len(rows)] = np.cumsum(p[ranked], axis=1) / count
        done += len(rows)
    bands = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    found = [_around(*one) for one in zip(means.tolist(), *bands.tolist(), strict=True)]
    return Selective((count / len(c)).tolist(), found, c.tolist(), math.fsum(means) / len(c))


# ---- tests of significance -------------------------------------------------------------------------------------------


def sign_test(wins: int, losses: int) -> float | None:
    """Two-sided p-value of the exact sign test (McNemar's on paired verdicts): are wins as likely as losses?

    Binomial with chance one half, ties left out (Dixon and Mood 1946). None without a win or a loss.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"sign_test: wins={wins}, losses={losses}: expected counts")
    n = wins + losses
    if not n:
        return None
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def picks_test(passes: int, chances: Sequence[float]) -> float | None:
    """Two-sided p-value: would picks at random, problem i's passing with `chances[i]`, pass as often as `passes`?

    The number of passes is then Poisson binomial (Wang 1993); its distribution is added up exactly, and the smaller
    tail doubled. The sign test does not fit here: against an expectation a win is not as likely as a loss. None if
    every chance is 0 or 1, as nothing is left to choice.
    """
    p = _probabilities(chances)
    if not ((p > 0) & (p < 1)).any():
        return None
    if not 0 <= passes <= len(p):
        raise ValueError(f"picks_test: passes={passes}, expected 0..{len(p)}")
    chance_of = np.ones(1)  # [j]: of j passes so far
    for one in p:
        chance_of = np.r_[chance_of * (1 - one), 0.0] + np.r_[0.0, chance_of * one]
    return min(1.0, 2 * min(math.fsum(chance_of[: passes + 1]), math.fsum(chance_of[passes:])))


# ---- intervals -------------------------------------------------------------------------------------------------------


def bootstrap_interval(
    values: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of one value per problem, with the percentile bootstrap interval over problems.

    Efron and Tibshirani 1993, chapter 13. Give a value per problem, never per sample: samples of one problem are not
    independent. With `weights` (> 0) the mean is weighted and each resample divides by its own weights. The same seed
    and number of problems give the same resamples, so vectors of the same problems can be compared.

    One problem, or the same value for all, gives low == mean == high: the bootstrap has then seen no variation, which
    does not mean that there is none. Raises ValueError on no values, or values that are not finite.
    """
    v = _finite("values", values)
    w = np.ones_like(v) if weights is None else _finite("weights", weights)
    _same_length(v, w)
    if (w <= 0).any():
        raise ValueError("a weight is not above 0")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level={level}, resamples={resamples}: expected 0 < level < 1 and resamples >= 1")
    if (v == v[0]).all():
        return Interval(float(v[0]), float(v[0]), float(v[0]))
    mean = math.fsum(v * w) / math.fsum(w)
    if weights is None:
        means = _resampled_sums(v[:, None], resamples, seed)[:, 0] / len(v)
    else:
        sums = _resampled_sums(np.column_stack([v * w, w]), resamples, seed)
        means = sums[:, 0] / sums[:, 1]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return _around(mean, float(low), float(high))


def _around(mean: float, low: float, high: float) -> Interval:
    """A handful of resamples, or rounding, can leave the mean just outside."""
    return Interval(mean, min(low, mean), max(high, mean))


def _resampled(problems: int, resamples: int, seed: int) -> Iterator[NDArray[np.int32]]:
    """Chunks of resamples, (some, problems) places each: the same for the same number of problems and seed."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // problems)
    for start in range(0, resamples, step):
        yield rng.integers(0, problems, size=(min(step, resamples - start), problems), dtype=np.int32)


def _times_drawn(problems: int, resamples: int, seed: int) -> Iterable[NDArray[np.int16]]:
    """The same resamples as counts: (some, problems), how often each problem is in each of them."""
    if problems * resamples <= _KEPT:
        return (_all_drawn(problems, resamples, seed),)
    return map(_counted, _resampled(problems, resamples, seed))


@lru_cache(maxsize=8)
def _all_drawn(problems: int, resamples: int, seed: int) -> NDArray[np.int16]:
    return np.concatenate([_counted(rows) for rows in _resampled(problems, resamples, seed)])


def _counted(rows: NDArray[np.int32]) -> NDArray[np.int16]:
    number, problems = rows.shape
    flat = rows + problems * np.arange(number)[:, None]
    return np.bincount(flat.ravel(), minlength=rows.size).reshape(rows.shape).astype(np.int16)


def _resampled_sums(values: Floats, resamples: int, seed: int) -> Floats:
    """(resamples, K) sums of each column of (problems, K) values over each resample; the same bits on every machine.

    A column's values are rounded to a grid on which any sum of as many is below 2**53 steps, and so exact, whatever
    order a matrix product's threads add in. That costs at most 1e-15 of the largest value for each problem.
    """
    largest = np.abs(values).max(axis=0) * len(values)
    exponent = 52 - np.ceil(np.log2(np.where(largest > 0, largest, 1)))
    grid = np.ldexp(1.0, np.minimum(exponent, 1000).astype(int))  # (K,)
    whole = np.rint(values * grid)
    sums: Floats = np.concatenate([drawn @ whole for drawn in _times_drawn(len(values), resamples, seed)]) / grid
    return sums


def bootstrap_bands(
    values: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """`bootstrap_interval` of each column of (problems, K) values in -1..1, all columns on the same resamples.

    One matrix product instead of K bootstraps; the same numbers. Pointwise: 95 % holds for
    each column, not for all at once. Raises ValueError as `bootstrap_interval` does.
    """
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 2 or not v.size or not (np.abs(v) <= 1).all():
        raise ValueError(f"bands: expected (problems, K) values in -1..1, got shape {v.shape}")
    means = _resampled_sums(v, resamples, seed) / len(v)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    found = []
    for k, column in enumerate(v.T):
        same = bool((column == column[0]).all())
        found.append(
            Interval(*[float(column[0])] * 3)
            if same
            else _around(math.fsum(column) / len(column), float(low[k]), float(high[k]))
        )
    return found


def gap_closed(
    critic: ArrayLike,
    random: ArrayLike,
    oracle: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Share of the way from random to the oracle: (critic - random) / (oracle - random), each a mean over problems.

    0 is random, 1 the oracle, below 0 worse than random. Paired percentile bootstrap over problems of the ratio of
    means (Efron and Tibshirani 1993, section 10.6); resamples in which the oracle is no better than random say
    nothing and are left out. None where that holds for the problems themselves: no choice makes a difference there.
    """
    c, r, o = _finite("critic", critic), _finite("random", random), _finite("oracle", oracle)
    _same_length(c, r, o)
    room = math.fsum(o - r)
    if not room > 0:
        return None
    above, below = _resampled_sums(np.column_stack([c - r, o - r]), resamples, seed).T
    shares = above[below > 0] / below[below > 0]
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return _around(math.fsum(c - r) / room, float(low), float(high))


def bootstrap_difference(
    values: ArrayLike, baseline: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of values - baseline, problem by problem, with its paired bootstrap interval over problems.

    The two hold the same problems in the same order. Both are resampled together, so what makes a problem easy or
    hard for both cancels out. Degenerate inputs as in `bootstrap_interval`.
    """
    v, b = _finite("values", values), _finite("baseline", baseline)
    _same_length(v, b)
    return bootstrap_interval(v - b, level=level, resamples=resamples, seed=seed)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _floats(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name}: expected a sequence of at least one number, got shape {array.shape}")
    return array


def _finite(name: str, values: ArrayLike) -> Floats:
    array = _floats(name, values)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: a value is not finite")
    return array


def _probabilities(values: ArrayLike) -> Floats:
    array = _floats("probabilities", values)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError("probabilities: a value is outside 0..1")
    return array


def _flags(values: ArrayLike) -> Floats:
    array = _floats("passed", values)
    if not np.isin(array, (0, 1)).all():
        raise ValueError("passed: a value is neither 0 nor 1")
    return array


def _same_length(*columns: Any) -> None:
    lengths = {len(column) for column in columns}
    if len(lengths) != 1:
        raise ValueError(f"columns of different lengths: {', '.join(str(len(column)) for column in columns)}")


def _rows_by_group(groups: Sequence[Hashable]) -> list[NDArray[np.intp]]:
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return [np.array(found, dtype=np.intp) for found in rows.values()]
