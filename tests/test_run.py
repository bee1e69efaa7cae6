"""A run folder: one process at a time, one configuration, and a manifest that survives."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fractal.records import InputError
from fractal.run import RunDir


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


HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom fractal.run import RunDir\n"
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
