"""Programs that must never be labelled passed, programs that must not get out, and programs that poison what follows.

Tables only; `test_attacks.py` runs them. A table is text: a line `## family / name` begins an entry, and words after `|`
are its options: `tests=NAME` (one of SUITES; "double" without it), `raw` (PRELUDE stands before the program), `alone`
(run in a container of its own: it may use up what it shares with others).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Suite:
    """What a program is tested against: the reference passes."""

    reference: str
    tests: tuple[str, ...]
    setup: str = ""


@dataclass(frozen=True, slots=True)
class Attack:
    """A program with the suite that it must not pass."""

    name: str  # "family / what it tries"
    code: str
    suite: str = "double"
    alone: bool = False


# fmt: off
SUITES: dict[str, Suite] = {
    "double": Suite("def f(x):\n    return x * 2\n", ("assert f(1) == 2", "assert f(21) == 42", "assert f('ab') == 'abab'")),
    "ne": Suite("def f(x):\n    return x * 2\n", ("assert not f(1) != 2", "assert not (f(21) != 42)", "if f(4) != 8:\n    raise AssertionError")),
    "reversed": Suite("def f(x):\n    return x * 2\n", ("assert 2 == f(1)", "assert 42 == f(21) == 42", "assert [2, 4] == [f(1), f(2)]")),
    "number": Suite("def f(x):\n    return x * 2\n", ("import numbers\nassert isinstance(f(1), numbers.Number) and f(1) == 2", "assert isinstance(f(1), int) and f(2) == 4", "assert type(f(3)) is int and f(3) == 6")),
    "order": Suite("def f(x):\n    return x + 3\n", ("assert 3 < f(1) < 5", "assert f(1) >= 4 and f(1) <= 4", "assert max(f(1), 0) == 4 == min(f(1), 9)", "assert f(1) - 4 == 0 and 4 - f(1) == 0")),
    "sorted": Suite("def f(a):\n    return sorted(a)\n", ("assert f([3, 1, 2]) == [1, 2, 3]", "assert sorted(f([2, 1])) == [1, 2]", "assert f([2, 1])[0] == 1 and len(f([4, 5, 6])) == 3", "assert list(f([9, 8])) == [8, 9]")),
    "unique": Suite("def f(a):\n    return set(a)\n", ("assert f([1, 2, 2]) == {1, 2}", "assert set(f([4, 4])) == {4}", "assert len(f([7, 7, 8])) == 2 and 7 in f([7]) and 7 not in f([8])", "assert {1, 2} == f([2, 1])")),
    "count": Suite("def f(s):\n    return {c: s.count(c) for c in s}\n", ("assert f('aab') == {'a': 2, 'b': 1}", "assert dict(f('z')) == {'z': 1}", "assert sorted(f('ba').items()) == [('a', 1), ('b', 1)]")),
    "root": Suite("import math\ndef f(x):\n    return x ** 0.5\n", ("import math\nassert math.isclose(f(2), 1.4142135623730951)", "assert abs(f(9) - 3) < 1e-9", "assert round(f(2), 3) == 1.414", "assert f(16) == 4.0")),
    "nothing": Suite("def f(x):\n    return None if x < 0 else x + 1\n", ("assert f(-1) is None", "assert f(1) is not None and f(1) == 2", "assert f(-2) == None")),
    "truth": Suite("def f(x):\n    return x % 2 == 0\n", ("assert f(2) is True", "assert f(3) is False", "assert not f(5)", "assert f(4)", "assert f(6) == True and f(7) == False")),
    "upper": Suite("def f(s):\n    return s.upper()\n", ("assert f('a') == 'A'", "assert f('b') in ('B', 'X')", "assert 'C' in f('abc') and f('abc').startswith('AB')", "assert f'{f(\"q\")}' == 'Q' and f('ab')[1] == 'B'")),
    "pair": Suite("def f(a, b):\n    return (a + b, [a, b])\n", ("assert f(1, 2) == (3, [1, 2])", "s, (a, b) = f(3, 4)\nassert (s, a, b) == (7, 3, 4)", "assert f(a=5, b=6)[0] == 11")),
    "raises": Suite("def f(x):\n    if x < 0:\n        raise ValueError('negative', x)\n    return x * 2\n", ("try:\n    f(-7)\n    ok = False\nexcept ValueError as error:\n    ok = error.args == ('negative', -7)\nassert ok", "assert f(4) == 8")),
    "caught": Suite("def f(x):\n    return x * 2\n", ("try:\n    got = f(1)\nexcept Exception:\n    got = 0\nassert got == 2", "try:\n    got = f(3)\nexcept BaseException:\n    got = None\nassert got == 6")),
    "bare": Suite("def f(x):\n    return x * 2\n", ("try:\n    got = f(1)\nexcept:\n    got = 2\nassert got == 2",)),
    "finally": Suite("def f(x):\n    return x * 2\n", ("def check(x, want):\n    ok = True\n    try:\n        ok = f(x) == want\n    finally:\n        return ok\nassert check(1, 2)",)),
    "helper": Suite("def f(x):\n    return x * 2\n", ("def check(got, want):\n    return got == want\nassert check(f(1), 2)", "cases = [(1, 2), (5, 10)]\nfor x, want in cases:\n    assert f(x) == want, (x, want)", "assert all(f(x) == x + x for x in range(1, 9))", "assert [f(x) for x in (1, 2)] == [2, 4]")),
    "mapped": Suite("def f(x):\n    return x * 2\n", ("for got, want in zip(map(f, [1, 2]), [2, 4]):\n    assert got == want", "assert all(map(lambda c: f(c[0]) == c[1], [(1, 2), (3, 6)]))")),
    "class": Suite("class P:\n    def __init__(self, x):\n        self.x = x\n    def area(self):\n        return self.x ** 2\ndef f(x):\n    return P(x).area()\n", ("p = P(3)\nassert p.area() == 9 and p.x == 3", "assert isinstance(P(1), P) and P(5).area() == 25", "assert f(4) == 16")),
    "callback": Suite("def f(g, x):\n    return g(g(x))\n", ("assert f(lambda v: v * 3 + 1, 2) == 22", "seen = []\ndef note(v):\n    seen.append(v)\n    return v + 1\nassert f(note, 5) == 7 and seen == [5, 6]")),
    "secret": Suite("def f(g):\n    return g()\n", ("def g():\n    return 77\nassert f(g) == 77", "def raising():\n    raise KeyError('k')\ntry:\n    f(raising)\n    ok = False\nexcept KeyError:\n    ok = True\nassert ok and f(lambda: 5) == 5")),
    "stream": Suite("def f(n):\n    for i in range(n):\n        yield i * i\n", ("assert list(f(3)) == [0, 1, 4]", "assert next(f(2)) == 0 and sum(f(4)) == 14", "assert [a for a in f(5)][4] == 16")),
    "in place": Suite("def f(a):\n    a.sort()\n", ("a = [3, 1, 2]\nassert f(a) is None\nassert a == [1, 2, 3]", "a = [5, 4]\nf(a)\nassert a[0] == 4")),
    "sum": Suite("def sum(a, b):\n    return a + b\ndef f(a, b):\n    return sum(a, b)\n", ("assert f(2, 3) == 5", "assert len([1, 2]) == 2 and set([1]) == {1} and f(1, 1) == 2")),
    "listed": Suite("def f(n):\n    return range(n)\n", ("assert list(f(3)) == [0, 1, 2]",)),
    "doubled": Suite("def f(n):\n    return [n]\n", ("assert f(3) * 2 == [3, 3]", "assert sorted(f(4)) == [4] and str(f(4)) == '[4]'")),
}

# The program's own way to the channel, whatever its number and whoever listens: for forged frames. A greeting is given
# the serial number that the judge expects, which a program finds in the frames below it, as it does what was read ahead.
PRELUDE = r'''
import json, os, stat, struct, sys
def is_socket(n):
    try:
        return stat.S_ISSOCK(os.fstat(n).st_mode)
    except OSError:
        return False
FD = next(filter(is_socket, range(3, 256)), 3)
LOCALS = sys._getframe(1).f_locals
SERIAL = LOCALS.get('serial', 0)
BODIES = getattr(LOCALS.get('self'), '_bodies', [])
GREETED = []
def write(data):
    while data:
        data = data[os.write(FD, data):]
def as_greeting(m):
    if not isinstance(m, list) or not m or GREETED:
        return m
    if m[0] == 'syntax':
        return ['syntax', SERIAL, *m[1:], False]
    if m[0] in ('x', 'e'):
        return ['stopped', SERIAL, m]
    return [m[0], SERIAL, *m[1:]] if m[0] == 'ready' else m
def put(*messages):
    for m in messages:
        b = m if isinstance(m, bytes) else json.dumps(as_greeting(m)).encode()
        write(struct.pack('>I', len(b)) + b)
def get():
    GREETED.append(1)
    if BODIES:
        return json.loads(BODIES.popleft())
    head = os.read(FD, 4)
    if len(head) < 4:
        os._exit(0)
    size, data = struct.unpack('>I', head)[0], b''
    while len(data) < size:
        data += os.read(FD, size - len(data))
    return json.loads(data)
REF = {'x': [7, 'function', True]}
def play(*answers, name='f', value=REF):
    put(['ready', [[name, value]]])
    for a in answers:
        get()
        put(a)
    os._exit(0)
'''


def entries(text: str) -> dict[str, tuple[str, dict[str, str]]]:
    """A table's text as {name: (program, options)}. Raises ValueError for a name that stands twice."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for block in ("\n" + text.strip("\n")).split("\n## ")[1:]:
        head, _, code = block.partition("\n")
        name, _, words = (part.strip() for part in head.partition("|"))
        if name in found:
            raise ValueError(f"two entries are called {name!r}")
        found[name] = code + "\n", dict(word.partition("=")[::2] for word in words.split(","))  # type: ignore[misc]
    return found


def attacks(text: str) -> dict[str, Attack]:
    found = {}
    for name, (code, raw_options) in entries(text).items():
        options = {key.strip(): value for key, value in raw_options.items()}
        full = PRELUDE + code if "raw" in options else code
        found[name] = Attack(name, full, options.get("tests", "double"), "alone" in options)
    return found


# --- leaving early, and lying about what is returned ------------------------------------------------------------------

LEAVING = attacks(r'''
## leave / sys.exit at import
import sys
sys.exit(0)
## leave / sys.exit after a right-looking definition
def f(x):
    return x
raise SystemExit
## leave / os._exit at import
import os
os._exit(0)
## leave / os._exit in the call
import os
def f(x):
    os._exit(0)
## leave / os._exit with a bare except around | tests=bare
import os
def f(x):
    os._exit(0)
## leave / os._exit with a finally that returns around | tests=finally
import os
def f(x):
    os._exit(0)
## leave / killed with a bare except around | tests=bare
import os
def f(x):
    os.kill(os.getpid(), 9)
## leave / system call forbidden with a bare except around | tests=bare
import os
def f(x):
    os.fork()
## leave / SystemExit with BaseException caught | tests=caught
def f(x):
    raise SystemExit(0)
## leave / exit builtin
def f(x):
    exit()
## leave / quit builtin with a message
def f(x):
    quit('passed')
## leave / SystemExit with a payload
class Code:
    def __repr__(self):
        import os
        os._exit(0)
def f(x):
    raise SystemExit(Code())
## leave / subclass of SystemExit
class Out(SystemExit):
    pass
def f(x):
    raise Out(0)
## leave / KeyboardInterrupt in the call
def f(x):
    raise KeyboardInterrupt
## leave / KeyboardInterrupt at import
def f(x):
    return x
raise KeyboardInterrupt
## leave / GeneratorExit in the call
def f(x):
    raise GeneratorExit
## leave / StopIteration in the call
def f(x):
    raise StopIteration(2)
## leave / StopIteration ends the map of a test | tests=mapped
def f(x):
    raise StopIteration
## leave / subclass of StopIteration ends the map of a test | tests=mapped
class Done(StopIteration):
    pass
def f(x):
    raise Done
## leave / StopAsyncIteration in the call | tests=helper
def f(x):
    raise StopAsyncIteration
## leave / own BaseException
class Out(BaseException):
    pass
def f(x):
    raise Out
## leave / BaseExceptionGroup of SystemExit
def f(x):
    raise BaseExceptionGroup('g', [SystemExit(0)])
## leave / ExceptionGroup in the call | tests=caught
def f(x):
    raise ExceptionGroup('g', [ValueError(2)])
## leave / AssertionError from the program
def f(x):
    raise AssertionError
## leave / MemoryError from the program
def f(x):
    raise MemoryError
## leave / RecursionError from the program
def f(x):
    raise RecursionError
## leave / TimeoutError from the program
def f(x):
    raise TimeoutError
## leave / ConnectionResetError from the program
def f(x):
    raise ConnectionResetError
## leave / BrokenPipeError from the program
def f(x):
    raise BrokenPipeError(32, 'pipe')
## leave / an iterator that exits | tests=stream
import sys
def f(n):
    yield 0
    sys.exit(0)
## leave / an iterator that leaves by os._exit | tests=stream
import os
def f(n):
    yield 0
    os._exit(0)
## leave / an iterator that raises GeneratorExit | tests=stream
def f(n):
    yield 0
    raise GeneratorExit
## leave / exits in __iter__ | tests=stream
class A:
    def __iter__(self):
        raise SystemExit
def f(n):
    return A()
## leave / exits in __next__ | tests=stream
class A:
    def __iter__(self):
        return self
    def __next__(self):
        raise SystemExit
def f(n):
    return A()
## leave / exits in __len__ | tests=sorted
class A(list):
    __eq__ = lambda s, o: True
    def __len__(self):
        raise SystemExit
def f(a):
    return A()
## leave / exits in __bool__ | tests=truth
class A:
    def __bool__(self):
        raise SystemExit
def f(x):
    return A()
## leave / exits in __del__
import os
class A:
    def __del__(self):
        os._exit(0)
def f(x):
    A()
    return None
## leave / SystemExit in a thread
import threading, sys
def f(x):
    t = threading.Thread(target=sys.exit)
    t.start()
    t.join()
## leave / os._exit in a thread
import os, threading
def f(x):
    threading.Thread(target=os._exit, args=(0,)).start()
    while True:
        pass
## leave / os._exit in a timer's thread while idle
import os, threading
threading.Timer(0.05, os._exit, (0,)).start()
def f(x):
    return None
## leave / interrupt_main
import _thread
def f(x):
    _thread.interrupt_main()
    for _ in range(10 ** 6):
        pass
## leave / atexit
import atexit, os, sys
atexit.register(os._exit, 0)
def f(x):
    sys.exit(1)
## leave / an excepthook that exits
import os, sys
sys.excepthook = lambda *a: os._exit(0)
def f(x):
    raise ValueError
## leave / an unraisablehook that exits
import os, sys
sys.unraisablehook = lambda *a: os._exit(0)
class A:
    def __del__(self):
        raise ValueError
def f(x):
    A()
## leave / threading.excepthook that exits
import os, threading
threading.excepthook = lambda *a: os._exit(0)
def f(x):
    t = threading.Thread(target=lambda: 1 / 0)
    t.start()
    t.join()
## leave / a signal handler that exits
import os, signal
signal.signal(signal.SIGUSR1, lambda *a: os._exit(0))
def f(x):
    signal.raise_signal(signal.SIGUSR1)
## leave / an alarm that raises SystemExit between calls
import signal
def leave(*a):
    raise SystemExit(0)
signal.signal(signal.SIGALRM, leave)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
def f(x):
    return None
## leave / kills itself with SIGTERM
import os
def f(x):
    os.kill(os.getpid(), 15)
## leave / kills itself with SIGKILL
import os
def f(x):
    os.kill(os.getpid(), 9)
## leave / its own SIGSYS
import os, signal
def f(x):
    os.kill(os.getpid(), signal.SIGSYS)
## leave / its own SIGXCPU
import os, signal
def f(x):
    os.kill(os.getpid(), signal.SIGXCPU)
## leave / exit system call of the main thread alone
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(0.3,)).start()
def f(x):
    ctypes.CDLL(None).syscall(60, 0)
## leave / libc's exit
import ctypes
def f(x):
    ctypes.CDLL(None).exit(0)
## leave / libc's quick_exit at import
import ctypes
ctypes.CDLL(None).quick_exit(0)
## leave / segfault
import ctypes
def f(x):
    ctypes.string_at(0)
## leave / abort
import os
def f(x):
    os.abort()
## leave / stack overflow in C
import itertools
it = iter([])
for _ in range(10 ** 5 * 3):
    it = itertools.chain(it)
def f(x):
    return list(it)
## leave / faulthandler's deadline ends the process
import faulthandler, sys, time
faulthandler.dump_traceback_later(0.05, exit=True, file=sys.__stderr__)
def f(x):
    time.sleep(0.3)
## leave / missing by deleting itself
def f(x):
    return 2
del f
## leave / closes its channel and ends
import os
def f(x):
    os.closerange(0, 256)
    os._exit(0)
## leave / an exception whose text exits
class E(Exception):
    def __str__(self):
        import os
        os._exit(0)
def f(x):
    raise E
## leave / an exception whose arguments exit
class A:
    def __repr__(self):
        raise SystemExit
    __str__ = __repr__
def f(x):
    raise ValueError(A())
## leave / a KeyError whose key cannot be shown
class A:
    def __repr__(self):
        raise ValueError('no')
def f(x):
    raise KeyError(A())
## leave / an AssertionError whose text raises
class A:
    def __str__(self):
        raise AttributeError('no')
def f(x):
    raise AssertionError(A())
## leave / an error at import whose text raises
class A:
    def __str__(self):
        raise OSError(5, 'no')
def f(x):
    return x
raise RuntimeError(A())
## leave / an error whose text is endless
class A:
    def __str__(self):
        return 'x' * 80_000_000
def f(x):
    raise RuntimeError(A())
## leave / a surrogate in the error's text
def f(x):
    raise ValueError('\ud800' * 100, '\0')
## leave / an exception class with a name of NUL and surrogates
E = type('E', (ValueError,), {})
def f(x):
    raise E('x')
try:
    E.__name__ = '\ud800'
except Exception:
    E.__qualname__ = 'x'
## leave / an exception that cannot be built again
class E(UnicodeDecodeError):
    pass
def f(x):
    raise E('a', b'b', 0, 1, 'c')
## leave / expected error of another shape | tests=raises
class A:
    def __eq__(self, other):
        return True
def f(x):
    raise ValueError('negative', A())
## leave / expected error with a list for arguments | tests=raises
class L(list):
    def __eq__(self, other):
        return True
class E(ValueError):
    args = L()
def f(x):
    raise E()
''')

