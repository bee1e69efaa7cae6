"""Samples of a file -> labels of a file: what the stage, the run over files and the overlapped run have in common.

It holds neither all samples nor all labels.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fractal import console
from fractal.generate.sample_files import FileSample, read_samples
from fractal.jsonl import Appender
from fractal.records import Label, Problem, Sample
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits
from fractal.verify import references, resume

WRITE_INTERVAL_S = 0.1  # between writes, and between updates of the progress line
MAX_UNWRITTEN = 5000  # records
PROGRESS_AFTER_S = 3.0  # of reading, a progress line is shown


class SampleFile:
    """A samples file that is read more than once. Each time everything about it is checked."""

    def __init__(self, path: Path, problems: Mapping[str, Problem], *, own: bool = False) -> None:
        self.path, self.problems, self.own = path, problems, own

    def read(self, watch: Callable[[float], None] | None = None) -> Iterator[FileSample]:
        """`watch` is called with the share that has been read. Raises RecordError."""
        return read_samples(self.path, self.problems, own=self.own, watch=watch)


def make_plan(source: SampleFile, labels: Path) -> resume.Plan:
    """Read everything once, before anything is run or written; a progress line where that takes long."""
    begin = time.monotonic()
    shown = 0.0
    bar: console.Bar | None = None
    with ExitStack() as stack:

        def watch(share: float) -> None:
            nonlocal bar, shown
            if bar is None and time.monotonic() - begin > PROGRESS_AFTER_S:
                bar = stack.enter_context(console.bar(f"reading {source.path.name}, %", 100))
            if bar is not None and share - shown >= 0.01:
                bar.advance(round(100 * (share - shown)))
                shown = share

        return resume.make_plan(lambda: source.read(watch), labels)


def label_samples(
    plan: resume.Plan,
    source: SampleFile,
    labels: Path,
    limits: Limits,
    started: Callable[[Sandbox], None] = lambda sandbox: None,
    **options: Any,
) -> float:
    """Run what has no verdict and write its labels as they come. Returns the seconds that it took, start excluded.

    `started` is called with the running sandbox before the first label; `options` are Sandbox's.
    """
    with Sandbox(limits=limits, **options) as sandbox:
        started(sandbox)
        console.say(f"verify: {plan.todo:,} samples in {sandbox.image}")
        if sandbox.no_sharing:
            console.warn(f"verify: each program has a process of its own, several times slower: {sandbox.no_sharing}")
        begin = time.monotonic()
        with console.bar("verify", plan.todo) as bar:
            if plan.redo:

                def verify(samples: Iterator[Sample]) -> Iterator[Label]:
                    for label in sandbox.verify(samples, source.problems):
                        yield label
                        bar.advance(1)

                resume.redo(source.read, labels, plan.end, verify)
            if plan.end < plan.samples:
                samples = resume.without_label(source.read(), plan.end)
                append_records(sandbox.verify(samples, source.problems), labels, bar.advance)
        seconds = time.monotonic() - begin
        references.warn_of_failing(sandbox, source.problems, labels)
        return seconds


def append_records(records: Iterable[object], path: Path, advance: Callable[[int, str], None]) -> None:
    """Append labels or outputs as they come, in few writes; `advance` is called with their number and rate."""
    begin = time.monotonic()
    done, due = 0, begin  # the first at once: whoever follows the file sees that it works
    unwritten: list[object] = []
    with Appender(path) as file:
        try:
            for record in records:
                unwritten.append(record)
                if (now := time.monotonic()) >= due or len(unwritten) >= MAX_UNWRITTEN:
                    ready, unwritten = unwritten, []  # first: Ctrl-C must not write them twice
                    file.write(ready)
                    done, due = done + len(ready), now + WRITE_INTERVAL_S
                    advance(len(ready), f"{done / (now - begin):,.0f} a second")
        finally:
            file.write(unwritten)
        advance(len(unwritten), "")
