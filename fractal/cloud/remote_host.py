"""The instance as a remote host: one ssh connection, made again when it is lost; its Docker engine; rsync; a shell.

Knows nothing of the cloud's API: `refresh` updates the alias to the instance's present address, or raises.
"""

import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import docker
import docker.errors
import requests

from fractal.cloud.ssh_config import ALIAS
from fractal.errors import InputError, OutsideError
from fractal.images import driver_compatibility, ssh

Log = Callable[[str], None]
ROOT = "fractal"  # Fractal's folder in the home of the instance's user
SCRIPTS = Path(__file__).parent / "scripts"
PATIENCE_S = 600.0  # without a connection, before a command gives up; the job goes on
BACKOFF_MAX_S = 15.0
ENGINE = "/var/run/docker.sock"
ENGINE_TIMEOUT_S = 120
DRIVER_REMEDY = (
    "Take a family of images with a newer one (--family=), or upgrade it there; --image=pipeline-cpu needs none. It is "
    "billed: end it with `invoke terminate`."
)
QUERY_DRIVER = "nvidia-smi --query-gpu=driver_version,name --format=csv,noheader 2> /dev/null"
RSYNC = ("rsync", "--archive", "--no-owner", "--no-group", "--partial-dir=.rsync-partial", "--timeout=60")
SYNC_EXCLUDES = (".git", ".venv", "__pycache__", "*.pyc", ".mypy_cache", ".pytest_cache", ".ruff_cache", "/runs")


class Driver(NamedTuple):
    """The NVIDIA driver of a machine, and the GPUs that it drives."""

    version: str = ""  # "580.95.05"; empty without a driver
    gpus: tuple[str, ...] = ()  # names, such as "NVIDIA A100-SXM4-80GB"

    def environment(self, base: str = "") -> dict[str, str]:
        """The environment variables that the CUDA image needs for this driver. Raises DriverError.

        `base`: the image's label that says where its base came from, "" if unknown.
        """
        return driver_compatibility.environment(self.version, self.gpus, base=base, remedy=DRIVER_REMEDY)


class RemoteError(OutsideError):
    """A command on the instance failed: one line with the remedy."""


def script(name: str) -> str:
    """The text of scripts/NAME.sh, for `Remote.run`."""
    return (SCRIPTS / f"{name}.sh").read_text()


