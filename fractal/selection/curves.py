"""Curves: best of k for every k, ROC over all samples and within a problem, pass rate against coverage."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fractal.selection.bootstrap import RESAMPLES, Floats, Interval, interval, quantiles, resampled_rows

ROC_POINTS = 300  # kept of a curve


@dataclass(frozen=True, slots=True)
class RocCurve:
    """A ROC curve from (0, 0) to (1, 1): true positive rate over false positive rate, by falling score."""

    name: str  # "pooled" or "within problem"
    false_positive_rate: list[float]
    true_positive_rate: list[float]
    area: float  # of all points, also where some have been left out since


@dataclass(frozen=True, slots=True)
class SelectiveCurve:
    """Answering only the problems where a strategy is surest; one element per number of problems answered, 1..P."""

    strategy: str
    coverage: list[float]  # 1/P .. 1
    pass_rate: list[Interval]  # of the answered ones
    threshold: list[float]  # the lowest confidence among them
    area: float  # mean pass rate over the coverages; 1 - area is the area under the risk-coverage curve


def best_of_k_curve(scores: ArrayLike, passed: ArrayLike) -> Floats:
    """(n,) expected pass of the highest-scoring of k samples drawn without replacement from one problem's n, k = 1..n.

    Exact: with a samples scored above a group of m ties, the best of the draw lies in the group with probability
    (C(n-a, k) - C(n-a-m, k)) / C(n, k), and by symmetry each tied sample is then equally likely to be taken. A score
    may be -inf (nothing known: ranks last). k = 1 is the mean of `passed`; `passed` as the score gives pass@k.
    """
    score, verdict = np.asarray(scores, dtype=np.float64), np.asarray(passed, dtype=np.float64)
    order = np.argsort(-score, kind="stable")
    score, verdict = score[order], verdict[order]
    starts = np.flatnonzero(np.r_[True, score[1:] != score[:-1]])  # first row of each group of equal scores
    ends = np.r_[starts[1:], len(score)]
    missed = _all_below(len(score))
    rates = np.add.reduceat(verdict, starts) / (ends - starts)
    curve: Floats = ((missed[starts] - missed[ends]) * rates[:, None]).sum(axis=0)
    return curve.clip(0, 1)  # rounding can leave it just outside


@lru_cache(maxsize=64)
def _all_below(n: int) -> Floats:
    """(n+1, n) chance that a draw of k from n has none of the top a, for a = 0..n, k = 1..n: C(n-a, k) / C(n, k)."""
    above, k = np.arange(n)[:, None], np.arange(1, n + 1)
    return np.vstack([np.ones(n), np.cumprod(np.maximum(n - above - k, 0) / (n - above), axis=0)])


def roc(scores: ArrayLike, passed: ArrayLike) -> RocCurve | None:
    """The ROC curve of all samples pooled, with a point for every threshold; None if they are all of one class."""
    score, verdict = np.asarray(scores, dtype=np.float64), np.asarray(passed, dtype=np.float64)
    if verdict.all() or not verdict.any():
        return None
    return _curve("pooled", *_steps(score, verdict))


def within_problem_roc(scores: ArrayLike, passed: ArrayLike, groups: Sequence[Hashable]) -> RocCurve | None:
    """The mean of the problems' own ROC curves at each false positive rate, weighted by their pairs c * (n - c).

    Vertical averaging, Fawcett 2006 (An introduction to ROC analysis), section 9.1, at every rate where one of the
    curves has a corner, so nothing is lost: the area is `within_problem_auc(...).auc`. None if no problem has both
    classes.
    """
    score, verdict = np.asarray(scores, dtype=np.float64), np.asarray(passed, dtype=np.float64)
    curves = []
    for rows in rows_by_group(groups):
        own = verdict[rows]
        if own.any() and not own.all():
            curves.append((float(own.sum() * (1 - own).sum()), *_steps(score[rows], own)))
    if not curves:
        return None
    # The same rate, i / m, is the same float in every problem, as division rounds correctly.
    rates = np.unique(np.concatenate([wrong for _, wrong, _ in curves]))
    total = math.fsum(weight for weight, *_ in curves)
    lower, upper = np.zeros_like(rates), np.zeros_like(rates)
    for weight, wrong, right in curves:  # where a curve rises steeply, interp takes the last of the points
        upper += weight / total * np.interp(rates, wrong, right)
        lower += weight / total * np.interp(-rates[::-1], -wrong[::-1], right[::-1])[::-1]
    return _curve("within problem", np.repeat(rates, 2), np.ravel(np.column_stack([lower, upper])))


def rows_by_group(groups: Sequence[Hashable]) -> list[NDArray[np.intp]]:
    """The row numbers of each group, groups in the order in which they first appear."""
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return [np.array(numbers, dtype=np.intp) for numbers in rows.values()]


def _steps(scores: Floats, passed: Floats) -> tuple[Floats, Floats]:
    """False and true positive rates from (0, 0) on, a step for each group of equal scores: a tie is a slope."""
    order = np.argsort(-scores, kind="stable")
    scores, passed = scores[order], passed[order]
    last = np.r_[np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1]  # of each group
    right, wrong = np.cumsum(passed)[last], np.cumsum(1 - passed)[last]
    return np.r_[0.0, wrong / wrong[-1]], np.r_[0.0, right / right[-1]]


def _curve(name: str, false_positive: Floats, true_positive: Floats) -> RocCurve:
    area = math.fsum(np.diff(false_positive) * (true_positive[1:] + true_positive[:-1]) / 2)
    # Rounding may leave the means just outside; the ends are what the definition says.
    true_positive = np.clip(np.maximum.accumulate(true_positive), 0, 1)
    true_positive[-1] = 1.0
    return RocCurve(name, false_positive.tolist(), true_positive.tolist(), area)


def thin_roc(curve: RocCurve, points: int = ROC_POINTS) -> RocCurve:
    """At most `points` (>= 2) of a curve's points, evenly along its length, both ends kept; the area stays as it is."""
    x, y = np.array(curve.false_positive_rate), np.array(curve.true_positive_rate)
    if len(x) <= points:
        return curve
    length = x + y  # both rise, so this is the distance along the axes
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], points), side="left").clip(0, len(x) - 1))
    kept[0], kept[-1] = 0, len(x) - 1
    return RocCurve(curve.name, x[kept].tolist(), y[kept].tolist(), curve.area)


