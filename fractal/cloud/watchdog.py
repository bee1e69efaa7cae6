"""The watchdog of an instance, seen from here: started over SSH, kept to the ledger's limits, and told of its guard.

What it does there is in watchdog_service.py, which is sent as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fractal.cloud import ssh_config, watchdog_service
from fractal.cloud.account import Account
from fractal.cloud.ledger import Entry
from fractal.cloud.watchdog_service import Settings
from fractal.errors import InputError, OutsideError
from fractal.jsonl import MALFORMED, parse

if TYPE_CHECKING:  # the guard, which has no use for it, starts faster
    from fractal.cloud.remote_host import Remote

SCRIPT = Path(__file__).parent / "scripts/watchdog.sh"
PROGRAM = Path(watchdog_service.__file__)
HEARTBEAT = "touch /run/fractal-watchdog/heartbeat"  # the folder of watchdog.sh; fails where no watchdog ever was
HEARTBEAT_TIMEOUT_S = 60.0
START_TIMEOUT_S = 120.0
STALE_S = 300.0  # without a look it hangs: no step of it takes half of that
GRACE_S = 30.0  # at a limit the guard goes first: the ledger then knows the reason


@dataclass(frozen=True, slots=True)
class State:
    """What the watchdog that runs wrote when it last looked."""

    settings: dict[str, Any]  # Settings.public
    looked_s: float  # seconds ago
    left_s: float | None  # until the limit
    idle_s: float  # without work; 0 where nobody asked for that
    guard_seen_s: float  # seconds before it looked
    running: str  # what keeps the instance from being idle
    problem: str  # why the last request to the API failed
    reason: str  # why it is ending the instance

    def __str__(self) -> str:
        seen = f"its watchdog looked {self.looked_s:.0f} s ago, and had seen the guard {self.guard_seen_s:.0f} s before"
        if self.reason:
            seen += f"; it is ending the instance: {self.reason}"
        return seen + (f"; {self.problem}" if self.problem else "")


def settings(account: Account, entry: Entry) -> Settings:
    """For the watchdog of this entry, with its limits as they are now."""
    assert entry.id is not None
    assert entry.watchdog is not None
    ends_at = entry.ends_at()
    return Settings(
        id=entry.id,
        url=account.client.url,
        account=account.client.account,
        key=account.client.key,
        left_s=None if ends_at is None else ends_at + GRACE_S - time.time(),
        ends_at=ends_at,
        idle_s=entry.watchdog.idle_s,
        guard_s=entry.watchdog.guard_s,
        tick_s=account.timing.watchdog_tick_s,
    )


def keep(account: Account, remote: Remote, entry: Entry) -> None:
    """Let a watchdog with the entry's limits be on duty. A failure is logged: the guard remains."""
    wanted = settings(account, entry)
    try:
        before = read_state(remote)
        if before is not None and before.settings == wanted.public() and before.looked_s < STALE_S:
            return
        start(remote, wanted)
        after = read_state(remote)
    except OutsideError as error:
        account.log(f"{entry.name} has NO watchdog: {error} Only the guard here ends it.")
        return
    what = "no watchdog ran there; one is on duty now" if before is None else "its watchdog has the new limits"
    account.log(f"{entry.name}: {what}")
    if after is not None and after.problem:
        account.log(f"{entry.name}: its watchdog could not end it now: {after.problem}")


def start(remote: Remote, wanted: Settings) -> None:
    """Start one in place of any that runs; the key travels as its standard input. Raises OutsideError."""
    reader, writer = os.pipe()
    os.write(writer, json.dumps(asdict(wanted)).encode())
    os.close(writer)
    with open(reader, "rb") as stdin:
        arguments = ("start", PROGRAM.read_text())
        done = remote.link.run(SCRIPT.read_text(), *arguments, stdin=stdin, timeout_s=START_TIMEOUT_S)
    if done.returncode:
        last = (done.stdout.strip() or done.stderr.strip() or "no reason given").splitlines()[-1]
        raise OutsideError(f"it does not start: {last[-200:].rstrip('. ')}.")


def read_state(remote: Remote) -> State | None:
    """The state of the watchdog that runs; None where none does. Raises OutsideError."""
    output = remote.check("tell of its watchdog", SCRIPT.read_text(), "status")
    try:
        return parse(output.encode(), State) if output.strip() else None
    except MALFORMED as error:
        raise OutsideError(f"{remote.host}: its watchdog's state is {output[:100]!r}: {error}.") from error


class Heartbeat:
    """Tells an instance's watchdog at intervals that its guard is alive. Never waits."""

    def __init__(self, folder: Path, interval_s: float, log: Callable[[str], None]) -> None:
        self._folder, self._interval_s, self._log = folder, interval_s, log
        self._process: subprocess.Popen[bytes] | None = None
        self._begin = -interval_s
        self._failed = False

    def beat(self, entry: Entry) -> None:
        """Begin one if it is due, and look how the one before went."""
        now = time.monotonic()
        if self._process is not None:
            if self._process.poll() is None and now - self._begin < HEARTBEAT_TIMEOUT_S:
                return
            self._process.kill()
            failed = self._process.wait() != 0
            self._process = None
            if failed != self._failed:
                self._log("no heartbeat reaches its watchdog" if failed else "its watchdog gets heartbeats again")
            self._failed = failed
        if now - self._begin >= self._interval_s:
            self._begin = now
            try:
                self._process = subprocess.Popen(
                    self._command(entry),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except (OSError, InputError) as error:  # the guard has more to do than this
                self._log(f"no heartbeat reaches its watchdog: {error}")

    def _command(self, entry: Entry) -> list[str]:
        """The alias may refer to another instance: this one is named by options, which come before the file's."""
        key_file = ssh_config.quoted(Path(entry.key_file))
        options = [f"HostName={entry.ip}", f"HostKeyAlias={entry.id}", f"IdentityFile={key_file}", "BatchMode=yes"]
        options += ["ConnectTimeout=15"]
        config = str(ssh_config.config_file(self._folder))
        return ["ssh", "-T", "-F", config, *(f"-o{option}" for option in options), "--", ssh_config.ALIAS, HEARTBEAT]
