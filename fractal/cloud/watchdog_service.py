"""The watchdog: ends the instance that it runs on, by Lambda's API, also while the operator's machine sleeps.

    python3 watchdog.py start < settings.json    # takes over from one that runs; prints a line, and goes on alone
    python3 watchdog.py status                   # prints the state of the one that runs as JSON, or nothing

It is sent to the instance as it is: the standard library of Python 3.8 alone. What it writes lies beside it, in memory.
The API key comes by standard input and stays in the memory of this process. It names its own instance to the API, and
no other. All times are seconds since boot: the instance's clock may be wrong.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import resource
import signal
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

JOB_LABEL = "fractal.job"  # of a job's container
REQUEST_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 20.0  # of nvidia-smi and docker
CHECK_S = 1800.0  # between two requests that only find out whether key and API would do
PROBLEM_CHECK_S = 60.0  # the same, after one that failed
REPEAT_S = 60.0  # the end was accepted, and the instance is still there: it is asked for again
BACKOFF_S = (2.0, 60.0)  # first and longest pause after a failure to end the instance
TAKE_OVER_S = 10.0  # until the one before is killed
BUSY_LOAD = 0.5  # processes that compute, in the mean of a minute (/proc/loadavg): one that works all the time is 1.0
NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL 1.1
NOT_YET_VALID, EXPIRED = 9, 10  # X509_V_ERR_CERT_*


@dataclass(frozen=True)
class Settings:
    """What the operator's machine tells. None: that condition ends nothing."""

    id: str  # of this instance
    url: str  # of the API
    account: str  # digest of the key
    key: str = field(repr=False)
    left_s: float | None  # until the first limit
    ends_at: float | None  # the same in unix seconds of the operator's clock, by which settings are compared
    idle_s: float | None
    guard_s: float | None
    tick_s: float  # between two looks

    def public(self) -> dict[str, object]:
        """What another process may see, and what makes two settings the same."""
        return {name: value for name, value in vars(self).items() if name not in ("key", "left_s")}


@dataclass
class Watch:
    """When the instance is due to end: pure."""

    settings: Settings
    started_at: float  # when the settings came
    busy_at: float  # when work was last seen
    guard_at: float  # when the operator's guard was last seen

    def due(self, now: float) -> str | None:
        """The reason to end the instance now."""
        left_s, idle_s, guard_s = self.settings.left_s, self.settings.idle_s, self.settings.guard_s
        if left_s is not None and now - self.started_at >= left_s:
            return "a limit is reached"
        if idle_s is not None and now - self.busy_at >= idle_s:
            return f"nothing ran for {idle_s / 60:g} minutes"
        if guard_s is not None and now - self.guard_at >= guard_s:
            return f"the operator's guard was not seen for {guard_s / 60:g} minutes"
        return None


class Response(NamedTuple):
    status: int  # 0: none
    retry_after_s: float
    problem: str  # "" for success


class Api:
    """The two requests about this instance."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._parts = urlsplit(settings.url)
        self._check_time = True

    def see(self) -> Response:
        return self._request("GET", f"/instances/{self._settings.id}")

    def terminate(self) -> Response:
        return self._request("POST", "/instance-operations/terminate", {"instance_ids": [self._settings.id]})

    def _request(self, method: str, path: str, body: dict[str, object] | None = None) -> Response:
        """Never raises: whatever is wrong, the next try may succeed. Follows no redirect: the key goes to one host."""
        try:
            return self._send(method, path, body)
        except ssl.SSLCertVerificationError as error:
            if self._check_time and error.verify_code in (NOT_YET_VALID, EXPIRED):
                self._check_time = False  # more likely it is the clock here: the rest of the certificate is verified
                return self._request(method, path, body)
            return Response(0, 0.0, f"the API's certificate is not trusted: {error.verify_message}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            return Response(0, 0.0, f"the API cannot be reached: {type(error).__name__}: {error}")

    def _send(self, method: str, path: str, body: dict[str, object] | None) -> Response:
        connection = self._connection()
        headers = {"Authorization": f"Bearer {self._settings.key}", "Accept": "application/json"}
        headers["User-Agent"] = "fractal"
        try:
            data = None if body is None else json.dumps(body)
            if data is not None:
                headers["Content-Type"] = "application/json"
            connection.request(method, self._parts.path + path, data, headers)
            response = connection.getresponse()
            response.read(1 << 20)
            after = response.getheader("Retry-After", "")
            retry_after_s = min(float(after), BACKOFF_S[1]) if after.isdigit() else 0.0
            problem = "" if 200 <= response.status < 300 else f"the API answers HTTP {response.status} to {method}"
            return Response(response.status, retry_after_s, problem)
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host = str(self._parts.hostname)
        if self._parts.scheme == "http":  # of a fake on the loopback
            return http.client.HTTPConnection(host, self._parts.port, timeout=REQUEST_TIMEOUT_S)
        context = ssl.create_default_context()
        if not self._check_time:
            context.verify_flags |= NO_CHECK_TIME
        return http.client.HTTPSConnection(host, self._parts.port, timeout=REQUEST_TIMEOUT_S, context=context)


class Work:
    """Whether something runs on this instance."""

    def __init__(self) -> None:
        self._sessions: set[str] = set()

    def seen(self) -> str:
        """What runs; "" if nothing does."""
        before, self._sessions = self._sessions, ssh_sessions()
        if before & self._sessions:  # seen twice: the guard's heartbeat is shorter
            return "an ssh session"
        if jobs := containers():
            return jobs
        if gpu_utilization() > 0:
            return "the GPU"
        return "a program" if load() >= BUSY_LOAD else ""


def ssh_sessions() -> set[str]:
    """The far ends of open connections to this machine's ssh port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in read(Path(table)).splitlines()[1:]:
            _, local, remote, state = line.split()[:4]
            if state == "01" and local.endswith(":0016"):  # established, port 22
                found.add(remote)
    return found