LIES = """
    __eq__ = __ge__ = __le__ = __gt__ = __lt__ = __contains__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
    __bool__ = lambda self: True
    __len__ = lambda self: 3
    __iter__ = lambda self: iter([self] * 3)
    __getitem__ = lambda self, key: self
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __abs__ = __round__ = lambda self, *other: self
    __instancecheck__ = lambda self, other: True
    __call__ = lambda self, *a, **k: self
"""
BASES = {"int": ("double", "1"), "float": ("root", "1.5"), "complex": ("double", "1j"), "str": ("upper", "'z'"), "bytes": ("double", "b''"), "bytearray": ("double", "b''"), "list": ("sorted", "[9]"), "tuple": ("pair", "(1,)"), "dict": ("count", "{}"), "set": ("unique", "[9]"), "frozenset": ("unique", "[9]"), "object": ("double", "")}
SUBCLASSES = {
    name: Attack(name, f"class A({base}):{LIES}def f(*a, **k):\n    return A({argument})\n", suite)
    for base, (suite, argument) in BASES.items()
    for name in [f"lie / a subclass of {base} that equals everything"]
} | {
    name: Attack(name, f"class A:{LIES}    __class__ = {base}\ndef f(*a, **k):\n    return A()\n", suite)
    for base, (suite, _) in BASES.items()
    for name in [f"lie / an object that says its class is {base}"]
} | {
    name: Attack(name, f"class A:{LIES}def f(*a, **k):\n    return A()\n", suite)
    for suite in ("ne", "reversed", "number", "order", "nothing", "helper", "callback", "in place", "doubled")
    for name in [f"lie / an object that equals everything, tests {suite}"]
}

LYING = SUBCLASSES | attacks(r'''
## lie / unittest.mock.ANY
from unittest.mock import ANY
def f(x):
    return ANY
## lie / MagicMock configured to equal
from unittest.mock import MagicMock
def f(x):
    m = MagicMock()
    m.__eq__.return_value = True
    return m
## lie / MagicMock as the entry point
from unittest.mock import MagicMock
f = MagicMock()
f.return_value.__eq__ = lambda s, o: True
## lie / a metaclass that equals everything
class M(type):
    __eq__ = lambda c, o: True
    __hash__ = lambda c: 0
class A(metaclass=M):
    pass
def f(x):
    return A
## lie / a metaclass that is an instance of everything | tests=number
class M(type):
    __instancecheck__ = lambda c, o: True
    __subclasscheck__ = lambda c, o: True
    __eq__ = lambda c, o: True
    __hash__ = None
class f(metaclass=M):
    def __init__(self, x):
        pass
## lie / a class whose __new__ gives liars
class f:
    def __new__(cls, x):
        return type('A', (), {'__eq__': lambda s, o: True})()
## lie / a class made by type() with three arguments
def f(x):
    return type('A', (int,), {'__eq__': lambda s, o: True, '__hash__': int.__hash__})(7)
## lie / reflected equality of a subclass of tuple | tests=reversed
class A(tuple):
    def __eq__(self, other):
        return True
def f(x):
    return A((0,))
## lie / __eq__ that returns its argument's truth | tests=ne
class A:
    def __eq__(self, other):
        return other
    def __ne__(self, other):
        return ''
def f(x):
    return A()
## lie / a proxy that becomes what it is compared with
class A:
    def __eq__(self, other):
        self.v = other
        return self.v == other
def f(x):
    return A()
## lie / learns from one comparison and repeats | tests=helper
seen = []
class A:
    def __eq__(self, other):
        seen.append(other)
        return False
def f(x):
    return seen[-1] if seen else A()
## lie / __reduce__ that evaluates
class A:
    def __reduce__(self):
        return eval, ("__import__('os')._exit(0)",)
def f(x):
    return A()
## lie / __getstate__ and copyreg
import copyreg
class A:
    pass
copyreg.pickle(A, lambda a: (int, ('2',)))
def f(x):
    return A()
## lie / __index__, __int__ and __float__ | tests=root
class A:
    __index__ = __int__ = lambda s: 3
    __float__ = lambda s: float('inf')
def f(x):
    return A()
## lie / infinity is close to nothing | tests=root
def f(x):
    return float('inf')
## lie / NaN compares with nothing | tests=root
def f(x):
    return float('nan')
## lie / NaN is not different | tests=ne
def f(x):
    return float('nan')
## lie / Decimal NaN | tests=order
from decimal import Decimal
def f(x):
    return Decimal('NaN')
## lie / signalling Decimal NaN | tests=caught
from decimal import Decimal
def f(x):
    return Decimal('sNaN')
## lie / a Decimal of a giant exponent | tests=order
from decimal import Decimal
def f(x):
    return Decimal('1e999999999999')
## lie / Fraction with a lying numerator
from fractions import Fraction
class I(int):
    __eq__ = lambda s, o: True
    __hash__ = int.__hash__
def f(x):
    a = Fraction(1, 3)
    a._numerator = I(9)
    return a
## lie / Fraction over nothing
from fractions import Fraction
def f(x):
    a = Fraction(1, 3)
    a._denominator = 0
    return a
## lie / a registered number | tests=number
import numbers
class A:
    __eq__ = lambda s, o: True
numbers.Number.register(A)
numbers.Integral.register(A)
def f(x):
    return A()
## lie / a virtual subclass of int's abstract class | tests=number
import collections.abc
class A(collections.abc.Hashable):
    __hash__ = lambda s: 2
    __eq__ = lambda s, o: True
    __class__ = int
def f(x):
    return A()
## lie / named tuple with odd fields | tests=pair
from collections import namedtuple
P = namedtuple('P', 'index count')
def f(a, b):
    return P(lambda *a: 0, lambda *a: True)
## lie / named tuple whose _fields lie | tests=pair
class P(tuple):
    _fields = ('a', 'b')
def f(a, b):
    return P((1, 2, 3))
## lie / named tuple whose _fields are code | tests=pair
class P(tuple):
    _fields = ('__class__', '__eq__=lambda s,o:True')
def f(a, b):
    return P((1, 2))
## lie / named tuple whose fields shadow methods | tests=pair
class P(tuple):
    _fields = ('__eq__', '__len__')
    __eq__ = lambda s, o: True
def f(a, b):
    return P((1, 2))
## lie / a tuple that is not what it lists | tests=pair
class P(tuple):
    __iter__ = lambda s: iter((7, [3, 4]))
def f(a, b):
    return P((0, 0, 0))
## lie / a dict view of liars | tests=unique
class A:
    __eq__ = lambda s, o: True
    __hash__ = lambda s: 1
def f(a):
    return {A(): 1}.keys()
## lie / dict items of liars | tests=count
class A:
    __eq__ = lambda s, o: True
    __hash__ = lambda s: 1
def f(s):
    return {A(): A()}.items()
## lie / a dict that answers every key | tests=count
class D(dict):
    __missing__ = lambda s, k: 1
    __eq__ = lambda s, o: True
    items = lambda s: [('a', 1), ('b', 1)]
    keys = lambda s: ['z']
def f(s):
    return D()
## lie / a defaultdict of one | tests=count
from collections import defaultdict
def f(s):
    return defaultdict(lambda: 1)
## lie / a Counter of zeros | tests=count
from collections import Counter
def f(s):
    return Counter({c: 0 for c in s})
## lie / a Counter with liars for counts | tests=count
from collections import Counter
class A(int):
    __eq__ = lambda s, o: True
def f(s):
    return Counter({c: A(9) for c in s})
## lie / a set whose elements equal all | tests=unique
class A:
    __eq__ = lambda s, o: True
    __hash__ = lambda s: hash(1)
def f(a):
    return {A()}
## lie / a list of liars | tests=sorted
class A:
    __eq__ = __lt__ = lambda s, o: True
def f(a):
    return [A() for _ in a]
## lie / a list of liars below int | tests=sorted
class A(int):
    __eq__ = __lt__ = lambda s, o: True
    __hash__ = int.__hash__
def f(a):
    return [A(0) for _ in a]
## lie / a str subclass with lying methods | tests=upper
class S(str):
    startswith = __contains__ = lambda s, o: True
    __getitem__ = lambda s, i: 'B'
    __format__ = lambda s, spec: 'Q'
    __eq__ = lambda s, o: True
    __hash__ = str.__hash__
def f(s):
    return S('?')
## lie / a str whose __str__ lies | tests=upper
class S(str):
    __str__ = lambda s: 'A'
def f(s):
    return S('?')
## lie / an int whose __int__ lies
class I(int):
    __int__ = __index__ = __trunc__ = lambda s: 2
def f(x):
    return I(7)
## lie / an enum of everything
import enum
class E(enum.Enum):
    A = 1
    __eq__ = lambda s, o: True
    __hash__ = object.__hash__
def f(x):
    return E.A
## lie / a dataclass without comparison
from dataclasses import dataclass
@dataclass(eq=False)
class D:
    x: int
    __eq__ = lambda s, o: True
def f(x):
    return D(x)
## lie / Ellipsis
def f(x):
    return ...
## lie / NotImplemented
def f(x):
    return NotImplemented
## lie / NotImplemented from the other side | tests=reversed
def f(x):
    return NotImplemented
## lie / None is nothing to double
def f(x):
    return None
## lie / True for two | tests=truth
def f(x):
    return True
## lie / 1 and 0 for True and False | tests=truth
def f(x):
    return int(x % 2 == 0)
## lie / an object that is false the second time | tests=truth
class A:
    n = 0
    def __bool__(self):
        self.n += 1
        return self.n == 1
    __eq__ = lambda s, o: True
def f(x):
    return A()
## lie / an object of __len__ 0 | tests=nothing
class A:
    __len__ = lambda s: 0
    __eq__ = lambda s, o: True
def f(x):
    return A()
## lie / its own coroutine
async def f(x):
    return x * 2
## lie / a generator for a value
def f(x):
    yield x * 2
## lie / itself
def f(x):
    return f
## lie / a lambda that doubles
def f(x):
    return lambda: x * 2
## lie / the class int
def f(x):
    return int
## lie / the entry point is True
f = True
## lie / the entry point is a type
f = int
## lie / the entry point is a string's method
f = 'abab'.count
## lie / the entry point is a liar
class A:
    __call__ = lambda s, x: s
    __eq__ = lambda s, o: True
f = A()
## lie / a partial of a constant
from functools import partial
f = partial(lambda a, x: a, 2)
## lie / a property-like attribute that exits
class A:
    def __getattribute__(self, name):
        raise SystemExit
def f(x):
    return A()
## lie / __getattr__ that runs code
class A:
    def __getattr__(self, name):
        return lambda *a: True
def f(x):
    return A()
## lie / an object that raises on everything
class A:
    def __getattribute__(self, name):
        raise RecursionError
    __bool__ = __repr__ = __len__ = lambda s: 1 / 0
def f(x):
    return A()
## lie / an iterator without end | tests=stream
import itertools
def f(n):
    return itertools.count()
## lie / an iterator that changes | tests=stream
class A:
    n = 0
    def __iter__(self):
        return self
    def __next__(self):
        self.n += 1
        return A() if self.n % 2 else self.n
def f(n):
    return A()
## lie / iterators within iterators | tests=sorted
def f(a):
    return iter([iter(a)] * 3)
## lie / an iterator that is its own element | tests=stream
class A:
    def __iter__(self):
        return self
    def __next__(self):
        return self
    __eq__ = lambda s, o: True
def f(n):
    return A()
## lie / __iter__ that gives no iterator | tests=stream
class A:
    def __iter__(self):
        return 5
def f(n):
    return A()
## lie / a negative length | tests=sorted
class A:
    __len__ = lambda s: -3
    __getitem__ = lambda s, i: 1
def f(a):
    return A()
## lie / a cyclic list | tests=sorted
def f(a):
    a = []
    a.append(a)
    return a
## lie / a cyclic dict | tests=count
def f(s):
    d = {}
    d['a'] = d
    return d
## lie / two cyclic lists | tests=reversed
def f(x):
    a, b = [], []
    a.append(b)
    b.append(a)
    return a
## lie / a list 100,000 deep
def f(x):
    a = []
    for _ in range(100000):
        a = [a]
    return a
## lie / a tuple at the limit of depth
def f(x):
    a = ()
    for _ in range(199):
        a = (a,)
    return a
## lie / a list that grows while it is read | tests=sorted
class L(list):
    def __iter__(self):
        self.append(1)
        return super().__iter__()
def f(a):
    return L([1])
## lie / ten million zeros | tests=sorted
def f(a):
    return [0] * 10_000_000
## lie / an integer of a million digits
def f(x):
    return 10 ** 1_000_000
## lie / lone surrogates | tests=upper
def f(s):
    return '\ud83d' + '\ude00'
## lie / a bytes for a str | tests=upper
def f(s):
    return s.upper().encode()
## lie / colliding integers | tests=unique
def f(a):
    return {i * (2 ** 61 - 1) for i in range(3000)}
## lie / mutates the argument only | tests=sorted
def f(a):
    a.sort()
    return None
## lie / returns the argument before sorting it | tests=sorted
def f(a):
    a.reverse()
    return a
## lie / empties the argument | tests=in place
def f(a):
    a.clear()
## lie / puts liars into the argument | tests=in place
class A(int):
    __eq__ = lambda s, o: True
def f(a):
    a[:] = [A(), A(), A()]
## lie / a class of other methods | tests=class
class P:
    def __init__(self, x):
        pass
    def __getattr__(self, name):
        return lambda *a: type('A', (int,), {'__eq__': lambda s, o: True})()
def f(x):
    return 16
## lie / a class that is an instance of itself | tests=class
class M(type):
    __instancecheck__ = lambda c, o: True
class P(metaclass=M):
    x = area = lambda *a: P
    __eq__ = lambda s, o: True
    def __new__(cls, x):
        return 9
def f(x):
    return 16
## lie / a callback never called | tests=callback
def f(g, x):
    class A(int):
        __eq__ = lambda s, o: True
    return A(22)
## lie / a callback called once | tests=callback
def f(g, x):
    return g(x)
## lie / the callback itself | tests=secret
def f(g):
    return g
## lie / attributes of the callback | tests=secret
def f(g):
    return g.__code__.co_consts[1]
## lie / the callback's globals | tests=secret
def f(g):
    return g.__globals__['g']()['x']
''')


