"""Stage 5: labels, scores, outputs -> selection.jsonl: which of a problem's samples each strategy picks.

`choose` decides, `outcomes.evaluate` measures; both are pure and see the problems of the measured splits only, which
the caller filters. The verdict of a sample decides whether a pick passed; no strategy but the oracle looks at it to
pick, and the two that filter look at the verdict on the one test that the prompt shows.

| strategy | picks | from |
|---|---|---|
| critic | the highest logit of the critic | Cobbe et al. 2021, arXiv:2110.14168: a verifier ranks samples |
| random | any: exact expectation | Chen et al. 2021, arXiv:2107.03374: pass@1 |
| first | sample 0 | one draw, what a user without a choice gets |
| mean_logprob | the highest log-probability per token | Chen et al. 2021, section 3.3 |
| sum_logprob | the highest log-probability | Chen et al. 2021, section 3.3 |
| shortest | the shortest program | guards against a critic that only sees length |
| zero_shot | logit of Yes minus No before training | Kadavath et al. 2022, arXiv:2207.05221: P(True) |
| critic_logprob | critic and mean log-probability, fitted on train problems | Ni et al. 2023, arXiv:2302.08468 |
| consensus | whose outputs on the visible inputs most samples share | Shi et al. 2022, arXiv:2204.11454: MBR-Exec |
| visible_test | any that passes the visible test: exact expectation | Li et al. 2022, arXiv:2203.07814: filtering |
| visible_test_critic | the critic's among those | both |
| oracle | one that passes, if any does | pass@n, the ceiling |
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from fractal import console
from fractal.errors import InputError
from fractal.jsonl import Keyed, read_jsonl, unique, write_jsonl
from fractal.records import Choice, Label, Output, Sample, Score
from fractal.rundir import RunDir
from fractal.selection.outcomes import (
    BASELINE,
    RANKINGS,
    SEEN,
    Outcome,
    evaluation_splits,
    in_words,
    outcomes,
    recorded_splits,
    splits_asked,
    without_score,
)

K = TypeVar("K", bound=Keyed)

STRATEGIES: tuple[str, ...] = (
    "critic", BASELINE, "first", "mean_logprob", "sum_logprob", "shortest", "zero_shot", "critic_logprob", "consensus",
    "visible_test", "visible_test_critic", "oracle",
)  # fmt: skip
FILES = ("problems.jsonl", "samples.jsonl", "labels.jsonl", "scores.jsonl", "outputs.jsonl")  # that decide


def run(folder: RunDir, on: str | None = None) -> None:
    """Write selection.jsonl for the splits in `on` ("test,validation"); without a word those of the last time.

    Raises InputError where no sample has been labelled, or none of a split that was asked for.
    """
    asked = None if on is None else splits_asked(on)
    problems = folder.problems()
    labels = read_jsonl(folder.file("labels.jsonl"), Label)
    if not labels:
        raise InputError(f"{folder.path}: has no labels yet. Run `fractal verify --run {folder.path}` first.")
    before = folder.manifest["config"].get("select")
    if on is None and isinstance(before, dict):
        asked = before["on"]
    labelled = {problems[one.task_id].split for one in labels if one.task_id in problems}
    if missing := [split for split in asked or () if split not in labelled]:
        has = ", ".join(sorted(labelled)) or "none"
        raise InputError(f"--on {','.join(asked or ())}: the run has no labelled {missing[0]} problem, only {has}.")
    config = {"on": asked, "inputs": folder.digest(*FILES)}
    if before == config and folder.file("selection.jsonl").exists():
        console.say("select: the choices are there, nothing to do")
        return
    splits = evaluation_splits(problems.values(), labels, asked)
    with folder.stage("select", "selection.jsonl"):
        evaluated = _evaluated(folder, splits)
        choices = _choices(evaluated)
        write_jsonl(folder.file("selection.jsonl"), choices)
        count = len({choice.task_id for choice in choices})
        console.say(f"select: {len({c.strategy for c in choices})} strategies on {count} {in_words(splits)} problems")
    if unscored := without_score(evaluated):
        console.warn(
            f"select: {unscored:,} usable {in_words(splits)} {'sample has' if unscored == 1 else 'samples have'} no "
            f"score: the critic ranks them last. `fractal score --run {folder.path}` scores them."
        )
    if "train" in splits:
        console.warn(f"select: {SEEN}")
    folder.manifest["config"]["select"] = config
    folder.save()


def made(folder: RunDir, splits: Sequence[str] | None = None) -> list[Choice]:
    """The choices that a run folder's records lead to, on the splits that its manifest names; nothing is written."""
    return _choices(_evaluated(folder, splits))


