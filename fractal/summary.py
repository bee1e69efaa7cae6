"""What a run found, as one plain value: the records of a run folder -> Summary (summary.json, and the page's content).

Pure. What the records cannot tell (model digest, seconds, versions) comes in as Facts; what is not known stays None,
and `reasons` says why, so that nothing missing is ever printed as 0.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fractal import metrics
from fractal.metrics import Bin, Interval, WithinProblemAuc
from fractal.outcomes import BASELINE, LeftOut, Outcome, StrategyResult, evaluate, left_out, outcomes
from fractal.records import SPLITS, STATUSES, Choice, Label, Problem, Sample, Score, Split

PROMPT_CHARS = 120  # of a prompt in the table of problems
FEW_PROBLEMS = 30  # below this the page warns that an interval is wide
PASS_AT = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One epoch of the critic's training; epoch 0 is the zero-shot judge and has no train_loss."""

    epoch: int
    train_loss: float | None
    val_acc: float | None  # 0..1, over validation samples
    val_within_auc: float | None = None  # AUC within a problem, over validation samples
    dev_within_auc: float | None = None  # the same over train problems held out of training: decides when to stop
    chosen: bool = False  # the checkpoint that scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What manifest and stages know and the records do not; None is "not known"."""

    run: str
    date: str  # ISO 8601, of the run's end
    command: str  # recomputes the page from the run folder
    model: str
    model_revision: str | None = None
    weights_digest: str | None = None
    backend: str | None = None
    seed: int | None = None
    temperature: float | None = None
    n: int | None = None  # samples asked for per problem
    problem_set: str | None = None
    problem_set_digest: str | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)  # in the order of the stages
    generate_tokens: int | None = None  # drawn in generate_seconds: a resumed run counts both or neither
    generate_seconds: float | None = None
    sandbox_image: str | None = None
    sandbox_digest: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    critic: str | None = None  # base model and mode, in words
    epochs: Sequence[Epoch] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)  # problems left out before generation: reason -> count
    warnings: Sequence[str] = ()


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
class PassAt:
    k: int
    pass_rate: Interval


@dataclass(frozen=True, slots=True)
class Curves:
    """Mean over the same problems at every k = 1..len: `by_strategy["critic"][k-1]`."""

    problems: int  # with at least len usable samples
    by_strategy: dict[str, list[float]]
    bands: dict[str, list[Interval]] = field(default_factory=dict)  # the same means with 95 % over problems


@dataclass(frozen=True, slots=True)
class FunnelStep:
    """A stage of the data: how many are left, and what went on the way here."""

    name: str  # "problems", "samples drawn", ...
    count: int
    lost: str  # in words with numbers, "" if nothing was lost


@dataclass(frozen=True, slots=True)
class RocCurve:
    """Points from (0, 0) to (1, 1), by falling score; at most a few hundred."""

    name: str  # "pooled" or "within problem"
    false_positive_rate: list[float]
    true_positive_rate: list[float]
    area: float


@dataclass(frozen=True, slots=True)
class SelectiveCurve:
    """Answering only the problems where a strategy is surest: pass rate against the share of problems answered."""

    strategy: str
    coverage: list[float]  # 1/P, 2/P .. 1
    pass_rate: list[Interval]  # of the answered ones
    threshold: list[float]  # the confidence from which on it answers
    area: float  # mean pass rate over all coverages: higher is better


@dataclass(frozen=True, slots=True)
class DifficultyRow:
    """Problems of like difficulty, by the share of their samples that pass, and what strategies reach there."""

    low: float  # the share is in (low, high]; low == high: exactly that
    high: float
    problems: int
    pass_rates: dict[str, float]  # strategy -> mean


@dataclass(frozen=True, slots=True)
class Duel:
    """The critic's pick against another strategy's, problem by problem."""

    strategy: str  # the other
    wins: int  # problems where the critic's pick passes and the other fails (for random: is above the expectation)
    losses: int
    ties: int
    gain: Interval  # critic minus the other, paired
    p_value: float | None  # exact sign test on wins and losses, two-sided; None without either


