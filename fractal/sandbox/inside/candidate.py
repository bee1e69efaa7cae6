"""The container's end that runs programs: a candidate process, untrusted, forked and walled in by zygote.py.

It receives a program and then requests about it: to call its functions, to look into its objects. A candidate of a
program's own does that once; a shared candidate runs one after another of those programs that sharing.py lets share a
process, and hands the others back, compiled. All that it says is checked by the judge. Standard library only.
"""

import atexit
import base64
import builtins
import dataclasses
import gc
import marshal
import os
import sys
import threading
import types
from collections import deque
from typing import Any

from fractal.sandbox.inside import exceptions, sharing
from fractal.sandbox.inside.objects import ObjectTable, hides
from fractal.sandbox.inside.protocol import (
    FACTORIES,
    MAX_FRAME,
    ConnectionClosedError,
    Decoder,
    Encoder,
    FrameBuffer,
    ProtocolError,
    Reference,
    Table,
    Unencodable,
    pack,
    unpack,
)
from fractal.sandbox.inside.streams import Replaced

DETAIL = 500  # characters kept of an exception's message
PLAIN = frozenset({str, int, float, bool, type(None)})


class Callback:
    """A function of the test's that was passed to the program."""

    def __init__(self, endpoint: "CandidateEndpoint", number: int) -> None:
        self._endpoint, self._number = endpoint, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._number < 0:
            raise RuntimeError("the test is over")
        return self._endpoint.ask({"o": self._number}, args, kwargs)

    def retire(self) -> None:
        """What an earlier program left behind (a generator's `finally`) must not reach the next one's test."""
        self._number = -1