def containers() -> str:
    """Jobs: one that ran and was not collected counts too, since its results are here alone."""
    for docker in (["docker"], ["sudo", "-n", "docker"]):
        output = run(*docker, "ps", "-aq", "--filter", f"label={JOB_LABEL}")
        if output is not None:
            return "a job, or one whose results are not fetched" if output.strip() else ""
    return "an engine that does not answer"  # what it runs is not known


def gpu_utilization() -> int:
    """The highest utilization of any GPU, in percent; 0 without one."""
    output = run("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits") or ""
    return max((int(line) for line in output.split() if line.isdigit()), default=0)


def load() -> float:
    return float((read(Path("/proc/loadavg")) or "0").split()[0])


def run(*command: str) -> str | None:
    """A program's output; None if it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def boot_time() -> float:
    """Seconds since boot, time in suspension included; no change of the clock moves it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Service:
    """The process that watches."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        now = boot_time()
        self._settings, self._folder = settings, folder
        self._watch = Watch(settings, now, now, now)
        self._api = Api(settings)
        self._work = Work()
        self._stamp = ""  # of the last heartbeat that was seen
        self._running = ""  # what ran at the last look
        self._reason = ""
        self._pause_s = BACKOFF_S[0]  # after the next failure to end it
        self._checked_at = now
        self.problem = ""  # why the last request failed

    def check(self) -> Response:
        """Find out whether the API would end the instance if it were asked."""
        self._checked_at = boot_time()
        response = self._api.see()
        self.problem = response.problem
        return response

    def serve(self) -> None:
        """Never returns: the instance ends."""
        while True:
            time.sleep(self.step())

    def step(self) -> float:
        """Look once, or ask the API once to end the instance; seconds until the next step.

        Nothing that fails in a look keeps it from ending the instance at its limit.
        """
        if self._reason:
            return self._ask()
        try:
            self._look(boot_time())
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"
            self._watch.busy_at = boot_time()  # what runs is not known
        self._reason = self._watch.due(boot_time()) or ""
        self._write_state()
        return 0.0 if self._reason else self._settings.tick_s

    def _ask(self) -> float:
        answer = self._api.terminate()
        self.problem = answer.problem
        self._write_state()
        if not answer.problem:
            self._pause_s = BACKOFF_S[0]
            return REPEAT_S
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, BACKOFF_S[1])
        return max(pause_s, answer.retry_after_s)

    def _look(self, now: float) -> None:
        stamp = heartbeat_stamp(self._folder)
        if stamp != self._stamp:
            self._stamp, self._watch.guard_at = stamp, now
        if self._settings.idle_s is not None:
            self._running = self._work.seen()
            if self._running:
                self._watch.busy_at = now
        if now - self._checked_at >= (PROBLEM_CHECK_S if self.problem else CHECK_S):
            self.check()

    def _write_state(self) -> None:
        watch, now = self._watch, boot_time()
        left_s = self._settings.left_s
        state = {
            "settings": self._settings.public(),
            "looked_at": now,
            "left_s": None if left_s is None else watch.started_at + left_s - now,
            "idle_s": 0.0 if self._settings.idle_s is None else now - watch.busy_at,
            "guard_seen_s": now - watch.guard_at,
            "running": self._running,
            "problem": self.problem,
            "reason": self._reason,
        }
        draft = self._folder / "state.new"
        with contextlib.suppress(OSError):  # nothing that it writes is needed to end the instance
            draft.write_text(json.dumps(state))
            draft.replace(self._folder / "state")


def heartbeat_stamp(folder: Path) -> str:
    """Changes with each heartbeat, whatever the clock says."""
    try:
        found = (folder / "heartbeat").stat()
    except OSError:
        return ""
    return f"{found.st_ino} {found.st_mtime_ns}"


def start(folder: Path) -> int:
    """Become the watchdog, in a process of its own; 1 with a line if the API refuses the key or the instance."""
    settings = Settings(**json.load(sys.stdin))
    service = Service(settings, folder)
    if service.check().status in (401, 403, 404):
        print(service.problem)
        return 1
    sys.stdout.flush()
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        answer = os.read(reader, 100).decode()
        print(answer or "it ended while it started")
        return 0 if answer == "on duty" else 1
    os.setsid()  # neither the end of the connection nor a logout reaches it
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no dump holds the key
    lock = take_over(folder)
    service.step()
    os.write(writer, b"on duty")
    os.close(writer)
    service.serve()
    os.close(lock)
    return 1


def take_over(folder: Path) -> int:
    """End the watchdog that runs, if any; the file whose lock says that this process is the one."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline, number = time.monotonic() + TAKE_OVER_S, signal.SIGTERM
    while not locked(lock):
        pid = os.pread(lock, 20, 0).decode().strip()
        if pid.isdigit() and Path(__file__).name in read(Path("/proc", pid, "cmdline")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), number)
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        time.sleep(0.05)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def locked(lock: int) -> bool:
    """Whether this process has the lock now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def status(folder: Path) -> int:
    """Print the state of the watchdog that runs, with the seconds since it last looked; nothing where none runs."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR)
    except OSError:
        return 0
    if not locked(lock):
        state = json.loads((folder / "state").read_text())
        state["looked_s"] = boot_time() - state.pop("looked_at")
        print(json.dumps(state))
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit({"start": start, "status": status}[sys.argv[1]](Path(__file__).parent))
