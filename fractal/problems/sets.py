"""Problem sets: the embedded starter set, MBPP from the hub, and files in MBPP's or our own schema.

A problem set is a list of Problem with official splits. Nothing here runs a program.
"""

import ast
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fractal.errors import InputError, OutsideError, RecordError
from fractal.generate.prompts import tree
from fractal.jsonl import Line, decode, decode_object, encode, read_lines
from fractal.records import SPLITS, Problem, Split

STARTER = Path(__file__).with_name("starter.jsonl")
HUB = "google-research-datasets/mbpp"
HUB_CONFIGS = {"mbpp": "full", "mbpp-sanitized": "sanitized"}


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """Problems with a name for people and a digest for machines."""

    name: str
    problems: list[Problem]
    digest: str  # sha256 over the problems in order of task_id

    def by_id(self) -> dict[int, Problem]:
        return {p.task_id: p for p in self.problems}


def load(source: str, splits: str | None = None, limit: int | None = None) -> ProblemSet:
    """The problems of `starter`, `mbpp`, `mbpp-sanitized` or a file; `splits` as "train,validation", None for all.

    `limit` keeps the first problems of each split, in order of task_id. Raises InputError, or OutsideError where the
    hub does not answer.
    """
    wanted = parse_splits(splits)
    if source == "starter":
        problems = read(STARTER)
    elif source in HUB_CONFIGS:
        problems = from_hub(source)
    else:
        problems = read(Path(source))
    if wanted is not None:
        have = sorted({p.split for p in problems})
        problems = [p for p in problems if p.split in wanted]
        if not problems:
            raise InputError(f"{source}: no problem is in split {splits}; it has {', '.join(have)}.")
    if limit is not None:
        if limit < 1:
            raise InputError(f"--limit {limit}: must be at least 1.")
        taken: Counter[str] = Counter()
        kept = []
        for problem in sorted(problems, key=lambda p: p.task_id):
            taken[problem.split] += 1
            if taken[problem.split] <= limit:
                kept.append(problem)
        problems = kept
    problems = sorted(problems, key=lambda p: p.task_id)
    name = source if source == "starter" or source in HUB_CONFIGS else Path(source).name
    return ProblemSet(name, problems, digest(problems))


def digest(problems: list[Problem]) -> str:
    return hashlib.sha256(b"".join(encode(p) for p in sorted(problems, key=lambda p: p.task_id))).hexdigest()


def parse_splits(text: str | None) -> set[str] | None:
    """ "train,validation" as a set; None and "all" mean every split. Raises InputError."""
    if text is None or text == "all":
        return None
    wanted = {part.strip() for part in text.split(",") if part.strip()}
    unknown = wanted - set(SPLITS)
    if unknown or not wanted:
        raise InputError(f"unknown split {', '.join(sorted(unknown)) or repr(text)}; known: all, {', '.join(SPLITS)}.")
    return wanted


def mbpp_split(task_id: int) -> Split:
    """The official split: 1-10 few-shot prompts, 11-510 test, 511-600 validation, the rest train.

    Source: README of google-research/mbpp.
    """
    if task_id <= 10:
        return "prompt"
    if task_id <= 510:
        return "test"
    return "validation" if task_id <= 600 else "train"


def read(path: Path) -> list[Problem]:
    """The problems of a JSON or JSONL file (gzipped or not), in our own schema or either of MBPP's.

    Raises RecordError with file, line, field and what was expected; also for a duplicate task_id.
    """
    problems: list[Problem] = []
    seen: dict[int, int] = {}
    for line in read_lines(path):
        value = decode_object(line)
        problem = _from_mbpp(line, value) if "test_list" in value else _checked(line, decode(line, Problem))
        if problem.task_id in seen:
            raise line.error(f"task_id {problem.task_id} stands already in {line.kind} {seen[problem.task_id]}")
        seen[problem.task_id] = line.number
        problems.append(problem)
    return problems


def _checked(line: Line, problem: Problem) -> Problem:
    if not problem.tests:
        raise line.error("field tests: is empty, expected at least one test")
    return problem


def _from_mbpp(line: Line, value: dict[str, Any]) -> Problem:
    """One problem of MBPP: `text` and `test_setup_code` in the full set, `prompt` and `test_imports` in the sanitized.

    References have CRLF line ends there. `challenge_test_list` is not used: the published results do not use it.
    """

    def text(*names: str, default: str | None = None) -> str:
        for name in names:
            if name in value:
                if not isinstance(value[name], str):
                    raise line.error(f"field {name}: expected a string, got {type(value[name]).__name__}")
                return str(value[name]).replace("\r\n", "\n").replace("\r", "\n")
        if default is None:
            raise line.error(f"field {' or '.join(names)} is missing")
        return default

    def texts(name: str) -> list[str]:
        found = value.get(name, [])
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise line.error(f"field {name}: expected a list of strings")
        return [item.replace("\r\n", "\n").replace("\r", "\n").strip() for item in found]

    task_id = value.get("task_id")
    if isinstance(task_id, str) or type(task_id) is not int:
        raise line.error(f"field task_id: expected an integer, got {type(task_id).__name__}")
    tests = texts("test_list")
    if not tests:
        raise line.error("field test_list: is empty, expected at least one test")
    reference = text("code")
    setup = "\n".join(filter(None, [*texts("test_imports"), text("test_setup_code", default="").strip()]))
    try:
        entry = entry_point(reference, tests)
    except ValueError as error:
        raise line.error(str(error)) from None
    return Problem(
        task_id=task_id,
        prompt=text("prompt", "text").strip(),
        reference=reference.strip("\n") + "\n",
        tests=tests,
        setup=setup,
        entry_point=entry,
        split=mbpp_split(task_id),
    )


def entry_point(reference: str, tests: list[str]) -> str:
    """The name that the tests call and the reference defines; functions before classes, the most used first.

    Raises ValueError if there is none, or if a program does not parse.
    """
    try:
        program = tree(reference)
        trees = [tree(test) for test in tests]
    except ValueError as error:
        raise ValueError(f"the reference or a test is not Python: {error}") from error
    functions = {n.name for n in program.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    others = {n.name for n in program.body if isinstance(n, ast.ClassDef)}
    for node in program.body:
        if isinstance(node, ast.Assign):
            others |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    used = Counter(n.id for t in trees for n in ast.walk(t) if isinstance(n, ast.Name))
    for names in (functions, others):
        found = [name for name, _ in used.most_common() if name in names]
        if found:
            return found[0]
    raise ValueError("no name that the tests use is defined in the reference")


def from_hub(name: str) -> list[Problem]:
    """MBPP by the `datasets` library. Raises OutsideError when the hub cannot be reached and nothing is cached."""
    import datasets  # two seconds of import, and only this function needs it

    remedy = f"Check the network, or give a file: --problems PATH (the files of {HUB})."
    try:
        parts = datasets.load_dataset(HUB, HUB_CONFIGS[name])
    except Exception as error:  # datasets raises what its many back ends raise
        raise OutsideError(f"{name}: the data set cannot be had from the hub: {_first_line(error)} {remedy}") from error
    problems = []
    for split in parts:
        for number, row in enumerate(parts[split], 1):
            line = Line(Path(f"{HUB}:{split}"), number, "element", json.dumps(row).encode())
            problems.append(_from_mbpp(line, row))
    if len({p.task_id for p in problems}) != len(problems):
        raise RecordError(f"{HUB}: a task_id stands twice.")
    return problems


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".") + "."
