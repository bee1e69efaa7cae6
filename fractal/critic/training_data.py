"""The labelled samples that training reads, and the error that they can cause."""

from typing import TypeVar

from fractal.jsonl import Keyed, iter_jsonl, unique
from fractal.records import Label, Problem, Sample, task_order
from fractal.rundir import RunDir

K = TypeVar("K", bound=Keyed)
Row = tuple[Problem, Sample, Label]


class TrainError(Exception):
    """The labels do not allow training, or it cannot go on. Exit code 1. `kept`: critic/best is its last good epoch."""

    def __init__(self, text: str, *, kept: bool = False) -> None:
        super().__init__(text)
        self.kept = kept


def labelled_rows(folder: RunDir, splits: set[str]) -> list[Row]:
    """The run's samples of some splits with their labels, in order; `sandbox_error` is no label."""
    problems = {task_id: problem for task_id, problem in folder.problems().items() if problem.split in splits}

    def records(name: str, kind: type[K]) -> dict[tuple[str, int], K]:
        path = folder.file(name)
        return unique((record for record in iter_jsonl(path, kind) if record.task_id in problems), path)

    samples, labels = records("samples.jsonl", Sample), records("labels.jsonl", Label)
    return [
        (problems[key[0]], samples[key], label)
        for key, label in sorted(labels.items(), key=lambda item: (task_order(item[0][0]), item[0][1]))
        if key in samples and label.status != "sandbox_error"
    ]
