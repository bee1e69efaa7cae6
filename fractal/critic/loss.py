"""The critic's loss: binary cross-entropy with balanced classes, plus a pairwise term within each problem."""

import numpy as np
import torch
from torch.nn import functional

from fractal.critic.arrays import Flags, Groups


def loss(logits: torch.Tensor, passed: torch.Tensor, pairs: torch.Tensor, share: float | None = None) -> torch.Tensor:
    """Binary cross-entropy with both classes weighing the same, plus the mean of -log sigmoid(better - worse).

    logits (N,), passed (N,) of 0 and 1, pairs (P, 2): a passing and a failing sample of one problem. `share` of the
    training samples that pass; of these ones if not given. The pairwise term is RankNet's: Burges et al. 2005,
    "Learning to rank using gradient descent", section 3.
    """
    p = float(passed.mean()) if share is None else share
    p = min(max(p, 1e-6), 1 - 1e-6)
    weights = passed * 0.5 / p + (1 - passed) * 0.5 / (1 - p)
    total = functional.binary_cross_entropy_with_logits(logits, passed, weight=weights)
    if len(pairs):
        total = total + functional.softplus(logits[pairs[:, 1]] - logits[pairs[:, 0]]).mean()
    return total


def problem_pairs(passed: Flags, groups: Groups, most: int = 64) -> Groups:
    """(P, 2) indices of a passing and a failing sample of the same problem, at most `most` pairs of each problem."""
    rng = np.random.default_rng(0)
    by_problem = []
    for group in np.unique(groups):
        good, bad = np.flatnonzero((groups == group) & passed), np.flatnonzero((groups == group) & ~passed)
        pairs = np.array([(a, b) for a in good for b in bad], dtype=np.int64).reshape(-1, 2)
        if len(pairs) > most:
            pairs = pairs[rng.choice(len(pairs), most, replace=False)]
        by_problem.append(pairs)
    return np.concatenate(by_problem) if by_problem else np.zeros((0, 2), dtype=np.int64)


def prior_shift(passed: Flags) -> float:
    """What to add to a logit trained with balanced classes, so that it is the log-odds of the share that passes.

    King and Zeng 2001, "Logistic regression in rare events data", section 4.1 (prior correction).
    """
    return float(np.log(passed.mean() / (1 - passed.mean())))
