"""Is there a Docker engine, and if not, whose move is it? Root on Debian or Ubuntu gets one installed and started.

Asks the engine's socket itself: this runs before the Docker SDK is there, and in milliseconds. Standard library only.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

SOCKET = "unix:///var/run/docker.sock"  # where the SDK and the client look without DOCKER_HOST
PID_FILE = Path("/var/run/docker.pid")
DAEMON_LOG = Path("/var/log/fractal-dockerd.log")
PROBE_TIMEOUT_S = 5.0
START_TIMEOUT_S = 90.0  # 1 to 3 s on an idle machine; loading many images takes longer

State = Literal[
    "answers",
    "denied",  # a socket that we may not open
    "stopped",  # installed; nothing answers
    "absent",  # not installed
]


class EngineError(Exception):
    """There is no Docker engine to use: one line with the remedy."""


@dataclass(frozen=True)
class Machine:
    """What the remedy depends on."""

    platform: str  # as sys.platform
    user: str
    root: bool
    in_group: bool  # the user database has the user in group docker, even if this session does not know yet
    other: str | None = None  # address of an engine that answers elsewhere: rootless Docker, Docker Desktop


def address(environ: Mapping[str, str] = os.environ) -> str:
    return environ.get("DOCKER_HOST") or SOCKET


def probe(host: str) -> State:
    """What the engine at this address does now. Engines behind ssh:// and npipe:// count as answering: not asked."""
    url = urlsplit(host)
    try:
        if url.scheme == "unix":
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
                link.settimeout(PROBE_TIMEOUT_S)
                link.connect(url.path)
                link.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
                head = link.recv(64)
            if b" 200 " not in head:
                raise ConnectionError(head)
        elif url.scheme in ("tcp", "http", "https"):
            socket.create_connection((url.hostname or "localhost", url.port or 2375), PROBE_TIMEOUT_S).close()
    except PermissionError:
        return "denied"
    except OSError:
        return "stopped" if daemon_path() else "absent"
    return "answers"


def daemon_path() -> str | None:
    """The engine's program; /usr/sbin is not on every user's PATH."""
    return shutil.which("dockerd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/bin"]))


def advice(state: State, host: str, machine: Machine) -> str:
    """One line: what is wrong with the engine at this address, and what to do."""
    if machine.other and state != "answers":
        return (
            f"No Docker engine answers at {host}, but one does at {machine.other}. "
            f"Run: export DOCKER_HOST={machine.other}"
        )
    if state == "denied":
        if machine.in_group:
            return (
                f"No permission for the Docker engine at {host}: {machine.user} is in group docker, "
                "but this login is older than that. Log in again."
            )
        return (
            f"No permission for the Docker engine at {host}. "
            f"Run: sudo usermod -aG docker {machine.user}; then log in again."
        )
    if host != SOCKET:
        return f"No Docker engine answers at DOCKER_HOST={host}. Start it, or unset DOCKER_HOST to use the local one."
    sudo = "" if machine.root else "sudo "
    if machine.platform != "linux":
        return "No Docker engine answers. Start Docker Desktop or colima (install it first if it is not there)."
    if state == "stopped":
        return (
            f"Docker is installed, but no engine is running. Run: {sudo}systemctl start docker; "
            f"where there is no systemd: {sudo}service docker start"
        )
    group = "" if machine.root else f", then: sudo usermod -aG docker {machine.user}; then log in again"
    return f"Docker is not installed. On Debian or Ubuntu run: {sudo}apt-get install docker.io{group}."


def this_machine() -> Machine:
    import getpass
    import grp

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name
        user = str(os.getuid())
    try:
        members = grp.getgrnam("docker").gr_mem
    except KeyError:
        members = []
    places = [
        Path(os.environ.get("XDG_RUNTIME_DIR", "/nowhere"), "docker.sock"),
        Path.home() / ".docker/run/docker.sock",
    ]
    others = [f"unix://{place}" for place in places if place.exists()]
    answering = [other for other in others if other != address() and probe(other) == "answers"]
    return Machine(sys.platform, user, os.geteuid() == 0, user in members, answering[0] if answering else None)


