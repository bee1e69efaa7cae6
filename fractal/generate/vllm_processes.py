"""vLLM engines in processes of their own: one, or several on one GPU.

    engine = EngineProcesses(path, sampling, "bfloat16", 700, engines=2)
    for done in engine.generate(requests): ...
    engine.close()

With a small model Python, not the GPU, limits the rate: scheduling a batch takes longer than computing it. So the
engine shares its process with nothing (records, extraction and files stay with the caller), and several engines share
a GPU. Requests are handed out as they are finished; an engine that fails gives its requests to the others.

An engine's process ends with its parent, also by SIGKILL: the kernel ends it (prctl(2), PR_SET_PDEATHSIG), and on
other systems the end of its standard input does. It speaks length-prefixed msgpack over its standard streams.
"""

import ctypes
import itertools
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

import msgspec

from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.generate.engine import Completion, Request, Sampling, never_stop
from fractal.generate.memory import REQUESTS_AHEAD

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CLOSE_S = 30.0  # for an engine to give back its memory before it is killed
POLL_S = 0.2  # between two looks whether to stop


class Start(msgspec.Struct, tag=True):
    """To the engine, first: what to load. The rest as in VllmEngine."""

    path: str
    sampling: Sampling
    dtype: str
    length: int
    size: int | None
    budget_bytes: int | None
    options: dict[str, Any]


class Requests(msgspec.Struct, tag=True):
    """To the engine: samples to draw, each as its number here, token ids of the prompt, seed."""

    requests: list[tuple[int, list[int], int]]


class Ready(msgspec.Struct, tag=True):
    """From the engine: the model is loaded, `batch` samples are decoded at once."""

    batch: int


class Completions(msgspec.Struct, tag=True):
    """From the engine: samples that ended, each as number, text, stopped, tokens, sum of log-probabilities."""

    completions: list[tuple[int, str, bool, int, float | None]]


class WarningText(msgspec.Struct, tag=True):
    """From the engine: a line for the user."""

    text: str


class Failure(msgspec.Struct, tag=True):
    """From the engine, last: why it ends. `code` as an exit code of ours: 2 InputError, 3 OutsideError."""

    code: int
    text: str


FromEngine = Ready | Completions | WarningText | Failure
Event = tuple["EngineProcess", FromEngine | None]  # None: its output has ended


class EngineProcesses:
    """An Engine (engine.py) that runs `engines` of vLLM on the same device.

    `budget_bytes`: GPU memory that they share; only needed where there are several. `options` go to vLLM's LLM.
    `first`: a process that was started while prompts were tokenised, to save time.
    Raises OutsideError if the first engine does not start. The others may: then it goes on with fewer.
    """

    def __init__(
        self,
        path: Path,
        sampling: Sampling,
        dtype: str,
        length: int,
        size: int | None = None,
        *,
        engines: int = 1,
        budget_bytes: int | None = None,
        options: dict[str, Any] | None = None,
        first: "EngineProcess | None" = None,
    ) -> None:
        share = budget_bytes // engines if budget_bytes and engines > 1 else None
        start = Start(str(path), sampling, dtype, length, size, share, options or {})
        self._processes = [first or EngineProcess()]
        self._events = self._processes[0].events
        self._processes[0].send(start)
        try:
            while not self._processes[0].batch:  # the first start may compile: the others find what it has compiled
                self._handle(*self._events.get())
        except BaseException:
            self.kill()
            raise
        self.batch = self._processes[0].batch
        for _ in range(engines - 1):
            self._processes.append(EngineProcess(self._events))
            self._processes[-1].send(start)

    @property
    def engines(self) -> int:
        """How many are alive."""
        return len(self._processes)

    def generate(
        self, requests: Iterable[Request], should_stop: Callable[[], bool] = never_stop
    ) -> Iterator[list[Completion]]:
        source = iter(requests)
        waiting: deque[Request] = deque()
        while True:
            ahead = REQUESTS_AHEAD * sum(process.batch for process in self._processes)
            waiting.extend(itertools.islice(source, max(0, max(1, ahead) - len(waiting))))
            if not waiting and not any(process.under_way for process in self._processes):
                return
            stop = should_stop()
            if not stop:
                for process in self._processes:
                    process.fill(waiting)
            if done := self._collect(waiting, 0.0 if stop else POLL_S):
                yield done
            if stop:
                return

    def _collect(self, waiting: deque[Request], wait_s: float) -> list[Completion]:
        """What the engines have sent by now; the requests of an engine that failed go back to `waiting`."""
        done: list[Completion] = []
        with suppress(queue.Empty):
            while True:
                process, event = self._events.get(timeout=wait_s) if wait_s else self._events.get_nowait()
                done += self._handle(process, event)
                if process not in self._processes:  # a sample's seed is its own: any engine draws the same
                    waiting.extendleft(reversed(process.under_way.values()))
                    process.under_way = {}
                wait_s = 0.0
        return done

    def _handle(self, process: "EngineProcess", event: FromEngine | None) -> list[Completion]:
        """Returns the completions of an event. Raises if it is the end of the last engine."""
        if isinstance(event, Ready):
            process.batch = event.batch
        elif isinstance(event, Completions):
            return [
                Completion(process.under_way.pop(number), text, stopped, tokens, sum_logprob)
                for number, text, stopped, tokens, sum_logprob in event.completions
            ]
        elif isinstance(event, WarningText):
            console.warn(event.text)
        elif process in self._processes:  # it failed, or its output ended
            self._processes.remove(process)
            code = process.end()
            error = _error(event, code)
            if not self._processes:
                raise error
            console.warn(f"generate: one of {self.engines + 1} engines ended, the others go on: {error}")
        return []

    def close(self) -> None:
        """End the engines; their memory is free then."""
        for process in self._processes:
            process.close()
        for process in self._processes:
            process.end()
        self._processes = []

    def kill(self) -> None:
        """End the engines at once."""
        for process in self._processes:
            process.kill()
        self._processes = []


