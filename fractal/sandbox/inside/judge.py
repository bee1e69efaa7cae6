"""The container's end that decides: one judge a slot, trusted; it holds the tests and runs them itself.

The program's functions are proxies that ask a candidate process, so a verdict is computed where no program can reach
it. Programs that sharing.py lets share a process run one after another in the slot's shared candidate; all others, and
whatever did not end there in an ordinary way, run in a process of their own. Forked by supervisor.py. Standard library
only.
"""

import resource
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fractal.sandbox.inside import protections, sharing, streams
from fractal.sandbox.inside.call_runner import CallRunner
from fractal.sandbox.inside.calls import Calls
from fractal.sandbox.inside.candidate_process import (
    AFTER_CALL_CPU_S,
    AFTER_FAILURE_CPU_S,
    CandidateProcess,
    ProgramRun,
    Slot,
)
from fractal.sandbox.inside.protocol import (
    FORGET,
    JUDGE_MEMORY,
    PROBLEM,
    READY,
    SAMPLE_HEAD,
    VERDICT,
    VERDICT_HEAD,
    FrameBuffer,
    ProtocolError,
    pack,
    sample_head,
    unpack,
)
from fractal.sandbox.inside.proxy import DETAIL, CandidateEndedError, ProgramExitedError, text_of
from fractal.sandbox.inside.proxy_types import Proxy
from fractal.sandbox.inside.scripts import record_script, run_script
from fractal.sandbox.inside.suite import Suite, prepare

SHARED_CPU_S = 0.25  # a program that takes longer goes on from the start in a process of its own
SHARED_WALL_S = 0.5
SHARED_LIFE = 2000  # programs until a shared candidate is replaced
ORDINARY = ("passed", "failed", "error", "missing", "syntax_error")  # endings that need no second look


class Outcome:
    """A program's status, in the making."""

    def __init__(self, status: str, detail: str = "", results: list[str] | None = None) -> None:
        self.status, self.detail, self.results = status, detail, [] if results is None else results
        self.values: list[str] = []  # what the reference returned, where it is to be recorded


class Judge:
    """One slot's judge: its zygote, its shared candidate, and the samples it is given."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._shared: CandidateProcess | None = None
        self._serial = 0

    def close(self) -> None:
        """End the zygote and what it forked, whatever state they are in."""
        shared, self._shared = self._shared, None
        try:
            if shared is not None:
                shared.end()
        except OSError:
            pass  # the zygote is gone already, and its candidates with it
        self.slot.end_zygote()

    def judge(self, suite: Suite, code: str, limits: dict[str, Any], isolate: bool = False) -> dict[str, Any]:
        """Run one program against a problem's tests. The verdict comes from what the test code does, here."""
        begin = time.monotonic()
        if suite.scripts is not None:
            return self._judge_script(suite, code, limits, begin)
        compiled, fit = "", False
        if len(code) <= sharing.MAX_SOURCE:
            outcome, run, compiled, fit = self._in_shared(suite, code, limits, begin, isolate)
            if outcome is not None:
                return _verdict(suite, outcome, run, time.monotonic() - begin, fit)
        candidate = CandidateProcess(self.slot, limits, shared=False)
        try:
            run = ProgramRun(candidate, limits["cpu_s"], limits["wall_s"], begin + limits["wall_s"])
            self._serial += 1
            outcome = _judge(suite, run, self._serial, "" if compiled else code, compiled, False)
            run.drain()
        finally:
            candidate.end()
        self._wipe()
        return _verdict(suite, outcome, run, time.monotonic() - begin, fit)

    def _judge_script(self, suite: Suite, code: str, limits: dict[str, Any], begin: float) -> dict[str, Any]:
        """Run a script once for each test, in a process of its own; it is compiled once, in the shared candidate."""
        outcome, run, compiled, _ = self._in_shared(suite, code, limits, begin, isolate=True)
        if not compiled:
            outcome = outcome or Outcome(run.ended or "error", run.detail or "the program cannot be compiled")
            return _verdict(suite, outcome, run, time.monotonic() - begin, False)
        outcome = Outcome("passed")
        cpu_s = slowest_s = 0.0
        for number, (text, expected) in enumerate(suite.scripts or [], 1):
            deadline = time.monotonic() + limits["wall_s"]
            if suite.record:
                outcome.values, run = record_script(self.slot, compiled, text, limits, deadline)
                self._wipe()
                outcome.status, run.output = run.ended or "passed", b""
                return _verdict(suite, outcome, run, time.monotonic() - begin, False)
            status, detail, run = run_script(self.slot, compiled, text, expected, suite.atol, limits, deadline)
            self._wipe()
            cpu_s, slowest_s = cpu_s + run.cpu_s(), max(slowest_s, run.cpu_s())
            outcome.results.append(status)
            if status != "passed":
                outcome.status, outcome.detail = status, f"test {number}: {detail}"
                break
        verdict = _verdict(suite, outcome, run, time.monotonic() - begin, False)
        return verdict | {"cpu_seconds": round(cpu_s, 6), "slowest_s": round(slowest_s, 6)}

    def _wipe(self) -> None:
        """Remove what a program left in its folder."""
        if self.slot.is_used() and not self.slot.request({"do": "wipe"}, [])["wiped"]:
            raise RuntimeError("a program's files could not be removed")

    def _in_shared(
        self, suite: Suite, code: str, limits: dict[str, Any], begin: float, isolate: bool
    ) -> tuple[Outcome | None, ProgramRun, str, bool]:
        """Try the shared candidate. No Outcome: the program needs its own process (compiled, if it came so far)."""
        worn_out = self._shared is not None and self._shared.programs >= SHARED_LIFE
        if self._shared is not None and (worn_out or self._shared.memory_mib != limits["memory_mib"]):
            self._shared.end()
            self._shared = None
        if self._shared is None:
            self._shared = CandidateProcess(self.slot, limits, shared=True)
        candidate = self._shared
        candidate.programs += 1
        wall_s = min(SHARED_WALL_S, limits["wall_s"])
        run = ProgramRun(candidate, min(SHARED_CPU_S, limits["cpu_s"]), wall_s, begin + wall_s)
        self._serial += 1
        compiled = ""
        keep = late = False
        try:
            outcome = _judge(suite, run, self._serial, code, "", isolate)
            if outcome.status == "unfit":
                keep, compiled = True, outcome.detail
            else:
                fine = outcome.status in ORDINARY and run.plain
                keep = fine and run.ended is None
                late = fine and run.limit == "cpu"  # after the test that decided
                run.drain()
        finally:
            if not keep:
                candidate.end()
                self._shared = None
        if compiled or not (keep or late):
            return None, run, compiled, run.fit
        return outcome, run, "", True


