"""What a run found, as one plain value: the records of a run folder -> Summary (summary.json, and the page's content).

Pure. What the records cannot tell (model digest, seconds, versions) comes in as Facts; what is not known stays None,
and `reasons` says why, so that nothing missing is ever printed as 0.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fractal.records import SPLITS, STATUSES, Choice, Label, Problem, Sample, Score, Split
from fractal.selection import metrics
from fractal.selection.metrics import Bin, Interval, WithinProblemAuc
from fractal.selection.outcomes import (
    BASELINE,
    RANKINGS,
    SEEN,
    LeftOut,
    Outcome,
    StrategyResult,
    evaluate,
    in_words,
    left_out,
    outcomes,
    without_score,
)

PROMPT_CHARS = 120  # of a prompt in the table of problems
FEW_PROBLEMS = 30  # below this the page warns that an interval is wide
PASS_AT = (1, 2, 5, 10, 20, 50, 100)
RANKED = ("critic", "zero_shot", "mean_logprob", "sum_logprob", "shortest", "critic_logprob")  # orders of all samples
CURVES = ("critic", "mean_logprob", "critic_logprob", BASELINE, "visible_test_critic", "oracle")
SELECTIVE = ("critic", "critic_logprob", "mean_logprob")  # their confidence: that of the sample they pick
DIFFICULTY = (0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0)  # edges of the share of a problem's samples that pass
AT_DIFFICULTY = ("critic", BASELINE, "mean_logprob", "oracle")


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
    p_value: float | None  # two-sided: exact sign test on wins and losses; against an expectation metrics.picks_test


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
    accuracy_interval: Interval | None = None  # of accuracy, over problems weighing by their samples


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
    split: str  # everything below is measured on it, or on several: "validation and test"
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

    Records of problems that are not in `problems`, and labels without their sample, are ignored and counted in a
    warning.
    """
    split = in_words(splits)
    split_of = {one.task_id: one.split for one in problems}
    ours = [one for one in samples if one.task_id in split_of]
    keys = {(one.task_id, one.sample_id) for one in ours}
    found = outcomes(ours, labels, scores)
    evaluated = {task: rows for task, rows in found.items() if split_of[task] in splits}
    picked = [one for one in choices if one.task_id in evaluated]
    strategies = evaluate(picked)
    inside = [one for one in problems if one.split in splits]
    drawn = [one for one in ours if split_of[one.task_id] in splits]
    gone = left_out(drawn, labels)
    critic = _critic(evaluated)
    curves = _curves(evaluated)
    status: Counter[str] = Counter(one.status for one in labels if (one.task_id, one.sample_id) in keys)
    rows = [_split_row(name, [one for one in problems if one.split == name], found) for name in SPLITS]
    evaluation = _split_row(split, inside, found)
    parts = _Parts(
        roc=_roc(evaluated), selective=_selective(evaluated, picked), duels=_duels(picked), gap=_gap_closed(picked)
    )

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
        by_problem=[_problem_row(one, evaluated, picked) for one in inside],
        reasons=_reasons(facts, split, evaluated, strategies, critic, parts, split_accuracies),
        warnings=[
            *facts.warnings,
            *_warnings(facts, evaluation, gone, evaluated, strategies, curves),
            *_strays(samples, ours, labels, keys, set(evaluated), picked),
        ],
        funnel=_funnel(facts, problems, ours, status, split, drawn, evaluated),
        roc=parts.roc,
        selective=parts.selective,
        difficulty=_difficulty(evaluated, picked),
        duels=parts.duels,
        gap_closed=parts.gap,
        split_accuracies=list(split_accuracies),
        rank_auc=_rank_auc(evaluated),
    )


@dataclass(frozen=True, slots=True)
class _Parts:
    """What may be empty for a reason."""

    roc: list[RocCurve]
    selective: list[SelectiveCurve]
    duels: list[Duel]
    gap: Interval | None


def _reasons(
    facts: Facts,
    split: str,
    evaluated: Mapping[int, Sequence[Outcome]],
    strategies: Sequence[StrategyResult],
    critic: CriticMetrics | None,
    parts: _Parts,
    split_accuracies: Sequence[SplitAccuracy],
) -> dict[str, str]:
    """Of what is None or empty: field -> why."""
    reasons: dict[str, str] = {}
    if facts.generate_tokens is None or not facts.generate_seconds:
        reasons["tokens_per_s"] = "the time that generation took was not recorded"
    if not evaluated:
        reasons["strategies"] = reasons["curves"] = reasons["difficulty"] = f"no {split} problem has a usable sample"
    elif not strategies:
        reasons["strategies"] = f"selection has no choices for {split} problems"
    no_critic = f"no usable {split} sample has a critic's score"
    if critic is None:
        reasons["critic"] = no_critic
    elif critic.auc is None:
        reasons["auc"] = f"all scored {split} samples have the same label"
    if critic is not None and critic.within_problem.auc is None:
        reasons["within_problem"] = f"no {split} problem has both a passing and a failing sample"
    if not facts.epochs:
        reasons["epochs"] = "no training was recorded"
    if not parts.roc:
        reasons["roc"] = reasons.get("auc", no_critic)
    if not parts.selective:
        reasons["selective"] = reasons.get(
            "strategies", "no strategy that picks is sure of anything: no score is known"
        )
    if not parts.duels:
        reasons["duels"] = reasons.get("strategies", "the critic picked nothing")
    if parts.gap is None:
        nothing = f"on every {split} problem that the critic chose for, all samples pass or all fail"
        reasons["gap_closed"] = nothing if parts.duels else reasons["duels"]
    if not split_accuracies:
        reasons["split_accuracies"] = "training did not compare the two ways to split"
    return reasons


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
    bands: dict[str, list[Interval]] = {}
    for strategy in CURVES:
        ranked = [_ranks(strategy, rows) for rows in whole]
        if all(ranks is not None for ranks in ranked):
            table = [
                metrics.best_of_k_curve(ranks, [one.passed for one in rows])[:length]
                for ranks, rows in zip(ranked, whole, strict=True)
                if ranks is not None
            ]
            bands[strategy] = metrics.bootstrap_bands(table)
    return Curves(len(whole), {name: [one.mean for one in band] for name, band in bands.items()}, bands)


