"""Honest programs whose label must equal plain evaluation, and where the sandbox is known to differ.

Tables only; `test_parity.py` runs them. In a table's text `## name` begins an entry, `--- test` and `--- setup` begin
its further parts. The program stands for the reference, too. Some entries are wrong on purpose: those must not pass.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Honest:
    """A program with its tests, evaluated in this order: program, setup, tests."""

    code: str
    tests: tuple[str, ...]
    setup: str = ""


def honest(text: str) -> dict[str, Honest]:
    """A table's text as entries by name. Raises ValueError for a name that stands twice."""
    found: dict[str, Honest] = {}
    for block in ("\n" + text.strip("\n")).split("\n## ")[1:]:
        name, _, rest = block.partition("\n")
        code, *parts = ("\n" + rest).split("\n--- ")
        tests = [part.removeprefix("test\n") for part in parts if part.startswith("test\n")]
        setups = [part.removeprefix("setup\n") for part in parts if part.startswith("setup\n")]
        if name in found or not tests or len(tests) + len(setups) != len(parts):
            raise ValueError(f"entry {name!r} is not a program with tests, or stands twice")
        found[name] = Honest(code.removeprefix("\n") + "\n", tuple(tests), "".join(setups))
    return found


# fmt: off
HONEST: dict[str, Honest] = honest(r'''
## argument, list sorted in place
def f(a):
    a.sort()
--- test
x = [3, 1, 2]
assert f(x) is None
assert x == [1, 2, 3]
## argument, list emptied
def f(a):
    del a[:]
--- test
x = [1, 2]
f(x)
assert x == [] and len(x) == 0
## argument, list within a list
def f(a):
    a[0].append(9)
    a.append([7])
--- test
inner = [1]
x = [inner, 2]
f(x)
assert x == [[1, 9], 2, [7]] and inner == [1, 9] and x[0] is inner
## argument, dict
def f(d):
    d['a'] = d.pop('b') + 1
--- test
x = {'b': 1}
f(x)
assert x == {'a': 2}
## argument, list within a dict within a list
def f(a):
    a[0]['k'].append(3)
    a[0]['n'] = {}
--- test
k = [1]
d = {'k': k}
x = [d]
f(x)
assert k == [1, 3] and d == {'k': [1, 3], 'n': {}} and x[0] is d
## argument, set
def f(s):
    s.add(3)
    s.discard(1)
--- test
x = {1, 2}
f(x)
assert x == {2, 3}
## argument, bytearray
def f(b):
    b[0] = 66
    b.extend(b'!')
--- test
x = bytearray(b'abc')
f(x)
assert x == bytearray(b'Bbc!') and isinstance(x, bytearray)
## argument, deque with a length
from collections import deque
def f(d):
    d.append(4)
--- test
from collections import deque
x = deque([1, 2, 3], maxlen=3)
f(x)
assert x == deque([2, 3, 4]) and x.maxlen == 3
## argument, OrderedDict and defaultdict and Counter
def f(o, d, c):
    o.move_to_end('a')
    d['z'].append(1)
    c.update('aab')
--- test
from collections import OrderedDict, defaultdict, Counter
o, d, c = OrderedDict(a=1, b=2), defaultdict(list), Counter('a')
f(o, d, c)
assert list(o) == ['b', 'a'] and d == {'z': [1]} and c == Counter('aaab') and type(c) is Counter
## argument, list within a tuple
def f(t):
    t[0].append(2)
--- test
x = ([1], 5)
f(x)
assert x == ([1, 2], 5)
## argument, by keyword
def f(*, a, d=None):
    a.append(4)
    if d is not None:
        d['x'] = 1
--- test
x, d = [1], {}
f(a=x, d=d)
assert x == [1, 4] and d == {'x': 1}
## argument, the same list twice
def f(a, b):
    a.append(1)
    return len(b)
--- test
x = []
assert f(x, x) == 1
## argument, a list and a list that holds it
def f(a, b):
    a.append(1)
    return b
--- test
x = []
assert f(x, [x, 2]) == [[1], 2]
## argument, aliased rows
def f(grid):
    grid[0][0] = 1
    return grid
--- test
grid = [[0] * 2] * 2
assert f(grid) == [[1, 0], [1, 0]]
assert grid == [[1, 0], [1, 0]]
## argument, changed before an exception
def f(a):
    a.append(1)
    raise ValueError
--- test
x = []
try:
    f(x)
except ValueError:
    pass
assert x == [1]
## argument, returned itself
def f(a):
    a.sort()
    return a
--- test
x = [2, 1]
y = f(x)
assert y is x and y == [1, 2]
## argument, returned and changed later
def f(a):
    return a
--- test
x = [1]
f(x).append(2)
assert x == [1, 2]
## argument, kept by the program
kept = []
def f(a):
    kept.append(a)
    kept[0].append(len(kept))
    return sum(kept[0])
--- test
x = []
assert f(x) == 1
assert f([]) == 3
assert x == [1, 2]
## argument, kept by an object
class Stack:
    def __init__(self, items):
        self.items = items
    def push(self, v):
        self.items.append(v)
def f(a):
    return Stack(a)
--- test
x = [1]
s = Stack(x)
s.push(2)
assert x == [1, 2] and s.items == [1, 2]
## argument, changed by the test between calls
class Box:
    def __init__(self, items):
        self.items = items
    def total(self):
        return sum(self.items)
def f(a):
    return Box(a).total()
--- test
x = [1]
b = Box(x)
x.append(5)
assert b.total() == 6
## argument, keys of every kind
def f(d):
    return {k: v for k, v in sorted(d.items(), key=lambda p: str(p[0]))}
--- test
x = {1: 'a', 'b': 2, (1, 2): [3], None: 4, True: 5, 1.5: 6, frozenset([1]): 7, b'x': 8}
assert f(x) == x and len(f(x)) == 7
## argument, an iterator
def f(it):
    return sum(it)
--- test
assert f(iter([1, 2])) == 3 and f(x for x in (1, 2)) == 3 and f(map(int, '12')) == 3 and f(range(3)) == 3
## argument, an iterator drawn in part
def f(it):
    return next(it)
--- test
it = iter([1, 2, 3])
assert f(it) == 1
assert list(it) == [2, 3]
## argument, an iterator without end
import itertools
def f(it):
    return list(itertools.islice(it, 3))
--- test
import itertools
assert f(itertools.count(5)) == [5, 6, 7]
## argument, functions
def f(g, a):
    return [g(v) for v in a]
--- test
def square(v):
    return v * v
assert f(square, [1, 2]) == [1, 4] and f(lambda v: -v, [3]) == [-3] and f(str, [1]) == ['1'] and f(len, ['ab']) == [2]
## argument, functions of modules and methods
def f(g, a):
    return [g(v) for v in a]
--- test
import math, operator
assert f(math.sqrt, [4]) == [2.0] and f(operator.neg, [1]) == [-1]
## argument, methods
def f(g, a):
    return [g(v) for v in a]
--- test
out = []
assert f(str.upper, ['a']) == ['A'] and f(out.append, [1, 2]) == [None, None] and out == [1, 2]
## argument, a partial
def f(g, a):
    return g(a)
--- test
from functools import partial
assert f(partial(pow, 2), 3) == 8
## argument, a class
def f(cls, v):
    return cls(v)
--- test
assert f(int, '7') == 7 and f(list, 'ab') == ['a', 'b'] and isinstance(f(ValueError, 'x'), ValueError)
## argument, a callback that changes its argument
def f(g):
    a = [1]
    g(a)
    return a
--- test
def g(a):
    a.append(2)
assert f(g) == [1, 2]
## argument, a callback that raises
def f(g):
    try:
        g()
    except KeyError as e:
        return e.args
--- test
def g():
    raise KeyError('k', 1)
assert f(g) == ('k', 1)
## argument, the program's own objects
class P:
    def __init__(self, x):
        self.x = x
def f(p, q=None):
    return p.x + (q.x if q else 0)
--- test
assert f(P(1)) == 1 and f(P(1), q=P(2)) == 3
## argument, a list of the program's own objects
class P:
    def __init__(self, x):
        self.x = x
def f(a):
    return sum(p.x for p in a)
--- test
assert f([P(1), P(2)]) == 3 and f({'a': P(4)}.values()) == 4
## argument, the test's own objects
def f(p):
    return p.x + p.y()
--- test
class T:
    x = 1
    def y(self):
        return 2
assert f(T()) == 3
## argument, a date, a Decimal, a Fraction, complex, bytes
def f(*a):
    return [type(v).__name__ for v in a]
--- test
import datetime, decimal, fractions
assert f(datetime.date(2020, 1, 2), decimal.Decimal(1), fractions.Fraction(1, 2), 1j, b'x') == ['date', 'Decimal', 'Fraction', 'complex', 'bytes']
## argument, a file of strings
def f(o):
    return o.read()
--- test
import io
assert f(io.StringIO('ab')) == 'ab'
## argument, a compiled pattern
def f(p, s):
    return p.findall(s)
--- test
import re
assert f(re.compile('a+'), 'aaba') == ['aaa'[:2], 'a']
## argument, NaN by identity
def f(a):
    return a
--- test
n = float('nan')
assert f([n]) == [n]
## result, set and frozenset
def f(a):
    return set(a) if len(a) > 1 else frozenset(a)
--- test
assert f([1, 2, 2]) == {2, 1} and f([3]) == frozenset({3}) == {3} and isinstance(f([3]), frozenset)
assert f([1, 2]) - {1} == {2} and f([1, 2]) | {3} == {1, 2, 3} and f([1, 2]) >= {1}
## result, a set of tuples in a dict
def f():
    return {frozenset([1]): (1, [2]), (1, 2): {3: {4}}}
--- test
assert f() == {frozenset({1}): (1, [2]), (1, 2): {3: {4}}}
## result, Counter
from collections import Counter
def f(s):
    return Counter(s)
--- test
assert f('aab') == {'a': 2, 'b': 1} and f('ab').most_common(1) == [('a', 1)] and f('a')['z'] == 0
assert f('a') + f('ab') == f('aab') and sum(f('abc').values()) == 3 and isinstance(f(''), dict)
## result, OrderedDict
from collections import OrderedDict
def f():
    return OrderedDict([('b', 1), ('a', 2)])
--- test
from collections import OrderedDict
assert f() == {'a': 2, 'b': 1} and f() == OrderedDict([('b', 1), ('a', 2)]) and f() != OrderedDict([('a', 2), ('b', 1)])
assert list(f()) == ['b', 'a'] and f().popitem(last=False) == ('b', 1)
## result, defaultdict
from collections import defaultdict
def f():
    d = defaultdict(list)
    d[1].append(2)
    return d
--- test
assert f() == {1: [2]} and isinstance(f(), dict) and type(f()).__name__ == 'defaultdict'
## result, defaultdict asked for a missing key
from collections import defaultdict
def f():
    return defaultdict(int, a=1)
--- test
assert f()['a'] == 1 and f()['b'] == 0
## result, deque
from collections import deque
def f(n):
    return deque(range(n), maxlen=3)
--- test
from collections import deque
assert f(5) == deque([2, 3, 4]) and list(f(2)) == [0, 1] and f(5).maxlen == 3 and f(3)[-1] == 2
## result, namedtuple
from collections import namedtuple
P = namedtuple('P', 'x y')
def f():
    return P(1, 2)
--- test
assert f() == (1, 2) and f().x == 1 and f()[1] == 2 and f()._asdict() == {'x': 1, 'y': 2} and repr(f()) == 'P(x=1, y=2)'
assert P(1, 2) == f() and f()._fields == ('x', 'y') and tuple(f()) == (1, 2)
## result, namedtuple replaced, and its type
from collections import namedtuple
P = namedtuple('P', 'x y')
def f():
    return P(1, 2)
--- test
assert f()._replace(x=5) == (5, 2) and isinstance(f(), P) and type(f()) is P
## result, typing.NamedTuple with a method
from typing import NamedTuple
class P(NamedTuple):
    x: int
    y: int = 2
    def norm(self):
        return self.x + self.y
def f(x):
    return P(x)
--- test
assert f(1) == (1, 2) and f(1).y == 2
assert f(1).norm() == 3
## result, dataclass
from dataclasses import dataclass, field, asdict
@dataclass
class D:
    x: int
    tags: list = field(default_factory=list)
def f(x):
    return D(x)
--- test
assert f(1).x == 1 and f(1).tags == [] and repr(f(1)) == 'D(x=1, tags=[])'
## result, dataclass compared
from dataclasses import dataclass
@dataclass(order=True, frozen=True)
class D:
    x: int
def f(x):
    return D(x)
--- test
assert f(1) == D(1) and f(1) != D(2)
assert f(1) < D(2) and sorted([D(2), D(1)]) == [D(1), D(2)] and len({D(1), D(1)}) == 1
## result, dataclass wrong
from dataclasses import dataclass
@dataclass
class D:
    x: int
def f(x):
    return D(x + 1)
--- test
assert f(1) == D(1)
## result, enum
import enum
class C(enum.Enum):
    RED = 1
    BLUE = 'b'
def f(v):
    return C(v)
--- test
assert f(1).name == 'RED' and f('b').value == 'b' and str(f(1)) == 'C.RED'
assert f(1) is C.RED and f(1) == C.RED and f(1) != C.BLUE
## result, IntEnum and Flag
import enum
class C(enum.IntEnum):
    A = 1
    B = 2
class F(enum.IntFlag):
    X = 1
    Y = 2
def f():
    return C.B
--- test
assert f() == 2 and f() + 1 == 3 and sorted([C.B, C.A]) == [1, 2] and F.X | F.Y == 3
## result, IntEnum with its name
import enum
class C(enum.IntEnum):
    A = 1
def f():
    return C.A
--- test
assert f().name == 'A' and f() is C.A
## result, str enum
import enum
class C(str, enum.Enum):
    A = 'a'
def f():
    return C.A
--- test
assert f() == 'a' and f().upper() == 'A'
## result, list of enum members
import enum
class C(enum.Enum):
    A = 1
    B = 2
def f():
    return list(C)
--- test
assert [c.name for c in f()] == ['A', 'B'] and f() == [C.A, C.B] and len(C) == 2 and [c for c in C][0] is C.A
## result, Decimal
from decimal import Decimal, getcontext
def f(s):
    return Decimal(s) / 3
--- test
from decimal import Decimal
assert f('1.5') == Decimal('0.5') and str(f('3.30')) == '1.10' and f('3') + 1 == 2 and round(f('1'), 2) == Decimal('0.33')
## result, Decimal with a precision of its own
from decimal import Decimal, getcontext
getcontext().prec = 5
def f(x):
    return Decimal(x)
--- test
assert str(f(1) / 3) == '0.33333'
## result, Fraction
from fractions import Fraction
def f(a, b):
    return Fraction(a, b)
--- test
from fractions import Fraction
assert f(1, 3) * 3 == 1 and f(2, 4) == Fraction(1, 2) and f(1, 2) < 1 and str(f(1, 3)) == '1/3' and f(1, 2) == 0.5
## result, complex
def f(x):
    return x ** 0.5
--- test
import cmath
assert cmath.isclose(f(-1), 1j) and abs(f(-4)) == 2.0 and isinstance(f(-1), complex) and f(-4).imag == 2.0
## result, bytes and bytearray
def f(s):
    return s.encode(), bytearray(s, 'utf-8')
--- test
assert f('é') == (b'\xc3\xa9', bytearray(b'\xc3\xa9')) and f('a')[0] + b'b' == b'ab' and f('a')[1].hex() == '61'
## result, memoryview
def f(b):
    return memoryview(b)
--- test
assert bytes(f(b'ab')) == b'ab'
## result, memoryview compared
def f(b):
    return memoryview(b)
--- test
assert f(b'ab') == b'ab' and f(b'abc')[0] == 97 and len(f(b'abc')) == 3
## result, array
from array import array
def f():
    return array('i', [1, 2])
--- test
from array import array
assert list(f()) == [1, 2] and f()[1] == 2 and f().tolist() == [1, 2]
assert f() == array('i', [1, 2])
## result, range and slice
def f(n):
    return range(n) if n else slice(1, 2)
--- test
assert f(3) == range(3) and list(f(2)) == [0, 1] and 2 in f(3) and f(0) == slice(1, 2) and [5, 6, 7][f(0)] == [6]
## result, dates
import datetime
def f():
    return datetime.date(2020, 2, 28) + datetime.timedelta(days=2)
def g():
    return datetime.datetime(2020, 1, 2, 3, 4, 5, 6, tzinfo=datetime.timezone.utc)
--- test
import datetime
assert f() == datetime.date(2020, 3, 1) and f().year == 2020 and f().strftime('%d') == '01' and f() - datetime.date(2020, 1, 1) == datetime.timedelta(60)
assert g().isoformat() == '2020-01-02T03:04:05.000006+00:00' and g().time() == datetime.time(3, 4, 5, 6)
## result, a time zone with a name
import datetime
def f():
    return datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2), 'X'))
--- test
assert f().tzname() == 'X' and f().hour == 0
## result, generator
def f(n):
    yield from range(n)
--- test
assert list(f(200)) == list(range(200)) and next(f(3)) == 0 and sum(f(4)) == 6 and [*f(2)] == [0, 1] and 3 in f(5)
a, b = f(2)
assert (a, b) == (0, 1) and sorted(f(3), reverse=True) == [2, 1, 0] and dict(enumerate(f(2))) == {0: 0, 1: 1}
## result, generator is spent
def f():
    yield 1
--- test
g = f()
assert list(g) == [1] and list(g) == [] and next(g, 'end') == 'end'
## result, generator with send
def f():
    total = 0
    while True:
        total += (yield total) or 0
--- test
g = f()
assert next(g) == 0 and g.send(5) == 5 and g.send(2) == 7
g.close()
## result, generator with next and then send
def f():
    total = 0
    while True:
        total += (yield total) or 1
--- test
g = f()
assert [next(g), next(g), next(g)] == [0, 1, 2] and g.send(10) == 12
## result, generator throws and returns
def f():
    try:
        yield 1
    except ValueError:
        yield 2
    return 3
--- test
g = f()
next(g)
assert g.throw(ValueError) == 2
try:
    next(g)
    assert False
except StopIteration as e:
    assert e.value == 3
## result, generator that raises after three
def f():
    yield 1
    yield 2
    yield 3
    raise ValueError('end')
--- test
g = f()
assert next(g) == 1 and next(g) == 2 and next(g) == 3
try:
    next(g)
    assert False
except ValueError:
    pass
## result, generator whose later elements never come
def f():
    yield 1
    yield 2
    while True:
        pass
--- test
g = f()
assert next(g) == 1 and next(g) == 2
## result, generator that notes how far it got
seen = []
def f():
    for i in range(100):
        seen.append(i)
        yield i
def count():
    return len(seen)
--- test
g = f()
next(g), next(g)
assert count() == 2
## result, generator of changing lists
def f():
    a = []
    for i in range(3):
        a.append(i)
        yield a
--- test
assert [list(v) for v in f()] == [[0], [0, 1], [0, 1, 2]]
## result, a generator is a generator
import types
def f():
    yield 1
--- test
import types, inspect
assert isinstance(f(), types.GeneratorType) and hasattr(f(), '__next__') and inspect.isgenerator(f())
## result, map, filter, zip, reversed, enumerate
def f(a):
    return map(str, a), filter(None, a), zip(a, a), reversed(a), enumerate(a)
--- test
m, f_, z, r, e = f([1, 0])
assert list(m) == ['1', '0'] and list(f_) == [1] and list(z) == [(1, 1), (0, 0)] and list(r) == [0, 1] and list(e) == [(0, 1), (1, 0)]
## result, map compared with a list is wrong
def f(a):
    return map(str, a)
--- test
assert f([1]) == ['1']
## result, dict views
def f(d):
    return d.keys(), d.values(), d.items()
--- test
k, v, i = f({1: 2})
assert k == {1} and 1 in k and list(v) == [2] and i == {(1, 2)} and sorted(i) == [(1, 2)] and len(v) == 1 and k & {1} == {1}
## result, dict values in a list
def f(d):
    return d.values()
--- test
assert sorted(f({1: 3, 2: 1})) == [1, 3] and 3 in f({1: 3}) and sum(f({1: 3})) == 3 and max(f({1: 3, 2: 9})) == 9
## result, closures
def f(n):
    def add(x):
        return x + n
    return add
--- test
assert f(2)(3) == 5 and callable(f(1)) and list(map(f(1), [1, 2])) == [2, 3] and f(1).__name__ == 'add'
## result, not callable
def f():
    return {}.values()
class A:
    pass
def g():
    return A()
--- test
assert not callable(f()) and not callable(g())
## result, partial
from functools import partial
f = partial(int, base=2)
--- test
assert f('101') == 5 and f.keywords == {'base': 2}
## result, lru_cache
from functools import lru_cache, cache
@lru_cache(maxsize=None)
def f(n):
    return n if n < 2 else f(n - 1) + f(n - 2)
--- test
assert f(80) == 23416728348467685 and f.cache_info().misses == 81
f.cache_clear()
assert f.cache_info().currsize == 0
## result, lambda with defaults
f = lambda x, y=2, *a, z=3, **k: (x, y, a, z, k)
--- test
assert f(1) == (1, 2, (), 3, {}) and f(1, 5, 6, z=7, w=8) == (1, 5, (6,), 7, {'w': 8})
## result, a function's attributes
def f(x: int, y=1) -> str:
    """Doc."""
    return str(x)
--- test
assert f.__name__ == 'f' and f.__doc__ == 'Doc.'
assert f.__defaults__ == (1,) and f.__annotations__['return'] is str
## result, a function's signature
def f(x, y=1):
    return x
--- test
import inspect
assert list(inspect.signature(f).parameters) == ['x', 'y']
## result, NaN and infinities
def f(s):
    return float(s)
--- test
import math
x = f('nan')
assert x != x and math.isnan(x) and f('inf') == float('inf') and f('-inf') < 0 and math.isinf(f('inf'))
## result, negative zero
def f():
    return -0.0
--- test
import math
assert f() == 0 and math.copysign(1, f()) == -1.0 and str(f()) == '-0.0'
## result, floats exact
def f():
    return [0.1 + 0.2, 1e308, 5e-324, 1 / 3, 2.0, 1e16]
--- test
assert f() == [0.1 + 0.2, 1e308, 5e-324, 1 / 3, 2.0, 1e16] and isinstance(f()[4], float) and repr(f()[0]) == '0.30000000000000004'
## result, 10**4000
def f():
    return 10 ** 4000, -(2 ** 300)
--- test
assert f() == (10 ** 4000, -(2 ** 300)) and f()[0] % 7 == 10 ** 4000 % 7
## result, bool against int
def f(x):
    return x > 1
--- test
assert f(2) == 1 and f(2) is True and f(0) + 1 == 1 and str(f(2)) == 'True' and isinstance(f(2), int) and type(f(2)) is bool
## result, int against bool
def f(x):
    return 1
--- test
assert f(2) == True
## result, int is not a bool
def f(x):
    return 1
--- test
assert f(2) is True
## result, str subclass
class S(str):
    def shout(self):
        return self.upper() + '!'
def f(s):
    return S(s)
--- test
assert f('a') == 'a' and f('a') + 'b' == 'ab' and isinstance(f('a'), str)
assert f('a').shout() == 'A!'
## result, str subclass with a __str__ of its own
class S(str):
    def __str__(self):
        return 'other'
def f(s):
    return S(s)
--- test
assert f('a') == 'a' and str(f('a')) == 'other'
## result, list and dict subclasses with methods
class Stack(list):
    def peek(self):
        return self[-1]
class Attr(dict):
    def __getattr__(self, name):
        return self[name]
def f(a):
    return Stack(a)
--- test
assert f([1, 2]) == [1, 2] and len(f([1])) == 1 and Attr(a=1) == {'a': 1}
s = Stack([1])
s.append(2)
assert s == [1, 2]
assert s.peek() == 2 and Attr(a=1).a == 1
## result, dict subclass with __missing__
class D(dict):
    def __missing__(self, key):
        return key * 2
def f():
    return D(a=1)
--- test
assert f()['a'] == 1 and f()['b'] == 'bb'
## result, a UserDict and a ChainMap
from collections import UserDict, ChainMap
def f():
    return ChainMap({'a': 1}, {'b': 2})
def g():
    return UserDict(a=1)
--- test
assert f()['b'] == 2 and dict(f()) == {'a': 1, 'b': 2} and g()['a'] == 1
assert f() == {'a': 1, 'b': 2} and g() == {'a': 1}
## result, SimpleNamespace
from types import SimpleNamespace
def f():
    return SimpleNamespace(a=1)
--- test
assert f().a == 1
assert f() == SimpleNamespace(a=1)
## result, aliased rows
def f():
    return [[0] * 2] * 2
--- test
x = f()
x[0][0] = 1
assert x[1][0] == 1
## result, a global that the test changes
items = []
def f():
    return items
--- test
f().append(1)
assert f() == [1]
## result, the same object each time
class A:
    pass
a = A()
def f():
    return a
--- test
assert f() is f() and f() == f() and f() is a and hash(f()) == hash(a)
## result, the same list each time
a = [1]
def f():
    return a
--- test
assert f() is f()
## result, None and nested None
def f(x):
    return None if x else [None, (None,)]
--- test
assert f(1) is None and f(0) == [None, (None,)] and f(0)[0] is None
## result, Ellipsis and NotImplemented
def f(x):
    return ... if x else NotImplemented
--- test
assert f(1) is ... and f(0) is NotImplemented
## result, types
def f(x):
    return type(x)
--- test
assert f(1) is int and f('') == str and f([]).__name__ == 'list' and issubclass(f(True), int) and f(None) is type(None)
## result, a type of the program's
class A:
    pass
class B(A):
    pass
def f(x):
    return B()
--- test
assert isinstance(f(1), A) and isinstance(f(1), B) and not isinstance(1, A)
assert type(f(1)) is B and type(f(1)).__name__ == 'B' and issubclass(B, A) and f(1).__class__ is B
## result, 50 MB of text
def f():
    return 'x' * 50_000_000
--- test
assert len(f()) == 50_000_000 and f()[-1] == 'x'
## result, 70 MB of text
def f():
    return 'x' * 70_000_000
--- test
assert len(f()) == 70_000_000
## result, a million numbers
def f():
    return list(range(1_000_000))
--- test
assert sum(f()) == 499999500000 and f()[-1] == 999999
## result, 150 deep
def f(n):
    a = []
    for _ in range(n):
        a = [a]
    return a
--- test
a, n = f(150), 0
while a:
    a, n = a[0], n + 1
assert n == 150
## result, 400 deep
def f(n):
    a = []
    for _ in range(n):
        a = [a]
    return a
--- test
a, n = f(400), 0
while a:
    a, n = a[0], n + 1
assert n == 400
## result, a cyclic list
def f():
    a = [1]
    a.append(a)
    return a
--- test
x = f()
assert x[0] == 1 and x[1][1][0] == 1 and len(x) == 2 and x[1] is x
## result, match object
import re
def f(s):
    return re.match('a(?P<n>b)', s)
--- test
assert f('ab') and f('ab').group(1) == 'b' and not f('x') and f('x') is None and f('ab').span() == (0, 2) and f('ab')['n'] == 'b'
## result, unicode
def f(s):
    return s[::-1] + 'é\u4e2d\U0001f600\x00\ud800'
--- test
assert f('añ') == 'ñaé中😀\x00\ud800' and len(f('')) == 5 and f('ß').upper().startswith('SS')
## class, built by the test
class Node:
    def __init__(self, v):
        self.v = v
        self.left = self.right = None
def f(n):
    return 0 if n is None else 1 + max(f(n.left), f(n.right))
--- setup
root = Node(1)
root.left = Node(2)
root.left.right = Node(3)
--- test
assert f(root) == 3 and f(None) == 0 and root.left.v == 2 and root.right is None
## class, methods, properties, static and class methods
class A:
    count = 0
    def __init__(self, x):
        self._x = x
        A.count += 1
    @property
    def x(self):
        return self._x
    @x.setter
    def x(self, v):
        self._x = v * 10
    @staticmethod
    def s(v):
        return v + 1
    @classmethod
    def make(cls, v):
        return cls(v)
def f():
    return A.count
--- test
a = A(1)
a.x = 2
assert a.x == 20 and A.s(1) == 2 and A.make(3).x == 3 and f() == 2 and A.count == 2
## class, attributes deleted and asked for
class A:
    def __init__(self):
        self.x = 1
def f():
    return A()
--- test
a = f()
assert hasattr(a, 'x') and not hasattr(a, 'y') and getattr(a, 'y', 5) == 5 and vars(a) == {'x': 1} and a.__dict__ == {'x': 1}
setattr(a, 'z', 3)
assert a.z == 3
del a.x
assert not hasattr(a, 'x')
## class, compared with an __eq__ of its own
class P:
    def __init__(self, x):
        self.x = x
    def __eq__(self, other):
        return isinstance(other, P) and self.x == other.x
    def __hash__(self):
        return hash(self.x)
def f(x):
    return P(x)
--- test
assert f(1) == P(1)
assert f(1) != P(2) and P(1) in [P(1)] and len({P(1), P(1)}) == 1
## class, compared with an __eq__ of its own, wrong
class P:
    def __init__(self, x):
        self.x = x
    def __eq__(self, other):
        return self.x == other.x
def f(x):
    return P(x + 1)
--- test
assert f(1) == P(1)
## class, compared without __eq__
class P:
    pass
def f():
    return P()
--- test
p = f()
assert p == p and p != f() and p in [p] and f() not in [p] and len({p, p, f()}) == 2
## class, ordered
from functools import total_ordering
@total_ordering
class V:
    def __init__(self, n):
        self.n = n
    def __eq__(self, o):
        return self.n == o.n
    def __lt__(self, o):
        return self.n < o.n
def f(n):
    return V(n)
--- test
assert f(1) < f(2)
assert [v.n for v in sorted([V(3), V(1)])] == [1, 3] and max(V(1), V(2)).n == 2 and f(2) >= f(2)
## class, sorted by a key
class V:
    def __init__(self, n):
        self.n = n
def f(n):
    return V(n)
--- test
assert [v.n for v in sorted([V(3), V(1)], key=lambda v: v.n)] == [1, 3]
## class, arithmetic
class Vec:
    def __init__(self, x, y):
        self.x, self.y = x, y
    def __add__(self, o):
        return Vec(self.x + o.x, self.y + o.y)
    def __mul__(self, k):
        return Vec(self.x * k, self.y * k)
    __rmul__ = __mul__
    def __neg__(self):
        return self * -1
    def __abs__(self):
        return (self.x ** 2 + self.y ** 2) ** 0.5
    def __repr__(self):
        return f'Vec({self.x}, {self.y})'
def f():
    return Vec(3, 4)
--- test
assert repr(f()) == 'Vec(3, 4)'
assert repr(f() + f()) == 'Vec(6, 8)' and (f() * 2).x == 6 and (2 * f()).y == 8 and abs(f()) == 5.0 and (-f()).x == -3
## class, containers
class Bag:
    def __init__(self):
        self.d = {}
    def __setitem__(self, k, v):
        self.d[k] = v
    def __getitem__(self, k):
        return self.d[k]
    def __len__(self):
        return len(self.d)
    def __iter__(self):
        return iter(self.d)
def f():
    return Bag()
--- test
b = f()
b['a'] = 1
b['b'] = 2
assert b['a'] == 1 and len(b) == 2 and list(b) == ['a', 'b'] and 'a' in b and [k for k in b] == ['a', 'b']
## class, containers with __contains__ and __delitem__
class Bag:
    def __init__(self):
        self.d = {1: 1}
    def __delitem__(self, k):
        del self.d[k]
    def __contains__(self, k):
        return k in self.d
def f():
    return Bag()
--- test
b = f()
assert 1 in b and 2 not in b
del b[1]
assert 1 not in b
## class, slices and negative indices
class L:
    def __init__(self, a):
        self.a = a
    def __getitem__(self, i):
        return self.a[i]
    def __len__(self):
        return len(self.a)
def f(a):
    return L(a)
--- test
assert f([1, 2, 3])[1:] == [2, 3] and f([1, 2])[-1] == 2 and list(f([1, 2])) == [1, 2] and list(reversed(f([1, 2]))) == [2, 1]
## class, true or false
class A:
    def __init__(self, n):
        self.n = n
    def __bool__(self):
        return self.n > 0
def f(n):
    return A(n)
--- test
assert f(1) and not f(0) and bool(f(0)) is False
a = f(1)
a.n = 0
assert not a
## class, empty and then not
class Stack:
    def __init__(self):
        self.a = []
    def push(self, v):
        self.a.append(v)
    def __len__(self):
        return len(self.a)
def f():
    return Stack()
--- test
s = f()
assert not s
s.push(1)
assert s and len(s) == 1
## class, str, repr and format
class A:
    def __str__(self):
        return 'text'
    def __repr__(self):
        return 'A()'
def f():
    return A()
--- test
assert str(f()) == 'text' and repr(f()) == 'A()' and f'{f()}' == 'text' and '%s' % f() == 'text' and repr([f()]) == '[A()]'
## class, a format of its own
class A:
    def __format__(self, spec):
        return f'<{spec}>'
def f():
    return A()
--- test
assert f'{f():>5}' == '<>5>' and format(f(), 'x') == '<x>'
## class, conversions
class A:
    def __int__(self):
        return 7
    def __float__(self):
        return 1.5
    def __index__(self):
        return 2
    def __round__(self, n=0):
        return 3
def f():
    return A()
--- test
assert int(f()) == 7 and float(f()) == 1.5 and round(f()) == 3 and [0, 1, 2][f()] == 2
## class, called
class A:
    def __call__(self, x, *, y=1):
        return x + y
f = A()
--- test
assert f(1) == 2 and f(1, y=5) == 6 and callable(f)
## class, context manager
class A:
    log = []
    def __enter__(self):
        self.log.append('in')
        return self
    def __exit__(self, *a):
        self.log.append('out')
        return True
def f():
    return A()
--- test
with f() as a:
    raise ValueError
assert a.log == ['in', 'out']
## class, iterator
class Count:
    def __init__(self, n):
        self.n = n
    def __iter__(self):
        return self
    def __next__(self):
        if self.n == 0:
            raise StopIteration
        self.n -= 1
        return self.n
def f(n):
    return Count(n)
--- test
assert list(f(3)) == [2, 1, 0] and next(f(5)) == 4 and sum(f(4)) == 6
## class, derived by the test
class Base:
    def area(self):
        return 0
    def show(self):
        return f'area {self.area()}'
def f(x):
    return x.show()
--- test
class Square(Base):
    def area(self):
        return 4
assert Square().show() == 'area 4' and f(Square()) == 'area 4'
## class, abstract
from abc import ABC, abstractmethod
class A(ABC):
    @abstractmethod
    def g(self):
        pass
class B(A):
    def g(self):
        return 1
def f():
    return B().g()
--- test
try:
    A()
    assert False
except TypeError:
    pass
assert f() == 1 and B().g() == 1
## class, a linked list that is walked
class Node:
    def __init__(self, v, next=None):
        self.v, self.next = v, next
def f(a):
    head = None
    for v in reversed(a):
        head = Node(v, head)
    return head
--- test
n, out = f([1, 2, 3]), []
while n:
    out.append(n.v)
    n = n.next
assert out == [1, 2, 3]
## class, linked by the test into a cycle
class Node:
    def __init__(self, v):
        self.v, self.next = v, None
def f(n):
    seen = []
    while n not in seen:
        seen.append(n)
        n = n.next
    return len(seen)
--- test
a, b = Node(1), Node(2)
a.next, b.next = b, a
assert f(a) == 2 and a.next.next is a and a.next == b
## exception, caught with its arguments
def f(x):
    raise ValueError('bad', x)
--- test
try:
    f(3)
    assert False
except ValueError as e:
    assert e.args == ('bad', 3) and str(e) == "('bad', 3)" and isinstance(e, Exception)
## exception, every usual kind
def f(k):
    if k == 0: return 1 / 0
    if k == 1: return [][1]
    if k == 2: return {}['k']
    if k == 3: return int('x')
    if k == 4: return None.x
    if k == 5: return 'a' + 1
    if k == 6: return undefined
    if k == 7: return open('/nothing')
    if k == 8: return f(8)
    if k == 9: raise NotImplementedError
    if k == 10: return b'\xff'.decode()
    if k == 11: raise StopIteration
    if k == 12: return 10.0 ** 400
    if k == 13: import no_such_module
--- test
KINDS = [ZeroDivisionError, IndexError, KeyError, ValueError, AttributeError, TypeError, NameError, FileNotFoundError, RecursionError, NotImplementedError, UnicodeDecodeError, StopIteration, OverflowError, ModuleNotFoundError]
for k, kind in enumerate(KINDS):
    try:
        f(k)
    except kind as e:
        assert type(e) is kind
    else:
        assert False, k
## exception, messages
def f(k):
    return [[], {}, 'a'][k][5]
--- test
for k, text in enumerate(['list index out of range', '5', 'string index out of range']):
    try:
        f(k)
        assert False
    except Exception as e:
        assert str(e) == text
## exception, raises helper
def f(x):
    if x < 0:
        raise ValueError('negative')
    return x
--- setup
def raises(kind, g, *a):
    try:
        g(*a)
    except kind:
        return True
    return False
--- test
assert raises(ValueError, f, -1) and not raises(ValueError, f, 1)
## exception, not raised where expected
def f(x):
    return x
--- test
try:
    f(-1)
    assert False
except ValueError:
    pass
## exception, of its own class below KeyError
class Bad(KeyError):
    pass
def f():
    raise Bad('x')
--- test
try:
    f()
    assert False
except KeyError as e:
    assert e.args == ('x',) and type(e).__name__ == 'Bad'
## exception, of its own class by name
class Bad(Exception):
    pass
def f():
    raise Bad('x')
--- test
try:
    f()
    assert False
except Bad as e:
    assert str(e) == 'x'
## exception, with attributes and a text of its own
class Bad(Exception):
    def __init__(self, code):
        self.code = code
    def __str__(self):
        return f'code {self.code}'
def f():
    raise Bad(7)
--- test
try:
    f()
    assert False
except Exception as e:
    assert str(e) == 'code 7'
    assert e.code == 7
## exception, its cause
def f():
    try:
        1 / 0
    except ZeroDivisionError as e:
        raise ValueError('x') from e
--- test
try:
    f()
    assert False
except ValueError as e:
    assert isinstance(e.__cause__, ZeroDivisionError)
## exception, returned
def f():
    return ValueError('x')
--- test
e = f()
assert e.args == ('x',)
assert isinstance(e, ValueError) and str(e) == 'x'
## exception, raised by the test
class Bad(Exception):
    pass
def f(g):
    try:
        g()
    except Bad:
        return 'caught'
--- test
def g():
    raise Bad
assert f(g) == 'caught'
## exception, SystemExit caught
import sys
def f():
    sys.exit(3)
--- test
try:
    f()
    assert False
except SystemExit as e:
    assert e.code == 3
## exception, KeyboardInterrupt caught
def f():
    raise KeyboardInterrupt
--- test
try:
    f()
    assert False
except KeyboardInterrupt:
    pass
## exception, TimeoutError caught and then not
def f(x):
    raise TimeoutError('late')
--- test
try:
    f(1)
    assert False
except TimeoutError:
    pass
--- test
f(1)
## exception, ends a map
def f(x):
    raise StopIteration
--- test
assert list(map(f, [1, 2])) == []
## exception, group
def f():
    raise ExceptionGroup('g', [ValueError(1), TypeError(2)])
--- test
try:
    f()
    assert False
except ExceptionGroup as e:
    assert len(e.exceptions) == 2
## exception, an assertion of the program's own
def f(x):
    assert x > 0, 'positive'
    return x
--- test
try:
    f(-1)
    ok = False
except AssertionError as e:
    ok = str(e) == 'positive'
assert ok and f(1) == 1
## test, imports and helpers
def f(x):
    return x ** 0.5
--- test
import math
from math import sqrt as root
def close(a, b, eps=1e-9):
    return abs(a - b) < eps
assert math.isclose(f(2), math.sqrt(2)) and close(f(3), root(3))
## test, the setup's import reaches the program
def f(x):
    return math.floor(x)
--- setup
import math
--- test
assert f(2.5) == 2
## test, the setup's constant reaches the program
def f(x):
    return x % MOD
--- setup
MOD = 7
--- test
assert f(9) == 2
## test, the setup's helper reaches the program
def f(x):
    return helper(x) + 1
--- setup
def helper(x):
    return x * 2
--- test
assert f(2) == 5
## test, imports a module that the program uses
def f(x):
    return json.dumps(x)
--- test
import json
assert f([1]) == '[1]'
## test, loops over cases
def f(x):
    return x * 2
--- test
for x, want in [(1, 2), ('a', 'aa'), ([1], [1, 1])]:
    assert f(x) == want, f'{x!r}'
assert all(f(i) == i * 2 for i in range(50)) and not any(f(i) == 1 for i in range(9))
i = 0
while i < 5:
    assert f(i) == i + i
    i += 1
## test, lambdas and comprehensions
def f(a):
    return sorted(a, key=lambda p: p[1])
--- test
check = lambda got, want: got == want
assert check(f([(1, 2), (2, 1)]), [(2, 1), (1, 2)]) and {k: v for k, v in f([(1, 2)])} == {1: 2} and [*map(tuple, f([[1, 2]]))] == [(1, 2)]
## test, operators of every kind
def f(x):
    return x
--- test
assert 1 < f(2) < 3 and f(2) in (1, 2) and f(2) not in [3] and f(None) is None and f(1) is not None and not f(0)
assert f('abc')[1:] == 'bc' and f([1, 2, 3])[::-1] == [3, 2, 1] and f('a') * 2 == 'aa' and f(7) // 2 == 3 and -f(1) == -1
assert len(f('abc')) == 3 and sum(f([1, 2])) == 3 and sorted(f('ba')) == ['a', 'b'] and set(f([1, 1])) == {1} and max(f([1, 2])) == 2
assert str(f(1)) == '1' and repr(f('a')) == "'a'" and isinstance(f(1), int) and type(f('')) == str and f(5) & 4 == 4 and f(1) or False
assert f({'a': 1}).get('b', 0) == 0 and f('a,b').split(',') == ['a', 'b'] and f([3]).index(3) == 0 and '{:.2f}'.format(f(1.5)) == '1.50'
## test, unittest assertions
def f(x):
    return x
--- test
import unittest
t = unittest.TestCase()
t.assertEqual(f(1), 1)
t.assertAlmostEqual(f(0.1 + 0.2), 0.3)
t.assertCountEqual(f([2, 1]), [1, 2])
with t.assertRaises(TypeError):
    f()
## test, prints and formatted messages
def f(x):
    return x
--- test
print(f(1))
assert f(1) == 1, f'got {f(1)}'
## test, an assertion whose message calls the program
def f(x):
    return 1
--- test
assert f(1) == 2, f'{f(1)} {undefined}'
## test, what the program prints
def f():
    print('hello')
--- test
import io, contextlib
out = io.StringIO()
with contextlib.redirect_stdout(out):
    f()
assert out.getvalue() == 'hello\n'
## test, what the program reads
def f():
    return int(input()) * 2
--- test
import builtins
builtins.input = lambda *a: '4'
assert f() == 8
## test, standard input is empty
def f():
    try:
        return input()
    except EOFError:
        return 'end'
--- test
assert f() == 'end'
## test, seeds the random numbers
import random
def f():
    return random.randint(1, 10 ** 9)
--- test
import random
random.seed(1)
a = f()
random.seed(1)
assert f() == a and a == random.Random(1).randint(1, 10 ** 9)
## test, patches a name of the program
def helper():
    return 1
def f():
    return helper()
--- test
helper = lambda: 5
assert f() == 5
## test, patches a module
import time
def f():
    return time.time()
--- test
import time
from unittest.mock import patch
with patch('time.time', lambda: 5.0):
    assert f() == 5.0
## test, a file between test and program
def f(path):
    return open(path).read()
--- test
with open('a.txt', 'w') as o:
    o.write('hi')
assert f('a.txt') == 'hi'
## test, the environment
import os
def f():
    return os.environ.get('FRACTAL_X')
--- test
import os
os.environ['FRACTAL_X'] = '1'
assert f() == '1'
## test, globals and eval
def f(x):
    return x + 1
def g(x):
    return f(x)
--- test
assert eval('f(1)') == 2 and globals()['f'](2) == 3 and 'f' in globals()
assert eval('g(1)') == 2 and globals()['g'](2) == 3
## test, the program's global number
count = 0
def f():
    global count
    count += 1
--- test
f()
f()
assert count == 2
## test, the program's global list
log = []
def f(x):
    log.append(x)
--- test
f(1)
assert log == [1]
--- test
f(2)
assert log == [1, 2] and len(log) == 2
## test, sets the program's global
limit = 1
def f():
    return limit
--- test
limit = 9
assert f() == 9
## test, clears the program's global list
log = []
def f(x):
    log.append(x)
    return len(log)
--- test
assert f(1) == 1
log.clear()
assert f(1) == 1
## test, coroutine run by the test
async def f(x):
    return x + 1
--- test
import asyncio
assert asyncio.run(f(1)) == 2
## test, names equal to helpers of the test
def check(x):
    return 'program'
def cases():
    return 3
def f(x):
    return check(x)
--- test
def verify(got, want):
    return got == want
assert verify(f(1), 'program') and cases() == 3
## test, redefines a helper of the program
def check(x):
    return 'program'
def f(x):
    return check(x)
--- test
assert f(1) == 'program'
def check(x):
    return 'test'
assert f(1) == 'test'
## test, the program shadows a built-in
def sorted(a):
    return 'mine'
def f(a):
    return sorted(a)
--- test
assert f([1]) == 'mine' and sorted([2]) == 'mine'
## test, the program's entry point is a built-in's name
def sum(a, b):
    return a + b
def f(a):
    return sum(a, 1)
--- test
assert sum(1, 2) == 3 and f(1) == 2
## state, kept between tests
n = 0
def f():
    global n
    n += 1
    return n
--- test
assert f() == 1
--- test
assert f() == 2 and f() == 3
## state, a name of one test in the next
def f(x):
    return x
--- test
y = f(5)
--- test
assert y == 5
## state, a mutable default
def f(x, a=[]):
    a.append(x)
    return a
--- test
assert f(1) == [1]
assert f(2) == [1, 2]
## state, a closure's counter
def make():
    n = 0
    def inc():
        nonlocal n
        n += 1
        return n
    return inc
f = make()
--- test
assert f() == 1 and f() == 2
c = make()
assert c() == 1 and c() == 2 and f() == 3
## run, threads and locks and queues
import threading, queue
def f(n):
    q, lock, out = queue.Queue(), threading.Lock(), []
    def work():
        while True:
            v = q.get()
            if v is None:
                return
            with lock:
                out.append(v * v)
    ts = [threading.Thread(target=work) for _ in range(4)]
    for t in ts: t.start()
    for v in range(n): q.put(v)
    for t in ts: q.put(None)
    for t in ts: t.join()
    return sorted(out)
--- test
assert f(5) == [0, 1, 4, 9, 16]
## run, a pool of threads
from concurrent.futures import ThreadPoolExecutor
def f(a):
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda v: v + 1, a))
--- test
assert f([1, 2]) == [2, 3]
## run, processes
from concurrent.futures import ProcessPoolExecutor
def f(a):
    with ProcessPoolExecutor(1) as pool:
        return list(pool.map(abs, a))
--- test
assert f([-1]) == [1]
## run, subprocess
import subprocess, sys
def f():
    return subprocess.run(['echo', 'hi'], capture_output=True, text=True).stdout
--- test
assert f() == 'hi\n'
## run, recursion to 900
def f(n):
    return 0 if n == 0 else 1 + f(n - 1)
--- test
assert f(900) == 900
## run, recursion to 980
def f(n):
    return 0 if n == 0 else 1 + f(n - 1)
--- test
assert f(980) == 980
## run, recursion to 1100 is too deep
def f(n):
    return 0 if n == 0 else 1 + f(n - 1)
--- test
assert f(1100) == 1100
## run, recursion with the limit raised
import sys
sys.setrecursionlimit(10000)
def f(n):
    return 0 if n == 0 else 1 + f(n - 1)
--- test
assert f(5000) == 5000
## run, a main block with input
def f(x):
    return x
if __name__ == '__main__':
    f(int(input()))
    raise SystemExit
--- test
assert f(1) == 1
## run, input at import
n = int(input())
def f(x):
    return x
--- test
assert f(1) == 1
## run, prints a lot
print('x' * 100000)
def f(x):
    for i in range(1000):
        print(i, end=' ')
    print(flush=True)
    return x
--- test
assert f(1) == 1
## run, writes to the streams
import sys
def f(x):
    sys.stdout.write('a')
    sys.stderr.write('b')
    print('c', file=sys.stderr)
    return x
--- test
assert f(1) == 1
## run, type hints of every kind
from __future__ import annotations
from typing import Optional, List, Dict, Callable, TypeVar, Generic, Any, Union
T = TypeVar('T')
class Box(Generic[T]):
    def __init__(self, v: T) -> None:
        self.v = v
def f(x: Optional[List[int]] = None, g: Callable[[int], int] | None = None) -> Dict[str, Any]:
    y: int = 1
    return {'x': x, 'y': y}
--- test
assert f([1]) == {'x': [1], 'y': 1} and f() == {'x': None, 'y': 1} and Box(3).v == 3
## run, dataclass under future annotations
from __future__ import annotations
from dataclasses import dataclass, field
@dataclass
class P:
    x: int
    y: list[int] = field(default_factory=list)
def f():
    return P(1).x
--- test
assert f() == 1
## run, typing.get_type_hints
from __future__ import annotations
import typing
class A:
    x: B
class B:
    pass
def f():
    return typing.get_type_hints(A)['x'] is B
--- test
assert f()
## run, decorators
import functools
def twice(g):
    @functools.wraps(g)
    def inner(*a, **k):
        return g(*a, **k) * 2
    return inner
def times(n):
    return lambda g: lambda *a: g(*a) * n
@times(3)
@twice
def f(x):
    return x
--- test
assert f(1) == 6
## run, asyncio
import asyncio
async def g(x):
    await asyncio.sleep(0)
    return x + 1
def f(x):
    return asyncio.run(g(x))
--- test
assert f(1) == 2
## run, a coroutine driven by hand
async def g(x):
    return x + 1
def f(x):
    try:
        g(x).send(None)
    except StopIteration as e:
        return e.value
--- test
assert f(1) == 2
## run, context managers
from contextlib import contextmanager, suppress, ExitStack
@contextmanager
def cm(log):
    log.append('in')
    try:
        yield 5
    finally:
        log.append('out')
def f():
    log = []
    with cm(log) as v, suppress(ValueError):
        log.append(v)
        raise ValueError
    return log
--- test
assert f() == ['in', 5, 'out']
## run, star imports
from math import *
from collections import *
from itertools import *
from typing import *
def f(x):
    return sqrt(x), Counter('a'), list(chain([1], [2]))
--- test
assert f(4) == (2.0, {'a': 1}, [1, 2]) and floor(2.5) == 2
## run, walrus, match, f-strings
def f(x):
    match x:
        case [a, *rest] if (n := len(rest)) > 1:
            return f'{a=} {n!r:>3} {rest}'
        case {'k': v, **other}:
            return f'{v:05.1f}{other}'
        case str() | bytes():
            return 'text'
        case int(y) if y > 3:
            return y
        case None:
            return 'none'
        case _:
            return 'else'
--- test
assert [f(v) for v in ([1, 2, 3], {'k': 2, 'z': 1}, 'a', 7, None, 2.5)] == ['a=1   2 [2, 3]', "002.0{'z': 1}", 'text', 7, 'none', 'else']
## run, a loop of three million
def f(n):
    s = 0
    for i in range(n):
        s += i & 1
    return s
--- test
assert f(3_000_000) == 1_500_000
## run, string formatting
def f(x):
    return ['%5.2f|%-5s|%05d|%x' % (x, 'a', 7, 255), '{:>10,}'.format(1234567), f'{x!r:^10}', '{0[a]} {1.real}'.format({'a': 1}, 2), f'{1e10:g}', f'{0.5:%}']
--- test
assert f(1.5) == [' 1.50|a    |00007|ff', ' 1,234,567', '   1.5    ', '1 2', '1e+10', '50.000000%']
## run, regular expressions
import re
def f(s):
    return re.sub(r'(\w+) (\w+)', r'\2 \1', s), re.findall(r'(?i)a(.)', s), re.split(r'\s+', s), [m.start() for m in re.finditer('a', s)], re.fullmatch(r'[\w ]+', s) is not None
--- test
assert f('ab ac') == ('ac ab', ['b', 'c'], ['ab', 'ac'], [0, 3], True)
## run, random with a seed
import random
def f(seed):
    random.seed(seed)
    r = random.Random(seed)
    return random.random() == r.random(), random.choice([1, 2, 3]) in (1, 2, 3), sorted(random.sample(range(9), 9)) == list(range(9))
--- test
assert f(1) == (True, True, True)
random_value = f(5)
assert random_value == f(5)
## run, time
import time, datetime
def f():
    a = time.time()
    time.sleep(0.01)
    return time.time() - a > 0.005, time.perf_counter() > 0, datetime.datetime.now().year > 2000, time.strftime('%Y', time.gmtime(0))
--- test
assert f() == (True, True, True, '1970')
## run, sys.getsizeof
import sys
def f(x):
    return sys.getsizeof(x)
--- test
import sys
assert f([]) == sys.getsizeof([]) and f('a') == sys.getsizeof('a') and f((1, 2)) == sys.getsizeof((1, 2)) and f({}) == sys.getsizeof({})
## run, the limit of digits, str
def f(n):
    return str(10 ** n)
--- test
assert len(f(4000)) == 4001
try:
    f(5000)
    ok = False
except ValueError:
    ok = True
assert ok
## run, the limit of digits, program fails
def f(n):
    return len(str(10 ** n))
--- test
assert f(5000) == 5001
## run, the limit of digits, int
def f(n):
    return int('9' * n)
--- test
try:
    f(5000)
    assert False
except ValueError:
    pass
## run, the limit of digits, raised by the program
import sys
sys.set_int_max_str_digits(0)
def f(n):
    return len(str(10 ** n))
--- test
assert f(5000) == 5001
## run, the limit of digits, in the test
def f(n):
    return 10 ** n
--- test
assert f(5000) == 10 ** 5000
assert len(str(f(5000))) == 5001
## run, pickle and copy of its own objects
import copy
class P:
    def __init__(self, x):
        self.x = x
def f():
    return copy.deepcopy([P(1)])[0].x
--- test
assert f() == 1
## run, pickle of its own objects
import pickle
class P:
    x = 1
def f():
    return pickle.loads(pickle.dumps(P())).x
--- test
assert f() == 1
## run, the test copies
def f():
    return {'a': [1]}
--- test
import copy, json
x = f()
y = copy.deepcopy(x)
y['a'].append(2)
assert x == {'a': [1]} and json.dumps(f()) == '{"a": [1]}'
## run, the test copies an object
class P:
    def __init__(self):
        self.x = [1]
def f():
    return P()
--- test
import copy
p = f()
q = copy.copy(p)
assert q is not p and q.x == [1]
## run, its name
def f():
    return __name__
--- test
assert f() != '__main__'
## run, its names
def f():
    return [n for n in globals() if not n.startswith('__')]
--- test
assert f() == ['f']
## run, its frames
import inspect
def f():
    return inspect.currentframe().f_code.co_name
--- test
assert f() == 'f'
## run, its source
import inspect
def f():
    try:
        return inspect.getsource(f)
    except OSError:
        return 'none'
--- test
assert f() == 'none'
## run, __file__
def f():
    try:
        return __file__
    except NameError:
        return 'none'
--- test
assert f() == 'none'
## run, command line
import sys
def f():
    return len(sys.argv)
--- test
assert f() >= 1
## run, argparse in a main
import argparse
def f(a):
    p = argparse.ArgumentParser()
    p.add_argument('--n', type=int, default=3)
    return p.parse_args(a).n
--- test
assert f([]) == 3 and f(['--n', '5']) == 5
## run, logging and warnings
import logging, warnings
logging.basicConfig(level=logging.INFO)
def f(x):
    logging.info('x')
    warnings.warn('y')
    return x
--- test
assert f(1) == 1
## run, writes and reads a file
import os, tempfile
def f():
    with open('a', 'w') as o:
        o.write('hi')
    with tempfile.TemporaryFile('w+') as t:
        t.write('x')
    try:
        return open('a').read()
    finally:
        os.remove('a')
--- test
assert f() == 'hi'
## run, sqlite
import sqlite3
def f():
    c = sqlite3.connect(':memory:')
    c.execute('create table t (a int)')
    c.execute('insert into t values (7)')
    return c.execute('select a from t').fetchall()
--- test
assert f() == [(7,)]
## run, zlib, hashlib, base64, struct, csv, uuid
import base64, csv, hashlib, io, struct, uuid, zlib
def f():
    return (zlib.decompress(zlib.compress(b'a')), hashlib.md5(b'a').hexdigest()[:4], base64.b64encode(b'a'), struct.pack('>H', 1), list(csv.reader(io.StringIO('1,2'))), uuid.UUID(int=1).hex[-1])
--- test
assert f() == (b'a', '0cc1', b'YQ==', b'\x00\x01', [['1', '2']], '1')
## run, numpy is not there
def f():
    import numpy_is_not_here
--- test
f()
## run, statistics, heapq, bisect, itertools
import statistics, heapq, bisect, itertools, operator, string, textwrap
def f(a):
    heapq.heapify(a)
    return statistics.mean([1, 2]), heapq.heappop(a), bisect.bisect([1, 3], 2), list(itertools.accumulate([1, 2, 3], operator.mul)), textwrap.fill('a b', 1)
--- test
a = [3, 1, 2]
assert f(a) == (1.5, 1, 1, [1, 2, 6], 'a\nb') and a == [2, 3]
## run, a finalizer
log = []
class A:
    def __del__(self):
        log.append(1)
def f():
    A()
    return len(log)
--- test
assert f() == 1
## run, metaclass, slots, descriptors
class M(type):
    def __call__(cls, *a):
        o = super().__call__(*a)
        o.made = True
        return o
class D:
    def __get__(self, o, t):
        return 5
class A(metaclass=M):
    __slots__ = ('made', 'y')
    d = D()
def f():
    return A()
--- test
assert f().made and f().d == 5
try:
    f().z = 1
    assert False
except AttributeError:
    pass
## run, non-ASCII names
def größe(x):
    return x
π = 3
def f(x):
    return größe(x) + π
--- test
assert f(1) == 4 and größe(2) == 2
## run, names that are normalised
def ﬁ(x):
    return x
def f(x):
    return fi(x)
--- test
assert f(1) == 1
## run, a chain of exceptions in finally
def f():
    out = []
    for i in range(3):
        try:
            if i == 1:
                continue
            out.append(i)
        finally:
            out.append('f')
    else:
        out.append('else')
    return out
--- test
assert f() == [0, 'f', 'f', 2, 'f', 'else']
## run, unpacking and starred
def f(*a, **k):
    first, *mid, last = a
    return first, mid, last, {**k, 'x': 1}, [*mid, *mid]
--- test
assert f(1, 2, 3, 4, y=2) == (1, [2, 3], 4, {'y': 2, 'x': 1}, [2, 3, 2, 3])
## run, order of a set of small integers
def f(a):
    return list(set(a))
--- test
assert f([3, 1, 2]) == [1, 2, 3]
## run, hash of numbers
def f(x):
    return hash(x)
--- test
assert f(5) == 5 and f(2 ** 61 - 1) == 0 and f((1, 2)) == hash((1, 2)) and f(0.5) == hash(0.5)
## run, object ids differ
def f():
    return id([]), id({})
--- test
assert f()[0] != f()[1] and all(type(v) is int for v in f())
## run, wrong by one test of three
def f(x):
    return x * 2 if x < 10 else 0
--- test
assert f(1) == 2
--- test
assert f(2) == 4
--- test
assert f(10) == 20
## run, a syntax error
def f(x)
    return x
--- test
assert f(1) == 1
## run, an error at import after the definition
def f(x):
    return x
1 / 0
--- test
assert f(1) == 1
## run, sys.exit at import after the definition
import sys
def f(x):
    return x
sys.exit()
--- test
assert f(1) == 1
## run, the entry point is missing
import math
--- test
assert f(1) == 2
## run, the entry point is defined twice
def f(x):
    return 0
def f(x):
    return x
--- test
assert f(1) == 1
## run, nested functions and globals
x = 1
def f():
    x = 2
    def g():
        global x
        x += 10
        return x
    return x, g(), globals()['x']
--- test
assert f() == (2, 11, 11)
## run, exec and eval in the program
def f(s):
    ns = {}
    exec(s, ns)
    return eval('a + 1', ns)
--- test
assert f('a = 1') == 2
## run, a tree printed
class Tree:
    def __init__(self, v, *kids):
        self.v, self.kids = v, list(kids)
    def __repr__(self):
        return f'({self.v}{"".join(map(repr, self.kids))})'
def f(t):
    t.kids.reverse()
    for k in t.kids:
        f(k)
    return t
--- test
assert repr(f(Tree(1, Tree(2), Tree(3)))) == '(1(3)(2))' and str(Tree(1)) == '(1)'
## run, a test that loops for ever on a wrong program
def f(n):
    return iter(int, 1)
--- test
assert next(f(1)) == 0
''')