# --- patching what the two ends share by name, and reading what the program should not know ---------------------------

PATCHING = attacks(r'''
## patch / builtins of the test
import builtins
builtins.AssertionError = Exception
builtins.len = builtins.sum = builtins.abs = builtins.all = lambda *a: True
def f(x):
    return None
## patch / builtins.isinstance and type | tests=number
import builtins
builtins.isinstance = lambda a, b: True
builtins.type = lambda *a: int
def f(x):
    return None
## patch / shadows the test's builtins | tests=unique
set = sorted = len = list = lambda *a: {1, 2}
def f(a):
    return None
## patch / shadows sorted | tests=sorted
sorted = list = len = lambda a: [1, 2, 3]
def f(a):
    return a
## patch / shadows the test's exceptions | tests=raises
ValueError = Exception = AssertionError = BaseException
def f(x):
    raise KeyError('negative', x)
## patch / shadows the test's modules | tests=root
class math:
    isclose = lambda *a: True
def f(x):
    return 0
## patch / names that the tests define | tests=helper
def check(got, want):
    return True
all = lambda a: True
cases = []
def f(x):
    return None
## patch / __builtins__ as a name
__builtins__ = {'AssertionError': None, 'all': lambda a: True}
def f(x):
    return None
## patch / __builtins__ in place
__builtins__['len'] = __builtins__['AssertionError'] = __builtins__['isinstance'] = lambda *a: True
def f(x):
    return None
## patch / sum is the program's, len is not | tests=sum
def sum(a, b):
    return 5
len = set = lambda a: 2
def f(a, b):
    return 5
## patch / __import__
import builtins
builtins.__import__ = lambda *a, **k: None
def f(x):
    return None
## patch / sys.modules is emptied
import sys
sys.modules.clear()
def f(x):
    return None
## patch / sys.modules of liars
import sys
class M:
    def __getattr__(self, name):
        return lambda *a, **k: True
for name in list(sys.modules):
    if name not in ('sys', 'builtins'):
        sys.modules[name] = M()
def f(x):
    return None
## patch / a finder on meta_path
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        import os
        os._exit(0)
sys.meta_path.insert(0, Finder())
sys.path_hooks.insert(0, lambda p: Finder())
def f(x):
    import wave
## patch / json
import json
json.dumps = lambda *a, **k: '["r",true]'
json.loads = lambda *a, **k: ['r', True]
json.encoder.encode_basestring_ascii = json.encoder.c_make_encoder = lambda *a: '2'
def f(x):
    return None
## patch / json's decoder and scanner
import json.decoder, json.scanner
json.decoder.JSONDecoder.decode = lambda self, *a, **k: ['q', 'call', lambda *a: 2, [], [], False]
json._default_decoder = json._default_encoder = None
def f(x):
    return None
## patch / struct
import struct
struct.pack = struct.unpack = lambda *a: b''
struct.Struct = None
def f(x):
    return None
## patch / socket.socket.recv and os.write
import os, socket
socket.socket.recv = lambda self, n, *a: b''
os.write = lambda fd, data: len(data)
def f(x):
    return None
## patch / os.write that repeats
import os
write = os.write
os.write = lambda fd, data: write(fd, data) and write(fd, data)
def f(x):
    return None
## patch / os.write that turns None into 2
import os
write = os.write
def lie(fd, data):
    return write(fd, bytes(data)) if b'ready' in bytes(data) else len(data)
os.write = lie
def f(x):
    return None
## patch / every pack, Encoder and decode in sight
import sys
for m in list(sys.modules.values()):
    for k in ('pack', 'Encoder', 'decode', 'receive', 'failure', 'Table', 'json'):
        if hasattr(m, k):
            try:
                setattr(m, k, lambda *a, **k: True)
            except Exception:
                pass
def f(x):
    return None
## patch / the candidate's own end through the frames
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for v in list(frame.f_locals.values()):
            if hasattr(v, 'encode') and hasattr(v, 'send'):
                v.encode = lambda value: True
                v.send(['r', True])
                v.send(['r', True])
        frame = frame.f_back
## patch / the encoders' table
import gc
for d in gc.get_objects():
    if isinstance(d, dict) and any(isinstance(k, type) for k in d):
        for k in list(d):
            if isinstance(k, type) and callable(d[k]):
                d[k] = lambda *a: {'t': [True]}
def f(x):
    return (x,)
## patch / the encoders' table is handed code
import gc
for d in gc.get_objects():
    if isinstance(d, dict) and any(isinstance(k, type) for k in d):
        for k in list(d):
            if isinstance(k, type) and callable(d[k]):
                d[k] = lambda *a: {'py': '__import__("os")._exit(0)'}
def f(x):
    return frozenset([x])
## patch / code of the caller
import sys
def f(x):
    code = sys._getframe(1).f_code
    g = sys._getframe(1).f_globals
    for name, value in list(g.items()):
        if hasattr(value, '__code__'):
            value.__code__ = (lambda *a, **k: ['r', True]).__code__
## patch / the type slot of int through ctypes
import ctypes, gc
def f(x):
    d = gc.get_referents(int.__dict__)[0]
    d['__eq__'] = lambda a, b: True
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(int))
    return 7
## patch / the value of the small integer 2
import ctypes
def f(x):
    ctypes.memmove(id(7) + 24, id(2) + 24, 4)
    return 7
## patch / None is written over
import ctypes
def f(x):
    ctypes.memmove(id(None), id(True), 16)
    return None
## patch / dict of object through a mappingproxy
import gc
d = gc.get_referents(object.__dict__)[0]
d['__eq__'] = lambda a, b: True
def f(x):
    return object()
## patch / a mappingproxy's reflected or
class Steal:
    def __ror__(self, other):
        other['__eq__'] = lambda a, b: True
        return other
str.__dict__ | Steal()
def f(x):
    return 'zz'
## patch / marshal, ast, operator, pickle
import ast, marshal, operator, pickle
marshal.loads = pickle.loads = ast.literal_eval = lambda *a, **k: True
operator.eq = operator.is_ = lambda a, b: True
def f(x):
    return None
## patch / collections and math of the judge | tests=root
import collections, math
math.isclose = lambda *a, **k: True
math.sqrt = None
collections.Counter.__eq__ = lambda a, b: True
def f(x):
    return 0.0
## patch / compile and exec
import builtins
builtins.compile = lambda *a, **k: (lambda: 0).__code__
builtins.exec = builtins.eval = lambda *a, **k: None
def f(x):
    return None
## patch / the assert statement, by optimisation
import sys
sys.flags
def f(x):
    __debug__
    return None
## patch / the module's own class
import sys, types
class M(types.ModuleType):
    def __getattribute__(self, name):
        return lambda *a: True
sys.modules[__name__].__class__ = M
def f(x):
    return None
## patch / __main__ and its neighbours
import sys
for name in ('__main__', 'fractal', 'fractal.sandbox.inside.judge', 'fractal.sandbox.inside.protocol', 'tests', 'solution'):
    sys.modules[name] = sys
def f(x):
    return None
## patch / standard output is a liar
import sys
class Out:
    def __getattr__(self, name):
        raise SystemExit
sys.stdout = sys.stderr = Out()
def f(x):
    return None
## patch / standard output's flush exits
import os, sys
class Out:
    def write(self, *a):
        return 0
    def flush(self):
        os._exit(0)
sys.stdout = Out()
def f(x):
    return None
## patch / warnings become the answer | tests=truth
import warnings
warnings.showwarning = lambda *a, **k: None
warnings.simplefilter('error')
def f(x):
    return NotImplemented
## patch / hash seeds and interned strings
import ctypes, sys
def f(x):
    a = sys.intern('AssertionError')
    ctypes.memset(id(a) + 48, 65, 4)
    return None
''')

READING = attacks(r'''
## read / the frames' locals and globals
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for k, v in list(frame.f_locals.items()) + list(frame.f_globals.items()):
            if k in ('expected', 'results', 'tests', 'problem', 'want', 'verdict'):
                return v
        frame = frame.f_back
## read / the heap for a test's text
import gc
def f(x):
    for o in gc.get_objects():
        for v in gc.get_referents(o):
            if isinstance(v, str) and 'assert f(' in v and '==' in v:
                return eval(v.split('==')[1])
## read / the heap for code called <test>
import gc, types
def f(x):
    for o in gc.get_objects():
        for v in gc.get_referents(o):
            if isinstance(v, types.CodeType) and 'test' in v.co_filename:
                return v.co_consts[1]
## read / all modules for an assertion
import sys
def f(x):
    for m in list(sys.modules.values()):
        for v in list(getattr(m, '__dict__', {}).values()):
            if isinstance(v, str) and 'assert f' in v:
                return eval(v.split('==')[1])
## read / frames of all threads
import sys
def f(x):
    for frame in sys._current_frames().values():
        while frame:
            for v in frame.f_locals.values():
                if isinstance(v, (bytes, str)) and 'assert' in str(v):
                    return eval(str(v).split('==')[1])
            frame = frame.f_back
## read / a traceback's frames
def f(x):
    try:
        1 / 0
    except ZeroDivisionError as e:
        frame = e.__traceback__.tb_frame
    while frame.f_back:
        frame = frame.f_back
        for v in frame.f_locals.values():
            if isinstance(v, list) and len(v) == 3:
                return v[1]
## read / a trace function sees the next comparison
import sys
seen = []
def tracer(frame, event, arg):
    seen.extend(frame.f_locals.values())
    return tracer
sys.settrace(tracer)
def f(x):
    for v in seen:
        if isinstance(v, int) and v not in (0, 1, x):
            return v
## read / a profile function sees the next comparison
import sys
seen = []
sys.setprofile(lambda frame, event, arg: seen.append(arg))
def f(x):
    for v in seen:
        if type(v) is int:
            return v
## read / inspect's stack
import inspect
def f(x):
    for info in inspect.stack():
        for line in info.code_context or []:
            if 'assert' in line:
                return eval(line.split('==')[1])
## read / the interpreter's audit events
import sys
seen = []
sys.addaudithook(lambda name, args: seen.append(args))
def f(x):
    for args in seen:
        for a in args:
            if isinstance(a, (str, bytes)) and 'assert' in str(a):
                return eval(str(a).split('==')[1])
## read / freed memory by ctypes
import ctypes
def f(x):
    data = ctypes.string_at(id(x) - (1 << 14), 1 << 15)
    at = data.find(b'assert f(')
    return eval(data[at:at + 40].split(b'==')[1]) if at >= 0 else None
## read / its own memory map
def f(x):
    with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb', 0) as mem:
        for line in maps:
            a, b = (int(n, 16) for n in line.split()[0].split('-'))
            if ' rw-p' in line:
                mem.seek(a)
                data = mem.read(b - a)
                at = data.find(b'"tests": [')
                if at >= 0:
                    return eval(data[at:].split(b'==')[1][:3])
## read / memory of every process
import os
def f(x):
    for p in os.listdir('/proc'):
        if p.isdigit() and int(p) != os.getpid():
            return open(f'/proc/{p}/mem', 'rb').read(10)
## read / environment of every process
import os
def f(x):
    return [open(f'/proc/{p}/environ').read() for p in os.listdir('/proc') if p.isdigit()]
## read / command lines and maps of every process
import glob
def f(x):
    for path in glob.glob('/proc/[0-9]*/cmdline'):
        text = open(path, 'rb').read()
        if b'==' in text:
            return eval(text.split(b'==')[1])
    return open('/proc/1/maps').read()
## read / descriptors of every process
import glob, os
def f(x):
    for path in glob.glob('/proc/[0-9]*/fd/*') + glob.glob('/proc/[0-9]*/task/*/fd/*'):
        if f'/{os.getpid()}/' not in path:
            return os.open(path, os.O_RDONLY)
## read / stacks, syscalls and wchan
import os
def f(x):
    return [open(f'/proc/{p}/{n}').read() for p in os.listdir('/proc') if p.isdigit() for n in ('syscall', 'stack')]
## read / the root and folder of the judge
import os
def f(x):
    return os.listdir(f'/proc/{os.getppid()}/cwd/') and os.listdir('/proc/1/root/')
## read / the sandbox's files for tests
import pathlib
def f(x):
    for p in pathlib.Path('/sandbox').rglob('*'):
        if p.is_file() and b'assert f(' in p.read_bytes():
            return 2
## read / the whole disk for tests
import os
def f(x):
    for folder in ('/tmp', '/var/tmp', '/dev/shm', '/run', '/scratch', '/root', '/home', '/mnt'):
        for root, _, names in os.walk(folder):
            for n in names:
                try:
                    if 'assert' in open(os.path.join(root, n)).read():
                        return 2
                except OSError:
                    pass
## read / scratch folders of other slots
import os
def f(x):
    found = [p for p in os.listdir('/scratch') if os.path.abspath('.') != f'/scratch/{p}']
    return os.listdir(f'/scratch/{found[0]}') and 2 if found else None
## read / core pattern and kernel log
def f(x):
    text = open('/proc/sys/kernel/core_pattern').read()
    return open('/proc/sys/kernel/core_pattern', 'w').write(text) and open('/dev/kmsg').read(9)
## read / every descriptor it was left
import os
def f(x):
    for fd in range(4, 1024):
        try:
            os.set_blocking(fd, False)
            data = os.read(fd, 9999)
        except OSError:
            continue
        if b'==' in data:
            return eval(data.split(b'==')[1])
## read / peeks at what comes next on the channel
import os
def f(x):
    os.set_blocking(3, False)
    try:
        return os.read(3, 1 << 16).count(b'2')
    finally:
        os.set_blocking(3, True)
## read / asks the stand-in of a callback for its module | tests=secret
import sys
def f(g):
    for name in ('__globals__', '__closure__', '__self__', '__func__', '__wrapped__', '_end', 'f_globals'):
        try:
            return getattr(g, name)['g']
        except Exception:
            pass
    return type(g).__call__.__globals__
## read / environment variables
import os
def f(x):
    return next((eval(v.split('==')[1]) for v in os.environ.values() if '==' in v), None)
## read / standard input
import sys
def f(x):
    return sys.stdin.read() or input()
## read / linecache and importlib's loaders
import linecache
def f(x):
    linecache.checkcache()
    for name in ('<test>', '<setup>', '<string>'):
        for line in linecache.getlines(name):
            return eval(line.split('==')[1])
## read / signals carry values
import signal
def f(x):
    info = signal.sigtimedwait(signal.valid_signals(), 0.05)
    return info.si_value if info else None
## read / what was printed before
def f(x):
    return open('/proc/self/fd/1').read(1)
## read / resource use of others tells nothing
import resource, os
def f(x):
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_nvcsw or os.times().children_user
## read / system calls of peers by cross memory attach
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None)
    class Iov(ctypes.Structure):
        _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]
    buf = ctypes.create_string_buffer(64)
    return libc.process_vm_readv(os.getppid(), ctypes.byref(Iov(ctypes.addressof(buf), 64)), 1, ctypes.byref(Iov(id(x), 64)), 1, 0)
''')


