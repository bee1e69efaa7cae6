"""Which side of a run is copied to the other, compared file by file: nothing that has more is replaced by what has less."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.cloud import transfer
from fractal.cloud.transfer import FileState, RunState, direction
from fractal.errors import InputError

NAMES = [
    *transfer.RECORDS,
    "samples-00001.jsonl",
    "manifest.json",
    "critic/best/head.safetensors",
    "critic/metrics.jsonl",
    "report/index.html",
]
files = st.dictionaries(st.sampled_from(NAMES), st.builds(FileState, st.integers(0, 3), st.integers(0, 3)))
states = st.builds(RunState, st.sampled_from([None, "a", "b"]), files)


def run(created: str = "a", **sizes: int) -> RunState:
    """Keys name files: samples is samples.jsonl, critic is a checkpoint; values are sizes and times."""
    names = {
        "critic": "critic/best/head.safetensors",
        "manifest": "manifest.json",
        "report": "report/index.html",
        "notes": "notes.txt",
    }
    return RunState(created, {names.get(key, f"{key}.jsonl"): FileState(size, size) for key, size in sizes.items()})


@given(states, states)
def test_nothing_that_has_more_is_replaced(local: RunState, remote: RunState) -> None:
    try:
        way = direction(local, remote, "demo")
    except InputError as error:
        assert "\n" not in str(error)
        return
    if way == "neither":
        assert local.created is None
        assert remote.created is None
        return
    source, target = (remote, local) if way == "fetch" else (local, remote)
    assert target.created in (None, source.created)
    if target.created is None:
        return
    for name, file in target.files.items():
        if name in transfer.RECORDS or name == "samples-00001.jsonl":
            assert name in source.files or file.size == 0
            assert source.files.get(name, file).size >= file.size
        elif name.startswith("critic/"):  # the source has it, and not an older one
            assert name in source.files
            assert source.files[name] == file or source.files[name].modified >= file.modified


def test_what_was_made_here_after_a_job_there_is_sent() -> None:
    """`fractal train`, `score` or `report` here lengthen no record file that the other side has."""
    there = run(samples=9, labels=5, manifest=1)
    assert direction(run(samples=9, labels=5, manifest=2, critic=3), there, "demo") == "send"
    assert direction(run(samples=9, labels=5, manifest=2, critic=3, scores=4), there, "demo") == "send"
    assert direction(run(samples=9, labels=5, manifest=2, report=3), there, "demo") == "send"
    # trained anew here: the newer critic is sent; trained there: the newer one is fetched
    assert direction(run(samples=9, manifest=5, critic=5), run(samples=9, manifest=4, critic=4), "demo") == "send"
    assert direction(run(samples=9, manifest=4, critic=4), run(samples=9, manifest=5, critic=5), "demo") == "fetch"
    assert direction(there, there, "demo") == "fetch"
    # a report and notes made here, of a run that went on there, decide nothing
    assert direction(run(samples=8, manifest=9, report=9, notes=1), run(samples=9, manifest=3), "demo") == "fetch"


def test_a_part_of_the_samples_counts_as_they_do() -> None:
    first, second = (
        run(samples=9, labels=5),
        RunState("a", {**run(samples=9).files, "samples-00001.jsonl": FileState(2, 2)}),
    )
    assert direction(first, RunState("a", {**second.files, **first.files}), "demo") == "fetch"
    assert direction(RunState("a", {**second.files, **first.files}), first, "demo") == "send"
    with pytest.raises(InputError, match=r"here labels\.jsonl, on the instance samples-00001\.jsonl"):
        direction(first, second, "demo")


def test_two_runs_and_a_run_continued_in_both_places_are_refused() -> None:
    with pytest.raises(InputError, match="are two runs"):
        direction(run("2026-11-25T10:00"), run("2026-11-25T11:00"), "demo")
    with pytest.raises(InputError, match=r"continued in both places: here samples\.jsonl, on the instance labels"):
        direction(run(samples=2, labels=1), run(samples=1, labels=2), "demo")
    with pytest.raises(InputError, match=r"continued in both places: here critic/best"):
        direction(run(samples=1, critic=1), run(samples=2), "demo")


def test_the_state_of_both_sides_is_read_alike(tmp_path: Path) -> None:
    manifest = json.dumps({"created": "2026-11-25T10:00:00+00:00", "config": {}}, indent=1)
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "critic").mkdir()
    (tmp_path / "critic/a manifest").write_text("{}\n")
    for path in (tmp_path / "manifest.json", tmp_path / "critic/a manifest"):
        os.utime(path, (1000, 1000))
    listing = f"{len(manifest)} 1000.25 manifest.json\n3 1000.0000 critic/a manifest\n"
    state = transfer.parse_state(f"{listing}manifest\n{manifest}")
    assert state == transfer.local_state(tmp_path)
    assert state.files["critic/a manifest"] == FileState(3, 1000)
    assert state.created == "2026-11-25T10:00:00+00:00"
    assert transfer.parse_state("") == transfer.local_state(tmp_path / "none") == RunState()
    (tmp_path / "manifest.json").write_text("torn")
    assert transfer.local_state(tmp_path).created == "unreadable"


def test_an_inputs_path_is_its_content(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text("1")
    first = transfer.input_path(file)
    assert first.endswith("/problems.jsonl")
    file.write_text("2")
    assert transfer.input_path(file) != first
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    before = transfer.input_path(tmp_path / "model")
    (tmp_path / "model/config.json").rename(tmp_path / "model/other.json")
    assert transfer.input_path(tmp_path / "model") != before
