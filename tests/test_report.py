"""summary, charts, report: synthetic runs, whole and broken, to a page that says no more than it knows."""

import html
import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from fractal import charts, report, selection, summary
from fractal.metrics import Interval
from fractal.outcomes import StrategyResult
from fractal.records import STATUSES, Label, Problem, Sample, Score
from fractal.summary import Epoch, Facts

HOSTILE = "Write f.\n\n<script>alert('x')</script> <img src=http://evil.example/x.png> {{ 7*7 }} \u202e\ud800 & more"
FACTS = Facts(
    run="toy",
    date="2026-11-24",
    command="fractal report --run runs/toy",
    model="tiny/model",
    model_revision="abc123",
    weights_digest="sha256:feed",
    backend="transformers",
    seed=7,
    temperature=0.8,
    n=8,
    problem_set="starter",
    problem_set_digest="sha256:beef",
    stage_seconds={"generate": 410.0, "verify": 61.25, "train": 7400.0},
    generate_tokens=12_000,
    generate_seconds=400.0,
    sandbox_image="fractal-sandbox:0.1",
    sandbox_digest="sha256:cafe",
    git_commit="deadbeef",
    git_dirty=True,
    packages={"torch": "2.13.0"},
    critic="tiny/model, probe",
    epochs=(
        Epoch(epoch=0, train_loss=None, val_acc=0.51),
        Epoch(epoch=1, train_loss=0.66, val_acc=0.62, chosen=True),
        Epoch(epoch=2, train_loss=math.nan, val_acc=0.6),
    ),
    skipped={"its reference fails its own tests": 2},
)


def run(tests=12, n=8, seed=1):
    """Problems of all splits with samples, labels and scores that know a little."""
    rng = random.Random(seed)
    problems, samples, labels, scores = [], [], [], []
    for task_id in range(1, tests + 7):
        split = "train" if task_id <= 4 else "validation" if task_id <= 6 else "test"
        problems.append(Problem(task_id, f"Write f{task_id}. {HOSTILE}", "", ["assert f(1)"], "", "f", split))
        easy = rng.random()
        for sample_id in range(n):
            passed = rng.random() < easy
            status = "passed" if passed else rng.choice(STATUSES[1:8])
            code = "x" * rng.randint(1, 99)
            samples.append(Sample(task_id, sample_id, code, code, "stop", 40, rng.gauss(-20, 5), 0, "tiny/model"))
            labels.append(Label(task_id, sample_id, status, passed, [], 0.1, 0.1, "", ""))
            logit = rng.gauss(0.8 if passed else -0.8, 1)
            scores.append(Score(task_id, sample_id, logit, 1 / (1 + math.exp(-logit))))
    return problems, samples, labels, scores


def build(problems, samples, labels, scores=(), *, facts=FACTS, split="test"):
    tasks = {one.task_id for one in problems if one.split == split}
    columns = ([one for one in rows if one.task_id in tasks] for rows in (samples, labels, scores))
    return summary.build(facts, problems, samples, labels, scores, selection.choose(*columns), splits=(split,))


def plain(text):
    return text.replace("\u00a0", " ")


class Reader(HTMLParser):
    """Collects what a browser would load or run, and the visible text; fails on unbalanced tags."""

    VOID = frozenset({"meta", "img", "link", "br", "hr", "input", "path", "use"})

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.loads, self.ids, self.words = set(), [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "data") and v[0] != "#"]
        self.ids += [v for k, v in attributes if k == "id"]
        assert not [k for k, _ in attributes if k.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data):
        self.words += data.split()

    @property
    def text(self):
        return " ".join(self.words)


@pytest.fixture(scope="module")
def whole():
    return build(*run())


@pytest.fixture(scope="module")
def page(whole):
    return report.page(whole)


# ---- the page --------------------------------------------------------------------------------------------------------


def test_untrusted_text_is_escaped_and_nothing_is_loaded(page):
    reader = Reader(page)
    assert reader.loads == []
    assert reader.tags.isdisjoint({"script", "img", "link", "iframe", "object", "base", "form"})
    assert "url(http" not in page
    assert "@import" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in reader.text
    assert "\u202e" not in page


def test_ids_are_unique_and_charts_follow_the_style_sheet(page):
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(drawn) == 5
    for svg in drawn:
        assert set(re.findall(r"#[0-9a-f]{6}\b(?!\d)", re.sub(r"url\(#\w+\)|href=\"#\w+\"", "", svg))) == set()
        assert not re.search(r"(?<![\w-])(black|white|rgb)", svg)
    used = set(re.findall(r"var\((--\w+)\)", page))
    light, dark = page.split("prefers-color-scheme: dark")
    assert all(f"{name}:" in light for name in used)
    assert all(f"{name}:" in dark.split("}")[0] for name in used - {"--sans"})


