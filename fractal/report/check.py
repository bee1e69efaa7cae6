"""`fractal report --check`: every figure of a report computed again from the run folder, and compared.

Numbers agree if they differ by no more than one part in 10^9, everything else if it is equal. Nothing in the folder is
written or locked. The choices are made again from labels and scores, the numbers from the choices, and the page, the
table and summary.json from the numbers. Of a report that other code than this made, only the numbers are compared.
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fractal import console
from fractal.errors import InputError
from fractal.jsonl import read_jsonl
from fractal.records import Choice
from fractal.report import make
from fractal.report.criteria import element_name
from fractal.report.inputs import NUMBERS, PAGE, TABLE, inputs
from fractal.rundir import RunDir
from fractal.selection.read_run import recompute

TOLERANCE = 1e-9  # of the larger number
NEAR_ZERO = 1e-12  # sums over resamples that cancel


@dataclass(frozen=True, slots=True)
class Difference:
    where: str  # "strategies.critic.pass_rate.mean", or a file
    report: str
    recomputed: str

    def __str__(self) -> str:
        return f"{self.where}: report {self.report}, recomputed {self.recomputed}"


def run(folder: RunDir) -> int:
    """Print what differs; 0 if nothing does, else 1. `folder` is not entered. Raises InputError for damaged files."""
    folder.load()
    with console.activity("check") as update:
        update("computing every figure again")
        count, differences = compare(folder)
    for difference in differences:
        console.say(str(difference))
    if differences:
        console.say(f"{folder.path}: {len(differences):,} of {count:,} figures and files differ from the records.")
        for change in _changes(folder):
            console.say(change)
        return 1
    console.say(f"{count:,} figures, all the same")
    if not _same_code(folder):
        console.say("The report was made by other code than this: its numbers were compared, its page was not.")
    return 0


def compare(folder: RunDir) -> tuple[int, list[Difference]]:
    """How many figures the report holds, and those that differ, in the report's order."""
    made_with = folder.manifest["config"].get("report")
    if not isinstance(made_with, dict):
        raise InputError(
            f"{folder.path}: has no finished report to check. Write it: fractal report --run {folder.path}"
        )
    stored = _stored(folder, made_with.get("files", {}))
    choices = recompute(folder)
    report = make.make(folder, made_with.get("bill", {}), choices)
    recorded = read_jsonl(folder.file("selection.jsonl"), Choice)
    numbers, recomputed = json.loads(stored[NUMBERS]), json.loads(report.files[NUMBERS])
    same_code = _same_code(folder)
    differences = [*_compare_choices(recorded, choices), *_compare_values(numbers, recomputed, "", same_code)]
    for name in (PAGE, TABLE) if same_code else ():
        if stored[name] != report.files[name] and not differences:
            differences.append(_first_line(name, stored[name], report.files[name]))
    return sum(1 for _ in _leaves(numbers)) + len(recorded), differences


def _same_code(folder: RunDir) -> bool:
    before, now = folder.manifest["config"]["report"], inputs(folder)
    return all(before.get(name) == now[name] for name in ("code", "packages"))


def _stored(folder: RunDir, digests: dict[str, str]) -> dict[str, bytes]:
    """The report's files as they are. Raises InputError if one, or one of the records, is missing or cut short."""
    remedy = f"Restore it, or write the report again: fractal report --run {folder.path}"
    for name in digests:
        file = folder.file(name)
        if not file.exists():
            raise InputError(f"{file}: is missing; the report was made with it. Restore it, or run its stage again.")
        if name.endswith(".jsonl") and (data := file.read_bytes()) and not data.endswith(b"\n"):
            raise InputError(f"{file}: is cut short: its last line has no end. Restore it, or run its stage again.")
    stored = {}
    for name in (NUMBERS, PAGE, TABLE):
        file = folder.file(name)
        if not file.exists():
            raise InputError(f"{file}: is missing. {remedy}")
        stored[name] = file.read_bytes()
    if not stored[PAGE].endswith(b"</html>\n"):
        raise InputError(f"{folder.file(PAGE)}: is cut short: it does not end as a page does. {remedy}")
    try:
        json.loads(stored[NUMBERS])
    except ValueError as error:
        raise InputError(f"{folder.file(NUMBERS)}: is cut short or no JSON: {error}. {remedy}") from error
    return stored


def _compare_choices(recorded: list[Choice], recomputed: list[Choice]) -> Iterator[Difference]:
    before = {(choice.task_id, choice.strategy): choice for choice in recorded}
    now = {(choice.task_id, choice.strategy): choice for choice in recomputed}
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if old is None or new is None or old.sample_id != new.sample_id or not _close(old.passed, new.passed):
            yield Difference(f"selection.jsonl: task_id {key[0]}, {key[1]}", _pick(old), _pick(new))


def _pick(choice: Choice | None) -> str:
    if choice is None:
        return "no choice"
    return f"{'any sample' if choice.sample_id is None else f'sample {choice.sample_id}'} (passed {choice.passed!r})"


class _Absent:
    """Stands for a value that only the other side has."""


def _compare_values(report: Any, recomputed: Any, where: str, same_code: bool) -> Iterator[Difference]:
    """The leaves of two JSON values that differ; where the code does, only numbers that both sides have."""
    if isinstance(report, dict) and isinstance(recomputed, dict):
        for key in dict.fromkeys([*report, *recomputed]):
            path = f"{where}.{key}" if where else key
            yield from _compare_values(report.get(key, _Absent), recomputed.get(key, _Absent), path, same_code)
    elif isinstance(report, list) and isinstance(recomputed, list):
        for number, (old, new) in enumerate(itertools.zip_longest(report, recomputed, fillvalue=_Absent)):
            name = element_name(new if old is _Absent else old) or number
            yield from _compare_values(old, new, f"{where}[{name}]", same_code)
    elif _is_number(report) and _is_number(recomputed):
        if not _close(report, recomputed):
            yield Difference(where, _show(report), _show(recomputed))
    elif same_code and (type(report) is not type(recomputed) or report != recomputed):
        yield Difference(where, _show(report), _show(recomputed))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _close(report: float, recomputed: float) -> bool:
    return math.isclose(report, recomputed, rel_tol=TOLERANCE, abs_tol=NEAR_ZERO)


def _show(value: Any) -> str:
    if value is _Absent:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


def _leaves(value: Any) -> Iterator[int | float]:
    """The numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for element in value:
            yield from _leaves(element)
    elif _is_number(value):
        yield value


def _first_line(name: str, report: bytes, recomputed: bytes) -> Difference:
    """Two texts differ: the first line that does, from shortly before the first difference."""
    pairs = itertools.zip_longest(report.splitlines(), recomputed.splitlines(), fillvalue=b"")
    number, (old, new) = next((number, pair) for number, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    shown = [repr(text[max(0, same - 20) : same + 40].decode("utf-8", "replace")) for text in (old, new)]
    return Difference(f"{name}: line {number}", *shown)


def _changes(folder: RunDir) -> Iterator[str]:
    """What has changed since the report was made."""
    before, now = folder.manifest["config"]["report"], inputs(folder)
    for name in now["files"]:
        if before.get("files", {}).get(name) != now["files"][name]:
            yield f"{name} has changed since the report was made."
    if before.get("manifest") != now["manifest"]:
        yield "manifest.json has changed since the report was made."
    if before.get("code") != now["code"]:
        yield "The report was made by other code than this."
    if before.get("packages") != now["packages"]:
        yield f"The report was made with {before.get('packages')}, this is {now['packages']}."
