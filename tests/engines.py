"""A Docker engine of a test's own, beside the machine's."""

import os
import signal
import subprocess
import time
from pathlib import Path

import docker
import pytest

from fractal.install.docker_engine import daemon_path


class Engine:
    """A Docker engine of the test's own, which it may kill."""

    def __init__(self, folder: Path, programs: Path | None = None) -> None:
        """`programs`: a folder that stands first on its PATH."""
        self.folder = folder
        self.programs = programs
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
        folders = [*([str(self.programs)] if self.programs else []), os.environ["PATH"], "/usr/sbin", "/sbin"]
        path = os.pathsep.join(folders)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                # Its own network: it would take docker0 down.
                ["unshare", "--net", program, *words, "--iptables=false", "--ip-masq=false"],
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
