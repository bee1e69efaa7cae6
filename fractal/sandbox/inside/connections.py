"""The supervisor's connections: clients, which send samples, and workers, the judge processes that run them.

Trusted; standard library only.
"""

import os
import signal
import socket
import time
from collections import deque
from dataclasses import dataclass, field

from fractal.sandbox.inside.candidate_process import Slot
from fractal.sandbox.inside.judge import work
from fractal.sandbox.inside.protocol import FORGET, MAX_FRAME, FrameBuffer, SampleHead, frame

GRACE_S = 0.8  # after the wall limit, before a judge is replaced
START_S = 30.0  # for a judge that has just been started
MAX_PROBLEMS = 4096  # that a judge keeps


@dataclass(eq=False)
class Client:
    """A client's connection: what it sent, what waits for a judge, which verdicts it has not yet read."""

    source: int  # file descriptors
    sink: int
    sock: socket.socket | None = None
    buffer: FrameBuffer = field(default_factory=lambda: FrameBuffer(2 * MAX_FRAME))
    problems: dict[bytes, bytes] = field(default_factory=dict)  # by key: whole frame bodies
    waiting: deque["Task"] = field(default_factory=deque)
    waiting_bytes: int = 0
    running: int = 0
    unsent: list[bytes] = field(default_factory=list)
    unsent_bytes: int = 0
    due: float = 0.0  # when `unsent` has to be on its way
    written_at: float = 0.0
    watched: dict[int, int] = field(default_factory=dict)  # events by file descriptor
    open_input: bool = True
    dismissed: bool = False


@dataclass(slots=True, eq=False)
class Task:
    """A sample to run: its frame as it came, its problem's frame, and the client that sent it."""

    head: SampleHead
    body: bytes
    problem: bytes
    client: Client


class Worker:
    """A judge process as the supervisor sees it."""

    def __init__(self, slot: Slot, others: list[int]) -> None:
        self.slot = slot
        self.known_problems: set[bytes] = set()  # their keys
        self.tasks: deque[Task] = deque()  # handed over; it runs the first one
        self.deadline = 0.0
        self.buffer = FrameBuffer()
        self.unsent = bytearray()
        self.watched: dict[int, int] = {}  # events by file descriptor
        self.ready = False  # its check of a candidate is done
        self.sock, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.sock.close()
                for fd in others:
                    os.close(fd)
                os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
                os.dup2(2, 1)  # nothing but the supervisor writes frames
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                work(theirs, slot)
            finally:
                os._exit(0)
        theirs.close()

    def assign(self, task: Task) -> None:
        data = b""
        if task.head.key not in self.known_problems:
            if len(self.known_problems) >= MAX_PROBLEMS:
                self.known_problems.clear()
                data = frame(FORGET)
            self.known_problems.add(task.head.key)
            data += frame(task.problem)
        self.tasks.append(task)
        if len(self.tasks) == 1:
            self.begin_next()
        self.unsent += data + frame(task.body)
        self.push()

    def begin_next(self) -> None:
        """Set the deadline of the task that the judge runs now; a new judge starts its zygote first."""
        wait_s = self.tasks[0].head.wall_s + GRACE_S + (0 if self.ready else START_S) if self.tasks else 0.0
        self.deadline = time.monotonic() + wait_s

    def push(self) -> None:
        """Send what the judge's socket takes. It may be stuck over a sample: the supervisor never waits for it."""
        if self.unsent:
            try:
                del self.unsent[: self.sock.send(self.unsent)]
            except BlockingIOError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                self.unsent.clear()  # it died: its socket tells, and its tasks are taken back

    def end(self) -> None:
        """Kill the judge; its zygote and candidates die with their sockets and parents."""
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        self.sock.close()
