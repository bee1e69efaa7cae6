"""The guard: one process for each instance, detached from everything, that ends it at its limits.

    python -m fractal.cloud.guard fractal-1a2b3c-4d5e6f70

`start` runs this before the launch request goes out, so no instance is ever without one: if the client dies before it
knows the answer, the guard finds out by name. It follows the ledger (limits and the rescue command may change at any
time), acts by the wall clock, keeps trying for as long as the API cannot be reached, and ends when the entry has ended.
The key comes by LAMBDA_API_KEY. It owns nothing of the instance but its end.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from filelock import BaseFileLock, FileLock, Timeout

from fractal.cloud import life
from fractal.cloud.lambda_api import REQUEST_INTERVAL_S, AuthError, Client, CloudError, Pace
from fractal.cloud.ledger import Entry, Ledger, state_dir
from fractal.errors import InputError, OutsideError
from fractal.jsonl import parse

START_TIMEOUT_S = 60.0
RETRY_MAX_S = 60.0
REFUSED_MAX = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """How a guard goes about it, in seconds."""

    tick_s: float = 2.0  # between two looks at clock and ledger: a laptop that wakes up is noticed within this
    poll_s: float = 60.0  # between two looks at the API
    retry_s: float = 5.0  # first wait after a failure; doubles
    linger_s: float = 900.0  # a launch that seems not to have happened is looked for this much longer
    request_s: float = REQUEST_INTERVAL_S
    waits: life.Waits = life.WAITS


SETTINGS = Settings()


@dataclass(frozen=True, slots=True)
class Status:
    """What `invoke ps` says of a guard."""

    alive: bool
    until: float | None  # unix seconds
    hours_left: float | None
    dollars_left: float | None


# --- the client's side


def start(ledger: Ledger, name: str, settings: Settings = SETTINGS) -> None:
    """Return when a guard watches over the entry, which may be one that did already. Raises CloudError."""
    if alive(ledger, name):
        return
    log = log_file(ledger, name)
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "FRACTAL_STATE": str(ledger.folder)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    words = [name] if settings == SETTINGS else [name, msgspec.json.encode(settings).decode()]
    begun = 0
    try:
        with log.open("ab") as out:
            begun = out.tell()
            done = subprocess.run(
                [sys.executable, "-m", "fractal.cloud.guard", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=ledger.folder,
                env=env,
                start_new_session=True,  # neither Ctrl-C nor a closed terminal reaches it
                timeout=START_TIMEOUT_S,
            ).returncode
        why = log.read_bytes()[begun:].decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
    except subprocess.TimeoutExpired:
        done, why = 1, [f"no sign of life after {START_TIMEOUT_S:.0f} s"]
    except OSError as error:
        done, why = 1, [error.strerror or str(error)]
    if done != 0:
        raise CloudError(f"The guard of {name} does not start: {why[0].rstrip('.')}. Its log is {log}.")


def alive(ledger: Ledger, name: str) -> bool:
    """Whether a guard watches over it: it holds a lock that the kernel takes from the dead."""
    file = lock_file(ledger, name)
    if not file.exists():
        return False
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def status(ledger: Ledger, name: str) -> Status:
    """Its state, and what is left of the limits. Raises InputError for an unknown name."""
    entry = ledger.find(name)
    if entry is None:
        raise InputError(f"{ledger.file}: has no instance {name}. Look at `invoke ps`.")
    now, until = time.time(), entry.ends_at()
    return Status(
        alive=alive(ledger, name),
        until=until,
        hours_left=None if until is None else max(0.0, until - now) / 3600,
        dollars_left=None if entry.max_dollars is None else max(0.0, entry.max_dollars - entry.dollars(now)),
    )


def log_file(ledger: Ledger, name: str) -> Path:
    return ledger.folder / f"guard-{name}.log"


def lock_file(ledger: Ledger, name: str) -> Path:
    return ledger.folder / f"guard-{name}.lock"


# --- the guard's side


class Clock:
    """The age of an instance in seconds. Wall time counts, also asleep; set back, it cannot make anything younger."""

    def __init__(self) -> None:
        self._from: dict[float, tuple[float, float]] = {}  # asked_at: age when first seen, and when that was

    def age(self, asked_at: float) -> float:
        wall = time.time() - asked_at
        first, since = self._from.setdefault(asked_at, (max(0.0, wall), _steady()))
        return max(wall, first + _steady() - since)


def _steady() -> float:
    """Seconds that nobody sets; where there is such a clock, asleep ones too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Guard:
    """Watches over one entry until that has ended."""

    def __init__(self, client: Client, ledger: Ledger, name: str, settings: Settings, lock: BaseFileLock) -> None:
        self._client = client
        self._ledger = ledger
        self._name = name
        self._settings = settings
        self._lock = lock
        self._refused = 0  # looks in a row that our key was not good enough for
        self._clock = Clock()
        self._entry: Entry | None = None  # as last read: a ledger that breaks later stops no guard
        self._lost = False  # it is not in the ledger any more
        self._polled = time.monotonic()
        self._retry_s = settings.retry_s
        self._ending: str | None = None  # why, once that is decided
        self._rescue: subprocess.Popen[bytes] | None = None
        self._rescue_until = 0.0

    def watch(self) -> None:
        """Return when there is nothing left to guard."""
        while self._tick():
            time.sleep(self._settings.tick_s)

    def _tick(self) -> bool:
        """One look; whether to go on."""
        entry = self._read()
        if entry is None:
            log("the intent was dropped: nothing was launched")
            return False
        if entry.state == "ended":
            self._stop_rescue()
            if life.given_up(entry) and time.time() - (entry.ended_at or 0.0) < self._settings.linger_s:
                self._look()
                return True
            log(f"the instance has ended: {entry.end_reason}")
            return False
        if entry.state == "intended":
            if entry.owner is None or not entry.owner.alive():
                self._settle(entry)
            return True
        end_in_s = self._left(entry)
        if self._ending is None and end_in_s is not None and self._due(entry, end_in_s):
            self._ending = "limit reached: " + _limits(entry)
        if self._ending is not None:
            return not self._end(entry, self._ending)
        return not self._look()

    def _read(self) -> Entry | None:
        try:
            now = self._ledger.find(self._name)
        except (InputError, OutsideError) as error:
            log(f"{error} Going on with what was last known.")
            time.sleep(self._settings.retry_s)
            return self._entry
        self._lost = now is None and self._entry is not None and self._entry.state == "launched"
        if self._lost:
            return self._entry  # the ledger was moved away: the instance was not
        self._entry = now
        return now

    def _left(self, entry: Entry) -> float | None:
        """Seconds until the first limit; None without one."""
        until = entry.ends_at()
        return None if until is None else until - entry.asked_at - self._clock.age(entry.asked_at)

    def _due(self, entry: Entry, end_in_s: float) -> bool:
        """Whether to end it now. The rescue gets its time before the limit, or after one that was slept through."""
        if self._rescue is not None:
            if (code := self._rescue.poll()) is None:
                return time.monotonic() >= self._rescue_until
            return code == 0 or end_in_s <= 0
        span = (entry.ends_at() or 0.0) - entry.asked_at
        lead_s = min(entry.rescue_s, span / 4)
        if not entry.rescue or end_in_s > lead_s:
            return end_in_s <= 0
        self._rescue_until = time.monotonic() + (lead_s if end_in_s <= 0 else end_in_s)
        log(f"the limit is near: {_limits(entry)}. Running {entry.rescue[0]} for at most {lead_s:.0f} s")
        try:
            self._rescue = subprocess.Popen(entry.rescue, stdin=subprocess.DEVNULL, start_new_session=True)
        except (OSError, ValueError) as error:
            log(f"{entry.rescue[0]} does not start: {error}")
            return end_in_s <= 0
        return False

    def _stop_rescue(self) -> None:
        if self._rescue is None:
            return
        if self._rescue.poll() is None:
            log("the rescue did not end in time")
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._rescue.pid, signal.SIGKILL)
        self._rescue.wait()

    def _end(self, entry: Entry, reason: str) -> bool:
        """Whether it is over. The ledger need not be readable for that."""
        self._stop_rescue()
        what = f"{entry.name} ({entry.type_name}, {entry.id})"
        log(f"ending {what}: {reason}")
        waits, from_then = self._settings.waits, life.visible_from(entry, self._settings.waits)
        if not self._try(lambda: life.end(self._client, str(entry.id), what, log, from_then, waits)):
            return False  # told there; the next tick tries again, unless another has ended it
        log(f"{what} is ended")
        until = time.monotonic() + self._settings.linger_s
        while (
            not self._try(lambda: self._ledger.end(entry.name, reason, instead_of=life.UNEXPLAINED))
            and time.monotonic() < until
        ):
            pass  # told there; in the end the next command finds it out
        return True

    def _settle(self, entry: Entry) -> None:
        """The client is dead, or gave up without knowing."""
        self._try(lambda: life.settle(self._client, self._ledger, entry, log, self._settings.waits))
        settled = self._read()
        if settled is not None and settled.state == "launched" and settled.terminate_after:
            self._ending = "its client died before it knew of it"

    def _look(self) -> bool:
        """Bring the ledger up to date, now and then. No failure may hold up the limits: no waiting here.

        Whether the instance has ended, where no ledger could say so.
        """
        if time.monotonic() - self._polled < self._settings.poll_s:
            return False
        try:
            if self._lost and self._entry is not None:
                found = life.ask(self._client, self._entry)
                hidden = time.time() < life.visible_from(self._entry, self._settings.waits)
                if found.status in life.ENDED if found else not hidden:
                    log("the instance has ended, and the ledger is lost")
                    return True
            else:
                life.look(self._client, self._ledger, log, self._settings.waits)
            self._refused = 0
        except AuthError as error:
            self._refused += 1
            if self._refused == REFUSED_MAX:
                log("a guard with another key may take over; this one keeps trying")
                self._lock.release()
            log(str(error))
        except (InputError, OutsideError) as error:
            log(str(error))
        self._polled = time.monotonic()
        return False

    def _try(self, work: Callable[[], object]) -> bool:
        """Do it; a failure is told and slept over, a longer time each time."""
        try:
            work()
        except (InputError, OutsideError) as error:
            log(f"{error} Trying again in {self._retry_s:.0f} s.")
            time.sleep(self._retry_s)
            self._retry_s = min(RETRY_MAX_S, 2 * self._retry_s)
            return False
        self._retry_s = self._settings.retry_s
        return True


