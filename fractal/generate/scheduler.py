"""Which engine draws which request, where engines may be lost. Pure: it starts nothing and waits for nothing.

    scheduler = Scheduler(requests)
    scheduler.add("a", 64)
    for number, request in scheduler.take("a"): ...   # send them to engine a
    for request, answer in scheduler.answered("a", answers): ...
    scheduler.lose("a")                               # its requests go to the others

Requests are numbered as they are handed out. An answer counts if the engine that sends it holds its number: what a lost
engine still sends, and what comes twice, is dropped, so every request is answered exactly once. A sample's seed is its
own, so any engine draws the same. Memory grows with the windows of the engines, not with the requests.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from fractal.generate.engine import Request

A = TypeVar("A")


class Scheduler:
    """Hands requests out as engines finish others; there are no fixed shards.

    `numbers`: where the numbers come from, for engines that outlive a scheduler.
    """

    def __init__(self, requests: Iterable[Request], numbers: Iterator[int] | None = None) -> None:
        self.handed_on = 0  # requests taken from lost engines
        self._source = iter(requests)
        self._numbers = itertools.count() if numbers is None else numbers
        self._returned: deque[tuple[int, Request]] = deque()  # of lost engines; they go before new ones
        self._windows: dict[str, int] = {}
        self._held: dict[str, dict[int, Request]] = {}
        self._exhausted = False

    @property
    def outstanding(self) -> int:
        """Requests that are handed out, or wait to be handed out again."""
        return len(self._returned) + sum(map(len, self._held.values()))

    def add(self, engine: str, window: int) -> None:
        """Another engine, which holds up to `window` requests at once. Raises ValueError for one that is there."""
        if engine in self._held or window < 1:
            raise ValueError(f"engine {engine}, window {window}: it is there already, or the window is empty")
        self._windows[engine], self._held[engine] = window, {}

    def lose(self, engine: str) -> int:
        """The engine is given up: its requests are the next to be handed out. Returns how many; 0 if it is unknown."""
        self._windows.pop(engine, None)
        held = self._held.pop(engine, {})
        self._returned.extend(held.items())
        self.handed_on += len(held)
        return len(held)

    def take(self, engine: str) -> list[tuple[int, Request]]:
        """What to send to the engine now: as many requests as its window has room for, each with its number."""
        if engine not in self._held:
            return []
        held = self._held[engine]
        room = self._windows[engine] - len(held)
        taken = [self._returned.popleft() for _ in range(min(room, len(self._returned)))]
        if not self._exhausted:
            for request in itertools.islice(self._source, room - len(taken)):
                taken.append((next(self._numbers), request))
            self._exhausted = len(taken) < room
        held.update(taken)
        return taken

    def answered(self, engine: str, answers: Mapping[int, A]) -> list[tuple[Request, A]]:
        """Of an engine's answers, by number, those that count, each with its request."""
        held = self._held.get(engine, {})
        return [(held.pop(number), answer) for number, answer in answers.items() if number in held]

    @property
    def done(self) -> bool:
        """Whether every request has been answered. Known only once an engine has asked for more than there are."""
        return self._exhausted and not self.outstanding
