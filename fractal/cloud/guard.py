"""The guard: one detached process for each instance that terminates it at its limits.

`start` runs `python -m fractal.cloud.guard NAME` before the launch request is sent, so no instance is ever without one:
if the client dies before it gets the response, the guard looks for the instance by name. It follows the ledger, keeps
trying while the API cannot be reached, and exits when the entry has ended. The key is in LAMBDA_API_KEY.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from filelock import BaseFileLock, FileLock, Timeout

from fractal.cloud import reconcile
from fractal.cloud.account import Account, Timing
from fractal.cloud.lambda_api import Client, RateLimiter
from fractal.cloud.lambda_errors import AuthError, CloudError
from fractal.cloud.ledger import Entry, Ledger, limits_text, state_dir
from fractal.cloud.watchdog import Heartbeat
from fractal.errors import InputError, OutsideError
from fractal.jsonl import parse

START_TIMEOUT_S = 60.0
REFUSED_MAX = 3


# --- for the client


def start(account: Account, name: str) -> None:
    """Return when a guard watches the entry; it may be one that did already. Raises CloudError."""
    ledger = account.ledger
    if alive(ledger, name):
        return
    log = log_file(ledger, name)
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "FRACTAL_STATE": str(ledger.folder)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "fractal.cloud.guard", name]
    if account.timing != Timing():
        command.append(msgspec.json.encode(account.timing).decode())
    try:
        with log.open("ab") as out:
            offset = out.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=ledger.folder,
                env=env,
                start_new_session=True,  # neither Ctrl-C nor a closed terminal reaches it
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if alive(ledger, name):
                return
            if process.poll() is not None:
                break
            time.sleep(0.05)
        reason = log.read_bytes()[offset:].decode(errors="replace").strip().rpartition("\n")[2] or "no reason given"
    except OSError as error:
        reason = error.strerror or str(error)
    raise CloudError(f"The guard of {name} does not start: {reason.rstrip('.')}. Its log is {log}.")


def alive(ledger: Ledger, name: str) -> bool:
    """Whether a guard watches the entry: it holds a lock that the kernel releases when it dies."""
    file = lock_file(ledger, name)
    try:
        with FileLock(file, timeout=0, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def log_file(ledger: Ledger, name: str) -> Path:
    return ledger.folder / f"guard-{name}.log"


def lock_file(ledger: Ledger, name: str) -> Path:
    return ledger.folder / f"guard-{name}.lock"


# --- in the guard's process


class Guard:
    """Watches one entry until its instance has ended."""

    def __init__(self, account: Account, name: str, lock: BaseFileLock) -> None:
        self._account = account
        self._ledger = account.ledger
        self._name = name
        self._timing = account.timing
        self._lock = lock
        self._heartbeat = Heartbeat(account.ledger.folder, account.timing.heartbeat_s, log)
        self._refused = 0  # consecutive requests that the API refused for the key
        self._clock_offset_s = -math.inf  # the largest that was seen between wall clock and steady clock
        self._entry: Entry | None = None  # as last read: a ledger that breaks later stops no guard
        self._polled_at = time.monotonic()
        self._end_reason: str | None = None  # once the end is decided
        self._rescue_code: int | None = None  # the rescue command's exit code, once it has run

    def watch(self) -> None:
        """Return when there is nothing left to guard."""
        while self._tick():
            time.sleep(self._timing.guard_tick_s)

    def _tick(self) -> bool:
        """Look once; whether to continue."""
        entry = self._read()
        if entry is None:
            log("the intent was dropped: nothing was launched")
            return False
        if entry.state == "ended":
            ended_s = time.time() - (entry.ended_at or 0.0)
            if reconcile.presumed_ended(entry) and ended_s < self._timing.guard_linger_s:
                self._poll()
                return True
            log(f"the instance has ended: {entry.end_reason}")
            return False
        if entry.state == "intended":
            if not reconcile.has_client(entry):
                self._resolve_launch(entry)
            return True
        left_s = self._seconds_left(entry)
        if self._end_reason is None and left_s is not None and self._is_due(entry, left_s):
            reason = f"limit reached: {limits_text(entry.max_hours, entry.max_dollars)}"
            self._end_reason = reconcile.reason_to_record(self._account, entry, reason)
        if self._end_reason is not None:
            return not self._terminate(entry, self._end_reason)
        if entry.watchdog is not None and entry.ready_at is not None:
            self._heartbeat.beat(entry)
        self._poll()
        return True

    def _read(self) -> Entry | None:
        try:
            entry = self._ledger.find(self._name)
        except (InputError, OutsideError) as error:
            log(f"{error} Using what was last known.")
            time.sleep(self._timing.guard_retry_s)
            return self._entry
        if entry is None and self._entry is not None and self._entry.state == "launched":
            return self._entry  # the ledger was moved away: the instance was not
        self._entry = entry
        return entry

    def _seconds_left(self, entry: Entry) -> float | None:
        """Seconds until the first limit; None without one."""
        until = entry.ends_at()
        return None if until is None else until - self._now()

    def _now(self) -> float:
        """Unix seconds. Suspended time counts; setting the clock back makes no instance younger."""
        steady = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
        self._clock_offset_s = max(self._clock_offset_s, time.time() - steady)
        return steady + self._clock_offset_s

    def _is_due(self, entry: Entry, left_s: float) -> bool:
        """Whether to terminate it now.

        The rescue command gets its time before the limit, or after a limit that passed while the machine slept.
        """
        if not entry.rescue:
            return left_s <= 0
        lead_s = min(entry.rescue_s, ((entry.ends_at() or 0.0) - entry.asked_at) / 4)
        if left_s > lead_s:
            self._rescue_code = None
        elif self._rescue_code is None:
            log(f"a limit is near. Running {entry.rescue[0]} for at most {lead_s:.0f} s")
            self._rescue_code = _run_rescue(entry.rescue, left_s if left_s > 0 else lead_s)
        else:
            return self._rescue_code == 0 or left_s <= 0
        return False

    def _terminate(self, entry: Entry, reason: str) -> bool:
        """Whether it is terminated. The ledger need not be readable for that."""
        what = reconcile.describe(entry)
        log(f"terminating {what}: {reason}")
        visible_from = reconcile.visible_from(self._account, entry)
        if not self._try(lambda: reconcile.terminate_instance(self._account, str(entry.id), what, visible_from)):
            return False  # the next tick tries again, unless another process has terminated it
        log(f"{what} is terminated")
        until = time.monotonic() + self._timing.guard_linger_s
        while time.monotonic() < until:  # then the next command finds it out
            if self._try(lambda: self._ledger.end(entry.name, reason, instead_of=reconcile.UNEXPLAINED)):
                break
        return True

    def _resolve_launch(self, entry: Entry) -> None:
        """The client is dead, or gave up without knowing."""
        self._try(lambda: reconcile.resolve_launch(self._account, entry))
        resolved = self._read()
        if resolved is not None and resolved.state == "launched" and resolved.terminate_after:
            self._end_reason = "its client died before it knew of it"

    def _poll(self) -> None:
        """Update the ledger at intervals. No failure may delay the limits: this does not wait."""
        if time.monotonic() - self._polled_at < self._timing.guard_poll_s:
            return
        try:
            reconcile.refresh(self._account)
            self._refused = 0
        except AuthError as error:
            self._refused += 1
            if self._refused == REFUSED_MAX:
                log("a guard with another key may take over; this one keeps trying")
                self._lock.release()
            log(str(error))
        except (InputError, OutsideError) as error:
            log(str(error))
        self._polled_at = time.monotonic()

    def _try(self, action: Callable[[], object]) -> bool:
        """Whether it succeeds; a failure is logged and followed by a wait."""
        try:
            action()
        except (InputError, OutsideError) as error:
            log(f"{error} Trying again in {self._timing.guard_retry_s:.0f} s.")
            time.sleep(self._timing.guard_retry_s)
            return False
        return True


def _run_rescue(command: tuple[str, ...], timeout_s: float) -> int:
    """Its exit code; 1 if it does not start. After the timeout it is killed with its children."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except (OSError, ValueError) as error:
        log(f"{command[0]} does not start: {error}")
        return 1
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def log(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk must not stop the guard
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)


