"""Stage 2, the hard verifier: samples -> labels.jsonl. Runs each program against its problem's tests in the sandbox.

Everything that decides a verdict is in fractal/sandbox/; this file reads, resumes, counts and writes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from fractal import console, prompts
from fractal.problems import read as read_problems
from fractal.records import (
    STATUSES,
    Appender,
    InputError,
    Label,
    Line,
    Problem,
    Sample,
    decode,
    decode_object,
    read_jsonl,
    read_lines,
    unique,
    write_jsonl,
)
from fractal.run import RunDir
from fractal.sandbox.container import Limits, Sandbox

CHUNK = 32  # labels written at once


def run(folder: RunDir, limits: Limits, **options: Any) -> int:
    """Label the run's samples that have no label. Returns how many are `sandbox_error` in the end."""
    problems = folder.problems()
    path = folder.file("samples.jsonl")
    samples = list(unique(read_jsonl(path, Sample), path).values())
    if not samples:
        raise InputError(f"{folder.path}: has no samples yet. Run `fractal generate --run {folder.path}` first.")
    _known(samples, problems, path)
    folder.configure("verify", {"limits": msgspec.to_builtins(limits)})
    todo, done = missing(samples, folder.file("labels.jsonl"))
    if todo:
        with folder.stage("verify", "labels.jsonl") as entry:
            image = label_all(todo, problems, folder.file("labels.jsonl"), limits, **options)
            folder.manifest["images"]["sandbox"] = image
            entry["samples"] = entry.get("samples", 0) + len(todo)
    else:
        console.say(f"verify: {done} labels are there, nothing to do")
    return sum(v.status == "sandbox_error" for v in read_jsonl(folder.file("labels.jsonl"), Label))


def run_files(problems: Path, samples: Path, out: Path, limits: Limits, **options: Any) -> int:
    """The sandbox-only run: three files, no run folder. Resumes `out`. Returns the number of `sandbox_error`."""
    by_id = {p.task_id: p for p in read_problems(problems)}
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder, expected a file.")
    found = read_samples(samples, by_id)
    todo, done = missing(found, out)
    if not todo:
        console.say(f"verify: {done} labels are there, nothing to do")
    else:
        label_all(todo, by_id, out, limits, **options)
    return sum(v.status == "sandbox_error" for v in read_jsonl(out, Label))


def missing(samples: list[Sample], labels: Path) -> tuple[list[Sample], int]:
    """Samples without a label, and how many have one. Labels that were our own fault are taken out, to be redone."""
    before = unique(read_jsonl(labels, Label), labels)
    strangers = before.keys() - {(s.task_id, s.sample_id) for s in samples}
    if strangers:
        task_id, sample_id = min(strangers)
        raise InputError(
            f"{labels}: holds a label of task_id {task_id}, sample_id {sample_id}, which is not among the samples. "
            "Name another file."
        )
    kept = {key: v for key, v in before.items() if v.status != "sandbox_error"}
    if len(kept) < len(before):
        write_jsonl(labels, kept.values())
    return [s for s in samples if (s.task_id, s.sample_id) not in kept], len(kept)


def label_all(
    samples: list[Sample], problems: Mapping[int, Problem], out: Path, limits: Limits, **options: Any
) -> dict[str, Any]:
    """Run the samples in a sandbox and append their labels as they come, in order. Returns what the sandbox was."""
    counts: Counter[str] = Counter()
    with Sandbox(limits=limits, **options) as sandbox, Appender(out) as file:
        console.say(f"verify: {len(samples)} samples in {sandbox.image}")
        with console.bar("verify", len(samples)) as bar:
            batch: list[Label] = []
            try:
                for label in sandbox.verify(samples, problems):
                    batch.append(label)
                    counts[label.status] += 1
                    if len(batch) >= CHUNK:
                        ready, batch = batch, []  # first: Ctrl-C must not write them twice
                        file.write(ready)
                        bar.advance(len(ready))
            finally:
                file.write(batch)
        image = {"name": sandbox.image, "digest": sandbox.image_id, "checks": sandbox.checks}
    total = sum(counts.values())
    console.say(
        f"verify: {total} samples, {counts['passed'] / total:.1%} pass, {counts['timeout'] / total:.1%} timeout, "
        f"{counts['sandbox_error']} sandbox errors"
    )
    return image


def status_table(labels: Iterable[Label]) -> Table:
    """How many labels have each status."""
    counts: Counter[str] = Counter(label.status for label in labels)
    total = sum(counts.values())
    table = Table("status", "samples", "share", title="labels")
    for status in STATUSES:
        if counts[status]:
            table.add_row(status, str(counts[status]), f"{counts[status] / total:.1%}")
    return table


def read_samples(path: Path, problems: Mapping[int, Problem]) -> list[Sample]:
    """Samples of our own schema, or of HumanEval's and EvalPlus's: `task_id` with `solution` or `completion`.

    A `completion` is chat text or code: the program is taken out of it. Foreign samples of one problem are numbered in
    the order in which they stand. Raises RecordError for a bad line, an unknown problem or a duplicate.
    """
    samples: dict[tuple[int, int], Sample] = {}
    counts: Counter[int] = Counter()
    for line in read_lines(path):
        value = decode_object(line)
        ours = {"code", "sample_id", "completion", "task_id"} <= value.keys()
        sample = decode(line, Sample) if ours else _foreign(line, value, problems, counts)
        if sample.task_id not in problems:
            raise line.error(f"field task_id: problem {sample.task_id} is not among the problems")
        key = (sample.task_id, sample.sample_id)
        if key in samples:
            raise line.error(f"task_id {key[0]}, sample_id {key[1]} stands twice")
        samples[key] = sample
    return list(samples.values())


def _foreign(line: Line, value: dict[str, Any], problems: Mapping[int, Problem], counts: Counter[int]) -> Sample:
    task_id = _task_id(line, value)
    if task_id not in problems:
        raise line.error(f"field task_id: problem {value['task_id']!r} is not among the problems")
    sample_id = value.get("sample_id", counts[task_id])
    if type(sample_id) is not int or sample_id < 0:
        raise line.error(f"field sample_id: expected an integer from 0, got {sample_id!r}")
    counts[task_id] += 1
    field = "solution" if "solution" in value else "completion"
    text = value.get(field)
    if not isinstance(text, str):
        raise line.error(f"field solution or completion: expected a string, got {type(text).__name__}")
    entry_point = problems[task_id].entry_point
    return Sample(
        task_id=task_id,
        sample_id=sample_id,
        completion=text,
        code=text if field == "solution" else prompts.extract_code(text, entry_point),
        finish_reason=str(value.get("finish_reason", "unknown")),
        tokens=value["tokens"] if type(value.get("tokens")) is int else 0,
        sum_logprob=_float(value.get("sum_logprob")),
        seed=None,
        model=str(value.get("model", "unknown")),
    )


def _float(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:  # an integer beyond any float
        return None


def _task_id(line: Line, value: dict[str, Any]) -> int:
    """11, "11" and "Mbpp/11" are the same problem."""
    task_id = value.get("task_id")
    if type(task_id) is int:
        return task_id
    match = re.fullmatch(r"(?:\w+/)?(\d{1,15})", task_id) if isinstance(task_id, str) else None
    if match is None:
        raise line.error(f"field task_id: expected a number or a name like Mbpp/11, got {task_id!r}")
    return int(match[1])


def _known(samples: list[Sample], problems: Mapping[int, Problem], path: Path) -> None:
    for sample in samples:
        if sample.task_id not in problems:
            raise InputError(f"{path}: task_id {sample.task_id} is not among the run's problems (problems.jsonl).")
