"""A data set's row to a Problem, and a reply to its text: what trainers hand to a reward function. Runs no program."""

import ast
import builtins
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fractal.errors import InputError
from fractal.generate.extraction import definition_pattern
from fractal.problems.formats import entry_point
from fractal.problems.syntax import syntax_tree
from fractal.records import Problem

# Columns by the names that data sets use for them; the first that a row has counts.
TESTS = ("tests", "test_list", "test", "test_cases")
REFERENCE = ("reference", "code", "canonical_solution", "solution")
SETUP = ("setup", "test_setup_code")
IMPORTS = "test_imports"
INPUTS, OUTPUTS = "inputs", "outputs"  # of standard input and output, as APPS and its successors have them
OWN = (
    "kind",
    "expected",
    "compare",
    "atol",
    "test_limit_s",
    "base_tests",
    "prefix",
)  # our own problems' further fields


def reply_text(completion: object) -> str:
    """The text of a completion: itself, or the last message of the assistant's. Raises InputError."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence):
        for message in reversed(completion):
            role = message.get("role", "assistant") if isinstance(message, Mapping) else getattr(message, "role", None)
            if role == "assistant":
                content = message.get("content") if isinstance(message, Mapping) else getattr(message, "content", None)
                return _content_text(content)
        return ""
    raise InputError(f"a completion is a text or a list of messages, not {type(completion).__name__}.")


def _content_text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):  # parts, as {"type": "text", "text": ...}
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return ""


def as_row(value: object, name: str) -> dict[str, Any]:
    """A row from a mapping, its JSON text, or the tests alone. Raises InputError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {"tests": [value]}  # a test's source
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and all(isinstance(test, str) for test in value):
        return {"tests": list(value)}
    raise InputError(f"{name}: expected columns, their JSON text, or a list of tests; got {type(value).__name__}.")


def problem_from_row(row: Mapping[str, Any], task_id: str) -> Problem:
    """A Problem from columns: `tests` or `test_list`, and where there are any `setup`, `entry_point`, `reference`.

    `inputs` and `outputs` are standard input and output; a row of our own problems has their `kind`, too. Raises
    InputError where no tests are there, or a column is not what it should be.
    """
    if isinstance(row.get("input_output"), str | Mapping):
        row = {**row, **as_row(row["input_output"], "column input_output")}
    if INPUTS in row and OUTPUTS in row:
        return _stdin_problem(row, task_id)
    tests = _column(row, TESTS)
    tests = [tests] if isinstance(tests, str) else tests
    if not isinstance(tests, Sequence) or not tests or not all(isinstance(test, str) for test in tests):
        raise InputError(
            f"the data set's row has no tests: expected one of the columns {', '.join(TESTS)}, with Python statements, "
            f"or {INPUTS} and {OUTPUTS}; it has {', '.join(sorted(row)) or 'none'}. Or name the problems and have a "
            "column task_id."
        )
    reference, setup = _text(row, REFERENCE), _text(row, SETUP)
    imports = row.get(IMPORTS) or []
    setup = "\n".join(filter(None, [*imports, setup]))
    if row.get("kind", "asserts") != "asserts":
        name = row.get("entry_point", "")
    else:
        name = row.get("entry_point") or _entry_point(reference, list(tests))
    if not isinstance(name, str):
        raise InputError(f"column entry_point: expected a name, got {type(name).__name__}.")
    if len(tests) == 1 and _is_check_script(tests[0]):  # HumanEval's
        tests = [f"{tests[0]}\ncheck({name})\n"]
    if name and not definition_pattern(name.rpartition("()")[0] or name).search(reference):
        reference = ""  # HumanEval's canonical_solution is a body alone
    problem = Problem(task_id, "", reference, list(tests), setup, name, "train")
    own = {field: row[field] for field in OWN if row.get(field) is not None}
    try:
        return msgspec.convert({**msgspec.to_builtins(problem), **own}, Problem) if own else problem
    except msgspec.ValidationError as error:
        raise InputError(f"the data set's row: a column is not as our own problems have it: {error}.") from error


def _stdin_problem(row: Mapping[str, Any], task_id: str) -> Problem:
    inputs, outputs = row[INPUTS], row[OUTPUTS]
    texts = [value for value in (inputs, outputs) if isinstance(value, Sequence) and not isinstance(value, str)]
    if row.get("fn_name"):
        raise InputError("column fn_name: calls of a function are read from a named problem set only (problems=…).")
    if len(texts) < 2 or len(inputs) != len(outputs) or not all(isinstance(text, str) for text in [*inputs, *outputs]):
        raise InputError(f"columns {INPUTS} and {OUTPUTS}: expected two lists of texts, of the same length.")
    return Problem(task_id, "", "", list(inputs), "", "", "train", kind="stdin", expected=list(outputs))


def _is_check_script(test: str) -> bool:
    """Whether a test defines HumanEval's `check(candidate)` and does not call it."""
    return "def check(" in test and not re.search(r"^check\(", test, re.MULTILINE)


def _column(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _text(row: Mapping[str, Any], names: Sequence[str]) -> str:
    value = _column(row, names)
    if value is not None and not isinstance(value, str):
        raise InputError(f"column {names[0]}: expected a text, got {type(value).__name__}.")
    return value or ""


def _entry_point(reference: str, tests: list[str]) -> str:
    """The name that the tests call; of a reference's own names where there is one. "" if there is none."""
    try:
        if reference:
            return entry_point(reference, tests)
        trees = [syntax_tree(test) for test in tests]
    except ValueError:
        return ""
    names = Counter(
        node.func.id
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not hasattr(builtins, node.func.id)
    )
    return names.most_common(1)[0][0] if names else ""
