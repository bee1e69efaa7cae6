"""The container's end that decides: one judge a slot, trusted; it holds the tests and runs them itself.

The program's functions are stand-ins that ask a candidate process, so a verdict is computed where no program can reach
it. Programs that screen.py lets share a process run one after another in the slot's shared candidate; all others, and
whatever did not end there in an ordinary way, run in a process of their own. Forked by supervisor.py. Standard library
only.
"""

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fractal.sandbox.inside import checks, screen
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
from fractal.sandbox.inside.standin import DETAIL, Channel, Gone, JudgeEnd, LeftEarly, StandIn, text_of
from fractal.sandbox.inside.suite import Suite, prepare

OUTPUT_KEPT = 2000  # bytes of a program's output
SHARED_CPU_S = 0.25  # a program that takes longer goes on from the start in a process of its own
SHARED_WALL_S = 0.5
AFTER_FAILURE_CPU_S = 0.25  # what the tests after the first that failed may take: they no longer decide
AFTER_FAILURE_WALL_S = 2.0
SHARED_LIFE = 2000  # programs until a shared candidate is replaced
ORDINARY = ("passed", "failed", "error", "missing", "syntax_error")  # endings that need no second look


class Slot:
    """A judge's own zygote, scratch folder and uids."""

    def __init__(self, uid: int, shared_uid: int, scratch: str) -> None:
        self.uid, self.shared_uid, self.scratch = uid, shared_uid, scratch
        # Programs run in a folder that is root's, open to them, below one that only this slot's group may enter: none
        # of them can close it, or leave a mark on it for the next.
        self.folder = f"{scratch}/w"
        os.makedirs(self.folder, exist_ok=True)
        os.chmod(self.folder, 0o1777)
        state = os.statvfs(scratch)
        self._files, self._blocks = state.f_files - state.f_ffree, state.f_blocks - state.f_bfree
        self._control: socket.socket | None = None
        self._zygote: subprocess.Popen[bytes] | None = None

    def control(self) -> socket.socket:
        """The line to a living zygote; a fresh one is started where there is none."""
        if self._control is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "zygote.py")
            numbers = [str(n) for n in (theirs.fileno(), self.uid, self.shared_uid)]
            command = [sys.executable, "-s", "-P", "-B", here, *numbers, self.folder]
            self._zygote = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            theirs.close()
            self._control = ours
        return self._control

    def lose(self) -> None:
        """End the zygote (its candidates die with it); the next sample gets a fresh one."""
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote.wait()
        if self._control is not None:
            self._control.close()
        self._zygote = self._control = None

    def tell(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        control = self.control()
        socket.send_fds(control, [json.dumps(message).encode()], fds)
        data = control.recv(4096)
        if not data:
            raise ConnectionError("the zygote is gone")
        answer: dict[str, Any] = json.loads(data)
        return answer

    def used(self) -> bool:
        """Whether a program may have left anything in its folder, which has a file system of its own."""
        state = os.statvfs(self.scratch)
        files, blocks = state.f_files - state.f_ffree, state.f_blocks - state.f_bfree
        return state.f_files == 0 or files > self._files or blocks > self._blocks  # gVisor counts no files


class Candidate:
    """A process that runs programs, as its judge sees it."""

    def __init__(self, slot: Slot, limits: dict[str, Any], shared: bool) -> None:
        self._slot = slot
        self.shared = shared
        self.memory_mib = limits["memory_mib"]
        self.programs = 0
        ours, theirs = socket.socketpair()
        reader, writer = os.pipe()
        try:
            self.pid: int = slot.tell({"do": "fork", "shared": shared, **limits}, [theirs.fileno(), writer])["pid"]
        except BaseException:
            ours.close()
            os.close(reader)
            raise
        finally:
            theirs.close()
            os.close(writer)
        os.set_blocking(reader, False)
        self.channel = Channel(ours)
        self.output = reader
        self.poll = select.poll()
        self.poll.register(ours, select.POLLIN)
        self.poll.register(reader, select.POLLIN)
        self.exit: dict[str, Any] = {}

    def cpu_s(self) -> float:
        """CPU time so far, from the process's own clock (clock_getcpuclockid(3)); 0 when it has ended."""
        try:
            return time.clock_gettime(~self.pid << 3 | 2)
        except OSError:
            return 0.0

    def ended(self, wait: bool) -> bool:
        """Whether it is gone, and reaped; `wait` for what is sure to end."""
        if not self.exit:
            self.exit = self._slot.tell({"do": "reap", "pid": self.pid, "wait": wait}, [])
        return bool(self.exit)

    def end(self) -> None:
        """Kill it, wait until it is gone, and free what it held."""
        try:
            if not self.exit:
                os.kill(self.pid, signal.SIGKILL)
                self.ended(wait=True)
        finally:
            self.channel.sock.close()
            os.close(self.output)


class Run:
    """One program in a candidate process: its limits, its output, and how it ended."""

    def __init__(self, candidate: Candidate, cpu_limit_s: float, wall_limit_s: float, deadline: float) -> None:
        self._candidate = candidate
        self.shared = candidate.shared
        self._cpu_limit_s = cpu_limit_s
        self._wall_limit_s = wall_limit_s
        self._deadline = deadline
        self._cpu_before = candidate.cpu_s()
        self.ended: str | None = None  # "timeout", "memory", "crashed", "forbidden": why it can answer no more
        self.detail = ""
        self.limit = ""  # which limit a timeout means: "cpu" or "wall"
        self.output = b""
        self.plain = True  # no value was too odd for a process that is shared
        candidate.channel.sock.settimeout(max(0.05, deadline - time.monotonic()))
        self.fit = False  # whether screen.py found nothing against the program
        self.end = JudgeEnd(candidate.channel, self.wait, self.stuck)

    def wait(self, closed: bool) -> None:
        """Return when the candidate has something to say; raise Gone when it has ended or reached a limit.

        CPU time decides and wall time is the net. `closed`: it hung up; its end, or a limit, is awaited.
        """
        candidate, pause_s = self._candidate, 0.0005
        if self.ended:
            raise Gone
        while True:
            if closed and candidate.ended(wait=False):
                self._died(candidate.exit)
                raise Gone
            now = time.monotonic()
            used = self.cpu_s()
            if used > self._cpu_limit_s:
                self._stop("cpu", f"CPU time over {self._cpu_limit_s:g} s")
            if now > self._deadline:
                self._stop("wall", f"wall time over {self._wall_limit_s:g} s after {used:.2f} s of CPU")
            if closed:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.05)
                continue
            longest = min(self._deadline - now, max(self._cpu_limit_s - used, 0.01)) + 0.005
            ready = candidate.poll.poll(longest * 1000)
            readable = [fd for fd, _ in ready]
            if candidate.output in readable and self.drain() == b"":
                candidate.poll.unregister(candidate.output)  # it closed its output
            if candidate.channel.sock.fileno() in readable:
                return

    def decided(self) -> None:
        """A test has failed: the others are run for what they tell, within a little more time."""
        self._cpu_limit_s = self.cpu_s() + AFTER_FAILURE_CPU_S
        self._deadline = time.monotonic() + AFTER_FAILURE_WALL_S

    def stuck(self) -> None:
        self._stop("wall", "the program does not read what it is sent")

    def cpu_s(self) -> float:
        if self._candidate.exit:
            used: float = self._candidate.exit["cpu_s"]
            return used - self._cpu_before
        return max(0.0, self._candidate.cpu_s() - self._cpu_before)

    def drain(self) -> bytes | None:
        """Take what the program has printed; None where there is nothing to read, b"" where there never will be."""
        try:
            data = os.read(self._candidate.output, 1 << 16)
        except BlockingIOError:
            return None
        if len(self.output) < OUTPUT_KEPT:
            self.output = (self.output + data)[:OUTPUT_KEPT]
        return data

    def _stop(self, limit: str, detail: str) -> None:
        self.ended, self.limit, self.detail = "timeout", limit, detail
        raise Gone

    def _died(self, record: dict[str, Any]) -> None:
        code = record["exit"]
        if code in (-signal.SIGXCPU,) or (code == -signal.SIGKILL and self.cpu_s() >= self._cpu_limit_s):
            self.ended, self.limit, self.detail = "timeout", "cpu", f"CPU time over {self._cpu_limit_s:g} s"
        elif code == -signal.SIGSYS:
            self.ended, self.detail = "forbidden", "a system call that the sandbox forbids (SIGSYS)"
        elif code == -signal.SIGKILL:
            self.ended, self.detail = "memory", "killed by the kernel, as when memory runs out (SIGKILL)"
        elif code < 0:
            self.ended, self.detail = "crashed", f"died by {_signal_name(-code)}"
        else:
            self.ended, self.detail = "crashed", f"left with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


