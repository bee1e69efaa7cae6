"""The rented machine as we work on it: one ssh connection, made again when it is lost; its Docker engine; a shell.

    with Remote(folder / "ssh/config", refresh, say) as remote:
        remote.run("nvidia-smi")
        with remote.engine() as client: ...     # the Docker SDK against the engine over there

Knows ssh and nothing of the cloud's API: `refresh` brings the alias to the machine's present address, or raises.
"""

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import docker
import docker.errors
import requests

from fractal.cloud.alias import ALIAS as ALIAS
from fractal.errors import InputError, OutsideError
from fractal.images import ssh

Say = Callable[[str], None]
ROOT = "fractal"  # our folder in the home over there
PATIENCE_S = 600.0  # without a connection, before a command gives up; the job over there goes on
PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # the last one again and again
ENGINE = "/var/run/docker.sock"
ENGINE_TIMEOUT_S = 120
PROBE = """\
for docker in docker 'sudo -n docker'; do
  $docker version > /dev/null 2>&1 < /dev/null && { echo "$docker"; exit; }
done
"""
RSYNC = ("rsync", "--archive", "--no-owner", "--no-group", "--partial-dir=.rsync-partial", "--timeout=60")
SYNC_NEVER = (".git", ".venv", "__pycache__", "*.pyc", ".mypy_cache", ".pytest_cache", ".ruff_cache", "/runs")


class RemoteError(OutsideError):
    """The machine over there does not do what it should: one line with the remedy."""