def problem() -> str | None:
    """None if an engine answers, else one line with the remedy. Changes nothing."""
    state = probe(address())
    return None if state == "answers" else advice(state, address(), this_machine())


def ensure(say: Callable[[str], None], log: Path) -> None:
    """An engine answers afterwards; installed (apt's words go to `log`) and started if root may. Raises EngineError."""
    from fractal.install import apt

    host = address()
    state = probe(host)
    if state == "answers":
        return
    machine = this_machine()
    ours = host == SOCKET and machine.platform == "linux" and machine.root and machine.other is None
    if state == "denied" or not ours or (state == "absent" and not apt.allowed()):
        raise EngineError(advice(state, host, machine))
    if state == "absent":
        say("Docker is not installed: installing Debian's docker.io")
        apt.install("docker.io", "iptables", "ca-certificates", log=log)
        if apt.knows("docker-buildx"):  # clients since 23 need it for BuildKit; Debian 12's has it built in
            apt.install("docker-buildx", log=log)
    start(say)


def start(say: Callable[[str], None]) -> None:
    """Start the engine and wait until it answers. Raises EngineError with the last words of its log."""
    begun = time.monotonic()
    if Path("/run/systemd/system").is_dir():
        done = subprocess.run(
            ["systemctl", "start", "docker"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            words = (done.stderr.strip().splitlines() or ["no reason given"])[0]
            raise EngineError(f"systemctl start docker failed: {words} Look at: journalctl -u docker -n 50")
        wait(None)
    elif probe(SOCKET) != "answers":
        wait(None if daemon_runs() else launch())
    say(f"the Docker engine answers, {time.monotonic() - begun:.1f} s after its start")


def daemon_runs() -> bool:
    """Whether the daemon named in the pid file is alive (Debian's package may have started it).

    A pid file left by a killed daemon is removed, because dockerd refuses to start where its number is in use again.
    """
    try:
        pid = int(PID_FILE.read_text())
    except (FileNotFoundError, ValueError):
        return False
    try:
        alive = Path(f"/proc/{pid}/comm").read_text().strip() == "dockerd"
    except OSError:
        alive = False
    if not alive:
        PID_FILE.unlink(missing_ok=True)
    return alive


def launch() -> subprocess.Popen[bytes]:
    """dockerd in a session of its own: it outlives us, and a Ctrl-C at our terminal does not reach it."""
    program = daemon_path()
    if program is None:
        raise EngineError("Docker's package came without dockerd. Run: apt-get install --reinstall docker.io")
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])  # for iptables
    with DAEMON_LOG.open("ab") as log:
        return subprocess.Popen(
            [program],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env={**os.environ, "PATH": path},
            start_new_session=True,
        )


def wait(daemon: subprocess.Popen[bytes] | None) -> None:
    """Until the engine answers. A daemon that we launched and that does not make it is ended."""
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while probe(SOCKET) != "answers":
            if daemon and daemon.poll() is not None:
                raise EngineError(f"dockerd ended with code {daemon.returncode}: {last_words()} (log: {DAEMON_LOG})")
            if time.monotonic() > deadline:
                raise EngineError(
                    f"dockerd does not answer after {START_TIMEOUT_S:.0f} s: {last_words()} (log: {DAEMON_LOG})"
                )
            time.sleep(0.1)
    except BaseException:
        if daemon and daemon.poll() is None:
            daemon.terminate()
        raise


def last_words(log: Path = DAEMON_LOG) -> str:
    """The last line of the daemon's log: dockerd says there why it gave up."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return "it left no log."
    return next((line.strip()[:400] for line in reversed(lines) if line.strip()), "its log is empty.")
