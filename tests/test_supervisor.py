"""Who gets which sample next: pure, without judges."""

from collections import deque
from typing import Any

from fractal.sandbox.inside.protocol import SampleHead
from fractal.sandbox.inside.supervisor import QUEUE_DEPTH, Client, Supervisor, Task


class Worker:
    def __init__(self) -> None:
        self.tasks: deque[Task] = deque()

    def assign(self, task: Task) -> None:
        self.tasks.append(task)


def supervisor(clients: list[Client], workers: int = 2) -> Any:
    one: Any = Supervisor.__new__(Supervisor)
    one._workers = [Worker() for _ in range(workers)]
    one._clients = deque(clients)
    one._alone = deque()
    return one


def client(*alone: bool) -> Client:
    found = Client(0, 1)
    for number, flag in enumerate(alone):
        found.waiting.append(Task(SampleHead(number, b"k" * 16, 1.0, flag), b"", b"", found))
    return found


def running(one: Any) -> list[list[int]]:
    return [[task.head.id for task in worker.tasks] for worker in one._workers]


def test_judges_get_samples_in_turn_and_not_too_many() -> None:
    one = supervisor([client(*[False] * 40)])
    one._assign()
    assert running(one) == [list(range(0, 2 * QUEUE_DEPTH, 2)), list(range(1, 2 * QUEUE_DEPTH, 2))]


def test_clients_are_served_in_turn() -> None:
    first, second = client(*[False] * 20), client(*[False] * 20)
    one = supervisor([first, second])
    one._assign()
    assert (first.running, second.running) == (QUEUE_DEPTH, QUEUE_DEPTH)


def test_what_must_run_alone_does() -> None:
    """It waits until nothing else runs, and nothing else starts until it has ended."""
    one = supervisor([client(False, True, False, False)])
    one._assign()
    assert running(one) == [[0], []]
    one._assign()
    assert running(one) == [[0], []]
    one._workers[0].tasks.clear()
    one._assign()
    one._assign()
    assert sorted(running(one)) == [[], [1]]
    [worker.tasks.clear() for worker in one._workers]
    one._assign()
    assert sorted(running(one)) == [[2], [3]]


def test_who_does_not_read_verdicts_gets_none() -> None:
    deaf, fine = client(*[False] * 9), client(*[False] * 9)
    deaf.unsent_bytes = 1 << 20
    one = supervisor([deaf, fine])
    one._assign()
    assert (deaf.running, fine.running) == (0, 9)
