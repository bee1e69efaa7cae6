"""The host's end of the sandbox: start the container, check it, feed it samples, replace it when it dies.

    with Sandbox() as sandbox:
        for label in sandbox.verify(samples, problems):
            reward = float(label.passed)

Labels come in the order of the samples, one for each. Only this file talks to Docker; it never runs a program itself.
"""

import hashlib
import json
import logging
import queue
import random
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import docker
import docker.errors
import requests

from fractal import engine
from fractal.records import Label, OutsideError, Problem, Sample, Status
from fractal.sandbox import checks, source
from fractal.sandbox.protocol import FrameBuffer, ProtocolError, pack

log = logging.getLogger(__name__)
SECCOMP = Path(__file__).parents[2] / "docker" / "seccomp.json"
IN_FLIGHT = 4  # samples under way for each slot: the next ones wait inside, so no slot idles
LOOK_AHEAD = 2000  # labels held back at most while an earlier sample is being decided
THREADS = 32  # a candidate's, at most; zygote.py sets the same limit
REFERENCE_FACTOR = 4.0  # a program may take this many times its reference's CPU time (EvalPlus: 4)
REFERENCE_CPU_S = 60.0  # for measuring a reference, alone


class SandboxError(OutsideError):
    """The sandbox cannot be started, or does not hold what it promises. Never a verdict on a program."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use for all its tests together."""

    cpu_s: float = 4.0  # decides; grows to REFERENCE_FACTOR x the reference's own time where that is more
    wall_s: float = 12.0  # the net for programs that sleep; confirmed alone before it counts
    memory_mib: int = 512
    file_mib: int = 16

    def __post_init__(self) -> None:
        if not (0 < self.cpu_s <= 3600 and 0 < self.wall_s <= 36000 and self.memory_mib >= 64 and self.file_mib > 0):
            raise ValueError(f"limits out of range: {self}")


def hardening(slots: int, limits: Limits, first_uid: int, cpus: int) -> dict[str, Any]:
    """Options of `docker run` that wall the container in; names as in docker.types.HostConfig."""
    scratch = f"rw,noexec,nosuid,nodev,size={limits.file_mib}m,nr_inodes=1024,mode=0700"
    memory = (slots * (limits.memory_mib + 96) + 512) << 20
    return {
        "network_mode": "none",
        "read_only": True,
        "cap_drop": ["ALL"],
        "cap_add": ["SETUID", "SETGID", "KILL"],
        "security_opt": ["no-new-privileges", f"seccomp={SECCOMP.read_text()}"],
        "pids_limit": slots * (THREADS + 4) + 16,
        "mem_limit": memory,
        "memswap_limit": memory,
        "nano_cpus": min(slots, cpus) * 1_000_000_000,
        "tmpfs": {f"/scratch/{i}": f"{scratch},uid={first_uid + i},gid={first_uid + i}" for i in range(slots)},
        "ipc_mode": "none",
        "auto_remove": True,
    }


def connect() -> docker.DockerClient:
    """A client of the Docker engine. Raises SandboxError that says which of the usual things is wrong."""
    if trouble := engine.problem():
        raise SandboxError(trouble)
    try:
        client = docker.from_env(timeout=120)
        client.ping()
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        raise SandboxError(
            f"The Docker engine at {engine.address()} refuses: {str(error)[:300]}. Run `docker info` to see why."
        ) from error
    return client


@dataclass
class Job:
    """One program to run: a sample, or a problem's reference."""

    id: int
    problem: Problem
    code: str
    limits: Limits
    losses: int = 0  # times that a judge or the container died over it


@dataclass
class Slate:
    """A label in the making, in the order of the samples."""

    sample: Sample
    job: Job
    verdict: dict[str, Any] | None = None