def _ranks(strategy: str, rows: Sequence[Outcome]) -> list[float] | None:
    """One number for each sample, the highest goes first, -inf where nothing is known; None if nothing is of any.

    A filter before a ranking is a ranking, too: of any k samples the best by (passes the visible test, critic) is
    what the critic takes among those that pass, or among all k if none does.
    """
    if strategy == BASELINE:
        return [0.0] * len(rows)
    if strategy == "visible_test_critic":
        logits = _ranks("critic", rows)
        if logits is None or any(one.visible is None for one in rows):
            return None
        pairs = [(bool(one.visible), logit) for one, logit in zip(rows, logits, strict=True)]
        place = {pair: float(number) for number, pair in enumerate(sorted(set(pairs)))}
        return [place[pair] for pair in pairs]
    values = [RANKINGS[strategy](one) for one in rows]
    if all(value is None for value in values):
        return None
    return [-math.inf if value is None else value for value in values]


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
    of_problems: dict[int, list[bool]] = {}
    for task, score, verdict in scored:
        of_problems.setdefault(task, []).append((score.probability >= 0.5) == verdict)
    right = [sum(verdicts) / len(verdicts) for verdicts in of_problems.values()]
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
        accuracy_interval=metrics.bootstrap_interval(right, weights=[len(one) for one in of_problems.values()]),
    )


def _rank_auc(evaluated: Mapping[int, Sequence[Outcome]]) -> dict[str, WithinProblemAuc]:
    """Of each order of samples, over those that it knows something of; one that knows nothing is left out."""
    found = {}
    for strategy in RANKED:
        ranked = [
            (task, value, one.passed)
            for task, rows in evaluated.items()
            for one in rows
            if (value := RANKINGS[strategy](one)) is not None
        ]
        if ranked:
            tasks, values, passed = zip(*ranked, strict=True)
            found[strategy] = metrics.within_problem_auc(values, passed, tasks)
    return found


def _roc(evaluated: Mapping[int, Sequence[Outcome]]) -> list[RocCurve]:
    """The critic's, pooled and within a problem; what does not exist is left out."""
    scored = [(task, one.score.score, one.passed) for task, rows in evaluated.items() for one in rows if one.score]
    if not scored:
        return []
    tasks, logits, passed = zip(*scored, strict=True)
    curves = {
        "pooled": metrics.roc(logits, passed),
        "within problem": metrics.within_problem_roc(logits, passed, tasks),
    }
    found = []
    for name, curve in curves.items():
        if curve is not None:
            thin = metrics.thin_roc(curve)
            found.append(RocCurve(name, thin.false_positive_rate, thin.true_positive_rate, curve.area))
    return found


def _by_strategy(choices: Iterable[Choice]) -> dict[str, dict[int, Choice]]:
    found: dict[str, dict[int, Choice]] = {}
    for one in choices:
        found.setdefault(one.strategy, {})[one.task_id] = one
    return found


def _selective(evaluated: Mapping[int, Sequence[Outcome]], choices: Iterable[Choice]) -> list[SelectiveCurve]:
    """Where a strategy is surest. A critic's confidence is its calibrated probability."""
    by_strategy, found = _by_strategy(choices), []
    for strategy in SELECTIVE:
        sure, passed = [], []
        for task, choice in by_strategy.get(strategy, {}).items():
            pick = next((one for one in evaluated[task] if one.sample.sample_id == choice.sample_id), None)
            value = None if pick is None else RANKINGS[strategy](pick)
            if strategy == "critic" and pick is not None and pick.score is not None:
                value = pick.score.probability
            if value is not None:
                sure.append(value)
                passed.append(choice.passed)
        if sure:
            curve = metrics.selective(sure, passed)
            found.append(SelectiveCurve(strategy, curve.coverage, curve.pass_rate, curve.threshold, curve.area))
    return found


