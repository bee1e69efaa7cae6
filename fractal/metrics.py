"""The numbers: pass@k, best-of-k, AUC, calibration, and bootstrap intervals over problems.

Pure functions of plain sequences; nothing is read, written or remembered. A value that does not exist (an AUC of one
class) is None; an input that makes no sense is a ValueError.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

BINS = 15  # Guo et al. 2017, section 4.1
_CHUNK = 1 << 20  # resampled values held at a time: 8 MiB


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
    s, p = _floats("scores", scores), _flags(passed)
    _same_length(s, p)
    if np.isnan(s).any() or np.isposinf(s).any():
        raise ValueError("best_of_k: a score is NaN or +inf")
    if not 1 <= k <= len(s):
        raise ValueError(f"best_of_k: k={k}, expected 1..{len(s)}, the number of samples")
    order = np.argsort(-s, kind="stable")
    s, p = s[order], p[order]
    starts = np.flatnonzero(np.r_[True, s[1:] != s[:-1]])  # first position of each group of equal scores
    ends = np.r_[starts[1:], len(s)]
    missed = _all_below(len(s), k)
    return float(np.dot(missed[starts] - missed[ends], np.add.reduceat(p, starts) / (ends - starts)))


@lru_cache(maxsize=4096)
def _all_below(n: int, k: int) -> Floats:
    """(n+1,) chance that a draw of k from n has none of the top a, for a = 0..n: C(n-a, k) / C(n, k)."""
    return np.array([math.comb(n - a, k) / math.comb(n, k) for a in range(n + 1)])


# ---- ordering --------------------------------------------------------------------------------------------------------


def auc(scores: ArrayLike, passed: ArrayLike) -> float | None:
    """Area under the ROC curve over all samples pooled; None if they are all of one class.

    Pooled AUC also rewards knowing which problems are easy; see `within_problem_auc` for what selection needs.
    """
    s, p = _finite("scores", scores), _flags(passed)
    _same_length(s, p)
    if p.all() or not p.any():
        return None
    from sklearn.metrics import roc_auc_score  # takes 2 s: selection does without

    return float(roc_auc_score(p, s))


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


# ---- intervals -------------------------------------------------------------------------------------------------------


def bootstrap_interval(
    values: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
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
    mean = float(np.dot(v, w) / w.sum())
    if (v == v[0]).all():
        return Interval(float(v[0]), float(v[0]), float(v[0]))
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _CHUNK // len(v))
    for start in range(0, resamples, step):
        rows = rng.integers(0, len(v), size=(min(step, resamples - start), len(v)), dtype=np.int32)
        total = len(v) if weights is None else w[rows].sum(axis=1)
        means[start : start + step] = (v * w)[rows].sum(axis=1) / total
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # a handful of resamples, or rounding, can leave the mean just outside
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def bootstrap_difference(
    values: ArrayLike, baseline: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
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