@dataclass
class _Line:
    """The attached streams of one container, read by a thread of its own."""

    container: Any
    sock: socket.socket
    keep: Any  # the SDK's wrapper: closing it would close the socket
    inbox: "queue.Queue[dict[str, Any] | None]" = field(default_factory=queue.Queue)
    errors: deque[bytes] = field(default_factory=lambda: deque(maxlen=50))
    known: set[str] = field(default_factory=set)

    def read(self) -> None:
        """Undo Docker's multiplexing (8-byte header: stream, 0, 0, 0, length) and queue frames until the end."""
        frames, raw = FrameBuffer(1 << 30), bytearray()
        try:
            while data := self.sock.recv(1 << 20):
                raw += data
                while len(raw) >= 8:
                    stream, size = struct.unpack_from(">BxxxI", raw)
                    if len(raw) < 8 + size:
                        break
                    part = bytes(raw[8 : 8 + size])
                    del raw[: 8 + size]
                    if stream == 2:
                        self.errors.append(part)
                        continue
                    for body in frames.feed(part):
                        self.inbox.put(json.loads(body))
        except (OSError, ProtocolError, ValueError) as error:
            self.errors.append(repr(error).encode())
        self.inbox.put(None)

    def said(self) -> str:
        text = b"".join(self.errors).decode("utf-8", "replace").strip()
        return text.splitlines()[-1][:300] if text else "it said nothing"