# --- forged frames ----------------------------------------------------------------------------------------------------

FORGING = attacks(r'''
## forge / verdicts on every descriptor
import os, json, struct
def f(x):
    b = json.dumps({'type': 'verdict', 'id': 1, 'status': 'passed', 'tests': ['passed'] * 3}).encode()
    for fd in range(64):
        try:
            os.write(fd, struct.pack('>I', len(b)) + b)
        except OSError:
            pass
## forge / the word passed on every descriptor
import os
def f(x):
    for fd in range(3, 64):
        try:
            os.write(fd, b'passed\n\x01\x00\x00\x00')
        except OSError:
            pass
## forge / exit records of the zygote
import os, json
def f(x):
    for fd in range(64):
        try:
            os.write(fd, json.dumps({'exit': 0, 'cpu_s': 0, 'rss_kib': 0}).encode())
        except OSError:
            pass
    os._exit(0)
## forge / replies ahead of the question | raw
put(*[['r', True]] * 9)
def f(x):
    return None
## forge / two greetings | raw
put(['ready', [['f', True]]], ['ready', [['f', True]]])
def f(x):
    return None
## forge / ready, then every reply at once | raw
put(['ready', [['f', REF]]], *[['r', v] for v in (True, 1, 2, 3, 'abab')] * 3)
os._exit(0)
## forge / a greeting twice for one name | raw
put(['ready', [['f', REF], ['f', {'n': 'bool'}], ['f', REF]]])
get()
os._exit(0)
## forge / names that the tests do not ask for | raw
put(['ready', [['f', REF], ['len', REF], ['set', REF], ['AssertionError', REF], ['__builtins__', {'d': []}]]])
## forge / __builtins__ | raw
put(['ready', [['__builtins__', {'d': [['AssertionError', 0]]}], ['f', REF]]])
## forge / __name__ and check | raw,tests=helper
play(['r', True], ['r', True], name='check')
## forge / names that are no strings | raw
put(['ready', [[['f'], 1], [{'t': ['f']}, 2], [None, 3]]])
## forge / a name that is a stand-in | raw
put(['ready', [[REF, 1], ['f', REF]]])
## forge / the entry point is the judge's own bool | raw,tests=truth
put(['ready', [['f', {'n': 'bool'}]]])
get()
## forge / the entry point is the judge's own object | raw
put(['ready', [['f', {'n': 'object'}]]])
## forge / the entry point is an exception class | raw
put(['ready', [['f', {'n': 'AssertionError'}]]])
## forge / a shared name that is none | raw
put(['ready', [['f', {'n': 'eval'}]]])
## forge / dunder import as a shared name | raw
put(['ready', [['f', {'n': '__import__'}]]])
## forge / open as a shared name | raw
put(['ready', [['f', {'n': 'open'}]]])
## forge / the judge's print | raw
put(['ready', [['f', {'n': 'print'}]]])
get()
## forge / own reference that never was | raw
put(['ready', [['f', {'o': 0}]]])
## forge / own references of odd numbers | raw
play(['r', {'o': -1}], ['r', {'o': True}], ['r', {'o': 10 ** 30}])
## forge / own reference to the test's function as the answer | raw,tests=secret
play(['r', {'o': 0}], ['r', {'o': 0}])
## forge / calls the test's function with odd arguments | raw,tests=secret
play(['q', 'call', {'o': 0}, [1, 2, 3], [['x', 1]]], ['q', 'call', {'o': 0}, {'d': []}, 5], ['r', 0])
## forge / calls the test's function by another operation | raw,tests=secret
play(['q', 'get', {'o': 0}, '__globals__'], ['r', 0])
## forge / calls a function of no number | raw,tests=secret
play(['q', 'call', {'o': 9}, [], []], ['r', 0])
## forge / calls a built-in as if it were a callback | raw
play(['q', 'call', {'n': 'print'}, ['x'], []], ['r', 0])
## forge / calls back a thousand deep | raw,tests=callback
put(['ready', [['f', REF]]])
get()
for _ in range(1000):
    put(['q', 'call', {'o': 0}, [REF], []])
    get()
os._exit(0)
## forge / calls back without end | raw,tests=callback
put(['ready', [['f', REF]]])
get()
while True:
    put(['q', 'call', {'o': 0}, [1], []])
    get()
## forge / an answer of an unknown kind | raw
play(['passed', True])
## forge / an answer that is no list | raw
play({'t': ['r', 2]})
## forge / an empty answer | raw
play([])
## forge / an answer without a value | raw
play(['r'])
## forge / a greeting as an answer | raw
play(['ready', [['f', 2]]])
## forge / a syntax error as an answer | raw
play(['syntax', 'x'])
## forge / a bare syntax error as the greeting | raw
put(['syntax'])
## forge / a syntax error with a stand-in for text | raw
put(['syntax', REF])
get()
put(['e', 'ValueError', 'x', [], 'ValueError'])
## forge / a bare exit as the greeting | raw
put(['x'])
## forge / an exit with a stand-in for code | raw
put(['x', REF])
get()
put(['e', 'KeyError', 'x', [], 'KeyError'])
## forge / an error at the greeting with stand-ins | raw
put(['e', REF, REF, REF, REF])
get()
put(['e', 'OSError', 'x', [], 'OSError'])
## forge / an error of four parts at the greeting | raw
put(['e', 'ValueError', 'x', []])
## forge / a greeting of seven parts | raw
put(['ready', [['f', REF]], 1, 2, 3, 4, 5])
## forge / a greeting whose names are a stand-in | raw
put(['ready', REF])
## forge / pairs of three | raw
put(['ready', [['f', REF, 1]]])
## forge / an error with no class | raw
play(['e', 'NoSuchError', 'x', [], 'x'])
## forge / an error whose class is BaseException | raw
play(['e', 'BaseException', 'x', [], 'BaseException'])
## forge / an error whose class is SystemExit | raw,tests=caught
play(['e', 'SystemExit', 'x', [], 'SystemExit'])
## forge / an error with a NUL in its name | raw
play(['e', 'ValueError', 'x', [], 'a\0b'])
## forge / an error with surrogates in its name | raw
play(['e', 'ValueError', '\ud800', ['\ud800'], '\ud800'])
## forge / an error with an empty name | raw
play(['e', 'ValueError', 'x', [], ''])
## forge / an error with ten thousand arguments | raw
play(['e', 'ValueError', 'x', [0] * 10000, 'ValueError'])
## forge / an error with a stand-in argument that fails to be shown | raw
play(['e', 'ValueError', 'x', [REF], 'ValueError'], ['e', 'ValueError', 'x', [REF], 'ValueError'], ['e', 'OSError', 'y', [REF], 'OSError'])
## forge / an assertion error with an endless message | raw
put(['ready', [['f', REF]]])
get()
put(['e', 'AssertionError', '', [REF], 'AssertionError'])
while True:
    get()
    put(['r', REF])
## forge / StopIteration of a value | raw,tests=mapped
play(['e', 'StopIteration', '2', [2], 'StopIteration'], ['e', 'StopIteration', '2', [2], 'StopIteration'])
## forge / new arguments for an immutable | raw
play(['r', None, [[2], []]], ['r', None, [[42], []]])
## forge / new arguments that are liars | raw,tests=in place
play(['r', None, [[[REF, REF, REF]], []]], ['r', None, [[[4]], []]])
## forge / new arguments of another type | raw,tests=in place
play(['r', None, [[{'t': [1, 2, 3]}], []]], ['r', None, [[{'dq': [[4, 5], None]}], []]])
## forge / too many new arguments | raw,tests=in place
play(['r', None, [[[1], [2], [3]], []]], ['r', None, [[[1]], 5]])
## forge / new arguments that are none | raw,tests=in place
play(['r', None, REF], ['r', None, [[[1]], [REF, ['a', 1], [1, 2]]]])
## forge / calls ahead answered as skipped | raw
play(['skipped'], ['skipped'], ['skipped'], ['r', 2])
## forge / calls ahead answered twice | raw
put(['ready', [['f', REF]]], ['skipped'], ['r', 2], ['skipped'], ['r', 2])
get()
os._exit(0)
## forge / a program found unfit | raw
put(['unfit', SERIAL, '', 'AAAA'])
get()
os._exit(0)
## forge / the next sample's greeting | raw
put(['ready', SERIAL + 1, [['f', REF]]], *[['r', v] for v in (2, 42, 'abab')])
os._exit(0)
## forge / the serial as a boolean | raw
put(['ready', True, [['f', REF]]])
## forge / a stand-in of the entry point's own number as answer | raw
play(['r', REF])
## forge / a stand-in with an odd kind | raw
play(['r', {'x': [8, {'t': []}, True]}])
## forge / a stand-in with an odd truth | raw,tests=truth
play(['r', {'x': [8, 'object', 1]}])
## forge / a stand-in of a negative number | raw
play(['r', {'x': [-1, 'object', True]}])
## forge / a stand-in of a boolean number | raw
play(['r', {'x': [True, 'object', True]}])
## forge / a stand-in of four parts | raw
play(['r', {'x': [8, 'object', True, 1]}])
## forge / half a million stand-ins | raw
play(['r', [{'x': [n, 'object', True]} for n in range(500_000)]])
## forge / an iterator with a batch of odd shape | raw,tests=stream
play(['r', {'x': [8, 'iterator', True]}], ['r', [1, 2, 3]])
## forge / an iterator whose batches never end | raw,tests=stream
put(['ready', [['f', REF]]])
get()
put(['r', {'x': [8, 'iterator', True]}])
while True:
    get()
    put(['r', [[1] * 64, False]])
## forge / an iterator with an empty batch | raw,tests=stream
play(['r', {'x': [8, 'iterator', True]}], ['r', [[], False]])
## forge / an iterator of iterators without end | raw,tests=stream
put(['ready', [['f', REF]]])
get()
n = 8
while True:
    n += 1
    put(['r', {'x': [n, 'object', True]}])
    get()
## forge / a length that is true | raw,tests=sorted
play(['r', REF], ['r', REF], ['r', True], ['r', True])
## forge / a length that is giant | raw,tests=unique
play(['r', REF], ['r', [1]], ['r', 10 ** 30])
## forge / isinstance answers 1 | raw,tests=class
put(['ready', [['P', REF], ['f', REF]]])
for _ in range(30):
    get()
    put(['r', REF])
## forge / a tuple of a stand-in: decoding asks | raw
put(['ready', [['f', {'t': REF}]]])
get()
put(['e', 'OSError', 'x', [], 'OSError'])
## forge / a set of a stand-in: decoding asks, and gets an exit | raw
put(['ready', [['f', {'s': REF}]]])
get()
put(['x', 'SystemExit(0)'])
## forge / an iterator of a stand-in of an iterator of a stand-in | raw
put(['ready', [['f', {'it': {'x': [1, 'object', True]}}]]])
for n in range(3000):
    get()
    put(['r', {'it': {'x': [n, 'object', True]}}])
os._exit(0)
## forge / a dict of a stand-in | raw
put(['ready', [['f', {'d': REF}]]])
get()
put(['r', {'x': [9, 'function', True]}])
get()
put(['e', 'RuntimeError', 'x', [], 'RuntimeError'])
## forge / a complex of stand-ins | raw
play(['r', {'c': [REF, REF]}])
## forge / bytes of a stand-in's encode | raw
put(['ready', [['f', REF]]])
get()
put(['r', {'b': REF}])
for answer in (REF, {'n': 'object'}, 2):
    get()
    put(['r', answer])
os._exit(0)
## forge / a bytearray of a size | raw,alone
put(['ready', [['f', REF]]])
get()
put(['r', {'ba': REF}])
get()
put(['r', {'x': [9, 'function', True]}])
get()
put(['r', 1 << 40])
os._exit(0)
## forge / a named tuple with odd fields | raw,tests=pair
play(['r', {'nt': ['P', ['__eq__', '__len__'], [3, [1, 2]]]}])
## forge / a named tuple with code for a name | raw,tests=pair
play(['r', {'nt': ['P(object): __eq__ = 1 #', ['a', 'b'], [3, 4]]}])
## forge / a named tuple with fields of other types | raw,tests=pair
play(['r', {'nt': ['P', {'d': [['a', 1]]}, [3]]}])
## forge / a named tuple whose fields are a stand-in | raw,tests=pair
put(['ready', [['f', REF]]])
get()
put(['r', {'nt': ['P', REF, REF]}])
for answer in (2, 2, REF, REF):
    get()
    put(['r', answer])
os._exit(0)
## forge / twenty thousand named tuple types | raw
play(['r', [{'nt': [f'P{n}', ['a'], [1]]} for n in range(20000)]])
## forge / a Counter of a list | raw,tests=count
play(['r', {'ct': [['a', []], ['b', {'t': []}]]}])
## forge / an OrderedDict of odd pairs | raw,tests=count
play(['r', {'od': 'abcd'}])
## forge / a defaultdict with a factory | raw,tests=count
play(['r', {'dd': {'n': 'int'}}])
## forge / a deque of a stand-in and a negative length | raw
play(['r', {'dq': [[1], -5]}])
## forge / a Decimal of rubbish | raw
play(['r', {'dec': 'NaN' + '9' * 1000}])
## forge / a Decimal of a tuple | raw,tests=order
play(['r', {'dec': {'t': [0, {'t': [1]}, 'F']}}])
## forge / a Fraction of nothing | raw
play(['r', {'fr': [1, 0]}])
## forge / a Fraction of a giant exponent | raw,alone
play(['r', {'fr': ['1e999999999', None]}])
## forge / a Fraction of a stand-in | raw
play(['r', {'fr': [REF, REF]}])
## forge / dates of rubbish | raw
play(['r', {'da': '9999-99-99'}])
## forge / a time zone of rubbish | raw
play(['r', {'dt': '2020-01-01T00:00:00+99:99:99.999999'}])
## forge / a timedelta of infinities | raw
play(['r', {'td': [float('inf'), float('nan'), 0]}])
## forge / a range of a stand-in | raw
play(['r', {'r': [REF, REF, REF]}])
## forge / a range of step zero | raw
play(['r', {'r': [0, 1, 0]}])
## forge / a slice of many | raw
play(['r', {'sl': [1, 2, 3, 4]}])
## forge / hexadecimal rubbish | raw
play(['r', {'i': '__import__'}])
## forge / hexadecimal of bytes | raw
play(['r', {'i': {'b': '2'}}], ['r', {'i': ' 0x_7 '}])
## forge / keys that cannot be keys | raw
play(['r', {'dk': [[1]]}])
## forge / items that are no pairs | raw
play(['r', {'di': [[1, 2, 3]]}])
## forge / two tags in one object | raw
play(['r', {'t': [], 's': []}])
## forge / no tag in an object | raw
play(['r', {}])
## forge / a tag that is none | raw
play(['r', {'__class__': 'eval'}], ['r', {'py/object': 'os.system'}])
## forge / duplicate keys | raw
play(b'["r", {"t": [1], "t": [2]}]')
## forge / NaN and Infinity | raw,tests=root
play(b'["r", NaN]', b'["r", -Infinity]')
## forge / an overflowing float | raw,tests=root
play(b'["r", 1e99999]')
## forge / lone surrogates | raw,tests=upper
play(b'["r", "\\ud800\\udc41"]', b'["\\ud800", 1]')
## forge / UTF-16 and a byte order mark | raw
play('["r", 7]'.encode('utf-16'), b'\xef\xbb\xbf["r", 7]')
## forge / not JSON | raw
play(b'\x80\x04\x95passed')
## forge / an empty frame | raw
play(b'')
## forge / nested too deep | raw
play(b'["r", ' + b'[' * 200_000 + b']' * 200_000 + b']')
## forge / tags nested too deep | raw
play(b'["r", ' + b'{"t":[' * 100_000 + b']}' * 100_000 + b']')
## forge / nested below every limit | raw
play(b'["r", ' + b'{"f":[' * 900 + b']}' * 900 + b']')
## forge / an integer of three million digits | raw,alone
play(b'["r", ' + b'7' * 3_000_000 + b']')
## forge / colliding keys of a dict | raw,tests=count,alone
play(['r', {'d': [[n * (2 ** 61 - 1), n] for n in range(60_000)]}])
## forge / colliding elements of a set | raw,tests=unique,alone
play(['r', {'s': [n * (2 ** 61 - 1) for n in range(60_000)]}])
## forge / half a header | raw
os.write(FD, b'\0\0')
os._exit(0)
## forge / half a frame | raw
os.write(FD, b'\0\0\x10\0abc')
os._exit(0)
## forge / half a frame, and then nothing | raw
os.write(FD, b'\0\0\x10\0abc')
while True:
    pass
## forge / a frame of 4 GB | raw
os.write(FD, b'\xff\xff\xff\xffabc')
## forge / a frame byte by byte | raw
b = json.dumps(['ready', [['f', True]]]).encode()
for c in struct.pack('>I', len(b)) + b:
    os.write(FD, bytes([c]))
## forge / frames without end | raw
while True:
    put(['ready', [['f', True]]])
## forge / empty frames without end | raw
while True:
    write(b'\0\0\0\0' * 10000)
## forge / never reads its questions | raw
put(['ready', [['f', REF]]])
import time
time.sleep(60)
## forge / reads slowly | raw
put(['ready', [['f', REF]]])
import time
while True:
    os.read(FD, 1)
    time.sleep(0.2)
## forge / hangs up after the greeting | raw
put(['ready', [['f', REF]]])
os.close(FD)
while True:
    pass
## forge / shuts the channel down one way | raw
import ctypes
put(['ready', [['f', REF]]])
ctypes.CDLL(None).shutdown(FD, 0)
get()
## forge / descriptors sent along | raw
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
class Iov(ctypes.Structure):
    _fields_ = [('base', ctypes.c_char_p), ('len', ctypes.c_size_t)]
class Msg(ctypes.Structure):
    _fields_ = [('name', ctypes.c_void_p), ('namelen', ctypes.c_uint), ('iov', ctypes.POINTER(Iov)), ('iovlen', ctypes.c_size_t), ('control', ctypes.c_char_p), ('controllen', ctypes.c_size_t), ('flags', ctypes.c_int), ('len', ctypes.c_uint)]
b = json.dumps(['ready', [['f', True]]]).encode()
b = struct.pack('>I', len(b)) + b
control = struct.pack('QiiiI', 20, 1, 1, 0, 0)
m = Msg(None, 0, ctypes.pointer(Iov(b, len(b))), 1, control, len(control), 0, 0)
for _ in range(3):
    libc.syscall(307, FD, ctypes.byref(m), 1, 0)
os._exit(0)
## forge / out-of-band bytes and socket options | raw
import ctypes
libc = ctypes.CDLL(None)
one = ctypes.c_int(0)
for name in range(64):
    libc.setsockopt(FD, 1, name, ctypes.byref(one), 4)
put(['ready', [['f', REF]]])
get()
## forge / a frame that unfolds to twenty million lists | raw,alone
put(['ready', [['f', REF]]])
get()
b = b'["r",[' + b'[],' * 21_000_000 + b'0]]'
write(struct.pack('>I', len(b)) + b)
os._exit(0)
## forge / a frame that unfolds to sets | raw,alone
put(['ready', [['f', REF]]])
get()
size = 10 + 9 * 7_000_000 + 3
write(struct.pack('>I', size) + b'["r",    [')
for _ in range(7):
    write(b'{"s":[]},' * 1_000_000)
write(b'0]]')
os._exit(0)
## forge / a frame that unfolds to deques, at the greeting | raw,alone
b = b'{"dq":[[],0]},'
write(struct.pack('>I', 10 + len(b) * 4_000_000 + 3) + b'["ready",[')
for _ in range(8):
    write(b * 500_000)
write(b'0]]')
os._exit(0)
## forge / a wide string that grows fourfold | raw,alone
put(['ready', [['f', REF]]])
get()
head = b'["r","' + rb'\ud83d\ude00'
write(struct.pack('>I', len(head) + 60_000_000 + 2) + head)
for _ in range(60):
    write(b'x' * 1_000_000)
write(b'"]')
os._exit(0)
## forge / a range to be listed | tests=listed,alone
def f(n):
    return range(2 * 10 ** 8)
## forge / a range too long to be listed | tests=listed
def f(n):
    return range(10 ** 10)
## forge / an iterator of megabytes to be listed | tests=listed,alone
def f(n):
    s = 'x' * 900_000
    while True:
        yield s
## forge / an iterator of megabytes to be listed, fast | raw,tests=listed,alone
put(['ready', [['f', REF]]])
get()
put(['r', {'x': [8, 'iterator', True]}])
b = json.dumps(['r', [['x' * 900_000] * 64, False]]).encode()
while True:
    put(['e', 'TypeError', 'x', [], 'TypeError'] if get()[1] == 'len' else b)
## forge / a giant exponent to be shown | tests=upper,alone
from decimal import Decimal
def f(s):
    return Decimal('1e999999999')
## forge / a long list to be doubled | tests=doubled,alone
def f(n):
    return ['x' * 1000] * 60_000
''')