HONEST |= {
    "text, no line end": Honest("def f(x):\n    return x", ("assert f(1) == 1",)),
    "text, CRLF": Honest("def f(x):\r\n    s = '''a\r\nb'''\r\n    return x, s\r\n", ("assert f(1) == (1, 'a\\nb')",)),
    "text, old Mac line ends": Honest("def f(x):\r    return x\r", ("assert f(1) == 1",)),
    "text, tabs": Honest("def f(x):\n\tif x:\n\t\treturn x\n\treturn 0\n", ("assert f(1) == 1",)),
    "text, tabs and spaces mixed": Honest("def f(x):\n\tif x:\n        return x\n", ("assert f(1) == 1",)),
    "text, form feed": Honest("\f\ndef f(x):\n    return x\n", ("assert f(1) == 1",)),
    "text, byte order mark": Honest("\ufeffdef f(x):\n    return x\n", ("assert f(1) == 1",)),
    "text, no-break space": Honest("def f(x):\n\u00a0   return x\n", ("assert f(1) == 1",)),
    "text, coding line": Honest("# -*- coding: latin-1 -*-\ndef f(x):\n    return 'é'\n", ("assert f(1) == 'é'",)),
    "text, NUL": Honest("def f(x):\n    return x\n\0", ("assert f(1) == 1",)),
    "text, lone surrogate": Honest("def f(x):\n    return '\ud800'\n", ("assert len(f(1)) == 1",)),
    "text, a docstring and nothing": Honest('"""Doc."""\n', ("assert f(1) == 1",)),
    "text, a very long line": Honest("def f(x):\n    return " + "x + " * 500 + "0\n", ("assert f(1) == 500",)),
    "text, a hundred brackets": Honest("def f(x):\n    return " + "(" * 100 + "x" + ")" * 100 + "\n", ("assert f(1) == 1",)),
    "text, semicolons": Honest("import math; f = lambda x: math.floor(x); y = 1", ("assert f(1.5) == 1",)),
    "text, continuation at the end": Honest("def f(x):\n    return x\n\\", ("assert f(1) == 1",)),
}