class Sandbox:
    """A hardened container that runs untrusted programs against tests. A context manager; not shared by threads.

    Raises SandboxError when Docker, the image, or a protection that the container should have is missing.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        slots: int | None = None,
        image: str | None = None,
        runtime: str | None = None,
        cache: bool = True,
    ) -> None:
        self.limits = limits or Limits()
        self.image = image or source.image_name()
        self.image_id = ""
        self.checks: dict[str, dict[str, Any]] = {}
        self._slots = slots
        self._runtime = runtime
        self._cache = cache
        self._line: _Line | None = None
        self._next_id = 0
        self._reference_cpu: dict[str, float] = {}  # by problem_key

    def check(self) -> None:
        """Whether the engine answers and has the image; starts nothing. Raises SandboxError."""
        self._client = connect()
        try:
            self.image_id = self._client.images.get(self.image).id or ""
        except docker.errors.ImageNotFound:
            raise SandboxError(
                f"Docker: the sandbox image {self.image} is not here. Build it: `python -m fractal.images.build`."
            ) from None

    def __enter__(self) -> Self:
        self.check()
        cpus = int(self._client.info().get("NCPU", 1))
        self._slots = self._slots or cpus
        self._cpus = cpus
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._client.close()

    # --- the container ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        assert self._slots is not None
        # A container's own range of uids: RLIMIT_NPROC counts a uid's processes across containers.
        first_uid = random.SystemRandom().randrange(100_000, 1_000_000_000, 1000)
        api = self._client.api
        options = hardening(self._slots, self.limits, first_uid, self._cpus)
        if self._runtime:
            options["runtime"] = self._runtime
        try:
            created = api.create_container(
                self.image,
                command=["--slots", str(self._slots), "--first-uid", str(first_uid)],
                stdin_open=True,  # with StdinOnce: when this process dies, the container's input ends, and so does it
                environment={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "TZ": "UTC"},
                labels={"fractal.sandbox": "1"},
                host_config=api.create_host_config(
                    **options, log_config=docker.types.LogConfig(type=docker.types.LogConfig.types.NONE)
                ),
            )
            container = self._client.containers.get(created["Id"])
            keep = api.attach_socket(container.id, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            sock = getattr(keep, "_sock", keep)
            sock.settimeout(None)
            self._line = _Line(container, sock, keep)
            threading.Thread(target=self._line.read, daemon=True, name="sandbox-reader").start()
            container.start()
        except (docker.errors.DockerException, requests.exceptions.RequestException, OSError) as error:
            self._stop()
            raise SandboxError(f"Docker: the sandbox container does not start: {str(error)[:300]}.") from error
        self._greet()

    def _greet(self) -> None:
        """Wait for the judge, and refuse to go on unless every protection is in force."""
        assert self._line is not None
        try:
            hello = self._line.inbox.get(timeout=60)
        except queue.Empty:
            hello = None
        if hello is None or hello.get("type") != "ready":
            said = self._line.said()
            self._stop()
            raise SandboxError(f"Docker: the sandbox container ended or hung before it was ready: {said}.")
        self.checks = hello["checks"]
        missing = [f"{name} ({check['found']})" for name, check in self.checks.items() if not check["ok"]]
        if missing:
            self._stop()
            raise SandboxError(
                f"The sandbox is not safe: not in force: {', '.join(missing)}. The engine dropped an option; no "
                "program was run. `fractal doctor` shows the details."
            )

    def _stop(self) -> None:
        line, self._line = self._line, None
        if line is None:
            return
        try:
            line.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        try:
            line.container.remove(force=True)
        except (docker.errors.DockerException, requests.exceptions.RequestException):
            pass  # it removes itself
        line.keep.close()

    def _send(self, job: Job) -> bool:
        """Hand a job to the container; False if it is gone (the loss is noticed when its silence is read)."""
        line = self._line
        assert line is not None
        key = problem_key(job.problem)
        data = b""
        if key not in line.known:
            data = pack({"type": "problem", "key": key, "problem": problem_frame(job.problem)})
            line.known.add(key)
        data += pack({"type": "sample", "id": job.id, "key": key, "code": job.code, "limits": asdict(job.limits)})
        try:
            line.sock.sendall(data)
        except OSError:
            return False
        return True

    def _job(self, problem: Problem, code: str, limits: Limits | None = None) -> Job:
        self._next_id += 1
        return Job(self._next_id, problem, code, limits or self._limits_for(problem))

    def _limits_for(self, problem: Problem) -> Limits:
        cpu_s = REFERENCE_FACTOR * self._reference_cpu.get(problem_key(problem), 0.0)
        if cpu_s <= self.limits.cpu_s:
            return self.limits
        return replace(self.limits, cpu_s=cpu_s, wall_s=max(self.limits.wall_s, 2 * cpu_s))

    # --- verification -----------------------------------------------------------------------------------------------

    def verify(self, samples: Iterable[Sample], problems: Mapping[int, Problem]) -> Iterator[Label]:
        """One Label for each sample, in their order. `problems` by task_id; KeyError for a sample of none of them."""
        source_ = iter(samples)
        slates: deque[Slate] = deque()  # not yet yielded
        flying: dict[int, Job] = {}
        by_job: dict[int, list[Slate]] = {}
        twins: dict[str, int] = {}  # identical programs: the job that runs for all of them
        done: dict[str, dict[str, Any]] = {}
        doubtful: list[tuple[Job, dict[str, Any]]] = []
        more = True
        while more or slates:
            while more and len(flying) < IN_FLIGHT * (self._slots or 1) and len(slates) < LOOK_AHEAD:
                sample = next(source_, None)
                if sample is None:
                    more = False
                    break
                problem = problems[sample.task_id]
                job = self._job(problem, sample.code)
                slate = Slate(sample, job)
                slates.append(slate)
                key = program_key(job) if self._cache else f"#{job.id}"
                if key in done:
                    slate.verdict = done[key]
                    continue
                if key in twins:
                    by_job[twins[key]].append(slate)
                    continue
                by_job[job.id], twins[key] = [slate], job.id
                flying[job.id] = job
                self._send(job)
            if flying:
                for job, verdict in self._receive(flying):
                    if self._doubtful(job, verdict):
                        doubtful.append((job, verdict))
                    else:
                        self._settle(job, verdict, by_job, done)
            elif doubtful:
                for job, verdict in doubtful:  # alone: nothing else runs in the container now
                    self._settle(job, self._decide_alone(job, verdict), by_job, done)
                doubtful.clear()
            while slates and slates[0].verdict is not None:
                slate = slates.popleft()
                yield label(slate)

    def _settle(self, job: Job, verdict: dict[str, Any], by_job: dict[int, list[Slate]], done: dict[str, Any]) -> None:
        if self._cache:
            done[program_key(job)] = verdict
        for slate in by_job.pop(job.id):
            slate.verdict = verdict

    def _receive(self, flying: dict[int, Job]) -> list[tuple[Job, dict[str, Any]]]:
        """Wait for at least one verdict. Jobs that a dead judge or container lost are sent again, once."""
        assert self._line is not None
        patience_s = max(job.limits.wall_s for job in flying.values()) * (IN_FLIGHT + 1) + 30
        try:
            message = self._line.inbox.get(timeout=patience_s)
        except queue.Empty:
            message = None
        if message is None:
            return self._replace(flying)
        job = flying.pop(message.get("id"), None)  # type: ignore[arg-type]
        if job is None:
            return []
        if message["status"] == "sandbox_error" and message.get("retry") and job.losses == 0:
            job.losses += 1
            flying[job.id] = job
            self._send(job)
            return []
        return [(job, message)]

    def _replace(self, flying: dict[int, Job]) -> list[tuple[Job, dict[str, Any]]]:
        """The container is gone: start another and send again what it had; what two containers lost is given up."""
        assert self._line is not None
        said = self._line.said()
        log.warning("the sandbox container was lost (%s); starting another", said)
        self._stop()
        self._start()
        lost = []
        for job in list(flying.values()):
            job.losses += 1
            if job.losses > 1:
                del flying[job.id]
                lost.append((job, {"status": "sandbox_error", "detail": f"lost with two containers: {said}"}))
            else:
                self._send(job)
        return lost

    def _alone(self, job: Job) -> dict[str, Any]:
        flying = {job.id: job}
        self._send(job)
        while True:
            for _, verdict in self._receive(flying):
                return verdict

    def _doubtful(self, job: Job, verdict: dict[str, Any]) -> bool:
        """Whether a verdict is a timeout to be confirmed: by wall time, or with the reference's own time not known."""
        return verdict["status"] == "timeout" and (
            verdict.get("limit") == "wall" or problem_key(job.problem) not in self._reference_cpu
        )

    def _decide_alone(self, job: Job, verdict: dict[str, Any]) -> dict[str, Any]:
        """A timeout looked at again: with the limit that the reference's own time allows, and nothing beside it."""
        problem, key = job.problem, problem_key(job.problem)
        if key not in self._reference_cpu:
            wide = replace(self.limits, cpu_s=REFERENCE_CPU_S, wall_s=2 * REFERENCE_CPU_S)
            of_reference = self._alone(self._job(problem, problem.reference, wide))
            passed = of_reference["status"] == "passed"
            self._reference_cpu[key] = of_reference["cpu_seconds"] if passed else 0.0
        if verdict.get("limit") == "wall" or self._limits_for(problem).cpu_s > job.limits.cpu_s:
            return self._alone(self._job(problem, job.code))
        return verdict


