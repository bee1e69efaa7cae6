"""Verification beside generation: labels in the samples' order, nothing lost by a slow or dead sandbox or a kill."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal import jsonl
from fractal.generate import stage as generate_stage
from fractal.generate.engine import Completion, Request, Sampling
from fractal.jsonl import Appender, encode, part_files, read_jsonl
from fractal.records import Label, Problem, Sample, code_sha256
from fractal.rundir import RunDir
from fractal.sandbox.host.client import SandboxError
from fractal.sandbox.host.limits import Limits
from fractal.verify import labelling, outputs, overlap
from fractal.verify import stage as verify_stage
from fractal.verify.overlap import GrowingFile, Overlap
from tests.conftest import ROOT

PROBLEMS = [Problem(i, "p", "def f(x): return x", ["assert f(1) == 1"], "", "f", "test") for i in ("11", "12")]


class Stand:
    """In place of the sandbox: `pause_s` for each program, broken before the `breaks`th."""

    pause_s = 0.0
    breaks: int | None = None
    gate: Any = staticmethod(lambda: True)
    ran: list[tuple[str, int]] = []

    def __init__(self, **_: Any) -> None:
        self.image = self.image_id = "none"
        self.no_sharing = ""
        self.packages: list[str] = []
        self.checks: dict[str, Any] = {"seen": {"ok": True}}
        self.closed = threading.Event()

    def check(self) -> None: ...

    def close(self) -> None:
        self.closed.set()

    def __enter__(self) -> "Stand":
        return self

    def __exit__(self, *_: object) -> None: ...

    def verify(self, samples: Iterable[Sample], problems: Mapping[str, Problem]) -> Iterator[Label]:
        while not self.gate():
            time.sleep(0.01)
        for one in samples:
            if self.closed.wait(self.pause_s) or len(self.ran) == self.breaks:
                raise SandboxError("The engine is gone.")
            self.ran.append((one.task_id, one.sample_id))
            yield Label(one.task_id, one.sample_id, "passed", True, [], 0.1, 0.1, "", code_sha256(one.code))


class Engine:
    """Draws at once; `at` is called after the given number of samples."""

    def __init__(
        self, pause_s: float = 0.0, stop_after: int | None = None, last: Callable[[], bool] = lambda: True
    ) -> None:
        """`last`: what must hold within a minute before the last sample is drawn."""
        self.pause_s, self.stop_after, self.last = pause_s, stop_after, last

    def close(self) -> None:
        pass

    def generate(self, requests: list[Request], stopped: object = None) -> Iterator[list[Completion]]:
        for number, request in enumerate(requests):
            if number == self.stop_after:
                raise KeyboardInterrupt
            time.sleep(self.pause_s)
            deadline = time.monotonic() + 60
            while request is requests[-1] and not self.last():
                assert time.monotonic() < deadline, "no label came while samples were drawn"
                time.sleep(0.01)
            yield [Completion(request, f"def f(x):\n    return x  # {request.sample_id}", True, 5, -1.5)]


@pytest.fixture(autouse=True)
def stand(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (overlap, labelling):
        monkeypatch.setattr(module, "Sandbox", Stand)
    monkeypatch.setattr(outputs, "run", lambda *_, **__: None)  # test_outputs.py
    for name, value in (("ran", []), ("pause_s", 0.0), ("breaks", None), ("gate", lambda *_: True)):
        monkeypatch.setattr(Stand, name, value)


def draw(folder: RunDir, engine: Engine, n: int, overlap: Overlap) -> None:
    """What generate.run does once it knows what is missing."""
    path = folder.file("samples.jsonl")
    done = {(s.task_id, s.sample_id) for s in read_jsonl(path, Sample)}
    wanted = [(p.task_id, i) for p in PROBLEMS for i in range(n) if (p.task_id, i) not in done]
    requests = [Request(task_id, i, [1], 7, "text") for task_id, i in wanted]
    follower = overlap.begin()
    with folder.stage("generate", "samples.jsonl") as entry:
        generate_stage.draw(
            engine, requests, {p.task_id: p for p in PROBLEMS}, path, Sampling(n=n), "m", entry, follower
        )


def run(place: Path, engine: Engine, n: int = 100) -> dict[str, Any]:
    with RunDir(place, create=True) as folder:
        folder.set_problems(PROBLEMS)
        with Overlap(folder, Limits()) as overlap:
            draw(folder, engine, n, overlap)
        verify_stage.run(folder, Limits(), overlap)
    manifest: dict[str, Any] = json.loads((place / "manifest.json").read_bytes())
    return manifest


def keys(place: Path, name: str, kind: Any) -> list[tuple[str, int]]:
    return [(one.task_id, one.sample_id) for one in read_jsonl(place / name, kind)]


def whole(place: Path, count: int) -> None:
    """Every sample has its label, in the samples' order."""
    samples = keys(place, "samples.jsonl", Sample)
    assert len(set(samples)) == len(samples) == count
    assert keys(place, "labels.jsonl", Label) == samples


