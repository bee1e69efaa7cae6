"""Verification beside generation (`fractal run --stage all`): a thread that labels samples while others are drawn.

It reads samples.jsonl up to where the generator has written, and appends to labels.jsonl in the order of the samples,
as the stage does: `fractal verify` alone continues after any kill. The two share nothing but a number of samples, so a
slow sandbox costs the engine no memory and no wait, and one that fails only the head start.

The sandbox is fed in bursts. A program that loops takes a processor for seconds, and an engine on a CPU waits for its
slowest thread: better a short time for many programs on all processors than all the time for one.
"""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fractal import console
from fractal.jsonl import Line, decode, part_path
from fractal.records import Sample
from fractal.rundir import RunDir
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits
from fractal.verify import references
from fractal.verify.labelling import SampleFile, append_records, make_plan
from fractal.verify.provenance import record_sandbox

BURST = 64  # samples for which the sandbox is woken
BURST_AFTER_S = 20.0  # or for fewer after this long
MAX_READ = 512  # samples read back at once
STOP_S = 15.0  # for the thread to end after an error


class Overlap:
    """Labels a run's samples while they are drawn.

        with Overlap(folder, limits) as overlap:
            generate.run(..., follow=overlap.begin)
        tally = verify.run(folder, limits, overlap)

    Left normally, it waits for the last labels; left by an error, it stops at once: what has been labelled is written,
    the rest is left to `fractal verify`. Where `begin` is never called (nothing is drawn) it does nothing.
    """

    def __init__(self, folder: RunDir, limits: Limits, **options: Any) -> None:
        self.error: Exception | None = None  # why the thread ended before the last sample
        self.labels = 0  # written so far
        self.seconds = 0.0  # during which the sandbox was at work
        self._folder, self._limits = folder, limits
        self._sandbox = Sandbox(limits=limits, **options)
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._new = 0  # samples written since the last burst
        self._readable = 0  # samples that are whole on disk
        self._ending = self._stopping = False
        self._bar: console.Bar | None = None
        self._verdicts_before = 0  # labels with a verdict at the start
        self._left_before = 0  # labels that were missing at the start
        self._total = 0  # labels to be written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._thread and error is None:
                self._finish(self._thread)
        finally:
            if self._thread:
                self._stopping = True
                self._wake.set()
                self._sandbox.close()
                self._thread.join(STOP_S)

    def begin(self) -> "Follower":
        """Start with the samples that are there, and follow those that are drawn from now on.

        Raises what `fractal verify` raises before its work, so that hours are not spent on samples that cannot be run.
        """
        folder = self._folder
        samples = folder.file("samples.jsonl")
        self._sandbox.check()
        source = SampleFile(samples, folder.problems(), own=True)
        plan = make_plan(source, folder.file("labels.jsonl"))
        self._verdicts_before = plan.samples - plan.todo
        record_sandbox(folder, self._limits, self._sandbox, self._verdicts_before)
        self._left_before = self._total = plan.samples - plan.end
        self._readable = plan.samples
        self._thread = threading.Thread(target=self._work, args=(source, plan.end), daemon=True, name="verify")
        self._thread.start()
        return Follower(self)

    def _update(self, bar: console.Bar, expected: int, written: int) -> None:
        if self._bar is None:
            self._total = self._left_before + expected
            self._bar = bar.beside("verify", self._total)
            self._bar.advance(self.labels)
        if written:
            self._readable += written
            self._new += written
            if self._new >= BURST:
                self._wake.set()

    def _finish(self, thread: threading.Thread) -> None:
        """Wait for the last labels, and record how many seconds of work were hidden behind generation."""
        hidden, before = self.seconds, self.labels
        with self._folder.stage("verify", "labels.jsonl") as entry:
            with console.bar("verify", self._total - before) as self._bar:
                self._ending = True
                self._wake.set()
                thread.join()
            entry["samples"] = entry.get("samples", 0) + self.labels
            entry["hidden_seconds"] = round(entry.get("hidden_seconds", 0.0) + hidden, 3)
            self._thread = None
            if self.error:
                console.warn(f"verify: stopped while samples were drawn ({self.error}); now it goes on.")
            elif self.labels:
                record_sandbox(self._folder, self._limits, self._sandbox, self._verdicts_before + self.labels)
                console.say(f"verify: {before:,} of {self.labels:,} labels were there when the last sample was drawn")

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _work(self, source: SampleFile, labelled: int) -> None:
        try:
            samples = GrowingFile(source.path, labelled)
            labels = self._folder.file("labels.jsonl")
            with self._sandbox as sandbox:
                while not self._stopping:
                    ending, self._new = self._ending, 0
                    while not self._stopping and (burst := samples.read(self._readable, MAX_READ)):
                        begin = time.monotonic()
                        try:
                            append_records(sandbox.verify(burst, source.problems), labels, self._count)
                        finally:
                            self.seconds += time.monotonic() - begin
                    if ending:
                        references.warn_of_failing(sandbox, source.problems, labels)
                        return
                    self._wake.wait(BURST_AFTER_S)
                    self._wake.clear()
        except Exception as error:  # reported at the end; generation goes on
            if not self._stopping:
                self.error = error

    def _count(self, count: int, note: str = "") -> None:
        self.labels += count
        if self._bar:
            self._bar.advance(count, note)


class Follower:
    """Is told what has been drawn; generate's `SampleFollower`. Made by `Overlap.begin`."""

    def __init__(self, overlap: Overlap) -> None:
        self._overlap = overlap

    def update(self, bar: console.Bar, expected: int, written: int) -> None:
        """`written` more samples, of `expected` that are to be drawn, are whole on disk; `bar` shows the drawing."""
        self._overlap._update(bar, expected, written)


class GrowingFile:
    """The samples of a file that grows, from the `skip`th on; it may grow by another part (jsonl.py)."""

    def __init__(self, path: Path, skip: int) -> None:
        self._path, self._skip = path, skip
        self._count = 0  # samples read
        self._part = self._offset = self._line = 0  # where to go on: the part, and what was read of it

    def read(self, end: int, most: int) -> list[Sample]:
        """Up to `most` more of the file's first `end` samples. Raises RecordError."""
        samples: list[Sample] = []
        while self._count < end and len(samples) < most:
            path = part_path(self._path, self._part)
            with path.open("rb") as file:
                file.seek(self._offset)
                while self._count < end and len(samples) < most and (data := file.readline()).endswith(b"\n"):
                    self._offset += len(data)
                    self._line += 1
                    if data.isspace():
                        continue
                    self._count += 1
                    if self._count > self._skip:
                        samples.append(decode(Line(path, self._line, "line", data), Sample))
            if self._count < end and len(samples) < most:
                if not part_path(self._path, self._part + 1).exists():
                    break
                self._part, self._offset, self._line = self._part + 1, 0, 0
        return samples