def _limits(entry: Entry) -> str:
    parts = [f"{entry.max_hours:g} h" if entry.max_hours is not None else ""]
    parts.append(f"{entry.max_dollars:.2f} USD" if entry.max_dollars is not None else "")
    return " or ".join(filter(None, parts))


def log(text: str) -> None:
    try:
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)
    except OSError:  # a full disk must not stop the guard
        pass


def main(words: list[str]) -> int:
    """Check everything, then go on in a child of its own; 0 when that is on watch."""
    ledger = Ledger(state_dir())
    try:
        name = words[0] if words else ""
        settings: Settings = parse(words[1].encode(), Settings) if words[1:] else SETTINGS
        entry = ledger.find(name)
        if entry is None:
            raise InputError(f"{ledger.file}: has no instance {name}.")
        key = os.environ.get("LAMBDA_API_KEY", "").strip()
        client = Client(key, entry.url, pace=Pace(ledger.folder, request_s=settings.request_s), patience_s=30.0)
        if not life.ours(client, entry):
            raise InputError(f"{name} was launched with another LAMBDA_API_KEY. Set that one.")
    except (InputError, OutsideError) as error:
        log(str(error))
        return 2
    reader, writer = os.pipe()
    if os.fork() > 0:
        os.close(writer)
        return 0 if os.read(reader, 1) == b"+" else 1
    os.close(reader)
    for number in (signal.SIGHUP, signal.SIGINT):  # a handler, not SIG_IGN: the rescue must not inherit it
        signal.signal(number, lambda *_: None)
    lock = FileLock(lock_file(ledger, name), timeout=2.0, poll_interval=0.05, fallback_to_soft=False)
    try:
        lock.acquire()
        lock_file(ledger, name).write_text(f"{os.getpid()}\n")
    except Timeout:
        os.write(writer, b"+")  # there is one
        return 0
    except (OSError, NotImplementedError) as error:
        log(f"{lock_file(ledger, name)}: cannot be locked: {error}")
        return 1
    log(f"on watch (process {os.getpid()}): {entry.type_name}, limits: {_limits(entry) or 'none'}")
    os.write(writer, b"+")
    os.close(writer)
    while True:
        try:
            Guard(client, ledger, name, settings, lock).watch()
        except Exception as error:  # whatever it is, an instance is billed
            log(f"{type(error).__name__}: {error}. Starting over")
            time.sleep(settings.retry_s)
        else:
            if lock.is_locked:
                lock_file(ledger, name).unlink(missing_ok=True)
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