def main(arguments: list[str]) -> int:
    """Check everything, then watch."""
    ledger = Ledger(state_dir())
    try:
        name = arguments[0] if arguments else ""
        timing = parse(arguments[1].encode(), Timing) if arguments[1:] else Timing()
        entry = ledger.find(name)
        if entry is None:
            raise InputError(f"{ledger.file}: has no instance {name}.")
        key = os.environ.get("LAMBDA_API_KEY", "").strip()
        rate_limiter = RateLimiter(ledger.folder, request_s=timing.request_interval_s)
        account = Account(Client(key, entry.url, rate_limiter, patience_s=30.0), ledger, log, timing)
        if not account.sees(entry):
            raise InputError(f"{name} was launched with another LAMBDA_API_KEY. Set that one.")
    except (InputError, OutsideError) as error:
        log(str(error))
        return 2
    for number in (signal.SIGHUP, signal.SIGINT):  # a handler, not SIG_IGN: the rescue command must not inherit it
        signal.signal(number, lambda *_: None)
    lock = FileLock(lock_file(ledger, name), timeout=2.0, poll_interval=0.05, fallback_to_soft=False)
    try:
        lock.acquire()
        lock_file(ledger, name).write_text(f"{os.getpid()}\n")
    except Timeout:  # another guard watches
        return 0
    except (OSError, NotImplementedError) as error:
        log(f"{lock_file(ledger, name)}: cannot be locked: {error}")
        return 1
    limits = limits_text(entry.max_hours, entry.max_dollars)
    log(f"watching (process {os.getpid()}): {entry.type_name}, limits: {limits}")
    while True:
        try:
            Guard(account, name, lock).watch()
        except Exception as error:  # whatever it is, an instance is billed
            log(f"{type(error).__name__}: {error}. Starting again")
            time.sleep(timing.guard_retry_s)
        else:
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
