"""summary, page and terminal table: synthetic runs, whole and broken, shown without claiming more than is known."""

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.jsonl import encode
from fractal.records import STATUSES
from fractal.report import make, programs
from fractal.report.dataset import shorten
from fractal.report.facts import Facts
from fractal.report.findings import findings, headline
from fractal.report.number_text import DASH, number, percent, seconds, span, visible
from fractal.report.page import page as render
from fractal.report.strategies import Duel, StrategyResult
from fractal.report.table import as_text, table
from fractal.selection.bootstrap import Interval
from tests.pages import FACTS, HOSTILE, build, choose, full, judge, run, verdicts, whole_page


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


# ---- the page --------------------------------------------------------------------------------------------------------


def test_untrusted_text_is_escaped_and_nothing_is_loaded():
    facts = dict.fromkeys(("run", "model", "model_revision", "backend", "problem_set", "critic", "git_commit"), HOSTILE)
    summary = full(build(*run(), facts=replace(FACTS, **facts, packages={HOSTILE: HOSTILE}, warnings=[HOSTILE])))
    details = programs.problem_details(*run(), choose(*run()))
    page = render(summary, details, verdicts(summary), {HOSTILE: [HOSTILE]})
    assert page.count("<script") == page.count("</script>") == 1
    reader = Reader(page)
    assert reader.loads == []
    assert reader.tags.isdisjoint({"img", "link", "iframe", "object", "base"})
    page.encode()
    assert [text for text in ("\x1b", "url(http", "@import", "\u202e") if text in page] == []
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in reader.text


def test_ids_are_unique_and_charts_follow_the_style_sheet():
    page = whole_page()
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(drawn) == 6
    used = set(re.findall(r"var\((--\w+)\)", page))
    light, dark = page.split("prefers-color-scheme: dark")
    assert all(f"{name}:" in light for name in used)
    assert all(f"{name}:" in dark.split("}")[0] for name in used - {"--sans", "--serif", "--mono"})


def test_every_number_of_the_summary_is_on_the_page_and_the_same_records_give_the_same_bytes(whole):
    page = render(whole)
    assert render(build(*run())) == page
    critic = whole.critic
    expected = [
        *(plain(percent(result.pass_rate.mean)) for result in whole.strategies),
        *(plain(span(result.pass_rate)) for result in whole.strategies),
        *(status.replace("_", " ") for status in whole.labels_by_status),
        *(f"{count:,} (" for count in whole.labels_by_status.values()),
        *(number(value) for value in (critic.auc, critic.within_problem.auc, critic.brier)),
        *(plain(percent(v)) for v in (critic.accuracy, critic.majority_accuracy, critic.problem_mean_accuracy)),
        *(f"pass@{entry.k} {plain(percent(entry.pass_rate.mean))}" for entry in whole.pass_at),
        *(f"task {row.task_id} {row.passed}/{row.samples}" for row in whole.by_problem),
        *(" ".join(warning.split()) for warning in whole.warnings),
        f"{critic.within_problem.pairs} pairs",
        *("toy", "tiny/model", "abc123", "sha256:feed", "transformers", "starter", "sha256:beef", "sha256:cafe"),
        *("deadbeef", "2.13.0", "2026-11-24 10:00", "fractal report --check --run runs/toy", "30.0 tokens/s"),
        *("6 min 50 s", "2 h 03 min"),
    ]
    text = Reader(page).text
    assert [part for part in expected if part not in text] == []


def test_json_is_the_summary_and_the_terminal_says_the_same(whole):
    text = encode(make.summary_fields(whole, 0.25)).decode()
    loaded = json.loads(text)
    for result in whole.strategies:
        assert loaded["strategies"][result.strategy]["pass_rate"]["mean"] == result.pass_rate.mean
    assert list(loaded["labels"]) == list(STATUSES)
    assert loaded["details"]["facts"]["epochs"][2]["train_loss"] is None  # NaN is no JSON
    assert "NaN" not in text
    assert loaded["cost_usd"] == 0.25
    assert [verdict.verdict for verdict in verdicts(whole)] == ["met", "missed", "not judged"]
    shown = as_text(table(whole, verdicts(whole)))
    for result in whole.strategies:
        assert re.search(rf"{result.strategy} +{result.problems} +{percent(result.pass_rate.mean)}", shown)
    assert [part for part in (*STATUSES, "verify", "! Only", "added after 400 samples") if part not in shown] == []
    assert re.search(r"val_accuracy >= 0.5 +met +62.0", shown)


