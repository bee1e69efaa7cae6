"""A run from samples that were drawn elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from fractal.errors import InputError, RecordError
from fractal.generate import adopt
from fractal.jsonl import read_jsonl
from fractal.problems import sets
from fractal.records import Sample
from fractal.rundir import RunDir

pytestmark = pytest.mark.model


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows() -> list[dict[str, Any]]:
    found = []
    for problem in sets.load("starter", None, 1).problems:
        reply = f"Sure:\n```python\n{problem.reference}\n```\nDone."
        found += [
            {"task_id": problem.task_id, "completion": reply, "tokens": 9, "sum_logprob": -2.5, "temperature": 0.8,
             "max_tokens": 99, "seed": 4} for _ in range(2)]  # fmt: skip
    return found


def test_foreign_replies_become_a_run_with_their_parameters(tmp_path: Path, small_model: Path) -> None:
    file = written(tmp_path / "samples.jsonl", rows())
    for _ in range(2):  # the second call repeats nothing
        with RunDir(tmp_path / "run", create=True) as folder:
            adopt.run(folder, sets.load("starter"), file, str(small_model))
    found = read_jsonl(tmp_path / "run/samples.jsonl", Sample)
    assert len(found) == len(rows())
    first = found[0]
    assert (first.temperature, first.max_tokens, first.seed, first.sum_logprob) == (0.8, 99, 4, -2.5)
    assert "Sure" not in first.code
    with RunDir(tmp_path / "run") as folder:
        assert set(folder.problems()) == {row["task_id"] for row in rows()}
        config = folder.manifest["config"]["generate"]
    assert config["backend"] == "adopted"
    assert config["n"] == 2
    assert len(config["samples_sha256"]) == 64


def test_other_samples_are_another_run(tmp_path: Path, small_model: Path) -> None:
    with RunDir(tmp_path / "run", create=True) as folder:
        adopt.run(folder, sets.load("starter"), written(tmp_path / "a.jsonl", rows()), str(small_model))
        with pytest.raises(InputError, match="samples_sha256 is"):
            adopt.run(folder, sets.load("starter"), written(tmp_path / "b.jsonl", rows()[:3]), str(small_model))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"task_id": 99_999}, "line 2.*problem 99999 is not among"), ({"completion": 5}, "line 2.*expected a string")],
)
def test_a_bad_line_is_named_and_nothing_is_written(
    change: dict[str, Any], words: str, tmp_path: Path, small_model: Path
) -> None:
    bad = rows()
    bad[1] |= change
    with RunDir(tmp_path / "run", create=True) as folder, pytest.raises(RecordError, match=words):
        adopt.run(folder, sets.load("starter"), written(tmp_path / "a.jsonl", bad), str(small_model))
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_missing_or_empty_is_one_line(tmp_path: Path, small_model: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with RunDir(tmp_path / "run", create=True) as folder:
        with pytest.raises(InputError, match="no such file"):
            adopt.run(folder, sets.load("starter"), tmp_path / "none.jsonl", str(small_model))
        with pytest.raises(InputError, match="empty"):
            adopt.run(folder, sets.load("starter"), tmp_path / "empty.jsonl", str(small_model))
