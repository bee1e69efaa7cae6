"""summary: each figure against a plain loop over the records, and runs that lack something."""

import itertools
import math
import random

import pytest

from fractal.records import Label, Output, Problem, Sample, Score
from fractal.report import critic, strategies, summary
from fractal.report.facts import Facts, SplitAccuracy
from fractal.selection import metrics
from fractal.selection.outcomes import outcomes
from fractal.selection.strategies import STRATEGIES, choose

FACTS = Facts(run="toy", date="2026-11-25", command="fractal report --run runs/toy", model="tiny")
SPLIT_OF = {"1": "train", "2": "validation", "3": "validation"}  # and test


def records(problems=9, n=6, seed=3, share=None, scored=1.0):
    """Problems of three splits; scores that know a little; visible verdicts and outputs."""
    rng = random.Random(seed)
    rows = ([], [], [], [], [])
    for task_id in map(str, range(1, problems + 1)):
        rows[0].append(
            Problem(task_id, "Write f.", "", ["assert f(1)", "assert f(2)"], "", "f", SPLIT_OF.get(task_id, "test"))
        )
        easy = rng.random() if share is None else share
        for i in range(n):
            passed = rng.random() < easy
            visible = passed or rng.random() < 0.4
            tests = ["passed" if visible else "failed", "passed" if passed else "failed"]
            rows[1].append(Sample(task_id, i, "", "x" * rng.randint(1, 9), "stop", 9, rng.gauss(-9, 2), 0, "tiny"))
            rows[2].append(Label(task_id, i, "passed" if passed else "failed", passed, tests, 0.1, 0.1, "", ""))
            logit = rng.gauss(passed, 1)
            if rng.random() < scored:
                rows[3].append(Score(task_id, i, logit, 1 / (1 + math.exp(-logit)), rng.gauss(0, 1), logit + 0.1))
            rows[4].append(Output(task_id, i, rng.choice(["a", "b", None])))
    return rows


def build(problems, samples, labels, scores, outputs, splits=("validation", "test"), **more):
    inside = {one.task_id for one in problems if one.split in splits}
    choices = choose(outcomes([one for one in samples if one.task_id in inside], labels, scores, outputs))
    return summary.build(FACTS, problems, samples, labels, scores, choices, splits=splits, **more), choices


@pytest.fixture(scope="module")
def whole():
    rows = records()
    return (*build(*rows), rows)


def test_several_splits_are_measured_as_one(whole):
    measured, _, _ = whole
    assert (measured.split, measured.evaluation.split) == ("validation and test", "validation and test")
    assert measured.evaluation.problems == 8
    assert [one.problems for one in measured.strategies] == [8] * len(STRATEGIES)
    assert [row.split for row in measured.splits] == ["train", "validation", "test", "all"]
    assert {row.task_id for row in measured.by_problem} == set(map(str, range(2, 10)))


def test_every_curve_starts_at_random_and_ends_at_its_strategy(whole):
    measured, _, _ = whole
    rate = {one.strategy: one.pass_rate for one in measured.strategies}
    assert set(measured.curves.by_strategy) == set(strategies.CURVES) == set(measured.curves.bands)
    for strategy, curve in measured.curves.by_strategy.items():
        band = measured.curves.bands[strategy]
        assert curve[0] == pytest.approx(rate["random"].mean)
        assert (band[-1].mean, band[-1].low, band[-1].high) == pytest.approx(
            (rate[strategy].mean, rate[strategy].low, rate[strategy].high)
        )
        assert [one.mean for one in band] == curve


def test_filter_and_critic_on_k_samples_equal_every_draw_of_k(whole):
    """Filter the draw, then the critic among those left, or among all if none is: draw by draw."""
    measured, _, (problems, _, labels, scores, _) = whole
    logit = {(one.task_id, one.sample_id): one.score for one in scores}
    for k in (1, 2, 4):
        means = []
        for task_id in map(str, range(2, len(problems) + 1)):
            of_problem = [one for one in labels if one.task_id == task_id]
            picks = []
            for draw in itertools.combinations(of_problem, k):
                kept = [one for one in draw if one.tests[0] == "passed"] or draw
                picks.append(max(kept, key=lambda one: logit[one.task_id, one.sample_id]).passed)
            means.append(sum(picks) / len(picks))
        assert measured.curves.by_strategy["visible_test_critic"][k - 1] == pytest.approx(sum(means) / len(means))


def test_duels_and_gap_are_the_choices_counted(whole):
    measured, choices, _ = whole
    passed = {(one.strategy, one.task_id): one.passed for one in choices}
    assert {one.strategy for one in measured.duels} == set(STRATEGIES) - {"critic"}
    for duel in measured.duels:
        pairs = [(passed["critic", task], passed[duel.strategy, task]) for task in map(str, range(2, 10))]
        assert duel.wins == sum(a > b for a, b in pairs)
        assert duel.losses == sum(a < b for a, b in pairs)
        assert duel.wins + duel.losses + duel.ties == 8
        assert duel.gain.mean == pytest.approx(sum(a - b for a, b in pairs) / 8)
        if duel.strategy in ("random", "visible_test"):
            assert duel.p_value == metrics.picks_test(sum(int(a) for a, _ in pairs), [b for _, b in pairs])
        else:
            assert duel.p_value == metrics.sign_test(duel.wins, duel.losses)
    mean = {name: sum(passed[name, str(task)] for task in range(2, 10)) / 8 for name in ("critic", "random", "oracle")}
    assert measured.gap_closed.mean == pytest.approx(
        (mean["critic"] - mean["random"]) / (mean["oracle"] - mean["random"])
    )