def _difficulty(evaluated: Mapping[int, Sequence[Outcome]], choices: Iterable[Choice]) -> list[DifficultyRow]:
    """Every bucket, also those without a problem; a strategy that chose on none of its problems is left out."""
    by_strategy, share = _by_strategy(choices), {task: _passed(rows) / len(rows) for task, rows in evaluated.items()}
    rows = []
    for low, high in itertools.pairwise(DIFFICULTY):
        inside = {task for task, one in share.items() if (one == low if low == high else low < one <= high and one < 1)}
        rates = {}
        for strategy in AT_DIFFICULTY:
            passed = [one.passed for task, one in by_strategy.get(strategy, {}).items() if task in inside]
            if passed:
                rates[strategy] = math.fsum(passed) / len(passed)
        rows.append(DifficultyRow(low, high, len(inside), rates))
    return rows


def _duels(choices: Iterable[Choice]) -> list[Duel]:
    """The critic against every other strategy, on the problems where both chose."""
    by_strategy = _by_strategy(choices)
    critic, found = by_strategy.get("critic", {}), []
    for strategy, theirs in by_strategy.items():
        tasks = sorted(critic.keys() & theirs.keys())
        if strategy == "critic" or not tasks:
            continue
        ours, others = [critic[task].passed for task in tasks], [theirs[task].passed for task in tasks]
        wins, losses = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((ours, others), (others, ours)))
        expectation = any(theirs[task].sample_id is None for task in tasks)
        p_value = metrics.picks_test(round(sum(ours)), others) if expectation else metrics.sign_test(wins, losses)
        gain = metrics.bootstrap_difference(ours, others)
        found.append(Duel(strategy, wins, losses, len(tasks) - wins - losses, gain, p_value))
    return found


def _gap_closed(choices: Iterable[Choice]) -> Interval | None:
    """On the problems where the critic chose."""
    by_strategy = _by_strategy(choices)
    tasks = sorted(by_strategy.get("critic", {}))
    if not tasks:
        return None
    return metrics.gap_closed(
        *([by_strategy[name][task].passed for task in tasks] for name in ("critic", BASELINE, "oracle"))
    )


def _funnel(
    facts: Facts,
    problems: Sequence[Problem],
    ours: Sequence[Sample],
    status: Mapping[str, int],
    split: str,
    drawn: Sequence[Sample],
    evaluated: Mapping[int, Sequence[Outcome]],
) -> list[FunnelStep]:
    """From the problem set to the problems on which a choice matters, with what went on the way."""
    labelled = sum(status.values()) - status["sandbox_error"]
    usable = sum(map(len, evaluated.values()))
    scored = sum(one.score is not None for rows in evaluated.values() for one in rows)
    without = len({one.task_id for one in problems} - {one.task_id for one in ours})
    tried = len({one.task_id for one in drawn})
    solved = sum(_passed(rows) == len(rows) for rows in evaluated.values())
    failed = sum(_passed(rows) == 0 for rows in evaluated.values())
    cut = sum(one.finish_reason == "length" for one in ours)
    unjudged, broken = len(ours) - sum(status.values()), status["sandbox_error"]
    steps = [
        ("problems", len(problems), [f"{_count(n, 'problem')} skipped: {why}" for why, n in facts.skipped.items()]),
        (
            "samples drawn",
            len(ours),
            [_lost(without, "problem", "without a sample"), _lost(cut, "sample", "cut at the token limit, but kept")],
        ),
        (
            "samples labelled",
            labelled,
            [_lost(unjudged, "sample", "without a label"), _lost(broken, "sample", "lost by the sandbox")],
        ),
        (f"{split} samples, labelled", usable, [_lost(labelled - usable, "sample", "of other splits")]),
        ("scored by the critic", scored, [_lost(usable - scored, "sample", "without a score")]),
        (f"{split} problems, measured", len(evaluated), [_lost(tried - len(evaluated), "problem", "without a label")]),
        (
            "problems with both kinds",
            len(evaluated) - solved - failed,
            [_lost(solved, "problem", "where all samples pass"), _lost(failed, "problem", "where none does")],
        ),
    ]
    return [FunnelStep(name, count, "; ".join(filter(None, lost))) for name, count, lost in steps]


def _lost(number: int, noun: str, why: str) -> str:
    return f"{_count(number, noun)} {why}" if number else ""


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
    if split == "train" and any(one.strategy == "critic" for one in strategies):
        found.append(SEEN.capitalize())
    mixed = sum(0 < _passed(rows) < len(rows) for rows in evaluated.values())
    if evaluated and mixed < FEW_PROBLEMS:
        found.append(
            f"Only {_count(mixed, f'{split} problem')} of {evaluation.problems} {'has' if mixed == 1 else 'have'} both "
            "a passing and a failing sample, and only there does a choice matter: intervals are wide."
        )
    if missing := evaluation.problems - len(evaluated):
        found.append(f"{_count(missing, f'{split} problem')} without a usable sample left out of every rate.")
    if gone.unlabelled:
        found.append(f"{_count(gone.unlabelled, f'{split} sample')} without a label left out.")
    if gone.sandbox_error:
        found.append(f"{_count(gone.sandbox_error, f'{split} sample')} left out: the sandbox failed, not the program.")
    if unscored := without_score(evaluated):
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
