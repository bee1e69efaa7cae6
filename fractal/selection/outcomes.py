"""Usable samples with their verdict, score and output: what selection and report both start from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fractal.records import Label, Output, Sample, Score

IMPORTED = "imported from"  # how the detail of a label begins that another tool gave: its tests are not known


@dataclass(frozen=True, slots=True)
class Outcome:
    """A usable sample: one that the verifier gave a verdict on."""

    sample: Sample
    passed: bool
    score: Score | None  # None if the critic has not scored it
    visible: bool | None = None  # passes the test that its prompt shows; None if that is not known apart from the rest
    output: Output | None = None  # None if its output was not recorded

    @property
    def logit(self) -> float | None:
        return None if self.score is None else self.score.score


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What cannot be used, in samples, and the problems that have nothing left."""

    unlabelled: int  # the verifier has not seen them
    sandbox_error: int  # the verifier failed, not the program
    problems: tuple[int, ...]  # task_id of those without a usable sample


def outcomes(
    samples: Iterable[Sample],
    labels: Iterable[Label],
    scores: Iterable[Score] = (),
    outputs: Iterable[Output] = (),
) -> dict[int, list[Outcome]]:
    """The usable samples of each problem, by task_id and then by sample_id.

    Usable is a sample with a label that is not `sandbox_error`; other records without their sample are ignored.
    """
    label_of = {(label.task_id, label.sample_id): label for label in labels if label.status != "sandbox_error"}
    score_of = {(score.task_id, score.sample_id): score for score in scores}
    output_of = {(output.task_id, output.sample_id): output for output in outputs}
    by_problem: dict[int, list[Outcome]] = {}
    for sample in sorted(samples, key=lambda sample: (sample.task_id, sample.sample_id)):
        key = (sample.task_id, sample.sample_id)
        if key in label_of:
            label = label_of[key]
            outcome = Outcome(sample, label.passed, score_of.get(key), _passes_visible(label), output_of.get(key))
            by_problem.setdefault(sample.task_id, []).append(outcome)
    return by_problem


def _passes_visible(label: Label) -> bool | None:
    """Whether the program passes the first test, which its prompt shows; None if the label does not tell.

    Tests that the judge did not come to are `not_run`: the program or the setup ended before the first one. A label
    from another tool knows the verdict on all tests only, and taking that for the first would be looking at the rest.
    """
    if not label.tests or label.detail.startswith(IMPORTED):
        return None
    return label.tests[0] == "passed"


def count_unscored(evaluated: Mapping[int, Sequence[Outcome]]) -> int:
    """How many usable samples the critic, having scored others, has not scored: it ranks them last."""
    missing = [outcome.score is None for outcomes in evaluated.values() for outcome in outcomes]
    return 0 if all(missing) else sum(missing)


def left_out(samples: Iterable[Sample], labels: Iterable[Label]) -> LeftOut:
    """Count what `outcomes` leaves out of the same samples and labels."""
    status_of = {(label.task_id, label.sample_id): label.status for label in labels}
    unlabelled = sandbox_error = 0
    usable: dict[int, bool] = {}
    for sample in samples:
        status = status_of.get((sample.task_id, sample.sample_id))
        unlabelled += status is None
        sandbox_error += status == "sandbox_error"
        usable[sample.task_id] = usable.get(sample.task_id, False) or status not in (None, "sandbox_error")
    return LeftOut(unlabelled, sandbox_error, tuple(sorted(task_id for task_id in usable if not usable[task_id])))
