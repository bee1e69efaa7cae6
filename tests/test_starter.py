"""The starter set: every record is sound, every reference passes, no trivial program does.

The references are our own, so they run here with plain `exec`; samples of a model never do.
"""

import ast
from collections import Counter
from pathlib import Path

import fractal
from fractal.jsonl import decode, read_lines
from fractal.records import Problem

STARTER = Path(fractal.__file__).with_name("problems") / "starter.jsonl"
PROBLEMS = [decode(line, Problem) for line in read_lines(STARTER)]
TRIVIAL = ("None", "0", "1", '""', "[]", "{}", "True", "False", "arguments[0]", "arguments[-1]")


def results(problem: Problem, program: str) -> list[bool]:
    """For each test whether the program passes it; the tests share one fresh namespace."""
    namespace: dict[str, object] = {}
    exec(program, namespace)
    exec(problem.setup, namespace)
    passed = []
    for test in problem.tests:
        try:
            exec(test, namespace)
        except Exception:
            passed.append(False)
        else:
            passed.append(True)
    return passed


def test_ids_count_from_one():
    assert [problem.task_id for problem in PROBLEMS] == [str(number) for number in range(1, 73)]


def test_entry_points_and_prompts_are_unique():
    assert len({problem.entry_point for problem in PROBLEMS}) == len(PROBLEMS)
    assert len({problem.prompt for problem in PROBLEMS}) == len(PROBLEMS)


def test_split_sizes():
    assert Counter(problem.split for problem in PROBLEMS) == {"train": 36, "validation": 12, "test": 24}


def test_splits_are_interleaved():
    """Each third of the file holds every split, so the splits are not sorted by difficulty."""
    for start in range(0, len(PROBLEMS), 24):
        counts = Counter(problem.split for problem in PROBLEMS[start : start + 24])
        assert counts["train"] >= 10, f"problems {start + 1} to {start + 24}: {counts}"
        assert counts["test"] >= 6, f"problems {start + 1} to {start + 24}: {counts}"
        assert counts["validation"] >= 2, f"problems {start + 1} to {start + 24}: {counts}"


def names(problems: list[Problem]) -> list[str]:
    return [problem.entry_point for problem in problems]


def is_clean(text: str) -> bool:
    return "\r" not in text and not any(line != line.rstrip() for line in text.split("\n"))


def test_texts_are_clean() -> None:
    wrong = [
        problem
        for problem in PROBLEMS
        if not all(map(is_clean, (problem.prompt, problem.reference, problem.setup, *problem.tests)))
        or problem.prompt != problem.prompt.strip()
        or "\n" in problem.prompt
        or not problem.reference.endswith("\n")
    ]
    assert names(wrong) == []


def test_the_reference_defines_the_entry_point() -> None:
    wrong = [
        problem
        for problem in PROBLEMS
        if problem.entry_point
        not in [node.name for node in ast.parse(problem.reference).body if isinstance(node, ast.FunctionDef)]
    ]
    assert names(wrong) == []


def test_every_test_calls_the_entry_point_and_ends_with_an_assert() -> None:
    wrong = [problem for problem in PROBLEMS if len(problem.tests) < 4 or len(set(problem.tests)) < len(problem.tests)]
    for problem in PROBLEMS:
        for test in problem.tests:
            tree = ast.parse(test)
            calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
            called = any(isinstance(call, ast.Name) and call.id == problem.entry_point for call in calls)
            if not called or not isinstance(tree.body[-1], ast.Assert):
                wrong.append(problem)
    assert names(wrong) == []


def test_the_reference_passes_every_test() -> None:
    assert names([problem for problem in PROBLEMS if not all(results(problem, problem.reference))]) == []


def test_no_trivial_program_passes() -> None:
    wrong = [
        (problem.entry_point, value)
        for problem in PROBLEMS
        for value in TRIVIAL
        if all(results(problem, f"def {problem.entry_point}(*arguments):\n    return {value}\n"))
    ]
    assert wrong == []