def test_labels_come_while_samples_are_drawn(tmp_path: Path) -> None:
    """The last sample waits for a label: where labels come afterwards only, it waits in vain."""
    labels = tmp_path / "r/labels.jsonl"
    manifest = run(tmp_path / "r", Engine(pause_s=0.001, last=lambda: lines(labels) > 0))
    whole(tmp_path / "r", 200)
    assert len(Stand.ran) == 200
    entry = manifest["stages"]["verify"]
    assert entry["samples"] == 200
    assert entry["hidden_seconds"] > 0
    assert manifest["images"]["sandbox"]["checks"] == {"seen": {"ok": True}}
    assert manifest["config"]["verify"]["limits"]["cpu_s"] == 4.0


def test_a_sandbox_that_stands_still_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It moves only when every sample is on disk."""
    monkeypatch.setattr(Stand, "gate", lambda *_: lines(tmp_path / "r/samples.jsonl") == 200)
    run(tmp_path / "r", Engine())
    whole(tmp_path / "r", 200)


@pytest.mark.parametrize("breaks", [0, 1, 70])
def test_a_dead_sandbox_costs_no_sample_and_is_told(
    tmp_path: Path, breaks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Stand, "breaks", breaks)
    with pytest.raises(SandboxError, match="The engine is gone"):
        run(tmp_path / "r", Engine(pause_s=0.002))
    samples = keys(tmp_path / "r", "samples.jsonl", Sample)
    assert len(samples) == 200
    assert keys(tmp_path / "r", "labels.jsonl", Label) == samples[:breaks]
    assert "verify: stopped while samples were drawn (The engine is gone.)" in capsys.readouterr().err
    monkeypatch.setattr(Stand, "breaks", None)
    with RunDir(tmp_path / "r") as folder:
        verify_stage.run(folder, Limits())
    whole(tmp_path / "r", 200)
    assert len(Stand.ran) == 200, "nothing is run twice"


def test_an_interrupt_keeps_samples_and_labels_and_both_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stand, "pause_s", 0.005)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "r", Engine(pause_s=0.001, stop_after=75))
        samples, labels = keys(tmp_path / "r", "samples.jsonl", Sample), keys(tmp_path / "r", "labels.jsonl", Label)
        assert len(labels) <= len(samples)
        assert labels == samples[: len(labels)]
    assert len(samples) == 150
    run(tmp_path / "r", Engine())
    whole(tmp_path / "r", 200)
    assert len(Stand.ran) == len(set(Stand.ran)), "nothing is run twice"


def test_what_an_earlier_call_left_is_made_good(tmp_path: Path) -> None:
    """A torn sample, a sandbox error, samples without labels, and more samples asked for."""
    run(tmp_path / "r", Engine(), n=3)
    labels = read_jsonl(tmp_path / "r/labels.jsonl", Label)
    bad = Label("11", 0, "sandbox_error", False, [], 0, 0, "lost", labels[0].code_sha256)
    (tmp_path / "r/labels.jsonl").write_bytes(b"".join(map(encode, [bad, *labels[1:4]])))
    with (tmp_path / "r/samples.jsonl").open("ab") as file:
        file.write(b'{"task_id": 11, "sam')
    run(tmp_path / "r", Engine(), n=70)
    whole(tmp_path / "r", 140)
    assert {v.status for v in read_jsonl(tmp_path / "r/labels.jsonl", Label)} == {"passed"}


def test_parts_are_verified_like_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted and continued, beside generation and alone: what a run in one file has."""
    run(tmp_path / "one", Engine())
    monkeypatch.setattr(jsonl, "PART_BYTES", 2000)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", Engine(stop_after=75))
    with part_files(tmp_path / "r/samples.jsonl")[-1].open("ab") as file:
        file.write(b'{"task_id": 11, "sam')
    run(tmp_path / "r", Engine())
    assert len(part_files(tmp_path / "r/samples.jsonl")) > 10
    whole(tmp_path / "r", 200)
    assert keys(tmp_path / "r", "samples.jsonl", Sample) == keys(tmp_path / "one", "samples.jsonl", Sample)
    labels = (tmp_path / "r/labels.jsonl").read_bytes()
    assert labels == (tmp_path / "one/labels.jsonl").read_bytes()
    (tmp_path / "r/labels.jsonl").unlink()
    with RunDir(tmp_path / "r") as folder:
        verify_stage.run(folder, Limits())
    assert (tmp_path / "r/labels.jsonl").read_bytes() == labels


