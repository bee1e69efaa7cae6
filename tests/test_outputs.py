"""agreement: what programs return on the visible inputs, as the judge in the real sandbox sees it."""

import math

import pytest

from fractal.jsonl import encode, read_jsonl, write_jsonl
from fractal.records import Label, Output, Problem, Sample, code_sha256
from fractal.rundir import RunDir
from fractal.sandbox.host.limits import Limits
from fractal.verify import outputs as verify_outputs

LIMITS = Limits(cpu_s=1.0, wall_s=3.0)


def problem(test, task_id="1", setup="", entry_point="f"):
    return Problem(
        task_id, "p", f"def {entry_point}(*a): return 1", [test, "assert f(9) == 9"], setup, entry_point, "test"
    )


def program(body, sample_id=0, task_id="1"):
    return Sample(task_id, sample_id, "", body, "stop", 1, None, None, "m")


def outputs(sandbox, test, bodies, **options):
    asked = verify_outputs.output_problem(problem(test, **options))
    labels = sandbox.verify([program(body, i) for i, body in enumerate(bodies)], {"1": asked})
    return [verify_outputs.output_of(label) for label in labels]


# ---- which calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test", "values"),
    [
        ("assert f(1, x=[2]) == 777", "f(1, x=[2])"),
        ("assert set(f([1])) == set([777])", "set(f([1]))"),
        ("assert sorted(list(f(1))) == 777", "sorted(list(f(1)))"),
        ("assert math.isclose(f(1), 777, rel_tol=0.1)", "f(1)"),
        ("assert f(1) + 777 == f(2)", "f(1), f(2)"),
        ("assert f(f(1)) == 777", "f(f(1))"),
        ("assert f(777)", "not not f(777)"),
        ("assert not f(777)", "not not f(777)"),
        ("x = [1]\nassert f(x) == 777, 'said'", "f(x)"),
    ],
)
def test_the_calls_are_taken_without_the_expected_value(test, values):
    asked = verify_outputs.output_problem(problem(test))
    (text,) = asked.tests
    assert f"fractal_report(({values},))" in text
    if "f(777)" not in values:
        assert "777" not in text


@pytest.mark.parametrize(
    "test",
    ["assert g(1) == 2", "assert all(f(i) for i in [1])", "def check(f): pass", "assert f(", "x = f(1)", ""],
)
def test_a_test_without_a_call_that_can_be_taken_out_has_none(test):
    assert verify_outputs.output_problem(problem(test)) is None


def test_a_verdict_that_is_no_report_is_no_output():
    words = f"{verify_outputs.MARK}3 (1,"
    label = Label("1", 0, "error", False, ["error"], 0, 0, f"test 1: AssertionError: {words}", "")
    assert verify_outputs.output_of(label) is None
    assert verify_outputs.output_of(Label("1", 0, "passed", True, ["passed"], 0, 0, "", "")) is None


# ---- what they return ------------------------------------------------------------------------------------------------


@pytest.mark.sandbox
def test_equal_values_have_equal_texts_and_others_do_not(sandbox):
    """Groups of values: equal within, as == says, and different between."""
    groups = [
        ["1", "True", "1.0", "__import__('fractions').Fraction(1)", "__import__('decimal').Decimal('1.00')"],
        ["0", "False", "-0.0"],
        ["'1'"],
        ["b'1'"],
        ["None"],
        ["0.3", "3 / 10"],
        ["0.30000000000000004"],
        ["float('inf')"],
        ["[1, 2]", "[1.0, 2]"],
        ["(1, 2)", "__import__('collections').namedtuple('P', 'x y')(1, 2)"],
        ["{1, 2, 30, 'a'}", "frozenset(['a', 30, 2, 1])"],
        ["{'a': 1, 'b': [2]}", "{'b': [2], 'a': True}", "__import__('collections').OrderedDict(b=[2], a=1)"],
        ["{1: 1, 2: [2]}"],
        ["set()"],
        ["{}"],
        ["''"],
        ["'sha256 0'"],
        ["'x' * 1000"],
        ["'x' * 1001"],
        ["10 ** 4000"],
        ["10 ** 5000"],
        ["'\\ud800'"],
        ["'1 | printed: 2'"],
    ]
    bodies = [f"def f(x):\n    print('1 (2,)')\n    return {value}" for group in groups for value in group]
    found = iter(outputs(sandbox, "assert f(1) == 5", bodies))
    texts = [{next(found) for _ in group} for group in groups]
    assert all(len(group) == 1 and None not in group for group in texts), texts
    assert len(set.union(*texts)) == len(texts)
    assert max(len(text) for group in texts for text in group) <= verify_outputs.MAX_LENGTH