def _verdict(suite: Suite, outcome: Outcome, run: ProgramRun, seconds: float, fit: bool) -> dict[str, Any]:
    results = outcome.results + ["not_run"] * (suite.size - len(outcome.results))
    detail = outcome.detail
    if outcome.status != "passed" and run.output:
        detail = f"{detail} | printed: {run.output.decode('utf-8', 'replace')[:200]}"
    return {
        "status": outcome.status,
        "tests": results,
        "seconds": round(seconds, 6),
        "cpu_seconds": round(run.cpu_s(), 6),
        "detail": _printable(detail[: 2 * DETAIL]),
        "limit": run.limit,
        "fit": fit,
        **({"values": outcome.values} if outcome.values else {}),
    }


def _judge(suite: Suite, run: ProgramRun, serial: int, code: str, compiled: str, isolate: bool) -> Outcome:
    """Send a program with the calls that can be made ahead, then run the tests."""
    results: list[str] = []
    ahead = b"" if isolate else suite.ahead_frames
    try:
        run.endpoint.send_frames(pack(["program", serial, code, compiled, suite.given, suite.names, isolate]) + ahead)
        outcome, names = _start_program(suite, run, serial)
        if outcome is not None:
            return outcome
        if suite.calls is not None:
            return _run_calls(run, suite, suite.calls, results)
        run.endpoint.ahead.extend(suite.ahead)
        run.endpoint.entry = names.get(suite.entry_point)
        return _run_tests(run, suite, names, results)
    except CandidateEndedError:
        return Outcome(run.ended or "crashed", run.detail, results)
    except ProgramExitedError as error:
        return Outcome("crashed", f"left with {error}", results)
    except ProtocolError as error:
        run.plain = False
        return Outcome("error", f"the program sent what is not a value: {error}", results)
    finally:
        streams.restore()


