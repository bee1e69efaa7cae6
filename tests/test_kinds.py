"""Tests that are calls, and scripts by standard input: what is compared how, and their labels in the real sandbox."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.jsonl import write_jsonl
from fractal.problems.formats import read_problems
from fractal.records import Label, Problem, Sample
from fractal.sandbox.host.limits import DEFAULT_LIMITS
from fractal.sandbox.inside.calls import is_right, prepare_calls
from fractal.sandbox.inside.scripts import same_output
from fractal.verify import stage


def calls(tests: list[str], expected: list[str], compare: str = "", atol: float = 0.0) -> Any:
    problem = {"entry_point": "f", "tests": tests, "expected": expected, "compare": compare, "atol": atol}
    return prepare_calls(problem | {"record": False})


FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(deadline=None)  # numpy is imported in the first example
@given(st.lists(FINITE, min_size=1), st.floats(0, 1e-3), st.floats(-1e-2, 1e-2))
def test_floats_are_close_as_numpy_says(values: list[float], atol: float, off: float) -> None:
    """EvalPlus compares by numpy.allclose(result, expected, rtol=1e-07, atol=atol)."""
    import numpy as np

    result = [value + off for value in values]
    prepared = calls(["[]"], [json.dumps(values)], atol=atol)
    expected = result == values or bool(np.allclose(result, values, rtol=1e-07, atol=atol or 1e-6))
    assert is_right(prepared, 0, result, values) == expected


@pytest.mark.parametrize(
    ("result", "expected", "right"),
    [
        (0.1 + 0.2, 0.3, True),
        ([0.1 + 0.2], [0.3], True),
        ((0.1 + 0.2,), [0.3], False),  # as EvalPlus: of one type
        ([0.3, 0.3], [0.3], False),
        (math.inf, math.inf, True),
        (math.nan, math.nan, False),
        (1, 1.0, True),
        ("0.3", 0.3, False),
        (None, 0.3, False),
        (10**400, 0.3, False),
        (1e-9, 0.0, True),
    ],
)
def test_a_result_is_equal_or_close(result: Any, expected: Any, right: bool) -> None:
    assert is_right(calls(["[]"], ["0.5"]), 0, result, expected) == right


def test_whole_numbers_have_no_tolerance() -> None:
    prepared = calls(["[]"], ["[1, 2]"])
    assert not is_right(prepared, 0, [1, 2.0000001], [1, 2])
    assert is_right(prepared, 0, [1, 2.0], [1, 2])


def test_an_expression_says_what_is_right_and_an_exception_in_it_is_no() -> None:
    prepared = calls(["[3]"], ["[1, 2]"], "set(result) == set(expected) or result == args")
    assert is_right(prepared, 0, (2, 1, 1), [1, 2])
    assert is_right(prepared, 0, [3], [1, 2])
    assert not is_right(prepared, 0, 7, [1, 2])


@pytest.mark.parametrize(
    ("printed", "expected", "atol", "same"),
    [
        ("1 2\n", "1 2", 0.0, True),
        ("1  2 \n\n3\r\n", "1 2\n3\n", 0.0, True),
        ("1 2 3", "1 2\n3", 0.0, False),
        ("1\n2\n", "1\n", 0.0, False),
        ("", "\n", 0.0, True),
        ("0.3333", "0.33333333", 1e-3, True),
        ("0.3333", "0.33333333", 1e-6, False),
        ("1000001", "1000000", 1e-5, True),
        ("nan", "1.0", 1e-3, False),
        ("Yes", "YES", 0.0, False),
        ("1.0", "1", 0.0, False),
        ("x 1.0", "y 1.0", 1e-3, False),
    ],
)
def test_outputs_are_compared_as_a_contest_does(printed: str, expected: str, atol: float, same: bool) -> None:
    assert same_output(printed, expected, atol) == same


TOKENS = st.lists(st.lists(st.text("ab01.", min_size=1), min_size=1))


@given(TOKENS, TOKENS)
def test_white_space_makes_no_difference_and_tokens_do(ours: list[list[str]], theirs: list[list[str]]) -> None:
    tight = "\n".join(" ".join(line) for line in ours)
    loose = "".join("  \t".join(line) + " \n\n" for line in theirs)
    assert same_output(tight, loose, 0.0) == (ours == theirs)


# --- in the sandbox ---------------------------------------------------------------------------------------------------


def problem(kind: Any, tests: list[str], expected: list[str] = [], **fields: Any) -> Problem:  # noqa: B006
    entry = "" if kind == "stdin" else "f"
    given = {"prompt": "", "reference": "", "setup": "", "entry_point": entry, "split": "test", **fields}
    return Problem(task_id="1", tests=tests, kind=kind, expected=expected, **given)


def label_of(sandbox: Any, problem: Problem, code: str) -> Label:
    (label,) = sandbox.verify([Sample("1", 0, "", code, "stop", 0, None, None, "test")], {"1": problem})
    return label


DOUBLE = "def f(x):\n    return x * 2\n"
BY_REFERENCE = problem("calls", ["[1]", '["ab"]', '[{"t": [1]}]'], reference=DOUBLE)
SUM = problem("stdin", ["1 2\n", "3 4\n"], ["3\n", "7"])


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("code", "status", "tests", "detail"),
    [
        (DOUBLE, "passed", ["passed"] * 3, ""),
        ("def f(x):\n    return x + x\n", "passed", ["passed"] * 3, ""),
        ("def f(x):\n    return 2", "failed", ["passed", "failed", "not_run"], 'expected "abab", got 2'),
        ("def f(x):\n    raise ValueError(x)", "error", ["error", "not_run", "not_run"], "ValueError: 1"),
        ("def g(x):\n    return 2", "missing", ["not_run"] * 3, "f is not defined"),
        ("def f(x):\n    while 1: pass", "timeout", ["timeout", "not_run", "not_run"], " time over "),
        ("def f(x):\n    raise SystemExit(0)", "crashed", ["crashed", "not_run", "not_run"], "SystemExit"),
        ("def f(x):\n    return iter([2])", "failed", ["failed", "not_run", "not_run"], "got a StandIn"),
        ("def f(x", "syntax_error", ["not_run"] * 3, "SyntaxError"),
    ],
)
def test_calls_have_their_labels(sandbox: Any, code: str, status: str, tests: list[str], detail: str) -> None:
    label = label_of(sandbox, BY_REFERENCE, code)
    assert (label.status, label.tests) == (status, tests)
    assert detail in label.detail


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("reference", "detail"),
    [
        ("def f(x):\n    return 1 / 0", "ZeroDivisionError"),
        ("def f(x):\n    return object()", "no plain value"),
        ("def g(x):\n    return 1", "f is not defined"),
        ("def f(x):\n    import socket\n    socket.socket()", "forbidden"),
    ],
)
def test_a_reference_that_cannot_say_what_is_expected_gives_no_label(sandbox: Any, reference: str, detail: str) -> None:
    label = label_of(sandbox, problem("calls", ["[1]"], reference=reference), DOUBLE)
    assert label.status == "sandbox_error"
    assert "the problem's reference" in label.detail
    assert detail in label.detail


@pytest.mark.sandbox
def test_a_method_of_solution_is_called_on_a_new_object(sandbox: Any) -> None:
    counter = problem("calls", ["[1]", "[1]"], ["1", "1"], entry_point="Solution().add")
    code = "class Solution:\n    def __init__(self):\n        self.n = 0\n    def add(self, x):\n        self.n += x\n        return self.n\n"
    assert label_of(sandbox, counter, code).status == "passed"
    missing = label_of(sandbox, counter, "class Solution:\n    pass\n")
    assert (missing.status, missing.tests) == ("error", ["error", "not_run"])
    assert label_of(sandbox, counter, "def add(x):\n    return 1\n").status == "missing"


@pytest.mark.sandbox
def test_many_and_large_calls_are_answered_in_order(sandbox: Any) -> None:
    """More than a socket's buffer holds, in both directions."""
    sizes = [1, 70_000, 3, 200_000, *range(2000)]
    large = problem(
        "calls", [json.dumps(["x" * size]) for size in sizes], [json.dumps("x" * size * 2) for size in sizes]
    )
    assert label_of(sandbox, large, DOUBLE).status == "passed"
    wrong = label_of(sandbox, large, "def f(x):\n    return x * 2 if len(x) != 1999 else ''\n")
    assert (wrong.status, wrong.tests.count("passed"), wrong.tests[-1]) == ("failed", len(sizes) - 1, "failed")


