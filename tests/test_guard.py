"""The guard: a real detached process that terminates an instance of the fake, whatever happened to its client."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from fractal.cloud import guard
from fractal.cloud.instance import current, update
from fractal.cloud.lambda_errors import CloudError
from fractal.cloud.launch import LaunchRequest
from fractal.cloud.ledger import Entry
from fractal.cloud.reconcile import terminate
from tests.conftest import until
from tests.fake_lambda.server import cut, garbage, status
from tests.renting import QUICK, TYPE, Renting, end_guards, guard_pids

pytestmark = pytest.mark.usefixtures("openssh")

HOUR = 3600.0


def log(rented: Renting, entry: Entry) -> str:
    return guard.log_file(rented.ledger, entry.name).read_text()


def age(rented: Renting, entry: Entry, hours: float) -> None:
    """The laptop slept that long: the wall clock went on, and nobody watched."""
    rented.ledger.change(entry.name, asked_at=time.time() - hours * HOUR)


def ended(rented: Renting) -> None:
    """The instance is terminated, and its guard has ended."""
    until(lambda: rented.ledger.open_entries() == [])
    assert rented.cloud.living() == []
    until(lambda: guard_pids(rented.ledger.folder) == [])


def test_it_ends_the_instance_at_max_hours_and_goes(rented: Renting) -> None:
    entry = rented.launch(LaunchRequest(types=(TYPE,), max_hours=0.6 / HOUR))
    ended(rented)
    assert (rented.find(entry).end_reason or "").startswith("limit reached")
    assert rented.cloud.billed_seconds(rented.cloud.launched[0]) < 3


def test_it_ends_the_instance_at_max_dollars(rented: Renting) -> None:
    entry = rented.launch(LaunchRequest(types=(TYPE,), max_hours=None, max_dollars=1.0))
    age(rented, entry, 1.3)  # 0.98 USD
    time.sleep(0.4)
    assert rented.names() == {entry.name}
    age(rented, entry, 1.34)
    ended(rented)


def test_waking_up_past_the_limit_it_acts_at_once(rented: Renting) -> None:
    entry = rented.launch()
    age(rented, entry, 9)
    begin = time.monotonic()
    ended(rented)
    assert time.monotonic() - begin < 3


def test_limits_may_change_while_it_watches(rented: Renting) -> None:
    entry = rented.launch(LaunchRequest(types=(TYPE,), max_hours=1.0))
    rented.ledger.change(entry.name, max_hours=None)
    age(rented, entry, 2.0)
    time.sleep(1.0)
    assert rented.names() == {entry.name}
    rented.ledger.change(entry.name, max_dollars=0.000001)
    ended(rented)


def test_it_is_detached_alone_and_keeps_the_key_to_itself(rented: Renting) -> None:
    entry = rented.launch()
    (pid,) = guard_pids(rented.ledger.folder)
    process = psutil.Process(pid)
    assert os.getsid(pid) != os.getsid(0)
    assert process.terminal() is None
    assert "secret-key" not in " ".join(process.cmdline())
    for _ in range(3):
        guard.start(rented.account(), entry.name)
    assert guard_pids(rented.ledger.folder) == [pid]
    assert "secret-key" not in log(rented, entry)
    assert rented.ledger.folder.stat().st_mode & 0o777 == 0o700
    os.kill(pid, signal.SIGHUP)  # the terminal is closed, or Ctrl-C
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert guard_pids(rented.ledger.folder) == [pid]


def test_a_killed_guard_is_replaced_by_the_next_command(rented: Renting) -> None:
    entry = rented.launch()
    end_guards(rented.ledger.folder)
    assert not guard.alive(rented.ledger, entry.name)
    update(rented.account())
    assert guard.alive(rented.ledger, entry.name)
    assert any("its guard was gone" in line for line in rented.logged)
    end_guards(rented.ledger.folder)
    assert rented.launch().name == entry.name
    assert guard.alive(rented.ledger, entry.name)


def test_it_notices_that_the_instance_ended_from_outside(rented: Renting) -> None:
    entry = rented.launch()
    rented.cloud.preempt(rented.cloud.launched[0])
    ended(rented)
    assert "preempted" in (rented.find(entry).end_reason or "")


def test_it_keeps_trying_while_the_api_is_out(rented: Renting) -> None:
    entry = rented.launch()
    out = [cut(), status(503), garbage(), status(500, "global/internal-error"), status(401, "global/invalid-api-key")]
    rented.cloud.script("* *", *out)
    age(rented, entry, 9)
    ended(rented)


def test_a_broken_ledger_stops_no_guard(rented: Renting) -> None:
    entry = rented.launch(LaunchRequest(types=(TYPE,), max_hours=4.0 / HOUR))
    time.sleep(1.0)
    content = rented.ledger.file.read_bytes()
    rented.ledger.file.write_bytes(b"broken")
    until(lambda: rented.cloud.living() == [])
    assert rented.ledger.file.read_bytes() == b"broken"
    assert "Using what was last known" in log(rented, entry)
    rented.ledger.file.write_bytes(content)
    ended(rented)


def test_a_lost_ledger_stops_no_guard(rented: Renting) -> None:
    rented.launch(LaunchRequest(types=(TYPE,), max_hours=4.0 / HOUR))
    time.sleep(1.0)
    rented.ledger.file.unlink()
    until(lambda: rented.cloud.living() == [])
    until(lambda: guard_pids(rented.ledger.folder) == [])


def test_it_goes_when_the_instance_is_ended_by_hand(rented: Renting) -> None:
    entry = rented.launch()
    terminate(rented.account(), entry)
    ended(rented)


@pytest.mark.parametrize("slept", [False, True], ids=["awake", "slept through the limit"])
def test_the_rescue_runs_before_the_end(rented: Renting, tmp_path: Path, slept: bool) -> None:
    """It sees the instance alive, and its success ends the waiting."""
    entry = rented.launch(LaunchRequest(types=(TYPE,), max_hours=3.0))
    saved = tmp_path / "saved"
    code = f"import pathlib, time; time.sleep(2); pathlib.Path({str(saved)!r}).write_text('results')"
    rented.ledger.change(entry.name, rescue=(sys.executable, "-c", code), rescue_s=60.0)
    time.sleep(0.3)
    assert not saved.exists()
    age(rented, entry, 9 if slept else 3 - 30 / HOUR)
    time.sleep(0.3)
    assert rented.names() == {entry.name}
    ended(rented)
    assert saved.read_text() == "results"


def test_a_rescue_without_end_is_killed_with_its_children(rented: Renting, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    entry = rented.launch(LaunchRequest(types=(TYPE,), max_hours=3.0))
    script = f"sleep 100 & echo $! $$ > {pids}; wait"
    rented.ledger.change(entry.name, rescue=("sh", "-c", script), rescue_s=1.0)
    age(rented, entry, 3 - 0.9 / HOUR)
    ended(rented)
    until(lambda: not any(_lives(int(pid)) for pid in pids.read_text().split()))


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("command", [("false",), ("/no/such/command",)])
def test_a_rescue_that_fails_does_not_stop_the_end(rented: Renting, command: tuple[str, ...]) -> None:
    entry = rented.launch(LaunchRequest(types=(TYPE,), max_hours=3.0))
    rented.ledger.change(entry.name, rescue=command, rescue_s=1.0)
    age(rented, entry, 3 - 0.9 / HOUR)
    ended(rented)


@pytest.mark.parametrize("key", ["", "another-key"])
def test_without_its_key_there_is_no_guard_and_so_no_launch(rented: Renting, monkeypatch: pytest.MonkeyPatch, key: str) -> None:  # fmt: skip
    monkeypatch.setenv("LAMBDA_API_KEY", key)
    with pytest.raises(CloudError, match=r"guard .* does not start: .*LAMBDA_API_KEY.* Nothing was launched"):
        rented.launch()
    assert rented.cloud.launches == 0
    assert rented.ledger.entries() == []


def test_a_new_key_takes_over_from_one_that_was_revoked(rented: Renting, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = rented.launch()
    rented.cloud.key = "new-key"
    until(lambda: not guard.alive(rented.ledger, entry.name))
    monkeypatch.setenv("LAMBDA_API_KEY", "new-key")
    update(rented.account(key="new-key"))
    assert guard.alive(rented.ledger, entry.name)
    age(rented, entry, 9)
    ended(rented)


def test_a_late_machine_of_a_launch_that_was_given_up_is_taken_back(rented: Renting) -> None:
    """Hidden for longer than anyone looked for it: the guard lingers, and finds it."""
    rented.cloud.hidden_s = 1.5
    entry = rented.launch(timing=replace(QUICK, guard_linger_s=3.0))
    rented.ledger.change(entry.name, state="intended", id=None, launched_at=None, owner=None)
    until(lambda: rented.ledger.open_entries() == [])
    until(lambda: rented.open_names() == {entry.name})
    assert current(rented.account()).id == rented.cloud.launched[0]


def test_no_jump_of_the_clock_makes_an_instance_younger(rented: Renting, monkeypatch: pytest.MonkeyPatch) -> None:
    wall, steady = [1e9], [50.0]
    watching = guard.Guard(rented.account(), "fractal-0a1b2c-00000001", FileLock("unused"))
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(time, "clock_gettime", lambda clock: steady[0])
    assert watching._now() == 1e9
    wall[0] -= 86400
    steady[0] += 60
    assert watching._now() == 1e9 + 60
    wall[0] += 2 * 86400  # asleep, on a machine whose steady clock sleeps as well
    assert watching._now() == wall[0]


def test_a_guard_that_cannot_lock_says_so(rented: Renting) -> None:
    entry = rented.launch()
    end_guards(rented.ledger.folder)
    lock = guard.lock_file(rented.ledger, entry.name)
    lock.unlink(missing_ok=True)
    lock.mkdir()
    with pytest.raises(CloudError, match="cannot be locked"):
        guard.start(rented.account(), entry.name)
    lock.rmdir()
