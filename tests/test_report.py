"""summary, charts, report: synthetic runs, whole and broken, to a page that says no more than it knows."""

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fractal.jsonl import encode
from fractal.records import STATUSES
from fractal.report import page as pages
from fractal.report import stage, summary
from fractal.report.summary import Duel, Facts
from fractal.selection.metrics import Interval
from fractal.selection.outcomes import StrategyResult
from tests.pages import FACTS, HOSTILE, build, choose, full, run, verdicts, whole_page


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
    return pages.page(whole)


# ---- the page --------------------------------------------------------------------------------------------------------


def test_untrusted_text_is_escaped_and_nothing_is_loaded():
    facts = dict.fromkeys(("run", "model", "model_revision", "backend", "problem_set", "critic", "git_commit"), HOSTILE)
    found = full(build(*run(), facts=replace(FACTS, **facts, packages={HOSTILE: HOSTILE}, warnings=[HOSTILE])))
    page = pages.page(found, pages.open_rows(*run(), choose(*run())), verdicts(found), {HOSTILE: [HOSTILE]})
    assert page.count("<script") == page.count("</script>") == 1
    reader = Reader(page)
    assert reader.loads == []
    assert reader.tags.isdisjoint({"img", "link", "iframe", "object", "base"})
    page.encode()
    assert "\x1b" not in page
    assert "url(http" not in page
    assert "@import" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in reader.text
    assert "\u202e" not in page


def test_ids_are_unique_and_charts_follow_the_style_sheet():
    page = whole_page()
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(drawn) == 10
    for svg in drawn:
        assert set(re.findall(r"#[0-9a-f]{6}\b(?!\d)", re.sub(r"url\(#\w+\)|href=\"#\w+\"", "", svg))) == set()
        assert not re.search(r"(?<![\w-])(black|white|rgb)", svg)
    used = set(re.findall(r"var\((--\w+)\)", page))
    light, dark = page.split("prefers-color-scheme: dark")
    assert all(f"{name}:" in light for name in used)
    fonts = {"--sans", "--serif", "--mono"}
    assert all(f"{name}:" in dark.split("}")[0] for name in used - fonts)


def test_every_number_of_the_summary_is_on_the_page(whole, page):
    text = Reader(page).text
    for one in whole.strategies:
        assert plain(pages.percent(one.pass_rate.mean)) in text
        assert plain(pages.span(one.pass_rate)) in text
    for status, count in whole.labels_by_status.items():
        assert f"{status.replace('_', ' ')}" in text
        assert f"{count:,} (" in text
    critic = whole.critic
    for value in (critic.auc, critic.within_problem.auc, critic.brier):
        assert pages.number(value) in text
    for value in (critic.accuracy, critic.majority_accuracy, critic.problem_mean_accuracy):
        assert plain(pages.percent(value)) in text
    assert f"{critic.within_problem.pairs} pairs" in text
    for one in whole.pass_at:
        assert f"pass@{one.k} {plain(pages.percent(one.pass_rate.mean))}" in text
    facts = "toy tiny/model abc123 sha256:feed transformers starter sha256:beef sha256:cafe deadbeef 2.13.0 2026-11-24 10:00"
    assert [word for word in facts.split() if word not in text] == []
    assert "fractal report --check --run runs/toy" in text
    assert "30.0 tokens/s" in text
    assert "6 min 50 s" in text
    assert "2 h 03 min" in text
    for one in whole.by_problem:
        assert f"task {one.task_id} {one.passed}/{one.samples}" in text
    for warning in whole.warnings:
        assert " ".join(warning.split()) in text


def test_json_is_the_summary(whole):
    text = encode(stage.summary_fields(whole, verdicts(whole), 0.25)).decode()
    loaded = json.loads(text)
    for one in whole.strategies:
        assert loaded["strategies"][one.strategy]["pass_rate"]["mean"] == one.pass_rate.mean
    assert list(loaded["labels"]) == list(STATUSES)
    assert loaded["details"]["facts"]["epochs"][2]["train_loss"] is None  # NaN is no JSON
    assert "NaN" not in text
    assert [one["verdict"] for one in loaded["criteria"]] == ["met", "missed", "not judged"]
    assert loaded["cost_usd"] == 0.25


def test_the_same_records_give_the_same_bytes(whole, page):
    assert pages.page(build(*run())) == page


def test_the_table_says_the_same_on_the_terminal(whole):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(stage.table(whole, verdicts(whole)))
    text = console.export_text()
    for one in whole.strategies:
        assert re.search(rf"{one.strategy} +{one.problems} +{pages.percent(one.pass_rate.mean)}", text)
    assert all(status in text for status in STATUSES)
    assert "verify" in text
    assert "! Only" in text
    assert re.search(r"val_accuracy >= 0.5 +met +62.0", text)
    assert "added after 400 samples were there" in text


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
    page = pages.page(found)
    assert found.critic is None
    assert "critic" not in {one.strategy for one in found.strategies}
    assert "No critic yet: nothing chooses better than chance here." in page
    assert "A random sample passes on" in page
    assert "(no usable test sample has a critic&#39;s score)" in page
    assert set(found.curves.by_strategy) == {"random", "mean_logprob", "oracle"}


@pytest.mark.parametrize("passed", [True, False])
def test_labels_of_one_class(passed):
    problems, samples, labels, scores = run()
    status = "passed" if passed else "failed"
    found = build(problems, samples, [replace(one, passed=passed, status=status) for one in labels], scores)
    text = Reader(pages.page(found)).text
    assert found.critic.auc is None
    assert found.critic.within_problem.pairs == 0
    assert "all scored test samples have the same label" in text
    assert "no test problem has both a passing and a failing sample" in text
    assert f"for {'100.0' if passed else '0.0'} % [\u2013] of 12 test problems" in text
    assert "The critic cannot be told apart from random choice" in text
    assert "+0.0 points [\u2013]: no interval, so nothing is shown." in text


