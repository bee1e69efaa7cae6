"""Objects of classes that the problem gives (ListNode, TreeNode): they cross by value, as their attributes.

Both ends define such a class for themselves, from the problem's own text (given.py), and what crosses is a flat table:
number, name of the class, attributes. So a list of any length can cross, and a cycle, and the judge compares objects of
its own class: what a program did to the class on its side cannot answer a test. An object keeps its number for some
time, so a node that went to the program and comes back is the same node. Standard library only.
"""

import types
from collections.abc import Callable, Iterable
from typing import Any

from fractal.sandbox.inside.protocol import Reference, Unencodable

MAX_OBJECTS = 300_000  # that one end knows of at a time: a third of the judge's memory
FORGET_AT = 50_000  # with as many, the next message of the judge's begins with an empty table


class ObjectTable:
    """The objects that both ends know by number: even numbers for those that the judge sent first, odd ones for the
    candidate's."""

    def __init__(self, trusted: bool, encode: Callable[[Any], Any]) -> None:
        self._trusted = trusted  # the judge's
        self._parity = 0 if trusted else 1
        self._encode = encode
        self._given: dict[str, type | None] = {}
        self._look_up: Callable[[str], Any] = dict[str, Any]().get
        self._objects: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}  # by id
        self._pending: list[tuple[int, str, Any]] = []  # to be sent with the present message
        self._sent: set[int] = set()
        self.received: list[Any] = []  # the objects whose attributes came with the last message that had some
        self._generation = 0  # stands in the numbers: the candidate sees by them that the judge has forgotten all

    def give(self, names: Iterable[str], look_up: Callable[[str], Any]) -> None:
        """Take the classes of these names, as `look_up` finds them now or later, for those whose objects cross."""
        self._look_up = look_up
        self._given = {name: _plain_class(look_up(name)) for name in names}

    def clear(self) -> None:
        """Forget the objects, not the classes."""
        self._objects.clear()
        self._numbers.clear()
        self.drop()

    def drop(self) -> None:
        """Forget the message that was being made."""
        self._pending.clear()
        self._sent.clear()

    # --- to the other end --------------------------------------------------------------------------------

    def refer(self, value: Any) -> dict[str, Any] | None:
        """The reference to an object, whose attributes go with the message; None if it does not cross by value.

        Raises Unencodable for too many.
        """
        name = self._name_of(type(value)) if self._given else None
        if name is None:
            return None
        if self._trusted and not self._sent and len(self._objects) > FORGET_AT:
            self.clear()
            self._generation += 1
        number = self._numbers.get(id(value))
        if number is None:
            if len(self._objects) >= MAX_OBJECTS:
                raise Unencodable(f"more than {MAX_OBJECTS} objects")
            number = self._generation << 32 | 2 * len(self._objects) | self._parity
            self._add(number, value)
        if number not in self._sent:
            self._sent.add(number)
            self._pending.append((number, name, value))
        return {"v": [number, name]}

    def _name_of(self, kind: type) -> str | None:
        """The given class that a class is, derives from, or has taken the place of."""
        for base in kind.__mro__[:-1]:
            name = base.__name__
            if name in self._given and (self._given[name] is base or self._look_up(name) is base):
                return name if _plain_class(kind) else None
        return None

    def _add(self, number: int, value: Any) -> None:
        self._objects[number] = value  # keeps it alive, so the id stays its own
        self._numbers[id(value)] = number

    def envelope(self, message: Any) -> Any:
        """The message with the attributes of all objects that it refers to. Raises Unencodable."""
        if not self._pending:
            return message
        states = []
        try:
            for number, name, value in self._pending:  # grows on the way
                states.append([number, name, [[key, self._encode(v)] for key, v in _attributes(value)]])
        finally:
            self.drop()
        return ["v", message, {"vs": states}]

    # --- from the other end --------------------------------------------------------------------------------

    def open(self, message: Any) -> Any:
        """The message in an envelope, or the message itself. Called once the message is decoded."""
        if type(message) is list and len(message) == 3 and message[0] == "v":
            return message[1]
        self.received = []
        return message

    def resolve(self, reference: Reference) -> Any:
        """The object of a reference, new ones without their attributes. Raises ValueError, as a decoder does."""
        number, name = reference.data["object"]
        if type(number) is not int or type(name) is not str:
            raise ValueError("not an object")
        if number >> 32 > self._generation and not self._trusted:
            self.clear()
            self._generation = number >> 32
        value = self._objects.get(number)
        if value is not None:
            if self._name_of(type(value)) != name:
                raise ValueError("an object that changes its class")
            return value
        ours = number % 2 == self._parity or number >> 32 != self._generation
        if ours or name not in self._given or len(self._objects) >= MAX_OBJECTS:
            raise ValueError("an object of an unknown class, or too many")
        kind = _plain_class(self._look_up(name)) or self._given[name]
        if kind is None:
            raise ValueError("an object of an unknown class")
        value = object.__new__(kind)
        self._add(number, value)
        return value

    def set_states(self, states: Any) -> None:
        """Give objects the attributes that they have at the other end. Raises ValueError, as a decoder does."""
        self.received = []
        for number, name, attributes in states:
            value = self.resolve(Reference({"object": [number, name]}))
            if type(attributes) is not list or not all(type(p) is list and len(p) == 2 for p in attributes):
                raise ValueError("not attributes")
            self._set_attributes(value, dict(attributes))
            self.received.append(value)

    def _set_attributes(self, value: Any, attributes: dict[Any, Any]) -> None:
        """Make these the object's only attributes. For the judge, none may hide what the class defines: a method."""
        kind = type(value)
        slots = _slots(kind)
        if self._trusted and any(type(name) is not str or hides(kind, name) for name in attributes):
            raise ValueError("an attribute that hides one of the class")
        for name in slots:
            if name in attributes:
                object.__setattr__(value, name, attributes.pop(name))
            elif hasattr(value, name):
                object.__delattr__(value, name)
        fields = getattr(value, "__dict__", None)
        if fields is not None:
            fields.clear()
            fields.update(attributes)


def _plain_class(kind: Any) -> type | None:
    """A class whose objects are made of attributes and nothing else; None for anything else."""
    plain = type(kind) is type and all(base is object or base.__flags__ & HEAP for base in kind.__mro__)
    return kind if plain and kind is not object else None


HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: defined by a class statement


def _slots(kind: type) -> list[str]:
    """The attributes that have a slot, and so do not stand in __dict__."""
    found = _SLOTS.get(kind)
    if found is None:
        members = [(n, m) for base in kind.__mro__[:-1] for n, m in vars(base).items()]
        found = [name for name, member in members if type(member) is types.MemberDescriptorType]
        if len(_SLOTS) > 1000:
            _SLOTS.clear()
        _SLOTS[kind] = found
    return found


_SLOTS: dict[type, list[str]] = {}


def _attributes(value: Any) -> list[tuple[str, Any]]:
    found = list(getattr(value, "__dict__", {}).items())
    found += [(name, getattr(value, name)) for name in _slots(type(value)) if hasattr(value, name)]
    return [(name, member) for name, member in found if type(name) is str]


def hides(kind: type, name: str) -> bool:
    """Whether an attribute of an object would stand in the place of a method or property of its class."""
    for base in kind.__mro__:
        if name in vars(base):
            member = vars(base)[name]
            return type(member) is not types.MemberDescriptorType and (callable(member) or hasattr(member, "__get__"))
    return False
