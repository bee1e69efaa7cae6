"""What is still to be labelled: samples and labels read side by side, in memory that does not grow with them.

Labels stand in the order of their samples. A label may be missing or be a `sandbox_error`: the sample is run again, its
new label goes into a file beside (`labels.jsonl.redo`) and from there to its place, so that a kill never loses it.
"""

import glob
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fractal.errors import InputError, RecordError
from fractal.jsonl import Line, decode, iter_lines, write_parts
from fractal.records import Label, Sample, code_sha256
from fractal.verify.foreign import Found

Samples = Callable[[], Iterable[Found]]  # reads them anew
OURS = "sandbox_error"  # our fault: no verdict


class Unordered(Exception):
    """The labels do not follow the samples."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a labels file lacks."""

    samples: int
    redo: int  # among the first `end` samples
    end: int  # the samples from here on have no label: theirs are appended

    @property
    def todo(self) -> int:
        return self.redo + self.samples - self.end


class Cursor:
    """Labels read beside their samples."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = iter_lines(path, own=True)
        self.raw, self.number = b"", 0  # line of the label taken last
        self._step()

    def _step(self) -> None:
        self.line = next(self._lines, None)
        self.next = None if self.line is None else decode(self.line, Label)

    def take(self, sample: Sample) -> Label | None:
        """The sample's label, if it is the next one."""
        label = self.next
        if label is None or label.sample_id != sample.sample_id or label.task_id != sample.task_id:
            return None
        assert self.line is not None
        self.raw, self.number = self.line.data, self.line.number
        self._step()
        return label


def make_plan(samples: Samples, labels: Path) -> Plan:
    """Compare the two files, and mend the labels: what was redone goes to its place, and all into the samples' order.

    Raises InputError for labels that are not of these samples; the files are then as they were.
    """
    try:
        found = plan(samples(), labels)
    except Unordered:
        _sort(samples, labels)
        found = plan(samples(), labels)
    if redo_file(labels).exists():
        settle(samples, labels)
        found = plan(samples(), labels)
    return found


def plan(samples: Iterable[Found], labels: Path) -> Plan:
    """Pure of writing; one pass. Raises Unordered, or InputError for a label of another program."""
    cursor = Cursor(labels)
    total = redo = gap = end = 0
    for total, one in enumerate(samples, 1):
        label = cursor.take(one.sample) if cursor.next is not None else None
        if label is None:
            gap += 1
            continue
        _same_program(one, label, cursor)
        redo += gap + (label.status == OURS)
        gap, end = 0, total
    if cursor.next is not None:
        raise Unordered
    return Plan(total, redo, end)


def to_redo(samples: Iterable[Found], labels: Path, end: int) -> Iterator[Sample]:
    """Those of the first `end` samples that have no verdict."""
    cursor = Cursor(labels)
    for one in islice(samples, end):
        label = cursor.take(one.sample)
        if label is None or label.status == OURS:
            yield one.ready()


def to_append(samples: Iterable[Found], end: int) -> Iterator[Sample]:
    return (one.ready() for one in islice(samples, end, None))


def labelled(samples: Iterable[Found], labels: Path) -> Iterator[tuple[Sample, Label]]:
    """Samples with their labels; one without is left out. Raises InputError as `plan` does."""
    cursor = Cursor(labels)
    for one in samples:
        if label := cursor.take(one.sample):
            yield _same_program(one, label, cursor), label
    if cursor.next is not None:
        raise InputError(
            f"{labels}: line {cursor.line.number if cursor.line else 0}: task_id {cursor.next.task_id}, sample_id "
            f"{cursor.next.sample_id} is not among the samples, or not in their order. `fractal verify` with these "
            "files says which, and puts them in order."
        )


def redo_file(labels: Path) -> Path:
    return labels.with_name(f"{labels.name}.redo")


def settle(samples: Samples, labels: Path) -> None:
    """Put what was redone in its place. Killed in between, it can be done again."""
    redone = redo_file(labels)

    def merged() -> Iterator[bytes]:
        old, new = Cursor(labels), Cursor(redone)
        for one in samples():
            before, after = old.take(one.sample), new.take(one.sample)
            if after is not None and (before is None or before.status == OURS):
                _same_program(one, after, new)
                yield new.raw
            elif before is not None:
                yield old.raw
        if old.next is not None:
            raise InputError(f"{labels}: the samples were changed meanwhile. Put them back and run the command again.")
        if new.next is not None:
            raise RecordError(f"{redone}: holds labels of other samples. Delete it and run the same command again.")

    for draft in labels.parent.glob(f".{glob.escape(labels.name)}.[0-9]*"):  # of a killed call: nobody else writes here
        draft.unlink()
    write_parts(labels, merged())
    redone.unlink()


def _sort(samples: Samples, labels: Path) -> None:
    """Rewrite labels that do not follow the samples, as earlier versions and other tools leave them."""
    places: dict[tuple[int, int], int] = {}
    with labels.open("rb") as file:
        start = number = 0
        while (raw := file.readline()).endswith(b"\n"):
            number += 1
            if not raw.isspace():
                line = Line(labels, number, "line", raw)
                label = decode(line, Label)
                if places.setdefault((label.task_id, label.sample_id), start) != start:
                    raise line.error(
                        f"task_id {label.task_id}, sample_id {label.sample_id} stands twice", "Delete one of the lines."
                    )
            start += len(raw)

        def sorted_lines() -> Iterator[bytes]:
            for one in samples():
                place = places.pop((one.sample.task_id, one.sample.sample_id), None)
                if place is not None:
                    file.seek(place)
                    yield file.readline()
            if places:
                task_id, sample_id = min(places)
                raise InputError(
                    f"{labels}: holds a label of task_id {task_id}, sample_id {sample_id}, which is not among the "
                    "samples. Name another file."
                )

        write_parts(labels, sorted_lines())


def _same_program(one: Found, label: Label, cursor: Cursor) -> Sample:
    """The sample, if the label is of its program. Raises InputError."""
    sample = one.ready()
    digest = code_sha256(sample.code)
    if digest != label.code_sha256:
        raise InputError(
            f"{cursor.path}: line {cursor.number}: is of another program than the samples now hold for task_id "
            f"{label.task_id}, sample_id {label.sample_id} (code_sha256 {label.code_sha256[:12]}, now {digest[:12]}). "
            "The samples were changed: name another file for their labels, or put the samples back."
        )
    return sample
