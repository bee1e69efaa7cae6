"""The container's first process: takes samples from its clients, hands them to judges, replaces a judge that is stuck.

Clients speak frames (protocol.py) over standard input and output, or over a Unix socket in a volume (--socket): then
any number of them, each served in turn, and the container lives on when they leave. Trusted; it runs no program and
looks into no verdict. Standard library only. Run inside the sandbox image, whose scratch file systems are
/scratch/0, 1, …: supervisor.py --slots N --first-uid UID [--socket PATH].
"""

import os
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))))

import errno
import select
import signal
import socket
import struct
import time
from collections import deque
from typing import Any

from fractal.sandbox.inside import protections, sharing
from fractal.sandbox.inside.candidate_process import Slot
from fractal.sandbox.inside.connections import Client, Task, Worker
from fractal.sandbox.inside.judge import sandbox_error
from fractal.sandbox.inside.protocol import (
    ALIVE,
    CANCEL,
    FORGET,
    KEY_BYTES,
    PROBLEM,
    READY,
    SAMPLE,
    VERDICT,
    VERDICT_HEAD,
    ProtocolError,
    frame,
    pack,
    sample_head,
    unpack,
    verdict_id,
)

QUEUE_DEPTH = 8  # samples handed to a judge at once: it must not idle while the supervisor is elsewhere
SHARED_UIDS = 500  # between a slot's uid and that of its shared candidate
MAX_WAITING = 64 << 20  # bytes of samples that a client may have waiting here; then it has to wait itself
MAX_WALL_S = 1e6  # no wall limit is longer
MAX_UNSENT = 1 << 20  # bytes of verdicts that a client may leave unread; then none of its samples is run
ALIVE_S = 5.0
FLUSH_AT, FLUSH_S = 64, 0.004  # verdicts that are written together, and how long the first of them waits at most


