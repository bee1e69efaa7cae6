"""Which programs may share a process: honest ones do, and nothing that reaches beyond its own values does."""

import builtins
import functools
import importlib
import itertools
import math
import re
import sys
import types
import warnings
from collections import Counter, defaultdict, deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.problems.formats import read_problems
from fractal.problems.sets import STARTER
from fractal.sandbox.inside import sharing

pytestmark = pytest.mark.skipif(sys.version_info[:2] != sharing.VERSION, reason="byte code of another Python")


def reason(text: str) -> str:
    return sharing.reason_against(compile(text, "<program>", "exec", dont_inherit=True))


ORDINARY = [
    "def f(x):\n    return x * 2\n",
    "import re\ndef f(s):\n    return re.sub(r'a(b)', lambda m: m.group(1), s).split(',')\n",
    "from collections import Counter, defaultdict, deque\nimport heapq\ndef f(a):\n    return heapq.nlargest(2, Counter(a).items())\n",
    "import math\ndef f(n):\n    try:\n        return math.sqrt(n)\n    except ValueError as e:\n        return e.args\n",
    "def f(a):\n    a.sort(key=lambda x: (-x[0], x[1]))\n    b = {k: [v for v in a if v] for k in set(a)}\n    return f'{b!r:>10}', *a[::2]\n",
    "from functools import reduce, lru_cache\n@lru_cache(maxsize=None)\ndef f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\n",
    "from typing import List\ndef f(a: List[int]) -> int:\n    global n\n    n = sum(a)\n    yield from a\n",
    '"""Write a function."""\ndef f(a):\n    """Its length."""\n    return len(a)\n',
    "def f(a):\n    return len(a)\nif __name__ == '__main__':\n    print(f(input()))\n",
    "import sys\ndef f(a):\n    best = -sys.maxsize\n    while a:\n        best = max(best, a.pop())\n    return best\n",
    "def f(a, /, *b, c=1, **d):\n    def g(n):\n        nonlocal a\n        a += n\n        return g\n    return g(*b, **d)\n",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_an_ordinary_function_may_share_a_process(text: str) -> None:
    assert reason(text) == ""


def test_most_starter_references_may_share_a_process() -> None:
    texts = [problem.reference for problem in read_problems(STARTER)]
    assert sum(reason(text) == "" for text in texts) > 0.9 * len(texts)


REACHING = [
    "class A: pass",
    "f.x = 1",
    "def f(x):\n    del x.y",
    "import os",
    "import collections.abc",
    "from math import *",
    "from . import math as m",
    "import functools\nfunctools.wraps",
    "from functools import update_wrapper",
    "import operator\noperator.attrgetter('x')",
    "from operator import methodcaller",
    "'{0.__class__}'.format(1)",
    "str.format_map",
    "(1).__class__",
    "def f():\n    yield\nf().gi_frame",
    "try:\n    1 / 0\nexcept Exception as e:\n    e.__traceback__",
    "try:\n    1 / 0\nexcept Exception as e:\n    e.with_traceback(None)",
    "match x:\n    case object(gi_frame=y):\n        pass",
    "match x:\n    case {'a': 1}:\n        pass",
    "type('A', (), {})",
    "list(map(type, ['A'], [()], [{}]))",
    "[getattr, setattr]",
    "def f(g=eval):\n    return g",
    "exec('import os')",
    "compile",
    "open('x')",
    "globals()['f']",
    "__builtins__",
    "__builtins__ = {}",
    "__doc__.join('x')",
    "__doc__ = 1",
    "x = 1\n__doc__ = 'y'",
    "def f():\n    global __doc__\n    __doc__ = 1",
    "__import__('os')",
    "def f():\n    global __name__\n    __name__ = 1",
    "raise SystemExit",
    "exit()",
    "try:\n    f()\nexcept BaseException:\n    pass",
    "super",
    "breakpoint()",
    "async def f():\n    await g()",
    "async def f():\n    yield",
    "with x:\n    pass",
    "x: int = 1",
    "import sys\nsys.setrecursionlimit(10)",
    "import sys\nsys._getframe()",
    "import sys\nsys.modules",
    "import re\nre._cache",
    "import re\nre.purge",
    "import re\nre.sys",
    "import collections\ncollections.abc",
    "import typing\ntyping.sys",
    "import string\nstring.Formatter",
    "import itertools\nitertools.tee",
    "try:\n    f()\nexcept* ValueError:\n    pass",
    "id(1)",
    "def f():\n    return (lambda: (lambda: vars())())()",
    "x = 1\n" * 300 + "\n".join(f"n{i} = {i}" for i in range(300)) + "\nn7.gi_frame",
    "\n".join(f"n{i} = {i}" for i in range(300)) + "\nopen",
]


@pytest.mark.parametrize("text", REACHING, ids=lambda text: text[-40:])
def test_what_reaches_beyond_its_own_values_does_not(text: str) -> None:
    assert reason(text) != ""


def test_another_interpreter_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "VERSION", (3, 99))
    assert reason("x = 1") != ""


