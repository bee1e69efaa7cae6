"""Single figures: pass@k, AUC, accuracy, calibration, tests of significance.

Pure functions of sequences of equal length, not empty. A value that does not exist (an AUC of one class) is None.
Intervals are in bootstrap.py, curves in curves.py.
"""

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from fractal.selection.bootstrap import Interval, bootstrap_interval
from fractal.selection.curves import roc, rows_by_group

BINS = 15  # Guo et al. 2017, section 4.1


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


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples passes, estimated from n samples of which c passed.

    Unbiased: 1 - C(n-c, k) / C(n, k), Chen et al. 2021, arXiv:2107.03374, section 2.1; exact integers, then one
    division. 0 <= c <= n and 1 <= k <= n.
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


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
    score, verdict = np.asarray(scores, dtype=np.float64), np.asarray(passed, dtype=bool)
    pairs, right, shares = [], 0, []
    for rows in rows_by_group(groups):
        above, below = score[rows][verdict[rows]][:, None], score[rows][~verdict[rows]]
        if count := above.size * below.size:
            higher, tied = int((above > below).sum()), int((above == below).sum())
            pairs.append(count)
            right += higher
            shares.append((higher + tied / 2) / count)
    if not pairs:
        return WithinProblemAuc(None, None, None, 0, 0)
    interval = bootstrap_interval(shares, weights=pairs)
    return WithinProblemAuc(interval.mean, right / sum(pairs), interval, sum(pairs), len(pairs))


def accuracy(predicted: ArrayLike, passed: ArrayLike) -> float:
    """Share of samples whose prediction (probability >= 0.5 means "passes") is right. Read it beside the two below."""
    return float(np.mean(np.greater_equal(predicted, 0.5) == np.asarray(passed, dtype=bool)))


def majority_accuracy(passed: ArrayLike) -> float:
    """Accuracy of always predicting the more frequent label."""
    share = float(np.asarray(passed, dtype=np.float64).mean())
    return max(share, 1 - share)


def problem_mean_accuracy(passed: ArrayLike, groups: Sequence[Hashable]) -> float:
    """Accuracy of predicting each problem's own majority label for all of its samples.

    What an oracle reaches that knows how hard each problem is and never looks at a program.
    """
    verdict = np.asarray(passed, dtype=np.float64)
    counts = [(verdict[rows].sum(), len(rows)) for rows in rows_by_group(groups)]
    return float(sum(max(c, n - c) for c, n in counts) / len(verdict))


def brier(predicted: ArrayLike, passed: ArrayLike) -> float:
    """Mean squared difference of predicted probability and label: Brier 1950. 0 is perfect, 0.25 is always 0.5."""
    return float(np.mean(np.subtract(predicted, passed, dtype=np.float64) ** 2))


def reliability(predicted: ArrayLike, passed: ArrayLike) -> list[Bin]:
    """Mean prediction and pass rate of the samples in each of BINS equal-width bins of predicted probability."""
    chance, verdict = np.asarray(predicted, dtype=np.float64), np.asarray(passed, dtype=np.float64)
    edges = np.linspace(0, 1, BINS + 1)
    number = np.clip(np.searchsorted(edges, chance, side="left") - 1, 0, BINS - 1)
    bins = []
    for i, (low, high) in enumerate(itertools.pairwise(edges.tolist())):
        inside = number == i
        means = (float(chance[inside].mean()), float(verdict[inside].mean())) if inside.any() else (None, None)
        bins.append(Bin(low, high, int(inside.sum()), *means))
    return bins


def expected_calibration_error(predicted: ArrayLike, passed: ArrayLike) -> float:
    """Mean distance of prediction and pass rate over equal-width bins, weighted by the samples in each.

    Guo et al. 2017, arXiv:1706.04599, equation 3, on the probability of passing (not of the predicted class).
    """
    bins = reliability(predicted, passed)
    gap = sum(part.samples * abs((part.probability or 0.0) - (part.pass_rate or 0.0)) for part in bins)
    return gap / sum(part.samples for part in bins)


def sign_test(wins: int, losses: int) -> float | None:
    """Two-sided p-value of the exact sign test (McNemar's on paired verdicts): are wins as likely as losses?

    Binomial with chance one half, ties left out (Dixon and Mood 1946). None without a win or a loss.
    """
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
    if not any(0 < p < 1 for p in chances):
        return None
    distribution = np.ones(1)  # [j]: chance of j passes so far
    for p in chances:
        distribution = np.r_[distribution * (1 - p), 0.0] + np.r_[0.0, distribution * p]
    return min(1.0, 2 * min(math.fsum(distribution[: passes + 1]), math.fsum(distribution[passes:])))
