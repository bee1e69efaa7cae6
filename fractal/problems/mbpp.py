"""MBPP's two schemas: the full set's and the sanitized one's (google-research/mbpp)."""

import ast
from collections import Counter
from typing import Any

from fractal.jsonl import Line
from fractal.problems.fields import text, texts
from fractal.problems.syntax import syntax_tree
from fractal.records import Problem, Split


def mbpp_split(task_id: int) -> Split:
    """The official split: 1-10 few-shot prompts, 11-510 test, 511-600 validation, the rest train.

    Source: README of google-research/mbpp.
    """
    if task_id <= 10:
        return "prompt"
    if task_id <= 510:
        return "test"
    return "validation" if task_id <= 600 else "train"


def problem_from_mbpp(line: Line, value: dict[str, Any]) -> Problem:
    """One problem of MBPP: `text` and `test_setup_code` in the full set, `prompt` and `test_imports` in the sanitized.

    References have CRLF line ends there. `challenge_test_list` is not used: the published results do not use it.
    """
    task_id = value.get("task_id")
    if type(task_id) is not int:
        raise line.error(f"field task_id: expected an integer, got {type(task_id).__name__}")
    tests = texts(line, value, "test_list")
    if not tests:
        raise line.error("field test_list: is empty, expected at least one test")
    reference = text(line, value, "code")
    setup_code = text(line, value, "test_setup_code", default="").strip()
    setup = "\n".join(filter(None, [*texts(line, value, "test_imports"), setup_code]))
    try:
        entry = entry_point(reference, tests)
    except ValueError as error:
        raise line.error(str(error)) from None
    return Problem(
        task_id=str(task_id),
        prompt=text(line, value, "prompt", "text").strip(),
        reference=reference.strip("\n") + "\n",
        tests=tests,
        setup=setup,
        entry_point=entry,
        split=mbpp_split(task_id),
    )


def entry_point(reference: str, tests: list[str]) -> str:
    """The name that the tests call and the reference defines; functions before classes, the most used first.

    Raises ValueError if there is none, or if a program does not parse.
    """
    try:
        program = syntax_tree(reference)
        trees = [syntax_tree(test) for test in tests]
    except ValueError as error:
        raise ValueError(f"the reference or a test is not Python: {error}") from error
    functions = {n.name for n in program.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    others = {n.name for n in program.body if isinstance(n, ast.ClassDef)}
    for node in program.body:
        if isinstance(node, ast.Assign):
            others |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    used = Counter(n.id for t in trees for n in ast.walk(t) if isinstance(n, ast.Name))
    for names in (functions, others):
        for name, _ in used.most_common():
            if name in names:
                return name
    raise ValueError("no name that the tests use is defined in the reference")