class CandidateEndpoint:
    """The candidate's end of the channel, and the program that it speaks for."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._shared = False
        self._buffer = FrameBuffer()
        self._bodies: deque[bytes] = deque()
        self._decode = Decoder(self._resolve).decode
        self._encoder = Encoder(self._refer)
        self._space: dict[str, Any] = {}
        self._callbacks: dict[int, Callback] = {}
        self._clear()

    def _clear(self) -> None:
        """Drop what the last program made."""
        for callback in self._callbacks.values():
            callback.retire()
        self._space.clear()
        self._objects = ObjectTable(False, self.encode)
        self.table = Table()
        self._callbacks = {}
        self._names: dict[str, Any] = {}
        self._made: dict[int, Any] = {}  # objects of the program's dataclasses that the test made
        self._made_numbers: dict[int, int] = {}  # by id
        self._runner: Any = None
        self._waited = False  # whether an answer held what the judge may ask about before it goes on

    def live(self, shared: bool) -> None:
        """Run the programs that arrive: one, or if shared, one after another until the judge hangs up."""
        self._shared = shared
        message = self._decode(self._receive())
        if message[0] == "script":
            run_script(marshal.loads(base64.b64decode(message[1])))
        while True:
            self._start(*message[1:])
            message = self._serve()
            if not self._shared:
                return
            self._clear()
            gc.collect()  # cheap: all that was there before the programs is frozen

    # --- the channel --------------------------------------------------------------------------------------------------

    def _receive(self) -> bytes:
        while not self._bodies:
            data = os.read(self._fd, 1 << 18)
            if not data:
                raise ConnectionClosedError
            self._bodies.extend(self._buffer.feed(data))
        return self._bodies.popleft()

    def _send(self, message: Any) -> None:
        try:
            frame = pack(self._objects.envelope(message))
        except Unencodable:
            frame = pack(
                ["e", "ValueError", f"a result of more than {MAX_FRAME >> 20} MiB", [[], [], None], "ResultTooLarge"]
            )
        sent = os.write(self._fd, frame)  # write(2), since sendto(2) is forbidden here
        while sent < len(frame):
            sent += os.write(self._fd, memoryview(frame)[sent:])

    def _refer(self, value: Any) -> dict[str, Any]:
        if type(value) is Callback:
            return {"o": value._number}
        if (given := self._objects.refer(value)) is not None:
            return given
        if isinstance(value, Exception):
            return {"ex": failure(value, self.encode)}
        return self._refer_to(value)

    def _refer_to(self, value: Any) -> dict[str, Any]:
        """A reference to an object that stays here."""
        self._waited = True
        if isinstance(value, type) and issubclass(value, Exception):
            return {"xc": [[self._class_data(c) for c in exceptions.own_classes(value)], exceptions.nearest(value)]}
        if self._made and id(value) in self._made_numbers:
            return {"mk": [0, self._made_numbers[id(value)], []]}
        if isinstance(value, type) and (data := self._dataclass_data(value)) is not None:
            return {"xd": [self.table.put(value), *data]}
        if is_plain_dataclass(type(value)):
            return {"xi": [self.table.put(value), self._refer_to(type(value))]}
        kind = "object"
        if isinstance(value, types.ModuleType):
            kind = f"module:{value.__name__}"
        elif hasattr(value, "__next__"):
            kind = "iterator"
        elif type(value) is types.CoroutineType:
            kind = "coroutine"
        settled = not hasattr(type(value), "__bool__") and not hasattr(type(value), "__len__")
        return {"x": [self.table.put(value), kind, True if settled else None]}

    def _dataclass_data(self, kind: type) -> list[Any] | None:
        """A dataclass as data: name, fields, and which methods were generated."""
        if not is_plain_dataclass(kind):
            return None
        fields = []
        for field in dataclasses.fields(kind):
            default = [] if field.default is dataclasses.MISSING else [self.encode(field.default)]
            made_by = getattr(field.default_factory, "__name__", "")
            factory = made_by if made_by in FACTORIES and getattr(builtins, made_by) is field.default_factory else ""
            if field.default_factory is not dataclasses.MISSING and not factory:
                return None
            fields.append([field.name, field.kw_only, default, factory])
        params = kind.__dataclass_params__  # type: ignore[attr-defined]
        flags = ["order"] * params.order + ["frozen"] * params.frozen
        flags += ["hash"] * (kind.__hash__ is not None) + ["repr"] * (params.repr and is_generated(kind, "__repr__"))
        return [kind.__name__, fields, flags]

    def _made_object(self, kind: type, number: int, given: list[Any]) -> Any:
        """An object of a dataclass as the test made it, the same one each time."""
        if number not in self._made:
            made = self._made[number] = kind(**dict(given))
            self._made_numbers[id(made)] = number
        return self._made[number]

    def _class_data(self, kind: type) -> list[Any]:
        """An exception class of the program's as data: number, name, and its bases by number or name."""
        bases = [base for base in kind.__bases__ if issubclass(base, Exception)]
        return [self.table.put(kind), kind.__name__, [exceptions.name_of(b) or self.table.put(b) for b in bases]]

    def _exception(self, near: str, details: list[Any], own: Any) -> Exception:
        """An exception of the test's as one of the program's."""
        kind = own if isinstance(own, type) else exceptions.class_named(near)
        error: Exception = exceptions.build(kind, details[0], dict(details[1]), hides)
        return error

    def _resolve(self, reference: Reference) -> Any:
        if "own" in reference.data:
            return self.table.get(reference.data["own"])
        if "object" in reference.data:
            return self._objects.resolve(reference)
        if "states" in reference.data:
            return self._objects.set_states(reference.data["states"])
        if "mk" in reference.data:
            kind, number, given = reference.data["mk"]
            return self._made_object(self.table.get(kind), number, given)
        if "exception" in reference.data:
            _, near, _, details, own = reference.data["exception"]
            return self._exception(near, details, own)
        if "near" in reference.data:
            return exceptions.class_named(reference.data["near"])
        number = reference.data["id"]
        return self._callbacks.setdefault(number, Callback(self, number))

    def encode(self, value: Any) -> Any:
        if type(value) in PLAIN and type(value) is not int:
            return value
        try:
            return self._encoder.encode(value)
        except (Unencodable, RecursionError, RuntimeError, ValueError):  # RuntimeError: changed while we walked it
            return self._refer_to(value)

    # --- a program ----------------------------------------------------------------------------------------------------

    def _start(
        self, serial: int, source: str, compiled: str, given: list[Any], names: list[str], isolate: bool
    ) -> None:
        """Run the program's text (or what another process compiled) and say which of the names it defines.

        A shared candidate hands back what may not share a process, compiled; with `isolate` it does so with all.
        """
        self._names = {}
        if compiled:
            code = marshal.loads(base64.b64decode(compiled))
        else:
            try:
                code = compile(source, "<program>", "exec", dont_inherit=True)
            except MemoryError as error:  # also what the parser raises for too many nested brackets
                return self._send(["syntax", serial, f"MemoryError: {error}"[:DETAIL], False])
            except (SyntaxError, ValueError, RecursionError, OverflowError, UnicodeError) as error:
                sure = isinstance(error, SyntaxError | ValueError)
                return self._send(["syntax", serial, f"{type(error).__name__}: {error}"[:DETAIL], sure])
            if self._shared:
                why = sharing.reason_against(code) or _reason_against(given[0])
                if why or isolate:
                    return self._send(["unfit", serial, why, base64.b64encode(marshal.dumps(code)).decode("ascii")])
        space = self._space = {}  # no __name__: as under exec(code, {}), it is that of builtins
        lines, classes, first = given
        try:
            for part in (*lines, code) if first else (code, *lines):
                exec(part, space)
            self._names = {n: space[n] for n in names if n in space}
            message: list[Any] = ["ready", serial, [[n, self.encode(v)] for n, v in self._names.items()]]
            self._objects.give(classes, space.get)  # not before: the judge defines them only now
        except BaseException as error:
            message = ["stopped", serial, failure(error, self.encode)]
        self._waited = False
        self._flush()
        return self._send(message)

    def _serve(self) -> Any:
        """Answer requests until something else arrives: a reply to a request of ours, or the next program.

        Calls are made here, not further down: a program's recursion may go as deep as in plain evaluation.
        """
        while True:
            body = self._receive()
            message = self._objects.open(self._decode(body))
            received = self._objects.received
            if message[0] != "q":
                return message
            op, target, *rest = message[1:]
            streams = None
            try:
                if op == "call":
                    args, kwargs = rest[0], dict(rest[1])
                    if len(rest) == 4:
                        streams = Replaced(*rest[3])
                    reply = ["r", self.encode(target(*args, **kwargs))]
                elif op == "run":
                    reply = ["r", self.encode(self._function(target)(*rest[0]))]
                elif op == "ahead":  # a call that the judge sent before it needed the answer
                    if self._waited or target not in self._names:
                        reply = ["skipped"]
                    else:
                        reply = ["r", self.encode(self._names[target](*rest[0], **dict(rest[1])))]
                else:
                    reply = ["r", self._answer(op, target, *rest)]
            except BaseException as error:
                reply = failure(error, self.encode)
            if op == "call" and rest[2]:
                reply += self._changed(body, args, kwargs)
            if streams is not None:
                reply = ["io", reply, *streams.restore()]
            for value in received:
                self._objects.refer(value)  # as the call left it
            self._flush()
            self._send(reply)

    def _function(self, target: str) -> Any:
        """The function that a test calls: a name of the program's, or "Solution().name", a method of a new object."""
        name, _, method = target.partition("().")
        value = self._names[name]
        return getattr(value(), method) if method else value

    def _changed(self, body: bytes, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
        """How a call left its arguments, if it changed them."""
        message = unpack(body)
        before = (message[1] if message[0] == "v" else message)[3:5]
        after = [[self.encode(v) for v in args], [[name, self.encode(kwargs[name])] for name, _ in before[1]]]
        return [after] if after != before else []

    def _flush(self) -> None:
        try:
            sys.stdout.flush()
        except BaseException:
            pass

    def _answer(self, op: str, target: Any, *rest: Any) -> Any:
        if op == "get":
            return self.encode(getattr(target, rest[0]))
        if op == "set":
            return setattr(target, rest[0], rest[1])
        if op == "delete":
            return delattr(target, rest[0])
        if op == "bool":
            return bool(target)
        if op == "item":
            return self.encode(target[rest[0]])
        if op == "setitem":
            target[rest[0]] = rest[1]
            return None
        if op == "len":
            return len(target)
        if op == "fields":
            return [self.encode(getattr(target, name)) for name in rest[0]]
        if op == "await":
            return self.encode(self._run_coroutine(target))
        if op == "iter":
            return self.encode(iter(target))
        if op == "next":  # up to rest[0] at once; fewer means the end
            items = []
            for _ in range(rest[0]):
                try:
                    items.append(self.encode(next(target)))
                except StopIteration as end:
                    return [items, True, self.encode(end.value)]
            return [items, False]
        if op in ("str", "repr"):
            return str(str(target) if op == "str" else repr(target))
        if op == "isinstance":
            return isinstance(target, rest[0])
        if op == "names":  # as they are by now
            return [[name, self.encode(self._space[name])] for name in self._names if name in self._space]
        raise ProtocolError(f"no operation {op}")

    def _run_coroutine(self, target: Any) -> Any:
        """Run it to its end, in the one event loop that the program's coroutines have in common."""
        import asyncio

        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(target)

    def ask(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of the test's."""
        self._send(
            ["q", "call", target, [self.encode(a) for a in args], [[k, self.encode(v)] for k, v in kwargs.items()]]
        )
        reply = self._serve()
        if reply[0] == "e":
            raise self._exception(reply[1], reply[3], reply[4])
        return reply[1]


def run_script(code: types.CodeType) -> None:
    """Run a program as `python3 program.py` does, and end the process with the exit code that this ends with."""
    exit_code = 0
    try:
        exec(code, sys.modules["__main__"].__dict__)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            exit_code = (error.code or 0) & 0xFF
        else:
            print(error.code, file=sys.stderr)
            exit_code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        exit_code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does: waits for threads
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        exit_code = exit_code or 120  # the interpreter's, for output that cannot be flushed
    os._exit(exit_code)


def is_generated(kind: type, name: str) -> bool:
    """Whether a method is the one that the decorator made."""
    code = getattr(vars(kind).get(name), "__code__", None)
    code = getattr(getattr(vars(kind).get(name), "__wrapped__", None), "__code__", code)
    return code is not None and code.co_filename != "<program>"


def is_plain_dataclass(kind: type) -> bool:
    """Whether objects of a class are what its generated __init__ and __eq__ make of all its fields."""
    known = vars(kind).get("__dataclass_fields__")
    if type(known) is not dict or type(kind) is not type:
        return False
    plain = all(f._field_type is _FIELD and f.init and f.compare for f in known.values())
    own = any(hasattr(kind, name) for name in ("__post_init__", "__len__", "__bool__"))
    made = (
        is_generated(kind, "__init__")
        and is_generated(kind, "__eq__")
        and getattr(kind, "__new__", None) is object.__new__
    )
    return plain and made and not own


_FIELD: Any = dataclasses._FIELD  # type: ignore[attr-defined]


def _reason_against(lines: list[str]) -> str:
    """Why what the setup gives would not do in a shared process."""
    return next(filter(None, (sharing.reason_against(compile(line, "<setup>", "exec")) for line in lines)), "")


def failure(error: BaseException, encode: Any, depth: int = 0) -> list[Any]:
    """An exception as data: name of the nearest class that has one, text, arguments with attributes and cause, and its
    own class or that class's name."""
    if isinstance(error, SystemExit):
        code = error.code if type(error.code) in (int, str) else None
        return ["x", code, f"SystemExit({error.code!r})"[:DETAIL]]
    kind = type(error)
    try:
        text = str(error)[:DETAIL]
    except BaseException:
        text = ""
    try:
        args = [encode(value) for value in error.args]
    except BaseException:
        args = [text]
    try:
        known = [[name, encode(value)] for name, value in exceptions.attributes(error).items()]
    except BaseException:
        known = []
    cause = None
    if isinstance(error.__cause__, Exception) and depth < exceptions.CAUSES:
        cause = failure(error.__cause__, encode, depth + 1)
    own = issubclass(kind, Exception) and exceptions.name_of(kind) is None
    details = [args, known, cause]
    return ["e", exceptions.nearest(kind), text, details, encode(kind) if own else kind.__name__[:64]]
