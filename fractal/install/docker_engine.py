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


def remedy(state: State, host: str, *, other: str | None = None, platform: str = "linux", root: bool = False) -> str:
    """One line: what is wrong with the engine at this address, and what to do.

    `other`: the address of an engine that answers elsewhere; `platform` as sys.platform; `root`: whether we are it.
    """
    if other:
        return f"No Docker engine answers at {host}, but one does at {other}. Run: export DOCKER_HOST={other}"
    if state == "denied":
        return (
            f"No permission for the Docker engine at {host}. Run: sudo usermod -aG docker $USER; then log in again, as "
            "this login does not know the group yet."
        )
    if host != SOCKET:
        return f"No Docker engine answers at DOCKER_HOST={host}. Start it, or unset DOCKER_HOST to use the local one."
    if platform != "linux":
        return "No Docker engine answers. Start Docker Desktop or colima (install it first if it is not there)."
    sudo = "" if root else "sudo "
    if state == "stopped":
        return (
            f"Docker is installed, but no engine is running. Run: {sudo}systemctl start docker; "
            f"where there is no systemd: {sudo}service docker start"
        )
    group = "" if root else ", then: sudo usermod -aG docker $USER; then log in again"
    return f"Docker is not installed. On Debian or Ubuntu run: {sudo}apt-get install docker.io{group}."


def other_engine() -> str | None:
    """The address of an engine that answers elsewhere: rootless Docker's, Docker Desktop's."""
    folders = (Path(os.environ.get("XDG_RUNTIME_DIR", "/nowhere")), Path.home() / ".docker/run")
    addresses = [f"unix://{folder}/docker.sock" for folder in folders if (folder / "docker.sock").exists()]
    return next((host for host in addresses if host != address() and engine_state(host) == "answers"), None)


def problem() -> str | None:
    """None if an engine answers, else one line with the remedy. Changes nothing."""
    state = engine_state(address())
    if state == "answers":
        return None
    return remedy(state, address(), other=other_engine(), platform=sys.platform, root=os.geteuid() == 0)


def ensure(report: Callable[[str], None], log: Path) -> None:
    """Make sure that an engine answers: install it (apt prints to `log`) and start it, if root may.

    Raises EngineError.
    """
    from fractal.install import apt

    host = address()
    state = engine_state(host)
    if state == "answers":
        return
    ours = host == SOCKET and sys.platform == "linux" and os.geteuid() == 0 and other_engine() is None
    if state == "denied" or not ours or (state == "absent" and not apt.allowed()):
        raise EngineError(problem())
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


def last_log_line() -> str:
    """The last line of the daemon's log, where dockerd writes why it ended."""
    text = DAEMON_LOG.read_text(errors="replace") if DAEMON_LOG.exists() else ""
    return (text.strip().splitlines() or ["its log is empty."])[-1][:400]
