"""What instances cost, from the ledger alone: from the launch request on, so a little more than Lambda counts."""

import time
from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from fractal.cloud.ledger import Entry


def cost_table(entries: Iterable[Entry], now: float) -> Table:
    """A row for each instance, the oldest first, and the total; what is billed now is marked.

    A launch that certainly did not happen is left out; one of unknown outcome counts as an instance.
    """
    table = Table("instance", "type", "region", "hours", "USD/h", "USD", "now", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for column in table.columns[3:6]:
        column.justify = "right"
    billed = [entry for entry in entries if entry.id is not None or entry.state != "ended"]
    for entry in billed:
        ended, usd = entry.state == "ended", entry.dollars(now)
        state = {"intended": "launch of unknown outcome", "launched": "BILLED NOW", "ended": entry.end_reason or ""}
        table.add_row(
            entry.name,
            entry.type_name,
            entry.region,
            f"{entry.hours(now):.2f}",
            f"{entry.usd_per_hour:.2f}",
            f"{usd:.2f}",
            Text(state[entry.state]),  # a reason may hold [brackets]
            style="" if ended else "bold",
        )
    total_usd = sum(entry.dollars(now) for entry in billed)
    usd_per_hour = sum(entry.usd_per_hour for entry in billed if entry.state != "ended")
    table.add_section()
    table.add_row("total", "", "", "", f"{usd_per_hour:.2f} now", f"{total_usd:.2f}", "")
    return table


def bill(entry: Entry, stages: Iterable[tuple[str, float]] = ()) -> Table:
    """One instance's phases, and a run's stages (name, seconds), with seconds and dollars."""
    price = entry.usd_per_hour
    table = Table("what", "began", "seconds", "dollars", title=f"{entry.type_name} in {entry.region}, {price:.2f} $/h")

    def add(what: str, began: str, seconds: float) -> None:
        table.add_row(what, began, f"{seconds:.0f}", f"{seconds / 3600 * price:.4f}")

    for event in entry.timeline:
        add(event.what, time.strftime("%H:%M:%S", time.localtime(event.at)), event.seconds)
    for stage, seconds in stages:
        add(f"  {stage}", "", seconds)
    total_s = (entry.ended_at or time.time()) - entry.asked_at
    add("from request to end" if entry.ended_at else "until now", "", total_s)
    return table