# ---- the numbers -----------------------------------------------------------------------------------------------------


def test_counts_add_up(whole):
    problems, samples, labels, _ = run()
    assert sum(whole.labels_by_status.values()) == len(labels) == whole.samples
    assert sum(whole.problems_by_split.values()) == len(problems)
    assert whole.splits[-1].passed == sum(row.passed for row in whole.splits[:-1])
    assert whole.evaluation.samples == sum(row.samples for row in whole.by_problem)
    assert whole.tokens == 40 * len(samples)
    assert [entry.k for entry in whole.pass_at] == [1, 2, 5, 8]
    mixed = sum(0 < row.passed < row.samples for row in whole.by_problem)
    assert any(warning.startswith(f"Only {mixed} test problems of 12 have both") for warning in whole.warnings)
    assert "2 problems skipped: its reference fails its own tests." in whole.warnings
    assert any("uncommitted" in warning for warning in whole.warnings)


def test_other_splits_do_not_leak_into_the_evaluation():
    problems, samples, labels, scores = run()
    train = {problem.task_id for problem in problems if problem.split == "train"}
    flipped = [replace(one, passed=True, status="passed") if one.task_id in train else one for one in labels]
    before, after = build(problems, samples, labels, scores), build(problems, samples, flipped, scores)
    for name in ("strategies", "critic", "curves", "pass_at", "by_problem", "evaluation"):
        assert getattr(before, name) == getattr(after, name)
    assert before.splits != after.splits


def test_a_problem_that_lost_samples_does_not_cut_the_curves_short():
    problems, samples, labels, scores = run()
    lost = [
        replace(one, status="sandbox_error", passed=False) if one.task_id == "7" and one.sample_id else one
        for one in labels
    ]
    summary = build(problems, samples, lost, scores)
    assert (summary.curves.problems, len(summary.curves.by_strategy["critic"])) == (11, 8)
    assert summary.left_out.sandbox_error == 7
    assert any("11 of 12 problems with at least 8 usable samples" in warning for warning in summary.warnings)


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_without_a_critic_the_page_says_so():
    problems, samples, labels, _ = run()
    summary = build(problems, samples, labels, facts=replace(FACTS, epochs=(), critic=None))
    page = render(summary)
    assert summary.critic is None
    assert "critic" not in {result.strategy for result in summary.strategies}
    assert "No critic yet: nothing chooses better than chance here." in page
    assert "A random sample passes on" in page
    assert "(no usable test sample has a critic&#39;s score)" in page
    assert set(summary.curves.by_strategy) == {"random", "mean_logprob", "oracle"}


@pytest.mark.parametrize("passed", [True, False])
def test_labels_of_one_class(passed):
    problems, samples, labels, scores = run()
    status = "passed" if passed else "failed"
    summary = build(problems, samples, [replace(one, passed=passed, status=status) for one in labels], scores)
    text = Reader(render(summary)).text
    assert (summary.critic.auc, summary.critic.within_problem.pairs) == (None, 0)
    expected = [
        "all scored test samples have the same label",
        "no test problem has both a passing and a failing sample",
        f"for {'100.0' if passed else '0.0'} % [\u2013] of 12 test problems",
        "The critic cannot be told apart from random choice",
        "+0.0 points [\u2013]: no interval, so nothing is shown.",
    ]
    assert [part for part in expected if part not in text] == []


def test_runs_that_have_only_started_and_single_problems():
    problems, samples, labels, scores = run(tests=1, n=1)
    started = build(problems, [], [], facts=Facts(run="r", date="d", command="c", model="m"))
    text = Reader(render(started)).text
    assert "No strategy measured: no test problem has a usable sample." in text
    assert "nan" not in text.lower()
    assert "None" not in text
    as_text(table(started))
    render(build([], [], []))
    text = Reader(render(build(problems, samples, labels, scores))).text
    assert "of 1 test problem;" in text
    assert "[\u2013]" in text


YES, NO, EVEN = Interval(0.1, 0.02, 0.2), Interval(-0.1, -0.2, -0.02), Interval(0.1, -0.02, 0.2)
ALIKE = Interval(0.1, 0.1, 0.1)
ENDINGS = {
    YES: "[+2.0, +20.0].", NO: "worse.", EVEN: "the interval includes zero.", ALIKE: "so nothing is shown.",
}  # fmt: skip