def program_key(job: Job) -> str:
    """Identical programs against identical tests run once; line ends and trailing space do not count."""
    return (
        f"{problem_key(job.problem)}:{hashlib.sha256(job.code.rstrip().encode('utf-8', 'surrogatepass')).hexdigest()}"
    )


@lru_cache(maxsize=4096)
def _key(*parts: str | tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def problem_key(problem: Problem) -> str:
    """A problem by what the judge uses of it: the same task_id may mean another problem in the next call."""
    return _key(problem.reference, problem.setup, tuple(problem.tests), problem.entry_point)


def problem_frame(problem: Problem) -> dict[str, Any]:
    """What the judge is told of a problem."""
    return {
        "reference": problem.reference,
        "setup": problem.setup,
        "tests": problem.tests,
        "entry_point": problem.entry_point,
    }


def label(slate: Slate) -> Label:
    sample, problem, verdict = slate.sample, slate.job.problem, slate.verdict
    assert verdict is not None
    status: Status = verdict["status"]
    results = list(verdict.get("tests", []))
    return Label(
        task_id=sample.task_id,
        sample_id=sample.sample_id,
        status=status,
        passed=status == "passed",
        tests=results + ["not_run"] * (len(problem.tests) - len(results)),
        seconds=float(verdict.get("seconds", 0.0)),
        cpu_seconds=float(verdict.get("cpu_seconds", 0.0)),
        detail=str(verdict.get("detail", "")),
        code_sha256=hashlib.sha256(sample.code.encode("utf-8", "surrogatepass")).hexdigest(),
    )


def probe(sandbox: Sandbox) -> list[tuple[checks.Probe, Label]]:
    """Run the conformance programs through a sandbox; each has to get its status."""
    problems = {
        i: Problem(i, "", "def f():\n    return 'done'", [p.test], "", "f", "test") for i, p in enumerate(checks.PROBES)
    }
    samples = [Sample(i, 0, "", p.code, "stop", 0, None, None, "probe") for i, p in enumerate(checks.PROBES)]
    return list(zip(checks.PROBES, sandbox.verify(samples, problems), strict=True))
