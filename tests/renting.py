"""What the tests of rented instances share: a fake cloud, a quick client, a ledger, and the end of all guards."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil

from fractal.cloud import guard
from fractal.cloud.instance import Key, Wish, launch
from fractal.cloud.lambda_api import Client, Pace
from fractal.cloud.ledger import Entry, Ledger
from fractal.cloud.life import Waits
from tests.conftest import until
from tests.fake_lambda.server import FakeLambda

QUICK = Waits(
    look_s=0.03, settle_s=0.35, send_s=0.3, grace_s=0.5, resend_s=0.4, end_s=3.0, unhealthy_s=0.2, capacity_s=0.1
)
SETTINGS = guard.Settings(tick_s=0.05, poll_s=0.3, retry_s=0.1, linger_s=0.4, request_s=0.0, waits=QUICK)
TYPE = "gpu_1x_a10"
WISH = Wish(types=(TYPE,))


@cache
def key_pair(folder: Path) -> Path:
    file = folder / "id_ed25519"
    if not file.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    return file


class Renting:
    """One account, one state folder, and what was said."""

    def __init__(self, cloud: FakeLambda, folder: Path, key_file: Path) -> None:
        self.cloud = cloud
        self.ledger = Ledger(folder)
        self.key = Key("mine", key_file)
        self.said: list[str] = []
        self.cloud.add_ssh_key("mine", Path(f"{key_file}.pub").read_text().strip())

    def client(self, key: str = "secret-key", patience_s: float = 0.5, timeout_s: float = 2.0) -> Client:
        pace = Pace(request_s=0.0, launch_s=0.0)
        return Client(key, self.cloud.url, pace=pace, patience_s=patience_s, timeout_s=timeout_s, backoff_s=0.02)

    def say(self, text: str) -> None:
        self.said.append(text)

    def launch(self, wish: Wish = WISH, settings: guard.Settings = SETTINGS, **options: object) -> Entry:
        return launch(self.client(), self.ledger, wish, self.key, self.say, settings=settings, **options)  # type: ignore[arg-type]

    def names(self) -> set[str]:
        return {one["name"] for one in self.cloud.living()}

    def open_names(self) -> set[str]:
        return {entry.name for entry in self.ledger.open()}

    def check(self) -> None:
        """What must hold after anything: nothing is alive that the ledger does not name."""
        before = self.open_names()
        assert self.names() <= before | self.open_names()  # a guard may be ending one meanwhile
        assert self.cloud.troubles == []


@contextmanager
def renting(folder: Path, key_file: Path, **cloud: object) -> Iterator[Renting]:
    with FakeLambda(rate=False, **cloud) as fake:  # type: ignore[arg-type]
        one = Renting(fake, folder, key_file)
        try:
            yield one
        finally:
            end_guards(folder)


def guard_pids(folder: Path) -> list[int]:
    """Of those that hold their lock."""
    found = []
    for file in folder.glob("guard-*.lock"):
        with suppress(FileNotFoundError, ValueError):  # it goes, or just came
            if guard.alive(Ledger(folder), file.name.removeprefix("guard-").removesuffix(".lock")):
                found.append(int(file.read_text()))
    return found


def end_guards(folder: Path) -> None:
    for pid in guard_pids(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not guards(folder) and not guard_pids(folder))


def guards(folder: Path) -> list[int]:
    """All processes, also one that let its lock go."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "fractal.cloud.guard" in process.cmdline() and process.environ().get("FRACTAL_STATE") == str(folder):
                found.append(process.pid)
    return found