@dataclass(frozen=True, slots=True)
class SplitAccuracy:
    """A critic under one way to split the same train samples (critic/splits.json, stage 3)."""

    by: str  # "sample": those of one problem lie on both sides; "problem": the honest one
    accuracy: float
    auc: float | None
    within_auc: float | None
    lookup_accuracy: float  # the majority label of the same problem on the training side; majority class if it has none


@dataclass(frozen=True, slots=True)
class CriticMetrics:
    """The critic on the evaluation split's usable samples."""

    problems: int
    samples: int
    accuracy: float  # samples pooled, like the two to hold against it
    majority_accuracy: float
    problem_mean_accuracy: float
    auc: float | None  # pooled
    within_problem: WithinProblemAuc
    brier: float
    expected_calibration_error: float
    reliability: list[Bin]


@dataclass(frozen=True, slots=True)
class ProblemRow:
    task_id: int
    prompt: str  # shortened, one line
    samples: int  # usable
    passed: int
    critic_sample_id: int | None
    critic: float | None  # 1 if the critic's pick passes, else 0
    random: float | None  # None without a usable sample


@dataclass(frozen=True, slots=True)
class Summary:
    facts: Facts
    problems_by_split: dict[str, int]
    samples: int
    tokens: int  # sampled, all samples
    tokens_per_s: float | None
    labels_by_status: dict[str, int]  # every status, in the order of records.STATUSES
    splits: list[SplitRow]  # "all" comes last
    split: str  # everything below is measured on it
    evaluation: SplitRow
    left_out: LeftOut
    pass_at: list[PassAt]  # over the problems of `curves`
    strategies: list[StrategyResult]
    curves: Curves | None
    critic: CriticMetrics | None
    by_problem: list[ProblemRow]
    reasons: dict[str, str]  # of what is None or empty above: field -> why
    warnings: list[str]
    funnel: list[FunnelStep] = field(default_factory=list)
    roc: list[RocCurve] = field(default_factory=list)
    selective: list[SelectiveCurve] = field(default_factory=list)
    difficulty: list[DifficultyRow] = field(default_factory=list)
    duels: list[Duel] = field(default_factory=list)
    gap_closed: Interval | None = None  # share of the way from random to the oracle that the critic goes
    split_accuracies: list[SplitAccuracy] = field(default_factory=list)


def build(
    facts: Facts,
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    labels: Sequence[Label],
    scores: Sequence[Score] = (),
    choices: Sequence[Choice] = (),
    *,
    split: Split = "test",
) -> Summary:
    """Measure a run. `choices` are stage 5's, `split` is the one that nothing was trained or tuned on.

    Records of problems that are not in `problems`, and labels without their sample, are ignored and counted in a
    warning.
    """
    split_of = {one.task_id: one.split for one in problems}
    ours = [one for one in samples if one.task_id in split_of]
    keys = {(one.task_id, one.sample_id) for one in ours}
    found = outcomes(ours, labels, scores)
    evaluated = {task: rows for task, rows in found.items() if split_of[task] == split}
    picked = [one for one in choices if one.task_id in evaluated]
    strategies = evaluate(picked)
    gone = left_out([one for one in ours if split_of[one.task_id] == split], labels)
    critic = _critic(evaluated)
    curves = _curves(evaluated)
    status: Counter[str] = Counter(one.status for one in labels if (one.task_id, one.sample_id) in keys)
    rows = [_split_row(name, [one for one in problems if one.split == name], found) for name in SPLITS]
    evaluation = next(row for row in rows if row.split == split)

    reasons: dict[str, str] = {}
    if facts.generate_tokens is None or not facts.generate_seconds:
        reasons["tokens_per_s"] = "the time that generation took was not recorded"
    if not evaluated:
        reasons["strategies"] = reasons["curves"] = f"no {split} problem has a usable sample"
    elif not strategies:
        reasons["strategies"] = f"selection has no choices for {split} problems"
    if critic is None:
        reasons["critic"] = f"no usable {split} sample has a critic's score"
    elif critic.auc is None:
        reasons["auc"] = f"all scored {split} samples have the same label"
    if critic is not None and critic.within_problem.auc is None:
        reasons["within_problem"] = f"no {split} problem has both a passing and a failing sample"
    if not facts.epochs:
        reasons["epochs"] = "no training was recorded"

    seconds = facts.generate_seconds
    return Summary(
        facts=facts,
        problems_by_split={name: sum(one.split == name for one in problems) for name in SPLITS},
        samples=len(ours),
        tokens=sum(one.tokens for one in ours),
        tokens_per_s=facts.generate_tokens / seconds if facts.generate_tokens is not None and seconds else None,
        labels_by_status={name: status[name] for name in STATUSES},
        splits=[*(row for row in rows if row.problems), _split_row("all", problems, found)],
        split=split,
        evaluation=evaluation,
        left_out=gone,
        pass_at=_pass_at(evaluated, len(curves.by_strategy[BASELINE])) if curves else [],
        strategies=strategies,
        curves=curves,
        critic=critic,
        by_problem=[_problem_row(one, evaluated, picked) for one in problems if one.split == split],
        reasons=reasons,
        warnings=[
            *facts.warnings,
            *_warnings(facts, evaluation, gone, evaluated, strategies, curves),
            *_strays(samples, ours, labels, keys, set(evaluated), picked),
        ],
    )


