"""The host's end of the sandbox, whatever it is connected to: sends programs, keeps order, repeats what got lost.

    with Sandbox() as sandbox:                              # container.py
        for label in sandbox.verify(samples, problems):
            reward = float(label.passed)

Labels come in the order of the samples, one for each. `Verifier` knows frames, not Docker: container.py gives it the
connection. It runs no program itself. Any number of threads may call `verify` on one of them at the same time.
"""

import hashlib
import itertools
import json
import logging
import math
import queue
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec

from fractal.errors import OutsideError
from fractal.records import Label, Problem, Sample, Status, code_sha256
from fractal.sandbox.host import lacking
from fractal.sandbox.host.limits import DEFAULT_LIMITS, REFERENCE_CPU_S, REFERENCE_FACTOR, Limits
from fractal.sandbox.host.program_key import program_key
from fractal.sandbox.inside.protocol import (
    CANCEL,
    FORGET,
    KEY_BYTES,
    MAX_FRAME,
    PROBLEM,
    READY,
    SAMPLE,
    SAMPLE_HEAD,
    VERDICT,
    VERDICT_HEAD,
    FrameBuffer,
    ProtocolError,
    frame,
)

log = logging.getLogger(__name__)
IN_FLIGHT = 64  # samples under way for each slot
IN_FLIGHT_BYTES = 16 << 20  # of their programs, for each call of verify
MAX_LABELS_HELD = 4000  # labels held back at most while an earlier sample is being decided
MAX_REMEMBERED = 20_000  # verdicts kept for programs that come again
MAX_PROBLEMS = 2048  # problems that the sandbox keeps
MAX_LOSSES = 3  # containers that may be lost over a sample before it is given up
RECONNECT_S = 120.0  # how long an engine, or a sidecar, that is being restarted is waited for


class SandboxError(OutsideError):
    """The sandbox cannot be started, or does not hold what it promises. Never a verdict on a program."""


class UnsafeError(SandboxError):
    """A protection is missing: no second try."""


class Verdict(msgspec.Struct):
    """What the sandbox decided about one program."""

    status: Status
    tests: list[str] = []
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    detail: str = ""
    limit: str = ""  # which limit a timeout means: "cpu" or "wall"
    retry: bool = False  # a fault of the sandbox's: the program is run again
    slowest_s: float = 0.0  # CPU seconds of the test that took longest, of a script
    # What a reference returned, for a problem that has no expected values; of a script: its output, its standard error
    # and its exit code ("" where it was ended).
    values: list[str] = []
    fit: bool = False  # its byte code cannot tell line numbers and the like: comments and layout do not matter


class Connection(Protocol):
    """A connection to a sandbox."""

    known_problems: set[bytes]  # keys of the problems that it was sent

    def send(self, data: bytes) -> None: ...  # raises OSError
    def receive(self) -> bytes: ...  # b"" when it has ended; raises OSError
    def close(self) -> None: ...
    def last_output(self) -> str: ...  # the last line of its output, for messages


Inbox = queue.SimpleQueue["list[tuple[Job, Verdict]] | Exception"]


@dataclass(eq=False, slots=True)
class PendingLabel:
    """A label whose turn has not come: its verdict is missing, or that of an earlier sample."""

    sample: Sample
    problem: Problem
    digest: str  # sha256 of the program's text
    verdict: Verdict | None = None


@dataclass(eq=False, slots=True)
class Job:
    """One program on its way: a sample's, or a problem's reference."""

    id: int
    problem: Problem
    key: bytes  # of the problem
    code: str
    limits: Limits
    inbox: Inbox
    alone: bool = False  # nothing may run beside it
    record: bool = False  # a reference whose values are to be recorded: they are what is expected
    losses: int = 0  # times that a judge or a container died over it
    program: bytes = b""  # key of the program, see program_key.py
    waiting: list[PendingLabel] = field(default_factory=list)  # labels that its verdict decides


