"""Nothing is lost: what dies in the middle of a run, and what the labels are afterwards."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from fractal.records import Problem, Sample
from fractal.sandbox.host import engine
from fractal.sandbox.host.container import Sandbox
from tests.engines import Engine

pytestmark = [pytest.mark.docker, pytest.mark.long]
PROBLEMS = {"1": Problem("1", "", "def f(x):\n    return x\n", ["assert f(1) == 1"], "", "f", "test")}


@pytest.fixture
def own_engine(image: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    if os.geteuid() != 0:
        pytest.skip("an engine of the test's own needs root")
    folder = Path("/var/tmp") / f"fractal-engine-{os.getpid()}"  # a short path: a socket's name has 108 bytes at most
    folder.mkdir()
    host = docker.from_env()
    saved = host.images.get(image).save(named=True)
    own = Engine(folder)
    try:
        client = docker.DockerClient(base_url=own.host, timeout=120)
        client.images.load(b"".join(saved))
        client.close()
        host.close()
        monkeypatch.setenv("DOCKER_HOST", own.host)
        yield own
    finally:
        own.stop()
        shutil.rmtree(folder, ignore_errors=True)


def sleepy(count: int) -> list[Sample]:
    text = "import time\ndef f(x):\n    time.sleep(0.05)\n    return x + {}\n"
    return [Sample("1", i, "", text.format(0 if i % 2 else i), "stop", 0, None, None, "t") for i in range(count)]


def test_a_restarted_engine_costs_no_label(own_engine: Engine, image: str) -> None:
    samples = sleepy(120)
    with Sandbox(image=image, cache=False) as sandbox:
        labels = sandbox.verify(samples, PROBLEMS)
        first = [next(labels) for _ in range(30)]
        own_engine.stop()
        own_engine.start()
        found = first + list(labels)
    expected = ["passed" if i % 2 or i == 0 else "failed" for i in range(120)]
    assert [(label.sample_id, label.status) for label in found] == list(enumerate(expected))


def test_a_container_killed_again_and_again_loses_nothing(image: str) -> None:
    samples = sleepy(150)
    with Sandbox(image=image, cache=False) as sandbox:
        found = []
        for label in sandbox.verify(samples, PROBLEMS):
            found.append(label)
            if len(found) in (20, 100):
                engine.request("POST", f"/containers/{sandbox._connection.container}/kill")
    expected = ["passed" if i % 2 or i == 0 else "failed" for i in range(150)]
    assert [(label.sample_id, label.status) for label in found] == list(enumerate(expected))
