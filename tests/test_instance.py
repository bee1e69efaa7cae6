"""What becomes of a rented instance, whoever ends it: nothing is open that is not alive, and `current` says what to do."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from fractal.cloud import reconcile
from fractal.cloud.instance import current, reap, update, wait_active
from fractal.cloud.lambda_errors import AuthError, CloudError
from fractal.cloud.ledger import Process, process_start
from fractal.cloud.reconcile import terminate
from fractal.errors import InputError
from tests.conftest import until
from tests.fake_lambda.server import cut, garbage, lose_answer, status, tear
from tests.renting import QUICK, TYPE, Renting, end_guards, guards, renting

pytestmark = pytest.mark.usefixtures("openssh")
LOST = {"state": "intended", "id": None, "launched_at": None}  # as after a launch without a response


# --- an end that the client did not ask for


@pytest.mark.usefixtures("no_guard")
@pytest.mark.parametrize("reason", ["preempted", "ended from outside", "gone"])
def test_an_end_from_outside_is_noticed_and_named(rented: Renting, reason: str) -> None:
    entry = rented.launch()
    if reason == "preempted":
        rented.cloud.preempt(str(entry.id))
    else:
        rented.cloud.end_from_outside(str(entry.id), forget=reason == "gone")
    if reason == "gone":
        rented.cloud.keep_terminated_s = 0.0
        rented.ledger.change(entry.name, launched_at=time.time() - 60)
    with pytest.raises(CloudError, match=f"No instance is running.*{reason}.*invoke launch"):
        current(rented.account())
    with pytest.raises(CloudError, match=f"has ended: .*{reason}.*invoke launch"):
        wait_active(rented.account(), entry)
    assert rented.open_names() == set()
    terminate(rented.account(), entry)  # nothing to do
    assert rented.launch().name != entry.name
    rented.terminate_all()


@pytest.mark.usefixtures("no_guard")
def test_hidden_right_after_the_launch_is_not_gone(rented: Renting) -> None:
    rented.cloud.hidden_s = 0.4
    entry = rented.launch()
    update(rented.account())
    assert rented.open_names() == {entry.name}
    assert wait_active(rented.account(), entry).ip
    rented.terminate_all()
    rented.cloud.hidden_s = 0.3
    entry = rented.launch()
    terminate(rented.account(), entry)  # nor is it ended because it is not listed
    assert rented.cloud.living() == []


# --- until it is active


@pytest.mark.usefixtures("no_guard")
def test_an_address_while_booting_is_not_active(rented: Renting) -> None:
    rented.cloud.boot_s, rented.cloud.ip_before_active = 0.5, True
    begin = time.monotonic()
    entry = wait_active(rented.account(), rented.launch())
    assert time.monotonic() - begin >= 0.5
    assert [event.what for event in entry.timeline] == ["launch", "boot"]
    rented.cloud.move(str(entry.id))
    assert current(rented.account()).ip not in (None, entry.ip)
    rented.terminate_all()


@pytest.mark.usefixtures("no_guard")
def test_unhealthy_and_endless_booting_are_named_with_the_remedy(rented: Renting) -> None:
    rented.cloud.boot_s = 3600
    entry = rented.launch()
    with pytest.raises(
        CloudError, match=r"not ready after 0 s: booting\. It is billed: end it with `invoke terminate`"
    ):
        wait_active(rented.account(), entry, timeout_s=0.2)
    rented.cloud.unhealthy(str(entry.id))
    with pytest.raises(CloudError, match=r"unhealthy.*billed.*invoke terminate"):
        wait_active(rented.account(), entry)
    rented.cloud.terminate_s = 0.3
    rented.client().terminate(str(entry.id))
    with pytest.raises(CloudError, match="being terminated, not by this client"):
        wait_active(rented.account(), entry)
    rented.terminate_all()


@pytest.mark.usefixtures("no_guard")
def test_a_network_and_an_instance_that_fail_for_a_while_are_waited_for(rented: Renting) -> None:
    entry = rented.launch()
    rented.cloud.script("GET /instances/*", *[cut()] * 6)
    wait_active(rented.account(patience_s=0.05), entry)
    rented.cloud.unhealthy(str(entry.id))
    threading.Timer(0.1, rented.cloud.unhealthy, (str(entry.id), True)).start()
    wait_active(rented.account(), entry)
    rented.cloud.key = "another"
    with pytest.raises(AuthError):
        wait_active(rented.account(), entry)
    rented.cloud.key = "secret-key"
    rented.terminate_all()


# --- terminate

FAULTS = [
    [status(429, "global/too-many-requests")] * 3,
    [status(500, "global/internal-error")] * 3,
    [status(400, "provider/internal-unavailable")] * 3,
    [lose_answer(), cut()],
    [garbage(), garbage(done=True)],
    [tear()] * 2,
]


@pytest.mark.usefixtures("no_guard")
def test_terminate_continues_until_it_is_confirmed(rented: Renting) -> None:
    rented.cloud.terminate_s = 0.2
    for faults in FAULTS:
        entry = rented.launch()
        rented.cloud.script("POST /instance-operations/terminate", *faults)
        rented.cloud.script("GET /instances/*", *faults)
        terminate(rented.account(), entry, "done")
        rented.cloud.unscript()
        assert rented.cloud.living() == [], faults
        assert (rented.find(entry).state, rented.find(entry).end_reason) == ("ended", "done")


@pytest.mark.usefixtures("no_guard")
def test_a_process_that_only_saw_the_end_does_not_give_its_reason(
    rented: Renting, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, real = rented.launch(), reconcile.terminate_instance

    def then_another_process_updates(*arguments: Any) -> None:
        real(*arguments)
        update(rented.account())
        assert rented.find(entry).end_reason == reconcile.ENDED_OUTSIDE

    monkeypatch.setattr(reconcile, "terminate_instance", then_another_process_updates)
    terminate(rented.account(), entry, "done")
    assert rented.find(entry).end_reason == "done"


@pytest.mark.usefixtures("no_guard")
def test_an_end_that_is_not_confirmed_is_an_error_and_stays_open(rented: Renting) -> None:
    rented.cloud.terminate_s = 3600
    entry = rented.launch()
    short = replace(QUICK, terminate_timeout_s=0.4)
    with pytest.raises(CloudError, match=r"may still be billed: it is still 'terminating'.*invoke terminate.*https"):
        terminate(rented.account(timing=short), entry)
    rented.cloud.script("* *", *[cut()] * 200)
    with pytest.raises(CloudError, match=r"may still be billed.*invoke terminate"):
        terminate(rented.account(timing=short, patience_s=0.1), entry)
    rented.cloud.unscript()
    rented.cloud.key = "another"
    with pytest.raises(CloudError, match="still be billed"):
        terminate(rented.account(timing=short), entry)
    assert rented.open_names() == {entry.name}
    rented.cloud.key = "secret-key"
    rented.cloud.end_from_outside(str(entry.id))


@pytest.mark.usefixtures("no_guard")
def test_a_key_of_another_account_ends_nothing_in_the_ledger(rented: Renting) -> None:
    """For it the instance does not exist: that must not count as ended."""
    entry = rented.launch()
    with renting(rented.ledger.folder.parent / "other", rented.key.file, key="other-key") as other:
        stranger = replace(entry, name="fractal-0a1b2c-00000001", account="0" * 12, url=other.cloud.url)
        rented.ledger.add(stranger)
        with pytest.raises(InputError, match=r"another key.*may be billed"):
            terminate(rented.account(), stranger)
        update(rented.account(other.client("other-key")))
        assert len(rented.ledger.open_entries()) == 2
    rented.ledger.end(stranger.name, "test")
    rented.cloud.key = "rotated"  # the same account
    terminate(rented.account(key="rotated"), entry)
    assert rented.cloud.living() == []


# --- intents of other clients, and reap


def test_an_intent_whose_client_is_alive_is_left_alone(rented: Renting) -> None:
    """Another client is launching: no other may decide for it."""
    entry = rented.launch()
    end_guards(rented.ledger.folder)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        owner = Process(other.pid, process_start(other.pid) or 0.0)
        rented.ledger.change(entry.name, **LOST, owner=owner, asked_at=time.time() - 100)
        update(rented.account())
        (intent,) = rented.ledger.open_entries()
        assert intent.state == "intended"
        assert reap(rented.account(), yes=True, others=True) == []
        with pytest.raises(InputError, match=f"being launched by process {other.pid}"):
            terminate(rented.account(), intent)
    finally:
        other.kill()
        other.wait()
    update(rented.account())
    assert rented.ledger.open_entries()[0].id == entry.id
    rented.terminate_all()


@pytest.mark.usefixtures("no_guard")
def test_an_intent_counts_as_never_launched_only_after_a_while(rented: Renting) -> None:
    entry = rented.launch()
    rented.terminate_all()
    never = replace(entry, name=rented.ledger.new_name(), **LOST, owner=None, asked_at=time.time())  # type: ignore[arg-type]
    rented.ledger.add(never)
    update(rented.account())
    assert rented.open_names() == {never.name}
    rented.ledger.change(never.name, asked_at=time.time() - 10)
    update(rented.account())
    assert rented.open_names() == set()


@pytest.mark.usefixtures("no_guard")
def test_an_instance_that_was_presumed_ended_and_is_alive_is_open_again(rented: Renting) -> None:
    entry = rented.launch()
    rented.ledger.change(entry.name, state="ended", id=None, end_reason=reconcile.NEVER_LAUNCHED, ended_at=1.0)
    update(rented.account())
    assert rented.open_names() == {entry.name}
    rented.terminate_all()


def launch_unknown(rented: Renting, name: str) -> None:
    """An instance that the ledger does not know."""
    rented.client().launch(region="us-east-1", type_name=TYPE, ssh_key="mine", name=name)


def test_reap_terminates_what_nobody_uses_and_nothing_else(rented: Renting) -> None:
    entry = rented.launch()
    ours, theirs, foreign = rented.ledger.new_name(), "fractal-ffffff-00000001", "my-own-machine"
    for name in (ours, theirs, foreign, "fractal-but-not-ours"):
        launch_unknown(rented, name)
    account = rented.account()
    assert reap(account) == []  # nobody was asked
    asked: list[str] = []
    assert reap(account, ask=lambda question: bool(asked.append(question))) == []
    assert len(asked) == 1
    assert ours in asked[0]
    assert reap(account, yes=True) == [ours]
    assert entry.name in rented.names()  # its client is alive: this process
    rented.ledger.change(entry.name, owner=None)
    assert reap(account, yes=True) == []  # its guard is alive
    end_guards(rented.ledger.folder)
    assert reap(account, yes=True) == [entry.name]
    assert any(theirs in line and "--others" in line for line in rented.logged)
    assert reap(account, yes=True, others=True) == [theirs]
    assert rented.names() == {foreign, "fractal-but-not-ours"}
    for found in rented.cloud.living():
        rented.client().terminate(found["id"])


def test_reap_continues_after_one_that_cannot_be_terminated(rented: Renting) -> None:
    for _ in range(2):
        launch_unknown(rented, rented.ledger.new_name())
    rented.cloud.script("POST /instance-operations/terminate", status(401, "global/invalid-api-key"))
    with pytest.raises(CloudError, match="still be billed"):
        reap(rented.account(), yes=True)
    assert len(rented.cloud.living()) == 1
    assert len(reap(rented.account(), yes=True)) == 1


def test_reap_believes_the_api_not_the_ledger(rented: Renting) -> None:
    entry = rented.launch()
    rented.ledger.end(entry.name, "invoke terminate")
    until(lambda: not guards(rented.ledger.folder))
    assert reap(rented.account(), yes=True) == [entry.name]
    assert rented.cloud.living() == []


@pytest.mark.usefixtures("no_guard")
def test_two_living_instances_are_an_error(rented: Renting) -> None:
    entry = rented.launch()
    name = rented.ledger.new_name()
    launch_unknown(rented, name)
    rented.ledger.add(replace(entry, name=name, state="intended", id=None, owner=None))
    with pytest.raises(CloudError, match="2 instances are billed"):
        current(rented.account())
    rented.terminate_all()


def test_the_guard_needs_neither_torch_nor_docker() -> None:
    """It runs for hours beside other work."""
    heavy = {"torch", "vllm", "docker", "numpy", "fractal.images.build"}
    code = f"import sys, fractal.cloud.guard, fractal.cloud.cost; print(sorted({heavy!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