@pytest.mark.parametrize(
    ("random", "logprob", "claim"),
    [
        (YES, YES, "beats random choice and mean log-probability."),
        (YES, EVEN, "beats random choice and cannot be told apart from mean log-probability."),
        (YES, NO, "beats random choice and loses to mean log-probability."),
        (EVEN, EVEN, "cannot be told apart from random choice or mean log-probability."),
        (NO, None, "loses to random choice."),
        (ALIKE, None, "cannot be told apart from random choice."),
    ],
)
def test_the_headline_claims_only_what_the_intervals_show(whole, random, logprob, claim):
    result = StrategyResult("critic", 12, Interval(0.5, 0.3, 0.7), random)
    others = [other for other in whole.strategies if other.strategy != "critic"]
    duels = [Duel("mean_logprob", 1, 1, 10, logprob, 1.0)] if logprob else []
    summary = replace(whole, strategies=[result, *others], duels=duels)
    assert headline(summary) == f"The critic {claim}"
    sentences = [plain(sentence) for sentence in findings(summary)]
    assert sentences[1].endswith(ENDINGS[random])
    assert logprob is None or sentences[2].endswith(ENDINGS[logprob])


def test_a_critic_measured_on_the_problems_that_it_was_trained_on_says_so(whole):
    problems, samples, labels, scores = run()
    summary = build(problems, samples, labels, scores, split="train")
    assert headline(summary).startswith("On train problems, which it has seen, the critic ")
    seen = "These are train problems: the critic has seen them, so its figures flatter it."
    assert summary.warnings[0] == seen
    assert seen in Reader(render(summary)).text
    assert seen not in whole.warnings
    assert seen not in build(problems, samples, labels, split="train").warnings  # no critic, nothing seen


def test_a_part_without_data_says_why_and_shows_no_chart(whole):
    empty = {name: [] for name in ("duels", "roc", "selective", "difficulty", "funnel", "split_accuracies")}
    reasons = {**whole.reasons, "duels": "nobody to compare with", "roc": "one class"}
    text = Reader(render(replace(whole, **empty, gap_closed=None, reasons=reasons))).text
    assert "Not shown: duels (nobody to compare with)." in text
    assert "Not shown: roc (one class)." in text
    assert "training did not compare the two ways to split" in text
    hidden = ("Duels", "Answering only when sure", "By difficulty", "Data funnel", "of the way")
    assert [part for part in hidden if part in text] == []


# ---- programs and text -----------------------------------------------------------------------------------------------


@given(st.text())
def test_coloured_code_reads_as_the_code(code):
    shown = html.unescape(re.sub(r"</?span[^>]*>", "", str(programs.coloured(code))))
    assert shown.removesuffix("\n") == code.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def test_a_long_program_is_cut_and_says_so():
    text = re.sub(r"<[^>]*>", "", str(programs.CodeFilter()("a" * (programs.CODE_CHARS + 1234))))
    assert text == "a" * programs.CODE_CHARS + "\n… 1,234 more characters"


def test_programs_side_by_side_are_the_pick_and_the_best_others(whole):
    records = run()
    picked = {choice.task_id: choice.sample_id for choice in choose(*records) if choice.strategy == "critic"}
    passed = {(label.task_id, label.sample_id): label.passed for label in records[2]}
    score = {(entry.task_id, entry.sample_id): entry.score for entry in records[3]}
    details = programs.problem_details(*records, choose(*records))
    assert any(None not in detail.programs.values() for detail in details.values())
    for row in whole.by_problem:
        pick, *shown = details[row.task_id].programs.values()
        assert pick.sample.sample_id == picked[row.task_id]
        others = {i: score[t, i] for t, i in score if t == row.task_id and i != picked[row.task_id]}
        for verdict in (True, False):
            best = max((i for i in others if passed[row.task_id, i] == verdict), key=others.__getitem__, default=None)
            if best is None:
                assert None in shown
            else:
                assert best in {program.sample.sample_id for program in shown if program}


def test_text():
    assert visible("a\u202eb\u200b\x1b\ud800\n\tc\u00a0") == (
        "a\u27e8U+202E\u27e9b\u27e8U+200B\u27e9\u27e8U+001B\u27e9\u27e8U+D800\u27e9\n\tc\u00a0"
    )
    assert shorten("a\n\n b\x00\u202ec") == "a b c"
    assert shorten("word " * 99, 12) == "word word w…"
    shorten("\ud800x").encode()
    times = {4.21: "4.2 s", 99.96: "100.0 s", 125: "2 min 05 s", 12_000: "3 h 20 min", None: DASH}
    assert {value: plain(seconds(value)) for value in times} == times
    assert judge(build(*run()), ("samples >= 1", 0))[0].verdict == "met"
