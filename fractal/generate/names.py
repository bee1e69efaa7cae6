"""Which names statements of a Python program bind, read, and change. Pure syntax trees.

Approximations, to the side of more: names are not told apart by where in a function they are bound.
"""

import ast
import builtins
from collections.abc import Iterable, Iterator

BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}
SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what of it runs when it is executed: not the bodies of functions, lambdas and classes."""
    pending = [node]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, DEFINITIONS):
            pending += node.decorator_list
        elif not isinstance(node, ast.Lambda):
            pending += ast.iter_child_nodes(node)


def bound_names(node: ast.AST) -> set[str]:
    """The names that a statement binds where it stands."""
    return set().union(*map(_binds, executed(node)))


def _binds(node: ast.AST) -> set[str]:
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            return {name}
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Import(names=names):
            return {alias.asname or alias.name.partition(".")[0] for alias in names}
        case ast.ImportFrom(names=names):
            return {alias.asname or alias.name for alias in names}
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            return {name}
        case ast.MatchMapping(rest=str(name)):
            return {name}
    return set()


def read_names(node: ast.AST) -> set[str]:
    """The names that a statement and the functions in it read and do not bind themselves."""
    if isinstance(node, SCOPES):
        outside: list[ast.AST] = [node.args]
        if not isinstance(node, ast.Lambda):
            outside += [*node.decorator_list, *([node.returns] if node.returns else [])]
        body = node.body if isinstance(node.body, list) else [node.body]
        return (_read_by(body) - _locals(node)) | _read_by(outside)
    if isinstance(node, ast.ClassDef):
        own = set().union(*map(bound_names, node.body))
        return (_read_by(node.body) - own) | _read_by([*node.bases, *node.keywords, *node.decorator_list])
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        own = set().union(*(bound_names(part.target) for part in node.generators))
        return _read_by(ast.iter_child_nodes(node)) - own
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Load) else set()
    read = _read_by(ast.iter_child_nodes(node))
    return read | {node.target.id} if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) else read


def _read_by(nodes: Iterable[ast.AST]) -> set[str]:
    return set().union(*map(read_names, nodes))


def _locals(function: SCOPES) -> set[str]:
    arguments = function.args
    names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    names |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a}
    if isinstance(function, ast.Lambda):
        return names
    return (names | set().union(*map(bound_names, function.body))) - declared_global(function)


def declared_global(function: ast.AST) -> set[str]:
    return {name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names}


def changed_names(node: ast.AST) -> set[str]:
    """The names whose values a statement may change in place: `T[1] = 2`, `T.update(x)`, `f.cache = {}`.

    Of a function: the names outside of it that its calls change, and that it binds by `global`.
    """
    if isinstance(node, SCOPES):
        body = node.body if isinstance(node.body, list) else [node.body]
        bound = set().union(*map(bound_names, body))
        return (set().union(*map(changed_names, body)) - _locals(node)) | (declared_global(node) & bound)
    names = set()
    for part in executed(node):
        match part:
            case ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del()):
                names.add(_root(part))
            case ast.Call(func=ast.Attribute() as method):
                names.add(_root(method))
    return names - {""}


def _root(node: ast.expr) -> str:
    """The name at the beginning of `name.a[1].b`; "" where there is none."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def unbound_names(program: ast.Module) -> set[str]:
    """The names that a program reads and nowhere binds, and that Python does not have either."""
    if any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in program.body):
        return set()
    return _read_by(program.body) - bound_in(program) - BUILTINS


def bound_in(program: ast.Module) -> set[str]:
    """The names that a program binds at its top level, or in a function by `global`."""
    return set().union(*map(bound_names, program.body)) | declared_global(program)