class Outcome:
    """A program's status, in the making."""

    def __init__(self, status: str, detail: str = "", results: list[str] | None = None) -> None:
        self.status, self.detail, self.results = status, detail, [] if results is None else results


class Judge:
    """One slot's judge: its zygote, its shared candidate, and the samples it is given."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._shared: Candidate | None = None
        self._serial = 0

    def close(self) -> None:
        """End the zygote and what it forked, whatever state they are in."""
        shared, self._shared = self._shared, None
        try:
            if shared is not None:
                shared.end()
        except OSError:
            pass  # the zygote is gone already, and its candidates with it
        self.slot.lose()

    def judge(self, suite: Suite, code: str, limits: dict[str, Any], isolate: bool = False) -> dict[str, Any]:
        """Run one program against a problem's tests. The verdict comes from what the test code does, here."""
        begin = time.monotonic()
        compiled, fit = "", False
        if len(code) <= screen.MAX_SOURCE:
            outcome, run, compiled, fit = self._in_shared(suite, code, limits, begin, isolate)
            if outcome is not None:
                return _verdict(suite, outcome, run, time.monotonic() - begin, fit)
        candidate = Candidate(self.slot, limits, shared=False)
        try:
            run = Run(candidate, limits["cpu_s"], limits["wall_s"], begin + limits["wall_s"])
            self._serial += 1
            outcome = _judge(suite, run, self._serial, "" if compiled else code, compiled, False)
            run.drain()
        finally:
            candidate.end()
        if self.slot.used() and not self.slot.tell({"do": "wipe"}, [])["wiped"]:
            raise RuntimeError("a program's files could not be removed")
        return _verdict(suite, outcome, run, time.monotonic() - begin, fit)

    def _in_shared(
        self, suite: Suite, code: str, limits: dict[str, Any], begin: float, isolate: bool
    ) -> tuple[Outcome | None, Run, str, bool]:
        """Try the shared candidate. No Outcome: the program needs its own process (compiled, if it came so far)."""
        worn = self._shared is not None and self._shared.programs >= SHARED_LIFE
        if self._shared is not None and (worn or self._shared.memory_mib != limits["memory_mib"]):
            self._shared.end()
            self._shared = None
        if self._shared is None:
            self._shared = Candidate(self.slot, limits, shared=True)
        candidate = self._shared
        candidate.programs += 1
        wall_s = min(SHARED_WALL_S, limits["wall_s"])
        run = Run(candidate, min(SHARED_CPU_S, limits["cpu_s"]), wall_s, begin + wall_s)
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