@pytest.mark.sandbox
def test_a_call_that_hangs_is_the_one_that_timed_out(sandbox: Any) -> None:
    """Answers that equal what is expected and are not the same bytes (2 and 2.0) do not wait for the calls behind."""
    code = "def f(x):\n    while x == 3:\n        pass\n    return x\n"
    hangs = problem("calls", [f"[{i}]" for i in range(40)], [f"{i}.0" for i in range(40)])
    label = label_of(sandbox, hangs, code)
    assert (label.status, label.tests[:5]) == ("timeout", ["passed"] * 3 + ["timeout", "not_run"]), label
    raises = label_of(sandbox, hangs, code.replace("return x", "return x if x != 2 else 1 / 0"))
    assert (raises.status, raises.tests[:4]) == ("error", ["passed"] * 2 + ["error", "not_run"]), raises


@pytest.mark.sandbox
def test_arguments_that_a_program_changes_stay_as_they_are_for_the_next_call(sandbox: Any) -> None:
    same = problem("calls", ["[[3, 1]]", "[[3, 1]]"], reference="def f(x):\n    x.sort()\n    return x[0]\n")
    assert label_of(sandbox, same, "def f(x):\n    return x.pop()\n").status == "passed"


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("code", "status", "tests"),
    [
        ("print(sum(map(int, input().split())))", "passed", ["passed", "passed"]),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())), end='')\nsys.exit()", "passed", ["passed"] * 2),
        ("if __name__ == '__main__':\n    print(eval(open(0).read().replace(' ', '+')))", "passed", ["passed"] * 2),
        (
            "import threading\ndef main():\n    print(sum(map(int, input().split())))\n"
            "threading.Thread(target=main).start()",
            "passed",
            ["passed", "passed"],
        ),
        ("import atexit\natexit.register(lambda: print(sum(map(int, input().split()))))", "passed", ["passed"] * 2),
        ("print(3)", "failed", ["passed", "failed"]),
        ("1 / 0", "error", ["error", "not_run"]),
        ("input()\ninput()", "error", ["error", "not_run"]),
        ("print(3)\nraise SystemExit(2)", "crashed", ["crashed", "not_run"]),
        ("while True:\n    pass", "timeout", ["timeout", "not_run"]),
        ("x = bytearray(1 << 40)", "memory", ["memory", "not_run"]),
        ("import socket\nsocket.socket()", "forbidden", ["forbidden", "not_run"]),
        ("print(", "syntax_error", ["not_run", "not_run"]),
        ("print('x' * 10_000_000)", "failed", ["failed", "not_run"]),
    ],
)
def test_scripts_have_their_labels(sandbox: Any, code: str, status: str, tests: list[str]) -> None:
    label = label_of(sandbox, SUM, code)
    assert (label.status, label.tests) == (status, tests)


