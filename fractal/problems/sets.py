"""Problem sets by name: the embedded starter set, MBPP from the hub, and files (formats.py reads those)."""

import hashlib
import json
from collections import Counter
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from fractal.errors import InputError, OutsideError, RecordError
from fractal.jsonl import Line, encode
from fractal.problems.formats import problem_from_mbpp, read_problems
from fractal.records import SPLITS, Problem, task_order

STARTER = Path(__file__).with_name("starter.jsonl")
HUB = "google-research-datasets/mbpp"
HUB_CONFIGS = {"mbpp": "full", "mbpp-sanitized": "sanitized"}


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """Problems with a name for people and a digest for machines."""

    name: str
    problems: list[Problem]
    digest: str  # sha256 over the problems in order of task_id

    def by_id(self) -> dict[str, Problem]:
        return {p.task_id: p for p in self.problems}


def load(source: str, splits: str | None = None, limit: int | None = None) -> ProblemSet:
    """The problems of `starter`, `mbpp`, `mbpp-sanitized` or a file; `splits` as "train,validation", None for all.

    `limit` keeps the first problems of each split, in order of task_id. Raises InputError, or OutsideError where the
    hub does not answer.
    """
    wanted = parse_splits(splits)
    if source == "starter":
        problems = read_problems(STARTER)
    elif source in HUB_CONFIGS:
        problems = from_hub(source)
    else:
        problems = read_problems(Path(source))
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
        for problem in sorted(problems, key=lambda p: task_order(p.task_id)):
            taken[problem.split] += 1
            if taken[problem.split] <= limit:
                kept.append(problem)
        problems = kept
    problems = sorted(problems, key=lambda p: task_order(p.task_id))
    name = source if source == "starter" or source in HUB_CONFIGS else Path(source).name
    return ProblemSet(name, problems, digest(problems))


def digest(problems: list[Problem]) -> str:
    """By which a run knows its problems. Fields that are as by default do not count, and a number is a number: so the
    runs that were made when a problem had no others, and an integer for its name, know theirs still."""
    total = hashlib.sha256()
    for problem in sorted(problems, key=lambda p: task_order(p.task_id)):
        own = {f.name: getattr(problem, f.name) for f in fields(problem)}
        own = {f.name: own[f.name] for f in fields(problem) if f.default is MISSING or own[f.name] != f.default}
        if not problem.expected:
            own.pop("expected", None)
        number = problem.task_id
        total.update(encode(own | {"task_id": int(number) if number.isdecimal() else number}))
    return total.hexdigest()


def parse_splits(text: str | None) -> set[str] | None:
    """ "train,validation" as a set; None and "all" mean every split. Raises InputError."""
    if text is None or text == "all":
        return None
    wanted = {part.strip() for part in text.split(",") if part.strip()}
    unknown = wanted - set(SPLITS)
    if unknown or not wanted:
        raise InputError(f"unknown split {', '.join(sorted(unknown)) or repr(text)}; known: all, {', '.join(SPLITS)}.")
    return wanted


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
            problems.append(problem_from_mbpp(line, row))
    if len({p.task_id for p in problems}) != len(problems):
        raise RecordError(f"{HUB}: a task_id stands twice.")
    return problems


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".") + "."