def selective(
    strategy: str, confidences: ArrayLike, passed: ArrayLike, *, resamples: int = RESAMPLES
) -> SelectiveCurve:
    """Pass rate against coverage when only the surest problems are answered.

    One confidence and one verdict (0..1) of the chosen sample per problem. Selective classification: El-Yaniv and
    Wiener 2010; the curve and its area as in Geifman and El-Yaniv 2017, arXiv:1705.08500. Where the edge falls among
    equal confidences, the mean over all orders of them is taken, so the order of the problems changes nothing.
    Intervals resample problems and rank each resample anew, equal confidences in random order.
    """
    sure, verdict = np.asarray(confidences, dtype=np.float64), np.asarray(passed, dtype=np.float64)
    order = np.lexsort((verdict, -sure))  # a function of the pairs, not of their order
    sure, verdict = sure[order], verdict[order]
    count = np.arange(1, len(sure) + 1)
    starts = np.flatnonzero(np.r_[True, sure[1:] != sure[:-1]])
    sizes = np.diff(np.r_[starts, len(sure)])
    group = np.repeat(np.arange(len(starts)), sizes)
    expected = np.repeat(np.add.reduceat(verdict, starts) / sizes, sizes)
    before = np.r_[0.0, np.cumsum(verdict)][starts][group]
    means = (before + (count - starts[group]) * expected) / count
    rates = np.empty((resamples, len(sure)))
    rng, done = np.random.default_rng((0, 1)), 0
    for rows in resampled_rows(len(sure), resamples):
        rank = group[rows] + rng.random(rows.shape)
        ranked = np.take_along_axis(rows, np.argsort(rank, axis=1), axis=1)
        rates[done : done + len(rows)] = np.cumsum(verdict[ranked], axis=1) / count
        done += len(rows)
    low, high = quantiles(rates).tolist()
    bands = [interval(*ends) for ends in zip(means.tolist(), low, high, strict=True)]
    return SelectiveCurve(strategy, (count / len(sure)).tolist(), bands, sure.tolist(), math.fsum(means) / len(sure))
