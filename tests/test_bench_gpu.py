"""The table of a GPU: what it says of figures, and that it wants a GPU. Its parts have tests of their own."""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu as bench
from fractal.install import gpu


def row(contestant: str, rate: float, busy: float | None) -> dict[str, Any]:
    return {"contestant": contestant, "samples_per_s": rate, "tokens_per_s": 70 * rate, "busy": busy}


VALUES: dict[str, Any] = {
    "start_s": {"cold": 161.4, "warm": 38.2},
    "generate": {
        "rows": [row("bare", 200.0, 0.41), row("ours", 362.4, 0.97)],
        "ratios": [{"name": "ours to bare", "median": 1.812, "min": 1.8, "max": 1.9, "target": ""}],
        "same_samples": 0.973,
    },
    "several": {"2": {"rows": [row("several", 453.0, None)]}},
    "critic": {
        "rates": {"lora": 310.0, "vllm": 2100.0},
        "seconds": {"lora": 26.0, "vllm": 6.1},
        "start_s": {"lora": 9.0, "vllm": 41.0},
        "flops_per_s": {"lora": 1.2e14},
        "utilisation": {"lora": 0.385},
    },
}


def test_an_entry_for_the_log_has_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "usable", lambda: True)
    text = bench.entry(bench.Plan(), VALUES, {"commit": "abc1234"}, "an NVIDIA A100-SXM4-80GB", "2026-12-01")
    assert text.startswith(
        "## 2026-12-01: generation and critic on an NVIDIA A100-SXM4-80GB\nSetup    Qwen/Qwen2.5-Coder-1.5B"
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Result start with empty caches 161 s, again 38 s" in lines
    assert "our vLLM engine 362.4 4.00 25,368 97%" in lines  # samples/s, of the mission's 90.6, tokens/s, busy
    assert "the stage on several engines (2) 453.0 5.00 31,710 -" in lines
    assert "ours to bare 1.812 1.800 to 1.900" in lines
    assert any("the same text for 97.3% of the samples. On a GPU" in line for line in lines)
    assert "training epoch, LoRA 310.0 26.0 9.0 120.00 38%" in lines
    assert "vLLM, pooling with prefix cache 2,100.0 6.1 41.0" in lines
    assert text.endswith("\n")


@pytest.mark.skipif(gpu.usable(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert bench.main() == 3
    error = capsys.readouterr().err
    assert "no GPU to measure" in error
    assert "--quick" in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
