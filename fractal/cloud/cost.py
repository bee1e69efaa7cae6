"""What each instance cost so far, from the ledger alone: from the launch request on, so a little too much."""

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from fractal.cloud.ledger import Ledger, State


@dataclass(frozen=True, slots=True)
class Row:
    """One instance."""

    name: str
    type_name: str
    region: str
    state: State
    hours: float
    usd_per_hour: float
    usd: float
    left_usd: float | None  # of its --max-dollars; None without, or when it has ended
    end_reason: str | None


@dataclass(frozen=True, slots=True)
class Cost:
    """All of them, the oldest first."""

    rows: tuple[Row, ...]
    total_usd: float
    living_usd_per_hour: float  # what is being spent now


def cost(ledger: Ledger, now: float) -> Cost:
    """What never came to be a machine is left out; an unsettled intent counts as one."""
    rows = []
    for entry in ledger.entries():
        if entry.state == "ended" and entry.id is None:
            continue
        usd = entry.dollars(now)
        left = None if entry.max_dollars is None or entry.state == "ended" else max(0.0, entry.max_dollars - usd)
        rows.append(
            Row(
                name=entry.name,
                type_name=entry.type_name,
                region=entry.region,
                state=entry.state,
                hours=entry.hours(now),
                usd_per_hour=entry.price_cents_per_hour / 100,
                usd=usd,
                left_usd=left,
                end_reason=entry.end_reason,
            )
        )
    living = sum(row.usd_per_hour for row in rows if row.state != "ended")
    return Cost(tuple(rows), sum(row.usd for row in rows), living)


def table(cost: Cost) -> Table:
    """For the terminal; what is billed now is marked."""
    found = Table("instance", "type", "region", "hours", "USD/h", "USD", "left", "now", box=None)
    for column in found.columns:
        column.overflow = "fold"
    for column in found.columns[3:7]:
        column.justify = "right"
    for row in cost.rows:
        now = {"intended": "launch not settled", "launched": "BILLED NOW", "ended": row.end_reason or ""}[row.state]
        found.add_row(
            row.name,
            row.type_name,
            row.region,
            f"{row.hours:.2f}",
            f"{row.usd_per_hour:.2f}",
            f"{row.usd:.2f}",
            "" if row.left_usd is None else f"{row.left_usd:.2f}",
            Text(now),  # a reason may hold [brackets]
            style="bold" if row.state != "ended" else "",
        )
    found.add_section()
    found.add_row("total", "", "", "", f"{cost.living_usd_per_hour:.2f} now", f"{cost.total_usd:.2f}", "", "")
    return found
