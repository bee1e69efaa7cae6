"""Usable samples with their label, score and output: what selection and report both start from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fractal.jsonl import Keyed, iter_jsonl, unique
from fractal.records import Label, Output, Sample, Score, task_order
from fractal.rundir import RunDir

IMPORTED = "imported from"  # how the detail of a label begins that another tool gave: its tests are not known

K = TypeVar("K", bound=Keyed)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A usable sample: one that the verifier gave a verdict on."""

    sample: Sample
    label: Label
    score: Score | None  # None if the critic has not scored it
    output: Output | None  # None if its output was not recorded

    @property
    def passed(self) -> bool:
        return self.label.passed

    @property
    def visible(self) -> bool | None:
        """Whether the program passes the first test, which its prompt shows; None if the label does not tell.

        Tests that the judge did not come to are `not_run`: the program or the setup ended before the first one. A label
        from another tool knows the verdict on all tests only, and taking that for the first would be looking at the
        rest.
        """
        if not self.label.tests or self.label.detail.startswith(IMPORTED):
            return None
        return self.label.tests[0] == "passed"

    @property
    def logit(self) -> float | None:
        return None if self.score is None else self.score.score


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What cannot be used, in samples, and the problems that have nothing left."""

    unlabelled: int  # the verifier has not seen them
    sandbox_error: int  # the verifier failed, not the program
    problems: tuple[str, ...]  # task_id of those without a usable sample


def read_outcomes(folder: RunDir, splits: Sequence[str]) -> dict[str, list[Outcome]]:
    """The usable samples of a run's splits. Raises InputError where two records of these have the same key."""
    inside = {task_id for task_id, problem in folder.problems().items() if problem.split in splits}

    def records(name: str, kind: type[K]) -> Iterable[K]:
        path = folder.file(name)
        return unique((record for record in iter_jsonl(path, kind) if record.task_id in inside), path).values()

    return outcomes(
        records("samples.jsonl", Sample),
        records("labels.jsonl", Label),
        records("scores.jsonl", Score),
        records("outputs.jsonl", Output),
    )


def outcomes(
    samples: Iterable[Sample], labels: Iterable[Label], scores: Iterable[Score] = (), outputs: Iterable[Output] = ()
) -> dict[str, list[Outcome]]:
    """The usable samples of each problem, by task_id and then by sample_id.

    Usable is a sample with a label that is not `sandbox_error`; other records without their sample are ignored.
    """
    label_of = {(label.task_id, label.sample_id): label for label in labels if label.status != "sandbox_error"}
    score_of = {(score.task_id, score.sample_id): score for score in scores}
    output_of = {(output.task_id, output.sample_id): output for output in outputs}
    by_problem: dict[str, list[Outcome]] = {}
    for sample in sorted(samples, key=lambda sample: (task_order(sample.task_id), sample.sample_id)):
        key = (sample.task_id, sample.sample_id)
        if key in label_of:
            outcome = Outcome(sample, label_of[key], score_of.get(key), output_of.get(key))
            by_problem.setdefault(sample.task_id, []).append(outcome)
    return by_problem


def count_unscored(evaluated: Mapping[str, Sequence[Outcome]]) -> int:
    """How many usable samples the critic, having scored others, has not scored: it ranks them last."""
    missing = [outcome.score is None for outcomes in evaluated.values() for outcome in outcomes]
    return 0 if all(missing) else sum(missing)


def left_out(samples: Iterable[Sample], labels: Iterable[Label]) -> LeftOut:
    """Count what `outcomes` leaves out of the same samples and labels."""
    status_of = {(label.task_id, label.sample_id): label.status for label in labels}
    found = [(sample.task_id, status_of.get((sample.task_id, sample.sample_id))) for sample in samples]
    usable = {task_id for task_id, status in found if status not in (None, "sandbox_error")}
    return LeftOut(
        unlabelled=sum(status is None for _, status in found),
        sandbox_error=sum(status == "sandbox_error" for _, status in found),
        problems=tuple(sorted({task_id for task_id, _ in found} - usable, key=task_order)),
    )
