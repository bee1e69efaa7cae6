"""Samples joined with what the verifier and the critic said of them, and strategies measured over problems.

Selection and report both start here, so that both leave out the same samples. Pure; files belong to the stages.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fractal.metrics import Interval, bootstrap_difference, bootstrap_interval
from fractal.records import Choice, Label, Problem, Sample, Score, Split

BASELINE = "random"  # every gain is measured against it


@dataclass(frozen=True, slots=True)
class Outcome:
    """A usable sample: one that the verifier gave a verdict on."""

    sample: Sample
    passed: bool
    score: Score | None  # None if the critic has not scored it

    @property
    def logit(self) -> float | None:
        return None if self.score is None else self.score.score

    @property
    def mean_logprob(self) -> float | None:
        """Log-probability of a token; None if the source gave none, or for an empty completion."""
        if self.sample.sum_logprob is None or self.sample.tokens < 1:
            return None
        return self.sample.sum_logprob / self.sample.tokens


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What cannot be used, in samples, and the problems that have nothing left."""

    unlabelled: int  # the verifier has not seen them
    sandbox_error: int  # the verifier failed, not the program
    problems: tuple[int, ...]  # task_id of those without a usable sample


@dataclass(frozen=True, slots=True)
class StrategyResult:
    """What one strategy reaches, as the mean over problems of "the program picked passes"."""

    strategy: str
    problems: int
    pass_rate: Interval
    gain_over_random: Interval  # paired, on the same problems


def outcomes(
    samples: Iterable[Sample], labels: Iterable[Label], scores: Iterable[Score] = ()
) -> dict[int, list[Outcome]]:
    """The usable samples of each problem, by task_id and then by sample_id.

    Usable is a sample with a label that is not `sandbox_error`; labels and scores without their sample are ignored.
    """
    verdicts = {(one.task_id, one.sample_id): one for one in labels if one.status != "sandbox_error"}
    opinions = {(one.task_id, one.sample_id): one for one in scores}
    found: dict[int, list[Outcome]] = {}
    for sample in sorted(samples, key=lambda one: (one.task_id, one.sample_id)):
        key = (sample.task_id, sample.sample_id)
        if key in verdicts:
            found.setdefault(sample.task_id, []).append(Outcome(sample, verdicts[key].passed, opinions.get(key)))
    return found


def evaluation_split(problems: Iterable[Problem], labels: Iterable[Label]) -> Split:
    """The split on which strategies are measured: test, else validation, else the few-shot prompts, else train.

    The critic is trained on train problems only, so it is new to all others.
    """
    labelled = {label.task_id for label in labels}
    found = {problem.split for problem in problems if problem.task_id in labelled}
    order: tuple[Split, ...] = ("test", "validation", "prompt", "train")
    return next((split for split in order if split in found), "test")


def left_out(samples: Iterable[Sample], labels: Iterable[Label]) -> LeftOut:
    """Count what `outcomes` leaves out of the same samples and labels."""
    status = {(one.task_id, one.sample_id): one.status for one in labels}
    unlabelled = sandbox_error = 0
    usable: dict[int, bool] = {}
    for sample in samples:
        verdict = status.get((sample.task_id, sample.sample_id))
        unlabelled += verdict is None
        sandbox_error += verdict == "sandbox_error"
        usable[sample.task_id] = usable.get(sample.task_id, False) or verdict not in (None, "sandbox_error")
    return LeftOut(unlabelled, sandbox_error, tuple(sorted(task for task, some in usable.items() if not some)))


def evaluate(choices: Sequence[Choice]) -> list[StrategyResult]:
    """Pass rate and gain over random of each strategy, with bootstrap intervals over problems.

    Strategies come in the order in which they first appear. A strategy without a choice on some problems is measured
    on the others, and compared with random on those. Raises ValueError if a problem has no "random" choice or a
    strategy chose twice on a problem.
    """
    passed: dict[str, dict[int, float]] = {}
    for choice in choices:
        of_strategy = passed.setdefault(choice.strategy, {})
        if choice.task_id in of_strategy:
            raise ValueError(f"strategy {choice.strategy!r} has two choices for task_id {choice.task_id}")
        of_strategy[choice.task_id] = choice.passed
    baseline = passed.get(BASELINE, {})
    results = []
    for strategy, by_task in passed.items():
        tasks = sorted(by_task)
        if missing := [task for task in tasks if task not in baseline]:
            raise ValueError(f"strategy {strategy!r} chose for task_id {missing[0]}, {BASELINE!r} did not")
        values = [by_task[task] for task in tasks]
        gain = bootstrap_difference(values, [baseline[task] for task in tasks])
        results.append(StrategyResult(strategy, len(tasks), bootstrap_interval(values), gain))
    return results
