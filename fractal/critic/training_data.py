"""The labelled samples that training reads, and the error that they can cause."""

from fractal.jsonl import read_jsonl, unique
from fractal.records import Label, Problem, Sample, task_order
from fractal.rundir import RunDir

Row = tuple[Problem, Sample, Label]


class TrainError(Exception):
    """The labels do not allow training, or it cannot go on. Exit code 1. `kept`: critic/best is its last good epoch."""

    def __init__(self, text: str, *, kept: bool = False) -> None:
        super().__init__(text)
        self.kept = kept


def labelled_rows(folder: RunDir, splits: set[str]) -> list[Row]:
    """The run's samples of some splits with their labels, in order; `sandbox_error` is no label."""
    problems = folder.problems()
    samples = unique(read_jsonl(folder.file("samples.jsonl"), Sample), folder.file("samples.jsonl"))
    labels = unique(read_jsonl(folder.file("labels.jsonl"), Label), folder.file("labels.jsonl"))
    return [
        (problems[key[0]], samples[key], label)
        for key, label in sorted(labels.items(), key=lambda item: (task_order(item[0][0]), item[0][1]))
        if key in samples and label.status != "sandbox_error" and problems[key[0]].split in splits
    ]
