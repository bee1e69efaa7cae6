"""A program without what its model added to try it. Pure syntax trees: nothing is run.

EvalPlus's sanitize drops that, too (arXiv:2305.01210), with all else that the entry point does not need.
"""

import ast
import re
import sys
from functools import cached_property

from fractal.generate import names
from fractal.problems.syntax import is_python, syntax_tree

TEST_MODULES = {"unittest", "doctest", "pytest", "timeit", "hypothesis", "nose"}
SCRIPT_NAMES = {"input", "exit", "quit", "open", "breakpoint", "__name__"}
SCRIPT_ATTRIBUTES = {"exit", "argv", "stdin"}  # of sys
# What changes how a module works from then on: sys.setrecursionlimit, random.seed, decimal.getcontext
SETTING = re.compile(r"set|seed|filterwarnings|simplefilter|getcontext")


def without_self_tests(code: str, entry_point: str, tree: ast.Module | None = None) -> str:
    """The program without asserts, prints, main blocks and other statements that only try what it defines.

    A statement stays if it gives or changes what the entry point needs (`fill(TABLE)`, `f = cache(f)`), sets how a
    module works (`sys.setrecursionlimit(5000)`), or does nothing that could fail the program or wait for input
    (`n = 5`). Before the entry point only what calls the program's own functions or waits for input is a test.
    Definitions stay, but for those that use a test framework. Comment lines right above what goes, go, and so do lines
    of words (`Done`), which raise NameError. Where the entry point is missing, the first definition takes its place.
    For "", a program that reads its standard input, only lines of words go. What does not parse stays as it is.

        >>> without_self_tests("def f(a):\\n    return a\\n\\n# Try it\\nassert f(1) == 2\\n", "f")
        'def f(a):\\n    return a\\n\\n'
    """
    if tree is None:
        try:
            tree = syntax_tree(code)
        except ValueError:
            return code
    drop = _at_a_glance(tree, root_name(entry_point))
    if drop is None:
        drop = _SelfTests(tree, entry_point).statements()
    if not drop or len(drop) == len(tree.body):  # nothing but tests: the reply has no program
        return code
    lines = code.split("\n")
    for node in reversed(_on_lines_of_their_own(drop, tree)):
        del lines[comment_start(lines, first_line(node) - 1) : node.end_lineno]
    rest = "\n".join(lines)
    return rest if (";" not in code and "\\\n" not in code) or is_python(rest) else code


def root_name(entry_point: str) -> str:
    """`Solution` of `Solution().twoSum`."""
    return re.split(r"[.(]", entry_point, maxsplit=1)[0]


def comment_start(lines: list[str], start: int) -> int:
    """Where the comment that stands right above a line begins; the line itself if there is none."""
    while start and lines[start - 1].startswith("#"):
        start -= 1
    return start


def _at_a_glance(tree: ast.Module, entry: str) -> list[ast.stmt] | None:
    """The statements that go, where no look at what the entry point needs is needed; None where it is.

    That is so for nine of ten programs, and takes a tenth of the time.
    """
    drop: list[ast.stmt] = []
    defined = False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == entry:
            defined = True
        if _is_plain(node, defined):
            continue
        if not defined or not (_only_tries(node, entry) or (is_main_block(node) and node is tree.body[-1])):
            return None
        drop.append(node)
    return drop


