"""HumanEval, and EvalPlus's HumanEval+ and MBPP+, in the files of its releases and in those of the hub.

HumanEval has a check script. The others have calls: arguments as JSON (EvalPlus's releases), where some lists stand for
tuples and sets, by task; or a script with the literals (the hub), of which these are read and no code is
run. What is expected is what the reference returns, unless the script has it.
"""

import ast
import math
import re
from collections.abc import Callable
from typing import Any

from fractal.jsonl import Line
from fractal.problems.fields import refuse, text, texts
from fractal.problems.mbpp import mbpp_split
from fractal.problems.syntax import syntax_tree
from fractal.problems.values import encode_value
from fractal.records import Problem, Split

Change = Callable[[list[Any]], list[Any]]


def problem_from_humaneval(line: Line, value: dict[str, Any]) -> Problem:
    """One problem of HumanEval (openai/openai_humaneval): one test, the script and the call of its `check`."""
    prompt, name = text(line, value, "prompt"), text(line, value, "entry_point")
    test = text(line, value, "test")
    if "def check(" not in test:
        refuse(line, "HumanEval", "test", "no `def check(candidate)` in it: this schema is not known")
    return Problem(
        task_id=text(line, value, "task_id"),
        prompt=prompt,
        reference=_with_end(prompt + text(line, value, "canonical_solution", default="")),
        tests=[f"{test.rstrip()}\n\ncheck({name})"],
        setup="",
        entry_point=name,
        split="test",
        prefix=prompt,
    )


def problem_from_evalplus(line: Line, value: dict[str, Any]) -> Problem:
    """One problem of an EvalPlus release: `base_input` and `plus_input`, compared as `evalplus.eval` 0.3.1 does."""
    task_id, prompt, name = (text(line, value, field) for field in ("task_id", "prompt", "entry_point"))
    calls = []
    for field in ("base_input", "plus_input"):
        inputs = value.get(field)
        if inputs in ({}, None) and field == "plus_input":
            inputs = []
        if not isinstance(inputs, list) or not all(isinstance(args, list) for args in inputs):
            raise line.error(f"field {field}: expected a list of lists of arguments")
        calls.append(inputs)
    is_mbpp = task_id.startswith("Mbpp/")
    change = _argument_types(task_id) if is_mbpp else None
    try:
        tests = [encode_value(change(args) if change else args) for inputs in calls for args in inputs]
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise line.error(f"field base_input or plus_input: not the arguments of {task_id}: {error}") from error
    if not tests:
        raise line.error("field base_input: is empty, expected at least one call")
    atol = _tolerance(line, value.get("atol", 0))
    reference = _with_end(prompt + text(line, value, "canonical_solution"))
    return Problem(
        task_id=task_id,
        prompt=_docstring(prompt) if is_mbpp else prompt,
        reference=reference + (_says_whether_found(name) if is_mbpp and name in FOUND_OR_NONE else ""),
        tests=tests,
        setup="",
        entry_point=name,
        split=_split(task_id),
        kind="calls",
        base_tests=len(calls[0]),
        compare=_comparison(name, atol, is_mbpp=is_mbpp),
        atol=atol,
        prefix=prompt,
    )


def problem_from_script(line: Line, value: dict[str, Any]) -> Problem:
    """One problem of the hub's evalplus/mbppplus and evalplus/humanevalplus: the literals of the script `test`.

    The script imports numpy, so it is not run: its calls and the values expected are read from it.
    """
    tree = _script(line, text(line, value, "test"))
    is_mbpp = "test_list" in value
    inputs, results = (_assigned(line, tree, name) for name in ("inputs", "results"))
    call = _compared_call(tree)
    if inputs is None or call is None:
        refuse(line, "EvalPlus on the hub", "test", "no script that is known. Take the file of EvalPlus's release, "
               "MbppPlus.jsonl or HumanEvalPlus.jsonl: --problems FILE")  # fmt: skip
    name, atol = value.get("entry_point") or call[0], call[1]
    if results is not None and len(results) != len(inputs):
        raise line.error(f"field test: {len(inputs)} inputs and {len(results)} results")
    prompt = text(line, value, "prompt")
    task_id = str(value.get("task_id"))
    reference = text(line, value, "code") if is_mbpp else prompt + text(line, value, "canonical_solution")
    base = len(texts(line, value, "test_list")) if is_mbpp else None
    try:
        tests = [encode_value(list(args)) for args in inputs]
        expected = [] if results is None else [encode_value(result) for result in results]
    except (ValueError, TypeError) as error:
        raise line.error(f"field test: a value in it is not plain: {error}") from error
    return Problem(
        task_id=task_id,
        prompt=prompt.strip() if is_mbpp else prompt,
        reference=_with_end(reference),
        tests=tests,
        setup="",
        entry_point=name,
        split=_split(task_id),
        kind="calls",
        expected=expected,
        base_tests=min(base, len(tests)) if base else None,
        compare=_comparison(name, atol, is_mbpp=is_mbpp),
        atol=atol,
        prefix="" if is_mbpp else prompt,
    )


def _split(task_id: str) -> Split:
    number = re.search(r"[0-9]{1,9}$", task_id)
    return mbpp_split(int(number[0])) if number and not task_id.startswith("HumanEval") else "test"


def _docstring(prompt: str) -> str:
    """MBPP+'s prompt is a docstring: its text."""
    return prompt.strip().removeprefix('"""').removesuffix('"""').strip()


def _with_end(program: str) -> str:
    return program.rstrip() + "\n"


def _tolerance(line: Line, atol: Any) -> float:
    if isinstance(atol, bool) or not isinstance(atol, int | float) or not 0 <= atol < math.inf:
        raise line.error(f"field atol: expected a number from 0, got {atol!r}")
    return float(atol)