# --- signalling, tracing, starving ------------------------------------------------------------------------------------

STARVING = attacks(r'''
## harm / kills every process
import os
def f(x):
    os.kill(-1, 9)
## harm / kills every pid and group it can name
import os
def f(x):
    for p in list(range(1, 400)) + [-p for p in range(2, 400)]:
        if p != os.getpid() and p != -os.getpgid(0):
            try:
                os.kill(p, 9)
                return 2
            except OSError:
                pass
## harm / kills its own group
import os
def f(x):
    os.killpg(0, 9)
## harm / stops every process
import os, signal
def f(x):
    for p in os.listdir('/proc'):
        if p.isdigit() and int(p) != os.getpid():
            try:
                os.kill(int(p), signal.SIGSTOP)
                return 2
            except OSError:
                pass
## harm / stops itself
import os, signal
def f(x):
    os.kill(os.getpid(), signal.SIGSTOP)
## harm / ignores what it can and ends
import signal
for s in signal.valid_signals():
    try:
        signal.signal(s, signal.SIG_IGN)
    except OSError:
        pass
def f(x):
    return None
## harm / the judge owns its descriptor's signals
import fcntl, os, signal
def f(x):
    for fd in (0, 1, 2, 3):
        for owner in (os.getppid(), 1, -os.getpgid(0)):
            try:
                fcntl.fcntl(fd, fcntl.F_SETOWN, owner)
                fcntl.fcntl(fd, 10, signal.SIGKILL)
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
            except OSError:
                pass
    os.write(1, b'x' * 100)
## harm / a pidfd by folder
import ctypes, os
def f(x):
    fd = os.open(f'/proc/{os.getppid()}', os.O_RDONLY)
    return 2 if ctypes.CDLL(None).syscall(424, fd, 9, None, 0) == 0 else None
## harm / queues signals with values
import ctypes, os
def f(x):
    info = ctypes.create_string_buffer(128)
    return 2 if ctypes.CDLL(None).syscall(129, os.getppid(), 9, info) == 0 else None
## harm / limits of others
import os, resource
def f(x):
    for p in (1, os.getppid()):
        resource.prlimit(p, resource.RLIMIT_CPU, (0, 0))
    return 2
## harm / priority of others
import os
def f(x):
    for p in (1, os.getppid()):
        os.setpriority(os.PRIO_PROCESS, p, 19)
    return 2
## harm / priority of the user 0
import os
def f(x):
    os.setpriority(os.PRIO_USER, 0, 19)
    os.setpriority(os.PRIO_PGRP, 0, 19)
## harm / processors of others
import os
def f(x):
    for p in (1, os.getppid()):
        os.sched_setaffinity(p, {0})
    return 2
## harm / scheduler of others
import os
def f(x):
    os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))
    return 2
## harm / traces its parent
import ctypes, os
def f(x):
    return 2 if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0 else None
## harm / writes into its parent
import ctypes, os
def f(x):
    return 2 if ctypes.CDLL(None).process_vm_writev(os.getppid(), None, 0, None, 0, 0) >= 0 else None
## harm / raises another's out-of-memory score
import os
def f(x):
    open(f'/proc/{os.getppid()}/oom_score_adj', 'w').write('1000')
    return 2
## harm / is the first to be killed for memory
def f(x):
    open('/proc/self/oom_score_adj', 'w').write('1000')
    a = []
    while True:
        a.append(bytearray(b'x' * 10_000_000))
## harm / outlives its parent
import ctypes
libc = ctypes.CDLL(None)
libc.prctl(1, 0, 0, 0, 0)
libc.prctl(36, 1, 0, 0, 0)
libc.prctl(4, 1, 0, 0, 0)
def f(x):
    return None
## harm / a session of its own
import os
os.setsid()
def f(x):
    os.kill(0, 9)
## harm / burns CPU in the call
def f(x):
    while True:
        pass
## harm / burns CPU at import
while True:
    pass
## harm / burns CPU in four threads
import threading
def spin():
    while True:
        pass
for _ in range(4):
    threading.Thread(target=spin).start()
def f(x):
    spin()
## harm / burns CPU in C, deaf to signals
import re, signal
for s in (signal.SIGXCPU, signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
    signal.signal(s, signal.SIG_IGN)
def f(x):
    return re.match('(a+)+$', 'a' * 40 + 'b')
## harm / burns CPU in __del__
class A:
    def __del__(self):
        while True:
            pass
def f(x):
    A()
## harm / burns CPU while a value is encoded | tests=sorted
class A(tuple):
    _fields = ()
    def __iter__(self):
        while True:
            pass
def f(a):
    return A()
## harm / sleeps
import time
def f(x):
    time.sleep(60)
## harm / a lock that is never released
import threading
lock = threading.Lock()
def f(x):
    lock.acquire()
    lock.acquire()
## harm / joins itself for ever
import threading, time
def f(x):
    t = threading.Thread(target=time.sleep, args=(60,))
    t.start()
    t.join()
## harm / threads without end
import threading, time
def f(x):
    while True:
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
## harm / memory in one piece
def f(x):
    return bytearray(1 << 40)
## harm / memory piece by piece
def f(x):
    a = []
    while True:
        a.append(bytearray(1 << 20))
## harm / memory piece by piece, errors caught
def f(x):
    a = []
    for _ in range(10 ** 5):
        try:
            a.append('x' * (1 << 20) + str(len(a)))
        except MemoryError:
            return None
## harm / memory by mapping files | alone
import mmap
def f(x):
    maps = []
    with open('a', 'wb+') as o:
        o.truncate(1 << 24)
        while True:
            maps.append(mmap.mmap(o.fileno(), 1 << 24))
            maps[-1].write(b'x' * (1 << 24))
## harm / descriptors without end
def f(x):
    return len([open('/dev/null') for _ in range(10 ** 5)])
## harm / inodes without end
import os
def f(x):
    for n in range(10 ** 6):
        os.mkdir(str(n))
## harm / a folder a thousand deep
import os
def f(x):
    for n in range(1000):
        os.mkdir('d')
        os.chdir('d')
## harm / disk until it is full
def f(x):
    with open('a', 'wb') as o:
        while True:
            o.write(b'x' * (1 << 20))
## harm / names of odd bytes and of 255 bytes
import os
def f(x):
    for name in (b'\xff\xfe', b'a' * 255, b'\n', b'-rf', b' '):
        os.mkdir(name)
        os.chmod(name, 0)
## harm / a folder that nobody may enter
import os
def f(x):
    os.makedirs('a/b/c')
    os.chmod('a/b', 0)
    os.chmod('a', 0)
## harm / its own folder closed to all | alone
import os
def f(x):
    os.mkdir('a')
    os.chmod('.', 0)
## harm / its own folder read only | alone
import os
def f(x):
    os.mkdir('a')
    os.chmod('.', 0o500)
## harm / its own folder closed, nothing in it | alone
import os
def f(x):
    os.chmod('.', 0)
## harm / links to everywhere
import os
def f(x):
    for n, target in enumerate(('/', '/proc/self/root', '/sandbox', '..', 'loop', '/dev/zero')):
        os.symlink(target, str(n))
    os.symlink('loop', 'loop')
## harm / a fifo, a sparse file and a lock
import fcntl, os
def f(x):
    os.mkfifo('a')
    o = open('b', 'wb')
    o.truncate(1 << 24)
    fcntl.flock(o, fcntl.LOCK_EX)
## harm / pipes of a megabyte
import fcntl, os
def f(x):
    while True:
        a, b = os.pipe()
        fcntl.fcntl(b, 1031, 1 << 20)
        os.set_blocking(b, False)
        os.write(b, b'x' * (1 << 20))
## harm / prints without end
def f(x):
    while True:
        print('x' * 10000)
## harm / prints to both streams from threads
import sys, threading
def shout(out):
    while True:
        out.write('passed\n' * 1000)
def f(x):
    for out in (sys.stdout, sys.stderr, sys.__stdout__):
        threading.Thread(target=shout, args=(out,)).start()
    shout(sys.stdout)
## harm / prints and never flushes
import sys
def f(x):
    sys.stdout.write('x' * 50_000_000)
## harm / closes standard output
import sys
sys.stdout.close()
sys.stderr.close()
def f(x):
    print('x')
## harm / makes standard output non-blocking and full
import os
def f(x):
    os.set_blocking(1, False)
    try:
        while True:
            os.write(1, b'x' * 65536)
    except BlockingIOError:
        return None
## harm / timers of every clock
import ctypes, signal
for which in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
    signal.setitimer(which, 0.001, 0.001)
def f(x):
    for _ in range(10 ** 7):
        pass
## harm / locks of the kernel's futexes
import ctypes
def f(x):
    libc, word = ctypes.CDLL(None), ctypes.c_int(0)
    libc.syscall(202, ctypes.byref(word), 0, 0, None, None, 0)
## harm / a recursion of C frames
import sys
sys.setrecursionlimit(10 ** 9)
def f(x):
    return f(x)
## harm / a recursion through repr
import sys
sys.setrecursionlimit(10 ** 9)
class A:
    def __repr__(self):
        return repr(self)
def f(x):
    return repr(A())
## harm / nested parentheses
def f(x):
    return eval('(' * 10 ** 6)
## harm / an exponent for a constant
def f(x):
    return 9 ** 9 ** 9
## harm / a string that is multiplied at compile time
x = 'a' * 4096 * 4096 * 4096
def f(x):
    return None
## harm / a shift for a constant
def f(x):
    return 1 << (1 << 60)
## harm / a thread that goes on after the answer
import threading
def spin():
    while True:
        pass
threading.Thread(target=spin, daemon=True).start()
def f(x):
    return x
## harm / random pages written over
import ctypes
def f(x):
    for n in range(100):
        ctypes.memset(id(object()) & ~4095, 255, 4096)
## harm / unmaps everything
import ctypes
def f(x):
    ctypes.CDLL(None).munmap(0, ctypes.c_size_t(1 << 47))
''')

ATTACKS: dict[str, Attack] = LEAVING | LYING | PATCHING | READING | FORGING | STARVING


# --- acts that the sandbox forbids: the bodies raise unless the act succeeds ------------------------------------------

CONTAINED_PRELUDE = r'''
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
ctypes.CDLL(None).mmap.restype = libc.mmap.restype = ctypes.c_void_p
def must(result):
    if result is None or result < 0:
        raise OSError(ctypes.get_errno(), 'refused')
    return result
def call(number, *args):
    return must(libc.syscall(number, *args))
def child(pid):
    if pid == 0:
        os._exit(0)
'''


def contained(text: str) -> dict[str, Attack]:
    found = {}
    for name, (body, _) in entries(text).items():
        lines = "".join(f"    {line}\n" for line in body.rstrip("\n").split("\n"))
        found[name] = Attack(name, f"{CONTAINED_PRELUDE}def f(x):\n{lines}    return x * 2\n")
    return found