def shorten(text: str, chars: int = PROMPT_CHARS) -> str:
    """One line of printable characters, cut with an ellipsis. Control and text-direction characters become spaces."""
    line = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    return line if len(line) <= chars else line[: chars - 1].rstrip() + "…"


# ---- the parts -------------------------------------------------------------------------------------------------------


def _split_row(name: str, problems: Sequence[Problem], found: Mapping[int, Sequence[Outcome]]) -> SplitRow:
    counts = [(_passed(found[one.task_id]), len(found[one.task_id])) for one in problems if one.task_id in found]
    rate = metrics.bootstrap_interval([c / n for c, n in counts]) if counts else None
    return SplitRow(name, len(problems), len(counts), sum(n for _, n in counts), sum(c for c, _ in counts), rate)


def _passed(rows: Iterable[Outcome]) -> int:
    return sum(one.passed for one in rows)


def _curve_length(sizes: Sequence[int]) -> int:
    """The k up to which curves go: where k times the number of problems with k usable samples is largest.

    A curve must be over the same problems at every k, and one problem that lost its samples must not cut it short.
    """
    return max(sorted(set(sizes)), key=lambda k: (k * sum(size >= k for size in sizes), k))


def _curves(evaluated: Mapping[int, Sequence[Outcome]]) -> Curves | None:
    if not evaluated:
        return None
    length = _curve_length([len(rows) for rows in evaluated.values()])
    whole = [rows for rows in evaluated.values() if len(rows) >= length]
    ks = range(1, length + 1)
    random = sum(_passed(rows) / len(rows) for rows in whole) / len(whole)
    by_strategy = {BASELINE: [random for _ in ks]}
    rankings = {
        "critic": [[one.logit for one in rows] for rows in whole],
        "mean_logprob": [[one.mean_logprob for one in rows] for rows in whole],
    }
    for strategy, of_problems in rankings.items():
        if all(any(value is not None for value in values) for values in of_problems):
            ranked = [
                ([-math.inf if value is None else value for value in values], [one.passed for one in rows])
                for values, rows in zip(of_problems, whole, strict=True)
            ]
            by_strategy[strategy] = [sum(metrics.best_of_k(*one, k) for one in ranked) / len(whole) for k in ks]
    by_strategy["oracle"] = [
        sum(metrics.pass_at_k(len(rows), _passed(rows), k) for rows in whole) / len(whole) for k in ks
    ]
    return Curves(len(whole), by_strategy)


def _pass_at(evaluated: Mapping[int, Sequence[Outcome]], length: int) -> list[PassAt]:
    counts = [(len(rows), _passed(rows)) for rows in evaluated.values() if len(rows) >= length]
    ks = sorted({k for k in PASS_AT if k < length} | {length})
    return [PassAt(k, metrics.bootstrap_interval([metrics.pass_at_k(n, c, k) for n, c in counts])) for k in ks]


