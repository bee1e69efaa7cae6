"""Reads a run folder as outcomes and choices: for the stage, and for `report --check`, which compares what it wrote."""

from collections.abc import Sequence
from typing import TypeVar

from fractal.jsonl import Keyed, read_jsonl, unique
from fractal.records import Choice, Label, Output, Sample, Score
from fractal.rundir import RunDir
from fractal.selection.outcomes import Outcome, outcomes
from fractal.selection.splits import recorded_splits
from fractal.selection.strategies import choose

K = TypeVar("K", bound=Keyed)


def recompute(folder: RunDir) -> list[Choice]:
    """The choices that a run's records lead to, on the splits that its manifest names; nothing is written."""
    problems = folder.problems().values()
    labels = read_jsonl(folder.file("labels.jsonl"), Label)
    return choose(read_outcomes(folder, recorded_splits(folder.manifest["config"], problems, labels)))


def read_outcomes(folder: RunDir, splits: Sequence[str]) -> dict[str, list[Outcome]]:
    """The usable samples of the splits, by problem."""
    inside = {task_id for task_id, problem in folder.problems().items() if problem.split in splits}
    samples = [sample for sample in _records(folder, "samples.jsonl", Sample) if sample.task_id in inside]
    return outcomes(
        samples,
        _records(folder, "labels.jsonl", Label),
        _records(folder, "scores.jsonl", Score),
        _records(folder, "outputs.jsonl", Output),
    )


def _records(folder: RunDir, name: str, kind: type[K]) -> list[K]:
    """One file's records. Raises InputError where two have the same key."""
    return list(unique(read_jsonl(folder.file(name), kind), folder.file(name)).values())
