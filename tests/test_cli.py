"""Bad input by hand: one line, the right exit code, no traceback, nothing half-written."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, until

PROBLEM = {"task_id": 11, "text": "Double.", "code": "def f(x): return 2 * x", "test_list": ["assert f(1) == 2"]}
SAMPLE = {"task_id": 11, "solution": "def f(x): return 2 * x"}


def fractal(*words: object, cwd: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FRACTAL_CACHE": str(cwd / ".cache"), "FRACTAL_SOCKET": "", **environ}
    command = [sys.executable, "-m", "fractal", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def model(path: Path, *names: str) -> str:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    return str(path)


def verify(d: Path, problems: object = "p", samples: object = "s") -> list[object]:
    return ["verify", "--problems", problems, "--samples", samples, "--out", "labels.jsonl"]


def generate(*more: object) -> list[object]:
    return ["generate", "--run", "r", "--problems", "starter", *more]


Case = tuple[Callable[[Path], list[object]], int, str]
CASES: dict[str, Case] = {
    "missing problems file": (lambda d: ["generate", "--run", "r", "--problems", "none.jsonl"], 2, "none.jsonl: no such file"),
    "folder instead of file": (lambda d: ["generate", "--run", "r", "--problems", "."], 2, "is a folder"),
    "empty file": (lambda d: verify(d, lines(d / "p")), 2, "is empty"),
    "broken line": (lambda d: ((d / "p").write_text(json.dumps(PROBLEM) + '\n{"task_id": 12, '), verify(d))[1], 2, "p: line 2"),
    "missing field": (lambda d: verify(d, lines(d / "p", {k: v for k, v in PROBLEM.items() if k != "code"})), 2, "field code is missing"),
    "wrong type": (lambda d: verify(d, lines(d / "p", {**PROBLEM, "task_id": "x"})), 2, "line 1: field task_id"),
    "duplicate problem": (lambda d: verify(d, lines(d / "p", PROBLEM, PROBLEM)), 2, "line 2: task_id 11 stands already"),
    "unknown problem": (lambda d: verify(d, lines(d / "p", PROBLEM), lines(d / "s", {**SAMPLE, "task_id": 5})), 2, "s: line 1"),
    "duplicate sample": (lambda d: verify(d, lines(d / "p", PROBLEM), lines(d / "s", *[{**SAMPLE, "sample_id": 3}] * 2)), 2, "stands twice"),
    "empty samples": (lambda d: verify(d, lines(d / "p", PROBLEM), lines(d / "s")), 2, "s: is empty"),
    "out is a folder": (lambda d: (lines(d / "p", PROBLEM), lines(d / "s", SAMPLE), (d / "labels.jsonl").mkdir(), verify(d))[3], 2, "is a folder"),
    "no sidecar": (lambda d: [*verify(d, lines(d / "p", PROBLEM), lines(d / "s", SAMPLE)), "--socket", "none"], 3, "no sandbox listens there"),
    "slots of a sidecar": (lambda d: [*verify(d, lines(d / "p", PROBLEM), lines(d / "s", SAMPLE)), "--socket", "none", "--slots", 2], 2, "give them to `fractal serve`"),
    "unknown split": (lambda d: generate("--split", "dev"), 2, "unknown split dev"),
    "n of 0": (lambda d: generate("--n", 0), 2, "--n 0: must be at least 1"),
    "negative temperature": (lambda d: generate("--temperature", -1), 2, "--temperature -1"),
    "unknown backend": (lambda d: generate("--backend", "magic"), 2, "--backend magic: unknown"),
    "model folder without weights": (lambda d: generate("--model", model(d / "m", "config.json", "tokenizer.json")), 2, "has no weights"),
    "model without chat template": (lambda d: generate("--model", model(d / "m", "config.json", "tokenizer.json", "model.safetensors")), 2, "has no chat template"),
    "no such model folder": (lambda d: generate("--model", "./nothing"), 2, "no such folder"),
    "no run": (lambda d: ["verify", "--run", "r"], 2, "no run is there"),
    "a file as run": (lambda d: (lines(d / "r", 1), ["report", "--run", "r"])[1], 2, "is a file"),
    "unknown mode": (lambda d: ["train", "--run", "r", "--mode", "magic"], 2, "no run is there"),
    "verify without a word": (lambda d: ["verify"], 2, "give either --run RUN"),
    "limits out of range": (lambda d: ["verify", "--run", "r", "--cpu", "0"], 2, "limits out of range"),
    "no slot": (lambda d: [*verify(d), "--slots", 0], 2, "--slots 0: must be from 1 to 500"),
    "memory of a mite": (lambda d: [*verify(d), "--memory", 8], 2, "--memory 8: limits out of range"),
    "out is the samples": (lambda d: ["verify", "--problems", "p", "--samples", "s", "--out", lines(d / "s", SAMPLE)], 2, "is the file given as --samples"),
    "convert without a word": (lambda d: ["convert", "--problems", "p", "--out", "o"], 2, "give either --to FORM"),
    "convert what is not there": (lambda d: ["convert", "--problems", "p", "--out", "o", "--from", "evalplus", "--results", "r"], 2, "p: no such file"),
    "critic that is none": (lambda d: ["score", "--run", "r", "--critic", "x"], 2, "no run is there"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_an_exit_code(tmp_path: Path, name: str) -> None:
    make, code, words = CASES[name]
    command = make(tmp_path)
    before = {p for p in tmp_path.rglob("*") if ".cache" not in p.parts}
    done = fractal(*command, cwd=tmp_path)
    # In the CUDA image without a GPU a warning comes first.
    said = [line for line in done.stderr.splitlines() if not line.startswith("generate: transformers decodes")]
    assert (done.returncode, len(said)) == (code, 1), done.stderr
    assert said[0].startswith("fractal: ")
    assert words in said[0]
    left = {p for p in tmp_path.rglob("*") if ".cache" not in p.parts} - before
    assert {p.name for p in left} <= {"r", ".lock"}


def test_no_docker_is_something_outside(tmp_path: Path) -> None:
    lines(tmp_path / "p", PROBLEM)
    lines(tmp_path / "s", SAMPLE)
    done = fractal(*verify(tmp_path), cwd=tmp_path, DOCKER_HOST="unix:///nowhere/docker.sock")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert "Docker" in done.stderr
    assert not (tmp_path / "labels.jsonl").exists()


def test_all_stages_ask_for_docker_before_they_generate(tmp_path: Path) -> None:
    done = fractal(
        "run", "--run", "r", "--problems", "starter", cwd=tmp_path, DOCKER_HOST="unix:///nowhere/docker.sock"
    )
    assert done.returncode == 3
    assert not (tmp_path / "r/samples.jsonl").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become a user without Docker's permission")
def test_docker_without_permission_says_which_group(tmp_path: Path) -> None:
    from fractal.install import docker_engine

    if docker_engine.problem():
        pytest.skip("no engine to be refused by")
    words = docker_engine.advice("forbidden", "unix:///var/run/docker.sock", docker_engine.this_machine())
    assert "docker" in words
    assert "\n" not in words


@pytest.mark.parametrize("words", [["--nonsense"], ["verify", "--nonsense"], ["run", "--run", "r", "--stage", "x"], ["nothing"], ["generate", "--run", "r", "--n", "many"]])  # fmt: skip
def test_wrong_usage_is_exit_2_without_a_traceback(tmp_path: Path, words: list[str]) -> None:
    done = fractal(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("command", [[], ["generate"], ["verify"], ["convert"], ["train"], ["score"], ["select"], ["report"], ["run"], ["doctor"]])  # fmt: skip
def test_help_teaches(tmp_path: Path, command: list[str]) -> None:
    done = fractal(*command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert len(done.stdout) > 300


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_and_130(tmp_path: Path, sign: signal.Signals) -> None:
    os.mkfifo(tmp_path / "p")  # nobody writes: the command waits for its problems
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fractal", *map(str, verify(tmp_path))]
    child = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    writers: list[int] = []

    def read() -> bool:
        with contextlib.suppress(OSError):  # ENXIO until it has opened its end
            writers.append(os.open(tmp_path / "p", os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    until(read)
    child.send_signal(sign)
    _, said = child.communicate(timeout=30)
    os.close(*writers)
    assert child.returncode == 130
    assert said.count("\n") == 1
    assert "interrupted" in said
    assert not (tmp_path / "labels.jsonl").exists()
