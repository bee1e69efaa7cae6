"""Whatever a kill, an edit or an older version left of the labels: the same command ends with the same file."""

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fractal.errors import InputError, RecordError
from fractal.jsonl import encode, read_jsonl, write_jsonl
from fractal.problems.sets import digest, load
from fractal.records import Label, Problem, Sample, Status, code_sha256
from fractal.report.facts import read_facts
from fractal.rundir import RunDir
from fractal.sandbox.host.limits import Limits
from fractal.verify import labelling, outputs, resume, stage

TASKS = ("11", "12", "600")
PROBLEMS = [Problem(i, "p", "def f(x): return x", ["assert f(1) == 1"], "", "f", "test") for i in TASKS]


class Stand:
    """In place of the sandbox: a label that depends on the sample only; `ran` is what it was given."""

    image = image_id = "none"
    no_sharing = ""
    packages: list[str] = []
    checks: dict[str, Any] = {}
    ran: list[tuple[str, int]] = []
    stop_after: int | None = None  # raise KeyboardInterrupt then

    def __init__(self, **_: Any) -> None: ...

    def __enter__(self) -> "Stand":
        return self

    def __exit__(self, *_: object) -> None: ...

    def verify(self, samples: Iterable[Sample], problems: Mapping[str, Problem]) -> Iterator[Label]:
        for number, one in enumerate(samples):
            if number == self.stop_after:
                raise KeyboardInterrupt
            if one.model != "reference":  # of a problem that nothing solved
                Stand.ran.append((one.task_id, one.sample_id))
            yield label(one)


def sample(task_id: str, sample_id: int, code: str = "x = 1\n") -> Sample:
    return Sample(task_id, sample_id, "", f"{code}# {task_id} {sample_id}", "stop", 0, None, None, "m")


def label(one: Sample, status: Status | None = None) -> Label:
    status = status or ("passed" if (int(one.task_id) + one.sample_id) % 3 else "failed")
    return Label(one.task_id, one.sample_id, status, status == "passed", [], 0.5, 0.25, "", code_sha256(one.code))


@pytest.fixture(autouse=True)
def stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "Sandbox", Stand)
    monkeypatch.setattr(outputs, "run", lambda *_, **__: None)  # test_outputs.py
    monkeypatch.setattr(Stand, "ran", [])
    monkeypatch.setattr(Stand, "stop_after", None)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "p", PROBLEMS)
    return tmp_path


def run(place: Path, samples: list[Sample] | None = None) -> bytes:
    if samples is not None:
        write_jsonl(place / "s", samples)
    Stand.ran = []
    stage.run_files(place / "p", place / "s", place / "labels.jsonl", Limits())
    assert {p.name for p in place.iterdir()} == {"p", "s", "labels.jsonl"}, "nothing else is left"
    return (place / "labels.jsonl").read_bytes()


keys = st.lists(st.tuples(st.sampled_from(TASKS), st.integers(0, 6)), min_size=1, max_size=12, unique=True)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(keys, st.data())
def test_any_prefix_with_a_torn_end_is_continued(place: Path, ids: list[tuple[str, int]], data: st.DataObject) -> None:
    (place / "labels.jsonl").unlink(missing_ok=True)
    samples = [sample(*one) for one in ids]
    whole = run(place, samples)
    assert whole == b"".join(encode(label(one)) for one in samples), "in the order of the samples, each once"
    cut = data.draw(st.integers(0, len(whole)))
    (place / "labels.jsonl").write_bytes(whole[:cut])
    assert run(place) == whole
    assert ids[whole[:cut].count(b"\n") :] == Stand.ran


@quick
@given(keys, st.data())
def test_gaps_faults_and_disorder_end_in_the_same_file(
    place: Path, ids: list[tuple[str, int]], data: st.DataObject
) -> None:
    """Labels missing anywhere, sandbox errors, the lines in any order."""
    samples = [sample(*one) for one in ids]
    kinds = data.draw(st.lists(st.sampled_from(["kept", "fault", "gap"]), min_size=len(ids), max_size=len(ids)))
    left = [
        label(s, "sandbox_error" if k == "fault" else None) for s, k in zip(samples, kinds, strict=True) if k != "gap"
    ]
    if data.draw(st.booleans()):
        random.Random(data.draw(st.integers(0, 99))).shuffle(left)
    write_jsonl(place / "labels.jsonl", left)
    if data.draw(st.booleans()):  # as an earlier version left it
        (place / "labels.jsonl.redo").write_bytes(b'{"task_id": 11')
    else:
        assert not (place / "labels.jsonl.redo").exists()
    fresh = [key for key, kind in zip(ids, kinds, strict=True) if kind != "kept"]
    assert run(place, samples) == b"".join(encode(label(one)) for one in samples)
    assert fresh == Stand.ran, "only what has no verdict is run"


