"""`fractal verify` from file to file with the real sandbox: killed, interrupted, out of disk, two at once."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fractal.jsonl import encode, read_jsonl, write_jsonl
from fractal.records import Label, Problem, Sample
from tests.conftest import ROOT

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]
PROBLEMS = [Problem(str(i), "p", "def f(x):\n    return x * 2", ["assert f(1) == 2", "assert f(3) == 6"], "", "f", "test") for i in (1, 2)]  # fmt: skip
BODIES = ["return x * 2", "return x", "return 1 / 0", "import os; os._exit(0)", "return ("]
STATUSES = ["passed", "failed", "error", "crashed", "syntax_error"]
N = 400
SAMPLES = [
    Sample(str(1 + i % 2), i // 2, "", f"def f(x):  # {i}\n    __import__('time').sleep(0.004)\n    {BODIES[i % 5]}\n", "stop", 0, None, None, "m")
    for i in range(N)
]  # fmt: skip
EXPECTED = [(s.task_id, s.sample_id, STATUSES[i % 5]) for i, s in enumerate(SAMPLES)]


@pytest.fixture
def place(tmp_path: Path, image: str) -> Path:
    write_jsonl(tmp_path / "p", PROBLEMS)
    write_jsonl(tmp_path / "s", SAMPLES)
    return tmp_path


def command(place: Path, out: Path | None = None, samples: str = "s") -> list[str]:
    files = ["--problems", str(place / "p"), "--samples", str(place / samples), "--out", str(out or place / "labels")]
    files += ["--slots", "2"]  # or a machine with many processors is done before it can be killed
    return [sys.executable, "-m", "fractal", "verify", *files]


def start(words: list[str]) -> "subprocess.Popen[str]":
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(words: list[str]) -> tuple[int, str, str]:
    child = start(words)
    out, err = child.communicate(timeout=200)
    return child.returncode, out, err


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def reach(child: "subprocess.Popen[str]", path: Path, count: int) -> None:
    deadline = time.monotonic() + 100
    while child.poll() is None and lines(path) < count and time.monotonic() < deadline:
        time.sleep(0.002)
    assert child.poll() is None, child.communicate()


def found(path: Path) -> list[tuple[int, int, str]]:
    return [(v.task_id, v.sample_id, v.status) for v in read_jsonl(path, Label)]


def test_killed_at_several_moments_it_ends_the_same(place: Path) -> None:
    labels = place / "labels"
    for count in (0, 1, N // 4, N // 2):
        child = start(command(place))
        if count == 0:
            time.sleep(0.7)
        reach(child, labels, count)
        child.kill()
        child.communicate()
    assert lines(labels) < N
    code, out, err = finish(command(place))
    assert code == 0, err
    assert found(labels) == EXPECTED
    assert "400 samples (" in out, "the summary tells what this call did"
    assert {p.name for p in place.iterdir()} == {"p", "s", "labels"}


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_is_done(place: Path, sign: signal.Signals) -> None:
    labels = place / "labels"
    child = start(command(place))
    reach(child, labels, 20)
    child.send_signal(sign)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err.count("\n")) == (130, 1), err
    assert "same command goes on" in err
    done = found(labels)
    assert done == EXPECTED[: len(done)]
    assert 20 <= len(done) < N
    assert labels.read_bytes().endswith(b"\n")
    assert {p.name for p in place.iterdir()} == {"p", "s", "labels"}
    assert finish(command(place))[0] == 0
    assert found(labels) == EXPECTED


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(place: Path, tiny_disk: Path) -> None:
    labels = tiny_disk / "labels"
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(30_000))
    code, _, err = finish(command(place, labels))
    assert (code, err.count("\n")) == (3, 1), err
    assert f"{labels}: no space left on the disk" in err
    assert "run the same command again" in err
    done = found(labels)
    assert done == EXPECTED[: len(done)]
    assert 0 < len(done) < N
    assert {p.name for p in tiny_disk.iterdir()} == {"labels", "ballast"}
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", str(tiny_disk)], check=True)
    assert finish(command(place, labels))[0] == 0
    assert found(labels) == EXPECTED


def test_a_second_process_on_the_same_file_is_refused(place: Path) -> None:
    labels = place / "labels"
    child = start(command(place))
    reach(child, labels, 1)
    child.send_signal(signal.SIGSTOP)  # it holds the file for as long as the other one looks
    try:
        code, _, err = finish(command(place))
    finally:
        child.send_signal(signal.SIGCONT)
    assert (code, err.count("\n")) == (2, 1), err
    assert "another fractal process writes it" in err
    child.communicate(timeout=100)
    assert child.returncode == 0
    assert found(labels) == EXPECTED


def test_gzipped_samples_of_evalplus(place: Path) -> None:
    rows = [{"task_id": f"Mbpp/{s.task_id}", "solution": s.code} for s in SAMPLES[:40]]
    (place / "s.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    code, out, err = finish(command(place, samples="s.jsonl.gz"))
    assert (code, err) == (0, "")
    assert found(place / "labels") == EXPECTED[:40]
    assert "40 samples, 20.0 % pass, 0.0 % timeout, 0 lost" in out
    assert "2 problems: 0 solved by all their samples, 0 by none" in out
    assert "█" in out


def test_what_could_not_be_judged_is_listed_and_redone_in_place(place: Path) -> None:
    """Tests that do not compile are nobody's failure but ours; corrected, the same command gives their labels."""
    broken = Problem("2", "p", PROBLEMS[1].reference, ["assert f(1) =="], "", "f", "test")
    write_jsonl(place / "p", [PROBLEMS[0], broken])
    write_jsonl(place / "s", SAMPLES[:60])
    code, out, err = finish(command(place))
    assert code == 1
    assert "30 lost" in out
    named, *errors = err.splitlines()
    assert "1 of 2 problems cannot be solved as they are, their own reference fails: 2 (sandbox_error: " in named
    assert errors[0].startswith("sandbox_error: task_id 2, sample_id 0: ")
    assert len([line for line in errors if line.startswith("sandbox_error: ")]) == 20
    assert errors[20] == "... and 10 more"
    assert "same command tries them again" in errors[21]
    statuses = [status if task == "1" else "sandbox_error" for task, _, status in EXPECTED[:60]]
    assert [status for _, _, status in found(place / "labels")] == statuses
    before = (place / "labels").read_bytes().splitlines()[::2]
    write_jsonl(place / "p", PROBLEMS)
    write_jsonl(place / "s", SAMPLES[:64])
    code, out, err = finish(command(place))
    assert (code, err) == (0, "")
    assert "64 samples (34 now)" in out
    assert found(place / "labels") == EXPECTED[:64]
    assert (place / "labels").read_bytes().splitlines()[:60:2] == before, "labels that were good are as they were"
    assert {p.name for p in place.iterdir()} == {"p", "s", "labels"}


