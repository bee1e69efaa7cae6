"""The critic's benchmark: its arithmetic, its options, and a smoke run with a tiny real model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import critic as bench
from benchmarks.critic import Turn
from tests.judged import tiny_qwen

SCRIPT = Path(bench.__file__)


def test_ratios_are_taken_within_a_round() -> None:
    """The machine is half as fast in round 2: the ratio stays."""
    turns = [
        Turn(1, "shared", 100, 1000, 1.0), Turn(1, "plain", 100, 1000, 2.0),
        Turn(2, "shared", 100, 1000, 2.0), Turn(2, "plain", 100, 1000, 4.0),
        Turn(2, "lora", 10, 100, 2.0, 6e9, 7.5), Turn(2, "lora-unpacked", 10, 100, 4.0, 6e9, 7.0),
    ]  # fmt: skip
    found = bench.summary(turns)
    assert found["ratios"] == {
        "ours to plain": {"median": 2.0, "low": 2.0, "high": 2.0},
        "packed to unpacked, LoRA": {"median": 2.0, "low": 2.0, "high": 2.0},
    }
    assert found["rates"]["shared"] == 75.0
    assert found["flops_per_s"] == {"lora": 3e9, "lora-unpacked": 1.5e9}
    assert found["seconds"]["lora"] == 2.0
    assert found["start_s"]["lora"] == 7.5
    used = bench.utilisation(found, 30e9)
    assert used == {"lora": 0.1, "lora-unpacked": 0.05}
    assert bench.utilisation(found, None) == {}
    assert [table.row_count for table in bench.tables(found, used)] == [4, 2]


def test_peaks_are_found_by_the_names_that_drivers_give() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A10": 125e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA GH200 480GB": 989e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA RTX A6000": 155e12,
        "Tesla V100-SXM2-16GB": None,
    }
    assert {name: bench.peak_of(name) for name in names} == names


def test_wrong_options_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"--only=shared,best": "unknown 'best'; known: shared", "--rounds=0": "must be positive"}
    for option, message in wrong.items():
        monkeypatch.setattr(sys, "argv", ["critic.py", option])
        assert bench.main() == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1


@pytest.mark.model
@pytest.mark.long
def test_a_smoke_run_measures_every_contestant(tmp_path: Path, small_model: Path) -> None:
    model = tiny_qwen(tmp_path / "tiny", small_model)
    command = [
        sys.executable,
        SCRIPT,
        "--quick",
        "--model",
        model,
        "--out",
        tmp_path,
        "--only",
        "shared,plain,cached,lora,full,lora-unpacked",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(Path(done.stdout.splitlines()[-1]).read_bytes())
    assert set(found["rates"]) == {"shared", "plain", "cached", "lora", "full", "lora-unpacked"}
    assert all(rate > 0 for rate in found["rates"].values())
    assert all(0 < start < 500 for start in found["start_s"].values())
    assert found["ratios"].keys() == {"ours to plain", "packed to unpacked, LoRA"}
    assert "Ratios within a round" in done.stdout