# --- how results are compared -----------------------------------------------------------------------------------------
# By the names of entry points, as evalplus/eval/__init__.py and _special_oracle.py have them (version 0.3.1).

AS_SETS = {
    "similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
    "intersection_array", "find_dissimilar", "Diff",
}  # fmt: skip
FOUND_OR_NONE = {"check_str", "text_match_three", "text_starta_endb"}  # whether there is a result, or a truth value
ANOTHER_READING = {  # a second answer that counts: the problem's text can be read in two ways
    "are_equivalent": "True",
    "sum_div": "result == 0",
    "surface_Area": "result == round(args[0] ** 2 + 2 * args[0] * ((args[0] / 2) ** 2 + args[1] ** 2) ** 0.5)",
    "digit_distance_nums": "result == sum(abs(int(a) - int(b)) for a, b in zip("
    "str(args[0]).zfill(len(str(args[1]))), str(args[1]).zfill(len(str(args[0])))))",
}


def _comparison(name: str, atol: float, *, is_mbpp: bool) -> str:
    """The expression of Problem.compare; "" for equality within the tolerance."""
    if not is_mbpp:
        if name != "find_zero":
            return ""
        return f"abs(sum(c * result ** i for i, c in enumerate(args[0]))) <= {atol}"  # any root counts
    if name in AS_SETS:
        return "set(result) == set(expected)"
    if name in FOUND_OR_NONE:
        return "(result if isinstance(result, bool) else result is not None) == expected"
    return f"result == expected or {ANOTHER_READING[name]}" if name in ANOTHER_READING else ""


def _says_whether_found(name: str) -> str:
    """What makes a reference answer by a truth value: a match object is no plain value to compare with."""
    return f"\n\n_{name} = {name}\n\n\ndef {name}(*args):\n    return _{name}(*args) is not None\n"


# --- arguments of MBPP+: which lists stand for tuples or sets ---------------------------------------------------------
# By task, as evalplus.data.mbpp.mbpp_deserialize_inputs has them (version 0.3.1).

EACH = {2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809}
ITEMS_OF_EACH = {63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780}
ITEMS_OF_FIRST = {75, 413, 444, 753}
SECOND = {106, 750}
FIRST = {250, 307, 405, 446, 617, 720, 763, 808}
EACH_AND_ITEMS = {259, 401, 445}
ALL_DEPTHS = {580, 615, 791}


def _argument_types(task_id: str) -> Change | None:
    number = re.fullmatch(r"Mbpp/([0-9]{1,9})", task_id)
    task = int(number[1]) if number else 0
    for tasks, change in CHANGES:
        if task in tasks:
            return change
    return None


def _tuples(values: Any) -> list[Any]:
    return [tuple(value) for value in values]


def _all_tuples(value: Any) -> Any:
    return tuple(_all_tuples(item) for item in value) if isinstance(value, list) else value


CHANGES: list[tuple[set[int], Change]] = [
    (EACH, _tuples),
    (ITEMS_OF_EACH, lambda args: [_tuples(arg) for arg in args]),
    (ITEMS_OF_FIRST, lambda args: [_tuples(args[0]), *args[1:]]),
    (SECOND, lambda args: [args[0], tuple(args[1])]),
    (FIRST, lambda args: [tuple(args[0]), *args[1:]]),
    (EACH_AND_ITEMS, lambda args: [tuple(_tuples(arg)) for arg in args]),
    (ALL_DEPTHS, lambda args: [_all_tuples(arg) for arg in args]),
    # An empty list stands for an empty dict there, as `{}` is one.
    ({115}, lambda args: [[set(item) if isinstance(item, list) and item else {} for item in args[0]]]),
    ({124}, lambda args: [float(args[0]), complex(args[1])]),
    ({252}, lambda args: [complex(args[0])]),
    ({278}, lambda args: [tuple(tuple(item) if isinstance(item, list) else item for item in args[0])]),
    ({722}, lambda args: [{key: tuple(value) for key, value in args[0].items()}, *args[1:]]),
]


# --- the hub's script -------------------------------------------------------------------------------------------------


def _script(line: Line, source: str) -> ast.Module:
    try:
        return syntax_tree(source)
    except ValueError as error:
        raise line.error(f"field test: not Python: {error}") from error


def _assigned(line: Line, tree: ast.Module, name: str) -> list[Any] | None:
    """The list that a script assigns to a name, at its top level or in its `check`; None where there is none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            try:
                value = _literal(node.value)
            except (ValueError, TypeError, RecursionError, MemoryError, SyntaxError) as error:
                raise line.error(f"field test: {name} is no list of literals: {error}") from error
            if not isinstance(value, list):
                raise line.error(f"field test: {name} is no list")
            return value
    return None


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.literal_eval(_Numbers().visit(node))


class _Numbers(ast.NodeTransformer):
    """`inf` and `nan` as literals."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node


def _compared_call(tree: ast.Module) -> tuple[str, float] | None:
    """Of `assertion(NAME(*inp), ..., ATOL)`: the name that is called, and the tolerance; None where there is none."""
    statements = [node for node in tree.body if not isinstance(node, ast.Assign)]  # those hold the literals
    for node in (node for statement in statements for node in ast.walk(statement)):
        match node:
            case ast.Call(
                func=ast.Name(id="assertion"),
                args=[
                    ast.Call(func=ast.Name(id=name), args=[ast.Starred()]),
                    _,
                    ast.Constant(value=int() | float() as atol),
                ],
            ):
                return name, float(atol)
            case ast.Call(
                func=ast.Name(id="assertion"), args=[ast.Call(func=ast.Name(id=name), args=[ast.Starred()]), _]
            ):
                return name, 0.0
    return None
