"""Success criteria: read, recorded once and for good, and judged by what was measured."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fractal.errors import InputError, RecordError
from fractal.report import criteria, make
from fractal.report.criteria import COMPARE, COUNTS, NAMES, Criterion, parse
from fractal.rundir import RunDir
from fractal.selection.bootstrap import Interval
from tests import pages


@pytest.fixture(scope="module")
def measured():
    return pages.full(pages.build(*pages.run()))


@given(
    st.sampled_from([*NAMES, *COUNTS, "details.critic.auc", "seconds.verify"]),
    st.sampled_from(list(COMPARE)),
    st.floats(-1, 1).map(lambda x: round(x, 6)),
    st.sampled_from(["", " ", "\t"]),
)
def test_what_is_written_is_read(name, comparison, value, gap):
    assert parse(f"{gap}{name}{gap}{comparison}{gap}{value!r}{gap}") == Criterion(name, comparison, value)
    assert parse(Criterion(name, comparison, value).text) == Criterion(name, comparison, value)
    assert parse("val_accuracy >= 80 %") == parse("val_accuracy>=80%") == parse("val_accuracy >= .80")


@given(st.text())
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        parse(text)
    except InputError as error:
        assert "\n" not in str(error)


BAD = """
val_accuracy                 not a criterion
val_accuracy = 0.8           not a criterion
0.8 <= val_accuracy          not a criterion
val_accuracy >= 0.8 0.9      not a criterion
accurracy >= 0.8             unknown name 'accurracy'. Known: val_accuracy, accuracy
nothing.critic.auc >= 0.8    unknown name
details >= 0.8               unknown name
details.critic.auk >= 0.8    unknown name
details.duels.x.gain.lo > 0  unknown name
details.critic.auc.x >= 0    unknown name
val_accuracy >= 80           write 80 % or a number from -1 to 1
details.critic.auc >= 80     write 80 % or a number from -1 to 1
cost_usd <= 80 %             cost_usd is no share
"""


def test_bad_criteria_say_what_is_wrong():
    wrong = []
    for line in BAD.strip().splitlines():
        text, message = line[:29].strip(), line[29:]
        try:
            wrong.append((text, parse(text)))
        except InputError as error:
            if message not in str(error):
                wrong.append((text, str(error)))
    assert wrong == []


def test_a_plan_is_lines_with_comments(tmp_path):
    plan = tmp_path / "plan.txt"
    plan.write_bytes("\ufeff# goals\r\n\r\ncritic_gain_low > 0  # clear of zero\r\nsamples >= 1800\r\n".encode())
    assert [criterion.text for criterion in criteria.read_plan(plan)] == ["critic_gain_low > 0", "samples >= 1800"]
    everything = criteria.parse_all(["samples>=1800", "auc > 0.5"], plan)
    assert everything == [*criteria.read_plan(plan), parse("auc > 0.5")]
    plan.write_text("auc > 0.5\n\nnothing\n")
    with pytest.raises(InputError, match=r"plan\.txt: line 3: 'nothing': not a criterion"):
        criteria.read_plan(plan)
    for content in (b"", b"# only words\n", b"\xff\xfe"):
        plan.write_bytes(content)
        with pytest.raises(InputError, match=r"plan\.txt"):
            criteria.read_plan(plan)
    with pytest.raises(InputError, match="cannot be read"):
        criteria.read_plan(tmp_path)


def test_criteria_are_on_disk_at_once_and_only_added_to(tmp_path, measured):
    def on_disk():
        return json.loads((tmp_path / "r/manifest.json").read_text())["criteria"]

    with RunDir(tmp_path / "r", create=True) as folder:
        criteria.record(folder, [parse("auc > 0.5")])
        before = on_disk()
        folder.file("samples.jsonl").write_bytes(b"{}\n{}\n{")  # two, and one torn
        assert criteria.record(folder, [parse("auc > 50 %")]) == []
        criteria.record(folder, [parse("auc > 0.9"), parse("samples >= 1")])
        assert on_disk()[:1] == before
        assert [entry["samples"] for entry in on_disk()] == [0, 2, 2]
        folder.manifest["criteria"][0]["seal"] = "of a run that was made before"
        fields = make.as_json(make.summary_fields(measured))
        verdicts = criteria.judge(folder.manifest, fields, measured.reasons)
        assert [verdict.verdict for verdict in verdicts] == ["met", "missed", "met"]
        assert [verdict.reason for verdict in verdicts] == ["", *["added after 2 samples were there"] * 2]
        folder.manifest["criteria"][0]["comparison"] = "about"
        with pytest.raises(RecordError, match="criteria"):
            criteria.judge(folder.manifest, fields, measured.reasons)


# ---- judged ----------------------------------------------------------------------------------------------------------


def test_every_name_is_measured_or_says_why_not(measured):
    assert [path for path in NAMES.values() if not criteria._is_path(path)] == []
    fields = make.as_json(make.summary_fields(measured, 0.5))
    missing = {name for name in [*NAMES, *COUNTS] if criteria.lookup(fields, NAMES.get(name, name))[0] is None}
    absent = ("first", "zero_shot", "critic_logprob", "consensus", "visible_test")  # no such data in these records
    assert {name for name in missing if not any(part in name for part in absent)} == set()
    empty = pages.summary.build(pages.Facts(run="r", date="d", command="c", model="m"), [], [], [])
    verdicts = pages.judge(empty, *[(f"{name} >= 0", 0) for name in [*NAMES, *COUNTS]])
    told = [verdict for verdict in verdicts if verdict.verdict == "not judged"]
    assert all(verdict.reason for verdict in told)
    assert len(told) >= len(verdicts) - 4  # counts are 0


def test_values_come_with_interval_and_source(measured):
    critic = {result.strategy: result for result in measured.strategies}["critic"]
    duel = {duel.strategy: duel for duel in measured.duels}["mean_logprob"]
    within = measured.critic.within_problem
    expected = {
        "within_auc": (within.auc, within.interval),
        "accuracy": (measured.critic.accuracy, measured.critic.accuracy_interval),
        "critic": (critic.pass_rate.mean, critic.pass_rate),
        "critic_gain_low": (critic.gain_over_random.low, critic.gain_over_random),
        "strategies.critic.gain_over_random.low": (critic.gain_over_random.low, critic.gain_over_random),
        "over_mean_logprob": (duel.gain.mean, duel.gain),
        "gap_closed": (measured.gap_closed.mean, measured.gap_closed),
        "val_accuracy": (0.62, None),
        "honest_accuracy": (0.713, None),
        "pass_rate": (measured.splits[-1].pass_rate.mean, measured.splits[-1].pass_rate),
        "labels.passed": (measured.labels_by_status["passed"], None),
        "verified_per_s": (measured.samples / 61.25, None),
        "total_s": (410 + 61.25 + 7400, None),
    }
    verdicts = pages.judge(measured, *[(f"{name} >= 0", 0) for name in expected])
    assert {verdict.criterion.split()[0]: (verdict.value, verdict.interval) for verdict in verdicts} == expected
    assert verdicts[0].source == "summary.json: details.critic.within_problem.auc"


def test_no_interval_means_not_judged(measured):
    """A bootstrap that saw no variation knows no lower end."""
    alike = [replace(result, gain_over_random=Interval(0.1, 0.1, 0.1)) for result in measured.strategies]
    low, mean = pages.judge(replace(measured, strategies=alike), ("critic_gain_low > 0", 0), ("critic_gain > 0", 0))
    assert (low.verdict, low.value, mean.verdict) == ("not judged", None, "met")
    assert "no interval" in low.reason


def test_the_bound_itself(measured):
    verdicts = pages.judge(measured, *[(f"samples {comparison} {measured.samples}", 0) for comparison in COMPARE])
    assert [verdict.verdict for verdict in verdicts] == ["met", "met", "met", "missed", "missed"]


def test_the_help_names_them_all():
    from fractal.__main__ import app

    shown = " ".join(CliRunner().invoke(app, ["report", "--help"], env={"COLUMNS": "200"}).output.split())
    families = (*criteria.STRATEGIES, "over_")
    plain = [name for name in NAMES if not name.startswith(families)]
    assert [name for name in [*plain, *COUNTS] if name not in shown] == []
    assert all(form in shown for form in ("S_gain", "S_gain_low", "over_S", "over_S_low", "summary.json"))
