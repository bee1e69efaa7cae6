"""Stage 2, the hard verifier: samples -> labels.jsonl. Runs each program against its problem's tests in the sandbox.

Everything that decides a verdict is in fractal/sandbox/; what is still to be done is resume.py's; this file goes from
file to file. It holds neither all samples nor all labels.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from filelock import FileLock, Timeout

from fractal import console
from fractal.errors import InputError
from fractal.jsonl import Appender
from fractal.problems.sets import read as read_problems
from fractal.records import Label, Problem
from fractal.rundir import RunDir
from fractal.sandbox.host.container import Limits, Sandbox
from fractal.verify import outputs, resume
from fractal.verify.counts import Tally, count, lost_lines, summary
from fractal.verify.foreign import Found, read_samples

if TYPE_CHECKING:
    from fractal.verify.overlap import Overlap

PAUSE_S = 0.1  # between writes, and between looks at the progress line
BATCH = 5000  # labels held back at most
PATIENCE_S = 3.0  # of reading, before a progress line


def run(folder: RunDir, limits: Limits, overlap: "Overlap | None" = None, **options: Any) -> Tally:
    """Label the run's samples that have no verdict. Returns the counts over all its labels.

    `overlap`: what labelled some of them while others were drawn; it is waited for first.
    """
    overlapped = overlap is not None and overlap.finish()
    source = Source(folder.file("samples.jsonl"), folder.problems(), own=True)
    labels = folder.file("labels.jsonl")
    todo = plan(source, labels)
    if not todo.samples:
        raise InputError(f"{folder.path}: has no samples yet. Run `fractal generate --run {folder.path}` first.")
    folder.configure("verify", {"limits": msgspec.to_builtins(limits)})
    if todo.todo:
        with folder.stage("verify", "labels.jsonl") as entry:
            tally = label_all(todo, source, labels, limits, lambda sandbox: record_sandbox(folder, sandbox), **options)
            entry["samples"] = entry.get("samples", 0) + todo.todo
    elif overlap and overlapped:
        tally = _told(labels, overlap.labels, overlap.seconds)
    else:
        tally = _nothing_to_do(labels)
    outputs.run(folder, limits, **options)
    return tally


def prepare(folder: RunDir, limits: Limits, sandbox: Sandbox) -> None:
    """Before the first label is written: a killed stage has labels, and they came from this image and these limits."""
    folder.configure("verify", {"limits": msgspec.to_builtins(limits)})
    record_sandbox(folder, sandbox)


def record_sandbox(folder: RunDir, sandbox: Sandbox) -> None:
    folder.manifest["images"]["sandbox"] = {
        "name": sandbox.image,
        "digest": sandbox.image_id,
        "checks": sandbox.checks,
    }
    folder.save()


def run_files(problems: Path, samples: Path, out: Path, limits: Limits, **options: Any) -> Tally:
    """The sandbox-only run: three files, no run folder. Resumes `out`."""
    _check_names(problems, samples, out)
    with _alone(out):
        source = Source(samples, {p.task_id: p for p in read_problems(problems)})
        todo = plan(source, out)
        if not todo.todo:
            return _nothing_to_do(out)
        return label_all(todo, source, out, limits, **options)


class Source:
    """A samples file that is read more than once. Each time everything about it is checked."""

    def __init__(self, path: Path, problems: Mapping[int, Problem], *, own: bool = False) -> None:
        self.path, self.problems, self.own = path, problems, own

    def __call__(self, watch: Callable[[float], None] | None = None) -> Iterator[Found]:
        return read_samples(self.path, self.problems, own=self.own, watch=watch)


def label_all(
    plan: resume.Plan,
    source: Source,
    out: Path,
    limits: Limits,
    started: Callable[[Sandbox], None] = lambda sandbox: None,
    **options: Any,
) -> Tally:
    """Run what has no verdict and write its labels as they come; `started` is told what the sandbox is."""
    with Sandbox(limits=limits, **options) as sandbox:
        started(sandbox)
        console.say(f"verify: {plan.todo:,} samples in {sandbox.image}")
        begin = time.monotonic()
        with console.bar("verify", plan.todo) as bar:
            if plan.redo:
                todo = resume.to_redo(source(), out, plan.end)
                write(sandbox.verify(todo, source.problems), resume.redo_file(out), bar.advance)
                resume.settle(source, out)
            if plan.end < plan.samples:
                write(sandbox.verify(resume.to_append(source(), plan.end), source.problems), out, bar.advance)
        seconds = time.monotonic() - begin
    return _told(out, plan.todo, seconds)


def write(labels: Iterable[Label], out: Path, advance: Callable[[int, str], None]) -> None:
    """Append labels as they come, in few writes; `advance` is told how many, and how fast they come."""
    begin = time.monotonic()
    done, due = 0, begin + PAUSE_S
    batch: list[Label] = []
    with Appender(out) as file:
        try:
            for label in labels:
                batch.append(label)
                if (now := time.monotonic()) >= due or len(batch) >= BATCH:
                    ready, batch = batch, []  # first: Ctrl-C must not write them twice
                    file.write(ready)
                    done, due = done + len(ready), now + PAUSE_S
                    advance(len(ready), f"{done / (now - begin):,.0f} a second")
        finally:
            file.write(batch)
        advance(len(batch), "")


def plan(source: Source, labels: Path) -> resume.Plan:
    """Read everything once, before anything is run or written; a progress line where that takes long."""
    begin = time.monotonic()
    shown = 0.0
    bar: console.Bar | None = None
    with ExitStack() as stack:

        def watch(share: float) -> None:
            nonlocal bar, shown
            if bar is None and time.monotonic() - begin > PATIENCE_S:
                bar = stack.enter_context(console.bar(f"reading {source.path.name}, %", 100))
            if bar is not None and share - shown >= 0.01:
                bar.advance(round(100 * (share - shown)))
                shown = share

        return resume.make_plan(lambda: source(watch), labels)


def _nothing_to_do(labels: Path) -> Tally:
    tally = count(labels)
    console.say(f"verify: {tally.total:,} labels are there, nothing to do")
    return tally


def _told(labels: Path, now: int, seconds: float) -> Tally:
    """The counts, said in one line; `now` labels are of this call and took so many seconds."""
    tally = count(labels)
    console.say(summary(tally, now, seconds))
    _tell_lost(tally)
    return tally


def _tell_lost(tally: Tally) -> None:
    for line in lost_lines(tally):
        console.warn(line)


def _check_names(problems: Path, samples: Path, out: Path) -> None:
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder, expected a file.")
    if out.exists() and not out.is_file():
        raise InputError(f"--out {out}: is no regular file; labels are read again to go on. Name another file.")
    if out.suffix == ".gz":
        raise InputError(f"--out {out}: labels are written as plain JSONL. Name a file without .gz.")
    if samples.exists() and not samples.is_file() and not samples.is_dir():
        raise InputError(f"--samples {samples}: is no regular file; samples are read twice. Name a file.")
    for option, path in (("--samples", samples), ("--problems", problems)):
        if out.resolve() == path.resolve() or (out.exists() and path.exists() and out.samefile(path)):
            raise InputError(f"--out {out}: is the file given as {option}. Name another file for the labels.")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a file for this process. The lock is a hidden file beside it, gone afterwards."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--out {out}: cannot be made: {error.strerror}. Name another file.") from error
    path = out.with_name(f".{out.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"--out {out}: another fractal process writes it. Wait for it, or end it.") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
