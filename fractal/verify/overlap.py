"""Verification beside generation (`fractal run --stage all`): a thread that labels samples while others are drawn.

It reads samples.jsonl up to where the generator says that it has written, and appends to labels.jsonl in the order of
the samples, as verify.py does: that stage alone goes on after any kill. Nothing is handed over but a position in a
file, so a slow sandbox costs the engine no memory and no wait, and a dead one only the head start.

The sandbox is fed in bursts. A program that loops takes a processor for seconds, and an engine on a CPU waits for its
slowest thread: better a short time for many programs on all processors than all the time for one.
"""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fractal import console
from fractal.jsonl import Line, decode
from fractal.records import Sample
from fractal.rundir import RunDir
from fractal.sandbox.host.container import Limits, Sandbox
from fractal.verify import stage

BURST = 64  # samples that are worth waking the sandbox for
PATIENCE_S = 20.0  # or as many as there are after this long
MOST = 512  # samples read back at once
STOP_S = 15.0  # for the thread to end when all is called off


class Overlap:
    """Labels a run's samples as they are written. A context manager: left by an error, it stops at once.

    Order of calls: `start`, `drawing`, `wrote` many times, `finish`; all from the main thread. Without `start` the rest
    does nothing: there was nothing to draw.
    """

    def __init__(self, folder: RunDir, limits: Limits, **options: Any) -> None:
        self.error: Exception | None = None  # why the thread ended before its time
        self.labels = 0  # written so far
        self.seconds = 0.0  # the sandbox was at work
        self._folder, self._limits = folder, limits
        self._sandbox = Sandbox(limits=limits, **options)
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._new = 0  # samples written since the last burst
        self._written = 0  # bytes of samples.jsonl that may be read
        self._ending = self._stopping = False
        self._bar: console.Bar | None = None
        self._total = 0  # labels to be written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def start(self) -> None:
        """See what is to be done, and begin with what is there. Raises what `fractal verify` raises before its work."""
        folder = self._folder
        samples = folder.file("samples.jsonl")
        self._sandbox.check()
        source = stage.Source(samples, folder.problems(), own=True)
        plan = stage.plan(source, folder.file("labels.jsonl"))
        stage.prepare(folder, self._limits, self._sandbox)
        self._total = plan.samples - plan.end
        self._written = samples.stat().st_size if samples.exists() else 0
        self._thread = threading.Thread(target=self._work, args=(source, plan.end), daemon=True, name="verify")
        self._thread.start()

    def drawing(self, bar: console.Bar, count: int) -> None:
        if self._thread:
            self._total += count
            self._bar = bar.beside("verify", self._total)
            self._bar.advance(self.labels)

    def wrote(self, count: int) -> None:
        """`count` more samples are whole on disk."""
        if not self._thread:
            return
        self._written = self._folder.file("samples.jsonl").stat().st_size
        self._new += count
        if self._new >= BURST:
            self._wake.set()

    def finish(self) -> bool:
        """No more samples come: wait for the last labels, and note what was hidden. False if nothing was started."""
        if not self._thread:
            return False
        hidden, before = self.seconds, self.labels
        with self._folder.stage("verify", "labels.jsonl") as entry:
            with console.bar("verify", self._total - before) as self._bar:
                self._ending = True
                self._wake.set()
                self._thread.join()
            entry["samples"] = entry.get("samples", 0) + self.labels
            entry["hidden_seconds"] = round(entry.get("hidden_seconds", 0.0) + hidden, 3)
            self._thread = None
            if self.error:
                console.warn(f"verify: stopped while samples were drawn ({self.error}); now it goes on.")
            elif self.labels:
                stage.record_sandbox(self._folder, self._sandbox)
                console.say(f"verify: {before:,} of {self.labels:,} labels were there when the last sample was drawn")
        return True

    def _stop(self) -> None:
        """What has been labelled is written; the rest is left to `fractal verify`."""
        if self._thread:
            self._stopping = True
            self._wake.set()
            self._sandbox.close()
            self._thread.join(STOP_S)
            self._thread = None

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _work(self, source: stage.Source, behind: int) -> None:
        try:
            tail = Tail(source.path, behind)
            labels = self._folder.file("labels.jsonl")
            with self._sandbox as sandbox:
                while not self._stopping:
                    ending, self._new = self._ending, 0
                    while not self._stopping and (burst := tail.take(self._written, MOST)):
                        begin = time.monotonic()
                        try:
                            stage.write(sandbox.verify(burst, source.problems), labels, self._count)
                        finally:
                            self.seconds += time.monotonic() - begin
                    if ending:
                        return
                    self._wake.wait(PATIENCE_S)
                    self._wake.clear()
        except Exception as error:  # told by finish(); generation goes on
            if not self._stopping:
                self.error = error

    def _count(self, count: int, note: str = "") -> None:
        self.labels += count
        if self._bar:
            self._bar.advance(count, note)


class Tail:
    """The samples of a file that grows, from the `skip`th on."""

    def __init__(self, path: Path, skip: int) -> None:
        self._path, self._skip = path, skip
        self._at = 0  # bytes read
        self._number = 0  # lines read

    def take(self, end: int, most: int) -> list[Sample]:
        """Up to `most` more samples that end before byte `end`. Raises RecordError."""
        found: list[Sample] = []
        if self._at >= end:
            return found
        with self._path.open("rb") as file:
            file.seek(self._at)
            while len(found) < most and self._at < end:
                data = file.readline()
                if not data.endswith(b"\n"):
                    break
                self._at += len(data)
                self._number += 1
                if data.isspace():
                    continue
                if self._skip:
                    self._skip -= 1
                    continue
                found.append(decode(Line(self._path, self._number, "line", data), Sample))
        return found