def _verdict(suite: Suite, outcome: Outcome, run: Run, seconds: float, fit: bool) -> dict[str, Any]:
    results = outcome.results + ["not_run"] * (len(suite.tests) - len(outcome.results))
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
    }


def _judge(suite: Suite, run: Run, serial: int, code: str, compiled: str, isolate: bool) -> Outcome:
    """Send a program with the calls that can be made ahead, then run the tests."""
    results: list[str] = []
    ahead = b"" if isolate else suite.ahead_frames
    try:
        run.end.send_frames(pack(["program", serial, code, compiled, suite.imports, suite.names, isolate]) + ahead)
        outcome, names = _greeting(suite, run, serial)
        if outcome is not None:
            return outcome
        run.end.ahead.extend(suite.ahead)
        run.end.entry = names.get(suite.entry_point)
        return _run_tests(run, suite, names, results)
    except Gone:
        return Outcome(run.ended or "crashed", run.detail, results)
    except LeftEarly as error:
        return Outcome("crashed", f"left with {error}", results)
    except ProtocolError as error:
        run.plain = False
        return Outcome("error", f"the program sent what is not a value: {error}", results)


def _greeting(suite: Suite, run: Run, serial: int) -> tuple[Outcome | None, dict[str, Any]]:
    """What came of running the program's own statements: the names for the tests, or a final status."""
    message = run.end.receive()
    while run.shared and message[0] in ("r", "e", "skipped"):  # answers that an earlier program's tests did not want
        message = run.end.receive()
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


def _run_tests(run: Run, suite: Suite, names: dict[str, Any], results: list[str]) -> Outcome:
    """Run setup and tests in one namespace; the first test that does not hold decides."""
    if stale := [name for name in suite.fresh if name in names and not isinstance(names[name], StandIn | type)]:
        run.end.after_call = partial(_refresh, run, stale, names)
    verdict = Outcome("passed", "", results)
    if suite.setup is not None:
        status, detail = _run_code(run, partial(exec, suite.setup, names))
        if status != "passed":
            return Outcome("error" if status == "failed" else status, detail)
    for number, test in enumerate(suite.tests, 1):
        left = len(run.end.ahead)
        status, detail = _run_code(run, partial(exec, test, names))
        results.append(status)
        if status != "passed" and verdict.status == "passed":
            verdict.status, verdict.detail = status, f"test {number}: {detail}"
            if status in ("failed", "error"):
                run.decided()
        if run.ended is not None or status == "crashed":
            break
        if left and len(run.end.ahead) == left:  # the test ended before its call: take the answer out of the way
            run.end.ahead.popleft()
            run.end.reply()
    return verdict


