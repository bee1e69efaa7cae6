"""`fractal report --check`: every figure of a report computed again from the run folder, and compared.

Choices are made again from labels and scores, and all else from the choices; nothing in the folder is written or
locked. Of a report that other code than this made, only the numbers are compared.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from fractal import console
from fractal.errors import InputError
from fractal.jsonl import read_jsonl
from fractal.records import Choice
from fractal.report import make
from fractal.report.criteria import element_name
from fractal.report.inputs import NUMBERS, PAGE, TABLE, inputs
from fractal.rundir import RunDir
from fractal.selection.outcomes import read_outcomes
from fractal.selection.splits import measured_splits
from fractal.selection.strategies import choose

TOLERANCE = 1e-9  # of the larger number
NEAR_ZERO = 1e-12  # sums over resamples that cancel
SHOWN = 80  # characters of a value


def run(folder: RunDir) -> int:
    """Print what differs; 0 if nothing does, else 1. `folder` is not entered. Raises InputError for damaged files."""
    folder.load()
    with console.activity("check") as update:
        update("computing every figure again")
        count, differences = compare(folder)
    for difference in differences:
        console.say(difference)
    changed = _changed(folder)
    if differences:
        console.say(f"{folder.path}: {len(differences):,} of {count:,} figures and files differ from the records.")
        console.say(f"Changed since the report was made: {', '.join(changed) or 'nothing'}.")
        return 1
    console.say(f"{count:,} figures, all the same")
    if not {"code", "packages"}.isdisjoint(changed):
        console.say("The report was made by other code than this: its numbers were compared, its page was not.")
    return 0


def compare(folder: RunDir) -> tuple[int, list[str]]:
    """How many figures the report holds, and those that differ, in the report's order."""
    made_with = folder.manifest["config"].get("report")
    if made_with is None:
        raise InputError(
            f"{folder.path}: has no finished report to check. Write it: fractal report --run {folder.path}"
        )
    same_code = {"code", "packages"}.isdisjoint(_changed(folder))
    stored = {name: _read(folder, name) for name in (NUMBERS, PAGE, TABLE)}
    try:
        numbers = json.loads(stored[NUMBERS])
    except ValueError as error:
        raise InputError(f"{folder.file(NUMBERS)}: is cut short or no JSON: {error}. {_remedy(folder)}") from error
    splits = measured_splits(folder.manifest["config"], folder.problems().values(), folder.labels())
    choices = choose(read_outcomes(folder, splits))
    report = make.make(folder, made_with.get("bill", {}), choices)
    before = [*_leaves(numbers), *_picks(read_jsonl(folder.file("selection.jsonl"), Choice))]
    now = [*_leaves(json.loads(report.files[NUMBERS])), *_picks(choices)]
    differences = list(_differences(dict(before), dict(now), same_code))
    for name in (PAGE, TABLE) if same_code and not differences else ():
        lines = itertools.zip_longest(stored[name].split(b"\n"), report.files[name].split(b"\n"))
        if different := [number for number, (old, new) in enumerate(lines, 1) if old != new]:
            differences.append(f"{name}: line {different[0]} differs")
    return sum(_is_number(value) for _, value in before), differences


def _read(folder: RunDir, name: str) -> bytes:
    try:
        return folder.file(name).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{folder.file(name)}: is missing. {_remedy(folder)}") from None


def _remedy(folder: RunDir) -> str:
    return f"Restore it, or write the report again: fractal report --run {folder.path}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The path and the value of each number, text, flag and null in a JSON value."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from _leaves(child, f"{path}[{element_name(child) or number}]")
    else:
        yield path, value


def _picks(choices: Iterable[Choice]) -> Iterator[tuple[str, Any]]:
    for choice in choices:
        where = f"selection.jsonl: task_id {choice.task_id}, {choice.strategy}"
        yield f"{where}: sample_id", choice.sample_id
        yield f"{where}: passed", choice.passed


def _differences(report: dict[str, Any], recomputed: dict[str, Any], same_code: bool) -> Iterator[str]:
    """The leaves that differ; where the code does, only numbers that both sides have."""
    for path in dict.fromkeys([*report, *recomputed]):
        old: Any = report.get(path)
        new: Any = recomputed.get(path)
        texts = [
            json.dumps(side[path], ensure_ascii=False) if path in side else "nothing" for side in (report, recomputed)
        ]
        if _is_number(old) and _is_number(new):
            differ = not math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=NEAR_ZERO)
        else:
            differ = same_code and texts[0] != texts[1]
        if differ:
            yield f"{path}: report {texts[0][:SHOWN]}, recomputed {texts[1][:SHOWN]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _changed(folder: RunDir) -> list[str]:
    """What has changed since the report was made: files, and the other inputs by their names."""
    before, now = folder.manifest["config"]["report"], inputs(folder)
    old, new = before.get("files", {}), now["files"]
    files = [name for name in old | new if old.get(name) != new.get(name)]
    return [*files, *(name for name in ("manifest", "code", "packages") if before.get(name) != now[name])]
