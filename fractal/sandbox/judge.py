"""The container's end that decides: a supervisor and one judge a slot, trusted; they hold the tests.

The supervisor reads frames from standard input and writes frames to standard output (see docs/sandbox.md for their
shapes). Each judge runs the test code itself; the program's functions are stand-ins that ask the candidate process, so
a verdict is computed where no program can reach it. A judge that is stuck in what a program returned is replaced.
Standard library only. Run inside the sandbox image: python3 judge.py --slots N.
"""

import os
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import argparse
import ast
import builtins
import errno
import json
import selectors
import signal
import socket
import subprocess
import time
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fractal.sandbox import checks
from fractal.sandbox.protocol import (
    EXCEPTIONS,
    Closed,
    Encoder,
    FrameBuffer,
    ProtocolError,
    Reference,
    Table,
    Unencodable,
    decode,
    pack,
    receive,
    unpack,
)

# Modules that a test may name through the program's own import (MBPP 596 does): the judge uses its own copy.
TRUSTED_MODULES = frozenset(
    "bisect cmath collections copy datetime decimal fractions functools heapq itertools json math numbers operator "
    "random re statistics string sys typing".split()
)
ITERATOR_LIMIT = 1_000_000  # elements drawn from one of the program's iterators
BATCH = 64  # elements of an iterator fetched at once after the first
OUTPUT_KEPT = 2000  # bytes of the program's output
DETAIL = 500
GRACE_S = 0.8  # after the wall limit, before the supervisor replaces a judge
DEFAULT_LIMITS = {"cpu_s": 4.0, "wall_s": 12.0, "memory_mib": 512, "file_mib": 16}


# --- what the tests see instead of the program -----------------------------------------------------------------------


class Gone(BaseException):
    """The candidate cannot answer any more. Not an Exception: a test's `except Exception` must not swallow it."""


