"""Whether a Docker engine answers, and the remedy if none does. Root on Debian or Ubuntu gets it installed and started.

Talks to the engine's socket directly: this runs before the Docker SDK is installed, and in milliseconds. Standard
library only.
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
ANSWER_TIMEOUT_S = 5.0
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


def engine_state(host: str) -> State:
    """What the engine at this address does now. Engines behind ssh:// and npipe:// count as answering: not asked."""
    url = urlsplit(host)
    try:
        if url.scheme == "unix":
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
                link.settimeout(ANSWER_TIMEOUT_S)
                link.connect(url.path)
                link.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
                head = link.recv(64)
            if b" 200 " not in head:
                raise ConnectionError(head)
        elif url.scheme in ("tcp", "http", "https"):
            socket.create_connection((url.hostname or "localhost", url.port or 2375), ANSWER_TIMEOUT_S).close()
    except PermissionError:
        return "denied"
    except OSError:
        return "stopped" if daemon_path() else "absent"
    return "answers"


def daemon_path() -> str | None:
    """The engine's program; /usr/sbin is not on every user's PATH."""
    return shutil.which("dockerd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/bin"]))


def remedy(state: State, host: str, machine: Machine) -> str:
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
    answering = [other for other in others if other != address() and engine_state(other) == "answers"]
    return Machine(sys.platform, user, os.geteuid() == 0, user in members, answering[0] if answering else None)


def problem() -> str | None:
    """None if an engine answers, else one line with the remedy. Changes nothing."""
    state = engine_state(address())
    return None if state == "answers" else remedy(state, address(), this_machine())


def ensure(report: Callable[[str], None], log: Path) -> None:
    """Make sure that an engine answers: install it (apt prints to `log`) and start it, if root may.

    Raises EngineError.
    """
    from fractal.install import apt

    host = address()
    state = engine_state(host)
    if state == "answers":
        return
    machine = this_machine()
    ours = host == SOCKET and machine.platform == "linux" and machine.root and machine.other is None
    if state == "denied" or not ours or (state == "absent" and not apt.allowed()):
        raise EngineError(remedy(state, host, machine))
    if state == "absent":
        report("Docker is not installed: installing Debian's docker.io")
        apt.install("docker.io", "iptables", "ca-certificates", log=log)
        if apt.knows("docker-buildx"):  # clients since 23 need it for BuildKit; Debian 12's has it built in
            apt.install("docker-buildx", log=log)
    start(report)


def start(report: Callable[[str], None]) -> None:
    """Start the engine and wait until it answers. Raises EngineError with the last line of its log."""
    begun = time.monotonic()
    if Path("/run/systemd/system").is_dir():
        done = subprocess.run(
            ["systemctl", "start", "docker"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
            raise EngineError(f"systemctl start docker failed: {reason} Look at: journalctl -u docker -n 50")
        wait_until_it_answers(None)
    elif engine_state(SOCKET) != "answers":
        wait_until_it_answers(None if is_daemon_alive() else start_daemon())
    report(f"the Docker engine answers, {time.monotonic() - begun:.1f} s after its start")


def is_daemon_alive() -> bool:
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


def start_daemon() -> subprocess.Popen[bytes]:
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


def wait_until_it_answers(daemon: subprocess.Popen[bytes] | None) -> None:
    """Raises EngineError after START_TIMEOUT_S. A daemon that we started and that does not answer is ended."""
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while engine_state(SOCKET) != "answers":
            if daemon and daemon.poll() is not None:
                raise EngineError(f"dockerd ended with code {daemon.returncode}: {last_log_line()} (log: {DAEMON_LOG})")
            if time.monotonic() > deadline:
                raise EngineError(
                    f"dockerd does not answer after {START_TIMEOUT_S:.0f} s: {last_log_line()} (log: {DAEMON_LOG})"
                )
            time.sleep(0.1)
    except BaseException:
        if daemon and daemon.poll() is None:
            daemon.terminate()
        raise


def last_log_line(log: Path = DAEMON_LOG) -> str:
    """The last line of the daemon's log, where dockerd writes why it ended."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return "it left no log."
    return next((line.strip()[:400] for line in reversed(lines) if line.strip()), "its log is empty.")
