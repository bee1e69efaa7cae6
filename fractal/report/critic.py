"""How well the critic, and every other order of samples, tells passing programs from failing ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fractal.selection import curves, metrics
from fractal.selection.bootstrap import Interval, bootstrap_interval
from fractal.selection.curves import RocCurve
from fractal.selection.metrics import Bin, WithinProblemAuc
from fractal.selection.outcomes import Outcome
from fractal.selection.strategies import RANKINGS

RANKED = ("critic", "zero_shot", "mean_logprob", "sum_logprob", "shortest", "critic_logprob")  # orders of all samples


@dataclass(frozen=True, slots=True)
class CriticMetrics:
    """The critic on the evaluation split's usable samples."""

    problems: int
    samples: int
    accuracy: float  # samples pooled, like the two to compare it with
    majority_accuracy: float
    problem_mean_accuracy: float
    auc: float | None  # pooled
    within_problem: WithinProblemAuc
    brier: float
    expected_calibration_error: float
    reliability: list[Bin]
    accuracy_interval: Interval | None = None  # of accuracy, over problems weighing by their samples


def measure(evaluated: Mapping[str, Sequence[Outcome]]) -> tuple[CriticMetrics | None, list[RocCurve]]:
    """Metrics, and the ROC curves pooled and within a problem; a curve that does not exist is left out."""
    scored = [(outcome.score, outcome.passed) for own in evaluated.values() for outcome in own if outcome.score]
    if not scored:
        return None, []
    tasks = [score.task_id for score, _ in scored]
    logits = [score.score for score, _ in scored]
    probabilities = [score.probability for score, _ in scored]
    passed = [verdict for _, verdict in scored]
    right: dict[str, list[bool]] = {}
    for score, verdict in scored:
        right.setdefault(score.task_id, []).append((score.probability >= 0.5) == verdict)
    accuracy_interval = bootstrap_interval(
        [sum(verdicts) / len(verdicts) for verdicts in right.values()],
        weights=[len(verdicts) for verdicts in right.values()],
    )
    critic = CriticMetrics(
        problems=len(right),
        samples=len(scored),
        accuracy=metrics.accuracy(probabilities, passed),
        majority_accuracy=metrics.majority_accuracy(passed),
        problem_mean_accuracy=metrics.problem_mean_accuracy(passed, tasks),
        auc=metrics.auc(logits, passed),
        within_problem=metrics.within_problem_auc(logits, passed, tasks),
        brier=metrics.brier(probabilities, passed),
        expected_calibration_error=metrics.expected_calibration_error(probabilities, passed),
        reliability=metrics.reliability(probabilities, passed),
        accuracy_interval=accuracy_interval,
    )
    both = (curves.roc(logits, passed), curves.within_problem_roc(logits, passed, tasks))
    return critic, [curves.thin_roc(curve) for curve in both if curve is not None]


def rank_auc(evaluated: Mapping[str, Sequence[Outcome]]) -> dict[str, WithinProblemAuc]:
    """Of each order of samples, over those whose rank is known; an order that knows no rank is left out."""
    aucs = {}
    for strategy in RANKED:
        ranked = [(RANKINGS[strategy](outcome), outcome) for own in evaluated.values() for outcome in own]
        known = [(rank, o.passed, o.sample.task_id) for rank, o in ranked if rank is not None]
        if known:
            aucs[strategy] = metrics.within_problem_auc(*zip(*known, strict=True))
    return aucs
