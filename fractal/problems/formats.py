"""The schemas of problem files: our own, and both of MBPP's. Reads text; runs no program."""

import ast
from collections import Counter
from pathlib import Path
from typing import Any

from fractal.jsonl import Line, decode, decode_object, read_lines
from fractal.problems.syntax import syntax_tree
from fractal.records import Problem, Split


def read_problems(path: Path) -> list[Problem]:
    """The problems of a JSON or JSONL file (gzipped or not), in our own schema or either of MBPP's.

    Raises RecordError with file, line, field and what was expected; also for a duplicate task_id.
    """
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for line in read_lines(path):
        value = decode_object(line)
        if "test_list" in value:
            problem = problem_from_mbpp(line, value)
        elif "tests" in value or "task_id" in value:
            problem = _own_problem(line)
        else:
            raise line.error(
                f"no known schema: it has {', '.join(sorted(value)) or 'no keys'}; expected test_list (MBPP's) or "
                "tests (ours) among them"
            )
        if problem.task_id in seen:
            raise line.error(f"task_id {problem.task_id} stands already in {line.kind} {seen[problem.task_id]}")
        seen[problem.task_id] = line.number
        problems.append(problem)
    return problems


def mbpp_split(task_id: int) -> Split:
    """The official split: 1-10 few-shot prompts, 11-510 test, 511-600 validation, the rest train.

    Source: README of google-research/mbpp.
    """
    if task_id <= 10:
        return "prompt"
    if task_id <= 510:
        return "test"
    return "validation" if task_id <= 600 else "train"


def _own_problem(line: Line) -> Problem:
    problem = decode(line, Problem)
    if not problem.tests:
        raise line.error("field tests: is empty, expected at least one test")
    return problem


def _text(line: Line, value: dict[str, Any], *names: str, default: str | None = None) -> str:
    """The first field of these names, with line ends as \n. Raises RecordError where none is a text or the default."""
    for name in names:
        if name in value:
            if not isinstance(value[name], str):
                raise line.error(f"field {name}: expected a string, got {type(value[name]).__name__}")
            return str(value[name]).replace("\r\n", "\n").replace("\r", "\n")
    if default is None:
        raise line.error(f"field {' or '.join(names)} is missing")
    return default


def _texts(line: Line, value: dict[str, Any], name: str) -> list[str]:
    """A list of strings, with line ends as \n; empty where the field is missing. Raises RecordError."""
    items = value.get(name, [])
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise line.error(f"field {name}: expected a list of strings")
    return [item.replace("\r\n", "\n").replace("\r", "\n").strip() for item in items]


def problem_from_mbpp(line: Line, value: dict[str, Any]) -> Problem:
    """One problem of MBPP: `text` and `test_setup_code` in the full set, `prompt` and `test_imports` in the sanitized.

    References have CRLF line ends there. `challenge_test_list` is not used: the published results do not use it.
    """
    task_id = value.get("task_id")
    if type(task_id) is not int:
        raise line.error(f"field task_id: expected an integer, got {type(task_id).__name__}")
    tests = _texts(line, value, "test_list")
    if not tests:
        raise line.error("field test_list: is empty, expected at least one test")
    reference = _text(line, value, "code")
    setup_code = _text(line, value, "test_setup_code", default="").strip()
    setup = "\n".join(filter(None, [*_texts(line, value, "test_imports"), setup_code]))
    try:
        entry = entry_point(reference, tests)
    except ValueError as error:
        raise line.error(str(error)) from None
    return Problem(
        task_id=str(task_id),
        prompt=_text(line, value, "prompt", "text").strip(),
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
