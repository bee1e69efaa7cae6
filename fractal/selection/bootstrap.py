"""Percentile bootstrap intervals over problems, on resamples that a seed and the number of problems decide.

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

from fractal.selection.arrays import Floats, check_lengths, finite

RESAMPLES = 10_000
DECIMALS = 12
CHUNK = 1 << 20  # resampled values held at a time: 8 MiB
CACHED = 1 << 23  # counts of draws that are kept for the next interval over as many problems: 16 MiB


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over problems and its bootstrap interval: low <= mean <= high."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of one value per problem, with its interval. Efron and Tibshirani 1993, chapter 13.

    With `weights` (> 0) the mean is weighted and each resample divides by its own weights. The same seed and number of
    problems give the same resamples, so vectors of the same problems can be compared.

    One problem, or the same value for all, gives low == mean == high: the bootstrap has then seen no variation, which
    does not mean that there is none. Raises ValueError on no values, or values that are not finite.
    """
    numbers = finite("values", values)
    weight = np.ones_like(numbers) if weights is None else finite("weights", weights)
    check_lengths(numbers, weight)
    if (weight <= 0).any():
        raise ValueError("a weight is not above 0")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level={level}, resamples={resamples}: expected 0 < level < 1 and resamples >= 1")
    if (numbers == numbers[0]).all():
        return Interval(float(numbers[0]), float(numbers[0]), float(numbers[0]))
    sums = resampled_sums(np.column_stack([numbers * weight, weight]), resamples, seed)
    low, high = quantiles(sums[:, 0] / sums[:, 1], level)
    return interval(math.fsum(numbers * weight) / math.fsum(weight), float(low), float(high))


def bootstrap_difference(
    values: ArrayLike, baseline: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of values - baseline, problem by problem, with its paired interval.

    The two hold the same problems in the same order. Both are resampled together, so what makes a problem easy or
    hard for both cancels out. Degenerate inputs as in `bootstrap_interval`.
    """
    numbers, other = finite("values", values), finite("baseline", baseline)
    check_lengths(numbers, other)
    return bootstrap_interval(numbers - other, level=level, resamples=resamples, seed=seed)


def bootstrap_bands(
    values: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """`bootstrap_interval` of each column of (problems, K) values in -1..1, all columns on the same resamples.

    One matrix product instead of K bootstraps. Pointwise: 95 % holds for each column, not for all at once.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size or not (np.abs(table) <= 1).all():
        raise ValueError(f"bands: expected (problems, K) values in -1..1, got shape {table.shape}")
    low, high = quantiles(resampled_sums(table, resamples, seed) / len(table), level)
    bands = []
    for k, column in enumerate(table.T):
        if (column == column[0]).all():
            bands.append(Interval(float(column[0]), float(column[0]), float(column[0])))
        else:
            bands.append(interval(math.fsum(column) / len(column), float(low[k]), float(high[k])))
    return bands


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
    means (Efron and Tibshirani 1993, section 10.6); resamples in which the oracle is no better than random are left
    out. None where that holds for the problems themselves: no choice makes a difference there.
    """
    picked, baseline, best = finite("critic", critic), finite("random", random), finite("oracle", oracle)
    check_lengths(picked, baseline, best)
    possible = math.fsum(best - baseline)
    if not possible > 0:
        return None
    sums = resampled_sums(np.column_stack([picked - baseline, best - baseline]), resamples, seed)
    useful = sums[sums[:, 1] > 10.0**-DECIMALS]
    low, high = quantiles(useful[:, 0] / useful[:, 1], level)
    return interval(math.fsum(picked - baseline) / possible, float(low), float(high))


def quantiles(resampled: Floats, level: float) -> Floats:
    """(2, ...) the two ends of the percentile interval."""
    ends: Floats = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends


def interval(mean: float, low: float, high: float) -> Interval:
    """Rounded ends around the mean: a handful of resamples, or rounding, can leave the mean just outside."""
    return Interval(mean, min(round(low, DECIMALS), mean), max(round(high, DECIMALS), mean))


def resampled_rows(problems: int, resamples: int, seed: int) -> Iterator[NDArray[np.int32]]:
    """Chunks of resamples, (some, problems) row numbers each: the same for the same number of problems and seed."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // problems)
    for start in range(0, resamples, step):
        yield rng.integers(0, problems, size=(min(step, resamples - start), problems), dtype=np.int32)


def resampled_sums(values: Floats, resamples: int, seed: int) -> Floats:
    """(resamples, K) sums of each column of (problems, K) values over each resample."""
    problems = len(values)
    if problems * resamples <= CACHED:
        sums: Floats = _counts(problems, resamples, seed) @ values
        return sums
    return np.concatenate([_count(rows) @ values for rows in resampled_rows(problems, resamples, seed)])


@lru_cache(maxsize=4)
def _counts(problems: int, resamples: int, seed: int) -> NDArray[np.int16]:
    return np.concatenate([_count(rows) for rows in resampled_rows(problems, resamples, seed)])


def _count(rows: NDArray[np.int32]) -> NDArray[np.int16]:
    """(some, problems): how often each problem was drawn in each resample."""
    resamples, problems = rows.shape
    flat = rows + problems * np.arange(resamples)[:, None]
    return np.bincount(flat.ravel(), minlength=rows.size).reshape(rows.shape).astype(np.int16)
