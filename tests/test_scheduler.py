"""Requests handed out to engines that come, answer late or twice, and are lost: each is answered exactly once."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fractal.generate.engine import Request
from fractal.generate.scheduler import Scheduler


def requests(count: int) -> Iterator[Request]:
    return (Request(str(i // 7), i % 7, [1], i) for i in range(count))


class Faults(RuleBasedStateMachine):
    """Engines answer what they hold in any order, also what was taken from them; they are lost and added at any time."""

    @initialize(count=st.integers(0, 200))
    def begin(self, count: int) -> None:
        self.count, self.pulled, self.engines = count, 0, 0

        def source() -> Iterator[Request]:
            for request in requests(count):
                self.pulled += 1
                yield request

        self.scheduler = Scheduler(source())
        self.windows: dict[str, int] = {}  # of the living
        self.sent: dict[str, list[int]] = {}  # numbers that each engine has ever got, the lost ones' too
        self.held: dict[str, set[int]] = {}  # what the living hold
        self.answers: list[int] = []  # seeds

    @rule(window=st.integers(1, 20))
    def add(self, window: int) -> None:
        name = str(self.engines)
        self.engines += 1
        self.scheduler.add(name, window)
        self.windows[name], self.sent[name], self.held[name] = window, [], set()

    @precondition(lambda self: self.windows)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.windows)))
        numbers = [number for number, _ in self.scheduler.take(name)]
        self.sent[name] += numbers
        self.held[name].update(numbers)

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """By an engine that may be lost, of what it has ever got: late, and twice."""
        name = data.draw(st.sampled_from(sorted(self.sent)))
        if not self.sent[name]:
            return
        numbers = data.draw(st.lists(st.sampled_from(self.sent[name]), max_size=8))
        counted = self.scheduler.answered(name, dict.fromkeys(numbers, "x"))
        self.answers += [request.seed for request, _ in counted]
        assert len(counted) == len(set(numbers) & self.held.get(name, set()))
        if name in self.held:
            self.held[name] -= set(numbers)

    @precondition(lambda self: self.windows)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.windows)))
        assert self.scheduler.lose(name) == len(self.held.pop(name))
        del self.windows[name]

    @invariant()
    def nothing_comes_twice_and_windows_hold(self) -> None:
        assert len(set(self.answers)) == len(self.answers)
        for name, held in self.held.items():
            assert len(held) <= self.windows[name]
        assert self.pulled - len(self.answers) == self.scheduler.outstanding
        assert not self.scheduler.done or len(self.answers) == self.count

    def teardown(self) -> None:
        """With one engine alive it ends, whatever happened before."""
        if not hasattr(self, "scheduler"):
            return
        if not self.windows:
            self.add(3)
        for _ in range(2 * self.count + 2):
            if self.scheduler.done:
                break
            for name in self.windows:
                self.scheduler.take(name)
                mine = dict.fromkeys(self.scheduler._held[name], "x")
                self.answers += [request.seed for request, _ in self.scheduler.answered(name, mine)]
        assert self.scheduler.done
        assert sorted(self.answers) == list(range(self.count))


TestFaults = Faults.TestCase


@given(st.integers(1, 50), st.integers(1, 50))
def test_requests_are_made_only_as_engines_have_room(window: int, count: int) -> None:
    made = 0

    def source() -> Iterator[Request]:
        nonlocal made
        for request in requests(count):
            made += 1
            yield request

    scheduler = Scheduler(source())
    scheduler.add("a", window)
    scheduler.take("a")
    assert made == min(window, count)
    assert scheduler.take("a") == []


def test_what_a_lost_engine_held_goes_before_what_is_new() -> None:
    scheduler = Scheduler(requests(10))
    scheduler.add("a", 4)
    scheduler.add("b", 2)
    held = scheduler.take("a")
    scheduler.take("b")
    assert scheduler.lose("a") == 4
    assert scheduler.take("a") == [], "it is no more"
    scheduler.answered("b", {4: "x", 5: "x"})
    assert scheduler.take("b") == held[:2]
    assert scheduler.handed_on == 4


def test_an_engine_is_added_once() -> None:
    scheduler = Scheduler(requests(1))
    scheduler.add("a", 1)
    with pytest.raises(ValueError, match="there already"):
        scheduler.add("a", 1)
