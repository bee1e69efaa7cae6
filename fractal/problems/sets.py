"""Problem sets by name: the embedded starter set, the hub's, and files (formats.py reads those)."""

import hashlib
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from fractal.errors import InputError, OutsideError, RecordError
from fractal.jsonl import Line, encode
from fractal.problems.formats import problem_of, read_problems
from fractal.records import SPLITS, Problem, digest_id, task_order

STARTER = Path(__file__).with_name("starter.jsonl")
TESTS = ("all", "base", "plus")


class HubSet(NamedTuple):
    """Where a set is on the hub."""

    repository: str
    config: str | None = None
    split: str | None = None  # None: all


HUB_SETS = {
    "mbpp": HubSet("google-research-datasets/mbpp", "full"),
    "mbpp-sanitized": HubSet("google-research-datasets/mbpp", "sanitized"),
    "mbpp+": HubSet("evalplus/mbppplus"),
    "humaneval": HubSet("openai/openai_humaneval"),
    "humaneval+": HubSet("evalplus/humanevalplus"),
    "livecodebench": HubSet("livecodebench/code_generation_lite", "release_latest"),
    "apps": HubSet("codeparrot/apps"),
    "code_contests": HubSet("deepmind/code_contests", None, "test"),
}


BY_SPLIT = ("apps", "code_contests")  # sets whose own train split is ours


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """Problems with a name for people and a digest for machines."""

    name: str
    problems: list[Problem]
    digest: str  # sha256 over the problems in order of task_id

    def by_id(self) -> dict[str, Problem]:
        return {p.task_id: p for p in self.problems}


def load(source: str, splits: str | None = None, limit: int | None = None, tests: str | None = None) -> ProblemSet:
    """The problems of `starter`, a set of HUB_SETS or a file; `splits` as "train,validation", None for all.

    `limit` keeps the first problems of each split, in order of task_id; `tests` "base" or "plus" those tests alone.
    Raises InputError, or OutsideError where the hub does not answer.
    """
    wanted = parse_splits(splits)
    if source == "starter":
        problems = read_problems(STARTER)
    elif source in HUB_SETS and not Path(source).is_file():
        problems = from_hub(source)
    else:
        problems = read_problems(Path(source))
    problems = chosen_tests(source, problems, tests or "all")
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
    name = source if source == "starter" or source in HUB_SETS else Path(source).name
    return ProblemSet(name, problems, digest(problems))


def chosen_tests(source: str, problems: list[Problem], tests: str) -> list[Problem]:
    """The problems with their base tests alone, or their plus tests. Raises InputError where a set has no such."""
    if tests not in TESTS:
        raise InputError(f"--tests {tests}: expected {', '.join(TESTS)}.")
    if tests == "all":
        return problems
    chosen = []
    for problem in problems:
        count = problem.base_tests
        if count is None:
            if tests == "base":
                return problems  # all are base tests
            raise InputError(
                f"--tests plus: problem {problem.task_id} of {source} has no plus tests. Leave --tests out."
            )
        part = slice(count) if tests == "base" else slice(count, None)
        kept = replace(problem, tests=problem.tests[part], expected=problem.expected[part], base_tests=None)
        if kept.tests:
            chosen.append(kept)
    return chosen


def digest(problems: list[Problem]) -> str:
    """By which a run knows its problems. Fields that are as by default do not count, and a number is a number: so the
    runs that were made when a problem had no others, and an integer for its name, know theirs still."""
    total = hashlib.sha256()
    for problem in sorted(problems, key=lambda p: task_order(p.task_id)):
        defaults: dict[str, Any] = {f.name: [] if f.default_factory is list else f.default for f in fields(problem)}
        own = {name: value for name in defaults if (value := getattr(problem, name)) != defaults[name]}
        total.update(encode(own | {"task_id": digest_id(problem.task_id)}))
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
    """A set by the `datasets` library. Raises OutsideError when the hub cannot be reached and nothing is cached."""
    import datasets  # two seconds of import, and only this function needs it

    hub, config, only = HUB_SETS[name]
    remedy = f"Check the network, or give a file: --problems PATH (JSON or JSONL with the rows of {hub})."
    try:
        parts = datasets.load_dataset(hub, config)
    except Exception as error:  # datasets raises what its many back ends raise
        raise OutsideError(f"{name}: the data set cannot be had from the hub: {_first_line(error)} {remedy}") from error
    problems = []
    for split in parts:
        if only in (None, split):
            for number, row in enumerate(parts[split], 1):
                line = Line(Path(f"{hub}:{split}"), number, "element", b"")
                problem = problem_of(line, row)
                problems.append(replace(problem, split="train") if split == "train" and name in BY_SPLIT else problem)
    if len({p.task_id for p in problems}) != len(problems):
        raise RecordError(f"{hub}: a task_id stands twice.")
    return problems


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".") + "."
