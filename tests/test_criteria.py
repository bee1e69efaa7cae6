"""Success criteria: read, noted once and for good, and judged by what was measured."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.errors import InputError, RecordError
from fractal.report import criteria
from fractal.report.criteria import COMPARE, NAMES, NUMBERS, SHARES, Criterion, parse
from fractal.rundir import RunDir
from fractal.selection.metrics import Interval
from tests import pages


@pytest.fixture(scope="module")
def found():
    return pages.full(pages.build(*pages.run()))


@given(
    st.sampled_from(list(NAMES)),
    st.sampled_from(list(COMPARE)),
    st.floats(-1, 1).map(lambda x: round(x, 6)),
    st.sampled_from(["", " ", "\t"]),
)
def test_what_is_written_is_read(name, comparison, value, gap):
    assert parse(f"{gap}{name}{gap}{comparison}{gap}{value!r}{gap}") == Criterion(name, comparison, value)
    assert parse(Criterion(name, comparison, value).text) == Criterion(name, comparison, value)


def test_a_percentage_is_a_share():
    assert parse("val_accuracy >= 80 %") == parse("val_accuracy>=80%") == parse("val_accuracy >= .80")


@given(st.text())
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        parse(text)
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("val_accuracy", "not a criterion"),
        ("val_accuracy = 0.8", "not a criterion"),
        ("0.8 <= val_accuracy", "not a criterion"),
        ("val_accuracy >= 0.8 0.9", "not a criterion"),
        ("accurracy >= 0.8", "unknown name 'accurracy'. Known: val_accuracy, accuracy"),
        ("val_accuracy >= 80", "write 80 % or a number from -1 to 1"),
        ("cost_usd <= 80 %", "cost_usd is no share"),
        ("samples >= 1e999", "too large"),
    ],
)
def test_bad_criteria_say_what_is_wrong(text, says):
    with pytest.raises(InputError, match=says.replace("(", "\\(")):
        parse(text)


def test_a_plan_is_lines_with_comments(tmp_path):
    plan = tmp_path / "plan.txt"
    plan.write_bytes("\ufeff# goals\r\n\r\ncritic_gain_low > 0  # clear of zero\r\nsamples >= 1800\r\n".encode())
    assert [one.text for one in criteria.read_plan(plan)] == ["critic_gain_low > 0", "samples >= 1800"]
    assert criteria.asked(["samples>=1800", "auc > 0.5"], plan) == [*criteria.read_plan(plan), parse("auc > 0.5")]
    plan.write_text("auc > 0.5\n\nnothing\n")
    with pytest.raises(InputError, match=r"plan\.txt: line 3: 'nothing': not a criterion"):
        criteria.read_plan(plan)
    for content in (b"", b"# only words\n", b"\xff\xfe"):
        plan.write_bytes(content)
        with pytest.raises(InputError, match=r"plan\.txt"):
            criteria.read_plan(plan)
    with pytest.raises(InputError, match="cannot be read"):
        criteria.read_plan(tmp_path)


# ---- noted -----------------------------------------------------------------------------------------------------------


def noted(path):
    return json.loads((path / "manifest.json").read_text())["criteria"]


def test_criteria_are_on_disk_at_once_and_only_added_to(tmp_path, found):
    with RunDir(tmp_path / "r", create=True) as folder:
        criteria.record(folder, [parse("auc > 0.5")])
        before = noted(folder.path)
        assert [one["samples"] for one in before] == [0]
        folder.file("samples.jsonl").write_bytes(b"{}\n{}\n{")  # two, and one torn
        assert criteria.record(folder, [parse("auc > 50 %")]) == []
        criteria.record(folder, [parse("auc > 0.9"), parse("samples >= 1")])
        assert noted(folder.path)[:1] == before
        assert [one["samples"] for one in noted(folder.path)] == [0, 2, 2]
        verdicts = criteria.judge(folder.manifest, found)
    assert [one.verdict for one in verdicts] == ["met", "missed", "met"]
    assert [one.reason for one in verdicts] == ["", *["added after 2 samples were there"] * 2]


@pytest.mark.parametrize("change", ["value", "recorded", "samples", "removed"])
def test_a_change_by_hand_shows(tmp_path, found, change):
    with RunDir(tmp_path / "r", create=True) as folder:
        criteria.record(folder, [parse("auc > 0.99"), parse("samples >= 1")])
        rows = folder.manifest["criteria"]
        if change == "removed":
            del rows[0]
        else:
            rows[0][change] = {"value": 0.1, "recorded": "2020-01-01T00:00:00+00:00", "samples": 7}[change]
        assert "changed by hand" in criteria.judge(folder.manifest, found)[0].reason
        rows[0]["comparison"] = "about"
        with pytest.raises(RecordError, match="criteria"):
            criteria.judge(folder.manifest, found)


# ---- judged ----------------------------------------------------------------------------------------------------------


def test_every_name_is_measured_or_says_why_not(found):
    whole = criteria.measure(found, 0.5)
    assert set(whole) <= set(NAMES)
    missing = set(NAMES) - set(whole)
    made = {one.strategy for one in found.strategies} | {f"over_{one.strategy}" for one in found.duels[1:]}
    assert {one for one in missing if one.removesuffix("_low").removesuffix("_gain") in made} == set()
    assert missing & {*NUMBERS, "val_accuracy", "within_auc", "gap_closed_low", "honest_accuracy"} == set()
    empty = pages.summary.build(pages.Facts(run="r", date="d", command="c", model="m"), [], [], [])
    none = criteria.measure(empty)
    for name in NAMES.keys() - none.keys():
        assert criteria._why_not(name, empty)
    assert set(none) == {"problems"}


@pytest.mark.parametrize(
    "name", ["within_auc", "critic", "critic_gain", "critic_gain_low", "over_mean_logprob", "gap_closed"]
)
def test_a_value_comes_with_its_interval_and_source(found, name):
    one = criteria.measure(found)[name]
    assert one.interval is not None
    assert one.value == (one.interval.low if name.endswith("_low") else one.interval.mean)
    assert ".jsonl" in one.source


def test_no_interval_means_not_judged(found):
    """A bootstrap that saw no variation knows no lower end."""
    alike = [replace(one, gain_over_random=Interval(0.1, 0.1, 0.1)) for one in found.strategies]
    assert "critic_gain_low" not in criteria.measure(replace(found, strategies=alike))


@pytest.mark.parametrize(
    ("comparison", "verdict"), [(">", "missed"), (">=", "met"), ("==", "met"), ("<=", "met"), ("<", "missed")]
)
def test_the_bound_itself(found, comparison, verdict):
    one = criteria.Recorded("samples", comparison, float(found.samples), "t", 0, "")
    rows = [asdict(replace(one, seal=criteria._seal(one, "")))]
    judged = criteria.judge({"criteria": rows}, found)[0]
    assert (judged.verdict, judged.reason) == (verdict, "")


def test_the_help_names_them_all():
    from typer.testing import CliRunner

    from fractal.__main__ import app

    shown = " ".join(CliRunner().invoke(app, ["report", "--help"], env={"COLUMNS": "200"}).output.split())
    assert [name for name in NUMBERS if name not in shown] == []
    plain = [name for name in SHARES if not any(name.startswith(s) or name == f"over_{s}" for s in criteria.STRATEGIES)]
    assert [name for name in plain if name not in shown and not name.startswith("over_")] == []
    assert all(form in shown for form in ("S_gain", "S_gain_low", "over_S", "over_S_low"))