def test_every_number_of_the_summary_is_on_the_page(whole, page):
    text = Reader(page).text
    for one in whole.strategies:
        assert plain(report.percent(one.pass_rate.mean)) in text
        assert plain(report.span(one.pass_rate)) in text
    for status, count in whole.labels_by_status.items():
        assert f"{status.replace('_', ' ')}" in text
        assert f"{count:,} (" in text
    critic = whole.critic
    for value in (critic.auc, critic.within_problem.auc, critic.brier):
        assert report.number(value) in text
    for value in (critic.accuracy, critic.majority_accuracy, critic.problem_mean_accuracy):
        assert plain(report.percent(value)) in text
    assert f"{critic.within_problem.pairs} pairs" in text
    for one in whole.pass_at:
        assert f"pass@{one.k} {plain(report.percent(one.pass_rate.mean))}" in text
    facts = "toy tiny/model abc123 sha256:feed transformers starter sha256:beef sha256:cafe deadbeef 2.13.0 2026-11-24"
    assert [word for word in facts.split() if word not in text] == []
    assert "fractal report --run runs/toy" in text
    assert "30.0 tokens/s" in text
    assert "6 min 50 s" in text
    assert "2 h 03 min" in text
    for one in whole.by_problem:
        assert f"{one.task_id} {one.passed}/{one.samples}" in text
    for warning in whole.warnings:
        assert " ".join(warning.split()) in text


def test_files_are_whole_and_json_is_the_summary(whole, tmp_path):
    path = report.write(tmp_path, whole)
    assert path == tmp_path / "report" / "index.html"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["report", "summary.json"]
    loaded = json.loads((tmp_path / "summary.json").read_text())
    for one in whole.strategies:
        assert loaded["strategies"][one.strategy]["pass_rate"]["mean"] == one.pass_rate.mean
    assert list(loaded["labels"]) == list(STATUSES)
    assert loaded["details"]["facts"]["epochs"][2]["train_loss"] is None  # NaN is no JSON
    assert "NaN" not in (tmp_path / "summary.json").read_text()


def test_the_same_records_give_the_same_bytes(whole, page):
    assert report.page(build(*run())) == page


def test_the_table_says_the_same_on_the_terminal(whole):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(report.table(whole))
    text = console.export_text()
    for one in whole.strategies:
        assert re.search(rf"{one.strategy} +{one.problems} +{report.percent(one.pass_rate.mean)}", text)
    assert all(status in text for status in STATUSES)
    assert "verify" in text
    assert "! Only" in text


# ---- the numbers -----------------------------------------------------------------------------------------------------


def test_curves_meet_the_strategies_at_their_ends(whole):
    """k = 1 is random for all; k = n is what the strategy's choice reached."""
    reached = {one.strategy: one.pass_rate.mean for one in whole.strategies}
    assert set(whole.curves.by_strategy) == {"random", "critic", "mean_logprob", "oracle"}
    for strategy, values in whole.curves.by_strategy.items():
        assert len(values) == 8
        assert values[0] == pytest.approx(reached["random"])
        assert values[-1] == pytest.approx(reached[strategy])
    assert whole.pass_at[0].pass_rate.mean == pytest.approx(reached["random"])
    assert [one.k for one in whole.pass_at] == [1, 2, 5, 8]


def test_counts_add_up(whole):
    problems, samples, labels, _ = run()
    assert sum(whole.labels_by_status.values()) == len(labels) == whole.samples
    assert sum(whole.problems_by_split.values()) == len(problems)
    assert whole.splits[-1].passed == sum(row.passed for row in whole.splits[:-1])
    assert whole.evaluation.samples == sum(row.samples for row in whole.by_problem)
    assert whole.tokens == 40 * len(samples)


def test_other_splits_do_not_leak_into_the_evaluation():
    problems, samples, labels, scores = run()
    train = {one.task_id for one in problems if one.split == "train"}
    flipped = [replace(one, passed=True, status="passed") if one.task_id in train else one for one in labels]
    before, after = build(problems, samples, labels, scores), build(problems, samples, flipped, scores)
    for name in ("strategies", "critic", "curves", "pass_at", "by_problem", "evaluation"):
        assert getattr(before, name) == getattr(after, name)
    assert before.splits != after.splits


