"""The order in which a set is iterated, kept when the set is copied.

The order is that of the set's hash table, which depends on its size and, where elements collide, on what came first.
A set built anew from its elements in order has the same order nearly always, but not after elements were removed, or
after a union. `recipe` says how else a set of the same order can be built, and `build` does it: it fills the places
that were taken with pads, and removes them in the end. Both ends hash alike (PYTHONHASHSEED), so what gives the order
here gives it there. Follows CPython 3.11's Objects/setobject.c; another version's order is found less often.
Standard library only.
"""

import sys
from collections.abc import Iterator
from itertools import permutations
from typing import Any

EMPTY_BYTES, ENTRY_BYTES = sys.getsizeof(set()), 16  # a table of more than 8 entries stands outside the object
SMALLEST = 8  # entries of a table
SPARSE = 2048  # entries that a table may have for a few elements: what is built stays in proportion to what was sent
LARGEST = 1 << 17
LINEAR_PROBES, PERTURB_SHIFT = 9, 5
PROBES = 200  # places of an element that are looked at


class _Pad:
    """Takes a place in a table for a while."""

    __slots__ = ("_place",)

    def __init__(self, place: int) -> None:
        self._place = place

    def __hash__(self) -> int:
        return self._place


def build(entries: int, places: list[int], elements: list[Any]) -> set[Any]:
    """A set of the elements, put into a table of so many entries, in which these places are taken before.

    Raises ValueError for a table that is too large for its elements.
    """
    if type(entries) is not int or not SMALLEST <= entries <= max(SPARSE, 16 * len(elements)) or len(places) > entries:
        raise ValueError("not a set")
    if any(type(place) is not int for place in places):
        raise ValueError("not places")
    pads = [_Pad(place) for place in places]
    values = [*pads, *elements]
    most = entries // 2 - 1 if len(values) >= entries // 4 else 0
    made: set[Any] = set()
    made.update(dict.fromkeys(values[:most]))  # a table for more than twice as many is made before the first is added
    for value in values[most:]:
        made.add(value)
    for pad in pads:
        made.discard(pad)  # not difference_update, which makes the table anew
    return made


def recipe(value: set[Any], order: list[Any]) -> list[Any] | None:
    """The arguments of `build` for a set that is iterated in this order; None if none are found."""
    entries = max(SMALLEST, (sys.getsizeof(value) - EMPTY_BYTES) // ENTRY_BYTES)
    if entries > min(LARGEST, max(SPARSE, 16 * len(order))):
        return None
    for places, elements in _attempts(order, entries):
        if list(build(entries, places, elements)) == order:
            return [entries, places, elements]
    return None


def _attempts(order: list[Any], entries: int) -> Iterator[tuple[list[int], list[Any]]]:
    for probes in (1, LINEAR_PROBES, PROBES):
        found = _layout(order, entries - 1, probes)
        if found is None:
            continue
        taken, elements, targets = found
        free = [place for place in range(entries) if place not in taken and place not in targets]
        for least in (entries // 4, entries // 7 + 1):
            yield taken + free[: max(0, least - len(taken) - len(order) * (least == entries // 4))], elements
        yield taken, elements
    for few in permutations(order) if len(order) <= 5 else (order, order[::-1]):
        yield [], list(few)


def _layout(order: list[Any], mask: int, more: int) -> tuple[list[int], list[Any], set[int]] | None:
    """Places for the elements that rise in their order: those to be taken before, the order of insertion, the places.

    An element comes to the least of the first places that it may have behind the one before; `more` are looked at.
    """
    last = -1
    place_of: list[int] = []
    passed: list[list[int]] = []  # by each element, before it comes to its place
    for element in order:
        before: list[int] = []
        best, blocked, seen = -1, before, 0
        for count, place in enumerate(_probes(hash(element), mask)):
            if place > last and (best < 0 or place < best):
                best, blocked = place, list(before)
                if place == last + 1:
                    break
            before.append(place)
            seen += best >= 0
            if seen >= more or count >= PROBES:
                break
        if best < 0:
            return None
        last = best
        place_of.append(best)
        passed.append(blocked)
    targets = {place: index for index, place in enumerate(place_of)}
    done: list[int] = []
    state = [0] * len(order)
    for start in range(len(order)):
        todo = [start]
        while todo:
            index = todo[-1]
            waiting = [targets[p] for p in passed[index] if p in targets and not state[targets[p]]]
            state[index] = state[index] or 1
            if waiting:
                todo += waiting[:1]
                continue
            todo.pop()
            if state[index] == 1:
                state[index] = 2
                done.append(index)
    taken = sorted({place for places in passed for place in places} - targets.keys())
    return taken, [order[index] for index in done], set(targets)


def _probes(number: int, mask: int) -> Iterator[int]:
    """The places that an element of this hash may come to, in the order in which they are looked at."""
    perturb = number & 0xFFFF_FFFF_FFFF_FFFF
    place = perturb & mask
    while True:
        yield from range(place, place + (LINEAR_PROBES if place + LINEAR_PROBES <= mask else 0) + 1)
        perturb >>= PERTURB_SHIFT
        place = (place * 5 + 1 + perturb) & mask
