"""From end to end, with the real small model and the real sandbox: killed at every stage, and done all the same."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fractal.jsonl import read_jsonl
from fractal.records import Choice, Label, Output, Problem, Sample, Score, digest_id, task_order

pytestmark = [pytest.mark.docker, pytest.mark.model, pytest.mark.long, pytest.mark.timeout(1800)]
N = 6
SIZE = ["--problems", "starter", "--limit", "8", "--n", str(N), "--temperature", "0.6", "--max-tokens", "64"]


def command(run: Path) -> list[str]:
    return [sys.executable, "-m", "fractal", "run", "--run", str(run), "--stage", "all", *SIZE]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "generate": lambda run: lines(run / "samples.jsonl") >= 3,
    "verify": lambda run: lines(run / "labels.jsonl") >= 1,
    "features": lambda run: any((run / "critic/features").glob("*.npz")),
    "epochs": lambda run: (run / "critic/epoch-1").exists(),
    "score": lambda run: (run / "critic/best").exists(),
    "report": lambda run: (run / "selection.jsonl").exists(),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, image: str, small_model: Path) -> Path:
    """A run that was killed with SIGKILL at each of MOMENTS and then left to finish."""
    run = tmp_path_factory.mktemp("runs") / "killed"
    for reached in MOMENTS.values():
        child = subprocess.Popen(command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 600
        try:
            while child.poll() is None and not reached(run):
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
    done = subprocess.run(command(run), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def test_every_sample_is_there_once_with_its_label_and_score(finished: Path) -> None:
    problems = read_jsonl(finished / "problems.jsonl", Problem)
    expected = [(p.task_id, i) for p in problems for i in range(N)]
    assert len(expected) == 24 * N
    for name, kind in (("samples", Sample), ("labels", Label), ("scores", Score)):
        found = [(one.task_id, one.sample_id) for one in read_jsonl(finished / f"{name}.jsonl", kind)]
        assert sorted(found, key=lambda key: (task_order(key[0]), key[1])) == expected, name
    labels = read_jsonl(finished / "labels.jsonl", Label)
    assert {label.passed for label in labels} == {True, False}
    assert not [label for label in labels if label.status == "sandbox_error"]


def test_choices_agree_with_the_labels(finished: Path) -> None:
    passed = {(v.task_id, v.sample_id): v.passed for v in read_jsonl(finished / "labels.jsonl", Label)}
    choices = read_jsonl(finished / "selection.jsonl", Choice)
    assert {c.strategy for c in choices} >= {"critic", "random", "first", "mean_logprob", "oracle"}
    for choice in choices:
        if choice.sample_id is not None:
            assert choice.passed == passed[choice.task_id, choice.sample_id]
        elif choice.strategy == "random":
            assert choice.passed == pytest.approx(sum(passed[choice.task_id, i] for i in range(N)) / N)
    outputs = read_jsonl(finished / "outputs.jsonl", Output)
    assert sorted((one.task_id, one.sample_id) for one in outputs) == sorted(passed)
    assert {"consensus", "visible_test", "zero_shot"} & {c.strategy for c in choices} >= {"consensus", "visible_test"}


def test_the_critic_saw_train_problems_only(finished: Path) -> None:
    """Its recorded input digest is that of the train problems' labels, recomputed here from the files."""
    import hashlib

    from fractal.jsonl import encode

    split = {p.task_id: p.split for p in read_jsonl(finished / "problems.jsonl", Problem)}
    samples = {(s.task_id, s.sample_id): s for s in read_jsonl(finished / "samples.jsonl", Sample)}
    labels = sorted(read_jsonl(finished / "labels.jsonl", Label), key=lambda v: (task_order(v.task_id), v.sample_id))
    seen = b"".join(
        encode((digest_id(v.task_id), v.sample_id, s.code, v.passed, s.sum_logprob, s.tokens))
        for v in labels
        for s in [samples[v.task_id, v.sample_id]]
        if split[v.task_id] == "train"
    )
    inputs = json.loads((finished / "critic/best/critic.json").read_bytes())["inputs"]
    assert inputs["labels_sha256"] == hashlib.sha256(seen).hexdigest()


def test_summary_and_page_hold_the_results(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_bytes())
    assert summary["problems"] == 24
    assert summary["samples"] == 24 * N
    assert sum(summary["labels"].values()) == 24 * N
    assert summary["model"] == "smollm2-135m-instruct"
    assert summary["backend"] in ("vllm", "transformers")
    assert summary["sandbox_image"]["digest"].startswith("sha256:")
    assert {"generate", "verify", "train", "score"} <= summary["seconds"].keys()
    for one in summary["strategies"].values():
        assert 0 <= one["pass_rate"]["low"] <= one["pass_rate"]["mean"] <= one["pass_rate"]["high"] <= 1
    page = (finished / "report/index.html").read_text()
    assert "smollm2-135m-instruct" in page
    assert "<svg" in page


def test_a_second_run_repeats_nothing(finished: Path) -> None:
    before = {
        p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name not in ("manifest.json", ".lock")
    }
    done = subprocess.run(command(finished), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.count("nothing to do") >= 5
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_more_samples_are_added_to_the_same_run(finished: Path) -> None:
    """Raising n keeps what is there: the first samples stay the same to the byte."""
    before = (finished / "samples.jsonl").read_bytes()
    more = [*command(finished)[:-6], "--n", str(N + 1), "--temperature", "0.6", "--max-tokens", "64"]
    more[more.index("--stage") + 1] = "generate"
    subprocess.run(more, check=True, timeout=300, capture_output=True)
    after = (finished / "samples.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 24 * (N + 1)


def test_another_temperature_is_another_run(finished: Path) -> None:
    other = [word if word != "0.6" else "0.9" for word in command(finished)]
    done = subprocess.run(other, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "temperature is 0.6, you ask for 0.9" in done.stderr
    assert done.stderr.count("\n") == 1