def _start_program(suite: Suite, run: ProgramRun, serial: int) -> tuple[Outcome | None, dict[str, Any]]:
    """What came of running the program's own statements: the names for the tests, or a final status."""
    message = run.endpoint.receive()
    while run.shared and message[0] in ("r", "e", "skipped"):  # answers that an earlier program's tests did not want
        message = run.endpoint.receive()
    kind, rest = message[0], message[1:]
    if not rest or rest[0] != serial:
        raise ProtocolError("not a greeting")
    if kind == "syntax" and len(rest) == 3:
        run.plain = rest[2] is True
        return Outcome("syntax_error", text_of(rest[1])), {}
    if kind == "unfit" and run.shared and len(rest) == 3 and type(rest[2]) is str:
        run.fit = rest[1] == ""
        return Outcome("unfit", rest[2]), {}
    run.fit = run.shared
    if kind == "stopped" and len(rest) == 2 and type(rest[1]) is list and rest[1]:
        error = rest[1]
        if error[0] == "x":
            return Outcome("crashed", f"left with {text_of(error[-1])}"), {}
        if error[0] == "e" and len(error) == 5:
            name = error[4].__name__ if isinstance(error[4], type) else text_of(error[4])
            text = text_of(error[2])
            _not_plain(run, error[1])
            return Outcome("memory" if error[1] == "MemoryError" else "error", _describe(name, text)), {}
    if kind != "ready" or len(rest) != 2 or type(rest[1]) is not list:
        raise ProtocolError("not a greeting")
    names: dict[str, Any] = {}
    for pair in rest[1]:
        if type(pair) is not list or len(pair) != 2 or pair[0] not in suite.names:
            raise ProtocolError("not a name of the tests")
        names[pair[0]] = suite.own.get(pair[0], pair[1])
    if suite.entry_point not in names:
        return Outcome("missing", f"{suite.entry_point} is not defined"), {}
    return None, names


def _run_tests(run: ProgramRun, suite: Suite, names: dict[str, Any], results: list[str]) -> Outcome:
    """Run setup and tests in one namespace; the first test that does not hold decides."""
    if stale := [name for name in suite.fresh if name in names and not isinstance(names[name], Proxy | type)]:
        run.endpoint.after_call = partial(_refresh, run, stale, names)
    verdict = Outcome("passed", "", results)
    run.endpoint.objects.give(suite.given.classes, names.get)
    if suite.setup is not None:
        status, detail = _run_code(run, partial(exec, suite.setup, names))
        if status != "passed":
            return Outcome("error" if status == "failed" else status, detail)
    for number, test in enumerate(suite.tests, 1):
        left = len(run.endpoint.ahead)
        status, detail = _run_code(run, partial(exec, test, names))
        results.append(status)
        if status != "passed" and verdict.status == "passed":
            verdict.status, verdict.detail = status, f"test {number}: {detail}"
            if status in ("failed", "error"):
                run.decided(AFTER_FAILURE_CPU_S)
        if run.ended is not None or status == "crashed":
            break
        if left and len(run.endpoint.ahead) == left:  # the test ended before its call: take the answer out of the way
            run.endpoint.ahead.popleft()
            run.endpoint.reply()
    if verdict.status == "passed" and not run.endpoint.requests and not _holds_value(suite, names):
        return Outcome("sandbox_error", "the problem's tests never use the program", results)
    return verdict


def _holds_value(suite: Suite, names: dict[str, Any]) -> bool:
    """Whether the tests see a value of the program's without asking for it: a constant that it defines."""
    return any(name in names and not isinstance(names[name], Proxy) for name in suite.names if name not in suite.own)


def _run_calls(run: ProgramRun, suite: Suite, calls: Calls, results: list[str]) -> Outcome:
    """Make the calls; the first one that is wrong decides."""
    runner = CallRunner(run.endpoint, calls)
    outcome = Outcome("passed", "", results)
    for number in range(suite.size):
        status, detail = _run_code(run, partial(runner.check, number))
        results.append(status)
        if status != "passed":
            outcome.status, outcome.detail = status, f"test {number + 1}: {detail}"
            if status in ("failed", "error"):
                run.decided(AFTER_CALL_CPU_S)
                _run_code(run, runner.receive_all)
            break
    outcome.values = runner.values
    return outcome


def _refresh(run: ProgramRun, stale: list[str], names: dict[str, Any]) -> None:
    """Let the test see the program's globals as the call left them."""
    if run.ended is None:
        current = run.endpoint.names()
        names.update((name, current[name]) for name in stale if name in current)


def _run_code(run: ProgramRun, code: Callable[[], None]) -> tuple[str, str]:
    """A part of the tests. An assertion that fails here is `failed`; one raised there is `error`."""
    try:
        code()
    except CandidateEndedError:
        return run.ended or "crashed", run.detail
    except ProgramExitedError as error:
        return "crashed", f"left with {error}"
    except ProtocolError as error:
        run.plain = False
        return "error", f"the program sent what is not a value: {error}"
    except Exception as error:
        if run.ended is not None:  # unittest, say, swallowed it
            return run.ended, run.detail
        return _raised(run, error)
    if run.ended is not None:  # a bare `except:` in the test swallowed it
        return run.ended, run.detail
    return "passed", ""


