"""`fractal report --check`: every figure of a report computed again from the run folder, and compared bit for bit.

Nothing in the folder is written or locked. The choices are made again from labels and scores, the numbers from the
choices, and the page, the table and summary.json from the numbers.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fractal import console
from fractal.errors import InputError
from fractal.jsonl import read_jsonl
from fractal.records import Choice
from fractal.report import stage as report_stage
from fractal.rundir import RunDir
from fractal.selection import stage as selection_stage

KEYS = ("strategy", "task_id", "split", "epoch", "criterion", "name", "by", "k", "low")  # what names a list's element


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
    with console.activity("check") as doing:
        doing("computing every figure again")
        count, found = compare(folder)
    for one in found:
        console.say(str(one))
    if found:
        console.say(f"{folder.path}: {len(found):,} of {count:,} figures and files differ from what the records say.")
        for reason in _reasons(folder):
            console.say(reason)
        return 1
    console.say(f"{count:,} figures, all the same")
    return 0


def compare(folder: RunDir) -> tuple[int, list[Difference]]:
    """How many figures the report holds, and those that differ, in the report's order."""
    made_with = folder.manifest["config"].get("report")
    if not isinstance(made_with, dict):
        raise InputError(
            f"{folder.path}: has no finished report to check. Write it: fractal report --run {folder.path}"
        )
    stored = _stored(folder, made_with.get("files", {}))
    choices = selection_stage.made(folder)
    made = report_stage.make(folder, made_with.get("bill", {}), choices)
    recorded = read_jsonl(folder.file("selection.jsonl"), Choice)
    found = [*_selection(recorded, choices)]
    told = json.loads(stored[report_stage.NUMBERS])
    again = json.loads(made.files[report_stage.NUMBERS])
    found += differences(told, again)
    for name in (report_stage.PAGE, report_stage.TABLE):
        if stored[name] != made.files[name]:
            found.append(_first_line(name, stored[name], made.files[name]))
    if not found and stored[report_stage.NUMBERS] != made.files[report_stage.NUMBERS]:
        found.append(_first_line(report_stage.NUMBERS, stored[report_stage.NUMBERS], made.files[report_stage.NUMBERS]))
    return sum(1 for _ in leaves(told)) + len(recorded), found


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
    for name in (report_stage.NUMBERS, report_stage.PAGE, report_stage.TABLE):
        file = folder.file(name)
        if not file.exists():
            raise InputError(f"{file}: is missing. {remedy}")
        stored[name] = file.read_bytes()
    if not stored[report_stage.PAGE].endswith(b"</html>\n"):
        raise InputError(f"{folder.file(report_stage.PAGE)}: is cut short: it does not end as a page does. {remedy}")
    try:
        json.loads(stored[report_stage.NUMBERS])
    except ValueError as error:
        raise InputError(f"{folder.file(report_stage.NUMBERS)}: is cut short or no JSON: {error}. {remedy}") from error
    return stored


def _selection(told: list[Choice], again: list[Choice]) -> Iterator[Difference]:
    before, now = ({(one.task_id, one.strategy): one for one in some} for some in (told, again))
    for key in dict.fromkeys([*before, *now]):
        one, other = before.get(key), now.get(key)
        if one != other:
            yield Difference(f"selection.jsonl: task_id {key[0]}, {key[1]}", _pick(one), _pick(other))


def _pick(choice: Choice | None) -> str:
    if choice is None:
        return "no choice"
    return f"{'any sample' if choice.sample_id is None else f'sample {choice.sample_id}'} (passed {choice.passed!r})"


def differences(told: Any, again: Any, where: str = "") -> Iterator[Difference]:
    """The leaves of two JSON values that are not the same, down to the last bit and the type of a number."""
    if isinstance(told, dict) and isinstance(again, dict):
        for key in dict.fromkeys([*told, *again]):
            place = f"{where}.{key}" if where else key
            yield from differences(told.get(key, _Absent), again.get(key, _Absent), place)
    elif isinstance(told, list) and isinstance(again, list):
        for number, (one, other) in enumerate(itertools.zip_longest(told, again, fillvalue=_Absent)):
            yield from differences(one, other, f"{where}[{_name(one if one is not _Absent else other, number)}]")
    elif type(told) is not type(again) or told != again:
        yield Difference(where, _value(told), _value(again))


class _Absent:
    """Stands for what one of the two does not have."""


def _name(element: Any, number: int) -> str:
    """How a list's element is called: by what tells it from its neighbours, else by its place."""
    if isinstance(element, dict):
        for key in KEYS:
            if isinstance(element.get(key), str | int):
                return str(element[key])
    return str(number)


def _value(value: Any) -> str:
    if value is _Absent:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


def leaves(value: Any) -> Iterator[int | float]:
    """The numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from leaves(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _first_line(name: str, told: bytes, again: bytes) -> Difference:
    """Two texts differ: where first, and how the lines go on from there."""
    pairs = itertools.zip_longest(told.splitlines(), again.splitlines(), fillvalue=b"")
    for number, (one, other) in enumerate(pairs, 1):
        if one != other:
            start = next(
                (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
            )
            parts = [repr(text[max(0, start - 20) : start + 40].decode("utf-8", "replace")) for text in (one, other)]
            return Difference(f"{name}: line {number}", *parts)
    return Difference(name, f"{len(told):,} bytes", f"{len(again):,} bytes")


def _reasons(folder: RunDir) -> Iterator[str]:
    """What has changed since the report was made, for whoever wonders why it differs."""
    before, now = folder.manifest["config"]["report"], report_stage.inputs(folder)
    for name in now["files"]:
        if before.get("files", {}).get(name) != now["files"][name]:
            yield f"{name} has changed since the report was made."
    if before.get("manifest") != now["manifest"]:
        yield "manifest.json has changed since the report was made."
    if before.get("code") != now["code"]:
        yield "The report was made by other code than this."
    if before.get("packages") != now["packages"]:
        yield f"The report was made with {before.get('packages')}, this is {now['packages']}."
