"""The generator's benchmark: its arithmetic, what it refuses, and one small real run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import generate as bench
from benchmarks.generate import Turn
from tests.conftest import ROOT

STARTER = ROOT / "fractal/problems/starter.jsonl"


def turn(number: int, contestant: str, seconds: float, tokens: int = 1000, texts: tuple[int, ...] = (1, 2)) -> Turn:
    return Turn(number, contestant, 10, tokens, seconds, list(texts), 3.0 if contestant == "alone" else None)


TURNS = [
    turn(0, "bare", 1.0),  # the warm-up
    turn(1, "bare", 10.0), turn(1, "ours", 20.0), turn(1, "alone", 10.0), turn(1, "overlapped", 11.0),
    turn(2, "bare", 30.0), turn(2, "ours", 30.0), turn(2, "alone", 40.0), turn(2, "overlapped", 40.0),
    turn(3, "bare", 10.0), turn(3, "ours", 8.0), turn(3, "alone", 10.0), turn(3, "overlapped", 10.5),
]  # fmt: skip


def test_ratios_are_medians_of_what_one_round_says() -> None:
    found = bench.summary(TURNS)
    ratios = {one["name"]: one for one in found["ratios"]}
    assert ratios["ours to bare"]["rounds"] == pytest.approx([0.5, 1.0, 1.25])
    assert ratios["ours to bare"]["median"] == pytest.approx(1.0)
    hidden = ratios["verification hidden: wall time with to without"]
    assert hidden["median"] == pytest.approx(1.05)
    assert "vLLM to transformers" not in ratios
    rows = {row["contestant"]: row for row in found["rows"]}
    assert rows["bare"]["tokens_per_s"] == pytest.approx(100.0)
    assert (rows["alone"]["verify_s"], rows["ours"]["verify_s"]) == (3.0, None)
    assert found["same_samples"] == 1
    assert any(line.endswith(": yes") for line in bench.remarks(found, gpu=False))


def test_other_samples_are_told() -> None:
    """A fault on a CPU; on a GPU to be expected, and how many they are."""
    found = bench.summary([*TURNS, turn(3, "ours", 8.0, texts=(1, 3))])
    assert found["same_samples"] == 0.5
    assert any("NO, 50.0% differ" in line for line in bench.remarks(found, gpu=False))
    assert any("the same text for 50.0% of the samples. On a GPU" in line for line in bench.remarks(found, gpu=True))
    assert any("of the mission's 90.6" in line for line in bench.remarks(found, gpu=True))
    assert bench.same_samples([one for one in TURNS if one.contestant != "bare"]) is None


def run(*words: object, cwd: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks/generate.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environ}, capture_output=True, text=True, timeout=900)


BAD_INPUT: list[tuple[list[str], str]] = [
    (["--only", "ours,nobody"], "unknown 'nobody'; known: bare, "),
    (["--rounds", "0"], "must be positive"),
    (["--temperature", "-1"], "--temperature -1"),
    (["--instant", "--only", "transformers"], "--instant with --only transformers: of no use"),
    (["--problems", "none.jsonl"], "none.jsonl: no such file"),
    (["--problems", str(STARTER), "--model", "./none"], "--model ./none: no such folder"),
]


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, message in BAD_INPUT:
        monkeypatch.setattr(sys, "argv", ["generate.py", *words])
        assert bench.main() == 2, words
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.docker
@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(1000)
def test_a_quick_run_has_every_figure(image: str, small_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    done = run("--quick", "--problems", STARTER, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / done.stdout.strip().splitlines()[-1]).read_text())
    on_a_gpu = {"defaults", "several"}
    assert {row["contestant"] for row in values["rows"]} == bench.TITLES.keys() - on_a_gpu
    assert len(values["ratios"]) == sum(not {over, under} & on_a_gpu for _, over, under, _, _ in bench.RATIOS)
    assert all(row["tokens_per_s"] > 0 for row in values["rows"])
    assert values["same_samples"] == 1


@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(1000)
def test_the_host_alone_is_measured_too(small_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    done = run("--instant", "--quick", "--problems", STARTER, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / done.stdout.strip().splitlines()[-1]).read_text())
    assert {row["contestant"] for row in values["rows"]} == set(bench.INSTANT)
    assert len({row["tokens"] for row in values["rows"]}) == 1, "all draw the same"
    assert values["same_samples"] == 1
