"""Problem sets: schemas, splits, entry points, and what is wrong with a line."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.errors import InputError, RecordError
from fractal.jsonl import encode
from fractal.problems.formats import entry_point, mbpp_split, read_problems
from fractal.problems.sets import digest, load, parse_splits
from fractal.records import Problem
from tests.conftest import SHARED

FULL = {
    "text": " Double a number. ", "code": "import math\r\ndef f(x):\r\n    return x * 2\r\n", "task_id": 11,
    "test_setup_code": "root = 1\r\n", "test_list": ["assert f(1) == 2 ", "x = f(2)\r\nassert x == 4"], "challenge_test_list": [],
}  # fmt: skip
SANITIZED = {
    "source_file": "x", "task_id": 602, "prompt": "Double a number.", "code": "def f(x):\n  return x * 2",
    "test_imports": ["import math"], "test_list": ["assert f(1) == 2"],
}  # fmt: skip


def written(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_both_schemas_of_mbpp_and_our_own(tmp_path: Path) -> None:
    own = Problem("3", "p", "def g(): return 1\n", ["assert g() == 1"], "", "g", "prompt")
    found = read_problems(written(tmp_path, FULL, SANITIZED, json.loads(encode(own))))
    full, sanitized, ours = found
    assert full == Problem(
        "11", "Double a number.", "import math\ndef f(x):\n    return x * 2\n", ["assert f(1) == 2", "x = f(2)\nassert x == 4"],
        "root = 1", "f", "test",
    )  # fmt: skip
    assert (sanitized.setup, sanitized.split, sanitized.entry_point) == ("import math", "train", "f")
    assert ours == own


@given(st.integers(1, 974))
def test_the_official_splits(task_id: int) -> None:
    assert mbpp_split(task_id) == ("prompt" if task_id < 11 else "test" if task_id < 511 else "validation" if task_id < 601 else "train")  # fmt: skip


def test_the_official_splits_have_their_sizes() -> None:
    assert Counter(map(mbpp_split, range(1, 975))) == {"prompt": 10, "test": 500, "validation": 90, "train": 374}


@pytest.mark.parametrize(
    ("reference", "tests", "name"),
    [
        ("def helper(): pass\ndef f(x): pass", ["assert f(1)"], "f"),
        ("class Pair: pass\ndef chain(a): pass", ["assert chain([Pair(1), Pair(2)]) == 3"], "chain"),
        ("def sum(a, b): pass", ["assert sum(1, 2) == 3"], "sum"),
        ("class Stack: pass", ["assert Stack().pop() is None"], "Stack"),
        ("double = lambda x: 2 * x", ["assert double(1) == 2"], "double"),
    ],
)
def test_the_entry_point_is_what_the_tests_call(reference: str, tests: list[str], name: str) -> None:
    assert entry_point(reference, tests) == name


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"task_id": "eleven"}, "field task_id: expected an integer"),
        ({"task_id": True}, "field task_id: expected an integer"),
        ({"text": 5}, "field text: expected a string"),
        ({"code": None}, "field code: expected a string"),
        ({"test_list": "assert"}, "field test_list: expected a list of strings"),
        ({"test_list": []}, "field test_list: is empty"),
        ({"code": "def ("}, "not Python"),
        ({"code": "y = 1"}, "no name that the tests use"),
    ],
)
def test_a_bad_field_is_named_with_file_and_line(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecordError, match=rf"problems\.jsonl: line 2: .*{complaint}"):
        read_problems(written(tmp_path, SANITIZED, {**FULL, **change}))


@pytest.mark.parametrize("field", ["text", "code", "task_id"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(RecordError, match=rf"line 1: .*{field}"):
        read_problems(written(tmp_path, {k: v for k, v in FULL.items() if k != field}))


def test_a_duplicate_names_both_lines(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"line 3: task_id 11 stands already in line 1"):
        read_problems(written(tmp_path, FULL, SANITIZED, FULL))


def test_splits_and_limit() -> None:
    assert parse_splits("train, test") == {"train", "test"}
    assert parse_splits("all") is None
    with pytest.raises(InputError, match="unknown split dev; known: all, train"):
        parse_splits("dev")
    few = load("starter", "train,test", 3)
    assert Counter(p.split for p in few.problems) == {"train": 3, "test": 3}
    with pytest.raises(InputError, match="no problem is in split prompt"):
        load("starter", "prompt")
    with pytest.raises(InputError, match="--limit 0"):
        load("starter", None, 0)


def test_the_digest_depends_on_content_not_on_order() -> None:
    problems = load("starter").problems
    assert digest(problems) == digest(problems[::-1])
    assert digest(problems) != digest(problems[1:])


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("mbpp.jsonl", {"prompt": 10, "test": 500, "validation": 90, "train": 374}),
        ("sanitized-mbpp.json", {"prompt": 7, "test": 257, "validation": 43, "train": 120}),
    ],
)
def test_the_real_files(name: str, splits: dict[str, int]) -> None:
    path = SHARED / "mbpp" / name
    if not path.exists():
        pytest.skip(f"no {name} beside the checkout: the product does not contain MBPP")
    problems = read_problems(path)
    assert Counter(p.split for p in problems) == splits
    assert not [p.task_id for p in problems if "\r" in p.reference + p.setup + "".join(p.tests)]


OURS = json.loads(encode(Problem("7", "Add.", "def f(a):\n    return a\n", ["assert f(1) == 1"], "", "f", "train")))


def write(path: Path, *values: Any) -> Path:
    path.write_bytes(b"".join(json.dumps(value).encode() + b"\n" for value in values))
    return path


def test_array_lines_and_gzip_are_the_same(tmp_path):
    values = [FULL, SANITIZED, OURS]
    expected = read_problems(write(tmp_path / "lines.jsonl", *values))
    (tmp_path / "array.json").write_text(json.dumps(values, indent=2))
    (tmp_path / "array.gz").write_bytes(gzip.compress(json.dumps(values).encode()))
    assert expected == read_problems(tmp_path / "array.json") == read_problems(tmp_path / "array.gz")
    assert encode(expected[2]) == json.dumps(OURS, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    ("reference", "tests"),
    [
        ("def f(a): return a", ["assert g(1)"]),
        ("def f(a) return a", ["assert f(1)"]),
        ("def f(a): return a", ["assert f(1"]),
        ("def f(a): return '\0'", ["assert f(1)"]),
        ("f = " + "(" * 5000 + ")" * 5000, ["assert f(1)"]),
        ("", ["assert f(1)"]),
    ],
)
def test_without_an_entry_point(reference, tests):
    with pytest.raises(ValueError, match="the reference"):
        entry_point(reference, tests)


def changed(value, **fields):
    return {k: v for k, v in {**value, **fields}.items() if v is not ...}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (changed(FULL, task_id=...), "field task_id: expected an integer"),
        (changed(FULL, text=...), "field prompt or text is missing"),
        (changed(FULL, code=...), "field code is missing"),
        (changed(FULL, test_list=["assert f(1)", 2]), "field test_list: expected a list of strings"),
        (changed(FULL, test_setup_code=[]), "field test_setup_code: expected a string"),
        (changed(SANITIZED, test_imports="import math"), "field test_imports: expected a list of strings"),
        (changed(OURS, tests=[]), "field tests: is empty"),
        (changed(OURS, tests="assert f(1)"), "tests"),
        (changed(OURS, split="dev"), "split"),
        (changed(OURS, entry_point=...), "entry_point"),
        ([1], "expected a JSON object, got list"),
        (OURS, "task_id 7 stands already in line 1"),
    ],
)
def test_a_bad_line_is_named(value, words, tmp_path):
    path = write(tmp_path / "p.jsonl", OURS, value)
    with pytest.raises(RecordError) as caught:
        read_problems(path)
    assert str(caught.value).startswith(f"{path}: line 2: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4), st.data())
def test_any_wrong_value_is_a_record_error(tmp_path_factory, value, data):
    path = tmp_path_factory.getbasetemp() / "wrong.jsonl"
    base = data.draw(st.sampled_from([FULL, SANITIZED, OURS]))
    write(path, {**base, data.draw(st.sampled_from(sorted(base))): value})
    try:
        (problem,) = read_problems(path)
    except RecordError as error:
        assert "line 1: " in str(error)
    else:
        assert problem.tests
        assert isinstance(problem.task_id, str)


def test_splits_and_limits_choose(tmp_path):
    path = write(tmp_path / "p.jsonl", *(changed(SANITIZED, task_id=i) for i in (700, 12, 601, 5, 11, 520, 13)))
    ids = lambda *wanted: [p.task_id for p in load(str(path), *wanted).problems]  # noqa: E731
    assert ids() == ["5", "11", "12", "13", "520", "601", "700"]
    assert ids("train,validation") == ["520", "601", "700"]
    assert ids("all", 1) == ["5", "11", "520", "601"]
    assert ids("test", 2) == ["11", "12"]
    with pytest.raises(InputError, match="--limit 0"):
        ids(None, 0)
    write(path, changed(FULL, task_id=601))
    with pytest.raises(InputError, match="no problem is in split test; it has train"):
        ids("test")
