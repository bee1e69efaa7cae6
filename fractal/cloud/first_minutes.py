"""From the launch request to the first sample: what took how long, what ran side by side, what a next run saves.

The ledger's entry has the phases until the job, the run's manifest those in it (`start_up` of generate/stage.py).
"""

from collections.abc import Mapping
from typing import NamedTuple

from rich.table import Table

from fractal.cloud.ledger import Entry, Event

RUN = "run"  # first word of the events of jobs
NEXT_RUN = {  # event -> what a next run needs of it
    "ready": "the checks, on another instance",
    "push": "what changed; on another instance all",
    "inputs": "what changed",
}
SAME_INSTANCE = "nothing while this instance lives"


class Phase(NamedTuple):
    """A part of the way to the first sample."""

    what: str
    began_s: float  # after the launch request
    seconds: float
    next_run: str  # what a next run needs of it

    @property
    def ended_s(self) -> float:
        return self.began_s + self.seconds


def phases(entry: Entry, start_up: Mapping[str, object]) -> list[Phase]:
    """In the order of their begin, the last one ends with the first sample; none if that is unknown, or not the
    instance's first.

    `start_up`: of the run's manifest.
    """
    runs = [event for event in entry.timeline if event.what.split(" ")[0] == RUN]
    values = [start_up.get(name) for name in ("weights_seconds", "load_seconds", "first_sample_at")]
    weights_s, load_s, sample_at = (float(value) if isinstance(value, int | float) else -1.0 for value in values)
    if len(runs) != 1 or min(weights_s, load_s) < 0 or sample_at < runs[0].at:
        return []
    system = f"the file system {entry.file_systems[0].name}" if entry.file_systems else ""
    found = [_before_job(entry, event, system) for event in entry.timeline if event.at < runs[0].at]
    weights_text = f"nothing, with {system}" if system else SAME_INSTANCE
    load_text = f"a load without compiling, with {system}" if system else "a load without compiling, on this instance"
    at = runs[0].at - entry.asked_at
    found.append(Phase("weights", at, weights_s, weights_text))
    found.append(Phase("load", at + weights_s, load_s, load_text))
    loaded_s = at + weights_s + load_s
    found.append(Phase("first sample", loaded_s, max(0.0, sample_at - entry.asked_at - loaded_s), "the same"))
    return sorted(found, key=lambda phase: phase.began_s)


def _before_job(entry: Entry, event: Event, system: str) -> Phase:
    began, next_run = event.at, NEXT_RUN.get(event.what, SAME_INSTANCE)
    if event.what == "build":  # on the ready instance, or before it was needed
        there = any(other.what == "ready" and other.at < event.at for other in entry.timeline)
        next_run = f"what changed, with {system}" if there and system else NEXT_RUN["push"] if there else "what changed"
    if event.what == "boot" and entry.launched_at is not None:
        began = entry.launched_at  # the event is the wait for its end, which may begin after a build
    return Phase(event.what, began - entry.asked_at, event.at + event.seconds - began, next_run)


def overlap_s(found: list[Phase]) -> float:
    """Seconds by which the way would be longer if no two phases ran side by side."""
    covered_s, until_s = 0.0, 0.0
    for phase in sorted(found, key=lambda phase: phase.began_s):
        covered_s += max(0.0, phase.ended_s - max(until_s, phase.began_s))
        until_s = max(until_s, phase.ended_s)
    return max(0.0, sum(phase.seconds for phase in found) - covered_s)


def table(entry: Entry, found: list[Phase]) -> Table:
    total_s = max(phase.ended_s for phase in found)
    title = (
        f"from launch to first sample: {total_s / 60:.1f} min, "
        f"{total_s / 3600 * entry.usd_per_hour:.2f} $; side by side {overlap_s(found) / 60:.1f} min"
    )
    shown = Table("what", "after s", "seconds", "a next run needs", title=title)
    for phase in found:
        shown.add_row(phase.what, f"{phase.began_s:.0f}", f"{phase.seconds:.0f}", phase.next_run)
    return shown
