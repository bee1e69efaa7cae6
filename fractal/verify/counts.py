"""Labels counted: by status, by problem, and what was lost. Pure, apart from reading the labels' file.

What a person sees of a verification comes from here; the statistics of a report are in metrics.py.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.bar import Bar
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fractal.jsonl import decode, iter_lines
from fractal.records import STATUSES, Status, task_order
from fractal.sandbox.host import lacking

MAX_LISTED = 20  # sandbox errors that are listed
HARDEST = 10  # problems in the short table
BAR = 40  # columns


@dataclass(frozen=True, slots=True)
class CountedLabel:
    """What is counted of a Label; the rest of its line is skipped, which halves the time."""

    task_id: str
    sample_id: int
    status: Status
    detail: str


@dataclass(slots=True)
class Tally:
    """Counts over a labels file."""

    statuses: Counter[str] = field(default_factory=Counter)
    problems: dict[str, Counter[str]] = field(default_factory=dict)
    lost: list[CountedLabel] = field(default_factory=list)  # the first MAX_LISTED
    lacking: Counter[str] = field(default_factory=Counter)  # programs by the module that the sandbox does not have

    @property
    def total(self) -> int:
        return self.statuses.total()

    @property
    def errors(self) -> int:
        return self.statuses["sandbox_error"]

    def add(self, label: CountedLabel) -> None:
        self.statuses[label.status] += 1
        self.problems.setdefault(label.task_id, Counter())[label.status] += 1
        if label.status == "sandbox_error" and len(self.lost) < MAX_LISTED:
            self.lost.append(label)
        if label.status == "error" and (module := lacking.module(label.detail)):
            self.lacking[module] += 1


def count(labels: Path) -> Tally:
    tally = Tally()
    for line in iter_lines(labels, own=True):
        tally.add(decode(line, CountedLabel))
    return tally


def summary(tally: Tally, now: int, seconds: float) -> str:
    """One line: what the file holds, and how quick the `now` labels of this call were."""
    total = max(tally.total, 1)
    fresh = "" if now == tally.total else f" ({now:,} now)"
    return (
        f"verify: {tally.total:,} samples{fresh}, {percent(tally.statuses['passed'] / total)} pass, "
        f"{percent(tally.statuses['timeout'] / total)} timeout, {tally.errors:,} lost, {seconds:,.0f} s, "
        f"{now / max(seconds, 0.001):,.0f} a second"
    )


def lost_lines(tally: Tally) -> list[str]:
    """Each sandbox error with its place, MAX_LISTED of them at most."""
    lines = [f"sandbox_error: task_id {v.task_id}, sample_id {v.sample_id}: {first_line(v.detail)}" for v in tally.lost]
    if tally.errors > len(tally.lost):
        lines.append(f"... and {tally.errors - len(tally.lost):,} more")
    return lines


def status_table(tally: Tally) -> Table:
    """A bar for each status."""
    table = Table("status", box=None, pad_edge=False)
    table.add_column("samples", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    most = max(tally.statuses.values(), default=1)
    for status in STATUSES:
        if n := tally.statuses[status]:
            table.add_row(status, f"{n:,}", percent(n / tally.total), Bar(most, 0, n, width=BAR))
    return table


def problem_table(tally: Tally, *, complete: bool = False) -> Group:
    """Each problem with its most common failure, the hardest first: HARDEST of them, or all."""
    ranked = sorted(tally.problems.items(), key=lambda item: (item[1]["passed"] / item[1].total(), task_order(item[0])))
    shares = [counts["passed"] / counts.total() for _, counts in ranked]
    title = (
        f"{len(ranked):,} problems: {shares.count(1.0):,} solved by all their samples, {shares.count(0.0):,} by none"
        + ("" if complete or len(ranked) <= HARDEST else f"; the {HARDEST} hardest (all: --by-problem)")
    )
    table = Table("problem", box=None, pad_edge=False)
    for name in ("samples", "passed", "share"):
        table.add_column(name, justify="right")
    table.add_column("most common failure")
    for (task_id, counts), share in list(zip(ranked, shares, strict=True))[: None if complete else HARDEST]:
        failures = Counter({status: n for status, n in counts.items() if status != "passed"})
        worst = ", ".join(f"{status} {n:,}" for status, n in failures.most_common(1))
        table.add_row(task_id, f"{counts.total():,}", f"{counts['passed']:,}", percent(share), worst)
    return Group(Text(title), table)  # not a title of the table, which would be broken to its width


def percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no detail"])[0][:200]