class Remote:
    """A context manager; threads may share it. Raises SshError, RemoteError, and what `refresh` raises."""

    def __init__(
        self,
        config: Path,
        refresh: Callable[[], object],  # called when a connection was lost, before each further attempt
        say: Say,
        *,
        host: str = ALIAS,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.config, self.host, self.patience_s = config, host, patience_s
        self._refresh, self._say = refresh, say
        self._lock = threading.RLock()
        self._link: ssh.SshConnection | None = None
        self._docker = ""

    def __enter__(self) -> Self:
        _ = self.link
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._link is not None:
            self._link.close()

    @property
    def link(self) -> ssh.SshConnection:
        """The connection; made if there is none, with patience."""
        with self._lock:
            return self._link or self._connect(None)

    def again(self, lost: ssh.SshConnectionError, link: ssh.SshConnection) -> ssh.SshConnection:
        """Another connection in place of this one, which was lost. Raises SshConnectionError when patience is over."""
        with self._lock:
            if self._link is not link and self._link is not None:  # another thread was quicker
                return self._link
            link.close()
            self._link = None
            self._say(f"the connection is lost ({str(lost).split(':')[0].rstrip('.')}), what runs over there goes on")
            return self._connect(lost)

    def _connect(self, lost: ssh.SshConnectionError | None) -> ssh.SshConnection:
        deadline, began = time.time() + self.patience_s, time.time()  # the wall's clock: a laptop may have slept
        for attempt in range(10_000):
            if lost is not None:  # at first the alias leads to where the machine was seen a moment ago
                self._refresh()
            try:
                self._link = ssh.SshConnection(self.host, ssh.WAIT_FOR_HEARTBEATS, config=self.config)
                self._link.send_lines()
                break
            except ssh.SshConnectionError as error:
                lost = error
                pause_s = PAUSES_S[min(attempt, len(PAUSES_S) - 1)]
                if time.time() + pause_s > deadline:
                    raise
                if attempt == 0:
                    self._say(f"{error} Trying for {self.patience_s / 60:.0f} minutes.")
                time.sleep(pause_s)
        assert self._link is not None
        if lost is not None:
            self._say(f"{self.host} is connected again after {time.time() - began:.0f} s")
        return self._link

    def run(self, script: str, *words: str, timeout_s: float = ssh.RUN_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """A POSIX sh script over there that may run twice: after a lost connection it does."""
        while True:
            link = self.link
            try:
                return link.run(script, *words, timeout_s=timeout_s)
            except ssh.SshConnectionError as error:
                self.again(error, link)

    def must(self, what: str, script: str, *words: str, timeout_s: float = ssh.RUN_TIMEOUT_S) -> str:
        """The output of a script that has to succeed. Raises RemoteError: HOST cannot WHAT: its last words."""
        done = self.run(script, *words, timeout_s=timeout_s)
        if done.returncode:
            raise failed(self.host, what, done.stderr or done.stdout)
        return done.stdout

    @property
    def docker_words(self) -> str:
        """How its user calls Docker there: docker, or sudo -n docker."""
        if not self._docker:
            self._docker = self.run(PROBE).stdout.strip()
        if not self._docker:
            raise RemoteError(f"Docker on {self.host} does not answer. Run: invoke wait, which repairs what it can.")
        return self._docker

    @contextmanager
    def engine(self) -> Iterator[docker.DockerClient]:
        """The Docker SDK against the engine over there: its socket, forwarded.

        Each connection of `docker system dial-stdio` would be a session, of which sshd allows ten. The user has to be
        in the group docker: ready.py sees to it.
        """
        folder = Path(tempfile.mkdtemp(prefix="fractal-engine-", dir="/tmp"))  # a socket's name has 104 bytes at most
        try:
            link = self.link
            if self.docker_words != "docker" or not link.forward_socket(folder / "docker.sock", ENGINE):
                raise RemoteError(
                    f"The Docker engine of {self.host} is not open to its user. Run: invoke wait, which repairs that; "
                    "sshd there has to allow forwarding (AllowStreamLocalForwarding)."
                )
            client = docker.DockerClient(base_url=f"unix://{folder}/docker.sock", timeout=ENGINE_TIMEOUT_S)
            try:
                yield client
            finally:
                client.close()
        except (docker.errors.DockerException, requests.RequestException) as error:
            raise RemoteError(f"The Docker engine of {self.host} broke off: {error}. Run the command again.") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def rsync(self, *words: str) -> str:
        """rsync over this connection; a word that begins with `HOST:` is a place there. Its output.

        A lost connection is made again and rsync repeated: it goes on where it was. Raises RemoteError.
        """
        if shutil.which("rsync") is None:
            raise RemoteError("There is no rsync here. Install it: apt-get install rsync, or brew install rsync.")
        while True:
            link = self.link
            done = _rsync([*RSYNC, "--rsh", link.rsync_shell, *words])
            if done.returncode in (0, 24):  # 24: a file vanished meanwhile
                return done.stdout
            if done.returncode in (10, 12, 30, 35, 255, -9, -15):  # of the transport
                try:
                    link.check_alive()
                    link.run("true")
                except ssh.SshConnectionError as error:
                    self.again(error, link)
                    continue
            raise self._rsync_failed(done.stderr)

    def _rsync_failed(self, words: str) -> RemoteError:
        if "No space left on device" in words or "Disk quota exceeded" in words:
            where = "the receiving side" if "receiver" in words else self.host
            return RemoteError(f"rsync: the disk of {where} is full. Make room and run the command again, it goes on.")
        if "command not found" in words or "rsync: not found" in words:
            return RemoteError(f"There is no rsync on {self.host}. Run: invoke wait, which installs it.")
        return failed("rsync", "copy", words)

    def sync(self, folder: Path) -> str:
        """Copy a folder to ~/fractal/src/NAME there, without what git ignores; a line of what was sent."""
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder. Give one of this project, as: invoke sync --dir=benchmarks.")
        place = "." if folder.resolve() == Path.cwd().resolve() else folder.resolve().name
        self.must("make a folder", f'mkdir -p "{ROOT}/src/$1"', place)
        never = [f"--exclude={pattern}" for pattern in SYNC_NEVER]
        said = self.rsync(
            "--delete-delay",
            "--stats",
            "--filter=:- .gitignore",
            *never,
            f"{folder}/",
            f"{self.host}:{ROOT}/src/{place}/",
        )
        return f"{folder} is at ~/{ROOT}/src/{place} on {self.host}: {sent(said)}"

    def shell(self, command: str = "") -> list[str]:
        """The words of an ssh that a person uses; with a terminal if there is one."""
        terminal = ["-t"] if command and os.isatty(0) else []
        return ["ssh", "-F", str(self.config), *terminal, "--", self.host, *([command] if command else [])]


def _rsync(argv: list[str]) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate()
    except BaseException:  # Ctrl-C: a partial file stays and is gone on with
        process.terminate()
        process.wait()
        raise
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def failed(host: str, what: str, words: str) -> RemoteError:
    """A failure over there; a full disk is named."""
    if "No space left on device" in words or "no space left on device" in words:
        return RemoteError(f"The disk of {host} is full: it cannot {what}. Make room there (invoke ssh), then go on.")
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    last = lines[-1][-200:].rstrip(". ") if lines else "no reason given"
    return RemoteError(f"{host} cannot {what}: {last}. Look there: invoke ssh")


def sent(stats: str) -> str:
    """What rsync's --stats tell, in few words."""
    found = {}
    for line in stats.splitlines():
        name, _, value = line.partition(":")
        number = value.strip().split(" ")[0].replace(",", "").replace(".", "")
        if number.isdigit():
            found[name.strip()] = int(number)
    files = found.get("Number of regular files transferred", found.get("Number of files transferred", 0))
    return f"{files} files, {found.get('Total transferred file size', 0) / 1e6:.1f} MB"
