"""selection: what each strategy picks, who is left out, and what the picks are worth."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.errors import InputError
from fractal.jsonl import read_jsonl, write_jsonl
from fractal.records import Choice, Label, Output, Problem, Sample, Score
from fractal.report.strategies import by_strategy, evaluate
from fractal.rundir import RunDir
from fractal.selection import stage, strategies
from fractal.selection.bootstrap import Interval
from fractal.selection.outcomes import LeftOut, left_out, outcomes, read_outcomes
from fractal.selection.splits import measured_splits, parse_splits
from fractal.selection.strategies import STRATEGIES

settings.register_profile("untimed", deadline=None, max_examples=60)  # a timed assertion is never a test
settings.load_profile("untimed")


def choose(*records):
    return strategies.choose(outcomes(*records))


def recompute(folder):
    splits = measured_splits(folder.manifest["config"], folder.problems().values(), folder.labels())
    return strategies.choose(read_outcomes(folder, splits))


def sample(task_id, sample_id, *, code="pass", tokens=4, sum_logprob=-2.0):
    return Sample(str(task_id), sample_id, code, code, "stop", tokens, sum_logprob, 0, "m")


def label(task_id, sample_id, status, visible=None):
    tests = [] if visible is None else [visible, status if visible == "passed" else "not_run"]
    return Label(str(task_id), sample_id, status, status == "passed", tests, 0.0, 0.0, "", "")


def score(task_id, sample_id, logit, zero_shot=None, combined=None):
    return Score(str(task_id), sample_id, logit, 1 / (1 + math.exp(-logit)), zero_shot, combined)


def picks(choices, task_id="1"):
    return {choice.strategy: (choice.sample_id, choice.passed) for choice in choices if choice.task_id == task_id}


def usable(labels, task_id):
    return [one for one in labels if one.task_id == task_id and one.status != "sandbox_error"]


@st.composite
def runs(draw):
    """Samples with labels and scores: some labels missing, some our own fault, some samples without log-probs."""
    samples, labels, scores, outputs = [], [], [], []
    for task_id in range(1, draw(st.integers(1, 4)) + 1):
        for sample_id in range(draw(st.integers(1, 5))):
            sum_logprob = draw(st.sampled_from([None, -1.0, -3.0]))
            tokens = draw(st.integers(0, 3))
            code = draw(st.sampled_from(["a", "bb", "ccc"]))
            samples.append(sample(task_id, sample_id, code=code, tokens=tokens, sum_logprob=sum_logprob))
            status = draw(st.sampled_from(["passed", "failed", "timeout", "sandbox_error", None]))
            if status:
                visible = "passed" if status == "passed" else draw(st.sampled_from(["passed", "failed", "not_run"]))
                labels.append(label(task_id, sample_id, status, visible))
            if draw(st.booleans()):
                logits = [draw(st.sampled_from([-1.0, 0.0, 2.0])) for _ in range(3)]
                scores.append(score(task_id, sample_id, *logits))
            if draw(st.booleans()):
                outputs.append(Output(str(task_id), sample_id, draw(st.sampled_from([None, "(1,)", "(2,)"]))))
    return draw(st.permutations(samples)), draw(st.permutations(labels)), scores, outputs


@given(runs(), st.randoms())
def test_picks_are_usable_samples_between_random_and_the_oracle(run, random):
    samples, labels, *_ = run
    choices = choose(*run)
    assert choose(*(random.sample(rows, len(rows)) for rows in run)) == choices  # the files' order does not matter
    verdicts = {(one.task_id, one.sample_id): one for one in labels}
    for choice in choices:
        if choice.sample_id is not None:
            verdict = verdicts[choice.task_id, choice.sample_id]
            assert verdict.status != "sandbox_error"
            assert choice.passed == float(verdict.passed)
    tasks = {choice.task_id for choice in choices}
    for task_id in tasks:
        own, picked = usable(labels, task_id), picks(choices, task_id)
        passed = [one.passed for one in own]
        kept = [one.passed for one in own if one.tests[0] == "passed"] or passed
        assert picked["random"] == (None, pytest.approx(sum(passed) / len(passed)))
        assert picked["visible_test"] == (None, pytest.approx(sum(kept) / len(kept)))
        assert picked["oracle"][1] == any(passed)
        assert all(picked["oracle"][1] >= value for _, value in picked.values())
    gone = left_out(samples, labels)
    assert tasks.isdisjoint(gone.problems)
    assert tasks | set(gone.problems) == {one.task_id for one in samples}
    assert gone.sandbox_error == sum(one.status == "sandbox_error" for one in labels)
    assert gone.unlabelled == len(samples) - len(labels)


def test_each_strategy_picks_what_its_name_says():
    samples = [
        sample(1, 0, code="middle", tokens=4, sum_logprob=-4.0),
        sample(1, 1, code="long one", tokens=10, sum_logprob=-5.0),
        sample(1, 2, code="a", tokens=2, sum_logprob=-3.0),
        sample(1, 3, code="middle", tokens=4, sum_logprob=-4.5),
    ]
    verdicts = [("failed", "passed"), ("failed", "failed"), ("failed", "not_run"), ("passed", "passed")]
    logits = [(-1.0, 1.0, 0.0), (0.0, 2.0, 0.0), (2.5, 0.0, 9.0), (2.0, 0.0, 1.0)]
    choices = choose(
        samples,
        [label(1, i, *both) for i, both in enumerate(verdicts)],
        [score(1, i, *three) for i, three in enumerate(logits)],
        [Output("1", i, text) for i, text in enumerate(["(1,)", None, "(1,)", "(2,)"])],
    )
    assert [choice.strategy for choice in choices] == list(STRATEGIES)
    assert picks(choices) == {
        "critic": (2, 0.0),
        "random": (None, 0.25),
        "first": (0, 0.0),
        "mean_logprob": (1, 0.0),
        "sum_logprob": (2, 0.0),
        "shortest": (2, 0.0),
        "zero_shot": (1, 0.0),
        "critic_logprob": (2, 0.0),
        "consensus": (0, 0.0),
        "visible_test": (None, 0.5),
        "visible_test_critic": (3, 1.0),
        "oracle": (3, 1.0),
    }


# ---- filters and consensus -------------------------------------------------------------------------------------------


def test_where_no_sample_passes_the_visible_test_all_are_kept():
    samples, labels = [sample(1, i) for i in range(3)], [label(1, i, "failed", "failed") for i in range(3)]
    picked = picks(choose(samples, labels, [score(1, i, i) for i in range(3)]))
    assert picked["visible_test"] == picked["random"]
    assert picked["visible_test_critic"] == picked["critic"] == (2, 0.0)


@given(runs())
def test_the_filters_look_at_nothing_but_the_visible_verdict(run):
    """Hidden verdicts turned over where the visible test passes: the same samples are picked."""
    samples, labels, *others = run
    turned = [label(v.task_id, v.sample_id, "failed", v.tests[0]) if v.status == "passed" else v for v in labels]
    names = ("visible_test_critic", "consensus", "critic")
    before, after = choose(samples, labels, *others), choose(samples, turned, *others)
    assert [c.sample_id for c in before if c.strategy in names] == [c.sample_id for c in after if c.strategy in names]


def test_labels_of_another_tool_know_no_visible_test():
    """Such a label has one verdict for all tests: a filter by it would be the oracle."""
    passed = Label(
        "1", 0, "passed", True, ["passed", "passed"], 0, 0, "imported from EvalPlus: base pass, plus pass", ""
    )
    failed = Label("1", 1, "failed", False, ["not_run", "not_run"], 0, 0, "imported from EvalPlus: base fail", "")
    picked = picks(choose([sample(1, 0), sample(1, 1)], [passed, failed], [score(1, 0, 1.0)]))
    assert picked.keys() == {"critic", "random", "first", "mean_logprob", "sum_logprob", "shortest", "oracle"}


def test_consensus_is_the_most_shared_output():
    cases = [
        (["a", "b", "b", "c"], 2),  # two agree
        (["a", "b", "c", None], 2),  # nobody agrees: the highest log-probability among those with an output
        ([None, None, None, None], 3),  # no output at all: the highest log-probability
        (["a", "a", "b", "b"], 3),  # two pairs: likewise
        ([None, None, None, "x"], 3),  # silence is no agreement
        ([None, None, "x", None], 2),
        (["a", "a", None, "x"], 1),
    ]
    samples = [sample(1, i, sum_logprob=-float(10 - i)) for i in range(4)]
    labels = [label(1, i, "failed") for i in range(4)]
    for texts, expected in cases:
        outputs = [Output("1", i, text) for i, text in enumerate(texts)]
        assert picks(choose(samples, labels, (), outputs))["consensus"] == (expected, 0.0), texts


@given(runs())
def test_consensus_equals_counting_pairs(run):
    samples, labels, _, outputs = run
    choices = choose(*run)
    text = {(one.task_id, one.sample_id): one.output for one in outputs}
    by_key = {(one.task_id, one.sample_id): one for one in samples}
    for task_id in {choice.task_id for choice in choices}:
        ids = sorted(one.sample_id for one in usable(labels, task_id))

        def rank(sample_id, task_id=task_id, ids=ids):
            own, one = text.get((task_id, sample_id)), by_key[task_id, sample_id]
            agree = sum(own is not None and own == text.get((task_id, other)) for other in ids)
            known = one.sum_logprob is not None and one.tokens
            return agree, one.sum_logprob / one.tokens if known else -math.inf, -sample_id

        picked = picks(choices, task_id).get("consensus")
        if any((task_id, sample_id) in text for sample_id in ids):
            assert picked[0] == max(ids, key=rank)
        else:
            assert picked is None


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_splits_are_named_in_one_order_or_refused():
    assert parse_splits("test") == ["test"]
    assert parse_splits(" test, validation,test") == ["validation", "test"]
    assert parse_splits("train") == ["train"]
    for text, message in (("dev", "'dev' is no split"), ("", "'' is no split"), ("test,train", "seen the train")):
        with pytest.raises(InputError, match=message):
            parse_splits(text)


def folder_with(tmp_path, splits):
    """A run folder with two labelled samples for a problem of each split."""
    with RunDir(tmp_path / "run", create=True) as folder:
        folder.set_problems(
            [Problem(str(i), "p", "", ["assert f(1)"], "", "f", split) for i, split in enumerate(splits, 1)]
        )
        keys = [(task_id, i) for task_id in range(1, len(splits) + 1) for i in range(2)]
        labels = [label(*key, "passed" if key[1] else "failed", "passed") for key in keys]
        write_jsonl(folder.file("samples.jsonl"), [sample(*key) for key in keys])
        write_jsonl(folder.file("labels.jsonl"), labels)
        folder.save()
    return tmp_path / "run"


def measured(folder):
    return {choice.task_id for choice in read_jsonl(folder.file("selection.jsonl"), Choice)}


def test_the_splits_of_the_command_stay_the_run_s_own(tmp_path, capsys):
    with RunDir(folder_with(tmp_path, ["train", "validation", "test"])) as folder:
        problems, labels = list(folder.problems().values()), folder.labels()
        stage.run(folder)
        assert measured(folder) == {"3"}
        assert measured_splits(folder.manifest["config"], problems, labels) == ("test",)
        for on in ("test,validation", None):
            stage.run(folder, on)
            assert measured(folder) == {"2", "3"}
        assert "nothing to do" in capsys.readouterr().out
        assert measured_splits(folder.manifest["config"], problems, labels) == ("validation", "test")
        assert recompute(folder) == read_jsonl(folder.file("selection.jsonl"), Choice)


def test_a_split_without_labels_is_refused_and_new_outputs_make_new_choices(tmp_path):
    with RunDir(folder_with(tmp_path, ["train", "validation"])) as folder:
        stage.run(folder)
        with pytest.raises(InputError, match="no labelled test problem, only train, validation"):
            stage.run(folder, "test,validation")
        assert measured(folder) == {"2"}
        assert "consensus" not in {choice.strategy for choice in recompute(folder)}
        write_jsonl(folder.file("outputs.jsonl"), [Output("2", 0, "(1,)"), Output("2", 1, None)])
        stage.run(folder)
        assert picks(read_jsonl(folder.file("selection.jsonl"), Choice), "2")["consensus"] == (0, 0.0)


MISSING = "1 usable test sample has no score: the critic ranks them last. `fractal score --run {run}` scores them."


@pytest.mark.parametrize(
    ("scored", "warning"), [(((2, 0), (2, 1)), ""), ((), ""), (((1, 0),), ""), (((2, 1),), MISSING)]
)
def test_samples_of_the_measured_splits_without_a_score_are_a_warning(tmp_path, capsys, scored, warning):
    with RunDir(folder_with(tmp_path, ["train", "test"])) as folder:
        write_jsonl(folder.file("scores.jsonl"), [score(*key, 1.0) for key in scored])
        stage.run(folder)
        warnings = " ".join(capsys.readouterr().err.split())
        assert ("no score" in warnings) == bool(warning)
        assert warning.format(run=folder.path) in warnings


# ---- ties and gaps ---------------------------------------------------------------------------------------------------


def test_ties_go_to_the_lowest_sample_id_and_the_unknown_ranks_last():
    labels = [label(1, i, "failed") for i in range(3)]
    tied = picks(choose([sample(1, i) for i in (2, 0, 1)], labels, [score(1, i, 1.0, 1.0, 1.0) for i in range(3)]))
    assert {sample_id for sample_id, _ in tied.values()} == {None, 0}
    samples = [sample(1, 0, tokens=0, sum_logprob=0.0), sample(1, 1, sum_logprob=None), sample(1, 2, sum_logprob=-99.0)]
    picked = picks(choose(samples, labels))
    assert picked["mean_logprob"] == picked["sum_logprob"] == (2, 0.0)
    picked = picks(choose([sample(1, 0), sample(1, 1)], labels, [score(1, 1, -50.0)]))
    assert picked["critic"] == (1, 0.0)


def test_what_cannot_be_used_is_left_out():
    choices = choose([sample(1, 0, sum_logprob=None)], [label(1, 0, "passed")])
    assert [choice.strategy for choice in choices] == ["random", "first", "shortest", "oracle"]
    samples = [sample(1, 0), sample(1, 1), sample(2, 0), sample(3, 0)]
    labels = [label(1, 0, "sandbox_error"), label(1, 1, "passed"), label(2, 0, "sandbox_error")]
    choices = choose(samples, labels)
    assert {choice.task_id for choice in choices} == {"1"}
    assert (picks(choices)["random"], picks(choices)["first"]) == ((None, 1.0), (1, 1.0))
    assert left_out(samples, labels) == LeftOut(unlabelled=1, sandbox_error=2, problems=("2", "3"))
    assert (choose([], []), evaluate({})) == ([], [])


def test_evaluate_is_paired_over_problems():
    """Random differs much from problem to problem; the strategy is a steady 0.25 above it."""
    choices = []
    for task_id, base in enumerate([0.0, 0.25, 0.5, 0.75] * 5):
        choices += [Choice(str(task_id), "random", None, base), Choice(str(task_id), "better", 0, base + 0.25)]
    random, better = evaluate(by_strategy(choices))
    assert (random.strategy, random.problems, random.gain_over_random) == ("random", 20, Interval(0, 0, 0))
    assert better.gain_over_random == Interval(0.25, 0.25, 0.25)
    assert better.pass_rate.low < better.pass_rate.mean == 0.625 < better.pass_rate.high
    fewer = [Choice("1", "random", None, 0.5), Choice("2", "random", None, 0.1), Choice("2", "critic", 0, 1.0)]
    critic = evaluate(by_strategy(fewer))[1]
    assert (critic.problems, critic.gain_over_random.mean) == (1, pytest.approx(0.9))