def test_a_problem_that_lost_samples_does_not_cut_the_curves_short():
    problems, samples, labels, scores = run()
    labels = [
        replace(one, status="sandbox_error", passed=False) if one.task_id == 7 and one.sample_id else one
        for one in labels
    ]
    found = build(problems, samples, labels, scores)
    assert found.curves.problems == 11
    assert len(found.curves.by_strategy["critic"]) == 8
    assert found.left_out.sandbox_error == 7
    assert any("11 of 12 problems with at least 8 usable samples" in one for one in found.warnings)


def test_strays_are_counted_not_used():
    problems, samples, labels, scores = run()
    stranger = replace(samples[0], task_id=999)
    orphan = replace(labels[0], sample_id=99)
    found = build(problems, [*samples, stranger], [*labels, orphan], scores)
    assert "1 sample of unknown problems ignored." in found.warnings
    assert "1 label without a sample ignored." in found.warnings
    assert found.strategies == build(problems, samples, labels, scores).strategies


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_without_a_critic_the_page_says_so():
    problems, samples, labels, _ = run()
    found = build(problems, samples, labels, facts=replace(FACTS, epochs=(), critic=None))
    page = report.page(found)
    assert found.critic is None
    assert "critic" not in {one.strategy for one in found.strategies}
    assert "No critic yet. A random sample passes on" in page
    assert "(no usable test sample has a critic&#39;s score)" in page
    assert set(found.curves.by_strategy) == {"random", "mean_logprob", "oracle"}


@pytest.mark.parametrize("passed", [True, False])
def test_labels_of_one_class(passed):
    problems, samples, labels, scores = run()
    status = "passed" if passed else "failed"
    found = build(problems, samples, [replace(one, passed=passed, status=status) for one in labels], scores)
    text = Reader(report.page(found)).text
    assert found.critic.auc is None
    assert found.critic.within_problem.pairs == 0
    assert "all scored test samples have the same label" in text
    assert "no test problem has both a passing and a failing sample" in text
    assert f"for {'100.0' if passed else '0.0'} % [\u2013] of 12 test problems" in text
    assert "+0.0 points [\u2013]: no interval, so nothing is shown." in text


def test_a_run_that_has_only_started():
    problems = run()[0]
    found = build(problems, [], [], facts=Facts(run="r", date="d", command="c", model="m"))
    text = Reader(report.page(found)).text
    assert "No strategy measured: no test problem has a usable sample." in text
    assert "nan" not in text.lower()
    assert "None" not in text
    Console(file=open("/dev/null", "w")).print(report.table(found))


def test_an_empty_problem_set_and_a_single_problem():
    report.page(build([], [], []))
    problems, samples, labels, scores = run(tests=1, n=1)
    text = Reader(report.page(build(problems, samples, labels, scores))).text
    assert "of 1 test problem;" in text
    assert "[\u2013]" in text


def test_a_gain_is_claimed_only_if_its_interval_is_above_zero(whole):
    def verdict(gain):
        result = StrategyResult("critic", 12, Interval(0.5, 0.3, 0.7), gain)
        others = [one for one in whole.strategies if one.strategy != "critic"]
        return plain(report.headline(replace(whole, strategies=[result, *others])))

    assert verdict(Interval(0.1, 0.02, 0.2)).endswith("+10.0 points [+2.0, +20.0].")
    assert verdict(Interval(0.1, -0.02, 0.2)).endswith("the interval includes zero.")
    assert verdict(Interval(-0.1, -0.2, -0.02)).endswith("worse than random.")


def test_few_mixed_problems_are_pointed_out(whole):
    mixed = sum(0 < one.passed < one.samples for one in whole.by_problem)
    assert any(one.startswith(f"Only {mixed} test problems of 12 have both") for one in whole.warnings)
    assert "2 problems skipped: its reference fails its own tests." in whole.warnings
    assert any("uncommitted" in one for one in whole.warnings)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_shorten_gives_one_printable_line():
    assert summary.shorten("a\n\n b\x00\u202ec") == "a b c"
    assert summary.shorten("word " * 99, 12) == "word word w…"
    summary.shorten("\ud800x").encode()


def test_chart_text_is_escaped():
    svg = charts.strategy_intervals([("<script>$a_b$", Interval(0.1, 0.0, 0.2))])
    assert "<script" not in svg
    assert html.escape("<script>$a b$") in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.21, "4.2 s"), (99.96, "100.0 s"), (125, "2 min 05 s"), (12_000, "3 h 20 min"), (None, "\u2013")],
)
def test_seconds(value, text):
    assert plain(report.seconds(value)) == text.replace("\u2013", report.DASH)