@pytest.mark.parametrize("stop", range(7))
def test_ctrl_c_at_any_sample_keeps_what_is_done(place: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample("11", i) for i in range(6)]
    write_jsonl(place / "s", samples)
    write_jsonl(place / "labels.jsonl", [label(one, "sandbox_error") for one in samples[:3]])
    monkeypatch.setattr(Stand, "stop_after", stop)
    try:
        stage.run_files(place / "p", place / "s", place / "labels.jsonl", Limits())
    except KeyboardInterrupt:
        assert len(read_jsonl(place / "labels.jsonl", Label)) >= 3
    first = set(Stand.ran)
    monkeypatch.setattr(Stand, "stop_after", None)
    assert run(place) == b"".join(encode(label(one)) for one in samples)
    assert not first & set(Stand.ran), "nothing is run twice"


def test_a_finished_file_is_not_touched(place: Path) -> None:
    run(place, [sample("11", i) for i in range(3)])
    before = (place / "labels.jsonl").stat()
    run(place)
    assert (place / "labels.jsonl").stat().st_mtime_ns == before.st_mtime_ns
    assert Stand.ran == []


def test_more_samples_are_added_behind(place: Path) -> None:
    first = run(place, [sample("11", 0), sample("12", 0)])
    second = run(place, [sample("11", 0), sample("12", 0), sample("11", 1)])
    assert second == first + encode(label(sample("11", 1)))


def refused(place: Path, samples: list[Sample], left: list[Label]) -> str:
    write_jsonl(place / "labels.jsonl", left)
    before = (place / "labels.jsonl").read_bytes()
    with pytest.raises(InputError) as caught:
        run(place, samples)
    assert (place / "labels.jsonl").read_bytes() == before
    assert {p.name for p in place.iterdir()} == {"p", "s", "labels.jsonl"}
    assert Stand.ran == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_of_other_samples_are_refused(place: Path) -> None:
    assert "sample_id 7, which is not among the samples" in refused(place, [sample("11", 0)], [label(sample("11", 7))])


def test_two_labels_of_one_sample_are_refused(place: Path) -> None:
    message = refused(place, [sample("11", 0)], [label(sample("11", 0)), label(sample("11", 0), "failed")])
    assert "line 2: task_id 11, sample_id 0 stands twice" in message


def test_labels_of_another_program_are_refused(place: Path) -> None:
    left = [label(sample("11", 0)), label(sample("11", 1, "y = 2\n"))]
    message = refused(place, [sample("11", 0), sample("11", 1)], left)
    assert "labels.jsonl: line 2: is of another program" in message
    assert left[1].code_sha256[:12] in message
    assert "task_id 11, sample_id 1" in message


def test_drafts_of_killed_calls_go(place: Path) -> None:
    (place / ".labels.jsonl.4711").write_bytes(b"half")
    write_jsonl(place / "labels.jsonl", [label(sample("11", 0), "sandbox_error")])
    run(place, [sample("11", 0)])


def test_a_bad_last_line_is_found_before_anything_is_run(place: Path) -> None:
    for bad in (sample("99", 0), sample("11", 0)):
        write_jsonl(place / "s", [*(sample("11", i) for i in range(50)), bad])
        with pytest.raises(RecordError, match="s: line 51: "):
            stage.run_files(place / "p", place / "s", place / "labels.jsonl", Limits())
        assert Stand.ran == []
        assert {p.name for p in place.iterdir()} == {"p", "s"}


@pytest.mark.parametrize("name", ["p", "s", "link", "hard", "labels.jsonl.gz", "pipe"])
def test_an_output_that_is_something_else_is_refused(place: Path, name: str) -> None:
    import os

    write_jsonl(place / "s", [sample("11", 0)])
    (place / "link").symlink_to("s")
    os.link(place / "p", place / "hard")
    os.mkfifo(place / "pipe")
    before = (place / "s").read_bytes(), (place / "p").read_bytes()
    with pytest.raises(InputError, match="--out"):
        stage.run_files(place / "p", place / "s", place / name, Limits())
    assert ((place / "s").read_bytes(), (place / "p").read_bytes()) == before
    with pytest.raises(InputError, match="samples are read twice"):
        stage.run_files(place / "p", place / "pipe", place / "out", Limits())


def test_plan_counts(place: Path) -> None:
    from fractal.generate.sample_files import FileSample

    samples = [FileSample(sample("11", i)) for i in range(5)]
    write_jsonl(place / "l", [label(sample("11", 0)), label(sample("11", 2), "sandbox_error"), label(sample("11", 3))])
    plan = resume.compare(samples, place / "l")
    assert plan == resume.Plan(samples=5, redo=2, end=4)
    assert plan is not None
    assert plan.todo == 3
    assert [s.sample_id for s in resume.without_verdict(samples, place / "l", 4)] == [1, 2]
    assert [s.sample_id for s in resume.without_label(samples, 4)] == [4]