class StandIn:
    """An object of the program's that stays in the candidate process.

    It can be called, indexed, iterated, and its attributes read and set; each of these asks the candidate and gives
    plain values or further stand-ins. It equals nothing but itself, and it does not take part in arithmetic or
    comparison: an object that answers those as it likes could satisfy a test without knowing the result.
    """

    __slots__ = ("_end", "_kind", "_number", "_truth")

    def __init__(self, end: "JudgeEnd", number: int, kind: str, truth: bool) -> None:
        for name, value in (("_end", end), ("_number", number), ("_kind", kind), ("_truth", truth)):
            object.__setattr__(self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._end.call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in ("__name__", "__doc__", "__dict__"):
            raise AttributeError(name)
        return self._end.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._end.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._end.ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._end.ask("setitem", self, key, value)

    def __len__(self) -> int:
        length = self._end.ask("len", self)
        if type(length) is not int or length < 0:
            raise ProtocolError("a length that is not a number")
        return length

    def __iter__(self) -> Iterator[Any]:
        if self._kind == "iterator":
            return self
        found: Any = self._end.ask("iter", self)
        return found if isinstance(found, StandIn) else iter(found)

    def __next__(self) -> Any:
        return self._end.next(self)

    def __bool__(self) -> bool:
        truth: bool = self._truth
        return truth

    def __str__(self) -> str:
        return str(self._end.ask("str", self))

    def __repr__(self) -> str:
        return str(self._end.ask("repr", self))

    def __instancecheck__(self, instance: Any) -> bool:
        if not isinstance(instance, StandIn):
            return False
        answer: object = self._end.ask("isinstance", instance, self)
        return answer is True

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class CandidateError(Exception):
    """Base of the stand-ins for exception classes of the program's own."""


class JudgeEnd:
    """The judge's end of the channel to one candidate."""

    def __init__(self, sock: socket.socket, wait: Any) -> None:
        self._sock = sock
        self._wait = wait  # waits until the socket is readable; raises Gone when the candidate has ended or must end
        self._table = Table()
        self._encoder = Encoder(self._refer)
        self._buffer = FrameBuffer()
        self._bodies: deque[bytes] = deque()
        self._stand_ins: dict[int, StandIn] = {}
        self._drawn: dict[int, tuple[deque[Any], bool, int]] = {}
        self.raised: list[BaseException] = []  # exceptions that came from the candidate, to tell them from the test's

    def _refer(self, value: Any) -> dict[str, Any]:
        if isinstance(value, StandIn):
            return {"o": value._number}
        if isinstance(value, types.FunctionType):
            return {"x": [self._table.put(value), "function", True]}
        if hasattr(value, "__next__"):
            return {"it": [self._encoder.encode(item) for item in value]}
        raise Unencodable(f"a test passes a {type(value).__name__}, which cannot cross into the sandbox")

    def _resolve(self, reference: Reference) -> Any:
        data = reference.data
        if "own" in data:
            return self._table.get(data["own"])
        number, kind, truth = data["id"], data["kind"], data["truth"]
        if type(kind) is not str or type(truth) is not bool or number < 0:
            raise ValueError("not a reference")
        if number not in self._stand_ins:
            self._stand_ins[number] = StandIn(self, number, kind[:80], truth)
        return self._stand_ins[number]

    def send(self, message: Any) -> None:
        try:
            self._sock.sendall(pack(message))
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died: the wait for its answer says how

    def receive(self) -> Any:
        """The next message. Raises Gone, or ProtocolError for what no honest candidate sends."""
        while not self._bodies:
            self._wait()
            try:
                data = self._sock.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            if not data:
                self._wait(closed=True)
            self._bodies.extend(self._buffer.feed(data))
        message = decode(self._bodies.popleft(), self._resolve)
        if type(message) is not list or not message or type(message[0]) is not str:
            raise ProtocolError("not a message")
        return message

    def reply(self) -> list[Any]:
        """Serve callbacks until the answer to our request is there."""
        while True:
            message: list[Any] = self.receive()
            if message[0] != "q":
                return message
            try:
                _, op, function, args, kwargs = message
                if op != "call" or not isinstance(function, types.FunctionType):
                    raise ProtocolError("only a test's functions can be called from the program")
                answer: list[Any] = ["r", self._encode(function(*args, **dict(kwargs)))]
            except (ValueError, TypeError) as error:
                answer = ["e", type(error).__name__, str(error)[:DETAIL], [str(error)[:DETAIL]]]
            except Exception as error:
                near = next(c.__name__ for c in type(error).__mro__ if c.__name__ in EXCEPTIONS)
                answer = ["e", near, str(error)[:DETAIL], [str(error)[:DETAIL]]]
            self.send(answer)

    def _encode(self, value: Any) -> Any:
        return self._encoder.encode(value)

    def ask(self, op: str, target: StandIn, *rest: Any) -> object:
        self.send(["q", op, self._refer(target), *map(self._encode, rest)])
        return self._value(self.reply())

    def _value(self, reply: list[Any]) -> Any:
        if reply[0] == "r" and len(reply) >= 2:
            return reply[1]
        if reply[0] == "e" and len(reply) == 5:
            raise self._exception(*reply[1:])
        if reply[0] == "x":
            raise LeftEarly(str(reply[-1])[:DETAIL])
        raise ProtocolError(f"an answer of kind {reply[0][:20]!r}")

    def _exception(self, near: Any, text: Any, args: Any, name: Any) -> BaseException:
        """The program's exception as one of the judge's: its built-in class, or a class of its own name below that."""
        base = EXCEPTIONS.get(near) if type(near) is str else None
        if base is None or type(args) is not list or type(name) is not str:
            raise ProtocolError("not an exception")
        kind: Any = base if name == near else type(name[:64], (base,), {})
        error: BaseException
        try:
            error = kind(*args)
        except Exception:
            error = RuntimeError(str(text)[:DETAIL])
        self.raised.append(error)
        return error

    def call(self, target: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mutable = any(map(_mutable, args))
        packed = [self._encode(value) for value in args]
        named = [[key, self._encode(value)] for key, value in kwargs.items()]
        self.send(["q", "call", self._refer(target), packed, named, mutable])
        reply = self.reply()
        value = self._value(reply)
        if len(reply) == 3 and type(reply[2]) is list and len(reply[2]) == len(args):
            for old, new in zip(args, reply[2], strict=True):
                update(old, new)
        return value

    def next(self, target: StandIn) -> Any:
        """The next element of one of the program's iterators, fetched in batches once the first has been drawn."""
        items, ended, drawn = self._drawn.get(target._number, (deque(), False, 0))
        if not items and not ended:
            if drawn > ITERATOR_LIMIT:
                raise ProtocolError(f"an iterator of more than {ITERATOR_LIMIT} elements")
            batch = self.ask("next", target, BATCH if drawn else 1)
            if type(batch) is not list or len(batch) != 2 or type(batch[0]) is not list:
                raise ProtocolError("not elements")
            items, ended = deque(batch[0]), batch[1] is not False or not batch[0]
        if items:
            value = items.popleft()
            self._drawn[target._number] = (items, ended, drawn + 1)
            return value
        self._drawn[target._number] = (items, True, drawn)
        raise StopIteration


class LeftEarly(BaseException):
    """The program called sys.exit. Not an Exception, so that no test swallows it."""


def _mutable(value: Any) -> bool:
    if isinstance(value, list | dict | set | bytearray | deque):
        return True
    return isinstance(value, tuple) and any(map(_mutable, value))


def update(old: Any, new: Any) -> None:
    """Make `old`, an argument as the test holds it, look like `new`, the argument as the program left it, in place."""
    if type(old) is not type(new):
        return
    if isinstance(old, list | deque):
        for place, (a, b) in enumerate(zip(list(old), list(new), strict=False)):
            if isinstance(a, list | dict | set | bytearray | deque) and type(a) is type(b):
                update(a, b)
                new[place] = a
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


# --- a problem's tests, compiled once --------------------------------------------------------------------------------


@dataclass
class Tests:
    """A problem as the judge uses it."""

    setup: types.CodeType | None
    tests: list[types.CodeType]
    entry_point: str
    imports: list[str]  # the setup's import lines: the program sees those names, too, as under exec in one namespace
    names: list[str]  # names to look up in the program
    own: dict[str, Any] = field(default_factory=dict)  # names that the reference imports: the judge's own copies


def prepare(problem: dict[str, Any]) -> Tests:
    """Compile a problem's tests and find which of their names belong to the program.

    A name belongs to the program if the reference defines it, or if nothing else does: so a program cannot replace
    `set` or `sorted` in a test, and MBPP 126, whose entry point is `sum`, still works. Raises SyntaxError.
    """
    setup = ast.parse(problem["setup"])
    tests = [ast.parse(test) for test in problem["tests"]]
    used, bound = _names([setup, *tests])
    try:
        reference = ast.parse(problem["reference"])
    except (SyntaxError, ValueError):
        reference = ast.parse("")
    defined: set[str] = {problem["entry_point"]}
    imported: dict[str, Any] = {}
    for node in reference.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported |= _own_imports(node)
    names = {n for n in used if n in defined or (n not in bound and not hasattr(builtins, n))}
    imports = [
        ast.unparse(node) for node in setup.body if isinstance(node, ast.Import | ast.ImportFrom) and _own_imports(node)
    ]
    return Tests(
        setup=compile(setup, "<setup>", "exec") if setup.body else None,
        tests=[compile(test, "<test>", "exec") for test in tests],
        entry_point=problem["entry_point"],
        imports=imports,
        names=sorted({*names, problem["entry_point"]}),
        own={name: value for name, value in imported.items() if name in names},
    )


def _names(trees: list[ast.Module]) -> tuple[set[str], set[str]]:
    """Names that the trees read, and names that they bind."""
    used: set[str] = set()
    bound: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                bound.add(node.name)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.ExceptHandler) and node.name:
                bound.add(node.name)
    return used, bound


def _own_imports(node: ast.Import | ast.ImportFrom) -> dict[str, Any]:
    """What an import statement binds, from the judge's own trusted modules; nothing for other modules."""
    found: dict[str, Any] = {}
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name in TRUSTED_MODULES:
                found[alias.asname or alias.name] = __import__(alias.name)
    elif node.module in TRUSTED_MODULES and not node.level:
        module = __import__(node.module)
        for alias in node.names:
            if alias.name == "*":
                found |= {n: getattr(module, n) for n in getattr(module, "__all__", dir(module)) if n[0] != "_"}
            elif hasattr(module, alias.name):
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


# --- one judge ------------------------------------------------------------------------------------------------------


class Slot:
    """A judge's own zygote, scratch folder and uid."""

    def __init__(self, number: int, uid: int, scratch: str) -> None:
        self.number, self.uid, self.scratch = number, uid, scratch
        self._control: socket.socket | None = None
        self._zygote: subprocess.Popen[bytes] | None = None

    def control(self) -> socket.socket:
        """The line to a living zygote; a fresh one is started where there is none."""
        if self._control is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "zygote.py")
            command = [sys.executable, "-s", "-P", "-B", here, str(theirs.fileno()), str(self.uid), self.scratch]
            self._zygote = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            theirs.close()
            self._control = ours
        return self._control

    def lose(self) -> None:
        """End the zygote (its candidate dies with it); the next sample gets a fresh one."""
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote.wait()
        if self._control is not None:
            self._control.close()
        self._zygote = self._control = None

    def tell(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        socket.send_fds(self.control(), [json.dumps(message).encode()], fds)
        return self.hear()

    def hear(self) -> dict[str, Any]:
        data = self.control().recv(4096)
        if not data:
            raise ConnectionError("the zygote is gone")
        answer: dict[str, Any] = json.loads(data)
        return answer

    def used(self) -> bool:
        """Whether a program left anything in the scratch folder (a file system of its own)."""
        state = os.statvfs(self.scratch)
        return state.f_files - state.f_ffree > 1 or state.f_bfree < state.f_blocks


class Run:
    """One sample in one slot: the candidate's process, its channel, its limits, and how it ended."""

    def __init__(self, slot: Slot, limits: dict[str, Any]) -> None:
        self._slot = slot
        self._limits = limits
        self.ended: str | None = None  # "timeout", "memory", "crashed", "forbidden": why it can answer no more
        self.detail = ""
        self.limit = ""  # which limit a timeout means: "cpu" or "wall"
        self.output = b""
        self.cpu_s = 0.0
        self._exit: dict[str, Any] | None = None
        ours, theirs = socket.socketpair()
        self._reader, writer = os.pipe()
        self.start = time.monotonic()
        self._deadline = self.start + limits["wall_s"]
        self.pid: int = slot.tell({"do": "fork", **limits}, [theirs.fileno(), writer])["pid"]
        theirs.close()
        os.close(writer)
        self._sock = ours
        ours.settimeout(limits["wall_s"])
        self._control = slot.control()
        self._poll = selectors.DefaultSelector()
        for item, kind in ((ours, "reply"), (self._reader, "output"), (self._control, "exit")):
            self._poll.register(item, selectors.EVENT_READ, kind)
        self.end = JudgeEnd(ours, self.wait)

    def wait(self, closed: bool = False) -> None:
        """Return when the candidate has something to say; raise Gone when it has ended or reached a limit.

        CPU time decides and wall time is the net. The candidate's CPU clock is read directly (clock_getcpuclockid(3)).
        """
        if closed:
            self._poll.unregister(self._sock)  # it hung up but may still run: its end, or a limit, is awaited
        while True:
            if self._exit is not None:
                raise Gone
            now = time.monotonic()
            used = self._cpu()
            if used > self._limits["cpu_s"]:
                self._stop("cpu", f"CPU time over {self._limits['cpu_s']:g} s")
            if now > self._deadline:
                self._stop("wall", f"wall time over {self._limits['wall_s']:g} s after {used:.2f} s of CPU")
            pause = min(self._deadline - now, max(self._limits["cpu_s"] - used, 0.01)) + 0.005
            ready = {key.data for key, _ in self._poll.select(pause)}
            if "output" in ready:
                self._drain()
            if "exit" in ready:
                self._died()
                self._poll.unregister(self._control)
            if "reply" in ready:  # also what it said before it died
                return

    def _cpu(self) -> float:
        try:
            return time.clock_gettime(~self.pid << 3 | 2)
        except OSError:
            return 0.0  # it has ended; its exit record says the rest

    def _drain(self) -> None:
        data = os.read(self._reader, 1 << 16)
        if not data:
            self._poll.unregister(self._reader)
        if len(self.output) < OUTPUT_KEPT:
            self.output = (self.output + data)[:OUTPUT_KEPT]

    def _stop(self, limit: str, detail: str) -> None:
        self.ended, self.limit, self.detail = "timeout", limit, detail
        raise Gone

    def _died(self) -> None:
        record = self._exit = self._slot.hear()
        code = record["exit"]
        if self.ended is not None:
            return
        if code in (-signal.SIGXCPU,) or (code == -signal.SIGKILL and record["cpu_s"] >= self._limits["cpu_s"]):
            self.ended, self.limit, self.detail = "timeout", "cpu", f"CPU time over {self._limits['cpu_s']:g} s"
        elif code == -signal.SIGSYS:
            self.ended, self.detail = "forbidden", "a system call that the sandbox forbids (SIGSYS)"
        elif code == -signal.SIGKILL:
            self.ended, self.detail = "memory", "killed by the kernel, as when memory runs out (SIGKILL)"
        elif code < 0:
            self.ended, self.detail = "crashed", f"died by {signal.Signals(-code).name}"
        else:
            self.ended, self.detail = "crashed", f"left with exit code {code}"

    def close(self) -> None:
        """End the candidate, wait until it is gone, and empty its scratch folder."""
        try:
            if self._exit is None:
                os.kill(self.pid, signal.SIGKILL)
                self._exit = self._slot.hear()
            self.cpu_s = self._exit["cpu_s"]
            if self._slot.used() and not self._slot.tell({"do": "wipe"}, [])["wiped"]:
                raise RuntimeError("a program's files could not be removed")
        finally:
            self._poll.close()
            self._sock.close()
            os.close(self._reader)


def judge(slot: Slot, tests: Tests, code: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Run one program against a problem's tests. The verdict comes from what the test code does, here."""
    run = Run(slot, limits)
    results: list[str] = []
    try:
        status, detail = _start(run, tests, code)
        if isinstance(detail, dict):
            status, detail = _run_tests(run, tests, detail, results)
    except Gone:
        status, detail = run.ended or "crashed", run.detail
    except LeftEarly as error:
        status, detail = "crashed", f"left with {error}"
    except ProtocolError as error:
        status, detail = "error", f"the program sent what is not a value: {error}"
    finally:
        seconds = time.monotonic() - run.start
        run.close()
    results += ["not_run"] * (len(tests.tests) - len(results))
    if status != "passed" and run.output:
        detail = f"{detail} | printed: {run.output.decode('utf-8', 'replace')[:200]}"
    return {
        "status": status,
        "tests": results,
        "seconds": round(seconds, 6),
        "cpu_seconds": round(run.cpu_s, 6),
        "detail": detail[: 2 * DETAIL],
        "limit": run.limit,
    }


def _start(run: Run, tests: Tests, code: str) -> tuple[str, Any]:
    """Send the program. Returns ("", the names for the tests) or a final status with its detail."""
    run.end.send(["program", code, tests.imports, tests.names])
    message = run.end.receive()
    if message[0] == "syntax":
        return "syntax_error", str(message[1])
    if message[0] == "x":
        return "crashed", f"left with {message[-1]}"
    if message[0] == "e" and len(message) == 5:
        return ("memory" if message[1] == "MemoryError" else "error"), _describe(message[4], message[2])
    if message[0] != "ready" or len(message) != 2 or type(message[1]) is not list:
        raise ProtocolError("not a greeting")
    found: dict[str, Any] = {}
    for pair in message[1]:
        if type(pair) is not list or len(pair) != 2 or pair[0] not in tests.names:
            raise ProtocolError("not a name of the tests")
        found[pair[0]] = tests.own.get(pair[0], pair[1])
    if tests.entry_point not in found:
        return "missing", f"{tests.entry_point} is not defined"
    return "", found


def _run_tests(run: Run, tests: Tests, names: dict[str, Any], results: list[str]) -> tuple[str, str]:
    """Run setup and tests in one namespace; the first test that does not hold decides."""
    names["__name__"] = "tests"
    verdict: tuple[str, str] = ("passed", "")
    if tests.setup is not None:
        status, detail = _run_code(run, tests.setup, names)
        if status != "passed":
            return ("error" if status == "failed" else status), detail
    for number, test in enumerate(tests.tests, 1):
        status, detail = _run_code(run, test, names)
        results.append(status)
        if status != "passed" and verdict[0] == "passed":
            verdict = status, f"test {number}: {detail}"
        if run.ended is not None or status == "crashed":
            break
    return verdict


def _run_code(run: Run, code: types.CodeType, names: dict[str, Any]) -> tuple[str, str]:
    """One statement list of the tests. An assertion that fails here is `failed`; one raised there is `error`."""
    try:
        exec(code, names)
    except Gone:
        return run.ended or "crashed", run.detail
    except LeftEarly as error:
        return "crashed", f"left with {error}"
    except ProtocolError as error:
        return "error", f"the program sent what is not a value: {error}"
    except TimeoutError:
        run.ended, run.limit, run.detail = "timeout", "wall", "the program does not read what it is sent"
        return run.ended, run.detail
    except AssertionError as error:
        if not any(error is raised for raised in run.end.raised):
            return "failed", f"assertion false{': ' + str(error) if str(error) else ''}"[:DETAIL]
        return "error", _describe("AssertionError", str(error))
    except MemoryError as error:
        if any(error is raised for raised in run.end.raised):
            return "memory", "MemoryError"
        return "error", "MemoryError while the test looked at the result"
    except Exception as error:
        return "error", _describe(type(error).__name__, str(error))
    if run.ended is not None:  # a bare `except:` in the test swallowed it
        return run.ended, run.detail
    return "passed", ""


def _describe(name: Any, text: Any) -> str:
    return f"{name}: {text}"[:DETAIL] if text else str(name)[:DETAIL]


def work(sock: socket.socket, slot: Slot) -> None:
    """A judge's life: samples in, verdicts out, one at a time."""
    problems: dict[str, Tests | str] = {}
    sys.set_int_max_str_digits(0)
    slot.control()
    while True:
        try:
            request = unpack(receive(sock))
        except Closed:
            slot.lose()
            return
        key = request["key"]
        if "problem" in request:
            try:
                problems[key] = prepare(request["problem"])
            except (SyntaxError, ValueError, RecursionError) as error:
                problems[key] = f"the problem's tests do not compile: {type(error).__name__}: {error}"
        tests = problems[key]
        if isinstance(tests, str):
            verdict = sandbox_error(tests)
        else:
            try:
                verdict = judge(slot, tests, request["code"], request["limits"])
            except Exception as error:
                slot.lose()
                verdict = sandbox_error(f"{type(error).__name__}: {error}", retry=True)
        sock.sendall(pack(verdict))


def sandbox_error(detail: str, retry: bool = False) -> dict[str, Any]:
    """A verdict that is no label: our fault, or the problem's."""
    return {"status": "sandbox_error", "detail": detail[:DETAIL], "retry": retry}


# --- the supervisor --------------------------------------------------------------------------------------------------


class Worker:
    """A judge process as the supervisor sees it."""

    def __init__(self, slot: Slot, others: list["Worker"]) -> None:
        self.slot = slot
        self.known: set[str] = set()
        self.sample: dict[str, Any] | None = None
        self.deadline = 0.0
        self.buffer = FrameBuffer()
        self.sock, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.sock.close()
                for other in others:
                    other.sock.close()
                os.close(0)
                os.dup2(2, 1)  # nothing but the supervisor writes frames
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                work(theirs, slot)
            finally:
                os._exit(0)
        theirs.close()

    def give(self, sample: dict[str, Any], problem: dict[str, Any]) -> None:
        request = {"key": sample["key"], "code": sample["code"], "limits": sample["limits"]}
        if sample["key"] not in self.known:
            request["problem"] = problem
            self.known.add(sample["key"])
        self.sample = sample
        self.deadline = time.monotonic() + sample["limits"]["wall_s"] + GRACE_S
        self.sock.sendall(pack(request))

    def end(self) -> None:
        """Kill the judge; its zygote and candidate die with their sockets and parents."""
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        self.sock.close()


def supervise(slots: list[Slot], found: dict[str, Any]) -> None:
    """Read samples, hand them to idle judges, replace judges that are stuck or dead, write verdicts as they come."""
    poll = selectors.DefaultSelector()
    workers: list[Worker] = []
    for slot in slots:
        workers.append(Worker(slot, workers))
        poll.register(workers[-1].sock, selectors.EVENT_READ, workers[-1])
    poll.register(0, selectors.EVENT_READ, None)
    buffer, queue, problems = FrameBuffer(), deque[dict[str, Any]](), dict[str, dict[str, Any]]()
    open_input = True
    _write({"type": "ready", "slots": len(slots), "checks": found})

    def replace(worker: Worker) -> None:
        poll.unregister(worker.sock)
        worker.end()
        workers.remove(worker)
        _end_strays(worker.slot)
        workers.append(Worker(worker.slot, workers))
        poll.register(workers[-1].sock, selectors.EVENT_READ, workers[-1])

    while open_input or queue or any(w.sample for w in workers):
        for worker in workers:
            if queue and worker.sample is None:
                sample = queue.popleft()
                worker.give(sample, problems[sample["key"]])
        busy = [w.deadline for w in workers if w.sample]
        pause = max(0.0, min(busy) - time.monotonic()) if busy else None
        for key, _ in poll.select(pause):
            if key.data is None:
                data = os.read(0, 1 << 20)
                if not data:
                    open_input = False
                    poll.unregister(0)
                for body in buffer.feed(data):
                    message = unpack(body)
                    if message["type"] == "problem":
                        problems[message["key"]] = message["problem"]
                    else:
                        queue.append(message)
                continue
            worker = key.data
            if worker not in workers:
                continue
            sample = worker.sample
            data = worker.sock.recv(1 << 20)
            if not data:  # the judge died: ours to answer for, and the host sends the sample once more
                verdict = sandbox_error("the judge died", retry=True)
                replace(worker)
            else:
                bodies = worker.buffer.feed(data)
                if not bodies:
                    continue
                verdict, worker.sample = unpack(bodies[0]), None
            if sample is not None:
                _write({"type": "verdict", "id": sample["id"], **verdict})
        now = time.monotonic()
        for worker in list(workers):
            stuck = worker.sample
            if stuck is None or worker.deadline > now:
                continue
            replace(worker)
            detail = "wall time over: the judge was still busy with what the program returned"
            verdict = {"status": "timeout", "limit": "wall", "seconds": stuck["limits"]["wall_s"], "detail": detail}
            _write({"type": "verdict", "id": stuck["id"], **verdict})
    for worker in workers:
        worker.end()


def _end_strays(slot: Slot) -> None:
    """Kill what a killed judge leaves, its zygote and its candidate, and reap what was re-parented to us."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/status") as file:
                uid = next(line.split()[1] for line in file if line.startswith("Uid:"))
            with open(f"/proc/{name}/cmdline", "rb") as file:
                command = file.read().split(b"\0")
            if uid == str(slot.uid) or command[-2:-1] == [slot.scratch.encode()]:
                os.kill(int(name), signal.SIGKILL)
        except (OSError, StopIteration):
            continue  # it ended while we looked
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _write(message: dict[str, Any]) -> None:
    data = memoryview(pack(message))
    while data:
        data = data[os.write(1, data) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--first-uid", type=int, default=100_000)
    parser.add_argument("--scratch", default="/scratch", help="holds a file system 0, 1, … for each slot")
    args = parser.parse_args()
    slots = [Slot(i, args.first_uid + i, f"{args.scratch}/{i}") for i in range(args.slots)]
    try:
        supervise(slots, checks.inspect())
    except (BrokenPipeError, KeyboardInterrupt):
        pass
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise


if __name__ == "__main__":
    main()