@given(st.sampled_from(sorted(sharing.FORBIDDEN_GLOBALS)), st.sampled_from(["{0}", "{0}()", "def f():\n    return [{0}]", "{0} = 1"]))  # fmt: skip
def test_no_other_builtin_is_named(name: str, shape: str) -> None:
    try:
        with warnings.catch_warnings(action="ignore"):
            code = compile(shape.format(name), "<program>", "exec")
    except SyntaxError:  # None, True, False, __debug__
        return
    constants = {"__debug__", "None", "True", "False"}  # the compiler puts their values in
    assert name in constants or sharing.reason_against(code) != ""


def _roots() -> dict[str, Any]:
    """What a program that shares a process can hold to begin with."""
    found: dict[str, Any] = {name: importlib.import_module(name) for name in sharing.MODULES}
    found |= {f"builtins.{name}": getattr(builtins, name) for name in sharing.BUILTINS}
    values = [
        "", b"", 1, 1.5, 1j, True, None, (), [], {}, set(), frozenset(), range(2), slice(1), Counter(), deque(),
        defaultdict(int), re.compile("a"), re.match("a", "a"), (i for i in ()), lambda: 0, ValueError("x"), zip(),
        map(int, []), enumerate([]), {}.keys(), {}.items(), iter([]), [].append, len, functools.partial(int),
        functools.lru_cache(lambda: 0), functools.cmp_to_key(lambda a, b: 0), itertools.count(), reversed([]),
    ]  # fmt: skip
    return found | {f"a {type(value).__name__}": value for value in values}


def test_nothing_shared_and_mutable_can_be_reached() -> None:
    """All that can be read from there, attribute by attribute: no other module, no frame, code, class of ours or
    container that belongs to the interpreter."""
    todo = list(_roots().items())
    modules = {id(sys.modules[name]) for name in sharing.MODULES}
    own = {id(value) for value in _roots().values()}
    seen: set[Any] = set()
    fields: set[str] = set()
    while todo:
        name, value = todo.pop()
        key = (type(value), getattr(value, "__qualname__", None), getattr(value, "__module__", None), type(value) is types.ModuleType and id(value))  # fmt: skip
        if key in seen or name.count(".") > 6:
            continue
        seen.add(key)
        if isinstance(value, types.ModuleType):
            assert id(value) in modules, name
        assert not isinstance(value, types.CodeType | types.FrameType | types.TracebackType | types.CellType), name
        if "." in name and id(value) not in own:
            assert not isinstance(value, list | dict | set | bytearray | deque), name
        for attribute in sharing.ATTRIBUTES:
            try:
                found = getattr(value, attribute)
            except Exception:
                continue
            fields.add(attribute)
            todo.append((f"{name}.{attribute}", found))
    assert len(fields) > 250  # it looked at something
    assert not fields & {"format", "wraps", "gi_frame", "__dict__"}


def test_modules_give_only_what_was_meant() -> None:
    open_names = {name: {n for n in vars(importlib.import_module(name)) if n in sharing.ATTRIBUTES} for name in sharing.MODULES}  # fmt: skip
    assert open_names["sys"] == {"maxsize", "getsizeof"}
    assert open_names["copy"] == {"copy", "deepcopy"}
    assert open_names["functools"] == {"reduce", "lru_cache", "cache", "cmp_to_key", "partial"}
    assert open_names["collections"] == {"Counter", "defaultdict", "deque"}
    assert open_names["string"] == {n for n in open_names["string"] if isinstance(getattr(importlib.import_module("string"), n), str)}  # fmt: skip
    assert open_names["math"] == {n for n in vars(math) if n[0] != "_"}


def test_an_unknown_interpreter_is_told_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    from fractal.sandbox.inside.supervisor import Supervisor

    supervisor: Any = Supervisor.__new__(Supervisor)
    supervisor._workers, supervisor._checks = [], {}
    assert supervisor._greeting()["no_sharing"] == ""
    monkeypatch.setattr(sharing, "VERSION", (3, 99))
    assert "is not known, only that of CPython 3.99" in supervisor._greeting()["no_sharing"]
