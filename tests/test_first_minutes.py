"""The table from the launch request to the first sample."""

import io

import hypothesis.strategies as st
import pytest
from hypothesis import given
from rich.console import Console

from fractal.cloud import first_minutes
from fractal.cloud.first_minutes import Phase, overlap_s, phases
from fractal.cloud.ledger import Entry, Event, FileSystemMount
from tests.test_ledger import entry

EVENTS = (
    Event("launch", 1000.0, 2.0),
    Event("build", 1002.0, 100.0),
    Event("boot", 1102.0, 3.0),  # the wait began when the build had ended
    Event("ready", 1105.0, 20.0),
    Event("push", 1125.0, 40.0),
    Event("run --stage all", 1170.0, 500.0),
)
START_UP: dict[str, object] = {"weights_seconds": 60.0, "load_seconds": 30.0, "first_sample_at": 1270.0}


def rented(*events: Event, **fields: object) -> Entry:
    return entry(state="launched", id="i-1", asked_at=1000.0, launched_at=1002.0, timeline=events, **fields)


def test_the_way_to_the_first_sample() -> None:
    found = phases(rented(*EVENTS), START_UP)
    assert [(phase.what, phase.began_s, phase.seconds) for phase in found] == [
        ("launch", 0, 2), ("build", 2, 100), ("boot", 2, 103), ("ready", 105, 20), ("push", 125, 40),
        ("weights", 170, 60), ("load", 230, 30), ("first sample", 260, 10),
    ]  # fmt: skip
    assert overlap_s(found) == pytest.approx(100)
    out = io.StringIO()
    Console(file=out, width=120).print(first_minutes.table(rented(*EVENTS), found))
    assert "4.5 min, 0.06 $; side by side 1.7 min" in out.getvalue()


def test_a_file_system_saves_weights_and_kernels() -> None:
    system = FileSystemMount("models", "/lambda/nfs/models")
    found = {phase.what: phase.next_run for phase in phases(rented(*EVENTS, file_systems=(system,)), START_UP)}
    assert found["weights"] == "nothing, with the file system models"
    assert "without compiling, with the file system models" in found["load"]
    assert found["build"] == "what changed"  # before the instance was ready: here


def test_a_build_on_the_instance_is_needed_again_on_another_without_a_file_system() -> None:
    system = FileSystemMount("models", "/lambda/nfs/models")
    events = (*EVENTS[:1], *EVENTS[3:5], Event("build", 1166.0, 3.0), EVENTS[5])
    for systems, text in (((), "on another instance all"), ((system,), "with the file system models")):
        found = {phase.what: phase.next_run for phase in phases(rented(*events, file_systems=systems), START_UP)}
        assert text in found["build"]


@pytest.mark.parametrize(
    ("events", "start_up"),
    [
        (EVENTS, {}),
        (EVENTS, {**START_UP, "first_sample_at": "soon"}),
        (EVENTS, {**START_UP, "first_sample_at": 900.0}),  # of a run before
        ((*EVENTS, Event("run --stage score", 1700.0, 5.0)), START_UP),  # the second job
        (EVENTS[:-1], START_UP),
    ],
)
def test_nothing_is_said_of_what_is_not_known(events: tuple[Event, ...], start_up: dict[str, object]) -> None:
    assert phases(rented(*events), start_up) == []


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=6))
def test_overlap_is_what_seconds_counted_twice_add_up_to(intervals: list[tuple[int, int]]) -> None:
    found = [Phase("x", began, seconds, "") for began, seconds in intervals]
    busy = {second for began, seconds in intervals for second in range(began, began + seconds)}
    assert overlap_s(found) == sum(seconds for _, seconds in intervals) - len(busy)
