"""Nothing is lost: what dies in the middle of a run, and what the labels are afterwards."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from fractal.engine import daemon_path
from fractal.records import Problem, Sample
from fractal.sandbox.container import Sandbox

pytestmark = [pytest.mark.docker, pytest.mark.slow]
PROBLEMS = {1: Problem(1, "", "def f(x):\n    return x\n", ["assert f(1) == 1"], "", "f", "test")}


class Engine:
    """A Docker engine of the test's own, which it may kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = f"unix://{folder}/docker.sock"
        self.start()

    def start(self) -> None:
        program = daemon_path()
        assert program is not None
        (self.folder / "docker.pid").unlink(missing_ok=True)
        options = {
            "data-root": self.folder / "data",
            "exec-root": self.folder / "exec",
            "pidfile": self.folder / "docker.pid",
            "host": self.host,
            "bridge": "none",
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    "unshare",
                    "--net",
                    program,
                    *words,
                    "--iptables=false",
                    "--ip-masq=false",
                ],  # it would take docker0 down
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": path},
                start_new_session=True,
            )
        for _ in range(300):
            try:
                client = docker.DockerClient(base_url=self.host, timeout=5)
                client.ping()
                client.close()
                return
            except Exception:
                time.sleep(0.1)
        self.stop()
        pytest.skip("a second engine does not start here: " + (self.folder / "log").read_text()[-300:])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


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
    return [Sample(1, i, "", text.format(0 if i % 2 else i), "stop", 0, None, None, "t") for i in range(count)]


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
                sandbox._line.container.kill()
    expected = ["passed" if i % 2 or i == 0 else "failed" for i in range(150)]
    assert [(label.sample_id, label.status) for label in found] == list(enumerate(expected))