def test_a_run_folder_is_labelled_the_same_way(tmp_path: Path) -> None:
    """Its samples may have a torn last line (a killed generation), and are of our own schema only."""
    samples = [sample("11", i) for i in range(4)]
    with RunDir(tmp_path / "r", create=True) as folder:
        folder.set_problems(PROBLEMS)
        with pytest.raises(InputError, match="has no samples yet"):
            stage.run(folder, Limits())
        path = folder.file("samples.jsonl")
        path.write_bytes(b"".join(map(encode, samples)) + b'{"task_id": 11')
        assert stage.run(folder, Limits()).statuses == {"passed": 3, "failed": 1}
        assert read_jsonl(folder.file("labels.jsonl"), Label) == [label(one) for one in samples]
        assert folder.manifest["stages"]["verify"]["samples"] == 4
        assert stage.run(folder, Limits()).total == 4
        assert len(Stand.ran) == 4
        for bad, words in (
            (encode({"task_id": 11, "solution": ""}), "not a Sample"),
            (encode(sample("99", 0)), "task_id"),
        ):
            path.write_bytes(encode(samples[0]) + bad)
            with pytest.raises(RecordError, match=rf"samples\.jsonl: line 2: .*{words}"):
                stage.run(folder, Limits())


def test_a_run_folder_with_integers_for_names_is_continued(tmp_path: Path) -> None:
    """As all were until 2026-11-30. Its problem set is known by the digest that it had, labels and samples are kept."""
    problems = load("starter", "test", 3)
    assert problems.digest == "81eaedc3c554183bacdef6b160f4cf6ea2508a5f318d3e8449cbf29155c0ccb4"  # of that version
    samples = [sample(problem.task_id, i) for problem in problems.problems for i in range(2)]
    with RunDir(tmp_path / "r", create=True) as folder:
        for name, records in (
            ("problems", problems.problems),
            ("samples", samples),
            ("labels", map(label, samples[:3])),
        ):
            lines = b"".join(map(encode, records))
            folder.file(f"{name}.jsonl").write_bytes(re.sub(rb'"task_id":"(\d+)"', rb'"task_id":\1', lines))
        assert digest(list(folder.problems().values())) == problems.digest
        assert stage.run(folder, Limits()).total == 6
        assert Stand.ran == [(one.task_id, one.sample_id) for one in samples[3:]]
        assert read_jsonl(folder.file("labels.jsonl"), Label) == [label(one) for one in samples]
        assert folder.file("labels.jsonl").read_bytes().count(b'"task_id":"') == 3, "the first three are as they were"
        folder.file("labels.jsonl").write_bytes(
            folder.file("labels.jsonl").read_bytes().replace(b':"passed"', b':"sandbox_error"', 1)
        )
        assert stage.run(folder, Limits()).total == 6


def test_the_manifest_counts_the_labels_of_each_image_and_the_report_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another image labels the rest, after a Ctrl-C; then everything is there. An earlier version noted one image."""
    samples = [sample("11", i) for i in range(9)]
    with RunDir(tmp_path / "r", create=True) as folder:
        folder.set_problems(PROBLEMS)
        write_jsonl(folder.file("samples.jsonl"), samples)
        for image, stop in (("a", 4), ("b", 0), ("c", None)):
            monkeypatch.setattr(Stand, "image", image)
            monkeypatch.setattr(Stand, "image_id", f"sha256:{image}")
            monkeypatch.setattr(Stand, "stop_after", stop)
            try:
                stage.run(folder, Limits())
            except KeyboardInterrupt:
                continue
        noted = folder.manifest["images"]["sandbox"]
        counts = [(entry["name"], entry["labels"]) for entry in noted["labelled_by"]]
        assert counts == [("a", 4), ("c", 5)], "b has labelled nothing"
        assert (noted["name"], noted["digest"]) == ("c", "sha256:c")
        (warning,) = read_facts(folder).warnings
        assert warning.endswith("from 2 sandbox images, which may judge differently: a (sha256:a): 4, c (sha256:c): 5.")
        del noted["labelled_by"]
        stage.run(folder, Limits())
        assert list(read_facts(folder).warnings) == []
        write_jsonl(folder.file("samples.jsonl"), [*samples, sample("11", 9)])
        monkeypatch.setattr(Stand, "image", "d")
        stage.run(folder, Limits())
        counts = [(entry["name"], entry["labels"]) for entry in folder.manifest["images"]["sandbox"]["labelled_by"]]
        assert counts == [("c", 9), ("d", 1)]


def test_programs_that_cannot_share_a_process_are_announced(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Stand, "no_sharing", "the byte code of cpython 3.99 is not known, only that of CPython 3.11")
    run(place, [sample("11", 0), sample("11", 1)])
    assert capsys.readouterr().err.count("cpython 3.99") == 1
