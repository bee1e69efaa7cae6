"""`--mode probe`: a linear head on frozen states of one layer, chosen by cross-validation grouped by problem.

On the last layer it may start from the zero-shot critic: then only what it adds to that is penalised. Everything is
convex: no random start, no chosen epoch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fractal import console
from fractal.critic.arrays import Array, Flags, Floats, Groups, Half
from fractal.critic.head import Head
from fractal.critic.held_out import auc, within_problem_auc
from fractal.critic.loss import loss, prior_shift, problem_pairs

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # weight of the squared norm of the head, on standardised states
START_RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # the same, of what is added to the zero-shot critic
EPOCHS = 5  # rounds of L-BFGS; the loss is convex, so more only polish
FOLDS = 5


@contextmanager
def _one_thread() -> Iterator[None]:
    """For steps of a millisecond: threads waiting for each other cost more than they give, twice on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class HeadFit:
    """The convex problem of one layer's states (N, D) and a ridge, solved by L-BFGS in rounds (`epoch`).

    With a `start` (D,), weight = a * start + w: the factor a is free, and the ridge holds w alone.
    """

    def __init__(
        self, states: Half | Array, passed: Flags, groups: Groups, ridge: float, start: Array | None = None
    ) -> None:
        x = states.astype(np.float32)
        self.ridge = ridge
        self._mean, self._scale = x.mean(axis=0), x.std(axis=0) + 1e-4
        self._x = torch.tensor((x - self._mean) / self._scale, dtype=torch.float64)
        self._y = torch.tensor(passed, dtype=torch.float64)
        self._prior = prior_shift(passed)
        self._pairs = torch.tensor(problem_pairs(passed, groups))
        direction = np.zeros(x.shape[1]) if start is None else start.astype(np.float64) * self._scale
        spread = float(np.std(self._x.numpy() @ direction)) or 1.0
        self._direction = torch.tensor(direction / spread)  # its logits vary by 1
        self._a = torch.zeros((), dtype=torch.float64, requires_grad=start is not None)
        self._w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
        self._b = torch.zeros((), dtype=torch.float64, requires_grad=True)
        free = [parameter for parameter in (self._a, self._w, self._b) if parameter.requires_grad]
        self._optimizer = torch.optim.LBFGS(free, max_iter=20, line_search_fn="strong_wolfe")

    @_one_thread()
    def epoch(self) -> float:
        """One round of steps; returns the loss before the penalty."""

        def closure() -> torch.Tensor:
            self._optimizer.zero_grad()
            value = self._loss() + self.ridge * self._w.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        self._optimizer.step(closure)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return float(self._loss())

    def _loss(self) -> torch.Tensor:
        return loss(self._x @ (self._a * self._direction + self._w) + self._b, self._y, self._pairs)

    def head(self) -> Head:
        """For states as they come: the standardisation is folded into weight and bias."""
        weight = (self._a * self._direction + self._w).detach().numpy() / self._scale
        bias = float(self._b.detach()) + self._prior - float(weight @ self._mean)
        return Head(weight.astype(np.float32), bias)


@dataclass(frozen=True)
class ProbeChoice:
    """Layer, ridge and start, as grouped cross-validation within the train problems chose them."""

    index: int  # of the layer in Features.layers
    layer: int
    ridge: float
    start: bool  # from the zero-shot critic
    within_auc: float | None  # of the held-out folds, over pairs of one problem
    pooled_auc: float | None
    logits: Floats  # (N,) of the held-out folds


def cross_validate(
    states: Half, passed: Flags, groups: Groups, layers: list[int], start: Array | None = None
) -> ProbeChoice:
    """Try every layer and ridge on folds of whole problems. Needs at least two problems and both classes.

    states (N, layers, D); `start` (D,): the zero-shot critic, of the last layer.
    """
    folds = problem_folds(groups, min(FOLDS, len(np.unique(groups))))
    tried = [(index, ridge, False) for index in range(len(layers)) for ridge in RIDGES]
    if start is not None:
        tried += [(len(layers) - 1, ridge, True) for ridge in START_RIDGES]
    choices: list[ProbeChoice] = []
    with console.bar("cross-validation", len(tried)) as bar:
        for index, ridge, started in tried:
            logits = _held_out(states[:, index], passed, groups, ridge, folds, start if started else None)
            within, pooled = within_problem_auc(logits, passed, groups), auc(logits, passed)
            choices.append(ProbeChoice(index, layers[index], ridge, started, within, pooled, logits))
            bar.advance()
    return max(choices, key=lambda one: (_or_chance(one.within_auc), _or_chance(one.pooled_auc), one.ridge))


def problem_folds(groups: Groups, count: int) -> Groups:
    """(N,) fold of each sample: whole problems, the largest first, each to the fold with the fewest samples.

    As scikit-learn's GroupKFold, whose import takes seconds.
    """
    _, problem, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    fold_of, fold_sizes = np.zeros(len(sizes), dtype=np.int64), np.zeros(count)
    for largest in np.argsort(sizes, kind="stable")[::-1]:
        fold_of[largest] = np.argmin(fold_sizes)
        fold_sizes[fold_of[largest]] += sizes[largest]
    return fold_of[problem]


def sample_folds(size: int, count: int) -> Groups:
    """(N,) fold of each sample: a random one, of equal sizes. As scikit-learn's KFold with shuffle and seed 0."""
    fold_of = np.zeros(size, dtype=np.int64)
    for fold, samples in enumerate(np.array_split(np.random.RandomState(0).permutation(size), count)):
        fold_of[samples] = fold
    return fold_of


def _splits(folds: Groups) -> Iterator[tuple[Groups, Groups]]:
    """For each fold the indices of the other samples and of its own."""
    for fold in range(folds.max() + 1):
        yield np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)


def _held_out(states: Half, passed: Flags, groups: Groups, ridge: float, folds: Groups, start: Array | None) -> Floats:
    """Logits (N,) of samples that their fold's head has not seen; 0 where a fold has one class to learn from."""
    logits = np.zeros(len(passed))
    for train, test in _splits(folds):
        if passed[train].all() or not passed[train].any():
            continue
        fit = HeadFit(states[train], passed[train], groups[train], ridge, start)
        fit.epoch()
        logits[test] = fit.head().logits(states[test])
    return logits


def _or_chance(value: float | None) -> float:
    return 0.5 if value is None else value


def compare_splits(
    states: Half, passed: Flags, groups: Groups, ridge: float, start: Array | None = None
) -> list[dict[str, Any]]:
    """The same critic evaluated under two ways to split the same samples: by sample, which leaks, and by problem.

    states (N, D). `lookup_accuracy` needs no program: the majority label of the same problem on the training side,
    and where the problem is not there the majority of all. Fields as summary.SplitAccuracy.
    """
    rows = []
    for by in ("sample", "problem"):
        count = min(FOLDS, len(np.unique(groups)))
        folds = sample_folds(len(passed), count) if by == "sample" else problem_folds(groups, count)
        logits = _held_out(states, passed, groups, ridge, folds, start)
        lookup = np.zeros(len(passed), dtype=bool)
        for train, test in _splits(folds):
            for i in test:
                same = passed[train][groups[train] == groups[i]]
                lookup[i] = (same if len(same) else passed[train]).mean() >= 0.5
        rows.append(
            {
                "by": by,
                "accuracy": float(np.mean((logits >= 0) == passed)),
                "auc": auc(logits, passed),
                "within_auc": within_problem_auc(logits, passed, groups),
                "lookup_accuracy": float(np.mean(lookup == passed)),
            }
        )
    return rows