class Verifier:
    """Runs untrusted programs against tests, over a connection that `connect` makes and makes anew when it breaks.

    `connect` raises SandboxError. `isolate`: a process of its own for every program (docs/sandbox.md). `cache`:
    identical programs of a problem run once.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        *,
        limits: Limits | None = None,
        cache: bool = True,
        isolate: bool = False,
    ) -> None:
        self.limits = limits or DEFAULT_LIMITS
        self.checks: dict[str, dict[str, Any]] = {}
        self.no_sharing = ""  # why every program has a process of its own, which is several times slower
        self.slots = 1
        self._open_connection = connect
        self._cache = cache
        self._isolate = isolate
        self._lock = threading.RLock()  # guards what follows
        self._connection: Any = None
        self._pending: dict[int, Job] = {}
        self._broken: Exception | None = None
        self._closing = False
        self._sending = threading.Lock()  # one thread at a time writes to the connection
        self._ids = itertools.count(1)
        self._keys: dict[int, tuple[Problem, bytes]] = {}  # by the problem's identity
        self._reference_cpu: dict[bytes, float] = {}  # CPU seconds that a problem's reference needs, by its key
        self._expected: dict[bytes, list[str] | str] = {}  # what a reference returned, or why it has no values
        self._done: OrderedDict[bytes, tuple[Verdict, str]] = OrderedDict()
        self._decode = msgspec.json.Decoder(Verdict).decode

    # --- the connection -----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect, and wait for the greeting. Raises SandboxError."""
        connection = self._open_connection()
        frames = FrameBuffer(2 * MAX_FRAME)
        try:
            bodies: list[bytes] = []
            while not bodies:
                data = connection.receive()
                if not data:
                    raise SandboxError(
                        f"Docker: the sandbox ended or hung before it was ready: {connection.last_output()}."
                    )
                bodies = frames.feed(data)
            if bodies[0][:1] != READY:
                raise SandboxError("What answers there is not a sandbox.")
            hello = msgspec.json.decode(bodies[0][1:])
            self.check_protections(hello["checks"])
        except (OSError, ProtocolError, msgspec.DecodeError, KeyError) as error:
            connection.close()
            raise SandboxError(f"Docker: the sandbox does not answer: {error}. {connection.last_output()}.") from error
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self.slots = hello["slots"]
            self.no_sharing = hello.get("no_sharing", "")
            self._connection = connection
        threading.Thread(target=self._read, args=(connection, frames), daemon=True, name="sandbox-reader").start()

    def check_protections(self, checks: dict[str, dict[str, Any]]) -> None:
        """Look at what the check from inside found; may raise SandboxError."""
        self.checks = checks

    def close(self) -> None:
        with self._lock:
            self._closing = True
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._fail(SandboxError("The sandbox was closed."))

    def _read(self, connection: Any, frames: FrameBuffer) -> None:
        """The thread of a connection: hands verdicts to those who wait for them; replaces a connection that breaks."""
        try:
            while data := connection.receive():
                groups: dict[int, tuple[Inbox, list[tuple[Job, Verdict]]]] = {}
                for body in frames.feed(data):
                    if body[:1] != VERDICT:
                        continue
                    try:
                        verdict = self._decode(memoryview(body)[VERDICT_HEAD.size :])
                    except msgspec.MsgspecError as error:
                        verdict = Verdict("sandbox_error", detail=f"an answer that cannot be read: {error}")
                    with self._lock:
                        job = self._pending.pop(VERDICT_HEAD.unpack_from(body)[1], None)
                    if job is not None:
                        groups.setdefault(id(job.inbox), (job.inbox, []))[1].append((job, verdict))
                for inbox, decided in groups.values():
                    inbox.put(decided)
        except (OSError, ProtocolError) as error:
            log.info("the sandbox's connection broke: %r", error)
        with self._lock:
            if self._closing or self._connection is not connection:
                return
            self._connection = None
        last_output = connection.last_output()
        connection.close()
        log.warning("the sandbox was lost (%s); starting another", last_output)
        try:
            self._reopen()
        except Exception as error:
            self._fail(error)
            return
        self._resend(last_output)

    def _reopen(self) -> None:
        """Connect again, repeatedly: the engine, or the sidecar, may be restarting. Raises SandboxError."""
        deadline = time.monotonic() + RECONNECT_S
        while True:
            try:
                return self.open()
            except UnsafeError:
                raise
            except SandboxError:
                if self._closing or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def _fail(self, error: Exception) -> None:
        """Nothing will answer any more: raise the error in all calls that wait."""
        with self._lock:
            self._broken = error
            inboxes = {id(job.inbox): job.inbox for job in self._pending.values()}
            self._pending.clear()
        for inbox in inboxes.values():
            inbox.put(error)

    def _resend(self, last_output: str) -> None:
        with self._lock:
            jobs = list(self._pending.values())
        for job in jobs:
            job.losses += 1
            if job.losses > MAX_LOSSES:
                with self._lock:
                    self._pending.pop(job.id, None)
                detail = f"lost with {job.losses} containers, the last one's words: {last_output}"
                job.inbox.put([(job, Verdict("sandbox_error", detail=detail))])
        self._send([job for job in jobs if job.losses <= MAX_LOSSES])

    def _send(self, jobs: list[Job]) -> None:
        """Hand jobs to the sandbox. If it is being replaced, they are sent to the next one."""
        with self._lock:
            if self._broken is not None:
                raise self._broken
            self._pending.update((job.id, job) for job in jobs)
        with self._sending:
            connection = self._connection
            if connection is None:
                return
            parts: list[bytes] = []
            for job in jobs:
                problem = job.problem
                key = job.key if not job.record else _record_key(job.key)
                if key not in connection.known_problems:
                    if len(connection.known_problems) >= MAX_PROBLEMS:
                        connection.known_problems.clear()
                        parts.append(frame(FORGET))
                    connection.known_problems.add(key)
                    message = problem_message(problem, self._expected.get(job.key, problem.expected), job.record)
                    parts.append(frame(PROBLEM + key + _json(message)))
                wall_s = job.limits.wall_s * (len(problem.tests) if problem.kind == "stdin" else 1)
                head = SAMPLE_HEAD.pack(SAMPLE, job.id, key, wall_s, job.alone)
                parts.append(frame(head + _json([job.code, job.limits, self._isolate])))
            try:
                connection.send(b"".join(parts))
            except OSError:
                pass  # its reader notices, too, and sends them to the next one

    def _cancel(self, inbox: Inbox) -> None:
        """Let the sandbox drop the jobs of a call that waits for nothing any more."""
        with self._lock:
            ids = [job.id for job in self._pending.values() if job.inbox is inbox]
            for number in ids:
                del self._pending[number]
        with self._sending:
            if ids and self._connection is not None:
                try:
                    self._connection.send(frame(CANCEL + struct.pack(f">{len(ids)}Q", *ids)))
                except OSError:
                    pass  # the next connection does not get them

    # --- verification -------------------------------------------------------------------------------------------------

    def verify(
        self, samples: Iterable[Sample], problems: Mapping[str, Problem], deadline_s: float | None = None
    ) -> Iterator[Label]:
        """One Label for each sample, in their order; `samples` is read as the labels come.

        `problems` by task_id; raises KeyError for a sample of none of them, SandboxError when the sandbox is lost for
        good. What is not decided `deadline_s` after the first label was asked for is a sandbox_error and is dropped.
        """
        for labels in self._batches(samples, problems, deadline_s):
            yield from labels

    async def verify_async(
        self, samples: Iterable[Sample], problems: Mapping[str, Problem], deadline_s: float | None = None
    ) -> AsyncIterator[Label]:
        """The same for `async for`: the event loop is free while programs run."""
        import asyncio  # 40 ms, which nobody else needs

        batches = self._batches(samples, problems, deadline_s)
        try:
            while (labels := await asyncio.to_thread(next, batches, None)) is not None:
                for label in labels:
                    yield label
        finally:
            batches.close()

    def run_script(self, code: str, text: str, deadline_s: float | None = None) -> Verdict:
        """Run a program as a script that reads `text`, and say what it does; no verdict on it, whatever its status.

        Its status is passed where it ended by itself, whatever its exit code.
        """
        problem = Problem("script", "", "", [text], "", "", "test", kind="stdin", expected=[""])
        inbox: Inbox = queue.SimpleQueue()
        job = self.job(problem, code, inbox)
        job.record = True
        self._send([job])
        try:
            verdicts = inbox.get(timeout=deadline_s)
        except queue.Empty:
            self._cancel(inbox)
            return Verdict("sandbox_error", detail=f"not decided within {deadline_s:g} s")
        if isinstance(verdicts, Exception):
            raise verdicts
        return verdicts[0][1]

    def _remember(self, program: bytes, verdict: Verdict, digest: str) -> None:
        with self._lock:
            self._done[program] = (verdict, digest)
            if len(self._done) > MAX_REMEMBERED:
                self._done.popitem(last=False)

    def _batches(
        self, samples: Iterable[Sample], problems: Mapping[str, Problem], deadline_s: float | None
    ) -> Generator[list[Label], None, None]:
        return _VerifyCall(self, samples, problems, deadline_s).run()

    def job(self, problem: Problem, code: str, inbox: Inbox, limits: Limits | None = None, alone: bool = False) -> Job:
        key = self._key(problem)
        return Job(next(self._ids), problem, key, code, limits or self.limits_for(problem), inbox, alone)

    def _key(self, problem: Problem) -> bytes:
        """A problem by what the judge uses of it: the same task_id may mean another problem in the next call."""
        known = self._keys.get(id(problem))
        if known is not None and known[0] is problem:
            return known[1]
        if len(self._keys) > 2 * MAX_PROBLEMS:
            self._keys.clear()
        message = problem_message(problem, problem.expected)
        key = hashlib.blake2b(_json(message), digest_size=KEY_BYTES).digest()
        self._keys[id(problem)] = (problem, key)
        return key

    def limits_for_reference(self) -> Limits:
        return replace(self.limits, cpu_s=REFERENCE_CPU_S, wall_s=2 * REFERENCE_CPU_S)

    def limits_for(self, problem: Problem) -> Limits:
        cpu_s = max(REFERENCE_FACTOR * self._reference_cpu.get(self._key(problem), 0.0), problem.test_limit_s or 0.0)
        if cpu_s <= self.limits.cpu_s:
            return self.limits
        return replace(self.limits, cpu_s=cpu_s, wall_s=max(self.limits.wall_s, 2 * cpu_s))