@settings(deadline=None)
@given(st.data())
def test_a_growing_file_is_read_whole_line_by_whole_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("grows") / "samples.jsonl"
    skip, part_bytes = data.draw(st.integers(0, 5)), data.draw(st.sampled_from([1, 300, 1000]))
    growing, found, written = GrowingFile(path, skip), [], []
    assert growing.read(0, 9) == []
    for _ in range(data.draw(st.integers(1, 5))):
        more = [Sample("11", len(written) + i, "c\n", "é\ud800", "stop", 1, None, 1, "m") for i in range(data.draw(st.integers(0, 4)))]  # fmt: skip
        with Appender(path, part_bytes) as out:
            out.write(more)
        written += more
        with part_files(path)[-1].open("ab") as file:  # half a line of a writer that is at work: not yet acknowledged
            end = file.tell()
            file.write(data.draw(st.sampled_from([b"", b'{"task', encode(written[0]) if written else b""])))
        most = data.draw(st.integers(1, 3))
        while one := growing.read(len(written), most):
            assert len(one) <= most
            found += one
        with part_files(path)[-1].open("ab") as file:
            file.truncate(end)
    assert found == written[skip:]


# --- the real thing ---------------------------------------------------------------------------------------------------


def command(place: Path, stage: str, n: int) -> list[str]:
    words = [sys.executable, "-m", "fractal", "run", "--run", str(place), "--stage", stage, "--problems", "starter"]
    return [*words, "--split", "test", "--limit", "8", "--n", str(n), "--max-tokens", "48", "--temperature", "0.6"]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.model
@pytest.mark.docker
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_loses_nothing_that_was_finished(tmp_path: Path, sign: signal.Signals, small_model: Path, image: str) -> None:  # fmt: skip
    """The real engine and sandbox: stopped while both work, then each stage goes on alone."""
    place = tmp_path / "r"
    child = subprocess.Popen(command(place, "all", 40), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 400
    while child.poll() is None and not (lines(place / "labels.jsonl") and lines(place / "samples.jsonl") < 300):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before = keys(place, "samples.jsonl", Sample)
    child.send_signal(sign)
    _, said = child.communicate(timeout=120)
    if sign is not signal.SIGKILL:
        assert child.returncode == 130, said
        assert said.count("Traceback") == 0
    after = keys(place, "samples.jsonl", Sample)
    assert after[: len(before)] == before
    labels = keys(place, "labels.jsonl", Label)
    assert labels == after[: len(labels)]
    manifest = json.loads((place / "manifest.json").read_bytes())
    assert manifest["images"]["sandbox"]["digest"].startswith("sha256:")
    done = subprocess.run(command(place, "verify", 40), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert keys(place, "labels.jsonl", Label) == keys(place, "samples.jsonl", Sample)
    assert not [v for v in read_jsonl(place / "labels.jsonl", Label) if v.status == "sandbox_error"]
