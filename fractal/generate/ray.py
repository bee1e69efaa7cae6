"""Engines on several GPUs, as actors of Ray: on this machine, or in the cluster that this node belongs to.

    engines = RayEngines(RayCluster("local", 2), load, extract)
    for done in engine.generate(requests): ...
    engine.close()

Each actor holds one engine, which `load` makes there. This process, Ray's driver, hands requests out as they are
finished (scheduler.py) and is the only one that writes. Ray restarts and retries nothing: an actor that is lost, or
does not answer, is killed, its requests go to the others, and what it still sends is dropped.

There is one call at a time to each actor: it brings requests and returns what is finished, or after a second nothing.
So a call that does not return shows that its actor, or its machine, hangs.
"""

import hashlib
import itertools
import logging
import os
import queue
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray._raylet import AuthenticationTokenLoader
from ray.exceptions import RayError

from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.generate.engine import Completion, Engine, RayCluster, Request, never_stop
from fractal.generate.memory import REQUESTS_AHEAD
from fractal.generate.scheduler import Scheduler
from fractal.install import gpu

POLL_S = 0.2  # between two looks whether to stop
QUIET_S = 1.0  # after which a call returns without a completion
LINGER_S = 0.25  # for which a call collects more completions after the first
HANG_S = 20.0  # without an answer of an engine that has loaded, until it is given up
STOP_S = 2.0  # for what is finished to arrive, once it is to stop
BATCH = 256  # assumed of an engine that states none
OBJECT_STORE_BYTES = 128 << 20  # for replies above 100 kB; Ray's own default is a share of all memory

Load = Callable[[], Engine]  # pickled
Extract = Callable[[Completion], str]  # pickled


class Answer(NamedTuple):
    """A completion without its request."""

    text: str
    stopped: bool
    tokens: int
    sum_logprob: float | None
    code: str


class Reply(NamedTuple):
    """What a call of an actor returns."""

    batch: int  # samples decoded at once; 0 until the engine is loaded
    answers: dict[int, Answer]  # by the request's number
    warnings: list[str]
    failure: str  # why it ends, in a line; empty while it works
    is_input_error: bool  # the failure is an InputError
    node: str  # host name
    node_id: str
    pid: int
    code: str  # digest of the code there


# --- the actor --------------------------------------------------------------------------------------------------------


