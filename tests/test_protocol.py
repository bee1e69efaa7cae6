"""What crosses the boundary: plain values come back equal and of the same type; nothing else gets through."""

import collections
import datetime
import decimal
import fractions
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.sandbox.inside import protocol
from fractal.sandbox.inside.protocol import Encoder, FrameBuffer, ProtocolError, Reference, Unencodable
from fractal.sandbox.inside.proxy import update

Point = collections.namedtuple("Point", "x y")

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters())
    | st.binary(max_size=20)
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.dates()
    | st.datetimes()
    | st.timedeltas()
    | st.builds(range, st.integers(-5, 5), st.integers(-5, 5), st.integers(1, 3))
)
keys = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.tuples(st.integers(), st.text(max_size=3))
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
        | st.builds(Point, inner, inner)
        | st.lists(inner, max_size=3).map(collections.deque)
        | st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict)
        | st.lists(keys, max_size=4).map(collections.Counter)
        | st.binary(max_size=9).map(bytearray)
    ),
    max_leaves=12,
)


def refuse(value: Any) -> dict[str, Any]:
    raise Unencodable(type(value).__name__)


def through(value: Any) -> Any:
    body = protocol.pack(Encoder(refuse).encode(value))[protocol.HEADER.size :]
    return protocol.Decoder(lambda reference: reference).decode(body)


def same(a: Any, b: Any) -> bool:
    if type(a) is Point or (isinstance(a, tuple) and type(a) is not tuple):
        return isinstance(b, tuple) and a._fields == b._fields and len(a) == len(b) and all(map(same, a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple | collections.deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


@given(values)
def test_plain_values_come_back_equal_and_of_the_same_type(value: Any) -> None:
    assert same(value, through(value))


@pytest.mark.parametrize("value", [10**4000, -(10**4000), float("inf"), -0.0, "\ud800", b"\xff\x00", ..., 1 << 256])
def test_awkward_values_come_back(value: Any) -> None:
    back = through(value)
    assert back == value
    assert math.copysign(1, back) == math.copysign(1, value) if isinstance(value, float) else True


def test_nan_comes_back() -> None:
    assert math.isnan(through([float("nan")])[0])


def test_a_named_tuple_keeps_its_fields_and_equals_a_tuple() -> None:
    back = through(Point(1, [2]))
    assert (back, back.x, back.y, back._asdict()) == ((1, [2]), 1, [2], {"x": 1, "y": [2]})


class Loud(int):
    """A subclass that changes nothing about equality."""


class Liar(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


def test_a_subclass_crosses_as_its_base_unless_it_redefines_equality() -> None:
    assert type(through(Loud(5))) is int
    with pytest.raises(Unencodable):
        through(Liar(5))


def cyclic() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


@pytest.mark.parametrize("value", [cyclic(), object(), lambda: 1, json])
def test_what_is_not_plain_is_refused(value: Any) -> None:
    with pytest.raises((Unencodable, RecursionError)):
        through(value)


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_decode_to_a_value_or_a_protocol_error(body: bytes) -> None:
    try:
        protocol.Decoder(lambda reference: reference).decode(body)
    except ProtocolError:
        pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*protocol.DECODERS, "x", "o", "zz"]), inner, max_size=2),
    max_leaves=8,
)  # fmt: skip


@given(json_values)
def test_any_tags_decode_to_plain_values_or_a_protocol_error(value: Any) -> None:
    """Nothing but built-in data, iterators over it and references comes out, whatever is sent."""
    allowed = (type(None), bool, int, float, str, complex, bytes, bytearray, list, tuple, dict, set, frozenset, range, slice,
               collections.deque, decimal.Decimal, fractions.Fraction, datetime.date, datetime.time, datetime.timedelta,
               type(...), type(NotImplemented), Reference, type({}.keys()), type({}.items()), type, type(len))  # fmt: skip
    try:
        out = protocol.Decoder(lambda reference: reference).decode(json.dumps(value).encode())
    except ProtocolError:
        return
    assert isinstance(out, allowed) or type(out).__name__.endswith("iterator") or type(out).__module__ == "numpy"


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"t":' * 50_000, b'{"n":"eval"}', b'{"n":"__import__"}', b'{"nt":["a;b",["x"],[1]]}', b"9" * 5000,
     b'{"nt":["P",["__class__ "],[1]]}', b'{"s":[[1]]}', b'{"o":[1]}', b'{"x":["a","b",true]}', b"\xff"],
)  # fmt: skip
def test_hostile_bytes_are_protocol_errors(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.Decoder(lambda reference: reference).decode(body)


@given(st.lists(st.binary(max_size=50), max_size=6), st.integers(1, 7))
def test_frames_survive_any_slicing(bodies: list[bytes], size: int) -> None:
    stream = b"".join(protocol.HEADER.pack(len(b)) + b for b in bodies)
    buffer, found = FrameBuffer(), []
    for start in range(0, len(stream), size):
        found += buffer.feed(stream[start : start + size])
    assert found == bodies


def test_a_frame_that_announces_too_much_is_refused_at_once() -> None:
    with pytest.raises(ProtocolError):
        FrameBuffer(100).feed(protocol.HEADER.pack(101))


@given(values, values)
def test_update_makes_an_argument_equal_in_place(old: Any, new: Any) -> None:
    """An argument that the program changed is changed for the test, too: same object, new content."""
    holder, wanted = [old], through([new])
    kept = holder[0]
    update(holder, through([new]))
    assert same(wanted, holder)
    if type(kept) is type(new) and isinstance(new, list | dict | set):
        assert holder[0] is kept
