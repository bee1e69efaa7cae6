"""LOG.md beside the run folders: one dated row for each finished run, with its numbers and their source.

Rows are only ever added. Other text in the file stays; the header is written where a table begins.
"""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from fractal import console
from fractal.report.criteria import Verdict
from fractal.report.dataset import shorten
from fractal.report.number_text import DASH, number, percent, points, span
from fractal.report.summary import Summary
from fractal.selection.metrics import WithinProblemAuc

COLUMNS = (
    "date", "run", "model", "problems x n", "pass rate", "random", "critic [95 %]", "gain over random [95 %]",
    "within-problem AUC [95 %]", "val accuracy", "criteria met", "cost", "commit", "numbers from",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
_DATE, _RUN = 0, 1


def row(summary: Summary, verdicts: Sequence[Verdict], cost_usd: float | None, source: str) -> list[str]:
    """The cells of a run's row, in the order of COLUMNS; `source` is the file that holds the numbers."""
    facts = summary.facts
    results = {result.strategy: result for result in summary.strategies}
    critic, random, every = results.get("critic"), results.get("random"), summary.splits[-1]
    within = summary.critic.within_problem if summary.critic else None
    accuracy = next((epoch.val_acc for epoch in facts.epochs if epoch.chosen), None)
    met = sum(verdict.verdict == "met" for verdict in verdicts)
    cells = [
        facts.date[:10],
        facts.run,
        facts.model,
        f"{sum(summary.problems_by_split.values())} x {facts.n if facts.n is not None else DASH}",
        percent(every.pass_rate.mean if every.pass_rate else None),
        percent(random.pass_rate.mean if random else None),
        f"{percent(critic.pass_rate.mean)} {span(critic.pass_rate)}" if critic else DASH,
        f"{points(critic.gain_over_random.mean)} {span(critic.gain_over_random, signed=True)}" if critic else DASH,
        _auc(within) if within else DASH,
        percent(accuracy),
        f"{met} of {len(verdicts)}" if verdicts else DASH,
        DASH if cost_usd is None else f"{cost_usd:.2f} USD",
        (facts.git_commit or DASH)[:12] + ("+" if facts.git_dirty else ""),
        f"{source} ({summary.split})",
    ]
    return [_cell(text) for text in cells]


def _auc(within: WithinProblemAuc) -> str:
    if within.interval is None:
        return DASH
    return f"{number(within.auc)} [{within.interval.low:.3f}, {within.interval.high:.3f}]"


def _cell(text: str) -> str:
    """One line of Markdown that shows the text as it is and ends no cell."""
    line = shorten(text, 200).replace("\\", "\\\\")
    for mark in "|`*<[":
        if mark != "[" or "](" in line:
            line = line.replace(mark, "\\" + mark)
    return line


def add(path: Path, cells: Sequence[str]) -> bool:
    """Append the row unless the last one of this run has the same cells, whatever its date. Returns whether it did.

    A file that cannot be written is a warning: the report is complete without it.
    """
    line = f"| {' | '.join(cells)} |\n"
    try:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed; several runs may end at once
            file.seek(0)
            before = file.read().decode("utf-8", "replace")
            if _is_repeated(before, line):
                return False
            text = "" if not before or before.endswith("\n") else "\n"
            if not _ends_in_table(before):
                text += ("\n" if before.strip() else "") + HEADER
            file.write((text + line).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        console.warn(f"report: {path}: cannot be written: {error.strerror}. The row of this run is missing there.")
        return False
    return True


def _ends_in_table(text: str) -> bool:
    """Whether the last lines are rows below our header."""
    for line in reversed(text.splitlines()):
        if line == HEADER.splitlines()[0]:
            return True
        if not line.startswith("|"):
            return False
    return False


def _is_repeated(text: str, line: str) -> bool:
    new = _split(line)
    rows = [cells for cells in map(_split, text.splitlines()) if len(cells) == len(COLUMNS)]
    last = [cells for cells in rows if cells[_RUN] == new[_RUN]][-1:]
    return bool(last) and last[0][_DATE + 1 :] == new[_DATE + 1 :]


def _split(line: str) -> list[str]:
    """The cells of a table's row, still escaped."""
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split(" | ")]
