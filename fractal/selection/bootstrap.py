"""Percentile bootstrap intervals of 95 % over problems, on resamples that the number of problems decides.

Give one value for each problem, never one for each sample: samples of one problem are not independent. Ends of
intervals are rounded to 12 decimals, so that the order in which a matrix product adds does not decide whether an
interval includes zero.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
LEVEL = 0.95
DECIMALS = 12
CHUNK = 1 << 20  # resampled values held at a time: 8 MiB
CACHED = 1 << 23  # counts of draws that are kept for the next interval over as many problems: 16 MiB

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over problems and its bootstrap interval: low <= mean <= high."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: ArrayLike, *, weights: ArrayLike | None = None, resamples: int = RESAMPLES) -> Interval:
    """The mean of one value per problem, with its interval. Efron and Tibshirani 1993, chapter 13.

    With `weights` (> 0) the mean is weighted and each resample divides by its own weights. The same number of problems
    gives the same resamples, so vectors of the same problems can be compared. Of differences, problem by problem, the
    interval is the paired one: what makes a problem easy or hard for both cancels out.

    One problem, or the same value for all, gives low == mean == high: the bootstrap has then seen no variation, which
    does not mean that there is none.
    """
    numbers = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(numbers) if weights is None else np.asarray(weights, dtype=np.float64)
    if (numbers == numbers[0]).all():
        return _point(numbers[0])
    return _ratio(numbers * weight, weight, resamples)


def bootstrap_bands(values: ArrayLike, *, resamples: int = RESAMPLES) -> list[Interval]:
    """`bootstrap_interval` of each column of (problems, K) values, all columns on the same resamples.

    One matrix product instead of K bootstraps. Pointwise: 95 % holds for each column, not for all at once.
    """
    table = np.asarray(values, dtype=np.float64)
    ends = quantiles(_resampled_sums(table, resamples) / len(table))
    return [
        _point(column[0]) if (column == column[0]).all() else interval(math.fsum(column) / len(column), *ends[:, k])
        for k, column in enumerate(table.T)
    ]


def gap_closed(
    critic: ArrayLike, random: ArrayLike, oracle: ArrayLike, *, resamples: int = RESAMPLES
) -> Interval | None:
    """Share of the way from random to the oracle: (critic - random) / (oracle - random), each a mean over problems.

    0 is random, 1 the oracle, below 0 worse than random. Paired percentile bootstrap over problems of the ratio of
    means (Efron and Tibshirani 1993, section 10.6); resamples in which the oracle is no better than random are left
    out. None where that holds for the problems themselves: no choice makes a difference there.
    """
    possible = np.subtract(oracle, random)
    return _ratio(np.subtract(critic, random), possible, resamples) if possible.sum() > 10.0**-DECIMALS else None


def _ratio(numerators: Floats, denominators: Floats, resamples: int) -> Interval:
    """The ratio of two means over problems; resamples without a positive denominator are left out."""
    sums = _resampled_sums(np.column_stack([numerators, denominators]), resamples)
    useful = sums[sums[:, 1] > 10.0**-DECIMALS]
    return interval(math.fsum(numerators) / math.fsum(denominators), *quantiles(useful[:, 0] / useful[:, 1]))


def _point(value: float) -> Interval:
    return Interval(float(value), float(value), float(value))


def quantiles(resampled: Floats) -> Floats:
    """(2, ...) the two ends of the percentile interval."""
    ends: Floats = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return ends


def interval(mean: float, low: float, high: float) -> Interval:
    """Rounded ends around the mean: a handful of resamples, or rounding, can leave the mean just outside."""
    return Interval(mean, min(round(float(low), DECIMALS), mean), max(round(float(high), DECIMALS), mean))


def resampled_rows(problems: int, resamples: int) -> Iterator[NDArray[np.int32]]:
    """Chunks of resamples, (some, problems) row numbers each: the same for the same number of problems."""
    rng = np.random.default_rng(0)
    step = max(1, CHUNK // problems)
    for start in range(0, resamples, step):
        yield rng.integers(0, problems, size=(min(step, resamples - start), problems), dtype=np.int32)


def _resampled_sums(values: Floats, resamples: int) -> Floats:
    """(resamples, K) sums of each column of (problems, K) values over each resample."""
    problems = len(values)
    if problems * resamples <= CACHED:
        sums: Floats = _counts(problems, resamples) @ values
        return sums
    return np.concatenate([_count(rows) @ values for rows in resampled_rows(problems, resamples)])


@lru_cache(maxsize=4)
def _counts(problems: int, resamples: int) -> NDArray[np.int16]:
    return np.concatenate([_count(rows) for rows in resampled_rows(problems, resamples)])


def _count(rows: NDArray[np.int32]) -> NDArray[np.int16]:
    """(some, problems): how often each problem was drawn in each resample."""
    resamples, problems = rows.shape
    flat = rows + problems * np.arange(resamples)[:, None]
    return np.bincount(flat.ravel(), minlength=rows.size).reshape(rows.shape).astype(np.int16)
