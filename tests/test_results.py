"""Which side of a run goes to which: records only grow, and nothing longer is ever replaced by something shorter."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.cloud import results
from fractal.cloud.results import State, direction
from fractal.errors import InputError

sizes = st.dictionaries(st.sampled_from(results.RECORDS), st.integers(0, 5))
states = st.builds(State, st.sampled_from([None, "a", "b"]), sizes)


@given(states, states)
def test_nothing_longer_is_replaced_by_something_shorter(ours: State, theirs: State) -> None:
    try:
        way = direction(ours, theirs, "demo")
    except InputError as error:
        assert "\n" not in str(error)
        return
    if way == "neither":
        assert ours.created is None
        assert theirs.created is None
        return
    winner, loser = (theirs, ours) if way == "fetch" else (ours, theirs)
    assert loser.created in (None, winner.created)
    if loser.created is not None:
        assert all(winner.sizes.get(name, 0) >= size for name, size in loser.sizes.items())


def test_two_different_runs_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="are two runs"):
        direction(State("2026-11-25T10:00", {}), State("2026-11-25T11:00", {}), "demo")
    with pytest.raises(InputError, match="went on in both places"):
        direction(
            State("a", {"samples.jsonl": 2, "labels.jsonl": 1}),
            State("a", {"samples.jsonl": 1, "labels.jsonl": 2}),
            "demo",
        )


def test_the_state_of_both_sides_is_read_alike(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(
        json.dumps({"created": "2026-11-25T10:00:00+00:00", "config": {}}, indent=1)
    )
    (tmp_path / "samples.jsonl").write_text("{}\n")
    text = "3 samples.jsonl\nmanifest\n" + (tmp_path / "manifest.json").read_text()
    assert (
        results.parse_state(text) == results.here(tmp_path) == State("2026-11-25T10:00:00+00:00", {"samples.jsonl": 3})
    )
    assert results.parse_state("") == results.here(tmp_path / "none") == State(None, {})
    (tmp_path / "manifest.json").write_text("torn")
    assert results.here(tmp_path).created == "unreadable"


def test_an_inputs_place_is_its_content(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text("1")
    first = results.input_place(file)
    assert first.endswith("/problems.jsonl")
    file.write_text("2")
    assert results.input_place(file) != first
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    place = results.input_place(tmp_path / "model")
    (tmp_path / "model/config.json").rename(tmp_path / "model/other.json")
    assert results.input_place(tmp_path / "model") != place
