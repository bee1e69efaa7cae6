"""The benchmark of many samples: its options, and a smoke run."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import scale


def test_it_measures_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["scale.py", "--problems", "starter", "--samples", "1000", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    assert scale.main() == 0
    (file,) = tmp_path.glob("scale-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["there"] + row["drawn"] for row in rows][1:] == [rows[2]["there"]] * 2
    assert rows[0]["drawn"] == rows[1]["there"] > 0 == rows[2]["drawn"]
    assert all(row["seconds"] > 0 and row["cpu_s"] > 0 and row["peak_mib"] > 10 for row in rows)


def test_wrong_options_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"--samples=many": "expected numbers", "--samples=3": "at least two for each problem"}
    for option, message in wrong.items():
        monkeypatch.setattr(sys, "argv", ["scale.py", "--problems=starter", option])
        assert scale.main() == 2
        assert message in capsys.readouterr().err
