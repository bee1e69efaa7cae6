"""A run folder: one process at a time, one configuration, and a manifest that survives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fractal.errors import InputError, OutsideError, RecordError
from fractal.records import Problem
from fractal.rundir import RunDir


def test_another_configuration_is_refused_by_the_field_that_differs(tmp_path: Path) -> None:
    with RunDir(tmp_path / "r", create=True) as folder:
        folder.configure("generate", {"model": "a", "seed": 0, "n": 4}, free=("n",))
    with RunDir(tmp_path / "r") as folder:
        folder.configure("generate", {"model": "a", "seed": 0, "n": 9}, free=("n",))
        with pytest.raises(InputError, match='model is "a", you ask for "b"'):
            folder.configure("generate", {"model": "b", "seed": 0, "n": 9}, free=("n",))
        assert folder.manifest["config"]["generate"] == {"model": "a", "seed": 0, "n": 9}


def test_the_manifest_says_what_the_run_was_made_with(tmp_path: Path) -> None:
    with RunDir(tmp_path / "r", create=True) as folder:
        assert folder.manifest["lock_sha256"]
        assert folder.manifest["packages"]["numpy"]
        assert {"git_commit", "git_dirty", "host", "gpu", "price_usd_per_hour", "cost_usd"} <= folder.manifest.keys()


@pytest.mark.parametrize(("make", "complaint"), [("file", "is a file"), ("strange", "holds no manifest"), ("none", "no run is there")])  # fmt: skip
def test_what_is_no_run_folder_is_refused(tmp_path: Path, make: str, complaint: str) -> None:
    path = tmp_path / "r"
    if make == "file":
        path.write_text("x")
    elif make == "strange":
        path.mkdir()
        (path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=complaint):
        RunDir(path, create=make != "none")
    assert (
        sorted(p.name for p in tmp_path.rglob("*")) == {"file": ["r"], "strange": ["r", "thesis.tex"], "none": []}[make]
    )


def test_a_damaged_manifest_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"config": ')
    with pytest.raises(InputError, match=r"manifest\.json: not a manifest"), RunDir(tmp_path):
        pass
    assert (tmp_path / "manifest.json").read_text() == '{"config": '


PROBLEM = Problem(1, "Add.", "def f(a, b):\n    return a + b\n", ["assert f(1, 2) == 3"], "", "f", "train")
HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom fractal.rundir import RunDir\n"
    "with RunDir(Path(sys.argv[1]), create=True) as folder:\n"
    "    with folder.stage('generate', 'samples.jsonl'):\n"
    "        (folder.path / 'samples.jsonl').write_text('')\n        print('held', flush=True)\n        time.sleep(60)\n"
)


def test_a_second_process_is_refused_and_a_killed_one_frees_the_run(tmp_path: Path) -> None:
    path = tmp_path / "r"
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="another fractal process"), RunDir(path):
        pass
    time.sleep(0.2)
    (path / "samples.jsonl").write_text("more\n")
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with RunDir(path) as folder:
        assert folder.manifest["stages"]["generate"]["seconds"] == 0.0
        with folder.stage("generate", "samples.jsonl"):
            pass
        assert folder.manifest["stages"]["generate"]["seconds"] >= 0.2  # what the killed call did counts


def test_seconds_add_up_and_the_log_keeps_what_was_said(tmp_path: Path) -> None:
    from fractal import console

    with RunDir(tmp_path / "r", create=True) as folder:
        for _ in range(2):
            with folder.stage("verify", "labels.jsonl") as entry:
                console.say("verify: [3] of 5")
                time.sleep(0.05)
        assert entry["seconds"] >= 0.1
    assert (tmp_path / "r/logs/verify.log").read_text().count("verify: [3] of 5") == 2


@pytest.fixture
def run(tmp_path):
    """A run folder that has been made."""
    with RunDir(tmp_path / "run", create=True) as folder:
        folder.configure("generate", {"model": "m", "n": 4, "top_p": 1.0, "stop": ("a", "b")})
        folder.set_problems([PROBLEM])
    return folder.path


def manifest(run):
    return json.loads((run / "manifest.json").read_bytes())


def test_a_start_that_came_to_nothing_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="wrong"), RunDir(tmp_path / "run", create=True):
        raise InputError("wrong")
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_came_to_nothing_takes_no_files_away(tmp_path):
    with pytest.raises(InputError, match="wrong"), RunDir(tmp_path / "run", create=True) as folder:
        folder.file("notes.txt").touch()
        raise InputError("wrong")
    assert folder.file("notes.txt").exists()
    (tmp_path / "mine").mkdir()
    with RunDir(tmp_path / "mine", create=True):
        pass
    assert (tmp_path / "mine").exists(), "an empty folder of the user's stays"


def test_a_start_killed_at_its_first_write_is_no_obstacle(tmp_path):
    (tmp_path / "run" / "logs").mkdir(parents=True)
    for name in (".lock", ".manifest.json.4711"):
        (tmp_path / "run" / name).touch()
    with RunDir(tmp_path / "run", create=True) as folder:
        folder.save()
    with RunDir(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"config": {}}', '{"config": 1, "stages": {}, "images": {}}', "\xff"]
)
def test_a_damaged_manifest_is_named(run, text):
    (run / "manifest.json").write_bytes(text.encode("latin-1"))
    for _ in range(2):  # and the lock is free again
        with pytest.raises(RecordError, match=r"manifest\.json: not a manifest"), RunDir(run):
            pass
    assert (run / "problems.jsonl").exists()


def test_another_configuration_is_refused_by_field(run):
    before = (run / "manifest.json").read_bytes()
    with RunDir(run) as folder:
        folder.configure("generate", {"model": "m", "n": 4, "top_p": 1.0, "stop": ["a", "b"]})
        with pytest.raises(InputError) as caught:
            folder.configure("generate", {"model": "other", "n": 4, "top_p": 0.9, "stop": ["a", "b"]})
        with pytest.raises(InputError, match="stop"):
            folder.configure("generate", {"model": "m", "n": 4, "top_p": 1.0})
        with pytest.raises(InputError, match="extra is null, you ask for"):
            folder.configure("generate", {"model": "m", "n": 4, "top_p": 1.0, "stop": ["a", "b"], "extra": "x" * 999})
    message = str(caught.value)
    assert 'model is "m", you ask for "other"' in message
    assert "top_p is 1.0, you ask for 0.9" in message
    assert "n is" not in message
    assert (run / "manifest.json").read_bytes() == before


def test_the_problems_stay(run):
    with RunDir(run) as folder:
        folder.set_problems([])
        assert folder.problems() == {1: PROBLEM}
        folder.file("problems.jsonl").unlink()
        with pytest.raises(InputError, match="has no problems yet"):
            folder.problems()


def test_a_digest_tells_a_change(run):
    with RunDir(run) as folder:
        seen = {folder.digest("problems.jsonl", "scores.jsonl")}
        for text in ("", "1", "2"):
            folder.file("scores.jsonl").write_text(text)
            seen.add(folder.digest("problems.jsonl", "scores.jsonl"))
    assert len(seen) == 3, "a missing file is as an empty one"


def test_the_lock_keeps_out_its_own_process(run):
    with RunDir(run), pytest.raises(InputError, match="another fractal process"), RunDir(run):
        pass
    with RunDir(run):
        pass


def test_a_failed_stage_is_timed_too(run):
    with RunDir(run) as folder, pytest.raises(OutsideError), folder.stage("verify", "labels.jsonl"):
        raise OutsideError("no Docker")
    assert manifest(run)["stages"]["verify"]["running_since"] is None
    assert (run / "logs" / "verify.log").exists()


@pytest.mark.parametrize(("worked_s", "counted_s"), [(100, 100), (-100, 0), (None, 0)])
def test_a_killed_call_counts_up_to_its_last_write(run, worked_s, counted_s):
    begun = time.time() - 1000
    with RunDir(run) as folder:
        folder.manifest["stages"]["verify"] = {"seconds": 5.0, "start": "then", "running_since": begun}
        folder.save()
        if worked_s is not None:
            folder.file("labels.jsonl").touch()
            os.utime(folder.file("labels.jsonl"), (begun + worked_s,) * 2)
    with RunDir(run) as folder, folder.stage("verify", "labels.jsonl"):
        pass
    assert manifest(run)["stages"]["verify"]["seconds"] == pytest.approx(5 + counted_s, abs=2)


def test_a_rented_machines_price_and_the_stages_cost_are_in_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRACTAL_PRICE_USD_PER_HOUR", "3600")  # a dollar a second
    with RunDir(tmp_path / "run", create=True) as run:
        for _ in range(2):
            with run.stage("verify", "labels.jsonl"):
                time.sleep(0.05)
        assert run.manifest["price_usd_per_hour"] == 3600
        assert 0.1 <= run.manifest["cost_usd"] < 5
    monkeypatch.setenv("FRACTAL_PRICE_USD_PER_HOUR", "")
    with RunDir(tmp_path / "own", create=True) as run, run.stage("verify", "labels.jsonl"):
        pass
    assert json.loads((tmp_path / "own/manifest.json").read_text())["cost_usd"] is None