@pytest.mark.sandbox
def test_a_script_s_tests_share_nothing(sandbox: Any) -> None:
    """Each has a process and an empty folder of its own."""
    counts = "import os\nprint(len(os.listdir('.')))\nopen('left', 'w').close()\n"
    assert label_of(sandbox, problem("stdin", ["", ""], ["0", "0"]), counts).status == "passed"


@pytest.mark.sandbox
def test_a_test_s_own_limit_is_longer_than_the_default(sandbox: Any) -> None:
    """The sandbox of the tests allows one second of CPU."""
    slow = "import time\nwhile time.process_time() < 1.2:\n    pass\nprint(1)\n"
    assert label_of(sandbox, problem("stdin", [""], ["1"]), slow).status == "timeout"
    assert label_of(sandbox, problem("stdin", ["\n"], ["1"], test_limit_s=6.0), slow).status == "passed"


UNITTEST = """
import unittest
class TestCases(unittest.TestCase):
    def test_double(self):
        self.assertEqual(task_func(2), 4)
    def test_text(self):
        with self.assertRaises(TypeError):
            task_func(None)
"""


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ("return x * 2", "passed", ""),
        ("return x + x if x else 0", "failed", "test_text: AssertionError: TypeError not raised"),
        ("return str(x) * 2", "failed", "test_double: AssertionError: '22' != 4"),
        ("import os; os._exit(0)", "crashed", "left with exit code 0"),
        ("import sys; sys.exit(0)", "failed", "SystemExit(0)"),  # unittest catches it, as in plain evaluation
        ("while x: pass", "timeout", "CPU time over"),
        ("import unittest; unittest.TestCase.assertEqual = print; return 5", "failed", "test_double"),
    ],
)
def test_a_unittest_class_is_one_test(sandbox: Any, tmp_path: Path, body: str, status: str, detail: str) -> None:
    head = "def task_func(x):\n"
    record = {"task_id": "BigCodeBench/1", "complete_prompt": head, "canonical_solution": "    return x * 2\n",
              "test": UNITTEST, "entry_point": "task_func", "libs": "[]"}  # fmt: skip
    (tmp_path / "bigcodebench.jsonl").write_text(json.dumps(record))
    (read,) = read_problems(tmp_path / "bigcodebench.jsonl")
    label = label_of(sandbox, read, f"{head}    {body}\n")
    assert (label.status, detail in label.detail) == (status, True), label.detail


