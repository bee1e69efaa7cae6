"""Samples joined with what the verifier and the critic said of them, how strategies rank them, and what that gains.

Selection and report both start here, so that both leave out the same samples. Pure; files belong to the stages.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fractal.errors import InputError
from fractal.records import SPLITS, Choice, Label, Output, Problem, Sample, Score, Split
from fractal.selection.metrics import Interval, bootstrap_difference, bootstrap_interval

BASELINE = "random"  # every gain is measured against it
SEEN = "these are train problems: the critic has seen them, so its figures flatter it."
IMPORTED = "imported from"  # how the detail of a label begins that another tool gave: its tests are not known


@dataclass(frozen=True, slots=True)
class Outcome:
    """A usable sample: one that the verifier gave a verdict on."""

    sample: Sample
    passed: bool
    score: Score | None  # None if the critic has not scored it
    visible: bool | None = None  # passes the test that its prompt shows; None if that is not known apart from the rest
    output: Output | None = None  # None if it was not asked for

    @property
    def logit(self) -> float | None:
        return None if self.score is None else self.score.score


# Of a problem's samples the highest is picked; None is "nothing known" and ranks last; ties: the lowest sample_id.
RANKINGS: dict[str, Callable[[Outcome], float | None]] = {
    "critic": lambda one: one.logit,
    "first": lambda one: 0.0,
    "mean_logprob": lambda one: one.sample.mean_logprob,
    "sum_logprob": lambda one: one.sample.sum_logprob if one.sample.tokens else None,
    "shortest": lambda one: -len(one.sample.code),
    "zero_shot": lambda one: None if one.score is None else one.score.zero_shot,
    "critic_logprob": lambda one: None if one.score is None else one.score.combined,
    "oracle": lambda one: float(one.passed),
}


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
    samples: Iterable[Sample],
    labels: Iterable[Label],
    scores: Iterable[Score] = (),
    outputs: Iterable[Output] = (),
) -> dict[int, list[Outcome]]:
    """The usable samples of each problem, by task_id and then by sample_id.

    Usable is a sample with a label that is not `sandbox_error`; other records without their sample are ignored.
    """
    verdicts = {(one.task_id, one.sample_id): one for one in labels if one.status != "sandbox_error"}
    opinions = {(one.task_id, one.sample_id): one for one in scores}
    returned = {(one.task_id, one.sample_id): one for one in outputs}
    found: dict[int, list[Outcome]] = {}
    for sample in sorted(samples, key=lambda one: (one.task_id, one.sample_id)):
        key = (sample.task_id, sample.sample_id)
        if key in verdicts:
            label = verdicts[key]
            one = Outcome(sample, label.passed, opinions.get(key), passes_visible(label), returned.get(key))
            found.setdefault(sample.task_id, []).append(one)
    return found


def without_score(evaluated: Mapping[int, Sequence[Outcome]]) -> int:
    """How many usable samples the critic, having scored others, has not scored: it ranks them last."""
    missing = [one.score is None for rows in evaluated.values() for one in rows]
    return 0 if all(missing) else sum(missing)


def passes_visible(label: Label) -> bool | None:
    """Whether the program passes the first test, which its prompt shows; None if the label does not tell.

    Tests that the judge did not come to are `not_run`: the program or the setup ended before the first one. A label
    from another tool knows the verdict on all tests only, and taking that for the first would be looking at the rest.
    """
    if not label.tests or label.detail.startswith(IMPORTED):
        return None
    return label.tests[0] == "passed"


def evaluation_splits(
    problems: Collection[Problem], labels: Iterable[Label], asked: Sequence[str] | None = None
) -> tuple[Split, ...]:
    """The splits on which strategies are measured: those asked for, else the first of them that has labels.

    Without a word: test, else validation, else the few-shot prompts, else train. The critic is trained on train
    problems only, so it is new to all others. In the order of records.SPLITS.
    """
    if asked is not None:
        return tuple(cast(Split, split) for split in SPLITS if split in asked)
    labelled = {label.task_id for label in labels}
    found = {problem.split for problem in problems if problem.task_id in labelled}
    order: tuple[Split, ...] = ("test", "validation", "prompt", "train")
    return (next((split for split in order if split in found), "test"),)


def splits_asked(text: str) -> list[str]:
    """The splits of `--on test,validation`. Raises InputError: unknown, or train beside others."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in SPLITS]:
        raise InputError(f"--on {text}: {unknown[0]!r} is no split. Known: {', '.join(SPLITS)}.")
    if not names:
        raise InputError(f"--on {text!r}: names no split. Known: {', '.join(SPLITS)}.")
    if "train" in names and len(set(names)) > 1:
        raise InputError(
            f"--on {text}: the critic has seen the train problems, so they are never measured together with others. "
            "Leave train out, or name it alone."
        )
    return [split for split in SPLITS if split in names]


def recorded_splits(
    config: Mapping[str, Any], problems: Collection[Problem], labels: Iterable[Label]
) -> tuple[Split, ...]:
    """The splits that a run's selection was made on, from its manifest's `config`: the report measures the same."""
    section = config.get("select")
    return evaluation_splits(problems, labels, section.get("on") if isinstance(section, dict) else None)


def in_words(splits: Sequence[str]) -> str:
    """`test`, `validation and test`, `validation, test and prompt`."""
    *before, last = splits
    return f"{', '.join(before)} and {last}" if before else last


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