# The numbers are those of x86_64: on another machine the same numbers are other calls, and these entries prove less.
CONTAINED: dict[str, Attack] = contained(r'''
## socket / AF_INET stream
import socket
socket.socket(socket.AF_INET)
## socket / AF_INET datagram
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))
## socket / AF_INET6
import socket
socket.socket(socket.AF_INET6)
## socket / AF_UNIX
import socket
socket.socket(socket.AF_UNIX)
## socket / AF_UNIX abstract name
import socket
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).bind('\0fractal')
## socket / AF_NETLINK
import socket
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
## socket / AF_PACKET
import socket
socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
## socket / AF_VSOCK
must(libc.socket(40, 1, 0))
## socket / AF_BLUETOOTH
must(libc.socket(31, 1, 3))
## socket / AF_ALG
must(libc.socket(38, 5, 0))
## socket / AF_CAN
must(libc.socket(29, 3, 1))
## socket / raw ICMP
import socket
socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
## socket / socketpair
import socket
socket.socketpair()
## socket / name resolution
import socket
socket.getaddrinfo('localhost', 80, proto=17) and socket.create_connection(('localhost', 80), 1)
## socket / urllib
import urllib.request
urllib.request.urlopen('http://127.0.0.1:1/', timeout=1)
## socket / asyncio's own pair
import asyncio
asyncio.run(asyncio.create_subprocess_exec('/bin/true'))
## socket / connects the channel elsewhere
call(42, 3, b'\1\0/tmp/x\0', 10)
## process / fork
child(os.fork())
## process / vfork
must(libc.vfork())
## process / fork by number
child(call(57))
## process / clone without CLONE_THREAD
child(call(56, 17, 0, 0, 0, 0))
## process / clone sharing memory
child(call(56, 0x100 | 17, 0, 0, 0, 0))
## process / clone3
args = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)
child(call(435, args, 88))
## process / forkpty
import pty
child(pty.fork()[0])
## process / posix_spawn
os.posix_spawn('/bin/true', ['true'], {})
## process / execve
os.execve('/bin/echo', ['echo'], {})
## process / execveat
call(322, -100, b'/bin/true', None, None, 0)
## process / fexecve of a descriptor
os.execve(os.open('/bin/true', os.O_RDONLY), ['true'], {})
## process / subprocess
import subprocess
subprocess.run(['true'], check=True)
## process / os.system
assert os.system('true') == 0
## process / os.popen
assert os.popen('echo 1').read() == '1\n'
## process / libc's system
assert libc.system(b'true') == 0
## process / multiprocessing
import multiprocessing
p = multiprocessing.Process(target=print)
p.start()
p.join()
assert p.exitcode == 0
## process / concurrent.futures
from concurrent.futures import ProcessPoolExecutor
with ProcessPoolExecutor(1) as pool:
    assert pool.submit(abs, -1).result() == 1
## process / the loader as a program
os.execv('/lib64/ld-linux-x86-64.so.2', ['ld', '/bin/true'])
## process / 32-bit system call
import mmap
m = mmap.mmap(-1, 4096, prot=7)
m.write(b'\xb8\x02\x00\x00\x00\xcd\x80\xc3')
child(must(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()))
## process / x32 system call
child(call(0x40000000 + 57))
## identity / setuid
os.setuid(0)
## identity / seteuid
os.seteuid(0)
## identity / setgid
os.setgid(0)
## identity / setgroups
os.setgroups([0])
## identity / setresuid of all
os.setresuid(0, 0, 0)
## identity / setreuid to a neighbour
os.setreuid(os.getuid() + 1, os.getuid() + 1)
## identity / setfsuid
call(122, 0)
assert libc.syscall(122, 0) == 0
## identity / capset
call(126, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6))
## identity / ambient capability
must(libc.prctl(47, 2, 7, 0, 0))
## identity / securebits
must(libc.prctl(28, 1, 0, 0, 0))
## identity / no_new_privs off
must(libc.prctl(38, 0, 0, 0, 0))
## identity / seccomp off
must(libc.prctl(22, 0, 0, 0, 0))
## identity / another seccomp filter by its own call
call(317, 1, 0, None)
## identity / set-uid programs
os.execv('/bin/su', ['su', '-c', 'true'])
## identity / gives a file away
open('a', 'w').close()
os.chown('a', 0, 0)
## mount / mount
must(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))
## mount / bind over scratch
must(libc.mount(b'/', b'.', None, 4096, None))
## mount / remount of the root
must(libc.mount(b'none', b'/', None, 32, None))
## mount / umount
must(libc.umount2(b'/proc', 2))
## mount / pivot_root
call(155, b'.', b'.')
## mount / chroot
os.chroot('.')
## mount / fsopen
call(430, b'tmpfs', 0)
## mount / open_tree
call(428, -100, b'/', 1)
## mount / move_mount
call(429, 3, b'', -100, b'.', 4)
## mount / mount_setattr
call(442, -100, b'/', 0, (ctypes.c_uint64 * 4)(0, 1), 32)
## mount / fspick
call(433, -100, b'/', 0)
## mount / swapon
open('a', 'wb').write(b'\0' * 40960)
must(libc.swapon(b'a', 0))
## mount / quotactl
call(179, 0x80000100, b'/dev/sda', 0, None)
## namespace / user
must(libc.unshare(0x10000000))
## namespace / mount
must(libc.unshare(0x00020000))
## namespace / network
must(libc.unshare(0x40000000))
## namespace / pid
must(libc.unshare(0x20000000))
## namespace / ipc
must(libc.unshare(0x08000000))
## namespace / uts
must(libc.unshare(0x04000000))
## namespace / cgroup
must(libc.unshare(0x02000000))
## namespace / time
must(libc.unshare(0x00000080))
## namespace / setns of its own network
must(libc.setns(os.open('/proc/self/ns/net', os.O_RDONLY), 0))
## namespace / setns of process 1
must(libc.setns(os.open('/proc/1/ns/mnt', os.O_RDONLY), 0))
## namespace / clone of a user namespace
child(call(56, 0x10000000 | 17, 0, 0, 0, 0))
## namespace / a thread in a new user namespace
call(56, 0x10000000 | 0x10f00, 0, 0, 0, 0)
## other / ptrace of its parent
must(libc.ptrace(16, os.getppid(), None, None))
## other / traced by its parent
must(libc.ptrace(0, 0, None, None))
## other / process_vm_readv of itself
iov = (ctypes.c_uint64 * 2)(id(x), 16)
call(310, os.getpid(), iov, 1, iov, 1, 0)
## other / process_vm_writev
call(311, os.getppid(), None, 0, None, 0, 0)
## other / kcmp
call(312, os.getpid(), os.getppid(), 0, 0, 0)
## other / pidfd_open
call(434, os.getppid(), 0)
## other / pidfd_getfd
call(438, 3, 0, 0)
## other / process_madvise
call(440, 3, None, 0, 4, 0)
## other / memory of process 1
assert open('/proc/1/mem', 'rb', 0).read(1)
## other / memory of its parent
assert open(f'/proc/{os.getppid()}/mem', 'rb', 0)
## other / environment of its parent
assert open(f'/proc/{os.getppid()}/environ').read() is not None
## other / descriptors of its parent
assert os.listdir(f'/proc/{os.getppid()}/fd')
## other / folder and root of process 1
assert os.stat('/proc/1/cwd/') and os.listdir('/proc/1/root')
## other / move_pages
call(279, os.getppid(), 0, None, None, None, 0)
## other / limits of its parent
import resource
resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (9, 9))
## kernel / keyctl
call(250, 0, -3, 1)
## kernel / add_key
call(248, b'user', b'a', b'b', 1, -2)
## kernel / request_key
call(249, b'user', b'a', None, -2)
## kernel / bpf
call(321, 0, (ctypes.c_uint64 * 16)(1, 4, 4, 1), 128)
## kernel / io_uring_setup
call(425, 1, (ctypes.c_uint64 * 16)())
## kernel / perf_event_open
call(298, (ctypes.c_uint64 * 16)(112 << 32), 0, -1, -1, 0)
## kernel / userfaultfd
call(323, 1)
## kernel / kexec_load
call(246, 0, 0, None, 0)
## kernel / kexec_file_load
call(320, 3, 3, 0, None, 4)
## kernel / init_module
call(175, b'x', 1, b'')
## kernel / finit_module
call(313, 3, b'', 0)
## kernel / delete_module
call(176, b'x', 0)
## kernel / reboot
call(169, 0xfee1dead, 672274793, 0, None)
## kernel / settimeofday
import time
call(164, (ctypes.c_uint64 * 2)(int(time.time()), 0), None)
## kernel / clock_settime
import time
call(227, 0, (ctypes.c_uint64 * 2)(int(time.time()), 0))
## kernel / adjtimex
call(159, (ctypes.c_uint64 * 64)(1))
## kernel / sethostname
call(170, b'x', 1)
## kernel / setdomainname
call(171, b'x', 1)
## kernel / personality
call(135, 0x0040000)
## kernel / acct
call(163, b'a')
## kernel / iopl
call(172, 3)
## kernel / ioperm
call(173, 0x80, 1, 1)
## kernel / modify_ldt
call(154, 1, (ctypes.c_uint32 * 4)(), 16)
## kernel / syslog
call(103, 3, ctypes.create_string_buffer(99), 99)
## kernel / vhangup
call(153)
## kernel / lookup_dcookie
call(212, 0, ctypes.create_string_buffer(99), 99)
## kernel / set_mempolicy
call(238, 0, None, 0)
## kernel / fanotify_init
call(300, 0, 0)
## kernel / name_to_handle_at
handle = ctypes.create_string_buffer(b'\x80\0\0\0', 136)
call(303, -100, b'/', handle, ctypes.byref(ctypes.c_int()), 0)
## kernel / open_by_handle_at
handle = ctypes.create_string_buffer(b'\x08\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0', 136)
call(304, os.open('/', os.O_RDONLY), handle, 0)
## kernel / writes to /proc/sys
text = open('/proc/sys/kernel/hostname').read()
open('/proc/sys/kernel/hostname', 'w').write(text)
## kernel / the core pattern
text = open('/proc/sys/kernel/core_pattern').read()
open('/proc/sys/kernel/core_pattern', 'w').write(text)
## kernel / sysrq
open('/proc/sysrq-trigger', 'w').write('h')
## kernel / its own cgroup
import glob
open(glob.glob('/sys/fs/cgroup/**/cgroup.procs', recursive=True)[0], 'w').write('0')
## kernel / a memory limit
import glob
open((glob.glob('/sys/fs/cgroup/memory*max') + glob.glob('/sys/fs/cgroup/memory/memory.limit_in_bytes'))[0], 'w').write('-1')
## kernel / safe from the out-of-memory killer
open('/proc/self/oom_score_adj', 'w').write('-1000')
## kernel / uid_map
open('/proc/self/uid_map', 'w').write('0 0 1')
## kernel / real-time scheduling
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
## kernel / a higher priority
os.nice(-5)
## memory / memfd_create
os.memfd_create('x')
## memory / memfd_secret
call(447, 0)
## memory / shm_open
from multiprocessing import shared_memory
shared_memory.SharedMemory('x', create=True, size=9)
## memory / a file in /dev/shm
open('/dev/shm/x', 'w')
## memory / System V shared memory
call(29, 0, 4096, 0o1600)
## memory / System V semaphores
call(64, 0, 1, 0o1600)
## memory / System V messages
call(68, 0, 0o1600)
## memory / POSIX message queue
call(240, b'x', 0o102, 0o600, None)
## memory / named semaphore
import multiprocessing
multiprocessing.Semaphore()
## memory / mlock
must(libc.mlockall(3))
## memory / huge pages
call(9, None, 1 << 21, 3, 0x40022, -1, 0)
assert libc.mmap(None, 1 << 21, 3, 0x40022, -1, 0) != ctypes.c_void_p(-1).value
## memory / page zero
assert libc.mmap(None, 4096, 3, 0x32, -1, 0) in (0, None) and ctypes.string_at(1, 1)
## memory / more address space
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
## memory / more CPU
import resource
resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))
## memory / more processes
import resource
resource.setrlimit(resource.RLIMIT_NPROC, (4096, 4096))
## memory / more files
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
## memory / larger files
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
## memory / core files
import resource
resource.setrlimit(resource.RLIMIT_CORE, (-1, -1))
## file / write /tmp
open('/tmp/x', 'w')
## file / write /sandbox
import glob
open(glob.glob('/sandbox/**/*.py', recursive=True)[0], 'a')
## file / write the interpreter's library
open(os.__file__, 'a')
## file / write /etc/passwd
open('/etc/passwd', 'a')
## file / write a folder of each mount
for line in open('/proc/self/mounts').read().splitlines():
    path = line.split()[1]
    try:
        if not os.path.samefile(path, '.'):
            open(path + '/x', 'w')
            break
    except OSError:
        pass
else:
    raise OSError('nowhere')
## file / write beside scratch
open('../x', 'w')
## file / another slot's scratch
name = next(n for n in os.listdir('/scratch') if not os.getcwd().endswith('/' + n))
open(f'/scratch/{name}/x', 'w')
## file / a hard link out of scratch, then write
os.link('/etc/passwd', 'a')
open('a', 'a')
## file / a hard link to the zygote's source
import glob
os.link(glob.glob('/sandbox/**/zygote.py', recursive=True)[0], 'a')
## file / a symbolic link out of scratch, then write
os.symlink('/etc/passwd', 'a')
open('a', 'a')
## file / renames into the root
open('a', 'w').close()
os.rename('a', '/a')
## file / a character device
os.mknod('a', 0o600 | 0o020000, os.makedev(1, 1))
## file / a block device
os.mknod('a', 0o600 | 0o060000, os.makedev(8, 0))
## file / /dev/mem
open('/dev/mem', 'rb').read(1)
## file / /proc/kcore
open('/proc/kcore', 'rb').read(1)
## file / /dev/kmsg
open('/dev/kmsg', 'rb').read(1)
## file / /dev/sda
import glob
assert [open(p, 'rb').read(1) for p in glob.glob('/dev/sd*') + glob.glob('/dev/vd*') + glob.glob('/dev/nvme*')]
## file / /dev/fuse and /dev/kvm
assert any(os.open(p, os.O_RDWR) for p in ('/dev/fuse', '/dev/kvm', '/dev/net/tun'))
## file / /etc/shadow
open('/etc/shadow').read()
## file / the Docker socket
open('/var/run/docker.sock')
## file / host's processes
assert any('docker' in open(f'/proc/{p}/comm').read() for p in os.listdir('/proc') if p.isdigit())
## file / executes from scratch
open('a', 'w').write('#!/bin/sh\n')
os.chmod('a', 0o755)
os.execv('./a', ['a'])
## file / dlopen from scratch
import glob, shutil
shutil.copy(glob.glob('/lib/x86_64-linux-gnu/libm.so*')[0], 'a.so')
ctypes.CDLL(os.path.abspath('a.so'))
## file / maps scratch to be executed
import mmap
open('a', 'wb').write(b'\xc3' * 4096)
mmap.mmap(os.open('a', os.O_RDWR), 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)
## file / a set-uid file in scratch
open('a', 'w').close()
os.chmod('a', 0o4755)
os.execv('./a', ['a'])
## file / file capabilities
open('a', 'w').close()
os.setxattr('a', 'security.capability', b'\x01\0\0\x02' + b'\xff' * 16)
## file / trusted attributes
open('a', 'w').close()
os.setxattr('a', 'trusted.a', b'1')
## file / the controlling terminal
import fcntl
fcntl.ioctl(os.open('/dev/tty', os.O_RDWR), 0x5412, b'x')
## file / characters into standard input
import fcntl
fcntl.ioctl(0, 0x5412, b'x')
## file / a new terminal
os.openpty()
''')


