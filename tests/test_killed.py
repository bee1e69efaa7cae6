"""The client is killed at each of its steps: before and after each request, rename and start of a process.

After each: no instance is alive that the ledger does not name, the next `launch` rents no second one, nothing is billed
twice, and `terminate`, `reap` or the guard alone bring the fake's own count of living instances to 0.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal.cloud.instance import reap
from tests.conftest import ROOT, until
from tests.fake_lambda.server import lose_answer
from tests.renting import Renting, end_guards, guard_pids, renting
from tests.test_ledger import entry as an_entry

pytestmark = pytest.mark.usefixtures("openssh")

Prepare = Callable[[Renting], None]


class Clients:
    """The warm process that forks them."""

    def __init__(self) -> None:
        env = {**os.environ, "LAMBDA_API_KEY": "secret-key", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.killed_client"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, rented: Renting, command: str, kill_at: int = -1, **job: object) -> tuple[int, list[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job |= {"command": command, "kill_at": kill_at, "url": rented.cloud.url, "folder": str(rented.ledger.folder)}
        print(json.dumps({**job, "key_file": str(rented.key.file)}), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return answer["code"], answer["steps"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    running = Clients()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")


def each_step(
    clients: Clients, tmp_path: Path, key_file: Path, command: str, prepare: Prepare, **job: Any
) -> Iterator[tuple[Renting, str]]:
    """An account whose client was killed at its first step, at its second, and so on to the last."""
    cloud = {key: job.pop(key) for key in ("hidden_s", "terminate_s", "boot_s") if key in job}
    for kill_at in range(1000):
        folder = tmp_path / f"{command}-{kill_at}"
        with renting(folder, key_file, **cloud) as rented:
            prepare(rented)
            code, steps = clients.run(rented, command, kill_at, **job)
            if code == 0:
                assert kill_at >= 4, steps
                return
            assert code == -signal.SIGKILL
            where = f"{command}, killed {steps[-1]}"
            print(where)
            rented.check()
            yield rented, where
            assert rented.cloud.living() == [], where
            rented.check()
        shutil.rmtree(folder, ignore_errors=True)


def billed_once(rented: Renting) -> None:
    """Each machine that ever was is one entry."""
    ids = [entry.id for entry in rented.ledger.entries() if entry.id is not None]
    assert sorted(ids) == sorted(rented.cloud.launched)


def lose(rented: Renting) -> None:
    rented.cloud.script("POST /instance-operations/launch", lose_answer())


@pytest.mark.parametrize("lost", [False, pytest.param(True, marks=pytest.mark.long)], ids=["answered", "response lost"])
def test_launch_killed_at_each_step_never_rents_two(lost: bool, clients: Clients, tmp_path: Path, key_file: Path) -> None:  # fmt: skip
    count = 0
    prepare = lose if lost else lambda rented: None
    for rented, where in each_step(clients, tmp_path, key_file, "launch", prepare, hidden_s=0.15):
        rented.cloud.unscript()
        now = rented.launch()
        assert rented.names() == {now.name}, where
        assert rented.cloud.launches == 1, where
        assert rented.open_names() == {now.name}
        billed_once(rented)
        rented.terminate_all()
        assert rented.open_names() == set()
        count += 1
    assert count >= 16


@pytest.mark.long
def test_launch_killed_and_reap_finds_it(clients: Clients, tmp_path: Path, key_file: Path) -> None:
    """The next command is no launch, and the guards died as well: a reboot."""
    for number, (rented, where) in enumerate(each_step(clients, tmp_path, key_file, "launch", lambda rented: None)):
        end_guards(rented.ledger.folder)
        if number % 2 and rented.cloud.launches:  # and the ledger is lost
            rented.ledger.file.unlink()
        ended = reap(rented.account(), yes=True)
        assert len(ended) == rented.cloud.launches, where
        assert rented.open_names() == set(), where


@pytest.mark.long
def test_launch_killed_and_nobody_comes_back(clients: Clients, tmp_path: Path, key_file: Path) -> None:
    """The guard alone ends it at its limit, which it learnt before the request went out; then it goes."""
    limit_h = 0.8 / 3600
    for rented, where in each_step(clients, tmp_path, key_file, "launch", lambda rented: None, hidden_s=0.1, max_hours=limit_h):  # fmt: skip
        until(lambda rented=rented: not guard_pids(rented.ledger.folder))
        assert rented.cloud.living() == [], where
        assert rented.open_names() <= {entry.name for entry in rented.ledger.entries() if entry.id is None}
        for id in rented.cloud.launched:
            assert rented.cloud.billed_seconds(id) < 4.0, where


def test_a_client_that_would_have_ended_it_is_dead(clients: Clients, tmp_path: Path, key_file: Path) -> None:
    """Killed before it knew the answer, with terminate_after: the guard ends it without waiting for a limit."""
    with renting(tmp_path / "whole", key_file) as rented:
        code, steps = clients.run(rented, "launch")
        assert code == 0
    with renting(tmp_path / "killed", key_file) as rented:
        clients.run(
            rented, "launch", steps.index("after POST /api/v1/instance-operations/launch"), terminate_after=True
        )
        assert rented.cloud.launches == 1
        until(lambda: rented.open_names() == set())
        assert rented.cloud.living() == []


def rent(rented: Renting) -> None:
    """A machine whose client and guard are gone."""
    asked_at = time.time()
    name = rented.ledger.new_name()
    intent = an_entry(name, url=rented.cloud.url, account=rented.client().account, asked_at=asked_at)
    rented.ledger.add(intent)
    id = rented.client().launch(region=intent.region, type_name=intent.type_name, ssh_key="mine", name=name)
    rented.ledger.change(name, state="launched", id=id, launched_at=asked_at)


def test_terminate_killed_at_each_step(clients: Clients, tmp_path: Path, key_file: Path) -> None:
    for rented, where in each_step(clients, tmp_path, key_file, "terminate", rent, terminate_s=0.05):
        rented.terminate_all()
        assert rented.open_names() == set(), where
        billed_once(rented)


@pytest.mark.long
def test_a_second_launch_after_a_killed_terminate(clients: Clients, tmp_path: Path, key_file: Path) -> None:
    """Never two at once: what is being ended is waited for, what lives on is used."""
    for rented, where in each_step(clients, tmp_path, key_file, "terminate", rent, terminate_s=0.05):
        now = rented.launch()
        assert [each["name"] for each in rented.cloud.living()] == [now.name], where
        billed_once(rented)
        rented.terminate_all()


def orphan(rented: Renting) -> None:
    """The same, and the answer was lost."""
    rent(rented)
    rented.ledger.change(rented.ledger.entries()[0].name, state="intended", id=None, launched_at=None)


@pytest.mark.long
def test_update_killed_at_each_step(clients: Clients, tmp_path: Path, key_file: Path) -> None:
    for rented, where in each_step(clients, tmp_path, key_file, "update", orphan):
        now = rented.launch()
        assert rented.cloud.launches == 1, where
        assert rented.names() == {now.name}
        billed_once(rented)
        rented.terminate_all()


@pytest.mark.long
def test_reap_killed_at_each_step(clients: Clients, tmp_path: Path, key_file: Path) -> None:
    for rented, where in each_step(clients, tmp_path, key_file, "reap", orphan, terminate_s=0.05):
        time.sleep(0.06)
        reap(rented.account(), yes=True)
        assert rented.open_names() == set(), where
