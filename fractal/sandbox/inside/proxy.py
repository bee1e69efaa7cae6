"""What the tests see instead of the program: proxies, whose every use asks the candidate process.

Trusted, in the judge. What comes back is plain data, or further proxies. Standard library only.
"""

import socket
import types
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from fractal.sandbox.inside import arrays, exceptions, streams
from fractal.sandbox.inside.objects import ObjectTable, hides
from fractal.sandbox.inside.protocol import (
    Decoder,
    Encoder,
    FrameBuffer,
    ProtocolError,
    Reference,
    Table,
    Unencodable,
    pack,
    pairs,
)
from fractal.sandbox.inside.proxy_types import DataclassProxy, InstanceProxy, Proxy, RecordProxy
from fractal.sandbox.inside.suite import Ahead

ITERATOR_LIMIT = 1_000_000  # elements drawn from one of the program's iterators
BATCH = 64  # elements of an iterator fetched at once after the first
DETAIL = 500
AFTER = {"r": 3, "e": 6}  # length of a reply that says how the call left its arguments


class CandidateEndedError(BaseException):
    """The candidate cannot answer any more. Not an Exception: a test's `except Exception` must not swallow it."""


class Channel:
    """The bytes to and from one candidate process, in frames."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = FrameBuffer()
        self.bodies: deque[bytes] = deque()  # received, not yet looked at


class JudgeEndpoint:
    """The judge's end of the channel to one candidate, for one program."""

    def __init__(self, channel: Channel, wait: Callable[[bool], None], stuck: Callable[[], None]) -> None:
        self._channel = channel
        # Both raise CandidateEndedError: `wait` returns when the socket is readable, `stuck` is called when the
        # candidate does not read what it is sent.
        self._wait, self._stuck = wait, stuck
        self._table = Table()
        self._encoder = Encoder(self._refer)
        self.objects = ObjectTable(True, self._encode)
        self._decode = Decoder(self._resolve).decode
        self._proxies: dict[int, Proxy] = {}
        self._classes: dict[int, type[BaseException]] = {}  # exception classes of the program's, by its numbers
        self._functions: dict[int, Callable[..., Any]] = {}  # that call what the test passes; by id, kept alive by them
        self._records: dict[int, RecordProxy] = {}  # objects that the test made and that have crossed
        self._coroutines: dict[int, Coroutine[Any, Any, Any]] = {}
        self._drawn: dict[int, tuple[deque[Any], bool, int]] = {}
        self._returned: dict[int, Any] = {}  # what generators returned, for the StopIteration that says so
        self.ahead: deque[Ahead] = deque()  # calls of the entry point that were sent already
        self.entry: object = None
        self.after_call: Callable[[], None] | None = None  # lets the test see the program's globals as they are now
        self.requests = 0  # that the tests made of the program
        self.references = 0  # to objects, in what the program sent
        self.raised: list[BaseException] = []  # exceptions that came from the candidate, to tell them from the test's
        self.texts: dict[int, str] = {}  # what they say, by id: str() of one could ask the candidate

    def _refer(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Proxy):
            if isinstance(value, RecordProxy):
                self._records[value._number] = value
            return value._reference(self._encoder.encode)
        if isinstance(value, types.CoroutineType):
            for number, coroutine in self._coroutines.items():
                if coroutine is value:
                    return {"o": number}
        if isinstance(value, type) and value in self._classes.values():
            return {"o": next(number for number, kind in self._classes.items() if kind is value)}
        if (given := self.objects.refer(value)) is not None:
            return given
        if isinstance(value, type) and issubclass(value, Exception) and exceptions.name_of(value):
            return {"xc": [[], exceptions.name_of(value)]}
        if isinstance(value, Exception):
            return {"ex": self._failure(value)}
        if isinstance(value, types.FunctionType):
            return {"x": [self._table.put(value), "function", True]}
        if callable(value) and not isinstance(value, type):  # a method, a partial, a mock: it crosses as a function
            return {"x": [self._table.put(self._as_function(value)), "function", True]}
        if hasattr(value, "__next__"):
            return {"it": [self._encoder.encode(item) for item in value]}
        raise Unencodable(f"a test passes a {type(value).__name__}, which cannot cross into the sandbox")

    def _resolve(self, reference: Reference) -> Any:
        self.references += 1
        data = reference.data
        if "own" in data:
            return self._table.get(data["own"])
        if "object" in data:
            return self.objects.resolve(reference)
        if "states" in data:
            return self.objects.set_states(data["states"])
        if "near" in data:
            return self._exception_class(data["classes"], data["near"])
        if "exception" in data:
            return self._exception(*data["exception"][1:])
        if "xd" in data:
            return self._proxies.setdefault(data["xd"][0], DataclassProxy(self, *data["xd"]))
        if "xi" in data:
            return self._instance(*data["xi"])
        if "mk" in data:
            return self._records[data["mk"][1]]
        number, kind, truth = data["id"], data["kind"], data["truth"]
        if type(kind) is not str or not (truth is None or type(truth) is bool) or number < 0:
            raise ValueError("not a reference")
        if number not in self._proxies:
            self._proxies[number] = Proxy(self, number, kind[:80], truth)
            if kind == "coroutine":
                self._coroutines[number] = self._await(self._proxies[number])
        return self._coroutines.get(number, self._proxies[number])

    def _instance(self, number: int, kind: Any) -> Proxy:
        if not isinstance(kind, DataclassProxy):
            raise ValueError("not an object of a dataclass")
        return self._proxies.setdefault(number, InstanceProxy(self, number, kind))

    async def _await(self, target: Proxy) -> Any:
        """A coroutine of the program's as one of the test's; it runs there, all at once."""
        return self.ask("await", target)

    def _exception_class(self, own: Any, near: Any) -> type[BaseException]:
        """An exception class of the program's, with those that it derives from: a test can name and catch it.

        They are made here, of nothing but their names and bases. Raises ValueError, TypeError or KeyError, as a
        decoder does.
        """
        kind = _known_class(near)
        if type(own) is not list or len(own) > 16:
            raise ValueError("not exception classes")
        for data in own:
            number, name, bases = data
            if type(number) is not int or type(name) is not str or not name.isidentifier() or type(bases) is not list:
                raise ValueError("not an exception class")
            if number not in self._classes:
                kinds = [self._classes[base] if type(base) is int else _known_class(base) for base in bases]
                self._classes[number] = type(name, tuple(kinds) or (kind,), {"__str__": _message})
            kind = self._classes[number]
        return kind

    def send(self, message: Any) -> None:
        self.send_frames(pack(self.objects.envelope(message)))

    def send_frames(self, frames: bytes) -> None:
        try:
            self._channel.sock.sendall(frames)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died: the wait for its answer says how
        except TimeoutError:
            self._stuck()

    def receive(self) -> Any:
        """The next message. Raises CandidateEndedError, or ProtocolError for what no honest candidate sends."""
        return self.decode(self.receive_body())

    def receive_body(self) -> bytes:
        """The next message as it came. Raises CandidateEndedError, or ProtocolError for what is no frame."""
        channel = self._channel
        while not channel.bodies:
            self._wait(False)
            try:
                data = channel.sock.recv(1 << 18)
            except ConnectionResetError:
                data = b""
            if not data:
                self._wait(True)
            channel.bodies.extend(channel.buffer.feed(data))
        return channel.bodies.popleft()

    def decode(self, body: bytes) -> list[Any]:
        """A message. Raises ProtocolError for what no honest candidate sends."""
        message = self.objects.open(self._decode(body))
        if type(message) is not list or not message or type(message[0]) is not str:
            raise ProtocolError("not a message")
        return message

    def reply(self) -> list[Any]:
        """Serve callbacks until the answer to our request is there."""
        while True:
            message: list[Any] = self.receive()
            if message[0] != "q":
                return message
            self.send(self._serve(message))

    def _serve(self, message: list[Any]) -> list[Any]:
        """Call a function of the test's for the program; what it raises is the program's to handle."""
        if len(message) != 5 or message[1] != "call" or type(message[4]) is not list:
            raise ProtocolError("not a call")
        _, _, function, args, kwargs = message
        received = self.objects.received
        if type(function) is not types.FunctionType or type(args) is not list:
            raise ProtocolError("only a test's functions can be called from the program")
        try:
            result = self._encode(function(*args, **dict(pairs(kwargs))))
            for value in received:
                self.objects.refer(value)  # as the function left it
            return ["r", result]
        except Exception as error:
            return self._failure(error)

    def _as_function(self, value: Any) -> Callable[..., Any]:
        known = self._functions.get(id(value))
        if known is None:
            known = self._functions[id(value)] = streams.calling(value)
        return known

    def _failure(self, error: Exception) -> list[Any]:
        """An exception of the test's as data: of its arguments and attributes, those that are plain."""
        plain = (str, int, float, bool, type(None))
        values = [value for value in error.args if type(value) in plain]
        known = [[name, value] for name, value in error.__dict__.items() if name != TEXT and type(value) in plain]
        own = self._refer(type(error)) if type(error) in self._classes.values() else None
        return ["e", exceptions.nearest(type(error)), "", [values, known, None], own]

    def _encode(self, value: Any) -> Any:
        return self._encoder.encode(value)

    def _cancel_ahead(self) -> None:
        """Before any other request: the calls still ahead wait for it, and their answers say so."""
        while self.ahead:
            self.ahead.popleft()
            if self.reply()[0] != "skipped":
                raise ProtocolError("a call that was not waited with")

    def ask(self, op: str, target: Proxy, *rest: Any) -> object:
        self._cancel_ahead()
        self.objects.drop()
        self.requests += 1
        self.send(["q", op, self._refer(target), *map(self._encode, rest)])
        return self.value(self.reply())

    def value(self, reply: list[Any]) -> Any:
        """What a reply holds. Raises the program's exception, ProgramExitedError or ProtocolError."""
        if reply[0] == "r" and len(reply) >= 2:
            return reply[1]
        if reply[0] == "e" and len(reply) == 5:
            raise self._exception(*reply[1:])
        if reply[0] == "x":
            error = ProgramExitedError(text_of(reply[-1]))
            error.code = reply[1] if type(reply[1]) in (int, str) else None
            raise error
        raise ProtocolError(f"an answer of kind {reply[0][:20]!r}")

    def _exception(self, near: Any, text: Any, details: Any, name: Any) -> BaseException:
        """The program's exception as one of the judge's: of a class that both have, or of its own class below that."""
        if type(text) is not str or type(details) is not list or [type(part) for part in details[:2]] != [list, list]:
            raise ProtocolError("not an exception")
        error: BaseException
        try:
            base = _known_class(near)
            kind: Any = name if isinstance(name, type) and issubclass(name, base) else base
            error = exceptions.build(kind, details[0], dict(pairs(details[1])), hides)
        except KeyError:
            raise ProtocolError("not an exception") from None
        except Exception:
            error = RuntimeError(text[:DETAIL])
        if isinstance(name, type):
            error.__dict__[TEXT] = text[:DETAIL]
        cause = details[2] if len(details) == 3 else None
        if type(cause) is list and len(cause) == 5:
            error.__cause__ = self._exception(*cause[1:])
        self.raised.append(error)
        self.texts[id(error)] = text[:DETAIL]
        return error

    def call(self, target: Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._call(target, args, kwargs)
        finally:
            if self.after_call is not None:
                self.after_call()

    def _call(self, target: Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.requests += 1
        if self.ahead and target is self.entry:
            planned = self.ahead.popleft()
            if planned.args != args or planned.kwargs != kwargs:  # not what `suite` read in the test: our mistake
                raise RuntimeError("a call that was made ahead is not the test's")
            reply = self.reply()
            if reply[0] != "skipped":
                return self.value(reply)
        self._cancel_ahead()
        mutable = any(map(_mutable, args)) or any(map(_mutable, kwargs.values()))
        self.objects.drop()
        packed = [self._encode(value) for value in args]
        named = [[key, self._encode(value)] for key, value in kwargs.items()]
        if streams.patched():
            reply = self._call_with_streams(["q", "call", self._refer(target), packed, named, mutable])
        else:
            self.send(["q", "call", self._refer(target), packed, named, mutable])
            reply = self.reply()
        if mutable and len(reply) == AFTER.get(reply[0]):
            self._change(args, kwargs, reply.pop())
        return self.value(reply)

    def _call_with_streams(self, message: list[Any]) -> list[Any]:
        """Make a call with the streams that the test has put in the place of its own."""
        test = streams.Patched()
        self.send([*message, test.data(self._encode)])
        answer = self.reply()
        if len(answer) != 4 or answer[0] != "io" or type(answer[1]) is not list:
            raise ProtocolError("not an answer with what was printed")
        try:
            test.take(answer[2], answer[3])
        except ValueError as error:
            raise ProtocolError(str(error)) from None
        reply: list[Any] = answer[1]
        return reply

    def _change(self, args: tuple[Any, ...], kwargs: dict[str, Any], after: Any) -> None:
        """Let the test's arguments look as the program left them."""
        if type(after) is not list or [type(part) for part in after] != [list, list] or len(after[0]) != len(args):
            raise ProtocolError("not arguments")
        for old, new in zip(args, after[0], strict=True):
            update(old, new)
        for pair in after[1]:
            if type(pair) is list and len(pair) == 2 and type(pair[0]) is str and pair[0] in kwargs:
                update(kwargs[pair[0]], pair[1])

    def names(self) -> dict[str, Any]:
        """The program's names that the tests use, as they are by now."""
        self._cancel_ahead()
        self.send(["q", "names", None])
        names = self.value(self.reply())
        if type(names) is not list or not all(type(name) is str for name, _ in pairs(names)):
            raise ProtocolError("not names")
        return dict(names)

    def next(self, target: Proxy) -> Any:
        """The next element of one of the program's iterators, fetched in batches once the first has been drawn."""
        items, ended, drawn = self._drawn.get(target._number, (deque(), False, 0))
        if not items and not ended:
            if drawn > ITERATOR_LIMIT:
                raise ProtocolError(f"an iterator of more than {ITERATOR_LIMIT} elements")
            batch = self.ask("next", target, BATCH if drawn else 1)
            if type(batch) is not list or len(batch) not in (2, 3) or type(batch[0]) is not list:
                raise ProtocolError("not elements")
            if len(batch) == 3:
                self._returned[target._number] = batch[2]
            items, ended = deque(batch[0]), batch[1] is not False or not batch[0]
        if items:
            value = items.popleft()
            self._drawn[target._number] = (items, ended, drawn + 1)
            return value
        self._drawn[target._number] = (items, True, drawn)
        raise StopIteration(self._returned.pop(target._number, None))


class ProgramExitedError(SystemExit):
    """The program called sys.exit. A test may catch it, as in plain evaluation."""


def _known_class(near: Any) -> type[BaseException]:
    """A class that both ends have, by name. Raises KeyError.

    StopIteration is RuntimeError, as in a generator: it would end the test's own loop over the calls.
    """
    if type(near) is not str:
        raise KeyError(type(near).__name__)
    kind = exceptions.class_named(near)
    return RuntimeError if issubclass(kind, StopIteration | StopAsyncIteration) else kind


TEXT = " text"  # no attribute that a program sets has this name


def _message(error: BaseException) -> str:
    """What str() said of the program's exception, where it came from there."""
    text = error.__dict__.get(TEXT)
    return text if text is not None else BaseException.__str__(error)


def text_of(value: Any) -> str:
    """A text that the candidate sent. Raises ProtocolError for anything else: str() of a proxy would ask again."""
    if type(value) is not str:
        raise ProtocolError("not a text")
    return value[:DETAIL]


def _mutable(value: Any) -> bool:
    if isinstance(value, list | dict | set | bytearray | deque) or arrays.is_changeable(value):
        return True
    return isinstance(value, tuple) and any(map(_mutable, value))


def update(old: Any, new: Any) -> None:
    """Make `old`, an argument as the test holds it, look like `new`, the argument as the program left it, in place."""
    if type(old) is not type(new):
        return
    if isinstance(old, list | deque):
        for index, (a, b) in enumerate(zip(list(old), list(new), strict=False)):
            if isinstance(a, list | dict | set | bytearray | deque) and type(a) is type(b):
                update(a, b)
                new[index] = a
        if isinstance(old, list):
            old[:] = new
        else:
            old.clear()
            old.extend(new)
    elif isinstance(old, dict):
        for key, value in list(new.items()):
            kept = old.get(key)
            if isinstance(kept, list | dict | set | bytearray | deque) and type(kept) is type(value):
                update(kept, value)
                new[key] = kept
        old.clear()
        old.update(new)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new
    elif isinstance(old, tuple):
        for a, b in zip(old, new, strict=False):
            update(a, b)
    elif arrays.is_changeable(old):
        arrays.overwrite(old, new)
