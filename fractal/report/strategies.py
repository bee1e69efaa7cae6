"""How the strategies do: pass rates and gains, curves over k, the critic against each other strategy, difficulty."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fractal.records import Choice, task_order
from fractal.report.dataset import passed
from fractal.selection import bootstrap, curves, metrics
from fractal.selection.bootstrap import Interval
from fractal.selection.curves import SelectiveCurve
from fractal.selection.outcomes import Outcome
from fractal.selection.strategies import BASELINE, RANKINGS

PASS_AT = (1, 2, 5, 10, 20, 50, 100)
CURVES = ("critic", "mean_logprob", "critic_logprob", BASELINE, "visible_test_critic", "oracle")
SELECTIVE = ("critic", "critic_logprob", "mean_logprob")  # their confidence: that of the sample they pick
DIFFICULTY = (0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0)  # edges of the share of a problem's samples that pass
AT_DIFFICULTY = ("critic", BASELINE, "mean_logprob", "oracle")

ByStrategy = Mapping[str, Mapping[str, Choice]]  # strategy -> task_id -> choice


@dataclass(frozen=True, slots=True)
class StrategyResult:
    """What one strategy reaches, as the mean over problems of "the program picked passes"."""

    strategy: str
    problems: int
    pass_rate: Interval
    gain_over_random: Interval  # paired, on the same problems


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
class Duel:
    """The critic's pick against another strategy's, problem by problem."""

    strategy: str  # the other
    wins: int  # problems where the critic's pick passes and the other fails (for random: is above the expectation)
    losses: int
    ties: int
    gain: Interval  # critic minus the other, paired
    p_value: float | None  # two-sided: exact sign test on wins and losses; against an expectation metrics.picks_test


@dataclass(frozen=True, slots=True)
class DifficultyRow:
    """Problems of like difficulty, by the share of their samples that pass, and what strategies reach there."""

    low: float  # the share is in (low, high]; low == high: exactly that
    high: float
    problems: int
    pass_rates: dict[str, float]  # strategy -> mean


def by_strategy(choices: Iterable[Choice]) -> dict[str, dict[str, Choice]]:
    table: dict[str, dict[str, Choice]] = {}
    for choice in choices:
        table.setdefault(choice.strategy, {})[choice.task_id] = choice
    return table


def evaluate(choices: ByStrategy) -> list[StrategyResult]:
    """Pass rate and gain over random of each strategy, with bootstrap intervals over problems.

    A strategy without a choice on some problems is measured on the others, and compared with random on those.
    """
    results = []
    for strategy, own in choices.items():
        tasks = sorted(own, key=task_order)
        values = [own[task].passed for task in tasks]
        gain = bootstrap.bootstrap_interval([own[task].passed - choices[BASELINE][task].passed for task in tasks])
        results.append(StrategyResult(strategy, len(tasks), bootstrap.bootstrap_interval(values), gain))
    return results


def duels(choices: ByStrategy) -> list[Duel]:
    """The critic against every other strategy, on the problems where both chose."""
    critic, rows = choices.get("critic", {}), []
    for strategy, other in choices.items():
        tasks = sorted(critic.keys() & other.keys(), key=task_order)
        if strategy == "critic" or not tasks:
            continue
        pairs = [(critic[task].passed, other[task].passed) for task in tasks]
        ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
        wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        if any(other[task].sample_id is None for task in tasks):  # an expectation over several samples
            p_value = metrics.picks_test(round(sum(ours)), theirs)
        else:
            p_value = metrics.sign_test(wins, losses)
        gain = bootstrap.bootstrap_interval([a - b for a, b in pairs])
        rows.append(Duel(strategy, wins, losses, len(tasks) - wins - losses, gain, p_value))
    return rows


def gap_closed(choices: ByStrategy) -> Interval | None:
    """On the problems where the critic chose."""
    tasks = sorted(choices.get("critic", {}), key=task_order)
    if not tasks:
        return None
    critic, random, oracle = ([choices[name][task].passed for task in tasks] for name in ("critic", BASELINE, "oracle"))
    return bootstrap.gap_closed(critic, random, oracle)


def selective(evaluated: Mapping[str, Sequence[Outcome]], choices: ByStrategy) -> list[SelectiveCurve]:
    """Where a strategy is surest. A critic's confidence is its calibrated probability."""
    rows = []
    for strategy in SELECTIVE:
        own = choices.get(strategy, {})
        picks = [o for task in own for o in evaluated[task] if o.sample.sample_id == own[task].sample_id]
        if strategy == "critic":
            sure = [outcome.score.probability if outcome.score else None for outcome in picks]
        else:
            sure = [RANKINGS[strategy](outcome) for outcome in picks]
        verdicts = [own[outcome.sample.task_id].passed for outcome in picks]
        known = [pair for pair in zip(sure, verdicts, strict=True) if pair[0] is not None]
        if known:
            rows.append(curves.selective(strategy, *zip(*known, strict=True)))
    return rows


