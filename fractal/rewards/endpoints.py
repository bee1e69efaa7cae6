"""Several servers (`fractal serve --http`) as one verifier: what one of them fails to answer goes to another.

with Endpoints(["http://a:8080", "http://b:8080"], token=...) as servers:
    labels = list(servers.verify(samples, problems, deadline_s=60))
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec
import requests

from fractal.records import Label, Problem, Sample, code_sha256
from fractal.sandbox.host.client import SandboxError

PER_REQUEST = 32  # samples
AT_ONCE = 2  # requests to each server: one runs while the other is on its way
DEADLINE_S = 60.0
CONNECT_S = 5.0
ANSWER_S = 5.0  # beyond the deadline that a server was given
PAUSE_S = 0.5  # after a server's failure
MAX_FAILURES = 3  # in a row, before a server is left alone for the rest of a batch
TOKEN_VARIABLE = "FRACTAL_TOKEN"


class Answer(msgspec.Struct):
    labels: list[Label]


@dataclass(frozen=True, slots=True)
class Part:
    """Some samples of a batch, from `start` on."""

    start: int
    samples: list[Sample]


class Endpoints:
    """Servers that verify. Raises SandboxError when none of them answers."""

    def __init__(self, urls: Sequence[str], *, token: str | None = None) -> None:
        if not urls:
            raise ValueError("no address of a server")
        self.urls = [url.rstrip("/") for url in urls]
        self._session = requests.Session()
        self._session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=AT_ONCE * len(urls)))
        if token := token or os.environ.get(TOKEN_VARIABLE):
            self._session.headers["Authorization"] = f"Bearer {token}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._session.close()

    def verify(
        self, samples: Iterable[Sample], problems: Mapping[str, Problem], deadline_s: float | None = None
    ) -> Iterator[Label]:
        """One Label for each sample, in their order, as Sandbox.verify."""
        everything, limit_s = list(samples), DEADLINE_S if deadline_s is None else deadline_s
        batch = _Batch(self, everything, problems, time.monotonic() + limit_s)
        for sample, label in zip(everything, batch.run(), strict=True):
            yield label or _undecided(sample, f"not decided within {limit_s:g} s. {batch.last_error}".strip())

    def ask(self, url: str, part: Part, problems: Mapping[str, Problem], left_s: float) -> list[Label]:
        """The labels of a part, from one server. Raises OSError, or ValueError for an answer that is none."""
        ids = {sample.task_id for sample in part.samples}
        body = {
            "problems": [problems[task_id] for task_id in ids],
            "samples": [
                {"task_id": sample.task_id, "sample_id": sample.sample_id, "code": sample.code}
                for sample in part.samples
            ],
            "deadline_s": left_s,
        }
        answer = self._session.post(
            f"{url}/verify",
            data=msgspec.json.encode(body),
            headers={"Content-Type": "application/json"},
            timeout=(CONNECT_S, left_s + ANSWER_S),
        )
        if not answer.ok:
            raise OSError(f"{url}: {answer.status_code} {answer.text[:200]}")
        labels = msgspec.json.decode(answer.content, type=Answer).labels
        if len(labels) != len(part.samples):
            raise ValueError(f"{url}: {len(labels)} labels for {len(part.samples)} samples")
        return labels


class _Batch:
    """One call of verify: its parts, handed to whichever server is free."""

    def __init__(
        self, endpoints: Endpoints, samples: Sequence[Sample], problems: Mapping[str, Problem], deadline: float
    ) -> None:
        self.last_error = ""
        self._endpoints, self._problems, self._deadline = endpoints, problems, deadline
        size = max(1, min(PER_REQUEST, -(-len(samples) // (AT_ONCE * len(endpoints.urls)))))
        self._parts = deque(Part(start, list(samples[start : start + size])) for start in range(0, len(samples), size))
        self._count = len(samples)
        self._labels: dict[int, Label] = {}
        self._changed = threading.Condition()  # guards parts and labels

    def run(self) -> list[Label | None]:
        """The labels by position, None for those that no server gave. Raises SandboxError if none gave any."""
        threads = [
            threading.Thread(target=self._work, args=(url,), daemon=True, name="fractal-endpoint")
            for url in self._endpoints.urls
            for _ in range(AT_ONCE)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self._deadline + ANSWER_S - time.monotonic()))
        with self._changed:
            if self._count and not self._labels and self.last_error:
                raise SandboxError(f"no server answers: {self.last_error}. Is `fractal serve --http` running there?")
            return [self._labels.get(number) for number in range(self._count)]

    def _next_part(self) -> Part | None:
        """The next part to ask for, waited for while others may fail over theirs; None when all is done or over."""
        with self._changed:
            while not self._parts:
                left_s = self._deadline - time.monotonic()
                if len(self._labels) == self._count or not self._changed.wait(max(0.0, left_s)):
                    return None
            return self._parts.popleft()

    def _work(self, url: str) -> None:
        """Ask one server for part after part; a part that it does not answer goes back, for any of them."""
        failures = 0
        while failures < MAX_FAILURES and (part := self._next_part()):
            left_s = self._deadline - time.monotonic()
            try:
                if left_s <= 0:
                    return
                labels = self._endpoints.ask(url, part, self._problems, left_s)
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                failures += 1
                with self._changed:
                    self.last_error = str(error)
                    self._parts.append(part)
                    self._changed.notify_all()
                time.sleep(max(0.0, min(PAUSE_S, self._deadline - time.monotonic())))
            else:
                failures = 0
                with self._changed:
                    self._labels.update(enumerate(labels, part.start))
                    self._changed.notify_all()


def _undecided(sample: Sample, detail: str) -> Label:
    digest = code_sha256(sample.code)
    return Label(sample.task_id, sample.sample_id, "sandbox_error", False, [], 0.0, 0.0, detail, digest)
