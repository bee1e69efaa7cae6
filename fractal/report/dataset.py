"""What was drawn, labelled and left out: rows for each split and problem, and the funnel from problems to results."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fractal.records import Choice, Problem, Sample
from fractal.selection.bootstrap import Interval, bootstrap_interval
from fractal.selection.outcomes import Outcome

PROMPT_CHARS = 120  # of a prompt in the table of problems


@dataclass(frozen=True, slots=True)
class SplitRow:
    """The usable samples of one split; `pass_rate` is the mean over its problems, each weighing the same."""

    split: str
    problems: int
    problems_measured: int  # with at least one usable sample
    samples: int  # usable
    passed: int
    pass_rate: Interval | None


@dataclass(frozen=True, slots=True)
class FunnelStep:
    """A stage of the data: how many are left, and what was lost before it."""

    name: str  # "problems", "samples drawn", ...
    count: int
    lost: str  # numbers and reasons, "" if nothing was lost


@dataclass(frozen=True, slots=True)
class ProblemRow:
    task_id: str
    prompt: str  # shortened, one line
    samples: int  # usable
    passed: int
    critic_sample_id: int | None
    critic: float | None  # 1 if the critic's pick passes, else 0
    random: float | None  # None without a usable sample


def passed(outcomes: Iterable[Outcome]) -> int:
    return sum(outcome.passed for outcome in outcomes)


def count(number: int, noun: str, reason: str = "") -> str:
    """`1 sample`, `1,234 samples cut`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'} {reason}".rstrip()


def shorten(text: str, chars: int = PROMPT_CHARS) -> str:
    """One line of printable characters, cut with an ellipsis. Control and text-direction characters become spaces."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= chars else line[: chars - 1].rstrip() + "…"


def split_row(name: str, problems: Sequence[Problem], usable: Mapping[str, Sequence[Outcome]]) -> SplitRow:
    measured = [usable[problem.task_id] for problem in problems if problem.task_id in usable]
    rates = [passed(outcomes) / len(outcomes) for outcomes in measured]
    return SplitRow(
        name,
        problems=len(problems),
        problems_measured=len(measured),
        samples=sum(map(len, measured)),
        passed=sum(map(passed, measured)),
        pass_rate=bootstrap_interval(rates) if rates else None,
    )


def problem_row(problem: Problem, outcomes: Sequence[Outcome], pick: Choice | None) -> ProblemRow:
    """`pick` is the critic's."""
    return ProblemRow(
        task_id=problem.task_id,
        prompt=shorten(problem.prompt),
        samples=len(outcomes),
        passed=passed(outcomes),
        critic_sample_id=pick.sample_id if pick else None,
        critic=pick.passed if pick else None,
        random=passed(outcomes) / len(outcomes) if outcomes else None,
    )


def funnel(
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    status: Mapping[str, int],
    split: str,
    tried: int,
    evaluated: Mapping[str, Sequence[Outcome]],
    skipped: Mapping[str, int],
) -> list[FunnelStep]:
    """From the problem set to the problems on which a choice matters, with what was lost at each step.

    `status` counts the labels of the samples, `tried` the problems of `split` that have samples.
    """
    labelled = sum(status.values()) - status["sandbox_error"]
    usable = [outcome for outcomes in evaluated.values() for outcome in outcomes]
    scored = sum(outcome.score is not None for outcome in usable)
    without_sample = len({problem.task_id for problem in problems} - {sample.task_id for sample in samples})
    cut = sum(sample.finish_reason == "length" for sample in samples)
    solved = sum(passed(outcomes) == len(outcomes) for outcomes in evaluated.values())
    failed = sum(passed(outcomes) == 0 for outcomes in evaluated.values())
    mixed = len(evaluated) - solved - failed
    return [
        FunnelStep(
            "problems", len(problems), "; ".join(f"{count(n, 'problem')} skipped: {why}" for why, n in skipped.items())
        ),
        _step(
            "samples drawn",
            len(samples),
            (without_sample, "problem", "without a sample"),
            (cut, "sample", "cut at the token limit, but kept"),
        ),
        _step(
            "samples labelled",
            labelled,
            (len(samples) - sum(status.values()), "sample", "without a label"),
            (status["sandbox_error"], "sample", "lost by the sandbox"),
        ),
        _step(f"{split} samples, labelled", len(usable), (labelled - len(usable), "sample", "of other splits")),
        _step("scored by the critic", scored, (len(usable) - scored, "sample", "without a score")),
        _step(
            f"{split} problems, measured", len(evaluated), (tried - len(evaluated), "problem", "without a label")
        ),
        _step(
            "problems with both kinds",
            mixed,
            (solved, "problem", "where all samples pass"),
            (failed, "problem", "where none does"),
        ),
    ]  # fmt: skip


def _step(name: str, left: int, *lost: tuple[int, str, str]) -> FunnelStep:
    return FunnelStep(name, left, "; ".join(count(number, noun, why) for number, noun, why in lost if number))