def _evaluated(folder: RunDir, splits: Sequence[str] | None) -> dict[int, list[Outcome]]:
    """The usable samples of the splits, by problem."""
    problems = folder.problems()
    labels = _records(folder, "labels.jsonl", Label)
    if splits is None:
        splits = recorded_splits(folder.manifest["config"], problems.values(), labels)
    inside = {task_id for task_id, problem in problems.items() if problem.split in splits}
    samples = [one for one in _records(folder, "samples.jsonl", Sample) if one.task_id in inside]
    return outcomes(samples, labels, _records(folder, "scores.jsonl", Score), _records(folder, "outputs.jsonl", Output))


def _records(folder: RunDir, name: str, kind: type[K]) -> list[K]:
    """One file's records. Raises InputError where one stands twice."""
    return list(unique(read_jsonl(folder.file(name), kind), folder.file(name)).values())


def choose(
    samples: Iterable[Sample], labels: Iterable[Label], scores: Iterable[Score] = (), outputs: Iterable[Output] = ()
) -> list[Choice]:
    """One Choice per problem and strategy, by task_id and then in the order of STRATEGIES.

    "random" and "visible_test" are exact expectations and name no sample. Samples without a label, or with
    `sandbox_error`, are left out, and so are problems without any other (`left_out` counts both). A strategy that
    knows nothing of any sample of a problem (no scores, log-probabilities or outputs; a visible test whose verdict is
    not known of each) makes no choice there. Raises ValueError if a score or log-probability is NaN.
    """
    return _choices(outcomes(samples, labels, scores, outputs))


def _choices(evaluated: Mapping[int, Sequence[Outcome]]) -> list[Choice]:
    choices = []
    for task_id, candidates in evaluated.items():
        passing = _visibly_passing(candidates)
        for strategy in STRATEGIES:
            best: Outcome | None = None
            if strategy == BASELINE:
                choices.append(Choice(task_id, strategy, None, _share(candidates)))
            elif strategy == "visible_test":
                if passing is not None:
                    choices.append(Choice(task_id, strategy, None, _share(passing)))
            elif strategy == "visible_test_critic":
                known = any(one.logit is not None for one in candidates)
                best = (_best("critic", passing) or passing[0]) if passing is not None and known else None
            elif strategy == "consensus":
                best = _consensus(candidates)
            else:
                best = _best(strategy, candidates)
            if best is not None:
                choices.append(Choice(task_id, strategy, best.sample.sample_id, float(best.passed)))
    return choices


def _share(candidates: Sequence[Outcome]) -> float:
    return sum(one.passed for one in candidates) / len(candidates)


def _visibly_passing(candidates: Sequence[Outcome]) -> Sequence[Outcome] | None:
    """Those that pass the test shown in the prompt; all of them if none does; None if it is not known of each."""
    if any(one.visible is None for one in candidates):
        return None
    return [one for one in candidates if one.visible] or candidates


def _consensus(candidates: Sequence[Outcome]) -> Outcome | None:
    """MBR-Exec with the 0/1 loss on whole outputs: the sample that agrees with most, itself among them.

    A sample without an output agrees with nobody. Ties by mean log-probability, then the lowest sample_id. None where
    no sample was asked for its output.
    """
    if all(one.output is None for one in candidates):
        return None
    texts = [one.output.output if one.output else None for one in candidates]
    votes = Counter(text for text in texts if text is not None)
    best, best_rank = None, (-1, 0.0)
    for one, text in zip(candidates, texts, strict=True):
        logprob = one.sample.mean_logprob
        rank = (votes[text] if text is not None else 0, -math.inf if logprob is None else logprob)
        if rank > best_rank:
            best, best_rank = one, rank
    return best


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
