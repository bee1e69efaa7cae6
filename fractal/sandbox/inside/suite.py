"""A problem's tests as the judge uses them: compiled once, with the names that belong to the program, and the calls
that can be made ahead. Trusted, and pure: it runs nothing. Standard library only.
"""

import ast
import builtins
import types
from dataclasses import dataclass, field
from typing import Any

from fractal.sandbox.inside import streams
from fractal.sandbox.inside.calls import Calls, prepare_calls, refuse_object
from fractal.sandbox.inside.given import Given, find_given
from fractal.sandbox.inside.protocol import Encoder, Unencodable, pack

# Modules that a test may name through the program's own import (MBPP 596 does): the judge uses its own copy.
TRUSTED_MODULES = frozenset(
    "bisect cmath collections copy datetime decimal fractions functools heapq itertools json math numbers operator "
    "random re statistics string sys typing".split()
)
NOTHING_GIVEN = Given([], [], False)
AHEAD_BYTES = 32 << 10  # of calls sent ahead: what a socket's buffer holds, so that neither end waits for the other


@dataclass(frozen=True)
class Ahead:
    """A call of the entry point that a test will make, whatever happens before it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frame: bytes


@dataclass
class Suite:
    """A problem as the judge uses it."""

    setup: types.CodeType | None = None
    tests: list[types.CodeType] = field(default_factory=list)
    entry_point: str = ""
    given: Given = NOTHING_GIVEN  # what the program sees of the setup, as under exec in one namespace
    names: list[str] = field(default_factory=list)  # names to look up in the program
    fresh: list[str] = field(
        default_factory=list
    )  # that a call may change: not the entry point, nor bound by the tests
    ahead: list[Ahead] = field(default_factory=list)  # the calls of the first so many tests, in their order, one each
    ahead_frames: bytes = b""
    own: dict[str, Any] = field(default_factory=dict)  # names that the reference imports: the judge's own copies
    calls: Calls | None = None  # instead of tests
    scripts: list[tuple[str, str]] | None = None  # instead of tests: what is read, and what is to be printed
    atol: float = 0.0  # of scripts
    record: bool = False  # a script is not judged: the verdict's values say what it does

    @property
    def size(self) -> int:
        """How many tests there are."""
        return len(self.tests) or len(self.calls.frames if self.calls else self.scripts or ())


def prepare(problem: dict[str, Any]) -> Suite:
    """Compile a problem's tests and find which of their names belong to the program.

    A name belongs to the program if the reference defines it, or if nothing else does: so a program cannot replace
    `set` or `sorted` in a test, and MBPP 126, whose entry point is `sum`, still works. Raises SyntaxError, or
    ProtocolError for calls.
    """
    if problem["kind"] == "stdin":
        scripts = [*zip(problem["tests"], problem["expected"], strict=True)]
        return Suite(scripts=scripts, atol=problem["atol"], record=problem["record"])
    setup = ast.parse(problem["setup"])
    try:
        reference = ast.parse(problem["reference"])
    except (SyntaxError, ValueError):
        reference = ast.parse("")
    entry_point = problem["entry_point"]
    if problem["kind"] == "calls":
        given = find_given(setup, [], reference, entry_point, _own_imports)
        name = entry_point.partition("().")[0]
        return Suite(entry_point=name, given=given, names=[name], calls=prepare_calls(problem))
    tests = [ast.parse(test) for test in problem["tests"]]
    used, bound = _names([setup, *tests])
    defined: set[str] = {entry_point}
    imported: dict[str, Any] = {}
    for node in reference.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported |= _own_imports(node) or _imported_here(node, used - bound)
    names = {n for n in used if n in defined or (n not in bound and not hasattr(builtins, n))}
    own = {name: value for name, value in imported.items() if name in names}
    programs = names - own.keys() | {entry_point}
    quiet = not any(isinstance(node, ast.Name) and node.id in programs for node in ast.walk(setup))
    quiet = quiet and not any(
        word in text for text in (problem["setup"], *problem["tests"]) for word in streams.MENTIONS
    )
    fresh = sorted(programs - bound - {entry_point})
    ahead = _ahead(tests, entry_point, programs) if quiet and entry_point not in bound and not fresh else []
    return Suite(
        setup=compile(setup, "<setup>", "exec") if setup.body else None,
        tests=[compile(test, "<test>", "exec") for test in tests],
        entry_point=entry_point,
        given=find_given(setup, tests, reference, entry_point, _own_imports),
        names=sorted({*names, entry_point}),
        fresh=fresh,
        ahead=ahead,
        ahead_frames=b"".join(call.frame for call in ahead),
        own=own,
    )


def _ahead(tests: list[ast.Module], entry_point: str, programs: set[str]) -> list[Ahead]:
    """The calls of the leading tests that call the program once, unconditionally, with literal arguments."""
    calls: list[Ahead] = []
    size = 0
    for test in tests:
        call = _only_call(test, entry_point, programs)
        try:
            if call is None:
                break
            args = tuple(ast.literal_eval(value) for value in call.args)
            kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
            encode = Encoder(refuse_object).encode
            frame = pack(["q", "ahead", entry_point, [*map(encode, args)], [[k, encode(v)] for k, v in kwargs.items()]])
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, Unencodable):
            break
        size += len(frame)
        if size > AHEAD_BYTES:
            break
        calls.append(Ahead(args, kwargs, frame))
    return calls


ALWAYS = (ast.Call, ast.keyword, ast.UnaryOp, ast.BinOp, ast.Subscript, ast.Attribute, ast.List, ast.Tuple, ast.Set)


def _only_call(test: ast.Module, entry_point: str, programs: set[str]) -> ast.Call | None:
    """The one call of the entry point in an assert, if it is sure to be made and uses nothing else of the program."""
    if len(test.body) != 1 or not isinstance(test.body[0], ast.Assert):
        return None
    statement = test.body[0]
    if sum(isinstance(node, ast.Name) and node.id in programs for node in ast.walk(statement)) != 1:
        return None
    todo: list[ast.AST] = [statement.test]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == entry_point:
            return node if all(keyword.arg for keyword in node.keywords) else None
        if isinstance(node, ALWAYS) or (isinstance(node, ast.Compare) and len(node.ops) == 1):
            todo.extend(ast.iter_child_nodes(node))
    return None


def _names(trees: list[ast.Module]) -> tuple[set[str], set[str]]:
    """Names that the trees read, and names that they bind."""
    used: set[str] = set()
    bound: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                bound.add(node.name)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.ExceptHandler) and node.name:
                bound.add(node.name)
    return used, bound


def _imported_here(node: ast.Import | ast.ImportFrom, used: set[str]) -> dict[str, Any]:
    """What an import of the reference binds, from the judge's own installed packages, where tests use the name.

    With NumPy in the image, a test's `np` is not the program's: that could answer `np.allclose` as it likes.
    """
    found = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in used]
    namespace: dict[str, Any] = {}
    try:
        for alias in found:
            line = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], 0)
            exec(ast.unparse(line), namespace)
    except Exception:  # not installed, or one of the problem's own modules
        return {}
    namespace.pop("__builtins__", None)
    return namespace


def _own_imports(node: ast.Import | ast.ImportFrom) -> dict[str, Any]:
    """What an import statement binds, from the judge's own trusted modules; nothing for other modules."""
    bound: dict[str, Any] = {}
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name in TRUSTED_MODULES:
                bound[alias.asname or alias.name] = __import__(alias.name)
    elif node.module in TRUSTED_MODULES and not node.level:
        module = __import__(node.module)
        for alias in node.names:
            if alias.name == "*":
                bound |= {n: getattr(module, n) for n in getattr(module, "__all__", dir(module)) if n[0] != "_"}
            elif hasattr(module, alias.name):
                bound[alias.asname or alias.name] = getattr(module, alias.name)
    return bound
