"""Stage 2, the hard verifier: samples -> labels.jsonl. Runs each program against its problem's tests in the sandbox.

What decides a verdict is in fractal/sandbox/; what is still to be done is resume.py's; labelling.py does it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fractal import console
from fractal.errors import InputError
from fractal.problems import sets
from fractal.rundir import RunDir
from fractal.sandbox.host import lacking
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits
from fractal.verify import outputs
from fractal.verify.counts import Tally, count, lost_lines, summary
from fractal.verify.labelling import SampleFile, label_samples, make_plan
from fractal.verify.overlap import Overlap
from fractal.verify.provenance import count_labels, record_sandbox


def run(folder: RunDir, limits: Limits, overlap: Overlap | None = None, **options: Any) -> Tally:
    """Label the run's samples that have no verdict. Returns the counts over all its labels.

    `overlap`: what labelled some of them while they were drawn, and has ended. `options` are Sandbox's. Raises
    InputError for a run without samples, SandboxError.
    """
    source = SampleFile(folder.file("samples.jsonl"), folder.problems(), own=True)
    labels = folder.file("labels.jsonl")
    plan = make_plan(source, labels)
    if not plan.samples:
        raise InputError(f"{folder.path}: has no samples yet. Run `fractal generate --run {folder.path}` first.")
    folder.configure("verify", {"limits": asdict(limits)})
    if plan.todo:
        with folder.stage("verify", "labels.jsonl") as entry:

            def started(sandbox: Sandbox) -> None:
                record_sandbox(folder, limits, sandbox, plan.samples - plan.todo)

            seconds = label_samples(plan, source, labels, limits, started, **options)
            entry["samples"] = entry.get("samples", 0) + plan.todo
        tally = _report(labels, plan.todo, seconds)
    elif overlap and overlap.labels:
        tally = _report(labels, overlap.labels, overlap.seconds)
    else:
        tally = _report_nothing_to_do(labels)
    count_labels(folder, tally.total - tally.errors)
    outputs.run(folder, limits, **options)
    return tally


def run_files(
    problems: Path | str, samples: Path, out: Path, limits: Limits, tests: str | None = None, **options: Any
) -> Tally:
    """The sandbox-only run: no run folder. Resumes `out`. `problems`: a file, or a set's name; `tests` as sets.load."""
    _check_names(Path(problems), samples, out)
    with _exclusive(out):
        source = SampleFile(samples, sets.load(str(problems), tests=tests).by_id())
        plan = make_plan(source, out)
        if not plan.todo:
            return _report_nothing_to_do(out)
        return _report(out, plan.todo, label_samples(plan, source, out, limits, **options))


def _report_nothing_to_do(labels: Path) -> Tally:
    tally = count(labels)
    console.say(f"verify: {tally.total:,} labels are there, nothing to do")
    return tally


def _report(labels: Path, now: int, seconds: float) -> Tally:
    """The counts, reported in one line; `now` labels are of this call and took so many seconds."""
    tally = count(labels)
    console.say(summary(tally, now, seconds))
    for line in lost_lines(tally):
        console.warn(line)
    if tally.lacking:
        console.warn(lacking.summary(tally.lacking))
    return tally


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
def _exclusive(out: Path) -> Iterator[None]:
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
