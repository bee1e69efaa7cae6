"""Figures of a critic's logits on held-out samples: ranking (AUC), temperature, combination with the log-probability.

They choose layers and epochs during training; the report's figures, with intervals, are of selection/metrics.py.
"""

import math

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from fractal.critic.arrays import Flags, Floats, Groups
from fractal.critic.checkpoint import Combination
from fractal.critic.loss import loss, problem_pairs


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


def fit_temperature(logits: Floats, passed: Flags) -> float:
    """The T that maximises the likelihood of sigmoid(logit / T) on held-out samples.

    Temperature scaling: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """

    def negative_log_likelihood(log_t: float) -> float:
        z = logits / np.exp(log_t)
        return float(np.mean(np.logaddexp(0, z) - passed * z))

    return float(np.exp(minimize_scalar(negative_log_likelihood, bounds=(-4, 6), method="bounded").x))


def fit_combination(logits: Floats, mean_logprobs: Floats, passed: Flags, groups: Groups) -> Combination | None:
    """Weights of critic and mean log-probability that minimise `loss` on held-out samples.

    logits, mean_logprobs (N,), NaN where there is no log-probability: such samples are left out. None where fewer than
    ten are left, or samples of one class only.
    """
    known = np.isfinite(mean_logprobs)
    x = np.stack([logits[known], mean_logprobs[known]], axis=1)
    y = passed[known]
    if len(x) < 10 or y.all() or not y.any():
        return None
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-9
    inputs = torch.tensor((x - mean) / scale)
    truth, pairs = torch.tensor(y, dtype=torch.float64), torch.tensor(problem_pairs(y, groups[known]))
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(inputs @ w[:2] + w[2], truth, pairs) + 1e-4 * w.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    fitted = w.detach().numpy()
    a, b = fitted[:2] / scale
    return Combination(float(a), float(b), float(fitted[2] - (fitted[:2] * mean / scale).sum()))