# fmt: on
# Where the sandbox differs from plain evaluation: {why: names}.
DIFFERENCES: dict[str, list[str]] = {
    "values are copied: an argument's identity, aliases and later changes are lost": [
        "argument, the same list twice",
        "argument, a list and a list that holds it",
        "argument, aliased rows",
        "argument, returned itself",
        "argument, returned and changed later",
        "argument, kept by the program",
        "argument, kept by an object",
        "argument, changed by the test between calls",
        "argument, NaN by identity",
        "argument, a callback that changes its argument",
    ],
    "values are copied: a result's identity and aliases are lost": [
        "result, aliased rows",
        "result, a global that the test changes",
        "result, the same list each time",
    ],
    "a defaultdict crosses without its factory, a dict subclass without its methods": [
        "argument, OrderedDict and defaultdict and Counter",
        "result, defaultdict asked for a missing key",
        "result, dict subclass with __missing__",
    ],
    "an iterator that a test passes is drawn to its end first": [
        "argument, an iterator drawn in part",
        "argument, an iterator without end",
        "argument, a file of strings",
    ],
    "a test can pass plain values, its own functions and iterators only": [
        "argument, functions of modules and methods",
        "argument, methods",
        "argument, a partial",
        "argument, a list of the program's own objects",
        "argument, the test's own objects",
        "argument, a compiled pattern",
    ],
    "an exception that crosses as a value is a stand-in": [
        "argument, a class",
        "exception, returned",
    ],
    "a subclass of a plain type crosses as the plain value": [
        "result, namedtuple replaced, and its type",
        "result, typing.NamedTuple with a method",
        "result, IntEnum with its name",
        "result, str subclass",
        "result, str subclass with a __str__ of its own",
        "result, list and dict subclasses with methods",
    ],
    "stand-ins equal only themselves and take no part in comparison": [
        "result, dataclass compared",
        "result, memoryview compared",
        "result, array",
        "result, a UserDict and a ChainMap",
        "result, SimpleNamespace",
        "class, compared with an __eq__ of its own",
        "class, ordered",
    ],
    "the decimal context of the program is not the test's": [
        "result, Decimal with a precision of its own",
    ],
    "a time zone's name is lost": [
        "result, a time zone with a name",
    ],
    "a generator is drawn in batches, ahead of the test": [
        "result, generator with next and then send",
        "result, generator that raises after three",
        "result, generator whose later elements never come",
        "result, generator that notes how far it got",
    ],
    "StopIteration of a call is a RuntimeError: it would end the test's own loop over the calls, and pass": [
        "exception, every usual kind",
        "exception, ends a map",
    ],
    "StopIteration's value is lost": [
        "result, generator throws and returns",
    ],
    "a stand-in has every method: callable, iterable, never of a built-in class": [
        "result, a generator is a generator",
        "result, not callable",
    ],
    "special attributes of a stand-in are not asked for": [
        "result, a function's attributes",
        "result, a function's signature",
        "run, the test copies an object",
    ],
    "types that are not shared by name are stand-ins, and a stand-in's type is StandIn": [
        "result, types",
        "result, a type of the program's",
    ],
    "a value of more than 64 MiB, in a frame of its own, is an error": [
        "result, 70 MB of text",
    ],
    "special methods of the program's objects are not called: del, in, arithmetic, format, int(), with": [
        "class, attributes deleted and asked for",
        "class, arithmetic",
        "class, containers with __contains__ and __delitem__",
        "class, a format of its own",
        "class, conversions",
        "class, context manager",
    ],
    "a stand-in is true or false as it was when it was first seen": [
        "class, true or false",
        "class, empty and then not",
    ],
    "a test cannot derive from a class of the program's": [
        "class, derived by the test",
    ],
    "exceptions of the program's own classes lose attributes and cause; groups and KeyboardInterrupt are not caught": [
        "exception, with attributes and a text of its own",
        "exception, its cause",
        "exception, KeyboardInterrupt caught",
        "exception, group",
    ],
    "sys.exit in a call is `crashed`, whatever the test catches": [
        "exception, SystemExit caught",
    ],
    "only imports of the setup reach the program, no other names of setup and tests": [
        "test, the setup's constant reaches the program",
        "test, the setup's helper reaches the program",
        "test, imports a module that the program uses",
        "test, patches a name of the program",
        "test, sets the program's global",
        "test, redefines a helper of the program",
    ],
    "the program runs in another process: streams, modules, files, environment and random state are not the test's": [
        "test, what the program prints",
        "test, what the program reads",
        "test, seeds the random numbers",
        "test, patches a module",
        "test, a file between test and program",
        "test, the environment",
    ],
    "only names that stand in the tests' code are asked for": [
        "test, globals and eval",
    ],
    "what a test changes in a mutable global does not reach the program": [
        "test, clears the program's global list",
    ],
    "a coroutine is a stand-in": [
        "test, coroutine run by the test",
    ],
    "forbidden: new processes, and the socket pair that asyncio needs": [
        "run, processes",
        "run, subprocess",
        "run, asyncio",
    ],
}
KNOWN: dict[str, str] = {name: why for why, names in DIFFERENCES.items() for name in names}
