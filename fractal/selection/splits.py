"""On which splits strategies are measured: what `--on` may name, and what is taken without it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from fractal.errors import InputError
from fractal.records import SPLITS, Label, Problem, Split

SEEN = "these are train problems: the critic has seen them, so its figures flatter it."


def parse_splits(text: str) -> list[str]:
    """The splits of `--on test,validation`, in the order of records.SPLITS.

    Raises InputError: unknown, or train beside others.
    """
    names = {name.strip() for name in text.split(",")}
    if unknown := sorted(names - set(SPLITS)):
        raise InputError(f"--on {text!r}: {unknown[0]!r} is no split. Known: {', '.join(SPLITS)}.")
    if "train" in names and len(names) > 1:
        raise InputError(
            f"--on {text}: the critic has seen the train problems, so they are never measured together with others. "
            "Leave train out, or name it alone."
        )
    return [split for split in SPLITS if split in names]


def measured_splits(
    config: Mapping[str, Any], problems: Collection[Problem], labels: Iterable[Label]
) -> tuple[Split, ...]:
    """The splits on which strategies are measured: those that a run's `config` of selection names.

    By default the first that has labels of test, validation, the few-shot prompts, and train. The critic is trained on
    train problems only, so it is new to all others. In the order of records.SPLITS.
    """
    names = config.get("select", {}).get("on")
    if names is not None:
        return tuple(cast(Split, split) for split in SPLITS if split in names)
    labelled = {label.task_id for label in labels}
    present = {problem.split for problem in problems if problem.task_id in labelled}
    order: tuple[Split, ...] = ("test", "validation", "prompt", "train")
    return (next((split for split in order if split in present), "test"),)


def join_splits(splits: Sequence[str]) -> str:
    """`test`, `validation and test`, `validation, test and prompt`."""
    *before, last = splits
    return f"{', '.join(before)} and {last}" if before else last