FORGED = [
    "class L:\n    __eq__ = lambda s, o: True\n    __repr__ = lambda s: '1'\n    __hash__ = lambda s: 1\ndef f(x): return L()",
    "class L(int):\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 1\ndef f(x): return L(1)",
    "def f(x): return iter([1])",
    f"def f(x): raise AssertionError('{verify_outputs.MARK}4 (1,)')",
    f"def f(x): assert None, '{verify_outputs.MARK}4 (1,)'",
    "def f(x): return 1 / 0",
    "def f(x):\n    while True: pass",
    "import os\ndef f(x): os._exit(0)",
    "f = 3",
    "def f(x: return 1",
]


@pytest.mark.sandbox
def test_what_is_no_value_is_no_output(sandbox):
    assert outputs(sandbox, "assert f(1) == 1", [*FORGED, "def f(x): return 1"]) == [None] * len(FORGED) + ["(1,)"]


@pytest.mark.sandbox
def test_names_of_program_and_test_do_not_meet_the_probe_s(sandbox):
    """The entry point is called like a built-in that the probe uses, and the test imports and sets up its own."""
    body = "def repr(x): return [x]\nstr = type = isinstance = sorted = None"
    assert outputs(sandbox, "assert repr(2) == [2]", [body], entry_point="repr") == ["([2,],)"]
    body = "from collections import deque\ndef f(x): return list(x)"
    asked = Problem(
        1, "p", body, ["assert f(deque([1])) == [1]"], "", "f", "test"
    )  # the program's import, not the test's
    (label,) = sandbox.verify([program(body)], {"1": verify_outputs.output_problem(asked)})
    assert verify_outputs.output_of(label) == "([1,],)"
    body = "def f(x): return x / 2"
    assert outputs(sandbox, "assert math.floor(f(math.pi)) == 1", [body], setup="import math") == [
        f"({math.pi / 2!r},)"
    ]


@pytest.mark.sandbox
def test_the_stage_fills_what_is_missing_and_skips_the_silent(tmp_path, place):
    problems = [problem("assert f(2) == 4"), problem("assert all(f(i) for i in [1])", task_id="2")]
    bodies = ["def f(x): return x * 2", "def f(x): return x + 2", "def f(x): return 5", "def f(x): 1 / 0", "def f("]
    samples = [program(body, i) for i, body in enumerate(bodies)] + [program(bodies[0], 0, task_id="2")]
    firsts = ["passed", "passed", "failed", "error", "not_run", "passed"]
    labels = [
        Label(s.task_id, s.sample_id, "failed", False, [first, "not_run"], 0, 0, "", code_sha256(s.code))
        for s, first in zip(samples, firsts, strict=True)
    ]
    outputs_of_1 = ["(4,)", "(4,)", "(5,)", None, None]
    expected = {("1", i): output for i, output in enumerate(outputs_of_1)} | {("2", 0): None}
    with RunDir(tmp_path / "run", create=True) as folder:
        folder.set_problems(problems)
        write_jsonl(folder.file("samples.jsonl"), samples)
        write_jsonl(folder.file("labels.jsonl"), labels[:2])
        verify_outputs.run(folder, LIMITS, **place)
        path = folder.file("outputs.jsonl")
        assert len(read_jsonl(path, Output)) == 2
        with path.open("ab") as file:
            file.write(encode(Output("1", 2, "torn"))[:-4])
        write_jsonl(folder.file("labels.jsonl"), labels)
        verify_outputs.run(folder, LIMITS, **place)
        found = read_jsonl(path, Output)
        assert {(one.task_id, one.sample_id): one.output for one in found} == expected
        assert len(found) == len(expected)
        before = path.stat()
        verify_outputs.run(folder, LIMITS, image="no-such-image")  # nothing is missing: nothing is started
        assert path.stat().st_mtime_ns == before.st_mtime_ns
