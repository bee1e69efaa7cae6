"""Which of a problem's samples each strategy picks. Pure.

The verdict of a sample decides whether a pick passed; no strategy but the oracle looks at it to pick, and the two that
filter look at the verdict on the one test that the prompt shows.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from fractal.records import Choice
from fractal.selection.outcomes import Outcome

BASELINE = "random"  # every gain is measured against it
STRATEGIES = {  # what each picks, and whose it is
    "critic": "highest score of the critic",  # Cobbe et al. 2021, arXiv:2110.14168: a verifier ranks samples
    BASELINE: "any sample, exact expectation",  # Chen et al. 2021, arXiv:2107.03374: pass@1
    "first": "the first sample",  # what a user without a choice gets
    "mean_logprob": "highest log-probability per token",  # Chen et al. 2021, section 3.3
    "sum_logprob": "highest log-probability",  # Chen et al. 2021, section 3.3
    "shortest": "shortest program",  # guards against a critic that only sees length
    "zero_shot": "the model's own yes or no, before any training",  # Kadavath et al. 2022, arXiv:2207.05221: P(True)
    "critic_logprob": "critic and log-probability, weights from train problems",  # Ni et al. 2023, arXiv:2302.08468
    "consensus": "the output most samples agree on, on visible inputs",  # Shi et al. 2022, arXiv:2204.11454: MBR-Exec
    "visible_test": "any that passes the test in the prompt, exact expectation",  # Li et al. 2022, arXiv:2203.07814
    "visible_test_critic": "highest score among those that pass it",
    "oracle": "a passing sample if there is one: the ceiling",
}

# Of a problem's samples the highest is picked; None is "nothing known" and ranks last; ties: the lowest sample_id.
RANKINGS: dict[str, Callable[[Outcome], float | None]] = {
    "critic": lambda outcome: outcome.logit,
    "first": lambda outcome: 0.0,
    "mean_logprob": lambda outcome: outcome.sample.mean_logprob,
    "sum_logprob": lambda outcome: outcome.sample.sum_logprob if outcome.sample.tokens else None,
    "shortest": lambda outcome: -len(outcome.sample.code),
    "zero_shot": lambda outcome: outcome.score.zero_shot if outcome.score else None,
    "critic_logprob": lambda outcome: outcome.score.combined if outcome.score else None,
    "oracle": lambda outcome: float(outcome.passed),
}


def choose(evaluated: Mapping[str, Sequence[Outcome]]) -> list[Choice]:
    """One Choice per problem and strategy, by task_id and then in the order of STRATEGIES.

    `evaluated` holds the usable samples of the measured problems (`outcomes`). "random" and "visible_test" are exact
    expectations and name no sample. A strategy that knows nothing of any sample of a problem (no scores,
    log-probabilities or outputs; a visible test whose verdict is not known of each) makes no choice there.
    """
    choices = []
    for task_id, candidates in evaluated.items():
        for strategy in STRATEGIES:
            if strategy in (BASELINE, "visible_test"):
                pool = candidates if strategy == BASELINE else _passing_visible(candidates)
                if pool:
                    rate = sum(outcome.passed for outcome in pool) / len(pool)
                    choices.append(Choice(task_id, strategy, None, rate))
            elif picked := _pick(strategy, candidates):
                choices.append(Choice(task_id, strategy, picked.sample.sample_id, float(picked.passed)))
    return choices


def _pick(strategy: str, candidates: Sequence[Outcome]) -> Outcome | None:
    if strategy == "consensus":
        return _consensus(candidates)
    if strategy == "visible_test_critic":
        passing = _passing_visible(candidates)
        if passing is None or all(outcome.logit is None for outcome in candidates):
            return None
        return _best("critic", passing) or passing[0]
    return _best(strategy, candidates)


def _passing_visible(candidates: Sequence[Outcome]) -> Sequence[Outcome] | None:
    """Those that pass the test shown in the prompt; all of them if none does; None if it is not known of each."""
    if any(outcome.visible is None for outcome in candidates):
        return None
    return [outcome for outcome in candidates if outcome.visible] or candidates


def _consensus(candidates: Sequence[Outcome]) -> Outcome | None:
    """MBR-Exec with the 0/1 loss on whole outputs: the sample that agrees with most, itself among them.

    A sample without an output agrees with nobody. Ties by mean log-probability, then the lowest sample_id. None where
    no sample's output was recorded.
    """
    if all(outcome.output is None for outcome in candidates):
        return None
    texts = {outcome.sample.sample_id: outcome.output.output if outcome.output else None for outcome in candidates}
    votes = Counter(texts.values())
    votes[None] = 0

    def rank(outcome: Outcome) -> tuple[int, float]:
        logprob = outcome.sample.mean_logprob
        return votes[texts[outcome.sample.sample_id]], -math.inf if logprob is None else logprob

    return max(candidates, key=rank)


def _best(strategy: str, candidates: Sequence[Outcome]) -> Outcome | None:
    """The first of the highest-ranking candidates (they come by sample_id); None if nothing is known of any."""
    known = [(rank, outcome) for outcome in candidates if (rank := RANKINGS[strategy](outcome)) is not None]
    return max(known, key=lambda pair: pair[0])[1] if known else None
