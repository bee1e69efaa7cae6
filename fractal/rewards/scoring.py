"""Replies and their problems to rewards within a stated time: what every trainer's function is made of.

    score = Scoring(deadline_s=30)
    score.rewards(["def f(x):\n    return x * 2"], [{"tests": ["assert f(1) == 2"]}])    # [1.0]

The sandbox is started when it is first needed, one for each process and setting, shared by all threads, and closed when
the process ends. Its errors are raised: an unverified program never gets 0.
"""

import asyncio
import atexit
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fractal.errors import InputError
from fractal.generate.extraction import extract_code
from fractal.problems import sets
from fractal.problems.task_ids import known_id
from fractal.records import Label, Problem, Sample
from fractal.rewards.endpoints import Endpoints
from fractal.rewards.rows import problem_from_row, reply_text
from fractal.sandbox.host.client import SandboxError
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits

log = logging.getLogger(__name__)
DEADLINE_S = 60.0  # for a batch
MAX_PROBLEMS = 10_000  # made of rows, kept for the rows that come again


class Verifies(Protocol):
    """A sandbox, or servers with one each."""

    def verify(
        self, samples: Iterable[Sample], problems: Mapping[str, Problem], deadline_s: float | None = None
    ) -> Iterator[Label]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Where and how completions are judged. All settings are keyword arguments of the trainers' functions, too.

    `problems`: a problem set's name or file, for data sets with a column `task_id`; without it, the tests are columns.
    `partial`: what a program gets that fails, times its share of passed tests. `endpoints`: addresses of servers
    (`fractal serve --http`) instead of a container on this machine; `socket`: that of a sidecar.
    """

    problems: str | Path | None = None
    partial: float = 0.0
    deadline_s: float = DEADLINE_S
    limits: Limits | None = None
    socket: Path | str | None = None
    endpoints: tuple[str, ...] = ()
    token: str | None = field(default=None, repr=False)  # of the servers

    def labels(self, completions: Sequence[object], rows: Sequence[Mapping[str, Any]]) -> list[Label]:
        """The labels of the completions, in their order; a sandbox_error is one that was not decided in time.

        Raises InputError for rows without tests, SandboxError where there is no sandbox.
        """
        if len(completions) != len(rows):
            raise InputError(f"{len(completions)} completions and {len(rows)} rows: expected one row for each.")
        problems: dict[str, Problem] = {}
        samples = []
        for number, (completion, row) in enumerate(zip(completions, rows, strict=True)):
            problem = self._problem(row)
            problems[problem.task_id] = problem
            text = reply_text(completion)
            code = extract_code(text, problem.entry_point, problem.prefix)
            samples.append(Sample(problem.task_id, number, text, code, "stop", 0, None, None, "policy"))
        verifier = _shared(self)
        try:
            return list(verifier.verify(samples, problems, self.deadline_s))
        except SandboxError:
            _drop(self)  # the next batch tries a new one
            raise

    def rewards(self, completions: Sequence[object], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """1 for a program that passes, else `partial` of it; None for one that was not decided in time."""
        labels = self.labels(completions, rows)
        undecided = [label for label in labels if label.status == "sandbox_error"]
        if undecided:
            log.warning("%d of %d programs have no verdict: %s", len(undecided), len(labels), undecided[0].detail)
        return [self.reward(label) for label in labels]

    async def rewards_async(
        self, completions: Sequence[object], rows: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        """The same for an event loop, which is free while programs run."""
        return await asyncio.get_running_loop().run_in_executor(_threads, self.rewards, completions, rows)

    def reward(self, label: Label) -> float | None:
        if label.status == "sandbox_error":
            return None
        if label.passed:
            return 1.0
        return self.partial * sum(status == "passed" for status in label.tests) / max(1, len(label.tests))

    def _problem(self, row: Mapping[str, Any]) -> Problem:
        if self.problems is None:
            return _problem_of_columns(row)
        known = _problem_set(str(self.problems))
        task_id = known_id(str(row["task_id"]), known) if "task_id" in row else None
        if task_id is None:
            named = f"task_id {row['task_id']!r}" if "task_id" in row else "a row without a column task_id"
            raise InputError(f"{named}: no problem of {self.problems}, whose ids are as {next(iter(known))!r}.")
        return known[task_id]


# --- what a process keeps ---------------------------------------------------------------------------------------------

_lock = threading.RLock()
_threads = ThreadPoolExecutor(64, "fractal-reward")  # of coroutines: started as they are needed
_verifiers: dict[tuple[object, ...], Verifies] = {}
_sets: dict[str, dict[str, Problem]] = {}
_rows: dict[str, Problem] = {}  # by their columns: a Problem is an object that the sandbox knows again


def _place(scoring: Scoring) -> tuple[object, ...]:
    socket = scoring.socket or os.environ.get("FRACTAL_SOCKET")
    return scoring.endpoints, scoring.token, str(socket) if socket else None, scoring.limits


def _shared(scoring: Scoring) -> Verifies:
    place = _place(scoring)
    with _lock:
        if place not in _verifiers:
            endpoints, token, socket, limits = scoring.endpoints, scoring.token, place[2], scoring.limits
            if endpoints:
                _verifiers[place] = Endpoints(endpoints, token=token)
            else:
                sandbox = Sandbox(limits=limits, socket=Path(str(socket)) if socket else None)
                _verifiers[place] = sandbox.__enter__()
        return _verifiers[place]


def _drop(scoring: Scoring) -> None:
    with _lock:
        verifier = _verifiers.pop(_place(scoring), None)
    if verifier is not None:
        verifier.close()


def _close_all() -> None:
    with _lock:
        verifiers = list(_verifiers.values())
        _verifiers.clear()
    for verifier in verifiers:
        verifier.close()


def _forget_in_child() -> None:
    """After a fork the connection is the parent's: the child starts a sandbox of its own."""
    global _lock, _threads
    _lock = threading.RLock()
    _threads = ThreadPoolExecutor(64, "fractal-reward")
    _verifiers.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_in_child)


def _problem_set(source: str) -> dict[str, Problem]:
    with _lock:
        if source not in _sets:
            _sets[source] = sets.load(source).by_id()
        return _sets[source]


def _problem_of_columns(row: Mapping[str, Any]) -> Problem:
    key = json.dumps(row, sort_keys=True, default=str)
    with _lock:
        if key not in _rows:
            if len(_rows) >= MAX_PROBLEMS:
                _rows.clear()
            _rows[key] = problem_from_row(row, hashlib.sha256(key.encode()).hexdigest()[:16])
        return _rows[key]