def _critic(evaluated: Mapping[int, Sequence[Outcome]]) -> CriticMetrics | None:
    scored = [(task, one.score, one.passed) for task, rows in evaluated.items() for one in rows if one.score]
    if not scored:
        return None
    tasks = [task for task, _, _ in scored]
    logits = [score.score for _, score, _ in scored]
    probabilities = [score.probability for _, score, _ in scored]
    passed = [verdict for _, _, verdict in scored]
    return CriticMetrics(
        problems=len(set(tasks)),
        samples=len(scored),
        accuracy=metrics.accuracy(probabilities, passed),
        majority_accuracy=metrics.majority_accuracy(passed),
        problem_mean_accuracy=metrics.problem_mean_accuracy(passed, tasks),
        auc=metrics.auc(logits, passed),
        within_problem=metrics.within_problem_auc(logits, passed, tasks),
        brier=metrics.brier(probabilities, passed),
        expected_calibration_error=metrics.expected_calibration_error(probabilities, passed),
        reliability=metrics.reliability(probabilities, passed),
    )


def _problem_row(problem: Problem, evaluated: Mapping[int, Sequence[Outcome]], choices: Sequence[Choice]) -> ProblemRow:
    rows = evaluated.get(problem.task_id, ())
    pick = next((one for one in choices if one.task_id == problem.task_id and one.strategy == "critic"), None)
    return ProblemRow(
        task_id=problem.task_id,
        prompt=shorten(problem.prompt),
        samples=len(rows),
        passed=_passed(rows),
        critic_sample_id=pick.sample_id if pick else None,
        critic=pick.passed if pick else None,
        random=_passed(rows) / len(rows) if rows else None,
    )


# ---- what the reader should know first -------------------------------------------------------------------------------


def _warnings(
    facts: Facts,
    evaluation: SplitRow,
    gone: LeftOut,
    evaluated: Mapping[int, Sequence[Outcome]],
    strategies: Sequence[StrategyResult],
    curves: Curves | None,
) -> list[str]:
    split, found = evaluation.split, []
    mixed = sum(0 < _passed(rows) < len(rows) for rows in evaluated.values())
    if evaluated and mixed < FEW_PROBLEMS:
        found.append(
            f"Only {_count(mixed, f'{split} problem')} of {evaluation.problems} {'has' if mixed == 1 else 'have'} both "
            "a passing and a failing sample. On the others every choice is the same: intervals are wide."
        )
    if missing := evaluation.problems - len(evaluated):
        found.append(f"{_count(missing, f'{split} problem')} without a usable sample left out of every rate.")
    if gone.unlabelled:
        found.append(f"{_count(gone.unlabelled, f'{split} sample')} without a label left out.")
    if gone.sandbox_error:
        found.append(f"{_count(gone.sandbox_error, f'{split} sample')} left out: the sandbox failed, not the program.")
    unscored = sum(one.score is None for rows in evaluated.values() for one in rows)
    if any(one.strategy == "critic" for one in strategies) and unscored:
        found.append(f"{_count(unscored, f'usable {split} sample')} without a score: the critic ranks them last.")
    for one in strategies:
        if one.problems < len(evaluated):
            found.append(
                f"{one.strategy} is measured on {one.problems} of {len(evaluated)} problems: no data elsewhere."
            )
    if curves and curves.problems < len(evaluated):
        length = len(curves.by_strategy[BASELINE])
        found.append(
            f"pass@k and the curves are over the {curves.problems} of {len(evaluated)} problems with at least "
            f"{_count(length, 'usable sample')}."
        )
    for reason, count in facts.skipped.items():
        found.append(f"{_count(count, 'problem')} skipped: {reason}.")
    if facts.git_dirty:
        found.append("The code had uncommitted changes: the commit alone does not reproduce this run.")
    return found


def _strays(
    samples: Sequence[Sample],
    ours: Sequence[Sample],
    labels: Sequence[Label],
    keys: set[tuple[int, int]],
    evaluated: set[int],
    picked: Sequence[Choice],
) -> list[str]:
    """Warnings about records that do not belong together."""
    found = []
    if strangers := len(samples) - len(ours):
        found.append(f"{_count(strangers, 'sample')} of unknown problems ignored.")
    if orphans := sum((one.task_id, one.sample_id) not in keys for one in labels):
        found.append(f"{_count(orphans, 'label')} without a sample ignored.")
    if picked and (behind := len(evaluated - {one.task_id for one in picked})):
        found.append(
            f"The selection is older than the labels: {_count(behind, 'problem')} without a choice. Select again."
        )
    return found


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