@pytest.mark.sandbox
def test_tests_that_never_use_the_program_are_no_pass(sandbox: Any) -> None:
    for tests in (["assert True"], ["def check(candidate):\n    assert True\ncheck(f)"]):
        label = label_of(sandbox, problem("asserts", tests), DOUBLE)
        assert (label.status, label.detail) == ("sandbox_error", "the problem's tests never use the program")
    constant = problem("asserts", ["assert LIMIT == 3"], reference="LIMIT = 3\ndef f(x):\n    return x\n")
    assert label_of(sandbox, constant, "LIMIT = 3\ndef f(x):\n    return x\n").status == "passed"


@pytest.mark.sandbox
def test_a_problem_whose_reference_fails_is_named(place: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    """Only where nothing passed: a sample that passes shows that the tests can be passed."""
    reference = "def f(x):\n    return x\n"
    problems = [
        Problem("right", "", reference, ["assert f(1) == 1"], "", "f", "test"),
        Problem("wrong", "", reference, ["assert f(1) == 2"], "", "f", "test"),
        Problem("solved", "", reference, ["assert f(1) == 2"], "", "f", "test"),
    ]
    samples = [
        Sample(task_id, 0, "", code, "stop", 0, None, None, "test")
        for task_id, code in [
            ("right", "def f(x):\n    return 0\n"),
            ("wrong", "x = 1\n"),
            ("solved", "def f(x):\n    return 2\n"),
        ]
    ]
    write_jsonl(tmp_path / "problems.jsonl", problems)
    write_jsonl(tmp_path / "samples.jsonl", samples)
    names = (tmp_path / name for name in ("problems.jsonl", "samples.jsonl", "labels.jsonl"))
    stage.run_files(*names, DEFAULT_LIMITS, **place)
    printed = " ".join(capsys.readouterr().err.split())
    assert "1 of 3 problems cannot be solved" in printed
    assert "wrong (failed: test 1: assertion false)" in printed