@dataclass(eq=False)
class _VerifyCall:
    """One call of verify: its samples under way, and the labels that wait for their turn."""

    verifier: Verifier
    samples: Iterable[Sample]
    problems: Mapping[str, Problem]
    deadline_s: float | None = None
    deadline: float = math.inf  # on time.monotonic()'s clock
    inbox: Inbox = field(default_factory=queue.SimpleQueue)
    pending: deque[PendingLabel] = field(default_factory=deque)  # not yet handed out
    running: dict[int, Job] = field(default_factory=dict)  # by the job's id
    running_programs: dict[bytes, Job] = field(default_factory=dict)  # by program: the job for all its samples
    # By problem: timeouts that count only when its reference has been measured.
    unconfirmed: dict[bytes, list[tuple[Job, Verdict]]] = field(default_factory=dict)
    unprepared: dict[bytes, list[Job]] = field(default_factory=dict)  # by problem: wait for the values of its reference
    bytes_in_flight: int = 0

    def run(self) -> Generator[list[Label], None, None]:
        source = iter(self.samples)
        more = True
        if self.deadline_s is not None:
            self.deadline = time.monotonic() + self.deadline_s
        try:
            while more or self.pending:
                jobs: list[Job] = []
                while more and self._may_send_more():
                    sample = next(source, None)
                    if sample is None:
                        more = False
                    elif (job := self._add(sample)) and (first := self._when_prepared(job)):
                        jobs.append(first)
                if jobs:
                    self.verifier._send(jobs)
                ready: list[Label] = []
                while self.pending and self.pending[0].verdict is not None:
                    ready.append(label(self.pending.popleft()))
                if ready:
                    yield ready
                elif self.pending:
                    self._wait()
        finally:
            if self.running or self.unconfirmed:
                self.verifier._cancel(self.inbox)

    def _may_send_more(self) -> bool:
        under_way, most = len(self.running), IN_FLIGHT * self.verifier.slots
        return under_way < most and len(self.pending) < MAX_LABELS_HELD and self.bytes_in_flight < IN_FLIGHT_BYTES

    def _add(self, sample: Sample) -> Job | None:
        """Take in a sample. Returns the job to be sent, or None where its verdict is known or under way."""
        problem = self.problems[sample.task_id]
        digest = code_sha256(sample.code)
        pending_label = PendingLabel(sample, problem, digest)
        self.pending.append(pending_label)
        if time.monotonic() >= self.deadline:
            pending_label.verdict = self._undecided()
            return None
        if len(sample.code) > MAX_FRAME // 8:
            pending_label.verdict = Verdict("memory", detail=f"a program of {len(sample.code)} characters")
            return None
        verifier = self.verifier
        if not verifier._cache:
            return self._start_job(pending_label, digest.encode())
        program = program_key(verifier._key(problem), sample.code)
        known = verifier._done.get(program)
        if known is not None and (known[0].fit or known[1] == digest):
            pending_label.verdict = known[0]
            return None
        if job := self.running_programs.get(program):
            job.waiting.append(pending_label)
            return None
        return self._start_job(pending_label, program)

    def _when_prepared(self, job: Job) -> Job | None:
        """The job that is to be sent now: where the reference says what is expected and has not yet, the reference."""
        verifier, problem = self.verifier, job.problem
        if problem.kind != "calls" or problem.expected or isinstance(verifier._expected.get(job.key), list):
            return job
        waiting = self.unprepared.setdefault(job.key, [])
        waiting.append(job)
        if len(waiting) > 1:
            return None
        reference = verifier.job(problem, problem.reference, self.inbox, verifier.limits_for_reference())
        reference.record = True
        return reference

    def _prepare(self, reference: Job, verdict: Verdict) -> list[Job]:
        """Take what the reference returned for what is expected. Returns the jobs that waited for it."""
        verifier, waiting = self.verifier, self.unprepared.pop(reference.key, [])
        if verdict.status == "passed":
            verifier._expected[reference.key] = verdict.values
            verifier._reference_cpu[reference.key] = verdict.cpu_seconds
            for job in waiting:
                job.limits = verifier.limits_for(job.problem)
            return waiting
        detail = f"the problem's reference says what is expected, and fails: {verdict.status}, {verdict.detail}"
        return [more for job in waiting for more in self._accept(job, Verdict("sandbox_error", detail=detail))]

    def _start_job(self, pending_label: PendingLabel, program: bytes) -> Job:
        job = self.verifier.job(pending_label.problem, pending_label.sample.code, self.inbox)
        job.program, job.waiting = program, [pending_label]
        self.running[job.id] = job
        self.bytes_in_flight += len(job.code)
        if self.verifier._cache:
            self.running_programs[program] = job
        return job

    def _undecided(self) -> Verdict:
        return Verdict("sandbox_error", detail=f"not decided within {self.deadline_s:g} s")

    def _give_up(self) -> None:
        """The deadline is over: what has no verdict gets none."""
        self.verifier._cancel(self.inbox)
        self.running.clear()
        self.running_programs.clear()
        self.unconfirmed.clear()
        self.bytes_in_flight = 0
        for pending_label in self.pending:
            pending_label.verdict = pending_label.verdict or self._undecided()

    def _wait(self) -> None:
        left_s = None if self.deadline_s is None else max(0.0, self.deadline - time.monotonic())
        try:
            verdicts = self.inbox.get(timeout=left_s)
        except queue.Empty:
            self._give_up()
            return
        if isinstance(verdicts, Exception):
            raise verdicts
        again: list[Job] = []
        for job, verdict in verdicts:
            again += self._decide(job, verdict)
        if again:
            self.verifier._send(again)

    def _decide(self, job: Job, verdict: Verdict) -> list[Job]:
        """Accept a verdict, or have it confirmed. Returns the jobs that this needs.

        A timeout counts when the reference's own CPU time is known and allows no more, and, if wall time ended it,
        when it happened with nothing beside it.
        """
        verifier = self.verifier
        if verdict.status == "sandbox_error" and verdict.retry and job.losses == 0:
            job.losses += 1
            return [job]
        if job.id not in self.running:  # a reference
            if job.record:
                return self._prepare(job, verdict)
            passed = verdict.status == "passed"
            verifier._reference_cpu[job.key] = (verdict.slowest_s or verdict.cpu_seconds) if passed else 0.0
            return [j for timeout in self.unconfirmed.pop(job.key, []) for j in self._decide(*timeout)]
        if verdict.status == "timeout":
            if job.key not in verifier._reference_cpu and job.problem.reference:
                waiting = self.unconfirmed.setdefault(job.key, [])
                waiting.append((job, verdict))
                wide = verifier.limits_for_reference()
                return [verifier.job(job.problem, job.problem.reference, self.inbox, wide)] if len(waiting) == 1 else []
            limits = verifier.limits_for(job.problem)
            if limits.cpu_s > job.limits.cpu_s or (verdict.limit == "wall" and not job.alone):
                job.limits, job.alone = limits, verdict.limit == "wall"
                return [job]
        return self._accept(job, verdict)

    def _accept(self, job: Job, verdict: Verdict) -> list[Job]:
        """A verdict that counts: for the sample, and for those that wait for the same program."""
        del self.running[job.id]
        self.bytes_in_flight -= len(job.code)
        self.running_programs.pop(job.program, None)
        digest = job.waiting[0].digest
        if self.verifier._cache and verdict.status != "sandbox_error":
            self.verifier._remember(job.program, verdict, digest)
        different = []
        for pending_label in job.waiting:
            if verdict.fit or pending_label.digest == digest:
                pending_label.verdict = verdict
            else:  # only comments or layout differ, but this program can tell
                different.append(pending_label)
        if not different:
            return []
        next_job = self._start_job(different[0], job.program)
        next_job.waiting.extend(different[1:])
        return [next_job]