class Supervisor:
    """The loop over clients and judges."""

    def __init__(self, slots: list[Slot], listener: socket.socket | None) -> None:
        self._poll = select.epoll()
        self._listener = listener
        self._clients: deque[Client] = deque()
        self._sources: dict[int, Client] = {}
        self._workers: list[Worker] = []
        self._alone: deque[Task] = deque()  # they run with nothing beside them
        self._checks: dict[str, Any] = {}
        for slot in slots:
            self._start_worker(slot)
        self._checks = protections.inspect_container() | _combined(
            [self._first_checks(worker) for worker in self._workers]
        )
        for worker in self._workers:
            worker.sock.setblocking(False)
            self._watch_worker(worker)
        if listener is None:
            self._welcome(Client(0, 1))
        else:
            self._poll.register(listener, select.EPOLLIN)

    # --- judges -------------------------------------------------------------------------------------------------------

    def _start_worker(self, slot: Slot) -> Worker:
        sockets = [worker.sock.fileno() for worker in self._workers] + [self._poll.fileno()]
        sockets += [fd for client in self._clients if client.sock for fd in (client.source, client.sink)]
        sockets += [self._listener.fileno()] if self._listener else []
        self._workers.append(Worker(slot, sockets))
        return self._workers[-1]

    def _watch_worker(self, worker: Worker) -> None:
        events = select.EPOLLIN | (select.EPOLLOUT if worker.unsent else 0)
        self._watch(worker.watched, worker.sock.fileno(), events)

    def _first_checks(self, worker: Worker) -> dict[str, Any]:
        """What the judge's check of a candidate found; blocks. {} where the judge died over it."""
        while data := worker.sock.recv(1 << 16):
            for body in worker.buffer.feed(data):
                worker.ready = True
                checks: dict[str, Any] = unpack(body[1:])
                return checks
        return {}

    def _replace(self, worker: Worker) -> deque[Task]:
        """End a judge and start another one; returns the tasks that the old one had not finished."""
        self._poll.unregister(worker.sock)
        worker.end()
        self._workers.remove(worker)
        _kill_orphans(worker.slot)
        replacement = self._start_worker(worker.slot)
        replacement.sock.setblocking(False)
        self._watch_worker(replacement)
        return worker.tasks

    def _receive(self, worker: Worker) -> None:
        """Pass a judge's verdicts on; replace it if it is dead."""
        try:
            data = worker.sock.recv(1 << 18)
        except BlockingIOError:  # it was writable only
            return
        except ConnectionResetError:
            data = b""
        if not data:  # no fault of the program: the client sends the sample once more
            left = self._replace(worker)
            if left:
                self._answer(left.popleft(), sandbox_error("the judge died", retry=True))
            self._requeue(left)
            return
        for body in worker.buffer.feed(data):
            if body[:1] == READY:
                if any(not check["ok"] and self._checks[name]["ok"] for name, check in unpack(body[1:]).items()):
                    raise RuntimeError("a protection has been lost")
                worker.ready = True
                worker.begin_next()
                continue
            task = worker.tasks.popleft()
            if verdict_id(body) != task.head.id:
                raise ProtocolError("a judge's verdict on another sample")
            worker.begin_next()
            task.client.running -= 1
            self._send(task.client, frame(body))

    def _requeue(self, tasks: deque[Task]) -> None:
        while tasks:
            task = tasks.pop()
            task.client.running -= 1
            task.client.waiting_bytes += len(task.body)
            task.client.waiting.appendleft(task)

    def _end_stuck(self, now: float) -> None:
        for worker in [w for w in self._workers if w.tasks and w.deadline < now]:
            left = self._replace(worker)
            task = left.popleft()
            detail = "wall time over: the judge was still busy with what the program returned"
            self._answer(task, {"status": "timeout", "limit": "wall", "seconds": task.head.wall_s, "detail": detail})
            self._requeue(left)

    def _assign(self) -> None:
        """Hand out what waits: a sample of each client in turn; one that must run alone when nothing else does."""
        while True:
            worker = min(self._workers, key=lambda w: len(w.tasks))
            if any(w.tasks and w.tasks[0].head.alone for w in self._workers):
                return
            if self._alone:
                if not any(w.tasks for w in self._workers):
                    self._assign_to(worker, self._alone.popleft())
                return
            client = next((c for c in self._clients if c.waiting and c.unsent_bytes < MAX_UNSENT), None)
            if client is None or len(worker.tasks) >= QUEUE_DEPTH:
                return
            self._clients.rotate(-1 - self._clients.index(client))
            task = client.waiting.popleft()
            client.waiting_bytes -= len(task.body)
            if task.head.alone:
                self._alone.append(task)
            else:
                self._assign_to(worker, task)

    def _assign_to(self, worker: Worker, task: Task) -> None:
        task.client.running += 1
        worker.assign(task)

    # --- clients ------------------------------------------------------------------------------------------------------

    def _welcome(self, client: Client) -> None:
        os.set_blocking(client.source, False)
        os.set_blocking(client.sink, False)
        self._clients.append(client)
        self._sources[client.source] = client
        self._send(client, pack(self._greeting(), READY))

    def _greeting(self) -> dict[str, Any]:
        unknown = sharing.unknown_interpreter()
        return {"slots": len(self._workers), "checks": self._checks, "no_sharing": unknown}

    def _dismiss(self, client: Client) -> None:
        """Forget a client and its waiting samples; those that run are run to their end, and their verdicts dropped."""
        client.dismissed = True
        self._clients.remove(client)
        del self._sources[client.source]
        for fd in (client.source, client.sink):
            self._watch(client.watched, fd, 0)
        if client.sock is not None:
            client.sock.close()
            os.close(client.sink)
        self._alone = deque(task for task in self._alone if task.client is not client)

    def _read(self, client: Client) -> None:
        try:
            data = os.read(client.source, 1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            client.open_input = False
            if client.sock is not None:
                self._dismiss(client)
            return
        try:
            for body in client.buffer.feed(data):
                self._accept(client, body)
        except (ProtocolError, KeyError):  # not what a client of ours sends
            if client.sock is None:
                raise
            self._dismiss(client)

    def _accept(self, client: Client, body: bytes) -> None:
        kind = body[:1]
        if kind == SAMPLE:
            head = sample_head(body)
            if not 0 < head.wall_s < MAX_WALL_S:
                raise ProtocolError("a wall limit out of range")
            client.waiting.append(Task(head, body, client.problems[head.key], client))
            client.waiting_bytes += len(body)
        elif kind == PROBLEM:
            client.problems[body[1 : 1 + KEY_BYTES]] = body
        elif kind == FORGET:
            client.problems.clear()
        elif kind == CANCEL:
            self._cancel(client, {number for (number,) in struct.iter_unpack(">Q", body[1:])})
        else:
            raise ProtocolError("not a frame of a client's")

    def _cancel(self, client: Client, ids: set[int]) -> None:
        """Drop these samples of a client's, without a verdict; a judge that has one of them is replaced."""

        def wanted(task: Task) -> bool:
            return task.client is not client or task.head.id not in ids

        client.waiting = deque(task for task in client.waiting if wanted(task))
        client.waiting_bytes = sum(len(task.body) for task in client.waiting)
        self._alone = deque(task for task in self._alone if wanted(task))
        for worker in [w for w in self._workers if not all(wanted(task) for task in w.tasks)]:
            tasks = self._replace(worker)
            kept = deque(task for task in tasks if wanted(task))
            client.running -= len(tasks) - len(kept)
            self._requeue(kept)

    def _answer(self, task: Task, verdict: dict[str, Any]) -> None:
        task.client.running -= 1
        self._send(task.client, pack(verdict, VERDICT_HEAD.pack(VERDICT, task.head.id)))

    def _send(self, client: Client, data: bytes) -> None:
        if client.dismissed:
            return
        if not client.unsent:
            client.due = time.monotonic() + FLUSH_S
        client.unsent.append(data)
        client.unsent_bytes += len(data)

    def _flush(self, client: Client) -> None:
        """Write what waits for the client, many verdicts at once while more are coming; watch what it is waited for."""
        waits = False
        if client.unsent and (len(client.unsent) >= FLUSH_AT or not client.running or client.due <= time.monotonic()):
            data = b"".join(client.unsent)
            client.unsent.clear()
            client.written_at = time.monotonic()
            try:
                sent = os.write(client.sink, data)
            except BlockingIOError:
                sent = 0
            except OSError:
                if client.sock is None:
                    raise
                self._dismiss(client)
                return
            waits = sent < len(data)
            client.unsent_bytes = len(data) - sent
            if waits:
                client.unsent.append(data[sent:])
        reads = client.open_input and client.waiting_bytes < MAX_WAITING
        self._watch(client.watched, client.source, select.EPOLLIN if reads else 0)
        self._watch(client.watched, client.sink, select.EPOLLOUT if waits else 0)

    def _watch(self, watched: dict[int, int], fd: int, events: int) -> None:
        """Let epoll report these events of a descriptor, none for 0; `watched` holds those that it reports now."""
        before = watched.get(fd, 0)
        if events == before:
            return
        if not before:
            self._poll.register(fd, events)
        elif events:
            self._poll.modify(fd, events)
        else:
            self._poll.unregister(fd)
        watched[fd] = events

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until standard input ends, when its client is gone; with a socket, until it is killed."""
        reaped = time.monotonic()
        while self._listener is not None or all(client.open_input for client in self._clients):
            self._assign()
            for worker in self._workers:
                worker.push()
                self._watch_worker(worker)
            for client in list(self._clients):
                self._flush(client)
            now = time.monotonic()
            deadlines = [w.deadline for w in self._workers if w.tasks]
            deadlines += [c.due for c in self._clients if c.unsent and c.running]
            pause = max(0.0, min([ALIVE_S, *(d - now for d in deadlines)]))
            for fd, _ in self._poll.poll(pause):
                self._event(fd)
            now = time.monotonic()
            self._end_stuck(now)
            if now - reaped > ALIVE_S:
                reaped = now
                _reap()
            for client in self._clients:
                if now - client.written_at > ALIVE_S and not client.unsent:
                    self._send(client, frame(ALIVE))
        for worker in self._workers:
            worker.end()

    def _event(self, fd: int) -> None:
        if self._listener is not None and fd == self._listener.fileno():
            sock, _ = self._listener.accept()
            self._welcome(Client(sock.fileno(), os.dup(sock.fileno()), sock))  # two, to be watched one by one
        elif fd in self._sources:
            client = self._sources[fd]
            self._read(client)
        else:
            for worker in self._workers:
                if worker.sock.fileno() == fd:
                    self._receive(worker)
                    return


def _combined(checks_of_slots: list[dict[str, Any]]) -> dict[str, Any]:
    """The checks of several slots as one: a protection that one of them lacks is missing."""
    combined: dict[str, Any] = {}
    for checks in checks_of_slots:
        if not checks:
            combined["candidate"] = {"ok": False, "found": "the judge died while it inspected a candidate"}
        for name, check in checks.items():
            if name not in combined or not check["ok"]:
                combined[name] = check
    return combined


def _kill_orphans(slot: Slot) -> None:
    """Kill what a killed judge leaves, its zygote and its candidates, and reap what was re-parented to us."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/status") as file:
                uid = next(line.split()[1] for line in file if line.startswith("Uid:"))
            with open(f"/proc/{name}/cmdline", "rb") as file:
                command = file.read().split(b"\0")
            if uid in (str(slot.uid), str(slot.shared_uid)) or command[-2:-1] == [slot.folder.encode()]:
                os.kill(int(name), signal.SIGKILL)
        except (OSError, StopIteration):
            continue  # it ended while we looked
    _reap()


def _reap() -> None:
    """Reap processes whose parent has died: this is the container's first process."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def listen(path: str) -> socket.socket:
    """A Unix socket that any user of the volume may connect to; what an earlier container left there is removed."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o666)
    listener.listen(64)
    return listener


def main() -> None:
    given = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))  # argparse takes 10 ms to import
    first, socket_path = int(given["--first-uid"]), given.get("--socket")
    slots = [Slot(first + i, first + SHARED_UIDS + i, f"/scratch/{i}") for i in range(int(given["--slots"]))]
    try:
        os.chmod("/dev/pts/ptmx", 0o600)  # no terminals for candidates
    except OSError:
        pass  # none here
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # the first process of a container has no default action
    try:
        Supervisor(slots, listen(socket_path) if socket_path else None).run()
    except (BrokenPipeError, KeyboardInterrupt):
        pass
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise


if __name__ == "__main__":
    main()
