"""Sample files of other tools: what is read, and what is refused with its line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.errors import RecordError
from fractal.generate import sample_files
from fractal.jsonl import encode
from fractal.records import Problem, Sample

PROBLEMS = {i: Problem(i, "p", "def f(x): return x", ["assert f(1) == 1"], "", "f", "test") for i in ("11", "12")}
CODE = "def f(x):\n    return x\n"


def read_samples(path: Path, problems: dict[str, Problem]) -> list[Sample]:
    return [file_sample.extracted() for file_sample in sample_files.read_samples(path, problems)]


def written(path: Path, *rows: Any, pack: bool = False) -> Path:
    data = b"\n".join(json.dumps(row).encode() for row in rows)
    path.write_bytes(gzip.compress(data) if pack else data)
    return path


@pytest.mark.parametrize(
    "rows",
    [
        [{"task_id": "Mbpp/11", "solution": CODE}, {"task_id": "Mbpp/12", "solution": CODE}, {"task_id": "Mbpp/11", "solution": CODE}],
        [{"task_id": t, "completion": f"Sure:\n```python\n{CODE}```\nDone."} for t in ("11", 12, "HumanEval/11")],
        [{"task_id": t, "sample_id": i, "completion": CODE, "tokens": 5, "sum_logprob": -1.5} for t, i in ((11, 0), (12, 0), (11, 1))],
    ],
    ids=["EvalPlus", "HumanEval", "generations"],
)  # fmt: skip
@pytest.mark.parametrize("pack", [False, True])
def test_foreign_samples_are_numbered_and_their_program_found(tmp_path: Path, rows: list[Any], pack: bool) -> None:
    found = read_samples(written(tmp_path / "s", *rows, pack=pack), PROBLEMS)
    assert [(s.task_id, s.sample_id) for s in found] == [("11", 0), ("12", 0), ("11", 1)]
    assert {s.code for s in found} == {CODE}


def test_our_own_samples_come_back(tmp_path: Path) -> None:
    own = Sample("11", 4, "c", CODE, "stop", 3, -1.0, 7, "m")
    (tmp_path / "s").write_bytes(encode(own))
    assert read_samples(tmp_path / "s", PROBLEMS) == [own]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"task_id": 99, "solution": ""}, "problem 99 is not among the problems"),
        ({"task_id": "eleven", "solution": ""}, "field task_id: problem 'eleven' is not among the problems"),
        ({"solution": ""}, "field task_id"),
        ({"task_id": 11}, "field solution or completion: expected a string, got NoneType"),
        ({"task_id": 11, "completion": 5}, "field solution or completion: expected a string, got int"),
        ({"task_id": 11, "solution": "", "sample_id": -1}, "field sample_id: expected an integer from 0"),
        ({"task_id": 11, "solution": "", "sample_id": 0}, "task_id 11, sample_id 0 stands twice"),
        ([1], "expected a JSON object, got list"),
    ],
)
def test_a_bad_sample_is_named_with_file_and_line(tmp_path: Path, row: Any, complaint: str) -> None:
    path = written(tmp_path / "samples.jsonl", {"task_id": 11, "sample_id": 0, "solution": CODE}, row)
    with pytest.raises(RecordError, match=rf"samples\.jsonl: line 2: .*{complaint}"):
        read_samples(path, PROBLEMS)


def read(path: Path, *values: Any) -> list[Sample]:
    return read_samples(written(path, *values), PROBLEMS)


def test_evalplus_solutions_are_programs_as_they_stand(tmp_path):
    values = [{"task_id": "Mbpp/11", "solution": text} for text in (CODE, "Sure.", "")]
    assert [(s.sample_id, s.code) for s in read(tmp_path / "s.jsonl", *values)] == [(0, CODE), (1, "Sure."), (2, "")]
    (tmp_path / "s.json").write_text(json.dumps(values))
    assert read_samples(tmp_path / "s.json", PROBLEMS) == read(tmp_path / "s.jsonl", *values)


def test_what_a_foreign_sample_tells_is_kept(tmp_path):
    extra = {"finish_reason": "length", "tokens": 7, "sum_logprob": -2, "model": "m"}
    (found,) = read(tmp_path / "s.jsonl", {"task_id": 11, "sample_id": 4, "completion": CODE, **extra})
    assert found == Sample("11", 4, CODE, CODE, "length", 7, -2.0, None, "m")
    odd = {"tokens": "7", "sum_logprob": "low", "finish_reason": None}
    (found,) = read(tmp_path / "s.jsonl", {"task_id": 11, "completion": CODE, **odd})
    assert (found.tokens, found.sum_logprob) == (0, None)


@given(st.lists(st.sampled_from([11, "11", "Mbpp/11", 12, "HumanEval/12"]), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_samples_are_numbered_within_their_problem(tmp_path_factory, ids):
    path = tmp_path_factory.getbasetemp() / "numbered.jsonl"
    found = read(path, *({"task_id": task_id, "solution": CODE} for task_id in ids))
    for task_id in PROBLEMS:
        numbers = [s.sample_id for s in found if s.task_id == task_id]
        assert numbers == list(range(len(numbers)))
    assert len(found) == len(ids)


OURS = json.loads(encode(Sample("11", 0, "c", CODE, "stop", 3, -1.0, 7, "m")))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"task_id": 13, "solution": CODE}, "problem 13 is not among the problems"),
        ({"task_id": "Mbpp/13", "solution": CODE}, "problem 'Mbpp/13' is not among the problems"),
        ({**OURS, "task_id": 13}, "problem 13 is not among the problems"),
        ({"solution": CODE}, "field task_id: expected a number or a name like Mbpp/11, got None"),
        ({"task_id": "sort", "solution": CODE}, "field task_id"),
        ({"task_id": "Mbpp/-11", "solution": CODE}, "field task_id"),
        ({"task_id": 11.0, "solution": CODE}, "field task_id"),
        ({"task_id": True, "solution": CODE}, "field task_id"),
        ({"task_id": [11], "solution": CODE}, "field task_id"),
        ({"task_id": 11}, "field solution or completion: expected a string, got NoneType"),
        ({"task_id": 11, "solution": [CODE]}, "field solution or completion: expected a string, got list"),
        ({"task_id": 11, "code": CODE}, "field solution or completion"),
        ({"task_id": 11, "sample_id": "0", "solution": CODE}, "field sample_id: expected an integer from 0, got '0'"),
        ({"task_id": 11, "sample_id": -1, "solution": CODE}, "field sample_id"),
        ({"task_id": 11, "sample_id": True, "solution": CODE}, "field sample_id"),
        ({"task_id": 12, "sample_id": 0, "solution": CODE}, "task_id 12, sample_id 0 stands twice"),
        ({**OURS, "task_id": 12}, "task_id 12, sample_id 0 stands twice"),
        ({**OURS, "tokens": "9"}, "tokens"),
        ({**OURS, "code": None}, "code"),
        ({k: v for k, v in OURS.items() if k != "model"}, "model"),
        ([], "expected a JSON object, got list"),
    ],
)
def test_a_bad_line_is_named(value, words, tmp_path):
    path = tmp_path / "s.jsonl"
    with pytest.raises(RecordError) as caught:
        read(path, {"task_id": 12, "solution": CODE}, value)
    assert str(caught.value).startswith(f"{path}: line 2: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("digits", [30, 400, 5000])
def test_a_huge_number_is_no_crash(digits, tmp_path):
    path = tmp_path / "s.jsonl"
    for field in ("sum_logprob", "tokens", "sample_id", "task_id"):
        path.write_text(f'{{"task_id": 11, "solution": "", "{field}": {"9" * digits}}}\n')
        try:
            read_samples(path, PROBLEMS)
        except RecordError as error:
            assert str(error).startswith(f"{path}: line 1: ")