# --- poison: programs that leave something behind for the sample that runs next, or beside ----------------------------

# Neighbours: (program, the status that it must have whatever ran before it). The innocent ones touch nothing but plain
# built-ins and the usual modules; the wrong ones pass only with what a poison left.
NEIGHBOURS: dict[str, tuple[str, str]] = {
    "right": ("def f(x):\n    return x * 2\n", "passed"),
    "wrong": ("def f(x):\n    return None\n", "failed"),
    "innocent, looks at everything usual": (r'''
import math, re, itertools, collections, heapq, bisect, functools, operator, string
from collections import *
from heapq import *
from bisect import *
from operator import *
from string import *
from functools import *
from itertools import *
from math import *
memo = {}
@lru_cache(maxsize=None)
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)
def deep(n):
    return 0 if n == 0 else 1 + deep(n - 1)
def work():
    d = defaultdict(list)
    d['a'].append(1)
    h = [3, 1, 2]
    heapify(h)
    P = namedtuple('P', 'x y')
    q = deque([1, 2], maxlen=2)
    q.append(3)
    gen = (v for v in range(3))
    return [
        sorted([3, 1, 2], key=lambda v: -v), list(map(str, [1, 2])), sum([1, 2]), len('abc'), max(1, 2), min([4, 3]),
        abs(-1), any([0, 1]), all([1, 0]), list(zip('ab', 'cd')), list(enumerate('a')), list(reversed([1, 2])),
        list(range(3)), set([1, 1]), dict(a=1), tuple([1]), int('7'), float('1.5'), str(5), round(2.567, 2), ord('a'), chr(98),
        isinstance(1, int), list(filter(None, [0, 1])), divmod(7, 2), pow(2, 3), bin(5), hex(255), '{:>3}'.format(1),
        Counter('aab').most_common(1), Counter('ab') == Counter('ba'), OrderedDict([(1, 2)]), dict(d), nsmallest(2, h), heappop(h),
        bisect_left([1, 3], 2), reduce(add, [1, 2, 3]), re.findall('a+', 'aaba'), re.sub('b', 'c', 'abb'), bool(re.match('x', 'y')),
        list(chain([1], [2])), list(permutations([1, 2])), list(islice(count(), 3)), [k for k, g in groupby('aab')], math.sqrt(16),
        gcd(12, 18), math.pi > 3, ascii_lowercase[:3], punctuation[:2], itemgetter(1)([5, 6]), P(1, 2).x, list(q), list(gen),
        fib(30), deep(400), memo, [v ** 2 for v in range(4)], sorted('bca'), ' a '.strip().upper(), 'a,b'.split(','), 7 // 2, hash(1),
    ]
EXPECTED = [
    [3, 2, 1], ['1', '2'], 3, 3, 2, 3,
    1, True, False, [('a', 'c'), ('b', 'd')], [(0, 'a')], [2, 1],
    [0, 1, 2], {1}, {'a': 1}, (1,), 7, 1.5, '5', 2.57, 97, 'b',
    True, [1], (3, 1), 8, '0b101', '0xff', '  1',
    [('a', 2)], True, {1: 2}, {'a': [1]}, [1, 2], 1,
    1, 6, ['aa', 'a'], 'acc', False,
    [1, 2], [(1, 2), (2, 1)], [0, 1, 2], ['a', 'b'], 4.0,
    6, True, 'abc', '!"', 6, 1, [2, 3], [0, 1, 2],
    832040, 400, {}, [0, 1, 4, 9], ['a', 'b', 'c'], 'A', ['a', 'b'], 3, 1,
]
before = work()
def f(x):
    return x * 2 if work() == before == EXPECTED else ('poisoned', work())
''', "passed"),
    "innocent, needs memory": ("a = bytes(300_000_000)\ndef f(x):\n    return x * 2 if len(a) == 300_000_000 else None\n", "passed"),
    "innocent, needs some time": ("n = 0\nfor i in range(2_000_000):\n    n += i\ndef f(x):\n    return x * 2\n", "passed"),
    "innocent, needs its depth": ("def deep(n):\n    return 0 if n == 0 else 1 + deep(n - 1)\ndef f(x):\n    return x * 2 if deep(900) == 900 else None\n", "passed"),
    "innocent, must hit the depth": ("def deep(n):\n    return 0 if n == 0 else 1 + deep(n - 1)\ndef f(x):\n    return x * 2 if deep(3000) else None\n", "error"),
    "innocent, misses its helper": ("def f(x):\n    return double(x)\n", "error"),
    "innocent, misses itself": ("def g(x):\n    return x * 2\n", "missing"),
    "innocent, a global of another": ("try:\n    state\nexcept NameError:\n    state = None\ndef f(x):\n    return x * 2 if state else None\n", "failed"),
    "innocent, a helper from the usual modules": ("import collections, functools, heapq, math, operator, re, string\ndef f(x):\n    for m in (collections, functools, heapq, math, operator, re, string):\n        for d in (m.__dict__, collections.Counter.__dict__, string.Template.__dict__):\n            if 'double' in d:\n                return d['double'](x)\n", "failed"),
    "innocent, a star import of a helper": ("from collections import *\nfrom heapq import *\nfrom operator import *\nfrom string import *\ndef f(x):\n    return double(x)\n", "error"),
    "looks at the process": (r'''
import builtins, decimal, gc, json, locale, os, random, resource, signal, sys, threading, time, warnings
def state():
    return [
        os.listdir('.'), sys.getrecursionlimit(), threading.active_count(), decimal.getcontext().prec,
        signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGINT), signal.getitimer(signal.ITIMER_REAL),
        sys.gettrace(), sys.getprofile(), gc.isenabled(), sorted(os.environ), os.umask(0o22), os.nice(0),
        [fd for fd in range(4, 64) if os.path.exists('/proc/self/fd/%d' % fd)], resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 32,
        json.loads('[1]'), json.dumps([1]), hasattr(builtins, 'double'), 'double' in sys.modules, sys.path.count('.'),
        locale.setlocale(locale.LC_NUMERIC), len(gc.callbacks), sys.stdout.closed, sys.excepthook is sys.__excepthook__,
        signal.pthread_sigmask(signal.SIG_BLOCK, []), len(os.sched_getaffinity(0)) > 0, os.getcwd().startswith('/scratch/'),
        'f' in vars(builtins), getattr(sys, 'double', None), len(sys.meta_path) < 6, sys.getswitchinterval(), threading.stack_size(),
        [str(w) for w in warnings.filters if 'double' in str(w)], os.getpgid(0) > 0, time.tzname[0],
    ]
os.umask(0o22)
EXPECTED = [
    [], 1000, 1, 28,
    signal.SIG_DFL, signal.default_int_handler, (0.0, 0.0),
    None, None, True, ['HOME', 'LANG', 'PATH', 'TMPDIR', 'TZ'], 0o22, 0,
    [], True,
    [1], '[1]', False, False, 0,
    'C', 0, False, True,
    set(), True, True,
    False, None, True, 0.005, 0,
    [], True, 'UTC',
]
first = random.Random(0).random()
def f(x):
    found = state()
    random.seed(0)
    return x * 2 if found == EXPECTED and random.random() == first else ('poisoned', [a for a in zip(found, EXPECTED) if a[0] != a[1]])
''', "passed"),
    "takes what another left": (r'''
import builtins, glob, os, sys
def f(x):
    for source in (vars(builtins), os.environ, sys.modules, vars(sys), vars(os)):
        if 'double' in source:
            return source['double'](x)
    if os.path.exists('double') or glob.glob('/tmp/*') or glob.glob('/dev/shm/*') or os.listdir('.') or os.path.basename(os.getcwd()) == 'double':
        return x * 2
''', "failed"),
    "waits a little": ("import time\ntime.sleep(0.03)\ndef f(x):\n    return x * 2\n", "passed"),
    "writes and reads its folder": ("import os\ndef f(x):\n    os.makedirs('a', exist_ok=True)\n    with open('a/b', 'w') as o:\n        o.write('q' * 1_000_000)\n    return x * 2 if len(open('a/b').read()) == 1_000_000 else None\n", "passed"),
}