def _is_plain(node: ast.stmt, after: bool) -> bool:
    """Whether a statement is no test for sure, and does nothing but define."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return not node.decorator_list
        case ast.ClassDef():
            return not node.decorator_list and not node.bases
        case ast.Assign(value=value):
            return not any(isinstance(n, (ast.Call, ast.Attribute)) for n in ast.walk(value))
        case ast.Import() | ast.ImportFrom():
            packages = _packages(node)
            return not packages & TEST_MODULES and (not after or packages <= sys.stdlib_module_names)
        case ast.Expr(value=ast.Constant()):
            return True
    return False


def _only_tries(node: ast.stmt, entry: str) -> bool:
    """Whether it is an assert or a call of print or of the entry point, with no other name of the program in it."""
    match node:
        case ast.Assert():
            pass
        case ast.Expr(value=ast.Call(func=ast.Name(id=name))) if name in ("print", entry):
            pass
        case _:
            return False
    return all(n.id == entry or n.id in names.BUILTINS for n in ast.walk(node) if isinstance(n, ast.Name))


def _is_use(node: ast.stmt, entry: str) -> bool:
    """Whether it is `f = f(1)`, behind which there is no function any more."""
    match node:
        case ast.Assign(targets=[ast.Name(id=target)], value=ast.Call(func=ast.Name(id=called))):
            return target == called == entry
    return False


def is_main_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))


def first_line(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, names.DEFINITIONS) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _on_lines_of_their_own(drop: list[ast.stmt], tree: ast.Module) -> list[ast.stmt]:
    """Those that share no line with a statement that stays."""
    dropped = set(map(id, drop))
    taken = {line for n in tree.body if id(n) not in dropped for line in (first_line(n), n.end_lineno)}
    return [n for n in drop if not taken & {first_line(n), n.end_lineno}]


class _SelfTests:
    """A program's statements, and what its entry point needs of them."""

    def __init__(self, tree: ast.Module, entry_point: str) -> None:
        self.body = tree.body
        self.entry = root_name(entry_point)
        self.functions: dict[str, ast.AST] = {}
        self.effects: dict[str, tuple[set[str], bool]] = {}  # by function, as far as it is known
        self.methods = {entry_point.rpartition(".")[2]} if "." in entry_point else set()
        self.modules: set[str] = set()
        self.foreign: set[str] = set()  # of modules: those that Python does not bring along
        for node in self.body:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    self.functions[node.name] = node
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Lambda() as function):
                    self.functions[name] = function
                case ast.ClassDef():
                    self.methods |= {n.name for n in node.body if isinstance(n, names.DEFINITIONS)}
                case ast.Import() | ast.ImportFrom():
                    self.modules |= names.bound_names(node)
                    if not _packages(node) <= sys.stdlib_module_names:
                        self.foreign |= names.bound_names(node)
        self.binds = [names.bound_names(node) for node in self.body]
        self.reads = [names.read_names(node) for node in self.body]
        self.read_by_binding: dict[str, set[str]] = {}  # by a bound name: what the statements that bind it read
        for bound, read in zip(self.binds, self.reads, strict=True):
            for name in bound:
                self.read_by_binding[name] = self.read_by_binding.get(name, set()) | read
        self.unbound = names.unbound_names(tree)

    def statements(self) -> list[ast.stmt]:
        """Those that are to go, in their order."""
        places = [i for i, bound in enumerate(self.binds) if self.entry in bound]
        if self.entry and not places:
            places = [i for i, n in enumerate(self.body) if isinstance(n, names.DEFINITIONS)]
        start = places[0] if places else len(self.body)
        drop: dict[int, ast.stmt] = {}
        lost: set[str] = set()  # names that only what goes has bound
        for i, node in enumerate(self.body):
            if self._is_prose(node) or (places and self._goes(i, node, lost, after=i > start)):
                drop[i] = node
                lost |= self.binds[i]
            else:
                lost -= self.binds[i]
        kept = set().union(*(read for i, read in enumerate(self.reads) if i not in drop))
        for i, node in enumerate(self.body):
            unneeded = i not in drop and not self.binds[i] & (kept | {self.entry})
            if unneeded and _is_import_for_tests(node, bool(drop), after=i > start):
                drop[i] = node
        return [drop[i] for i in sorted(drop)]

    def _goes(self, i: int, node: ast.stmt, lost: set[str], *, after: bool) -> bool:
        if after and _is_use(node, self.entry):
            return True
        if isinstance(node, ast.Import | ast.ImportFrom) or self.entry in self.binds[i]:
            return False
        if isinstance(node, names.DEFINITIONS):
            return after and bool(self.reads[i] & (TEST_MODULES | {"TestCase"})) and node.name not in self.needed
        if is_main_block(node):
            return True
        parts = list(names.executed(node))
        tries = self._tries(parts) or bool(self.reads[i] & lost)
        if after:
            tries = (
                tries or isinstance(node, ast.Raise) or any(map(_is_check, parts)) or bool(self.reads[i] & self.foreign)
            )
        return tries and not self._gives(i, node, parts)

    def _is_prose(self, node: ast.stmt) -> bool:
        """Whether a statement does nothing but read names that are not there: a line of words such as `Done`."""
        if not isinstance(node, ast.Expr | ast.AnnAssign) or not names.read_names(node) & self.unbound:
            return False
        if isinstance(node, ast.AnnAssign):
            return node.value is None
        return not any(isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) for n in ast.walk(node))

    def _tries(self, parts: list[ast.AST]) -> bool:
        """Whether a statement calls what the program defines, runs tests, ends the program, or waits for input."""
        for part in parts:
            match part:
                case ast.Name(id=name, ctx=ast.Load()) if name in SCRIPT_NAMES | TEST_MODULES:
                    return True
                case ast.Attribute(value=ast.Name(id="sys"), attr=attribute) if attribute in SCRIPT_ATTRIBUTES:
                    return True
                case ast.Call(func=ast.Name(id=name)) if name in self.functions or name == self.entry:
                    return True
                case ast.Call(func=ast.Attribute(attr=attribute)) if attribute in self.methods:
                    return True
                case ast.Call(args=args) if any(isinstance(a, ast.Name) and a.id in self.functions for a in args):
                    return True
        return False

    def _gives(self, i: int, node: ast.stmt, parts: list[ast.AST]) -> bool:
        """Whether a statement gives or changes what the entry point needs, or how a module works."""
        written = self.binds[i] | names.changed_names(node)
        called: set[str] = set()
        for part in parts:
            match part:
                case ast.Call(func=ast.Name(id=name), args=args) if name in self.functions:
                    called.add(name)
                    if name not in self.testing:
                        values = {a.id for a in args if isinstance(a, ast.Name)}
                        written |= values - self.functions.keys()
        if any(isinstance(part, ast.Assert) for part in parts) and self._reach(names.read_names(node)) & {self.entry}:
            return False
        effects = [self._effects(name) for name in self._reach(called) & self.functions.keys() - self.testing]
        written = written.union(*(changed for changed, _ in effects))
        sets = any(sets for _, sets in effects) or any(map(self._is_setting, parts))
        return sets or bool((written - self.modules) & self.needed)

    def _effects(self, function: str) -> tuple[set[str], bool]:
        """The names that a function changes by itself, and whether it sets how a module works."""
        if function not in self.effects:
            node = self.functions[function]
            self.effects[function] = names.changed_names(node), any(map(self._is_setting, ast.walk(node)))
        return self.effects[function]

    def _is_setting(self, node: ast.AST) -> bool:
        match node:
            case ast.Call(func=ast.Attribute(attr=attribute, value=ast.Name(id=name))):
                return name in self.modules and bool(SETTING.match(attribute))
        return False

    @cached_property
    def needed(self) -> set[str]:
        """The names that the entry point needs, its own among them."""
        return self._reach({self.entry})

    @cached_property
    def testing(self) -> set[str]:
        """The functions that call the entry point, and itself: what they change, it changes, too."""
        return {name for name in self.functions if self.entry in self._reach({name})}

    def _reach(self, start: set[str]) -> set[str]:
        """The names, those that the statements which bind them read, and so on."""
        found: set[str] = set()
        pending = list(start)
        while pending:
            name = pending.pop()
            if name not in found:
                found.add(name)
                pending += self.read_by_binding.get(name, ())
        return found


def _is_import_for_tests(node: ast.stmt, dropped: bool, *, after: bool) -> bool:
    """Whether a statement imports a test framework or, behind the program, what may be missing.

    `dropped`: whether any test goes. Where none does, only what may be missing.
    """
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return False
    packages = _packages(node)
    may_be_missing = not packages <= sys.stdlib_module_names
    return bool(packages & TEST_MODULES and (dropped or may_be_missing)) or (dropped and after and may_be_missing)


def _packages(node: ast.Import | ast.ImportFrom) -> set[str]:
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return {module.partition(".")[0] for module in modules}


def _is_check(node: ast.AST) -> bool:
    return isinstance(node, ast.Assert) or (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"print", "display"}
    )
