"""LOG.md beside the run folders: one dated row for each finished run, with its numbers and their source.

Rows are only ever added. Other text in the file stays; the header is written where a table begins.
"""

import fcntl
import re
from collections.abc import Sequence
from pathlib import Path

from fractal import console
from fractal.report.criteria import Verdict
from fractal.report.dataset import shorten
from fractal.report.number_text import DASH, number, percent, plain_span, points, span
from fractal.report.summary import Summary

COLUMNS = (
    "date", "run", "model", "problems x n", "pass rate", "random", "critic [95 %]", "gain over random [95 %]",
    "within-problem AUC [95 %]", "val accuracy", "criteria met", "cost", "commit", "numbers from",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"


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
        f"{number(within.auc)} {plain_span(within.interval)}" if within and within.interval else DASH,
        percent(accuracy),
        f"{met} of {len(verdicts)}" if verdicts else DASH,
        DASH if cost_usd is None else f"{cost_usd:.2f} USD",
        (facts.git_commit or DASH)[:12] + ("+" if facts.git_dirty else ""),
        f"{source} ({summary.split})",
    ]
    return [_cell(text) for text in cells]


def _cell(text: str) -> str:
    """One line of Markdown that shows the text as it is and ends no cell."""
    return re.sub(r"([\\|`*<]|\](?=\())", r"\\\1", shorten(text, 200))


def add(path: Path, cells: Sequence[str]) -> None:
    """Append the row unless the last one of this run has the same cells, whatever its date.

    A file that cannot be written is a warning: the report is complete without it.
    """
    line = f"| {' | '.join(cells)} |"
    try:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed; several runs may end at once
            file.seek(0)
            before = file.read().decode("utf-8", "replace")
            rows = [row.split(" | ", 2) for row in [*before.splitlines(), line]]
            of_run = [row[2] for row in rows if row[1:2] == [cells[1]] and len(row) == 3]
            if of_run[-2:-1] != of_run[-1:]:
                begin = "" if before.endswith("|\n") else f"\n\n{HEADER}" if before else HEADER
                file.write(f"{begin}{line}\n".encode())
    except OSError as error:
        console.warn(f"report: {path}: cannot be written: {error.strerror}. The row of this run is missing there.")
