"""Inputs of the metrics as checked arrays of numbers: one-dimensional, not empty, of equal length."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def floats(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name}: expected a sequence of at least one number, got shape {array.shape}")
    return array


def finite(name: str, values: ArrayLike) -> Floats:
    array = floats(name, values)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: a value is not finite")
    return array


def probabilities(values: ArrayLike) -> Floats:
    array = floats("probabilities", values)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError("probabilities: a value is outside 0..1")
    return array


def flags(values: ArrayLike) -> Floats:
    """Verdicts as 0.0 and 1.0."""
    array = floats("passed", values)
    if not np.isin(array, (0, 1)).all():
        raise ValueError("passed: a value is neither 0 nor 1")
    return array


def check_lengths(*columns: Any) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) != 1:
        raise ValueError(f"columns of different lengths: {', '.join(map(str, lengths))}")


def rows_by_group(groups: Sequence[Hashable]) -> list[NDArray[np.intp]]:
    """The row numbers of each group, groups in the order in which they first appear."""
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return [np.array(numbers, dtype=np.intp) for numbers in rows.values()]
