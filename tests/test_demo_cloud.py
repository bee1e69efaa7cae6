"""`invoke demo-cloud`: the one command, from nothing rented to a report at home, equal to a run without any cloud."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fractal.jsonl import read_jsonl
from fractal.records import Label, Sample
from tests.conftest import ROOT


@pytest.mark.docker
@pytest.mark.cloud
@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_chain_on_a_simulated_instance_gives_what_a_local_run_gives(tmp_path: Path) -> None:
    folders = [tmp_path / "cloud", tmp_path / "local"]
    words = ["--limit=2", "-n", "2"]
    chain = [sys.executable, "-m", "invoke", "demo-cloud", *words, f"--run={folders[0]}"]
    done = subprocess.run(chain, cwd=ROOT, text=True, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "digests equal" in done.stderr
    assert "1 launched, 0 still alive as the cloud sees it" in done.stderr
    assert (folders[0] / "report/index.html").stat().st_size > 10_000
    assert list((folders[0] / "logs").glob("all-*.log"))

    local = [
        "run",
        "--where=here",
        "--image=pipeline-cpu",
        "--problems=starter",
        "--more=--temperature 0.6 --max-tokens 160",
    ]
    subprocess.run([sys.executable, "-m", "invoke", *local, *words, f"--run={folders[1]}"], cwd=ROOT, check=True)
    samples = [read_jsonl(folder / "samples.jsonl", Sample) for folder in folders]
    assert [(one.task_id, one.sample_id, one.completion) for one in samples[0]] == [
        (one.task_id, one.sample_id, one.completion) for one in samples[1]
    ]
    labels = [read_jsonl(folder / "labels.jsonl", Label) for folder in folders]
    assert len(labels[0]) == 12
    assert [(one.task_id, one.sample_id, one.status, one.tests) for one in labels[0]] == [
        (one.task_id, one.sample_id, one.status, one.tests) for one in labels[1]
    ]
    manifest = json.loads((folders[0] / "manifest.json").read_text())
    assert manifest["price_usd_per_hour"] == 0.75
    assert 0 < manifest["cost_usd"] < 0.75
    assert manifest["images"].keys() >= {"pipeline", "sandbox"}
    shutil.rmtree(folders[0])