def _raised(run: ProgramRun, error: Exception) -> tuple[str, str]:
    """What an exception that left the tests means for the program."""
    if isinstance(error, AssertionError):
        text = _text(run, error)
        if not any(error is raised for raised in run.endpoint.raised):
            return "failed", f"assertion false{': ' + text if text else ''}"[:DETAIL]
        return "error", _describe("AssertionError", text)
    if isinstance(error, MemoryError):
        run.plain = False
        if any(error is raised for raised in run.endpoint.raised):
            return "memory", "MemoryError"
        return "error", "MemoryError while the test looked at the result"
    _not_plain(run, type(error).__name__)
    return "error", _describe(type(error).__name__, _text(run, error))


def _not_plain(run: ProgramRun, name: Any) -> None:
    """Errors that may depend on what a process did before are looked at again in a fresh one."""
    if name in ("RecursionError", "MemoryError", "ResultTooLarge"):
        run.plain = False


def _text(run: ProgramRun, error: Exception) -> str:
    """What an exception says. Without asking the candidate: a proxy in it could answer with another exception."""
    if id(error) in run.endpoint.texts:
        return run.endpoint.texts[id(error)]
    if all(type(value) in (str, int, float, bool, type(None)) for value in error.args):
        return str(error)
    return " ".join(value if type(value) is str else type(value).__name__ for value in error.args)


def _describe(name: str, text: str) -> str:
    return f"{name}: {text}"[:DETAIL] if text else name[:DETAIL]


# --- the judge's process ----------------------------------------------------------------------------------------------


def work(sock: socket.socket, slot: Slot) -> None:
    """Samples in, verdicts out, one at a time; first, what the check of a candidate found."""
    # The soft limit alone: candidates, which descend from here, may be given more.
    resource.setrlimit(resource.RLIMIT_AS, (JUDGE_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    judge = Judge(slot)
    suites: dict[bytes, Suite | str] = {}
    sock.sendall(pack(inspect_candidate(judge), READY))
    buffer = FrameBuffer()
    while data := sock.recv(1 << 18):
        for body in buffer.feed(data):
            if body[:1] == FORGET:
                suites.clear()
            elif body[:1] == PROBLEM:
                suites[body[1:17]] = _prepare(body[17:])
            else:
                head = sample_head(body)
                verdict = _attempt(judge, suites[head.key], body[SAMPLE_HEAD.size :])
                sock.sendall(pack(verdict, VERDICT_HEAD.pack(VERDICT, head.id)))
    judge.close()


def _prepare(body: bytes) -> Suite | str:
    try:
        return prepare(unpack(body))
    except (SyntaxError, ValueError, RecursionError, MemoryError, ProtocolError) as error:
        return f"the problem's tests do not compile: {type(error).__name__}: {error}"


def _attempt(judge: Judge, suite: Suite | str, body: bytes) -> dict[str, Any]:
    if isinstance(suite, str):
        return sandbox_error(suite)
    try:
        code, limits, isolate = unpack(body)
        return judge.judge(suite, code, limits, isolate)
    except Exception as error:
        judge.close()
        parts = [value for value in error.args if type(value) in (str, int)]  # no proxy: its str() would ask
        return sandbox_error(f"{type(error).__name__}: {' '.join(map(str, parts))}", retry=True)


def sandbox_error(detail: str, retry: bool = False) -> dict[str, Any]:
    """A verdict that is no label: our fault, or the problem's."""
    return {"status": "sandbox_error", "detail": _printable(detail[:DETAIL]), "retry": retry}


def _printable(text: str) -> str:
    """Lone surrogates escaped: not every reader of JSON takes them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def inspect_candidate(judge: Judge) -> dict[str, dict[str, Any]]:
    """What protects a candidate of this slot, as a program of ours sees it from inside one, of its own and shared."""
    tests = ["result.append(inspect())"]
    suite = prepare({"kind": "asserts", "setup": "", "reference": "", "entry_point": "inspect", "tests": tests})
    suite.ahead.clear()
    limits = {"cpu_s": 10.0, "wall_s": 20.0, "memory_mib": 512, "file_mib": 16}
    returned: list[Any] = []
    problem = "it returned nothing"
    candidate = CandidateProcess(judge.slot, limits, shared=False)
    try:
        run = ProgramRun(candidate, 10.0, 20.0, time.monotonic() + 20)
        run.endpoint.send_frames(
            pack(["program", 0, protections.INSPECT_CANDIDATE, "", suite.given, suite.names, False])
        )
        outcome, names = _start_program(suite, run, 0)
        if outcome is None:
            exec(suite.tests[0], {**names, "result": returned})
        else:
            problem = outcome.detail
    except (CandidateEndedError, ProgramExitedError, ProtocolError, Exception) as error:
        run.drain()
        problem = f"{type(error).__name__}: {error} {run.detail} {run.output.decode('utf-8', 'replace')}"
    finally:
        candidate.end()
    return protections.candidate_protections(returned[0] if returned else {"problem": problem}, judge.slot.uid, limits)
