"""Stage 5: labels, scores -> selection.jsonl: which of a problem's samples each strategy picks.

`choose` decides, `evaluate` measures; both are pure and see the problems of one split only, which the caller filters.
The verdict of a sample decides whether a pick passed; no strategy but the oracle looks at it to pick.
"""

from collections.abc import Callable, Iterable, Sequence

from fractal.outcomes import BASELINE, LeftOut, Outcome, StrategyResult, evaluate, left_out, outcomes
from fractal.records import Choice, Label, Sample, Score

__all__ = ["RANKINGS", "STRATEGIES", "LeftOut", "StrategyResult", "choose", "evaluate", "left_out"]

# Higher is better; None is "nothing known" and ranks last; ties go to the lowest sample_id.
RANKINGS: dict[str, Callable[[Outcome], float | None]] = {
    "critic": lambda one: one.logit,
    "first": lambda one: 0.0,
    "mean_logprob": lambda one: one.mean_logprob,
    "sum_logprob": lambda one: one.sample.sum_logprob if one.sample.tokens else None,
    "shortest": lambda one: -len(one.sample.code),
    "oracle": lambda one: float(one.passed),
}
STRATEGIES: tuple[str, ...] = ("critic", BASELINE, "first", "mean_logprob", "sum_logprob", "shortest", "oracle")


def choose(samples: Iterable[Sample], labels: Iterable[Label], scores: Iterable[Score] = ()) -> list[Choice]:
    """One Choice per problem and strategy, by task_id and then in the order of STRATEGIES.

    "random" is the exact expectation over the problem's samples and names none of them. Samples without a label, or
    with `sandbox_error`, are left out, and so are problems without any other (`left_out` counts both). A strategy
    that knows nothing of any sample of a problem (no scores, no log-probabilities) makes no choice there.
    Raises ValueError if a score or log-probability is NaN.
    """
    choices = []
    for task_id, candidates in outcomes(samples, labels, scores).items():
        for strategy in STRATEGIES:
            if strategy == BASELINE:
                share = sum(one.passed for one in candidates) / len(candidates)
                choices.append(Choice(task_id, strategy, None, share))
            elif (best := _best(strategy, candidates)) is not None:
                choices.append(Choice(task_id, strategy, best.sample.sample_id, float(best.passed)))
    return choices


def _best(strategy: str, candidates: Sequence[Outcome]) -> Outcome | None:
    """The first of the highest-ranking candidates (they come by sample_id); None if nothing is known of any."""
    best, best_rank = None, 0.0
    for one in candidates:
        rank = RANKINGS[strategy](one)
        if rank is None:
            continue
        if rank != rank:
            raise ValueError(f"{strategy}: NaN for task_id {one.sample.task_id}, sample_id {one.sample.sample_id}")
        if best is None or rank > best_rank:
            best, best_rank = one, rank
    return best
