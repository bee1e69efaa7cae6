"""LeetCode problems with a check script: `tests.functional` ends with `check(Solution().name)`."""

import re
from typing import Any

from fractal.jsonl import Line
from fractal.problems.fields import refuse, task_id, text
from fractal.problems.solutions import IMPORTS
from fractal.records import Problem


def problem_from_leetcode(line: Line, value: dict[str, Any]) -> Problem:
    """One problem; the script is its one test."""
    script = value["tests"].get("functional")
    if not isinstance(script, str):
        raise line.error(f"field tests.functional: expected a string, got {type(script).__name__}")
    called = re.search(r"^check\((.+)\)\s*$", script, re.MULTILINE)
    if called is None or "def check(" not in script:
        refuse(line, "LeetCode", "tests.functional", "expected a script with def check(candidate) and its call, as "
               "check(Solution().name)")  # fmt: skip
    reference = text(line, value, "solutions", "solution", default="")
    return Problem(
        task_id=task_id(line, value, "task_id", "question_id", "id"),
        prompt=text(line, value, "problem", "prompt", "question").strip(),
        reference=f"{IMPORTS}\n{reference.rstrip()}\n" if reference.strip() else "",
        tests=[script],
        setup="",
        entry_point=re.split(r"[(.\s]", called[1].strip())[0],  # the class, which must be there before a test runs
        split="test",
        prefix=IMPORTS,
    )