def difficulty(evaluated: Mapping[str, Sequence[Outcome]], choices: ByStrategy) -> list[DifficultyRow]:
    """Every bucket, also those without a problem; a strategy that chose on none of its problems is left out."""
    share = {task: passed(outcomes) / len(outcomes) for task, outcomes in evaluated.items()}
    rows = []
    for low, high in itertools.pairwise(DIFFICULTY):
        if low == high:
            inside = {task for task, rate in share.items() if rate == low}
        else:
            inside = {task for task, rate in share.items() if low < rate <= high and rate < 1}
        picks = {name: [c.passed for t, c in choices.get(name, {}).items() if t in inside] for name in AT_DIFFICULTY}
        rates = {name: math.fsum(verdicts) / len(verdicts) for name, verdicts in picks.items() if verdicts}
        rows.append(DifficultyRow(low, high, len(inside), rates))
    return rows


def best_of_k(evaluated: Mapping[str, Sequence[Outcome]]) -> Curves | None:
    """A strategy that ranks only some of the problems' samples has no curve."""
    if not evaluated:
        return None
    length = _curve_length([len(outcomes) for outcomes in evaluated.values()])
    whole = [outcomes for outcomes in evaluated.values() if len(outcomes) >= length]
    bands: dict[str, list[Interval]] = {}
    for strategy in CURVES:
        ranked = [(ranks, outcomes) for outcomes in whole if (ranks := _ranks(strategy, outcomes))]
        if len(ranked) == len(whole):
            table = [curves.best_of_k_curve(ranks, [o.passed for o in outcomes])[:length] for ranks, outcomes in ranked]
            bands[strategy] = bootstrap.bootstrap_bands(table)
    return Curves(len(whole), {name: [point.mean for point in band] for name, band in bands.items()}, bands)


def _curve_length(sizes: Sequence[int]) -> int:
    """The k up to which curves go: where k times the number of problems with k usable samples is largest.

    A curve must be over the same problems at every k, and one problem that lost its samples must not cut it short.
    """
    return max(sorted(set(sizes)), key=lambda k: (k * sum(size >= k for size in sizes), k))


def _ranks(strategy: str, outcomes: Sequence[Outcome]) -> list[float] | None:
    """One number for each sample, the highest goes first, -inf where nothing is known; None if nothing is of any.

    A filter before a ranking is a ranking, too: of any k samples the best by (passes the visible test, critic) is
    what the critic takes among those that pass, or among all k if none does.
    """
    if strategy == BASELINE:
        return [0.0] * len(outcomes)
    if strategy == "visible_test_critic":
        logits = _ranks("critic", outcomes)
        if logits is None or any(outcome.visible is None for outcome in outcomes):
            return None
        pairs = [(bool(outcome.visible), logit) for outcome, logit in zip(outcomes, logits, strict=True)]
        rank = {pair: float(number) for number, pair in enumerate(sorted(set(pairs)))}
        return [rank[pair] for pair in pairs]
    values = [RANKINGS[strategy](outcome) for outcome in outcomes]
    if all(value is None for value in values):
        return None
    return [-math.inf if value is None else value for value in values]


def pass_at(evaluated: Mapping[str, Sequence[Outcome]], length: int) -> list[PassAt]:
    """pass@k for k up to `length`, over the problems with as many usable samples."""
    counts = [(len(outcomes), passed(outcomes)) for outcomes in evaluated.values() if len(outcomes) >= length]
    ks = sorted({k for k in PASS_AT if k < length} | {length})
    return [PassAt(k, bootstrap.bootstrap_interval([metrics.pass_at_k(n, c, k) for n, c in counts])) for k in ks]
