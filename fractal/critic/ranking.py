"""How well logits rank passing samples above failing ones: AUC, pooled and within problems. Point values only.

The report's figures, with intervals, are of selection/metrics.py; these choose layers and epochs during training.
"""

import math

import numpy as np

from fractal.critic.arrays import Flags, Floats, Groups


def pair_counts(logits: Floats, passed: Flags) -> tuple[int, float]:
    """Pairs of a passing and a failing sample, and how many of them the logits order rightly; a tie counts one half.

    The Mann-Whitney U statistic: Mann and Whitney 1947.
    """
    above, below = logits[passed], np.sort(logits[~passed])
    lower, not_higher = np.searchsorted(below, above, "left"), np.searchsorted(below, above, "right")
    return len(above) * len(below), float(lower.sum() + not_higher.sum()) / 2


def auc(logits: Floats, passed: Flags) -> float | None:
    """Area under the ROC curve of all samples pooled; None if they are all of one class."""
    pairs, right = pair_counts(logits, passed)
    return right / pairs if pairs else None


def within_problem_auc(logits: Floats, passed: Flags, groups: Groups) -> float | None:
    """Share of the pairs within a problem that are ordered rightly, over all problems; None if there is no pair."""
    counts = [pair_counts(logits[groups == group], passed[groups == group]) for group in np.unique(groups)]
    total = sum(pairs for pairs, _ in counts)
    return math.fsum(right / pairs * pairs for pairs, right in counts if pairs) / total if total else None