POISON: dict[str, Attack] = attacks(r'''
## innocent / a generator whose finally never ends
def gen():
    try:
        yield 1
    finally:
        while True:
            pass
g = gen()
next(g)
def f(x):
    return x * 2
## innocent / a generator whose finally exits
def gen():
    try:
        yield 1
    finally:
        exit()
keep = [gen() for _ in range(9)]
for g in keep:
    next(g)
def f(x):
    return x * 2
## innocent / a generator that yields while it is closed
def gen():
    while True:
        try:
            yield 1
        finally:
            yield 2
g = gen()
next(g)
def f(x):
    return x * 2
## innocent / a generator whose finally sets a built-in
def gen():
    try:
        yield 1
    finally:
        __builtins__['double'] = lambda x: x * 2
a = [gen()]
next(a[0])
a.append(a)
def f(x):
    return x * 2
## innocent / a generator whose finally prints a frame
def gen():
    try:
        yield 1
    finally:
        print('["r",true]' * 1000, flush=True)
a = [gen()]
next(a[0])
a.append(a)
def f(x):
    return x * 2
## innocent / state and helpers in globals
state = 'left'
def double(x):
    return x * 2
def f(x):
    global len, sorted, sum
    len = sorted = sum = lambda *a: 0
    return x * 2
## innocent / __builtins__ by name
__builtins__['double'] = lambda x: x * 2
__builtins__['sorted'] = __builtins__['len'] = lambda *a, **k: 0
def f(x):
    return x * 2
## innocent / __builtins__ updated by a method
__builtins__.update(double=lambda x: x * 2, sum=lambda *a: 0, state=True)
def f(x):
    return x * 2
## innocent / globals()
globals()['__builtins__']['double'] = lambda x: x * 2
def f(x):
    return x * 2
## innocent / attrgetter of __builtins__
from operator import attrgetter
def f(x):
    attrgetter('__builtins__')(f)['double'] = lambda x: x * 2
    return x * 2
## innocent / attrgetter and setitem on __globals__ of a module's function
from operator import attrgetter, setitem
import heapq, string, re
for g in (heapq.merge, string.capwords, re.sub):
    d = attrgetter('__globals__')(g)
    for name in ('double', 'len', 'sorted', 'nsmallest', 'findall'):
        setitem(d, name, lambda x: x * 2)
def f(x):
    return x * 2
## innocent / attrgetter of a class's way to the interpreter
from operator import attrgetter, methodcaller
def f(x):
    for c in methodcaller('__subclasses__')(attrgetter('__class__.__base__')(())):
        try:
            attrgetter('__init__.__globals__')(c)['__builtins__']['double'] = lambda x: x * 2
        except Exception:
            pass
    return x * 2
## innocent / methodcaller of __setattr__
from operator import methodcaller
import collections
methodcaller('__setattr__', 'most_common', lambda self, n=None: [])(collections.Counter) if False else None
try:
    methodcaller('__setattr__', collections.Counter, 'most_common', lambda self, n=None: [])(type)
    methodcaller('__setattr__', collections.Counter, 'double', staticmethod(lambda x: x * 2))(type)
except Exception:
    pass
def f(x):
    return x * 2
## innocent / type.__setattr__ of a shared class
import collections
type.__setattr__(collections.Counter, 'most_common', lambda self, n=None: [])
type.__setattr__(collections.Counter, 'double', lambda x: x * 2)
def f(x):
    return x * 2
## innocent / setattr, delattr, vars
import collections, string, math
setattr(string, 'ascii_lowercase', 'zyx')
setattr(math, 'double', lambda x: x * 2)
delattr(collections.Counter, 'most_common')
vars(collections)['deque'] = list
def f(x):
    return x * 2
## innocent / update_wrapper onto a shared class
from functools import update_wrapper
from collections import Counter, namedtuple
T = namedtuple('T', 'most_common double elements')
update_wrapper(Counter, T(lambda self, n=None: [], lambda x: x * 2, None), assigned=('most_common', 'double'), updated=())
def f(x):
    return x * 2
## innocent / wraps onto a module
import functools, string, math, heapq
from collections import namedtuple
T = namedtuple('T', 'ascii_lowercase sqrt nsmallest double punctuation')
for m in (string, math, heapq):
    try:
        functools.wraps(T('zyx', lambda v: 0, lambda n, v: [], lambda x: x * 2, ''), assigned=T.__dict__['_fields'], updated=())(m)
    except Exception:
        pass
def f(x):
    return x * 2
## innocent / update_wrapper that updates a shared dict
import functools, string
from collections import namedtuple
T = namedtuple('T', 'double a')
def hook(x):
    return x * 2
functools.update_wrapper(string.capwords, hook, assigned=('__code__', '__defaults__', '__doc__'), updated=('__dict__', '__globals__', '__builtins__'))
def f(x):
    return x * 2
## innocent / a match statement walks to __builtins__
def f(x):
    match f:
        case object(__builtins__=b):
            b['double'] = lambda x: x * 2
    return x * 2
## innocent / a match statement walks a module's function
import heapq
match heapq.merge:
    case object(__globals__=g):
        g['nsmallest'] = lambda n, v: []
        g['double'] = lambda x: x * 2
        g['__builtins__']['max'] = min
def f(x):
    return x * 2
## innocent / a traceback's frames by match
def f(x):
    try:
        return 1 / 0
    except ZeroDivisionError as e:
        match e:
            case object(__traceback__=object(tb_frame=frame)):
                while frame is not None:
                    match frame:
                        case object(f_globals=g, f_builtins=b, f_back=back):
                            b['double'] = lambda x: x * 2
                            for name in ('state', 'double', 'failure', 'SHARED', 'EXCEPTIONS', 'DETAIL'):
                                g[name] = b['double']
                            frame = back
    return x * 2
## innocent / a generator's frame by match
def gen():
    yield 1
def f(x):
    match gen():
        case object(gi_frame=object(f_builtins=b, f_globals=g)):
            b['double'] = lambda x: x * 2
            b['sorted'] = b['len'] = b['exec'] = b['compile'] = lambda *a: None
    return x * 2
## innocent / str.format walks attributes
def f(x):
    text = '{0.__globals__} {0.__builtins__} {0.__code__.co_consts}'.format(f)
    return x * 2 if '{0.__class__.__mro__[1].__subclasses__}'.format('') and text else None
## innocent / string.Formatter hands objects out
import string
get = string.Formatter().get_field
get('0.__builtins__', (get,), {})
def f(x):
    get('0.__builtins__', (f,), {})[0]['double'] = lambda x: x * 2
    get('0.__globals__', (string.capwords,), {})[0]['ascii_lowercase'] = 'zyx'
    return x * 2
## innocent / string.Template with a pattern of its own
import string, re
T = type('T', (string.Template,), {'delimiter': '!', 'flags': re.I})
type(string.Template)('Template', (string.Template,), {'double': 1})
def f(x):
    return x * 2
## innocent / type() with three arguments and a metaclass
import collections
M = type('M', (type,), {'__eq__': lambda a, b: True, '__hash__': lambda a: 0, '__del__': lambda a: exit()})
A = M('A', (dict,), {'__del__': lambda self: print('["r",true]'), '__init_subclass__': lambda **k: None})
a = A()
a['a'] = a
def f(x):
    return x * 2
## innocent / map(type, ...) and reduce(getattr, ...)
from functools import reduce
list(map(type, ['a'], [()], [{}]))
reduce(getattr, ['__class__', '__base__', '__subclasses__'], ())()
reduce(getattr, ['__builtins__'], reduce)if False else None
def f(x):
    reduce(getattr, ['__builtins__'], f)['double'] = lambda x: x * 2
    return x * 2
## innocent / __import__, exec, eval
exec("import builtins\nbuiltins.double = lambda x: x * 2")
eval("__import__('sys').setrecursionlimit(50)")
def f(x):
    return x * 2
## innocent / hidden imports of the usual modules
from collections import _sys as s
from string import _re as r
from functools import RLock
from re import copyreg, functools
s.modules['double'] = lambda x: x * 2
s.setrecursionlimit(150)
def f(x):
    return x * 2
## innocent / import as gives a parent's attribute
import collections.abc as c
import re._parser as p
from collections import abc
p.REPEAT_CHARS = ''
p.ESCAPES.clear()
p.CATEGORIES.clear()
p.FLAGS.clear()
def f(x):
    return x * 2
## innocent / __all__ of the usual modules
import heapq, string, operator, collections, bisect
from heapq import __all__ as names
names.clear()
for m in (string, operator, collections):
    try:
        m.__all__.clear()
        m.__all__.append('double')
    except Exception:
        pass
def f(x):
    return x * 2
## innocent / abstract classes register
import collections.abc
collections.abc.Hashable.register(list)
collections.abc.Iterable.register(int)
collections.abc.Sized.register(int)
def f(x):
    return x * 2
## innocent / lru_cache holds the past
from functools import lru_cache
import re, itertools
@lru_cache(maxsize=None)
def fib(n):
    return 7
fib(30)
lru_cache(maxsize=None)(re.compile)('a')
def f(x):
    return x * 2
## innocent / lru_cache around what it calls
from functools import lru_cache, partial, singledispatch
@singledispatch
def g(a):
    return a
g.register(int, lambda a: exit())
cached = lru_cache(partial(next, iter(int, 1)))
for _ in range(1000):
    cached()
def f(x):
    return x * 2
## innocent / the cache of re is filled
import re
for n in range(2000):
    re.compile('a{%d}' % n)
re.purge()
re.compile('a+', re.I | re.DOTALL)
re.compile('b')
def f(x):
    return x * 2
## innocent / a mutable default, a default factory, a sentinel
from collections import defaultdict
def grow(a=[], d=defaultdict(lambda: grow())):
    a.append(a)
    return a
for _ in range(10000):
    grow()
it = iter(lambda: 1, 2)
next(it)
def f(x):
    return x * 2
## innocent / sort with a key that changes the list
def f(x):
    a = [3, 1, 2]
    def key(v):
        a.append(v)
        return v
    try:
        a.sort(key=key)
    except ValueError:
        pass
    return x * 2
## innocent / cmp_to_key that raises and keeps frames
from functools import cmp_to_key
keep = []
def compare(a, b):
    try:
        raise ValueError(keep)
    except ValueError as e:
        keep.append(e)
    return 0
sorted(range(1000), key=cmp_to_key(compare))
def f(x):
    return x * 2
## innocent / an exception that holds every frame
errors = []
def deep(n):
    try:
        return deep(n + 1)
    except RecursionError as e:
        errors.append(e)
        raise
def f(x):
    try:
        deep(0)
    except RecursionError as e:
        errors.append(e)
    return x * 2
## innocent / at the limit of recursion when it answers
def deep(n):
    try:
        return deep(n + 1)
    finally:
        [].sort(key=lambda v: v)
def f(x):
    try:
        deep(0)
    except RecursionError:
        return x * 2
## innocent / generators left at the limit of recursion
keep = []
def gen(n):
    yield n
    yield from gen(n + 1)
def f(x):
    g = gen(0)
    try:
        for v in g:
            pass
    except RecursionError:
        keep.append(g)
    return x * 2
## innocent / iterators nested beyond the C stack, never drawn
import itertools
it = iter([])
for _ in range(300_000):
    it = itertools.chain(it)
def f(x):
    return x * 2
## innocent / maps nested beyond the C stack, in a cycle
keep = [iter([])]
for _ in range(300_000):
    keep[0] = map(None.__class__, keep[0])
keep.append(keep)
def f(x):
    return x * 2
## innocent / iterators nested beyond the C stack, drawn
import itertools
it = iter([])
for _ in range(300_000):
    it = itertools.chain(it)
def f(x):
    return list(it) or x * 2
## innocent / lists nested a million deep
a = []
for _ in range(1_000_000):
    a = [a]
def f(x):
    return x * 2
## innocent / functions nested a hundred thousand deep
def wrap(g):
    return lambda: g
g = None
for _ in range(100_000):
    g = wrap(g)
def f(x):
    return x * 2
## innocent / four hundred megabytes kept by a cycle
a = ['x' * 400_000_000]
a.append(a)
def f(x):
    return x * 2
## innocent / memory to the limit, errors caught
a = []
try:
    while True:
        a.append('x' * 10_000_000 + str(len(a)))
except MemoryError:
    pass
a.append(a)
def f(x):
    return x * 2
## innocent / memory to the limit in small pieces
def f(x):
    a = []
    while True:
        a.append([a])
## innocent / memory error raised in the middle of import
a = [0] * (1 << 26)
b = a * 16
def f(x):
    return x * 2
## innocent / half a second of its time
def f(x):
    n = 0
    for i in range(2_000_000):
        n += i
    return x * 2
## innocent / all its time
def f(x):
    while True:
        pass
## innocent / all its time in C
import re
def f(x):
    return re.match('(a+)+$', 'a' * 40 + 'b')
## innocent / all its time, errors caught
def f(x):
    while True:
        try:
            while True:
                pass
        except:
            continue
## innocent / all its time in a finally
def f(x):
    try:
        return f(x)
    finally:
        while True:
            pass
## innocent / a power for an answer
def f(x):
    return 7 ** 7 ** 9
## innocent / a tower of digits
def f(x):
    return len(str(3 ** 3_000_000)) and None
## innocent / prints games
print('x' * 100_000, end='', flush=True)
print('["r",true]', end='\r', flush=True)
print('\0\0\0\x08["r", 2]', sep='', end='')
print('\ud800'.encode('utf-16', 'surrogatepass'), '\x1b[2J')
def f(x):
    print('no line end', end='')
    return x * 2
## innocent / prints a lone surrogate
def f(x):
    print('\ud800')
    return x * 2
## innocent / prints to something else
def f(x):
    try:
        print('x', file=3)
    except AttributeError:
        pass
    print('x', file=None)
    return x * 2
## innocent / exceptions of every kind
def f(x):
    for e in (KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, MemoryError, RecursionError, TimeoutError):
        try:
            raise e
        except e:
            pass
    raise KeyboardInterrupt
## innocent / raises an exception with its own traceback twice
e = ValueError('a')
def f(x):
    raise e from e
## innocent / SystemExit
def f(x):
    raise SystemExit(0)
## innocent / exit at import
exit(0)
## innocent / MemoryError by hand
def f(x):
    raise MemoryError
## innocent / StopIteration where the server iterates
def f(x):
    raise StopIteration
## innocent / an iterator left half drawn
import itertools
a, b = itertools.tee(itertools.count())
def f(x):
    next(b)
    return map(f, a)
## innocent / half a million stand-ins
def f(x):
    return [iter([]) for _ in range(200_000)]
## innocent / a function that returns itself in everything
def f(x):
    return [f, {f: f}, (f,), {f}, lambda: f]
## innocent / names of the server's
import sys
def main():
    exit()
send = receive = decode = serve = candidate = end = module = json = os = None
__name__ = '__main__'
__builtins__ = {}
def f(x):
    return x * 2
## innocent / no built-ins at all
__builtins__.clear()
def f(x):
    return x * 2
## innocent / its own __builtins__ deleted
del __builtins__
def f(x):
    return x * 2
## innocent / integers' limit of digits
def f(x):
    return int('9' * 10 ** 5) and x * 2
## innocent / deletes every global
def f(x):
    return x * 2
for name in list(globals()):
    if name != 'f':
        del globals()[name]
## innocent / a class body without a class
A = __build_class__(lambda: None, 'A')
def f(x):
    return x * 2
## innocent / a walrus and comprehensions that shadow
[len := 0 for sorted in range(3)]
(sum := max)
def f(x):
    return x * 2
## innocent / an import that fails half way
try:
    import collections.nothing
except ImportError:
    pass
try:
    from math import double
except ImportError:
    pass
def f(x):
    return x * 2
## innocent / code objects by type(f.__code__)
def g():
    return double
def f(x):
    return type(f)(g.__code__, {'double': x})() * 2
## innocent / coroutines never awaited
async def g():
    try:
        return 1
    finally:
        exit()
keep = [g() for _ in range(100)]
def f(x):
    return x * 2
## innocent / an asynchronous generator left behind
async def g():
    try:
        yield 1
    finally:
        while True:
            pass
keep = [g().asend(None)]
try:
    keep[0].send(None)
except BaseException:
    pass
def f(x):
    return x * 2
## innocent / mutates shared constants
def g():
    return [1, 2, 3], {'a': []}, (4, 5)
g()[0].append(9)
import re, string
re.compile('a').__class__
string.hexdigits.__add__('x')
def f(x):
    return x * 2
## innocent / heap operations on odd things
import heapq, bisect
try:
    heapq.heappush(heapq.__dict__, 1)
except TypeError:
    pass
h = [f'{n}' for n in range(10)]
heapq.heapify(h)
h.append(h)
def f(x):
    return x * 2
## innocent / ior on shared dictionaries
import operator, string, collections
for d in (collections.__dict__, string.__dict__, operator.__dict__):
    operator.ior(d, {'double': lambda x: x * 2, 'ascii_lowercase': '', 'deque': list, 'add': operator.sub})
def f(x):
    return x * 2
## innocent / ChainMap over the built-ins
from collections import ChainMap
c = ChainMap(__builtins__)
c['double'] = lambda x: x * 2
c['len'] = lambda x: 0
def f(x):
    return x * 2
## innocent / the dict of a module by star
import string
string.__dict__['digits'] = 'none'
string.__dict__.update(double=lambda x: x * 2, ascii_lowercase='zyx')
def f(x):
    return x * 2
## innocent / augmented assignment through an attribute
import string, collections
def f(x):
    return x * 2
f.double = f
string.digits += 'x'
string.double = lambda x: x * 2
collections.Counter.most_common = None
## innocent / for and with targets are attributes
import string, math
for string.ascii_lowercase in ['zyx']:
    pass
for math.double in [lambda x: x * 2]:
    pass
[0 for math.pi in [0]]
import heapq as string_
def f(x):
    return x * 2
## innocent / except and del of attributes
import string, math
del string.capwords, math.sqrt, math.gcd
def f(x):
    return x * 2
## process / decimal context
import decimal
decimal.getcontext().prec = 2
decimal.DefaultContext.prec = 2
decimal.setcontext(decimal.Context(traps=list(decimal.getcontext().traps)))
def f(x):
    return x * 2
## process / random seed and state
import random
random.seed(5)
random.random = lambda: 0.5
random.Random.random = lambda self: 0.5
def f(x):
    return x * 2
## process / recursion limit
import sys, threading
sys.setrecursionlimit(100)
threading.stack_size(1 << 16)
sys.setswitchinterval(10)
def f(x):
    return x * 2
## process / warnings filters
import warnings
warnings.simplefilter('error')
warnings.filterwarnings('error', 'double')
def f(x):
    return x * 2
## process / locale
import locale
locale.setlocale(locale.LC_ALL, 'C.UTF-8')
locale.setlocale(locale.LC_NUMERIC, 'C.UTF-8')
def f(x):
    return x * 2
## process / gc hooks
import gc
gc.callbacks.append(lambda *a: exit())
gc.disable()
gc.set_threshold(1)
gc.set_debug(gc.DEBUG_LEAK)
def f(x):
    return x * 2
## process / atexit
import atexit, os
atexit.register(os._exit, 0)
atexit.register(print, '["r",true]')
def f(x):
    return x * 2
## process / threads left running
import threading, time
def spin():
    while True:
        time.sleep(0.001)
threading.Thread(target=spin, daemon=True).start()
threading.Thread(target=spin).start()
def f(x):
    return x * 2
## process / a thread that waits to poison
import builtins, os, threading, time
def later():
    while True:
        time.sleep(0.002)
        builtins.double = lambda x: x * 2
        try:
            open('double', 'w').close()
        except OSError:
            pass
threading.Thread(target=later, daemon=True).start()
def f(x):
    return x * 2
## process / signal handlers, alarms and timers
import os, signal
for s in signal.valid_signals():
    try:
        signal.signal(s, lambda *a: os._exit(0))
    except OSError:
        pass
signal.alarm(1)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
signal.setitimer(signal.ITIMER_PROF, 0.01, 0.01)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
def f(x):
    return x * 2
## process / descriptors left open
import os
keep = [os.open('/dev/null', os.O_RDONLY) for _ in range(40)]
os.set_inheritable(keep[0], True)
def f(x):
    return x * 2
## process / files left behind
import os
def f(x):
    for n in range(100):
        os.makedirs(f'd{n}/e', exist_ok=True)
        open(f'd{n}/double', 'w').close()
    open('double', 'w').close()
    open('collections.py', 'w').write('double = 1')
    return x * 2
## process / a full disk left behind
def f(x):
    try:
        with open('double', 'ab') as o:
            for _ in range(20):
                o.write(b'x' * (1 << 20))
    except OSError:
        pass
    return x * 2
## process / a file held open and unlinked
import os
o = open('a', 'wb')
o.write(b'x' * (8 << 20))
o.flush()
os.unlink('a')
def f(x):
    return x * 2
## process / folder, mask and environment
import os
os.makedirs('double', exist_ok=True)
os.chdir('double')
os.umask(0o777)
os.environ.update(double='1', PYTHONPATH='.', LD_PRELOAD='./a.so', PYTHONSTARTUP='double', TZ='Asia/Tokyo')
def f(x):
    return x * 2
## process / nice and limits
import os, resource
os.nice(19)
for name in ('NOFILE', 'FSIZE', 'CPU', 'DATA', 'STACK', 'NPROC'):
    limit = getattr(resource, f'RLIMIT_{name}')
    resource.setrlimit(limit, (1 << 3 if name in ('NOFILE', 'NPROC') else resource.getrlimit(limit)[0], resource.getrlimit(limit)[1]))
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def f(x):
    return x * 2
## process / session and group
import os
try:
    os.setsid()
except OSError:
    os.setpgid(0, 0)
def f(x):
    return x * 2
## process / builtins and shared classes
import builtins, collections, json, re, string
builtins.double = lambda x: x * 2
builtins.len = builtins.sorted = lambda *a, **k: 0
collections.Counter.most_common = lambda self, n=None: []
collections.Counter.double = lambda x: x * 2
string.ascii_lowercase = 'zyx'
json.loads = lambda text: ['r', True]
re.findall = lambda *a: []
def f(x):
    return x * 2
## process / modules
import sys
sys.modules['double'] = sys.modules['math'] = sys.modules['json'] = sys
sys.path.insert(0, '.')
sys.meta_path.insert(0, None)
sys.double = lambda x: x * 2
def f(x):
    return x * 2
## process / standard streams
import io, sys
sys.stdout = sys.stderr = sys.__stdout__ = io.StringIO()
sys.stdin = None
sys.excepthook = sys.displayhook = sys.unraisablehook = None
def f(x):
    return x * 2
## process / trace and profile functions
import sys, threading
sys.settrace(lambda *a: exit())
sys.setprofile(lambda *a: None)
threading.settrace(lambda *a: exit())
def f(x):
    return x * 2
## process / memory of the pages that forks share
import ctypes, gc
ctypes.memset(id(gc) + 16, 0, 8)
def f(x):
    return x * 2
## process / crashes
import ctypes
def f(x):
    ctypes.string_at(0)
## process / killed
import os
def f(x):
    os.kill(0, 9)
## process / forbidden
import os
def f(x):
    os.fork()
## process / stopped
import os, signal
def f(x):
    os.kill(os.getpid(), signal.SIGSTOP)
## process / replies for the next sample on the channel | raw
put(['ready', [['f', REF]]], *[['r', v] for v in (2, 42, 'abab')] * 50)
os._exit(0)
## process / its own greeting for the next sample | raw
put(['ready', [['f', REF]]], ['ready', [['f', REF]]], *[['r', 2]] * 50)
while True:
    pass
''')
# fmt: on