class Remote:
    """A context manager; threads may share it.

    Raises SshError, SshConnectionError, RemoteError, and what `refresh` raises.
    """

    def __init__(
        self,
        config: Path,
        refresh: Callable[[], object],  # called when a connection was lost, before each further attempt
        log: Log,
        *,
        host: str = ALIAS,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.config, self.host, self.patience_s = config, host, patience_s
        self._refresh, self._log = refresh, log
        self._lock = threading.RLock()
        self._link: ssh.SshConnection | None = None
        self._driver: Driver | None = None

    def __enter__(self) -> Self:
        _ = self.link
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._link is not None:
            self._link.close()

    @property
    def link(self) -> ssh.SshConnection:
        """The connection; made if there is none, with retries."""
        with self._lock:
            return self._link or self._connect(None)

    def reconnect(self, lost: ssh.SshConnectionError, link: ssh.SshConnection) -> ssh.SshConnection:
        """Replace this connection, which was lost. Raises SshConnectionError after `patience_s`."""
        with self._lock:
            if self._link is not link and self._link is not None:  # another thread was quicker
                return self._link
            link.close()
            self._link = None
            reason = str(lost).split(":")[0].rstrip(".")
            self._log(f"the connection is lost ({reason}), what runs on the instance goes on")
            return self._connect(lost)

    def _connect(self, lost: ssh.SshConnectionError | None) -> ssh.SshConnection:
        began, pause_s = time.time(), 0.5  # wall clock: a laptop may have slept
        while True:
            if lost is not None:  # at first the alias refers to where the instance was seen a moment ago
                self._refresh()
            try:
                self._link = ssh.SshConnection(self.host, ssh.WAIT_FOR_HEARTBEATS, config=self.config)
                self._link.send_lines()
                break
            except ssh.SshConnectionError as error:
                if time.time() + pause_s > began + self.patience_s:
                    raise
                if pause_s == 0.5:
                    self._log(f"{error} Trying for {self.patience_s / 60:.0f} minutes.")
                lost = error
                time.sleep(pause_s)
                pause_s = min(BACKOFF_MAX_S, 2 * pause_s)
        if lost is not None:
            self._log(f"{self.host} is connected again after {time.time() - began:.0f} s")
        return self._link

    def run(
        self, script: str, *arguments: str, timeout_s: float = ssh.RUN_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a POSIX sh script on the instance; it has to be repeatable: after a lost connection it is repeated."""
        while True:
            link = self.link
            try:
                return link.run(script, *arguments, timeout_s=timeout_s)
            except ssh.SshConnectionError as error:
                self.reconnect(error, link)

    def check(self, what: str, script: str, *arguments: str, timeout_s: float = ssh.RUN_TIMEOUT_S) -> str:
        """The output of a script that has to succeed. Raises RemoteError: HOST cannot WHAT: last line of its output."""
        done = self.run(script, *arguments, timeout_s=timeout_s)
        if done.returncode:
            raise failure(self.host, what, done.stderr or done.stdout)
        return done.stdout

    @property
    def driver(self) -> Driver:
        """The NVIDIA driver and the GPUs, asked once for each connection; empty where there are none."""
        if self._driver is None:
            self._driver = parse_driver(self.run(QUERY_DRIVER).stdout)
        return self._driver

    @contextmanager
    def engine(self) -> Iterator[docker.DockerClient]:
        """The Docker SDK with the instance's engine, by its forwarded socket.

        Each connection of `docker system dial-stdio` would be a session, of which sshd allows ten.
        """
        folder = Path(tempfile.mkdtemp(prefix="fractal-engine-", dir="/tmp"))  # a socket's path has 104 bytes at most
        try:
            if not self.link.forward_socket(folder / "docker.sock", ENGINE):
                raise RemoteError(
                    f"The Docker engine of {self.host} cannot be reached: sshd there has to allow forwarding "
                    "(AllowStreamLocalForwarding)."
                )
            with closing(docker.DockerClient(f"unix://{folder}/docker.sock", timeout=ENGINE_TIMEOUT_S)) as client:
                yield client
        except (docker.errors.DockerException, requests.RequestException) as error:
            raise RemoteError(f"The Docker engine of {self.host} broke off: {error}. Run the command again.") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def rsync(self, *arguments: str) -> str:
        """Run rsync over this connection and return its output; a path that begins with `HOST:` is on the instance.

        After a lost connection rsync is repeated, and continues where it was. Raises RemoteError.
        """
        if shutil.which("rsync") is None:
            raise RemoteError("There is no rsync here. Install it: apt-get install rsync, or brew install rsync.")
        while True:
            link = self.link
            done = subprocess.run(
                [*RSYNC, "--rsh", link.rsync_shell, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches this process, which ends it
            )
            if done.returncode in (0, 24):  # 24: a file vanished meanwhile
                return done.stdout
            if done.returncode in (10, 12, 30, 35, 255, -9, -15):  # of the transport
                try:
                    link.check_alive()
                    link.run("true")
                except ssh.SshConnectionError as error:
                    self.reconnect(error, link)
                    continue
            raise failure("rsync", "copy", done.stderr)

    def sync(self, folder: Path) -> str:
        """Copy a folder to ~/fractal/src/NAME there, without what git ignores; returns a line of what was sent."""
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder. Give one of this project, as: invoke sync --dir=benchmarks.")
        name = "." if folder.resolve() == Path.cwd().resolve() else folder.resolve().name
        self.check("make a folder", f'mkdir -p "{ROOT}/src/$1"', name)
        options = ["--delete-delay", "--stats", "--filter=:- .gitignore"]
        options += [f"--exclude={pattern}" for pattern in SYNC_EXCLUDES]
        stats = self.rsync(*options, f"{folder}/", f"{self.host}:{ROOT}/src/{name}/")
        return f"{folder} is at ~/{ROOT}/src/{name} on {self.host}: {transferred(stats)}"

    def shell(self, command: str = "") -> list[str]:
        """The command line of an interactive ssh; with a terminal if there is one."""
        terminal = ["-t"] if command and os.isatty(0) else []
        return ["ssh", "-F", str(self.config), *terminal, "--", self.host, *([command] if command else [])]


def failure(host: str, what: str, output: str) -> RemoteError:
    """The error of a command that failed on the instance; a full disk is named."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no reason given"]
    full = [line for line in lines if re.search("no space left on device|disk quota exceeded", line, re.IGNORECASE)]
    if full:
        return RemoteError(f"{host} cannot {what}, a disk is full: {full[0][-200:]}. Make room, then go on.")
    return RemoteError(f"{host} cannot {what}: {lines[-1][-200:].rstrip('. ')}. Look there: invoke ssh")


def parse_driver(text: str) -> Driver:
    """nvidia-smi's line "580.95.05, NVIDIA H100 80GB HBM3" for each GPU. Other lines are ignored."""
    pairs = [line.strip().split(", ", 1) for line in text.splitlines() if re.match(r"\d+\.\d+[\d.]*, ", line)]
    return Driver(pairs[0][0] if pairs else "", tuple(name for _, name in pairs))


def transferred(stats: str) -> str:
    """A summary of the output of rsync --stats."""

    def number(name: str) -> int:
        match = re.search(rf"{name}: ([\d,.]+)", stats)
        return int(re.sub("[,.]", "", match[1])) if match else 0

    return f"{number('files transferred')} files, {number('Total transferred file size') / 1e6:.1f} MB"
