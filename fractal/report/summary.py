"""A run's results as one plain value: the records of a run folder -> Summary (summary.json, and the page's content).

Pure. What the records cannot tell comes in as Facts; what is not known stays None, and `reasons` says why, so that
nothing missing is ever printed as 0.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fractal.records import SPLITS, STATUSES, Choice, Label, Problem, Sample, Score, Split
from fractal.report import critic as critic_figures
from fractal.report import dataset, strategies
from fractal.report.critic import CriticMetrics
from fractal.report.dataset import FunnelStep, ProblemRow, SplitRow, count, passed
from fractal.report.facts import Facts, SplitAccuracy
from fractal.report.strategies import Curves, DifficultyRow, Duel, PassAt, StrategyResult
from fractal.selection.bootstrap import Interval
from fractal.selection.curves import RocCurve, SelectiveCurve
from fractal.selection.metrics import WithinProblemAuc
from fractal.selection.outcomes import LeftOut, Outcome, count_unscored, left_out, outcomes
from fractal.selection.splits import SEEN, join_splits
from fractal.selection.strategies import BASELINE

FEW_PROBLEMS = 30  # below this the page warns that an interval is wide


@dataclass(frozen=True, slots=True)
class Summary:
    facts: Facts
    problems_by_split: dict[str, int]
    samples: int
    tokens: int  # sampled, all samples
    tokens_per_s: float | None
    labels_by_status: dict[str, int]  # every status, in the order of records.STATUSES
    splits: list[SplitRow]  # "all" comes last
    split: str  # everything below is measured on it, or on several: "validation and test"
    evaluation: SplitRow
    left_out: LeftOut
    pass_at: list[PassAt]  # over the problems of `curves`
    strategies: list[StrategyResult]
    curves: Curves | None
    critic: CriticMetrics | None
    by_problem: list[ProblemRow]
    reasons: dict[str, str] = field(default_factory=dict)  # of what is None or empty above or below: field -> why
    warnings: list[str] = field(default_factory=list)
    funnel: list[FunnelStep] = field(default_factory=list)
    roc: list[RocCurve] = field(default_factory=list)
    selective: list[SelectiveCurve] = field(default_factory=list)
    difficulty: list[DifficultyRow] = field(default_factory=list)
    duels: list[Duel] = field(default_factory=list)
    gap_closed: Interval | None = None  # share of the way from random to the oracle that the critic goes
    split_accuracies: list[SplitAccuracy] = field(default_factory=list)
    rank_auc: dict[str, WithinProblemAuc] = field(default_factory=dict)  # each over the samples that it can rank


def build(
    facts: Facts,
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    labels: Sequence[Label],
    scores: Sequence[Score] = (),
    choices: Sequence[Choice] = (),
    *,
    splits: Sequence[Split] = ("test",),
    split_accuracies: Sequence[SplitAccuracy] = (),
) -> Summary:
    """Measure a run. `choices` are stage 5's, on the problems of `splits`, which nothing was trained or tuned on.

    Records of problems that are not in `problems`, and labels without their sample, are ignored.
    """
    split = join_splits(splits)
    split_of = {problem.task_id: problem.split for problem in problems}
    known = [sample for sample in samples if sample.task_id in split_of]
    keys = {(sample.task_id, sample.sample_id) for sample in known}
    usable = outcomes(known, labels, scores)
    evaluated = {task: own for task, own in usable.items() if split_of[task] in splits}
    inside = [problem for problem in problems if problem.split in splits]
    drawn = [sample for sample in known if split_of[sample.task_id] in splits]
    picked = strategies.by_strategy(choice for choice in choices if choice.task_id in evaluated)
    critic, roc = critic_figures.measure(evaluated)
    curves = strategies.best_of_k(evaluated)
    status: Counter[str] = Counter(label.status for label in labels if (label.task_id, label.sample_id) in keys)
    rows = [
        dataset.split_row(name, [problem for problem in problems if problem.split == name], usable) for name in SPLITS
    ]
    seconds = facts.generate_seconds
    summary = Summary(
        facts=facts,
        problems_by_split={row.split: row.problems for row in rows},
        samples=len(known),
        tokens=sum(sample.tokens for sample in known),
        tokens_per_s=facts.generate_tokens / seconds if facts.generate_tokens is not None and seconds else None,
        labels_by_status={name: status[name] for name in STATUSES},
        splits=[*(row for row in rows if row.problems), dataset.split_row("all", problems, usable)],
        split=split,
        evaluation=dataset.split_row(split, inside, usable),
        left_out=left_out(drawn, labels),
        pass_at=strategies.pass_at(evaluated, len(curves.by_strategy[BASELINE])) if curves else [],
        strategies=strategies.evaluate(picked),
        curves=curves,
        critic=critic,
        by_problem=[
            dataset.problem_row(
                problem, evaluated.get(problem.task_id, ()), picked.get("critic", {}).get(problem.task_id)
            )
            for problem in inside
        ],
        funnel=dataset.funnel(
            problems, known, status, split, len({sample.task_id for sample in drawn}), evaluated, facts.skipped
        ),
        roc=roc,
        selective=strategies.selective(evaluated, picked),
        difficulty=strategies.difficulty(evaluated, picked),
        duels=strategies.duels(picked),
        gap_closed=strategies.gap_closed(picked),
        split_accuracies=list(split_accuracies),
        rank_auc=critic_figures.rank_auc(evaluated),
    )
    summary.reasons.update(_reasons(summary, bool(evaluated)))
    summary.warnings.extend([*facts.warnings, *_warnings(summary, evaluated)])
    if unchosen := evaluated.keys() - picked.get(BASELINE, evaluated).keys():
        summary.warnings.append(
            f"The selection is older than the labels: {count(len(unchosen), 'problem')} without a choice. Select again."
        )
    return summary


def _reasons(summary: Summary, any_evaluated: bool) -> dict[str, str]:
    """Of what is None or empty: field -> why."""
    split, critic = summary.split, summary.critic
    reasons: dict[str, str] = {}
    if summary.tokens_per_s is None:
        reasons["tokens_per_s"] = "the time that generation took was not recorded"
    if not any_evaluated:
        reasons["strategies"] = reasons["curves"] = reasons["difficulty"] = f"no {split} problem has a usable sample"
    elif not summary.strategies:
        reasons["strategies"] = f"selection has no choices for {split} problems"
    no_critic = f"no usable {split} sample has a critic's score"
    if critic is None:
        reasons["critic"] = no_critic
    elif critic.auc is None:
        reasons["auc"] = f"all scored {split} samples have the same label"
    if critic is not None and critic.within_problem.auc is None:
        reasons["within_problem"] = f"no {split} problem has both a passing and a failing sample"
    if not summary.facts.epochs:
        reasons["epochs"] = "no training was recorded"
    if not summary.roc:
        reasons["roc"] = reasons.get("auc", no_critic)
    if not summary.selective:
        reasons["selective"] = reasons.get(
            "strategies", "no strategy that picks is sure of anything: no score is known"
        )
    if not summary.duels:
        reasons["duels"] = reasons.get("strategies", "the critic picked nothing")
    if summary.gap_closed is None:
        nothing = f"on every {split} problem that the critic chose for, all samples pass or all fail"
        reasons["gap_closed"] = nothing if summary.duels else reasons["duels"]
    if not summary.split_accuracies:
        reasons["split_accuracies"] = "training did not compare the two ways to split"
    return reasons


def _warnings(summary: Summary, evaluated: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """What the reader should know first."""
    facts, split, problems = summary.facts, summary.split, summary.evaluation.problems
    warnings = []
    if split == "train" and any(result.strategy == "critic" for result in summary.strategies):
        warnings.append(SEEN.capitalize())
    mixed = sum(0 < passed(own) < len(own) for own in evaluated.values())
    if evaluated and mixed < FEW_PROBLEMS:
        warnings.append(
            f"Only {count(mixed, f'{split} problem')} of {problems} {'has' if mixed == 1 else 'have'} both "
            "a passing and a failing sample, and only there does a choice matter: intervals are wide."
        )
    if missing := problems - len(evaluated):
        warnings.append(f"{count(missing, f'{split} problem')} without a usable sample left out of every rate.")
    if unlabelled := summary.left_out.unlabelled:
        warnings.append(f"{count(unlabelled, f'{split} sample')} without a label left out.")
    if lost := summary.left_out.sandbox_error:
        warnings.append(f"{count(lost, f'{split} sample')} left out: the sandbox failed, not the program.")
    if unscored := count_unscored(evaluated):
        warnings.append(f"{count(unscored, f'usable {split} sample')} without a score: the critic ranks them last.")
    for result in summary.strategies:
        if result.problems < len(evaluated):
            warnings.append(
                f"{result.strategy} is measured on {result.problems} of {len(evaluated)} problems: no data elsewhere."
            )
    curves = summary.curves
    if curves and curves.problems < len(evaluated):
        length = len(curves.by_strategy[BASELINE])
        warnings.append(
            f"pass@k and the curves are over the {curves.problems} of {len(evaluated)} problems with at least "
            f"{count(length, 'usable sample')}."
        )
    warnings += [f"{count(number, 'problem')} skipped: {reason}." for reason, number in facts.skipped.items()]
    if facts.git_dirty:
        warnings.append("The code had uncommitted changes: the commit alone does not reproduce this run.")
    return warnings
