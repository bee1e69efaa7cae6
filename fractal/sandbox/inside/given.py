"""What a problem gives the program: the imports, classes and names of its setup that the program may use.

Setup and tests are the judge's. The program's process gets those of their definitions that a program is meant to use,
and none that could hold what the tests expect. Trusted, and pure: it runs nothing. Standard library only.
"""

import ast
import builtins
from collections.abc import Callable
from typing import NamedTuple

SHORT = 20  # characters of a text that a class may hold, in its __repr__


class Given(NamedTuple):
    """Definitions that are run in the program's namespace, too."""

    lines: list[str]  # statements
    classes: list[str]  # the classes among them: their instances cross by value (objects.py)
    first: bool  # they come before the program, as LeetCode has it; else after it, where MBPP has its setup


def find_given(
    setup: ast.Module,
    tests: list[ast.Module],
    reference: ast.Module,
    entry_point: str,
    preloaded: Callable[[ast.Import | ast.ImportFrom], object],
) -> Given:
    """Choose the definitions for the program, with all that these read.

    They are what the reference reads and does not define; the setup's imports of modules that are `preloaded`; classes
    of the setup and of the tests that hold no data, such as ListNode; and the setup's variables that no test reads.
    What names the program's own functions is not given.

        >>> find_given(ast.parse("class Node:\\n    next = None"), [], ast.parse("def f(x): pass"), "f", bool).classes
        ['Node']
    """
    statements = [*setup.body, *(s for test in tests for s in test.body if isinstance(s, ast.ClassDef))]
    if not statements:  # most problems of MBPP
        return Given([], [], False)
    classes = [s for s in statements if isinstance(s, ast.ClassDef)]
    definitions = {name: s for s in statements for name in bound_names(s)}
    own = {name for s in reference.body for name in bound_names(s)} | {entry_point.partition("(")[0]}
    imported = {n for s in reference.body if isinstance(s, ast.Import | ast.ImportFrom) for n in bound_names(s)}
    programs = own - imported - {s.name for s in classes}
    wanted = names_read(reference) - own
    read_by_tests = {name for test in tests for name in names_read(test)}
    chosen: set[ast.stmt] = set()

    def choose(statement: ast.stmt) -> None:
        reads = names_read(statement)
        if statement not in chosen and not reads & programs:
            chosen.add(statement)
            for name in reads & definitions.keys():
                choose(definitions[name])

    for statement in statements:
        names = set(bound_names(statement))
        if isinstance(statement, ast.Import | ast.ImportFrom):
            wished = bool(preloaded(statement))
        elif isinstance(statement, ast.ClassDef):
            wished = _holds_no_data(statement)
        else:
            readers = [s for s in setup.body if s is not statement and names & names_read(s)]
            variable = isinstance(statement, ast.Assign | ast.AnnAssign)
            wished = variable and not names & read_by_tests and not readers
        if wished or names & wanted:
            choose(statement)
    order = [s for s in statements if s in chosen]
    given = {name for s in order for name in bound_names(s)}
    early = {name for s in reference.body for name in _read_when_run(s)} - own
    first = entry_point.startswith("Solution") or not reference.body or bool(early & given)
    first = first or ("*" in given and bool(early - vars(builtins).keys()))
    return Given([ast.unparse(s) for s in order], [s.name for s in classes if s in chosen], first)


def bound_names(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module binds; "*" for an import of all names."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in statement.names]
    if isinstance(statement, ast.Assign):
        return [n.id for target in statement.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
        return [statement.target.id]
    return []


def names_read(tree: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _read_when_run(statement: ast.stmt) -> set[str]:
    """The names that a statement reads when it is run: of a function, its decorators, defaults and annotations."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        parts: list[ast.AST] = [*statement.decorator_list, statement.args]
        parts += [statement.returns] if statement.returns else []
    elif isinstance(statement, ast.ClassDef):
        parts = [*statement.decorator_list, *statement.bases, *statement.keywords]
        inner = {name for s in statement.body for name in bound_names(s)}
        return {n for s in statement.body for n in _read_when_run(s)} - inner | {
            n for p in parts for n in names_read(p)
        }
    else:
        parts = [statement]
    return {name for part in parts for name in names_read(part)}


def _holds_no_data(definition: ast.ClassDef) -> bool:
    """Whether a class is one of plain objects, and no helper that could know what the tests expect.

    Its constants are None, truth values, 0, 1, -1 and what a __repr__ needs; it derives from nothing and asserts
    nothing.
    """
    if definition.keywords or any(not isinstance(b, ast.Name) or b.id != "object" for b in definition.bases):
        return False
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(definition)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }
    texts = {
        id(node)
        for method in definition.body
        if isinstance(method, ast.FunctionDef) and method.name in ("__repr__", "__str__")
        for node in ast.walk(method)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) <= SHORT
    }
    slots = {
        id(node)
        for line in definition.body
        if isinstance(line, ast.Assign) and bound_names(line) == ["__slots__"]
        for node in ast.walk(line)
    }
    annotations = {
        id(node)
        for holder in ast.walk(definition)
        for part in (getattr(holder, "annotation", None), getattr(holder, "returns", None))
        if part is not None
        for node in ast.walk(part)
    }
    for node in ast.walk(definition):
        if isinstance(node, ast.Assert):
            return False
        if isinstance(node, ast.Constant) and id(node) not in docstrings | texts | slots | annotations:
            data = node.value is not None and node.value is not ... and node.value not in (0, 1, -1, "")
            if data:
                return False
    return True