class Worker:
    """An engine, run by a thread of its own; `exchange` brings requests and takes completions."""

    def __init__(self, load: Load, extract: Extract) -> None:
        self._extract = extract
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[list[Completion]] = queue.SimpleQueue()  # an empty list: look at the rest
        self._numbers: dict[tuple[str, int], int] = {}  # of what is under way
        self._batch = 0
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._node = socket.gethostname(), ray.get_runtime_context().get_node_id()
        self._code = code_digest()
        threading.Thread(target=self._run, args=(load,), daemon=True).start()

    def exchange(self, requests: list[tuple[int, Request]]) -> Reply:
        """Draw `requests`, too; returns what has been finished since the last call."""
        for number, request in requests:
            self._numbers[request.task_id, request.sample_id] = number
            self._requests.put(request)
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + QUIET_S
        with suppress(queue.Empty):
            while not self._failure and (rest := deadline - time.monotonic()) > 0:
                completions = self._finished.get(timeout=rest)
                for c in completions:
                    number = self._numbers.pop((c.request.task_id, c.request.sample_id))
                    answers[number] = Answer(c.text, c.stopped, c.tokens, c.sum_logprob, self._extract(c))
                if not completions or not self._numbers or len(answers) >= max(1, self._batch // 2):
                    break
                deadline = min(deadline, time.monotonic() + LINGER_S)
        warnings = [self._warnings.get() for _ in range(self._warnings.qsize())]
        failure = (str(self._failure).strip() or type(self._failure).__name__) if self._failure else ""
        is_input_error = isinstance(self._failure, InputError)
        return Reply(self._batch, answers, warnings, failure, is_input_error, *self._node, os.getpid(), self._code)

    def _run(self, load: Load) -> None:
        console.warn = self._warnings.put  # type: ignore[assignment]
        try:
            engine = load()
            self._batch = getattr(engine, "batch", 0) or BATCH
            self._finished.put([])
            for completions in self._draw(engine):
                self._finished.put(completions)
        except Exception as error:
            self._failure = error
            self._finished.put([])

    def _draw(self, engine: Engine) -> Iterator[list[Completion]]:
        if generate_from := getattr(engine, "generate_from", None):  # vLLM takes requests while it decodes others
            yield from generate_from(self._take)
        while True:
            yield from engine.generate(self._take(self._batch, True))

    def _take(self, most: int, wait: bool) -> list[Request]:
        """Up to `most` requests that are there; with `wait` at least one."""
        requests: list[Request] = []
        with suppress(queue.Empty):
            while len(requests) < most:
                requests.append(self._requests.get(wait and not requests))
        return requests


def code_digest() -> str:
    """sha256 of this package's Python files: the nodes of a cluster must have the same."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


# --- the driver -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Actor:
    """An actor, as the driver sees it."""

    handle: Any
    call: Any = None  # the reference of the call under way
    called_at: float = 0.0
    batch: int = 0
    node: str = ""
    node_id: str = ""
    pid: int = 0


class RayEngines:
    """An Engine (engine.py) that spreads requests over engines in actors. Once it was stopped, it is to be closed.

    `load` makes an engine in an actor, `extract` takes the program out of a completion there; both are pickled. On a
    machine with GPUs each engine gets one.

    Raises OutsideError if there is no such cluster, if it has too few GPUs, or if the first engine does not start. The
    others may: then it goes on with fewer.
    """

    def __init__(self, cluster: RayCluster, load: Load, extract: Extract) -> None:
        self.lost = self.handed_on = 0  # engines given up, and the requests that they held
        self._actors: dict[str, Actor] = {}
        self._numbers = itertools.count()
        self._nodes: set[str] = set()
        self._code = code_digest()
        self._folder = tempfile.mkdtemp(prefix="fractal-ray-")  # of a local cluster: sockets, logs, token
        try:
            count, options = self._connect(cluster)
            worker = ray.remote(max_restarts=0, max_task_retries=0, **options)(Worker)
            first = self._start(worker, load, extract)
            while not first.batch:  # the first start may compile: the others find what it has compiled
                for name, reply in self._replies(POLL_S).items():
                    self._read(name, reply)
                self._call_all(Scheduler(()))
            for _ in range(count - 1):
                self._start(worker, load, extract)
        except BaseException:
            self.close()
            raise
        self.batch = first.batch

    def _connect(self, cluster: RayCluster) -> tuple[int, dict[str, Any]]:
        """Start Ray here, or join it. Returns how many engines there are to be, and what each needs."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray._private.worker.print_to_stdstream = _log_message  # what Ray says of lost workers, on standard output
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        if cluster.address == "local":
            token = Path(self._folder, "token")  # the folder is this user's alone
            token.write_text(secrets.token_hex(32))
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
            AuthenticationTokenLoader.instance().reset_cache()  # of an earlier cluster
            processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            gpus = len(gpu.gpus()) if gpu.usable() else 0
            count = check_engines(cluster, gpus)
            options |= {
                "num_cpus": max(processors, count),
                "num_gpus": gpus,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_temp_dir": self._folder,
                "_node_ip_address": "127.0.0.1",
            }
            _init("local", options, f"--ray local:{count}: Ray does not start here ({{}}).")
            # Below one processor Ray would set OMP_NUM_THREADS=1 (ray#28594).
            return count, {"num_cpus": max(1, processors // count), "num_gpus": 1 if gpus else 0}
        _init(
            "auto",
            options,
            "--ray auto: no cluster can be joined from here ({}). Start one: ray start --head; "
            "ray start --address=HEAD:6379 on the other nodes. Or take --ray local:N.",
        )
        gpus = int(ray.cluster_resources().get("GPU", 0))
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        spread = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "scheduling_strategy": "SPREAD"}
        return check_engines(cluster, gpus, nodes), spread

    def _start(self, worker: Any, load: Load, extract: Extract) -> Actor:
        actor = Actor(worker.remote(load, extract))
        self._actors[str(len(self._actors) + self.lost)] = actor
        self._call(actor, [])
        return actor

    @property
    def engines(self) -> int:
        """How many are alive, or are starting."""
        return len(self._actors)

    @property
    def ray(self) -> dict[str, Any]:
        """For the manifest."""
        return {"nodes": sorted(self._nodes), "engines_lost": self.lost, "handed_on": self.handed_on}

    def generate(
        self, requests: Iterable[Request], should_stop: Callable[[], bool] = never_stop
    ) -> Iterator[list[Completion]]:
        scheduler = Scheduler(requests, self._numbers)
        for name, actor in self._actors.items():
            if actor.batch:
                scheduler.add(name, REQUESTS_AHEAD * actor.batch)
        while not scheduler.done:
            if should_stop():
                done, _ = self._collect(scheduler, STOP_S, wait_for_all=True)
                if done:
                    yield done
                return
            self._call_all(scheduler)
            done, error = self._collect(scheduler, POLL_S)
            if done:
                yield done
            if error:
                raise error

    def _call_all(self, scheduler: Scheduler) -> None:
        """Call the actors that are not being called, with as many requests as each has room for."""
        for name, actor in self._actors.items():
            if actor.call is None:
                self._call(actor, scheduler.take(name))

    def _call(self, actor: Actor, requests: list[tuple[int, Request]]) -> None:
        actor.call, actor.called_at = actor.handle.exchange.remote(requests), time.monotonic()

    def _replies(self, wait_s: float, *, wait_for_all: bool = False) -> dict[str, Reply | Exception]:
        """By actor, what has arrived; an error where an actor was lost, or does not answer."""
        calls = {actor.call: name for name, actor in self._actors.items() if actor.call is not None}
        replies: dict[str, Reply | Exception] = {}
        if not calls:
            return replies
        ray.wait(list(calls), num_returns=len(calls) if wait_for_all else 1, timeout=wait_s)
        for call in ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]:
            name = calls.pop(call)
            self._actors[name].call = None
            try:
                replies[name] = ray.get(call)
            except RayError as error:
                replies[name] = error
        for name in calls.values():
            actor = self._actors[name]
            if actor.batch and time.monotonic() - actor.called_at > HANG_S:
                replies[name] = TimeoutError(f"it has not answered for {HANG_S:.0f} s")
        return replies

    def _collect(
        self, scheduler: Scheduler, wait_s: float, *, wait_for_all: bool = False
    ) -> tuple[list[Completion], Exception | None]:
        """What the engines have finished by now, and an error once the last of them is lost."""
        done: list[Completion] = []
        failed: Exception | None = None
        for name, reply in self._replies(wait_s, wait_for_all=wait_for_all).items():
            loaded = self._actors[name].batch
            try:
                answers = self._read(name, reply)
            except (InputError, OutsideError) as error:
                failed = error
                answers = reply.answers if isinstance(reply, Reply) else {}
            done += [
                Completion(request, a.text, a.stopped, a.tokens, a.sum_logprob, a.code)
                for request, a in scheduler.answered(name, answers)
            ]
            if name not in self._actors:
                self.handed_on += scheduler.lose(name)
            elif not loaded and self._actors[name].batch:
                scheduler.add(name, REQUESTS_AHEAD * self._actors[name].batch)
        return done, failed

    def _read(self, name: str, reply: Reply | Exception) -> dict[int, Answer]:
        """Returns a reply's answers. A reply that is a failure ends the actor; raises if it was the last."""
        actor = self._actors[name]
        failure: Exception | None = None
        if isinstance(reply, Exception):
            reason = (str(reply).strip().splitlines() or [type(reply).__name__])[0].rstrip(".")
            failure = OutsideError(
                f"an engine on {actor.node or 'a node'} was lost: {reason}. Finished samples are kept: run the same "
                "command again, it goes on where it stopped."
            )
        else:
            actor.batch, actor.node, actor.node_id, actor.pid = reply.batch, reply.node, reply.node_id, reply.pid
            self._nodes.add(reply.node)
            for text in reply.warnings:
                console.warn(text)
            if reply.code != self._code:
                failure = OutsideError(
                    f"--ray auto: node {reply.node} has other code than this one. Bring the same to every node, and "
                    "start Ray there again."
                )
            elif reply.failure:
                failure = InputError(reply.failure) if reply.is_input_error else OutsideError(reply.failure)
        if failure:
            del self._actors[name]
            self.lost += 1
            kill(actor)
            if not self._actors:
                raise failure
            console.warn(f"generate: one of {self.engines + 1} engines ended, the others go on: {failure}")
        return reply.answers if isinstance(reply, Reply) else {}

    def close(self) -> None:
        """End the engines; a cluster that was started here, too."""
        for actor in self._actors.values():
            kill(actor)
        self._actors = {}
        with console.quiet("ending Ray"), _own_signals():
            ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def kill(actor: Actor) -> None:
    """End an actor's process at once; on this machine also one that is stopped and takes no message."""
    with suppress(RayError, ValueError):
        ray.kill(actor.handle, no_restart=True)
    if actor.pid and actor.node_id == ray.get_runtime_context().get_node_id():
        with suppress(ProcessLookupError, PermissionError):
            os.kill(actor.pid, signal.SIGKILL)


def check_engines(cluster: RayCluster, gpus: int, nodes: int = 1) -> int:
    """How many engines there are to be: those asked for, else one for each GPU, without any one for each node.

    Raises OutsideError for more than there are GPUs, where there are any or they are asked for.
    """
    if cluster.gpus and gpus < max(1, cluster.engines or 0):
        asked = cluster.engines or "all"
        raise OutsideError(f"--gpus {asked}: there are {gpus} GPUs that can be used. {gpu.problem()}".rstrip())
    if gpus and (cluster.engines or 0) > gpus:
        raise OutsideError(f"--ray local:{cluster.engines}: there are {gpus} GPUs, and each engine takes one.")
    return cluster.engines or gpus or nodes


def _init(address: str, options: dict[str, Any], message: str) -> None:
    """Raises OutsideError with the message, into which the reason goes."""
    try:
        with _own_signals():
            ray.init(address=address, **options)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise OutsideError(message.format(reason)) from error


def _log_message(message: dict[str, Any], **_: Any) -> None:
    logging.getLogger(__name__).info("Ray: %s", " ".join(message["lines"]).strip())


@contextmanager
def _own_signals() -> Iterator[None]:
    """Undo what Ray sets for SIGTERM: it would end this process without a word."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