def _refresh(run: Run, stale: list[str], names: dict[str, Any]) -> None:
    """Let the test see the program's globals as the call left them."""
    if run.ended is None:
        found = run.end.names()
        names.update((name, found[name]) for name in stale if name in found)


def _run_code(run: Run, code: Callable[[], None]) -> tuple[str, str]:
    """A part of the tests. An assertion that fails here is `failed`; one raised there is `error`."""
    try:
        code()
    except Gone:
        return run.ended or "crashed", run.detail
    except LeftEarly as error:
        return "crashed", f"left with {error}"
    except ProtocolError as error:
        run.plain = False
        return "error", f"the program sent what is not a value: {error}"
    except AssertionError as error:
        text = _text(run, error)
        if not any(error is raised for raised in run.end.raised):
            return "failed", f"assertion false{': ' + text if text else ''}"[:DETAIL]
        return "error", _describe("AssertionError", text)
    except MemoryError as error:
        run.plain = False
        if any(error is raised for raised in run.end.raised):
            return "memory", "MemoryError"
        return "error", "MemoryError while the test looked at the result"
    except Exception as error:
        _not_plain(run, type(error).__name__)
        return "error", _describe(type(error).__name__, _text(run, error))
    if run.ended is not None:  # a bare `except:` in the test swallowed it
        return run.ended, run.detail
    return "passed", ""


def _not_plain(run: Run, name: Any) -> None:
    """Errors that may depend on what a process did before are looked at again in a fresh one."""
    if name in ("RecursionError", "MemoryError", "ResultTooLarge"):
        run.plain = False


def _text(run: Run, error: Exception) -> str:
    """What an exception says. Without asking the candidate: a stand-in in it could answer with another exception."""
    if id(error) in run.end.texts:
        return run.end.texts[id(error)]
    if all(type(value) in (str, int, float, bool, type(None)) for value in error.args):
        return str(error)
    return " ".join(value if type(value) is str else type(value).__name__ for value in error.args)


def _describe(name: str, text: str) -> str:
    return f"{name}: {text}"[:DETAIL] if text else name[:DETAIL]


# --- a judge's life ---------------------------------------------------------------------------------------------------


def work(sock: socket.socket, slot: Slot) -> None:
    """Samples in, verdicts out, one at a time; first, what the check of a candidate found."""
    resource.setrlimit(resource.RLIMIT_AS, (JUDGE_MEMORY, JUDGE_MEMORY))
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
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"the problem's tests do not compile: {type(error).__name__}: {error}"


def _attempt(judge: Judge, suite: Suite | str, body: bytes) -> dict[str, Any]:
    if isinstance(suite, str):
        return sandbox_error(suite)
    try:
        code, limits, isolate = unpack(body)
        return judge.judge(suite, code, limits, isolate)
    except Exception as error:
        judge.close()
        words = [value for value in error.args if type(value) in (str, int)]  # no stand-in: its str() would ask
        return sandbox_error(f"{type(error).__name__}: {' '.join(map(str, words))}", retry=True)


def sandbox_error(detail: str, retry: bool = False) -> dict[str, Any]:
    """A verdict that is no label: our fault, or the problem's."""
    return {"status": "sandbox_error", "detail": _printable(detail[:DETAIL]), "retry": retry}


def _printable(text: str) -> str:
    """Lone surrogates escaped: not every reader of JSON takes them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def inspect_candidate(judge: Judge) -> dict[str, dict[str, Any]]:
    """What protects a candidate of this slot, as a program of ours sees it from inside one, of its own and shared."""
    suite = prepare({"setup": "", "reference": "", "entry_point": "look", "tests": ["result.append(look())"]})
    suite.ahead.clear()
    limits = {"cpu_s": 10.0, "wall_s": 20.0, "memory_mib": 512, "file_mib": 16}
    found: list[Any] = []
    trouble = "it returned nothing"
    candidate = Candidate(judge.slot, limits, shared=False)
    try:
        run = Run(candidate, 10.0, 20.0, time.monotonic() + 20)
        run.end.send_frames(pack(["program", 0, checks.LOOK, "", suite.imports, suite.names, False]))
        outcome, names = _greeting(suite, run, 0)
        if outcome is None:
            exec(suite.tests[0], {**names, "result": found})
        else:
            trouble = outcome.detail
    except (Gone, LeftEarly, ProtocolError, Exception) as error:
        run.drain()
        trouble = f"{type(error).__name__}: {error} {run.detail} {run.output.decode('utf-8', 'replace')}"
    finally:
        candidate.end()
    return checks.judge_candidate(found[0] if found else {"trouble": trouble}, judge.slot.uid, limits)
