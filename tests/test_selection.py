"""selection: what each strategy picks, who is left out, and what the picks are worth."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.metrics import Interval
from fractal.outcomes import LeftOut, left_out
from fractal.records import Choice, Label, Sample, Score
from fractal.selection import STRATEGIES, choose, evaluate

settings.register_profile("untimed", deadline=None)  # a timed assertion is never a test
settings.load_profile("untimed")


def sample(task_id, sample_id, *, code="pass", tokens=4, sum_logprob=-2.0):
    return Sample(task_id, sample_id, code, code, "stop", tokens, sum_logprob, 0, "m")


def label(task_id, sample_id, status):
    return Label(task_id, sample_id, status, status == "passed", [], 0.0, 0.0, "", "")


def score(task_id, sample_id, logit):
    return Score(task_id, sample_id, logit, 1 / (1 + math.exp(-logit)))


def picks(choices, task_id=1):
    return {one.strategy: (one.sample_id, one.passed) for one in choices if one.task_id == task_id}


@st.composite
def runs(draw):
    """Samples with labels and scores: some labels missing, some our own fault, some samples without log-probs."""
    samples, labels, scores = [], [], []
    for task_id in range(1, draw(st.integers(1, 4)) + 1):
        for sample_id in range(draw(st.integers(1, 5))):
            sum_logprob = draw(st.sampled_from([None, -1.0, -3.0]))
            tokens = draw(st.integers(0, 3))
            code = draw(st.sampled_from(["a", "bb", "ccc"]))
            samples.append(sample(task_id, sample_id, code=code, tokens=tokens, sum_logprob=sum_logprob))
            status = draw(st.sampled_from(["passed", "failed", "timeout", "sandbox_error", None]))
            if status:
                labels.append(label(task_id, sample_id, status))
            if draw(st.booleans()):
                scores.append(score(task_id, sample_id, draw(st.sampled_from([-1.0, 0.0, 2.0]))))
    return draw(st.permutations(samples)), draw(st.permutations(labels)), scores


@settings(max_examples=60)
@given(runs())
def test_oracle_is_at_least_and_random_is_the_mean(run):
    samples, labels, scores = run
    choices = choose(samples, labels, scores)
    for task_id in {one.task_id for one in choices}:
        passed = [one.passed for one in labels if one.task_id == task_id and one.status != "sandbox_error"]
        found = picks(choices, task_id)
        assert found["random"] == (None, pytest.approx(sum(passed) / len(passed)))
        assert found["oracle"][1] == any(passed)
        assert all(found["oracle"][1] >= value for _, value in found.values())


@settings(max_examples=60)
@given(runs())
def test_every_pick_is_a_usable_sample_and_carries_its_verdict(run):
    samples, labels, scores = run
    verdicts = {(one.task_id, one.sample_id): one for one in labels}
    choices = choose(samples, labels, scores)
    for one in choices:
        if one.sample_id is not None:
            verdict = verdicts[one.task_id, one.sample_id]
            assert verdict.status != "sandbox_error"
            assert one.passed == float(verdict.passed)
    gone = left_out(samples, labels)
    usable = {one.task_id for one in choices}
    assert usable.isdisjoint(gone.problems)
    assert usable | set(gone.problems) == {one.task_id for one in samples}
    assert gone.sandbox_error == sum(one.status == "sandbox_error" for one in labels)
    assert gone.unlabelled == len(samples) - len(labels)


@given(runs(), st.randoms())
def test_the_order_of_the_files_does_not_matter(run, random):
    samples, labels, scores = run
    shuffled = (random.sample(rows, len(rows)) for rows in run)
    assert choose(*shuffled) == choose(samples, labels, scores)


def test_each_strategy_picks_what_its_name_says():
    samples = [
        sample(1, 0, code="middle", tokens=4, sum_logprob=-4.0),
        sample(1, 1, code="long one", tokens=10, sum_logprob=-5.0),
        sample(1, 2, code="a", tokens=2, sum_logprob=-3.0),
        sample(1, 3, code="middle", tokens=4, sum_logprob=-4.5),
    ]
    labels = [label(1, i, status) for i, status in enumerate(["failed", "failed", "failed", "passed"])]
    scores = [score(1, i, logit) for i, logit in enumerate([-1.0, 0.0, 0.5, 2.0])]
    choices = choose(samples, labels, scores)
    assert [one.strategy for one in choices] == list(STRATEGIES)
    assert picks(choices) == {
        "critic": (3, 1.0),
        "random": (None, 0.25),
        "first": (0, 0.0),
        "mean_logprob": (1, 0.0),
        "sum_logprob": (2, 0.0),
        "shortest": (2, 0.0),
        "oracle": (3, 1.0),
    }


def test_ties_go_to_the_lowest_sample_id():
    samples = [sample(1, i) for i in (2, 0, 1)]
    labels = [label(1, i, "failed") for i in range(3)]
    found = picks(choose(samples, labels, [score(1, i, 1.0) for i in range(3)]))
    assert {sample_id for sample_id, _ in found.values()} == {None, 0}


def test_an_empty_completion_or_an_unknown_log_probability_ranks_last():
    samples = [sample(1, 0, tokens=0, sum_logprob=0.0), sample(1, 1, sum_logprob=None), sample(1, 2, sum_logprob=-99.0)]
    found = picks(choose(samples, [label(1, i, "failed") for i in range(3)]))
    assert found["mean_logprob"] == found["sum_logprob"] == (2, 0.0)


def test_an_unscored_sample_ranks_below_any_scored_one():
    found = picks(choose([sample(1, 0), sample(1, 1)], [label(1, i, "passed") for i in (0, 1)], [score(1, 1, -50.0)]))
    assert found["critic"] == (1, 1.0)


def test_strategies_without_data_are_left_out():
    choices = choose([sample(1, 0, sum_logprob=None)], [label(1, 0, "passed")])
    assert [one.strategy for one in choices] == ["random", "first", "shortest", "oracle"]


def test_sandbox_errors_are_no_labels():
    samples = [sample(1, 0), sample(1, 1), sample(2, 0), sample(3, 0)]
    labels = [label(1, 0, "sandbox_error"), label(1, 1, "passed"), label(2, 0, "sandbox_error")]
    choices = choose(samples, labels)
    assert {one.task_id for one in choices} == {1}
    assert picks(choices)["random"] == (None, 1.0)
    assert picks(choices)["first"] == (1, 1.0)
    assert left_out(samples, labels) == LeftOut(unlabelled=1, sandbox_error=2, problems=(2, 3))


def test_a_nan_score_is_refused_with_its_place():
    with pytest.raises(ValueError, match="task_id 7, sample_id 0"):
        choose([sample(7, 0)], [label(7, 0, "passed")], [Score(7, 0, math.nan, 0.5)])


def test_nothing_in_nothing_out():
    assert choose([], []) == []
    assert evaluate([]) == []


def test_evaluate_is_paired_over_problems():
    """Random differs much from problem to problem; the strategy is a steady 0.25 above it."""
    choices = []
    for task_id, base in enumerate([0.0, 0.25, 0.5, 0.75] * 5):
        choices += [Choice(task_id, "random", None, base), Choice(task_id, "better", 0, base + 0.25)]
    random, better = evaluate(choices)
    assert (random.strategy, random.problems, random.gain_over_random) == ("random", 20, Interval(0, 0, 0))
    assert better.gain_over_random == Interval(0.25, 0.25, 0.25)
    assert better.pass_rate.low < better.pass_rate.mean == 0.625 < better.pass_rate.high


def test_a_strategy_with_fewer_problems_is_compared_on_those():
    choices = [Choice(1, "random", None, 0.5), Choice(2, "random", None, 0.1), Choice(2, "critic", 0, 1.0)]
    critic = evaluate(choices)[1]
    assert (critic.problems, critic.gain_over_random.mean) == (1, pytest.approx(0.9))


@pytest.mark.parametrize(
    "choices", [[Choice(1, "critic", 0, 1.0)], [Choice(1, "random", None, 0.5), Choice(1, "random", None, 0.5)]]
)
def test_evaluate_refuses_what_it_cannot_pair(choices):
    with pytest.raises(ValueError, match="task_id 1"):
        evaluate(choices)
