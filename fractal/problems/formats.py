"""The schemas of problem files: which one a record has, and our own. Reads text; runs no program.

One module for each family: mbpp.py, evalplus.py, apps.py (with CodeContests), bigcodebench.py, leetcode.py,
livecodebench.py. What each reads and how results are compared: docs/formats.md.
"""

from pathlib import Path
from typing import Any

from fractal.jsonl import Line, decode, decode_object, read_lines
from fractal.problems.apps import problem_from_apps, problem_from_code_contests, problem_from_pairs, stdin_problem
from fractal.problems.bigcodebench import problem_from_bigcodebench
from fractal.problems.evalplus import problem_from_evalplus, problem_from_humaneval, problem_from_script
from fractal.problems.leetcode import problem_from_leetcode
from fractal.problems.livecodebench import problem_from_livecodebench
from fractal.problems.mbpp import entry_point, mbpp_split, problem_from_mbpp
from fractal.problems.values import is_arguments
from fractal.records import Problem

__all__ = ["entry_point", "mbpp_split", "problem_from_mbpp", "problem_of", "read_problems"]


def read_problems(path: Path) -> list[Problem]:
    """The problems of a JSON or JSONL file (gzipped or not), in our own schema or one of those of docs/formats.md.

    Raises RecordError with file, line, field and what was expected; also for a duplicate task_id.
    """
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    lines = read_lines(path)
    values = [decode_object(line) for line in lines]
    if all(value.keys() == {"input", "output"} for value in values):  # the tests of one problem
        inputs, outputs = [value["input"] for value in values], [value["output"] for value in values]
        return [stdin_problem(lines[0], path.name.split(".")[0], "", inputs, outputs, reference="", test_limit_s=None)]
    for line, value in zip(lines, values, strict=True):
        problem = problem_of(line, value)
        if problem.task_id in seen:
            raise line.error(f"task_id {problem.task_id} stands already in {line.kind} {seen[problem.task_id]}")
        seen[problem.task_id] = line.number
        problems.append(problem)
    return problems


def problem_of(line: Line, value: dict[str, Any]) -> Problem:
    """The problem of a record in any known schema; its fields say in which. Raises RecordError."""
    tests = value.get("tests")
    if "base_input" in value:
        return problem_from_evalplus(line, value)
    if isinstance(value.get("test"), str) and "inputs = " in value["test"] and "assertion(" in value["test"]:
        return problem_from_script(line, value)
    if "test_list" in value:
        return problem_from_mbpp(line, value)
    if "complete_prompt" in value:
        return problem_from_bigcodebench(line, value)
    if "canonical_solution" in value:
        return problem_from_humaneval(line, value)
    if "public_test_cases" in value or "private_test_cases" in value:
        return problem_from_livecodebench(line, value)
    if "public_tests" in value:
        return problem_from_code_contests(line, value)
    if "input_output" in value:
        if isinstance(value["input_output"], list):
            return problem_from_pairs(line, value, value["input_output"])
        return problem_from_apps(line, value)
    if isinstance(tests, dict) and "functional" in tests:
        return problem_from_leetcode(line, value)
    if isinstance(tests, dict) and {"inputs", "outputs"} <= tests.keys():
        return problem_from_pairs(line, value, tests)
    for pairs in (tests, value.get("test_cases")):
        if isinstance(pairs, list) and pairs and all(isinstance(pair, dict) for pair in pairs):
            return problem_from_pairs(line, value, pairs)
    if "tests" in value or "task_id" in value:
        return _own_problem(line)
    raise line.error(
        f"no known schema: it has {', '.join(sorted(value)) or 'no keys'}; expected those of a format in "
        "docs/formats.md, as test_list (MBPP's), base_input (EvalPlus's), input_output (APPS's) or tests (ours)"
    )


def _own_problem(line: Line) -> Problem:
    problem = decode(line, Problem)
    if not problem.tests:
        raise line.error("field tests: is empty, expected at least one test")
    if problem.kind == "calls" and not all(map(is_arguments, [*problem.tests])):
        raise line.error("field tests: of calls, expected the JSON text of a list of arguments for each")
    if problem.expected and len(problem.expected) != len(problem.tests):
        raise line.error(f"field expected: {len(problem.expected)} for {len(problem.tests)} tests")
    if problem.kind == "stdin" and not problem.expected:
        raise line.error("field expected: is empty, expected what is to be printed for each of the tests")
    if problem.kind == "calls" and not problem.expected and not problem.reference:
        raise line.error("field expected: is empty, and there is no reference that says what is expected")
    if problem.base_tests is not None and not 0 <= problem.base_tests <= len(problem.tests):
        raise line.error(f"field base_tests: expected from 0 to {len(problem.tests)}, got {problem.base_tests}")
    return problem