def test_the_label_names_the_program(place: Path) -> None:
    """The sandbox's code_sha256 is records.code_sha256: samples that changed are found out."""
    write_jsonl(place / "s", SAMPLES[:4])
    assert finish(command(place))[0] == 0
    changed = Sample("1", 0, "", "def f(x): return 3", "stop", 0, None, None, "m")
    (place / "s").write_bytes(b"".join(map(encode, [changed, *SAMPLES[1:4]])))
    code, _, err = finish(command(place))
    assert (code, err.count("\n")) == (2, 1), err
    assert "labels: line 1: is of another program" in err


def test_invoke_passes_the_limits_on(place: Path) -> None:
    files = [f"--{name}={place / path}" for name, path in (("problems", "p"), ("samples", "s"), ("out", "labels"))]
    given = ["--cpu=2", "--wall=5", "--memory=256", "--slots=1", "--no-cache"]
    words = [sys.executable, "-m", "invoke", "--dry", "verify", *files, *given]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    for word in ("--cpu 2", "--wall 5", "--memory 256", "--slots 1", "--no-cache", f"--out {place / 'labels'}"):
        assert word in done.stdout
    write_jsonl(place / "s", SAMPLES[:4])
    done = subprocess.run([w for w in words if w != "--dry"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert found(place / "labels") == EXPECTED[:4]