def _json(value: object) -> bytes:
    """JSON; lone surrogates, which programs may hold, are escaped."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value)).encode("ascii")


def _record_key(key: bytes) -> bytes:
    """The key of a problem whose reference's values are to be recorded."""
    return hashlib.blake2b(b"record" + key, digest_size=KEY_BYTES).digest()


def problem_message(problem: Problem, expected: list[str] | str, record: bool = False) -> dict[str, Any]:
    """A problem as it is sent to the judge. `record`: not to judge a program, but to say what its calls return."""
    return {
        "kind": problem.kind,
        "expected": expected,
        "compare": problem.compare,
        "atol": problem.atol,
        "record": record,
        "reference": problem.reference,
        "setup": problem.setup,
        "tests": problem.tests,
        "entry_point": problem.entry_point,
    }


def label(pending_label: PendingLabel) -> Label:
    sample, verdict = pending_label.sample, pending_label.verdict
    assert verdict is not None
    results = verdict.tests
    return Label(
        task_id=sample.task_id,
        sample_id=sample.sample_id,
        status=verdict.status,
        passed=verdict.status == "passed",
        tests=results + ["not_run"] * (len(pending_label.problem.tests) - len(results)),  # type: ignore[arg-type]
        seconds=verdict.seconds,
        cpu_seconds=verdict.cpu_seconds,
        detail=lacking.explain(verdict.detail) if verdict.status == "error" else verdict.detail,
        code_sha256=pending_label.digest,
    )
