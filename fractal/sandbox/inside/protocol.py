"""Frames and plain values: what crosses between host, judge and candidate. Standard library only; used at every end.

A frame is a 4-byte big-endian length and that many bytes. Between host, supervisor and judges its body is a kind (one
byte), for some kinds a fixed head, and JSON: the supervisor passes most bodies on without looking into them. Between
judge and candidate it is JSON alone, in which every type that JSON lacks is an object with one tag ({"t": [...]} is a
tuple). Decoding builds exact built-in values and nothing else: it cannot run code, look up attributes or import. What
is not plain crosses as a reference to an object that stays at its owner.
"""

import array
import collections
import datetime
import decimal
import fractions
import json
import operator
import re
import struct
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fractal.sandbox.inside import arrays, set_order

HEADER = struct.Struct(">I")
MAX_FRAME = 64 << 20  # bytes; room for a result of 50 MB, small enough for a judge per core
MAX_DEPTH = 200  # nested containers in one value
MAX_ITEMS = 5_000_000  # containers' elements in one value
CANDIDATE_THREADS = 32  # of one program
JUDGE_MEMORY = 1280 << 20  # bytes of address space: what a candidate sends must not exhaust the container
ORDERED = frozenset({int, float, str, bytes, tuple, bool, type(None)})  # what sets hold that keep their order
MAX_ORDERED = 1000  # elements of a set of which another way to build it is looked for
BIG_INT = 1 << 256  # larger integers cross in hexadecimal: decimal conversion is quadratic
# Callables that both ends have: they cross by name, so that a test can pass max or str as an argument.
SHARED_CALLABLES = frozenset(
    "abs all any ascii bin bool bytearray bytes callable chr complex dict divmod enumerate filter float format "
    "frozenset hash hex int isinstance issubclass iter len list map max min next object oct ord pow print range repr "
    "reversed round set slice sorted str sum tuple type zip".split()
)
# Exception classes that a test may catch: they cross by name, a class of the program's own as its nearest one here.
EXCEPTIONS: dict[str, type[BaseException]] = {
    name: value
    for name, value in vars(__import__("builtins")).items()
    if isinstance(value, type) and issubclass(value, Exception)
}


FACTORIES = ("list", "dict", "set", "tuple", "str", "int", "float", "bool")  # of a dataclass's field, for both ends
SHARED = SHARED_CALLABLES | EXCEPTIONS.keys()

# Kinds of frames between host, supervisor and judges.
PROBLEM = b"P"  # key, JSON: a problem that later samples name by its key
SAMPLE = b"S"  # id, key, wall limit, alone, JSON: a program to judge
FORGET = b"F"  # all problems sent so far
CANCEL = b"C"  # ids, 8 bytes each: samples whose verdicts nobody waits for any more
VERDICT = b"V"  # id, JSON
READY = b"R"  # JSON: slots, and what the check from inside found
ALIVE = b"A"  # nothing: the supervisor lives, though no verdict is due
KEY_BYTES = 16
SAMPLE_HEAD = struct.Struct(
    ">cQ16sd?"
)  # kind, id, problem's key, wall limit in seconds, whether nothing may run beside
VERDICT_HEAD = struct.Struct(">cQ")  # kind, id


class ProtocolError(Exception):
    """The other end sent what no honest end sends."""


class Unencodable(Exception):
    """A value is too large, too deep, or not plain."""


class ConnectionClosedError(Exception):
    """The other end is gone."""


# --- frames ---------------------------------------------------------------------------------------------------------


_dumps = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def frame(body: bytes) -> bytes:
    return HEADER.pack(len(body)) + body


def pack(message: Any, head: bytes = b"") -> bytes:
    """A frame of a head and JSON. Raises Unencodable if it is larger than MAX_FRAME."""
    body = _dumps(message).encode("ascii")
    if len(body) > MAX_FRAME:
        raise Unencodable(f"{len(body)} bytes, at most {MAX_FRAME}")
    return HEADER.pack(len(head) + len(body)) + head + body


