"""A run folder: one process at a time, one configuration, and a manifest that survives; progress on the terminal."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fractal import console
from fractal.errors import InputError, OutsideError, RecordError
from fractal.records import Problem
from fractal.rundir import RunDir

PROBLEM = Problem("1", "Add.", "def f(a, b):\n    return a + b\n", ["assert f(1, 2) == 3"], "", "f", "train")
CONFIG = {"model": "m", "n": 4, "top_p": 1.0, "stop": ("a", "b")}


@pytest.fixture
def run(tmp_path):
    """A run folder that has been made."""
    with RunDir(tmp_path / "run", create=True) as folder:
        folder.configure("generate", CONFIG)
        folder.set_problems([PROBLEM])
    return folder.path


def manifest(run):
    return json.loads((run / "manifest.json").read_bytes())


# ---- what is a run folder, and what is refused -----------------------------------------------------------------------


def test_the_manifest_says_what_the_run_was_made_with(run):
    assert manifest(run)["lock_sha256"]
    assert manifest(run)["packages"]["numpy"]
    assert {"git_commit", "git_dirty", "host", "gpu", "price_usd_per_hour", "cost_usd"} <= manifest(run).keys()
    assert manifest(run)["host"]["memory_gib"] > 0.1


def test_what_is_no_run_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for name, create, complaint in (
        ("file", True, "is a file"), ("thesis", True, "holds no manifest"), ("none", False, "no run is there"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=complaint):
            RunDir(tmp_path / name, create=create)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_manifest_is_named_and_kept(run):
    for text in ("", "{", "[]", "null", "{}", '{"config": {}}', '{"config": 1, "stages": {}, "images": {}}', "\xff"):
        (run / "manifest.json").write_bytes(text.encode("latin-1"))
        for _ in range(2):  # and the lock is free again
            with pytest.raises(RecordError, match=r"manifest\.json: not a manifest"), RunDir(run):
                pass
        assert (run / "manifest.json").read_bytes() == text.encode("latin-1")
    assert (run / "problems.jsonl").exists()


def test_a_start_that_came_to_nothing_leaves_nothing_and_takes_no_files_away(tmp_path):
    with pytest.raises(InputError, match="wrong"), RunDir(tmp_path / "run", create=True):
        raise InputError("wrong")
    assert list(tmp_path.iterdir()) == []
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


def test_another_configuration_is_refused_by_field(run):
    before = (run / "manifest.json").read_bytes()
    with RunDir(run) as folder:
        folder.configure("generate", {**CONFIG, "stop": ["a", "b"]})
        folder.configure("generate", {**CONFIG, "n": 9}, free=("n",))
        folder.configure("generate", {**CONFIG, "n": 4}, free=("n",))
        with pytest.raises(InputError) as caught:
            folder.configure("generate", {**CONFIG, "model": "other", "top_p": 0.9})
        with pytest.raises(InputError, match="stop"):
            folder.configure("generate", {name: value for name, value in CONFIG.items() if name != "stop"})
        with pytest.raises(InputError, match="extra is null, you ask for"):
            folder.configure("generate", {**CONFIG, "extra": "x" * 999})
    message = str(caught.value)
    assert 'model is "m", you ask for "other"' in message
    assert "top_p is 1.0, you ask for 0.9" in message
    assert "n is" not in message
    assert (run / "manifest.json").read_bytes() == before


def test_the_problems_stay_and_a_digest_tells_a_change(run):
    with RunDir(run) as folder:
        folder.set_problems([])
        assert folder.problems() == {"1": PROBLEM}
        digests = {folder.digest("problems.jsonl", "scores.jsonl")}
        for text in ("", "1", "2"):
            folder.file("scores.jsonl").write_text(text)
            digests.add(folder.digest("problems.jsonl", "scores.jsonl"))
        assert len(digests) == 3, "a missing file is as an empty one"
        with pytest.raises(InputError, match="has no labels yet"):
            folder.labels()
        folder.file("problems.jsonl").unlink()
        with pytest.raises(InputError, match="has no problems yet"):
            folder.problems()


# ---- the lock, and seconds -------------------------------------------------------------------------------------------

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom fractal.rundir import RunDir\n"
    "with RunDir(Path(sys.argv[1]), create=True) as folder:\n"
    "    with folder.stage('generate', 'samples.jsonl'):\n"
    "        (folder.path / 'samples.jsonl').write_text('')\n        print('held', flush=True)\n        time.sleep(60)\n"
)


def test_a_second_holder_is_refused_and_a_killed_one_frees_the_run(tmp_path):
    path = tmp_path / "r"
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
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
        with pytest.raises(InputError, match="another fractal process"), RunDir(path):
            pass  # nor twice in one process


def test_seconds_and_cost_add_up_and_the_log_keeps_what_was_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("FRACTAL_PRICE_USD_PER_HOUR", "3600")  # a dollar a second
    with RunDir(tmp_path / "r", create=True) as folder:
        for _ in range(2):
            with folder.stage("verify", "labels.jsonl") as entry:
                console.say("verify: [3] of 5")
                time.sleep(0.05)
        with pytest.raises(OutsideError), folder.stage("verify", "labels.jsonl"):
            raise OutsideError("no Docker")  # a failed stage is timed, too
        assert entry["seconds"] >= 0.1
        assert folder.manifest["price_usd_per_hour"] == 3600
        assert 0.1 <= folder.manifest["cost_usd"] < 5
    assert manifest(tmp_path / "r")["stages"]["verify"]["running_since"] is None
    assert (tmp_path / "r/logs/verify.log").read_text().count("verify: [3] of 5") == 2
    monkeypatch.setenv("FRACTAL_PRICE_USD_PER_HOUR", "")
    with RunDir(tmp_path / "own", create=True) as folder, folder.stage("verify", "labels.jsonl"):
        pass
    assert manifest(tmp_path / "own")["cost_usd"] is None


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


# ---- progress --------------------------------------------------------------------------------------------------------


def test_progress_lines_without_a_terminal_from_before_the_first_batch_on(monkeypatch, capsys):
    """Interrupted before anything was done, after ten seconds, there is no time per item yet."""
    bar = console.Bar("verify", 8)
    begin = time.monotonic()
    for elapsed_s, count, note in ((11.0, 0, "interrupted"), (22.0, 2, ""), (23.0, 2, "")):
        monkeypatch.setattr(bar, "_begin", begin - elapsed_s)
        bar.advance(count, note)
    assert capsys.readouterr().err.splitlines() == [
        "verify: 0/8, 11 s, interrupted",
        "verify: 2/8, 22 s, about 66 s left",
    ]


def test_a_task_s_errors_are_a_line_and_an_exit_code(capsys):
    handler = signal.getsignal(signal.SIGTERM)

    def fail(error):
        raise error

    cases = {InputError("a"): 2, OutsideError("b"): 3, KeyboardInterrupt(): 130}
    assert [console.report_errors(lambda error=error: fail(error), "task") for error in cases] == [2, 3, 130]
    assert (console.report_errors(lambda: 7), console.report_errors(lambda: None)) == (7, 0)
    signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().err.splitlines()[:2] == ["task: a", "task: b"]
