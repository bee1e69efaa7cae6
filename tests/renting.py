"""What the tests of rented instances share: a fake cloud, an account with short timing, a ledger, the end of all guards."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from fractal.cloud import guard, reconcile
from fractal.cloud.account import Account, Timing
from fractal.cloud.lambda_api import Client, RateLimiter
from fractal.cloud.launch import LaunchRequest, launch
from fractal.cloud.ledger import Entry, Ledger
from fractal.cloud.ssh_keys import Key
from tests.conftest import until
from tests.fake_lambda.server import FakeLambda

QUICK = Timing(
    poll_s=0.03,
    unknown_launch_s=0.35,
    launch_request_s=0.3,
    hidden_s=0.5,
    repeat_terminate_s=0.4,
    terminate_timeout_s=3.0,
    unhealthy_s=0.2,
    capacity_poll_s=0.1,
    guard_tick_s=0.05,
    guard_poll_s=0.3,
    guard_retry_s=0.1,
    guard_linger_s=0.4,
    request_interval_s=0.0,
)
TYPE = "gpu_1x_a10"
REQUEST = LaunchRequest(types=(TYPE,))


@cache
def key_pair(folder: Path) -> Path:
    file = folder / "id_ed25519"
    if not file.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    return file


class Renting:
    """One account at the fake cloud, one state folder, and what was logged."""

    def __init__(self, cloud: FakeLambda, folder: Path, key_file: Path) -> None:
        self.cloud = cloud
        self.ledger = Ledger(folder)
        self.key = Key("mine", key_file)
        self.logged: list[str] = []
        self.cloud.add_ssh_key("mine", Path(f"{key_file}.pub").read_text().strip())

    def client(self, key: str = "secret-key", patience_s: float = 0.5, timeout_s: float = 2.0) -> Client:
        limiter = RateLimiter(self.ledger.folder, request_s=0.0, launch_s=0.0)
        return Client(key, self.cloud.url, limiter, patience_s=patience_s, timeout_s=timeout_s, backoff_s=0.02)

    def account(self, client: Client | None = None, timing: Timing = QUICK, **options: Any) -> Account:
        """`options` are those of `client`."""
        return Account(client or self.client(**options), self.ledger, self.logged.append, timing)

    def launch(self, request: LaunchRequest = REQUEST, timing: Timing = QUICK, **options: Any) -> Entry:
        return launch(self.account(timing=timing), request, self.key, **options)

    def names(self) -> set[str]:
        return {instance["name"] for instance in self.cloud.living()}

    def open_names(self) -> set[str]:
        return {entry.name for entry in self.ledger.open_entries()}

    def find(self, entry: Entry) -> Entry:
        found = self.ledger.find(entry.name)
        assert found is not None
        return found

    def terminate_all(self) -> None:
        for entry in self.ledger.open_entries():
            reconcile.terminate(self.account(), entry)
        assert self.cloud.living() == []
        assert self.open_names() == set()

    def check(self) -> None:
        """What has to hold after anything: no instance is alive that the ledger does not name."""
        before = self.open_names()
        assert self.names() <= before | self.open_names()  # a guard may be terminating one meanwhile
        assert self.cloud.troubles == []


@contextmanager
def renting(folder: Path, key_file: Path, **cloud: Any) -> Iterator[Renting]:
    with FakeLambda(rate=False, **cloud) as fake:
        try:
            yield Renting(fake, folder, key_file)
        finally:
            end_guards(folder)


def guard_pids(folder: Path) -> list[int]:
    """Of the guards that hold their lock."""
    pids = []
    for file in folder.glob("guard-*.lock"):
        with suppress(FileNotFoundError, ValueError):  # it ends, or has just started
            if guard.alive(Ledger(folder), file.name.removeprefix("guard-").removesuffix(".lock")):
                pids.append(int(file.read_text()))
    return pids


def end_guards(folder: Path) -> None:
    for pid in guards(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not guards(folder) and not guard_pids(folder))


def guards(folder: Path) -> list[int]:
    """All processes, also one that released its lock."""
    pids = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "fractal.cloud.guard" in process.cmdline() and process.environ().get("FRACTAL_STATE") == str(folder):
                pids.append(process.pid)
    return pids