def _error(event: FromEngine | None, code: int) -> Exception:
    if isinstance(event, Failure):
        return InputError(event.text) if event.code == 2 else OutsideError(event.text)
    how = f"was ended by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    why = " Signal 9 is often the kernel's, out of memory." if code == -signal.SIGKILL else ""
    return OutsideError(
        f"vLLM's process {how}; its output is in the run's logs/generate.log.{why} Finished samples are kept: run "
        "the same command again, it goes on where it stopped."
    )


class EngineProcess:
    """The process of one engine, with the requests that it has. It imports vLLM, then waits for Start.

    A context manager: left, it is ended.
    """

    def __init__(self, events: "queue.SimpleQueue[Event] | None" = None) -> None:
        """What it prints goes where standard error goes now: to the log, within `console.quiet`."""
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue() if events is None else events
        self.batch = 0  # samples decoded at once; 0 until the model is loaded
        self.under_way: dict[int, Request] = {}  # by number
        self._numbers = itertools.count()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "fractal.generate.vllm_processes", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is the parent's: it writes what is finished
        )
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for data in read_frames(self._child.stdout):
            self.events.put((self, _from_engine.decode(data)))
        self.events.put((self, None))

    def send(self, message: Start | Requests) -> None:
        assert self._child.stdin is not None
        with suppress(OSError):  # it has ended: its reader notices
            write_frame(self._child.stdin, message)

    def fill(self, waiting: deque[Request]) -> None:
        """Hand out requests, once it has loaded, so that it always has some ahead; none while it has enough."""
        count = REQUESTS_AHEAD * self.batch - len(self.under_way)
        if count < min(len(waiting), max(1, self.batch // 4)):
            return
        if new := {next(self._numbers): waiting.popleft() for _ in range(min(count, len(waiting)))}:
            self.under_way |= new
            self.send(Requests([(number, request.prompt, request.seed) for number, request in new.items()]))

    def close(self) -> None:
        """Close its standard input, at which it ends."""
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.close()

    def end(self) -> int:
        """Wait until it has ended; returns its exit code."""
        self.close()
        try:
            return self._child.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        self._child.kill()
        self.close()
        return self._child.wait()


# --- both ends --------------------------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
_from_engine = msgspec.msgpack.Decoder(FromEngine)
_to_engine = msgspec.msgpack.Decoder(Start | Requests)
FRAME_LENGTH = struct.Struct(">I")


def write_frame(stream: IO[bytes], message: Start | Requests | FromEngine) -> None:
    """Write one frame: its length, then msgpack."""
    data = _encoder.encode(message)
    stream.write(FRAME_LENGTH.pack(len(data)) + data)
    stream.flush()


def read_frames(stream: IO[bytes]) -> Iterator[bytes]:
    """Whole frames, until the stream ends."""
    while len(head := stream.read(FRAME_LENGTH.size)) == FRAME_LENGTH.size:
        (length,) = FRAME_LENGTH.unpack(head)
        if len(data := stream.read(length)) < length:
            return
        yield data


# --- the engine's process ---------------------------------------------------------------------------------------------


class RequestReader:
    """The requests that the parent sends. `ended` is set once it closes the stream, or ends."""

    def __init__(self, stream: Iterator[bytes]) -> None:
        self.ended = threading.Event()
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: Iterator[bytes]) -> None:
        for data in stream:
            message = _to_engine.decode(data)
            assert isinstance(message, Requests)
            for number, prompt, seed in message.requests:
                self._requests.put(Request("", number, prompt, seed))
        self.ended.set()
        self._requests.put(None)

    def take(self, most: int, wait: bool) -> list[Request] | None:
        """Up to `most` requests that are there; none, or with `wait` at least one. None once no more come."""
        requests: list[Request] = []
        with suppress(queue.Empty):
            while len(requests) < most:
                request = self._requests.get(wait and not requests)
                if request is None:
                    self._requests.put(None)  # for the next call
                    return requests or None
                requests.append(request)
        return requests


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends. Source: prctl(2)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def main() -> None:
    """Load the model that Start on standard input names, then answer the requests that follow on standard output."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print
    end_with_parent(int(sys.argv[1]))
    stream = read_frames(sys.stdin.buffer)
    code = 0
    try:
        from fractal.generate.vllm import VllmEngine

        start = _to_engine.decode(next(stream, b""))
        assert isinstance(start, Start)
        engine = VllmEngine(
            Path(start.path),
            start.sampling,
            start.dtype,
            start.length,
            start.size,
            budget_bytes=start.budget_bytes,
            options=start.options,
            warn=lambda text: write_frame(out, WarningText(text)),
        )
        write_frame(out, Ready(engine.batch))
        reader = RequestReader(stream)
        for done in engine.generate_from(reader.take, reader.ended.is_set):
            write_frame(
                out, Completions([(c.request.sample_id, c.text, c.stopped, c.tokens, c.sum_logprob) for c in done])
            )
        engine.close()
    except (BrokenPipeError, msgspec.DecodeError):
        code = 1  # the parent is gone, or needs no engine after all
    except (InputError, OutsideError) as error:
        write_frame(out, Failure(2 if isinstance(error, InputError) else 3, str(error)))
    sys.stderr.flush()
    os._exit(code)  # vLLM's threads would delay a normal exit


if __name__ == "__main__":
    main()
