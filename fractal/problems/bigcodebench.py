"""BigCodeBench's problems: a prompt, a solution, and a unittest class that calls `task_func`."""

from typing import Any

from fractal.jsonl import Line
from fractal.problems.fields import refuse, text
from fractal.records import Problem

CLASS = "TestCases"  # of the tests, in all problems: bigcodebench/eval/__init__.py, version 0.2
RUN = f"""
import unittest as _unittest

_result = _unittest.TestResult()
_unittest.defaultTestLoader.loadTestsFromTestCase({CLASS}).run(_result)
_wrong = [f"{{case.id().rpartition('.')[2]}}: {{text.strip().splitlines()[-1]}}" for case, text in
          [*_result.failures, *_result.errors]]
assert _result.testsRun and not _wrong, "; ".join(_wrong)
"""


def problem_from_bigcodebench(line: Line, value: dict[str, Any]) -> Problem:
    """One problem (bigcode/bigcodebench): one test, the unittest class and the call that runs it."""
    prompt, test = text(line, value, "complete_prompt"), text(line, value, "test")
    if f"class {CLASS}(" not in test:
        refuse(line, "BigCodeBench", "test", f"no `class {CLASS}(unittest.TestCase)` in it: this schema is not known")
    return Problem(
        task_id=text(line, value, "task_id"),
        prompt=prompt,
        reference=f"{prompt}{text(line, value, 'canonical_solution')}".rstrip() + "\n",
        tests=[test.rstrip() + "\n" + RUN],
        setup="",
        entry_point=text(line, value, "entry_point"),
        split="test",
        prefix=prompt,
    )