def test_a_run_that_has_only_started():
    problems = run()[0]
    found = build(problems, [], [], facts=Facts(run="r", date="d", command="c", model="m"))
    text = Reader(pages.page(found)).text
    assert "No strategy measured: no test problem has a usable sample." in text
    assert "nan" not in text.lower()
    assert "None" not in text
    Console(file=open("/dev/null", "w")).print(stage.table(found))


def test_an_empty_problem_set_and_a_single_problem():
    pages.page(build([], [], []))
    problems, samples, labels, scores = run(tests=1, n=1)
    text = Reader(pages.page(build(problems, samples, labels, scores))).text
    assert "of 1 test problem;" in text
    assert "[\u2013]" in text


YES, NO, EVEN = Interval(0.1, 0.02, 0.2), Interval(-0.1, -0.2, -0.02), Interval(0.1, -0.02, 0.2)


@pytest.mark.parametrize(
    ("random", "logprob", "says"),
    [
        (YES, YES, "beats random choice and mean log-probability."),
        (YES, EVEN, "beats random choice and cannot be told apart from mean log-probability."),
        (YES, NO, "beats random choice and loses to mean log-probability."),
        (EVEN, EVEN, "cannot be told apart from random choice or mean log-probability."),
        (NO, None, "loses to random choice."),
        (Interval(0.1, 0.1, 0.1), None, "cannot be told apart from random choice."),
    ],
)
def test_the_headline_claims_only_what_the_intervals_show(whole, random, logprob, says):
    result = StrategyResult("critic", 12, Interval(0.5, 0.3, 0.7), random)
    others = [one for one in whole.strategies if one.strategy != "critic"]
    duels = [Duel("mean_logprob", 1, 1, 10, logprob, 1.0)] if logprob else []
    found = replace(whole, strategies=[result, *others], duels=duels)
    assert pages.headline(found) == f"The critic {says}"
    sentences = [plain(one) for one in pages.findings(found)]
    for gain, sentence in zip([random, *([logprob] if logprob else [])], sentences[1:], strict=False):
        assert sentence.endswith(
            "no interval, so nothing is shown." if gain.low == gain.high
            else {YES: "[+2.0, +20.0].", NO: "worse.", EVEN: "the interval includes zero."}[gain]
        )  # fmt: skip


def test_a_critic_measured_on_the_problems_that_it_was_trained_on_says_so(whole):
    problems, samples, labels, scores = run()
    found = build(problems, samples, labels, scores, split="train")
    assert pages.headline(found).startswith("On train problems, which it has seen, the critic ")
    seen = "These are train problems: the critic has seen them, so its figures flatter it."
    assert found.warnings[0] == seen
    assert seen in Reader(pages.page(found)).text
    assert seen not in whole.warnings
    assert seen not in build(problems, samples, labels, split="train").warnings  # no critic, nothing seen


def test_a_part_without_data_says_why_and_shows_no_chart(whole):
    bare = replace(
        whole,
        duels=[],
        roc=[],
        selective=[],
        difficulty=[],
        funnel=[],
        split_accuracies=[],
        gap_closed=None,
        reasons=dict(whole.reasons),
    )
    bare.reasons.update(duels="nobody to fight", roc="one class")
    text = Reader(pages.page(bare)).text
    assert "Not shown: duels (nobody to fight)." in text
    assert "Not shown: roc (one class)." in text
    assert "training did not compare the two ways to split" in text
    for part in ("Duels", "Answering only when sure", "By difficulty", "Data funnel", "of the way"):
        assert part not in text


def test_foreign_text_cannot_hide_or_turn_round():
    assert pages.visible("a\u202eb\u200b\x1b\ud800\n\tc\u00a0") == (
        "a\u27e8U+202E\u27e9b\u27e8U+200B\u27e9\u27e8U+001B\u27e9\u27e8U+D800\u27e9\n\tc\u00a0"
    )


@given(st.text())
def test_coloured_code_reads_as_the_code(code):
    shown = html.unescape(re.sub(r"</?i( class=\w)?>", "", str(pages.coloured(code))))
    assert shown == code.replace("\r\n", "\n").replace("\r", "\n")


def test_programs_side_by_side_are_the_pick_and_the_best_others(whole):
    records = run()
    picked = {one.task_id: one.sample_id for one in choose(*records) if one.strategy == "critic"}
    passed = {(one.task_id, one.sample_id): one.passed for one in records[2]}
    score = {(one.task_id, one.sample_id): one.score for one in records[3]}
    opened = pages.open_rows(*records, choose(*records))
    assert any(len(one.programs) == 3 for one in opened.values())
    for row in whole.by_problem:
        shown, rest = opened[row.task_id].programs, dict(score)
        assert shown[0].sample_id == picked[row.task_id]
        others = {i: rest[t, i] for t, i in rest if t == row.task_id and i != picked[row.task_id]}
        for verdict in (True, False):
            best = max((i for i in others if passed[row.task_id, i] == verdict), key=others.__getitem__, default=None)
            if best is None:
                assert len(opened[row.task_id].absent) == 1
            else:
                assert best in {one.sample_id for one in shown[1:]}


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


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.21, "4.2 s"), (99.96, "100.0 s"), (125, "2 min 05 s"), (12_000, "3 h 20 min"), (None, "\u2013")],
)
def test_seconds(value, text):
    assert plain(pages.seconds(value)) == text.replace("\u2013", pages.DASH)