_plain_decoder = json.JSONDecoder()


def whole_value(decoder: json.JSONDecoder, text: str) -> Any:
    """The one JSON value that a text is. Raises ValueError for anything before or behind it.

    A third of json.loads's time for a short message: that guesses the encoding and skips white space.
    """
    value, end = decoder.raw_decode(text)
    if end != len(text):
        raise ValueError("more than one value")
    return value


def unpack(body: bytes | bytearray) -> Any:
    """The message of a frame's body, not yet trusted. Raises ProtocolError."""
    try:
        return whole_value(_plain_decoder, body.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not a frame: {error}") from None


class SampleHead(NamedTuple):
    id: int
    key: bytes  # of its problem
    wall_s: float
    alone: bool  # nothing may run beside it


def sample_head(body: bytes) -> SampleHead:
    """Raises ProtocolError."""
    if len(body) < SAMPLE_HEAD.size:
        raise ProtocolError("half a sample")
    return SampleHead(*SAMPLE_HEAD.unpack_from(body)[1:])


def verdict_id(body: bytes) -> int:
    number: int = VERDICT_HEAD.unpack_from(body)[1]
    return number


class FrameBuffer:
    """Bytes in, whole frames out."""

    __slots__ = ("_data", "_limit")

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._data = bytearray()
        self._limit = limit

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that are complete now. Raises ProtocolError when a frame announces more than the limit."""
        if not self._data and len(data) >= HEADER.size:  # most often: exactly one frame, nothing before it
            (size,) = HEADER.unpack_from(data)
            if len(data) == HEADER.size + size:
                return [data[HEADER.size :]]
        self._data += data
        bodies, at = [], 0
        while len(self._data) - at >= HEADER.size:
            (size,) = HEADER.unpack_from(self._data, at)
            if size > self._limit:
                raise ProtocolError(f"a frame of {size} bytes, at most {self._limit}")
            end = at + HEADER.size + size
            if len(self._data) < end:
                break
            bodies.append(bytes(self._data[at + HEADER.size : end]))
            at = end
        if at:
            del self._data[:at]
        return bodies


# --- values ---------------------------------------------------------------------------------------------------------


class Reference:
    """A decoded reference to an object that lives at the other end; the decoder's `resolve` makes a value of it."""

    __slots__ = ("data",)

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data


class Encoder:
    """Values to JSON-ready structures. `refer(value)` answers for what is not plain, with a dict or Unencodable."""

    def __init__(self, refer: Callable[[Any], dict[str, Any]]) -> None:
        self._refer = refer
        self._items = 0

    def encode(self, value: Any) -> Any:
        self._items = 0
        return self._encode(value, 0)

    def _encode(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is str or kind is bool or value is None or kind is float:
            return value
        if kind is int:
            return value if -BIG_INT < value < BIG_INT else {"i": hex(value)}
        if depth >= MAX_DEPTH:
            raise Unencodable("nested too deeply")
        if kind is list:
            return self._all(value, depth)
        if kind is tuple:
            return {"t": self._all(value, depth)}
        if kind is dict:
            return {"d": self.pairs(value, depth)}
        if kind is set:
            return self._set(value, depth)
        encode = ENCODERS.get(kind)
        if encode is not None:
            return encode(self, value, depth)
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return self._named_tuple(value, kind, depth)
        if kind in (type, types.BuiltinFunctionType) and value.__module__ == "builtins" and value.__name__ in SHARED:
            return {"n": value.__name__}
        if (array := arrays.encode(value, lambda elements: self._all(elements, depth))) is not None:
            return array
        base = plain_base(kind)
        if base is not None:
            return self._encode(base(value), depth)
        return self._refer(value)

    def _all(self, values: Iterable[Any], depth: int) -> list[Any]:
        out = [self._encode(value, depth + 1) for value in values]
        self._count(len(out))
        return out

    def _set(self, value: set[Any], depth: int) -> Any:
        """A set by its elements in order, and how else to build it where that would lose the order."""
        order = list(value)
        if len(order) > 1 and ORDERED.issuperset(map(type, order)) and list(set(order)) != order:
            found = set_order.recipe(value, order) if len(order) <= MAX_ORDERED else None
            if found is not None:
                return {"so": [*found[:2], self._all(found[2], depth)]}
        return {"s": self._all(order, depth)}

    def pairs(self, value: dict[Any, Any], depth: int) -> list[Any]:
        out = [[self._encode(k, depth + 1), self._encode(v, depth + 1)] for k, v in value.items()]
        self._count(2 * len(out))
        return out

    def _count(self, number: int) -> None:
        self._items += number
        if self._items > MAX_ITEMS:
            raise Unencodable("too many elements")

    def _named_tuple(self, value: Any, kind: type, depth: int) -> Any:
        fields = [str(name) for name in kind._fields]  # type: ignore[attr-defined]
        return {"nt": [kind.__name__, fields, self._all(tuple(value), depth)]}


# The value that an instance of a subclass has as the built-in type, whatever the subclass redefines besides equality.
EXACT: dict[type, Callable[[Any], Any]] = {
    int: lambda v: int.__add__(v, 0),
    float: lambda v: float.__add__(v, 0.0) if v == v and v != 0 else float.__float__(v),
    str: str.__str__,
    bytes: lambda v: bytes.__getitem__(v, slice(None)),
    list: lambda v: list.__getitem__(v, slice(None)),
    tuple: lambda v: tuple.__getitem__(v, slice(None)),
    dict: dict.copy,
    set: lambda v: {*set.__iter__(v)},
    frozenset: lambda v: frozenset([*frozenset.__iter__(v)]),
}


def plain_base(kind: type) -> Callable[[Any], Any] | None:
    """How to see an instance of a subclass as the built-in type, unless the subclass redefines what equality means."""
    for base, exact in EXACT.items():
        if issubclass(kind, base):
            same: bool = kind.__eq__ is base.__eq__  # type: ignore[comparison-overlap]
            return exact if same else None
    return None


def _defaultdict(encoder: Encoder, value: Any, depth: int) -> Any:
    return {"dd": encoder.pairs(value, depth)}


ENCODERS: dict[type, Callable[[Encoder, Any, int], Any]] = {
    frozenset: lambda e, v, d: {"f": e._all(v, d)},
    complex: lambda e, v, d: {"c": [v.real, v.imag]},
    bytes: lambda e, v, d: {"b": v.decode("latin-1")},
    bytearray: lambda e, v, d: {"ba": v.decode("latin-1")},
    range: lambda e, v, d: {"r": [e._encode(x, d + 1) for x in (v.start, v.stop, v.step)]},
    slice: lambda e, v, d: {"sl": [e._encode(x, d + 1) for x in (v.start, v.stop, v.step)]},
    type(...): lambda e, v, d: {"el": 0},
    type(NotImplemented): lambda e, v, d: {"ni": 0},
    collections.Counter: lambda e, v, d: {"ct": e.pairs(v, d)},
    collections.OrderedDict: lambda e, v, d: {"od": e.pairs(v, d)},
    collections.defaultdict: _defaultdict,
    collections.deque: lambda e, v, d: {"dq": [e._all(v, d), v.maxlen]},
    decimal.Decimal: lambda e, v, d: {"dec": str(v)},
    fractions.Fraction: lambda e, v, d: {"fr": [e._encode(v.numerator, d + 1), e._encode(v.denominator, d + 1)]},
    datetime.date: lambda e, v, d: {"da": v.isoformat()},
    datetime.datetime: lambda e, v, d: {"dt": v.isoformat()} if _plain_zone(v) else e._refer(v),
    datetime.time: lambda e, v, d: {"ti": v.isoformat()} if _plain_zone(v) else e._refer(v),
    datetime.timedelta: lambda e, v, d: {"td": [v.days, v.seconds, v.microseconds]},
    type({}.keys()): lambda e, v, d: {"dk": e._all(v, d)},
    type({}.values()): lambda e, v, d: {"dv": e._all(v, d)},
    array.array: lambda e, v, d: {"ar": [v.typecode, v.tobytes().decode("latin-1")]},
    type({}.items()): lambda e, v, d: {"di": [[e._encode(k, d + 1), e._encode(x, d + 1)] for k, x in v]},
}


def _plain_zone(value: Any) -> bool:
    return value.tzinfo is None or type(value.tzinfo) is datetime.timezone


def _big_int(text: str) -> int:
    return int(text, 16)


def pairs(data: list[Any]) -> list[Any]:
    """Lists of two: dict() would ask the owner of a proxy for its elements."""
    if not all(type(pair) is list and len(pair) == 2 for pair in data):
        raise ValueError("not pairs")
    return data


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError("not a list")
    return value


def _named_tuple(data: list[Any]) -> Any:
    name, fields, values = data
    if type(fields) is not list or type(values) is not list or len(fields) != len(values):
        raise ValueError("not a named tuple")
    if not all(type(word) is str and word.isidentifier() for word in [name, *fields]):
        raise ValueError("not a named tuple")
    return _named_type(name, tuple(fields))(*values)


_NAMED_TYPES: dict[tuple[str, tuple[str, ...]], Any] = {}


def _named_type(name: str, fields: tuple[str, ...]) -> Any:
    """A named tuple class, made without the code that collections.namedtuple would compile from the names."""
    key = (name, fields)
    if key not in _NAMED_TYPES:
        if len(_NAMED_TYPES) > 1000:
            _NAMED_TYPES.clear()
        members: dict[str, Any] = {"__slots__": (), "_fields": fields, "__new__": lambda cls, *v: tuple.__new__(cls, v)}
        for index, field in enumerate(fields):
            if not field.startswith("_"):
                members[field] = property(operator.itemgetter(index))
        members["__repr__"] = lambda self: (
            f"{name}({', '.join(f'{f}={v!r}' for f, v in zip(fields, self, strict=True))})"
        )
        members["_asdict"] = lambda self: dict(zip(fields, self, strict=True))
        _NAMED_TYPES[key] = type(name, (tuple,), members)
    return _NAMED_TYPES[key]


def builtin_named(name: str) -> Any:
    """A built-in that both ends have. Raises ValueError."""
    import builtins

    if name in SHARED:
        return getattr(builtins, name)
    raise ValueError("not a shared name")


def _keys(data: list[Any]) -> Any:
    return dict.fromkeys(data).keys()


DECODERS: dict[str, Callable[[Any], Any]] = {
    "t": tuple,
    "d": lambda v: dict(pairs(v)),
    "s": set,
    "so": lambda v: set_order.build(v[0], _list(v[1]), _list(v[2])),
    "f": frozenset,
    "i": _big_int,
    "c": lambda v: complex(*v),
    "b": lambda v: v.encode("latin-1"),
    "ba": lambda v: bytearray(v.encode("latin-1")),
    "r": lambda v: range(*v),
    "sl": lambda v: slice(*v),
    "el": lambda v: ...,
    "ni": lambda v: NotImplemented,
    "ct": lambda v: collections.Counter(dict(pairs(v))),
    "od": lambda v: collections.OrderedDict(pairs(v)),
    "dd": lambda v: collections.defaultdict(None, pairs(v)),
    "dq": lambda v: collections.deque([*_list(v[0])], v[1]),
    "dec": decimal.Decimal,
    "fr": lambda v: fractions.Fraction(v[0], v[1]),
    "da": datetime.date.fromisoformat,
    "dt": datetime.datetime.fromisoformat,
    "ti": datetime.time.fromisoformat,
    "td": lambda v: datetime.timedelta(*v),
    "dk": _keys,
    "di": lambda v: dict(pairs(v)).items(),
    "dv": lambda v: dict(enumerate(v)).values(),
    "ar": lambda v: array.array(v[0], v[1].encode("latin-1")),
    "nt": _named_tuple,
    "n": builtin_named,
    "it": iter,
    "na": arrays.decode_array,
    "no": arrays.decode_objects,
}


class Decoder:
    """Messages whose values are plain Python values; `resolve` turns references into values.

    json's C scanner walks the text; the hook sees each tagged object once, innermost first.
    """

    def __init__(self, resolve: Callable[[Reference], Any]) -> None:
        self._resolve = resolve
        self._decoder = json.JSONDecoder(object_hook=self._hook)

    def decode(self, body: bytes) -> Any:
        """Raises ProtocolError for what no honest end sends."""
        if len(body) > LARGE:
            _count_items(body)
        try:
            return whole_value(self._decoder, body.decode("utf-8", "surrogatepass"))
        except RecursionError:
            raise ProtocolError("nested too deeply") from None
        except MemoryError:
            raise ProtocolError("too large to be looked at") from None
        except (ValueError, TypeError, ArithmeticError, AttributeError, IndexError, KeyError) as error:
            raise ProtocolError(f"not a value: {type(error).__name__}: {str(error)[:200]}") from None

    def _hook(self, tagged: dict[str, Any]) -> Any:
        if len(tagged) == 1:
            ((tag, data),) = tagged.items()
            decoder = DECODERS.get(tag)
            if decoder is not None and type(data) in (list, str, int):  # not a proxy: tuple(it) would ask its owner
                return decoder(data)
            if tag == "x" and type(data) is list and len(data) == 3 and type(data[0]) is int:
                return self._resolve(Reference({"id": data[0], "kind": data[1], "truth": data[2]}))
            if tag == "o" and type(data) is int:
                return self._resolve(Reference({"own": data}))
            if tag == "xc" and type(data) is list and len(data) == 2:
                return self._resolve(Reference({"classes": data[0], "near": data[1]}))
            if tag in ("xd", "xi", "mk") and type(data) is list and len(data) == LENGTHS[tag] and type(data[0]) is int:
                return self._resolve(Reference({tag: data}))
            if tag == "ex" and type(data) is list and len(data) == 5:
                return self._resolve(Reference({"exception": data}))
            if tag == "v" and type(data) is list and len(data) == 2:
                return self._resolve(Reference({"object": data}))
            if tag == "vs" and type(data) is list and all(type(state) is list and len(state) == 3 for state in data):
                return self._resolve(Reference({"states": data}))
        raise ValueError("unknown tag")


LENGTHS = {"xd": 4, "xi": 2, "mk": 3}  # of references to dataclasses, their objects, and what a test makes of them
LARGE = 1 << 20  # bytes: smaller messages cannot hold too many elements
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def _count_items(body: bytes) -> None:
    """Bound the memory that decoding takes: 64 MiB of "[],[],…" would become lists of 1.5 GB."""
    bare = _STRING.sub(b"", body)
    if sum(map(bare.count, (b",", b"[", b"{"))) > 2 * MAX_ITEMS:
        raise ProtocolError("too many elements")


# --- objects that stay ------------------------------------------------------------------------------------------------


class Table:
    """Objects of ours that the other end holds references to."""

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._ids: dict[int, int] = {}

    def put(self, value: Any) -> int:
        number = self._ids.get(id(value))
        if number is None:
            number = self._ids[id(value)] = len(self._objects)
            self._objects.append(value)  # keeps it alive, so the id stays its own
        return number

    def get(self, number: Any) -> Any:
        if type(number) is not int or not 0 <= number < len(self._objects):
            raise ProtocolError("no such object")
        return self._objects[number]