def test_difficulty_puts_each_problem_in_one_row(whole):
    measured, choices, (_, _, labels, _, _) = whole
    share = {task: sum(one.passed for one in labels if one.task_id == task) / 6 for task in map(str, range(2, 10))}
    assert sum(row.problems for row in measured.difficulty) == 8
    assert [(row.low, row.high) for row in measured.difficulty] == [
        (0, 0),
        (0, 0.25),
        (0.25, 0.5),
        (0.5, 0.75),
        (0.75, 1),
        (1, 1),
    ]
    for row in measured.difficulty:
        inside = [
            t for t, s in share.items() if (s == row.low if row.low == row.high else row.low < s <= row.high and s < 1)
        ]
        assert row.problems == len(inside)
        for strategy, rate in row.pass_rates.items():
            assert rate == pytest.approx(
                sum(c.passed for c in choices if c.strategy == strategy and c.task_id in inside) / len(inside)
            )


def test_orders_curves_and_abstaining_hang_together(whole):
    measured, _, _ = whole
    assert set(measured.rank_auc) == set(critic.RANKED)
    assert measured.rank_auc["critic"] == measured.critic.within_problem
    area = {curve.name: curve.area for curve in measured.roc}
    assert area == {
        "pooled": pytest.approx(measured.critic.auc),
        "within problem": pytest.approx(measured.critic.within_problem.auc),
    }
    rate = {one.strategy: one.pass_rate.mean for one in measured.strategies}
    assert [curve.strategy for curve in measured.selective] == list(strategies.SELECTIVE)
    for curve in measured.selective:
        assert curve.pass_rate[-1].mean == pytest.approx(rate[curve.strategy])
        assert curve.threshold == sorted(curve.threshold, reverse=True)
    assert measured.critic.accuracy_interval.mean == pytest.approx(measured.critic.accuracy)


def test_the_funnel_loses_nothing_unsaid():
    problems, samples, labels, scores, outputs = records(scored=0.7)
    labels = [one for one in labels if (one.task_id, one.sample_id) != ("4", 0)]
    broken = [one for one in labels if one.task_id == "5"]
    labels = [one for one in labels if one.task_id != "5"] + [
        Label(one.task_id, one.sample_id, "sandbox_error", False, [], 0, 0, "", "") for one in broken
    ]
    measured, _ = build(problems, samples, labels, scores, outputs)
    steps = {one.name: (one.count, one.lost) for one in measured.funnel}
    assert steps["problems"] == (9, "")
    assert steps["samples drawn"] == (54, "")
    assert steps["samples labelled"] == (47, "1 sample without a label; 6 samples lost by the sandbox")
    assert steps["validation and test samples, labelled"] == (41, "6 samples of other splits")
    scored = len([one for one in scores if one.task_id not in ("1", "5") and (one.task_id, one.sample_id) != ("4", 0)])
    assert steps["scored by the critic"] == (scored, f"{41 - scored} samples without a score")
    assert steps["validation and test problems, measured"] == (7, "1 problem without a label")
    assert any("without a score: the critic ranks them last" in one for one in measured.warnings)


@pytest.mark.parametrize(
    ("rows", "splits", "missing"),
    [
        (records(share=1.0), ("test",), {"roc", "gap_closed", "auc", "within_problem"}),
        (records(share=0.0), ("test",), {"roc", "gap_closed", "auc", "within_problem"}),
        (records(n=1), ("test",), {"within_problem", "gap_closed"}),
        (records(scored=0.0), ("test",), {"critic", "roc", "duels", "gap_closed"}),
        (records(problems=1), ("test",), {"strategies", "curves", "critic", "roc", "selective", "duels", "gap_closed"}),
        (
            ([], [], [], [], []),
            ("test",),
            {"strategies", "curves", "critic", "roc", "selective", "duels", "gap_closed"},
        ),
    ],
    ids=["all pass", "none passes", "one sample", "no score", "no held-out problem", "nothing"],
)
def test_what_is_missing_has_a_reason(rows, splits, missing):
    measured, _ = build(*rows, splits=splits)
    assert missing <= set(measured.reasons)
    assert all(measured.reasons[name] for name in missing)
    assert (measured.gap_closed is None) == ("gap_closed" in measured.reasons)
    assert (not measured.roc) == ("roc" in measured.reasons)


def test_the_two_ways_to_split_are_passed_on(whole):
    given = [SplitAccuracy("sample", 0.88, 0.9, None, 0.889)]
    measured, _ = build(*whole[2], split_accuracies=given)
    assert measured.split_accuracies == given
    assert "split_accuracies" not in measured.reasons
    assert "split_accuracies" in whole[0].reasons
