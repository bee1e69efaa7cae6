"""The ledger: every instance that was requested, from the intent to its end, in one file that outlives any client.

Each change is written whole, under a lock, before the next step is taken: a kill at any instruction leaves the last
state, and the intent to launch is on disk before the request is sent. A file that cannot be read is never overwritten.
"""

import contextlib
import os
import re
import secrets
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import platformdirs
import psutil
from filelock import FileLock, Timeout

from fractal.errors import InputError, OutsideError
from fractal.jsonl import MALFORMED, parse, write_whole

LOCK_TIMEOUT_S = 30.0  # a change takes milliseconds
PREFIX = "fractal"
NAME = re.compile(rf"{PREFIX}-([0-9a-f]{{6}})-[0-9a-f]{{8}}")  # the operator is the group
State = Literal["intended", "launched", "ended"]


@dataclass(frozen=True, slots=True)
class Event:
    """A step that took time while an instance was rented: launch, boot, build, push, run..."""

    what: str
    at: float  # unix seconds when it began
    seconds: float


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this machine; its pid alone may be used again by another process."""

    pid: int
    started: float  # seconds, by a clock that the user cannot set where there is one

    @classmethod
    def current(cls) -> Self:
        started = process_start(os.getpid())
        assert started is not None
        return cls(os.getpid(), started)

    def alive(self) -> bool:
        started = process_start(self.pid)
        return started is not None and abs(started - self.started) < 1.0


@dataclass(frozen=True, slots=True)
class FileSystemMount:
    """A file system of Lambda's that the launch request names."""

    name: str
    mount_point: str  # absolute path on the instance


