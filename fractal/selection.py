"""Stage 5: labels, scores -> selection.jsonl: which of a problem's samples each strategy picks.

`choose` decides, `evaluate` measures; both are pure and see the problems of one split only, which the caller filters.
The verdict of a sample decides whether a pick passed; no strategy but the oracle looks at it to pick.
"""

from collections.abc import Callable, Iterable, Sequence

from fractal import console
from fractal.outcomes import (
    BASELINE,
    LeftOut,
    Outcome,
    StrategyResult,
    evaluate,
    evaluation_split,
    left_out,
    outcomes,
)
from fractal.records import Choice, InputError, Label, Sample, Score, read_jsonl, write_jsonl
from fractal.run import RunDir

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


def run(folder: RunDir) -> None:
    """Write selection.jsonl for the evaluation split. Raises InputError where no sample has been labelled."""
    problems = folder.problems()
    samples, labels = read_jsonl(folder.file("samples.jsonl"), Sample), read_jsonl(folder.file("labels.jsonl"), Label)
    if not labels:
        raise InputError(f"{folder.path}: has no labels yet. Run `fractal verify --run {folder.path}` first.")
    inputs = folder.digest("problems.jsonl", "samples.jsonl", "labels.jsonl", "scores.jsonl")
    if folder.manifest["config"].get("select") == inputs and folder.file("selection.jsonl").exists():
        console.say("select: the choices are there, nothing to do")
        return
    split = evaluation_split(problems.values(), labels)
    inside = [s for s in samples if problems[s.task_id].split == split]
    with folder.stage("select", "selection.jsonl"):
        choices = choose(inside, labels, read_jsonl(folder.file("scores.jsonl"), Score))
        write_jsonl(folder.file("selection.jsonl"), choices)
        count = len({choice.task_id for choice in choices})
        console.say(f"select: {len({c.strategy for c in choices})} strategies on {count} {split} problems")
    if split == "train":
        console.warn("select: there are only train problems; the critic has seen them, so its figures flatter it.")
    folder.manifest["config"]["select"] = inputs
    folder.save()


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
