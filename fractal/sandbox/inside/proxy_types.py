"""What a test holds instead of the program's objects: proxies, and values of the program's dataclasses.

Trusted, in the judge; proxy.py makes them. Standard library only.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from fractal.sandbox.inside.protocol import FACTORIES, ProtocolError, builtin_named

MAX_FIELDS = 100


class Endpoint(Protocol):
    """Where proxies ask: proxy.py's JudgeEndpoint."""

    def ask(self, op: str, target: "Proxy", *rest: Any) -> object: ...

    def call(self, target: "Proxy", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def next(self, target: "Proxy") -> Any: ...


class Proxy:
    """An object of the program's that stays in the candidate process.

    It can be called, indexed, iterated, and its attributes read and set; each of these asks the candidate and gives
    plain values or further proxies. It equals nothing but itself, and it does not take part in arithmetic or
    comparison: an object that answers those as it likes could satisfy a test without knowing the result.
    """

    __slots__ = ("_endpoint", "_kind", "_number", "_truth")

    def __init__(self, endpoint: Endpoint, number: int, kind: str, truth: bool | None) -> None:
        for name, value in (("_endpoint", endpoint), ("_number", number), ("_kind", kind), ("_truth", truth)):
            object.__setattr__(self, name, value)

    def _reference(self, encode: Callable[[Any], Any]) -> dict[str, Any]:
        """How it crosses to the candidate."""
        return {"o": self._number}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._endpoint.call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in ("__name__", "__doc__", "__dict__"):
            raise AttributeError(name)
        return self._endpoint.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._endpoint.ask("set", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._endpoint.ask("delete", self, name)

    def __getitem__(self, key: Any) -> Any:
        return self._endpoint.ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._endpoint.ask("setitem", self, key, value)

    def __len__(self) -> int:
        length = self._endpoint.ask("len", self)
        if type(length) is not int or length < 0:
            raise ProtocolError("a length that is not a number")
        return length

    def __iter__(self) -> Iterator[Any]:
        if self._kind == "iterator":
            return self
        iterator: Any = self._endpoint.ask("iter", self)
        return iterator if isinstance(iterator, Proxy) else iter(iterator)

    def __next__(self) -> Any:
        return self._endpoint.next(self)

    def __bool__(self) -> bool:
        truth: bool | None = self._truth  # None: it may change
        return self._endpoint.ask("bool", self) is True if truth is None else truth

    def __str__(self) -> str:
        return str(self._endpoint.ask("str", self))

    def __repr__(self) -> str:
        return str(self._endpoint.ask("repr", self))

    def __instancecheck__(self, instance: Any) -> bool:
        if not isinstance(instance, Proxy):
            return False
        answer: object = self._endpoint.ask("isinstance", instance, self)
        return answer is True

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


# Labels' details name the class ("'<' not supported between instances of 'StandIn' and 'int'"): they stay as they were.
Proxy.__name__ = "StandIn"


class Field(NamedTuple):
    """A field of a dataclass of the program's."""

    name: str
    keyword_only: bool
    default: list[Any]  # the default value, or nothing
    factory: str  # the built-in class that makes the default, or ""
    required: bool


class DataclassProxy(Proxy):
    """A dataclass of the program's whose __init__ and __eq__ are the generated ones, as the program says.

    What a test makes of it is made here, of the test's own arguments, and does not cross until the program has to do
    with it: so the program cannot know what its result is compared with.
    """

    __slots__ = ("_fields", "_flags", "_name")

    def __init__(self, endpoint: Endpoint, number: int, name: Any, fields: Any, flags: Any) -> None:
        """Raises ValueError, as a decoder does."""
        super().__init__(endpoint, number, "class", True)
        if type(name) is not str or not name.isidentifier() or type(fields) is not list or len(fields) > MAX_FIELDS:
            raise ValueError("not a dataclass")
        if type(flags) is not list or not all(flag in ("order", "frozen", "hash", "repr") for flag in flags):
            raise ValueError("not a dataclass")
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_fields", [_field(data) for data in fields])
        object.__setattr__(self, "_flags", frozenset(flags))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._bind(args, kwargs)
        return super().__call__(*args, **kwargs) if given is None else RecordProxy(self._endpoint, self, given)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments by name; None where the program has to be asked, for the error or for a default."""
        places = [field.name for field in self._fields if not field.keyword_only]
        if len(args) > len(places):
            return None
        given = dict(zip(places, args, strict=False))
        if given.keys() & kwargs.keys():
            return None
        given |= kwargs
        names = {field.name for field in self._fields}
        missing = [field for field in self._fields if field.name not in given]
        return None if given.keys() - names or any(field.required for field in missing) else given

    def __instancecheck__(self, instance: Any) -> bool:
        if isinstance(instance, InstanceProxy | RecordProxy) and instance._class is self:
            return True
        return super().__instancecheck__(instance)


def _field(data: Any) -> Field:
    name, keyword_only, default, factory = data
    if type(name) is not str or not name.isidentifier() or type(keyword_only) is not bool or type(default) is not list:
        raise ValueError("not a field")
    if factory and factory not in FACTORIES:
        raise ValueError("not a field")
    return Field(name, keyword_only, default, factory, not default and not factory)


class InstanceProxy(Proxy):
    """An object of such a class that the program made. It equals a test's own object if all fields do."""

    __slots__ = ("_class",)

    def __init__(self, endpoint: Endpoint, number: int, kind: DataclassProxy) -> None:
        super().__init__(endpoint, number, "object", True)
        object.__setattr__(self, "_class", kind)

    def _values(self) -> list[Any]:
        values = self._endpoint.ask("fields", self, [field.name for field in self._class._fields])
        if type(values) is not list or len(values) != len(self._class._fields):
            raise ProtocolError("not fields")
        return values

    def __eq__(self, other: object) -> bool:
        return other == self if isinstance(other, RecordProxy) else self is other

    def __lt__(self, other: Any) -> Any:
        return other > self if isinstance(other, RecordProxy) else NotImplemented

    def __gt__(self, other: Any) -> Any:
        return other < self if isinstance(other, RecordProxy) else NotImplemented

    def __le__(self, other: Any) -> Any:
        return other >= self if isinstance(other, RecordProxy) else NotImplemented

    def __ge__(self, other: Any) -> Any:
        return other <= self if isinstance(other, RecordProxy) else NotImplemented

    def __hash__(self) -> int:
        return _hash(self._class, self._values())


class RecordProxy(Proxy):
    """An object of such a class that the test made, as in `assert f(x) == Point(1, 2)`.

    As long as the program has nothing to do with it, it is compared by its fields. After that it equals only itself.
    """

    __slots__ = ("_class", "_crossed", "_given", "_values")
    made = 0

    def __init__(self, endpoint: Endpoint, kind: DataclassProxy, given: dict[str, Any]) -> None:
        RecordProxy.made += 1
        super().__init__(endpoint, RecordProxy.made, "object", True)
        values = dict(given)
        for field in kind._fields:
            if field.name not in values:
                values[field.name] = field.default[0] if field.default else builtin_named(field.factory)()
        for name, value in (("_class", kind), ("_given", given), ("_values", values), ("_crossed", False)):
            object.__setattr__(self, name, value)

    def _reference(self, encode: Callable[[Any], Any]) -> dict[str, Any]:
        object.__setattr__(self, "_crossed", True)
        return {"mk": [self._class._number, self._number, [[n, encode(v)] for n, v in self._given.items()]]}

    def _all_values(self) -> list[Any]:
        return [self._values[field.name] for field in self._class._fields]

    def __getattr__(self, name: str) -> Any:
        return self._values[name] if name in self._values and not self._crossed else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._crossed or name not in self._values or "frozen" in self._class._flags:
            super().__setattr__(name, value)
        else:
            self._values[name] = self._given[name] = value

    def _compare(self, other: Any, operator: Callable[[Any, Any], Any]) -> Any:
        """Compare fields with an object of the same class; NotImplemented for anything else, or where it may not be."""
        if self._crossed or not isinstance(other, InstanceProxy | RecordProxy) or other._class is not self._class:
            return NotImplemented
        if isinstance(other, RecordProxy):
            return NotImplemented if other._crossed else operator(self._all_values(), other._all_values())
        return operator(self._all_values(), other._values())

    def _order(self, other: Any, operator: Callable[[Any, Any], Any]) -> Any:
        return self._compare(other, operator) if "order" in self._class._flags else NotImplemented

    def __eq__(self, other: object) -> bool:
        return self is other or self._compare(other, lambda a, b: a == b) is True

    def __lt__(self, other: Any) -> Any:
        return self._order(other, lambda a, b: a < b)

    def __gt__(self, other: Any) -> Any:
        return self._order(other, lambda a, b: a > b)

    def __le__(self, other: Any) -> Any:
        return self._order(other, lambda a, b: a <= b)

    def __ge__(self, other: Any) -> Any:
        return self._order(other, lambda a, b: a >= b)

    def __hash__(self) -> int:
        return id(self) if self._crossed else _hash(self._class, self._all_values())

    def __repr__(self) -> str:
        if self._crossed or "repr" not in self._class._flags:
            return super().__repr__()
        return f"{self._class._name}({', '.join(f'{n}={v!r}' for n, v in self._values.items())})"

    def __str__(self) -> str:
        return repr(self) if not self._crossed and "repr" in self._class._flags else super().__str__()


def _hash(kind: DataclassProxy, values: list[Any]) -> int:
    if "hash" not in kind._flags:
        raise TypeError(f"unhashable type: '{kind._name}'")
    return hash(tuple(values))