@dataclass(frozen=True, slots=True)
class Watchdog:
    """When the service on the instance ends it, beside the limits of the entry; None: never for that."""

    idle_s: float | None = 3600.0  # nothing ran for so long
    guard_s: float | None = 43200.0  # the operator's guard was not seen for so long


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One instance, from the intent to its end."""

    name: str  # unique: fractal-<operator>-<8 hex digits>
    url: str  # of the API, and
    account: str  # digest of the key: the account that it was launched in
    type_name: str
    region: str
    price_cents_per_hour: int
    ssh_key: str  # its name at Lambda
    key_file: str  # the private key here
    asked_at: float  # unix seconds: limits and cost count from here
    max_hours: float | None
    max_dollars: float | None
    max_price_usd: float | None  # per hour
    file_systems: tuple[FileSystemMount, ...] = ()
    state: State = "intended"
    id: str | None = None
    ip: str | None = None  # as last seen
    launched_at: float | None = None  # when its id became known
    ready_at: float | None = None
    ended_at: float | None = None
    end_reason: str | None = None
    owner: Process | None = None  # the client that uses it now
    terminate_after: bool = False  # its client terminates it when the command ends
    host_key: str | None = None  # public half of the host key that was made for it; None: an earlier version's launch
    strict_host_key: bool = False  # no other one is accepted
    watchdog: Watchdog | None = None  # the one that is to be on duty on the instance
    rescue: tuple[str, ...] = ()  # command that the guard runs before it terminates the instance at a limit
    rescue_s: float = 300.0  # timeout of that command
    timeline: tuple[Event, ...] = ()

    @property
    def usd_per_hour(self) -> float:
        return self.price_cents_per_hour / 100

    @property
    def too_expensive(self) -> bool:
        return self.max_price_usd is not None and self.price_cents_per_hour > self.max_price_usd * 100 + 1e-6

    def ends_at(self) -> float | None:
        """When its limits are reached, in unix seconds."""
        ends = []
        if self.max_hours is not None:
            ends.append(self.asked_at + self.max_hours * 3600)
        if self.max_dollars is not None and self.price_cents_per_hour > 0:
            ends.append(self.asked_at + self.max_dollars * 100 / self.price_cents_per_hour * 3600)
        return min(ends, default=None)

    def hours(self, now: float) -> float:
        """How long it was billed, at most."""
        end = self.ended_at if self.ended_at is not None else now
        return max(0.0, end - self.asked_at) / 3600 if self.id is not None or self.state != "ended" else 0.0

    def dollars(self, now: float) -> float:
        return self.hours(now) * self.price_cents_per_hour / 100


@dataclass(frozen=True, slots=True)
class _File:
    version: Literal[1]
    entries: list[Entry]


def limits_text(max_hours: float | None, max_dollars: float | None) -> str:
    hours = f"{max_hours:g} h" if max_hours is not None else ""
    dollars = f"{max_dollars:g} $" if max_dollars is not None else ""
    return " or ".join(filter(None, (hours, dollars))) or "no limit"


def state_dir() -> Path:
    """Where the ledger, the locks, the logs of the guards and our ssh files are."""
    given = os.environ.get("FRACTAL_STATE")
    return Path(given).expanduser().absolute() if given else platformdirs.user_state_path("fractal")


class Ledger:
    """The entries of one state folder, in the order of their requests.

    Reading needs no lock and writes nothing. Raises InputError for a file that is no ledger of Fractal's, OutsideError
    where the folder cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "ledger.json"

    def entries(self) -> list[Entry]:
        try:
            data = self.file.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._outside(error) from error
        return self._parse(data)

    def open_entries(self) -> list[Entry]:
        """Those not known to have ended: they may be billed."""
        return [entry for entry in self.entries() if entry.state != "ended"]

    def find(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries() if entry.name == name), None)

    def add(self, entry: Entry) -> None:
        with self._editing() as entries:
            entries.append(entry)

    def drop(self, name: str) -> None:
        """Remove an intent that certainly came to nothing."""
        with self._editing() as entries:
            entries[:] = [entry for entry in entries if entry.name != name or entry.state != "intended"]

    def change(self, name: str, *, expected: Entry | None = None, **fields: Any) -> Entry:
        """Set fields; with `expected`, only if the entry still equals it. Returns the entry as it is then."""
        with self._editing() as entries:
            index = self._index(entries, name)
            if expected is None or entries[index] == expected:
                entries[index] = replace(entries[index], **fields)
            return entries[index]

    def end(self, name: str, reason: str, *, expected: Entry | None = None, instead_of: Collection[str] = ()) -> bool:
        """Mark the instance as ended; whether anything was written.

        The first reason is kept, unless it begins with one of `instead_of`.
        """
        with self._editing() as entries:
            index = self._index(entries, name)
            entry = entries[index]
            if entry.state == "ended":
                if not (entry.end_reason or "").startswith(tuple(instead_of)):
                    return False
                entries[index] = replace(entry, end_reason=reason)
                return True
            if expected not in (None, entry):
                return False
            entries[index] = replace(entry, state="ended", ended_at=time.time(), end_reason=reason, owner=None)
            return True

    def add_event(self, name: str, what: str, at: float, seconds: float) -> None:
        with self._editing() as entries:
            index = self._index(entries, name)
            timeline = (*entries[index].timeline, Event(what, at, seconds))
            entries[index] = replace(entries[index], timeline=timeline)

    def operator(self) -> str:
        """Six hex digits that identify this state folder, made once. They outlive a broken ledger."""
        file = self.folder / "operator"
        with self.lock("ledger", "writing the ledger"):
            try:
                if not file.exists():
                    write_whole(file, secrets.token_hex(3).encode() + b"\n")
                return file.read_text().strip()
            except OSError as error:
                raise self._outside(error) from error

    def new_name(self) -> str:
        return f"{PREFIX}-{self.operator()}-{secrets.token_hex(4)}"

    def _index(self, entries: list[Entry], name: str) -> int:
        for index, entry in enumerate(entries):
            if entry.name == name:
                return index
        raise InputError(f"{self.file}: has no instance {name}. Look at `invoke ps`.")

    def _parse(self, data: bytes) -> list[Entry]:
        try:
            return list(parse(data, _File).entries)
        except (*MALFORMED, ValueError) as error:
            raise InputError(
                f"{self.file}: is broken, or of a newer fractal: {error}. It may name machines that are billed, so it "
                f"stays as it is. Restore it, or update this fractal; or move it away (mv {self.file} "
                f"{self.file}.broken) and find what is alive with `invoke reap`."
            ) from error

    @contextmanager
    def _editing(self) -> Iterator[list[Entry]]:
        """The entries, to be changed in place; written when the block ends without an exception."""
        with self.lock("ledger", "writing the ledger"):
            entries = self.entries()
            before = list(entries)
            yield entries
            if entries == before:
                return
            data = msgspec.json.format(msgspec.json.encode(_File(1, entries)), indent=1) + b"\n"
            if self._parse(data) != entries:  # a nan, for example
                raise ValueError(f"not a ledger: {entries}")
            try:
                write_whole(self.file, data)
                folder = os.open(self.folder, os.O_RDONLY)  # the rename itself has to survive a power cut
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            except OSError as error:
                raise self._outside(error) from error

    @contextmanager
    def lock(self, name: str, doing: str, *, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
        """A lock of this folder, which the kernel releases if this process dies.

        Raises InputError that names the process which holds it, and what that one is `doing`.
        """
        file = self.folder / f"{name}.lock"
        lock = FileLock(file, timeout=timeout_s, poll_interval=0.01, fallback_to_soft=False)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            pid = file.read_text().strip() or "unknown"
            raise InputError(
                f"{self.folder}: process {pid} is {doing} right now. Wait for it, or end it (kill {pid})."
            ) from None
        except (OSError, NotImplementedError) as error:
            raise self._outside(error) from error
        try:
            with contextlib.suppress(OSError):  # a full disk
                file.write_text(f"{os.getpid()}\n")
            yield
        finally:
            lock.release()

    def _outside(self, error: Exception) -> OutsideError:
        return OutsideError(
            f"{self.folder}: the ledger cannot be read or written: {getattr(error, 'strerror', None) or error}. Check "
            "owner and disk, or name another folder in FRACTAL_STATE (it would not know these instances)."
        )


def process_start(pid: int) -> float | None:
    """When the process started, in seconds; None if it does not run."""
    try:
        if sys.platform == "linux":  # seconds since boot: no jump of the wall clock changes them
            words = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
            return None if words[0] in "ZX" else int(words[19]) / os.sysconf("SC_CLK_TCK")
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except (OSError, IndexError, ValueError, psutil.Error):
        return None
