"""Renting against the strict fake over HTTP: what may be wished for, which error moves the search on, and what must hold
whatever the API, the clock, the disk or another operator does: nothing is alive that the ledger does not name.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fractal.cloud import guard, life
from fractal.cloud.instance import check, current, find_key, launch, reap, reconcile, terminate, wait_active
from fractal.cloud.lambda_api import AuthError, CloudError, ConnectionLost, InstanceType, QuotaError, Region, from_env
from fractal.cloud.ledger import Entry, Process, _started
from fractal.cloud.offers import Place, Wish, places
from fractal.errors import InputError, OutsideError
from tests.conftest import ROOT, until
from tests.fake_lambda.server import Fault, cut, delay, garbage, lose_answer, ok, status, tear
from tests.renting import QUICK, SETTINGS, TYPE, WISH, Renting, end_guards, guards, renting

pytestmark = pytest.mark.usefixtures("openssh")
LAUNCH = "POST /instance-operations/launch"
A100 = "gpu_1x_a100_sxm4"


@pytest.fixture
def no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of other things: a guard costs a third of a second."""
    monkeypatch.setattr(guard, "start", lambda ledger, name, settings: None)
    monkeypatch.setattr(guard, "alive", lambda ledger, name: True)


def end_all(one: Renting) -> None:
    for entry in one.ledger.open():
        terminate(one.client(), one.ledger, entry, one.say, waits=QUICK)
    assert one.cloud.living() == []
    assert one.open_names() == set()


# --- before money


WRONG = {
    "unknown type": (Wish(("gpu_1x_a11",)), f"no instance type gpu_1x_a11.*{TYPE} +0.75  A10 .24 GB PCIe. +us-west-1, us-east-1"),
    "no type": (Wish(()), "--type"),
    "unknown region": (Wish((TYPE,), ("mars-1",)), "no region mars-1. .*europe-central-1.*us-west-1.*CAPACITY NOW"),
    "price": (Wish((TYPE, A100), max_price_usd=0.5), "0.50 USD/h or less; the cheapest of it is 0.75.*CAPACITY NOW"),
    "hours": (Wish((TYPE,), max_hours=0), "--max-hours=0"),
    "dollars": (Wish((TYPE,), max_dollars=float("nan")), "--max-dollars=nan"),
    "waiting": (Wish((TYPE,), wait_s=-1), "--wait-for-capacity=-1"),
    "image": (Wish((TYPE,), image="lambda-stack-99"), "no image lambda-stack-99. .*lambda-stack-24-04"),
    "file system": (Wish((TYPE,), file_systems=("models",)), "no file system models"),
}  # fmt: skip


@pytest.mark.parametrize(("wish", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_wish_is_refused_before_money_with_what_is_valid(rented: Renting, wish: Wish, said: str) -> None:
    with pytest.raises(InputError, match=f"(?s){said}"):
        check(rented.client(), wish)
    with pytest.raises(InputError, match=f"(?s){said}"):
        rented.launch(wish)
    assert rented.cloud.count("POST *") == 0
    assert rented.ledger.entries() == []


def test_a_file_system_binds_to_its_region(rented: Renting) -> None:
    rented.client().create_file_system("models", "us-east-1")
    with pytest.raises(InputError, match="--region=us-east-1"):
        check(rented.client(), Wish((TYPE,), file_systems=("models",)))
    check(rented.client(), Wish((TYPE,), ("us-east-1",), file_systems=("models",)))


def test_a_region_without_capacity_is_valid(rented: Renting) -> None:
    check(rented.client(), Wish((TYPE,), ("us-south-1",), image="lambda-stack-24-04"))


def offer(name: str, cents: int, *regions: str) -> InstanceType:
    return InstanceType(name, name, "GPU", cents, 1, 1, 1, 1, tuple(Region(region, "") for region in regions))


def test_the_order_of_types_decides_then_that_of_regions() -> None:
    offers = {one.name: one for one in (offer("a", 100, "r1", "r2"), offer("b", 50, "r2"), offer("c", 900, "r1"))}
    assert places(Wish(("b", "a", "b")), offers) == [Place("b", "r2", 50), Place("a", "r1", 100), Place("a", "r2", 100)]
    assert places(Wish(("a", "b"), ("r2", "r1", "r9")), offers) == [Place("a", "r2", 100), Place("a", "r1", 100), Place("b", "r2", 50)]  # fmt: skip
    assert places(Wish(("a", "c"), max_price_usd=1.0), offers) == [Place("a", "r1", 100), Place("a", "r2", 100)]
    assert places(Wish(("gone",)), offers) == []


# --- keys


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FRACTAL_SSH_KEY", raising=False)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / ".ssh").mkdir()
    return tmp_path


def make_key(file: Path, passphrase: str = "") -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(file)], check=True)
    return Path(f"{file}.pub").read_text().strip()


def test_a_key_is_found_by_what_it_is_not_by_its_comment(rented: Renting, home: Path) -> None:
    make_key(home / ".ssh/id_aaa")
    public = make_key(home / ".ssh/id_work")
    rented.cloud.add_ssh_key("laptop", " ".join(public.split()[:2]) + " other@comment")
    assert find_key(rented.client(), rented.ledger) == ("laptop", home / ".ssh/id_work")
    (home / ".ssh/id_work.pub").unlink()
    assert find_key(rented.client(), rented.ledger).name == "laptop"


def test_fractal_ssh_key_comes_first(rented: Renting, home: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    rented.cloud.add_ssh_key("laptop", make_key(home / ".ssh/id_work"))
    monkeypatch.setenv("FRACTAL_SSH_KEY", str(key_file))
    assert find_key(rented.client(), rented.ledger) == ("mine", key_file)
    make_key(home / "other")
    monkeypatch.setenv("FRACTAL_SSH_KEY", str(home / "other"))
    with pytest.raises(InputError, match="--register-key"):
        find_key(rented.client(), rented.ledger)
    found = find_key(rented.client(), rented.ledger, register=True)
    assert found.file == home / "other"
    for wrong, said in (("/no/such", "no such file"), (f"{home}/other.pub", "no private ssh key")):
        monkeypatch.setenv("FRACTAL_SSH_KEY", wrong)
        with pytest.raises(InputError, match=said):
            find_key(rented.client(), rented.ledger, register=True)


def test_no_key_here_is_registered_and_one_is_offered(rented: Renting, home: Path) -> None:
    with pytest.raises(InputError, match=r"--register-key.*FRACTAL_SSH_KEY"):
        find_key(rented.client(), rented.ledger)
    with pytest.raises(InputError, match="--register-key"):
        find_key(rented.client(), rented.ledger, ask=lambda question: False)
    asked: list[str] = []
    key = find_key(rented.client(), rented.ledger, ask=lambda question: not asked.append(question))
    assert len(asked) == 1
    assert key.file == rented.ledger.folder / "ssh/id_ed25519"
    assert key.file.stat().st_mode & 0o77 == 0
    assert find_key(rented.client(), rented.ledger) == key
    assert launch(rented.client(), rented.ledger, WISH, key, rented.say, settings=SETTINGS).ssh_key == key.name
    end_all(rented)


def test_our_own_name_may_be_taken_by_a_lost_key(rented: Renting, home: Path) -> None:
    name = f"fractal-{rented.ledger.operator()}"
    rented.cloud.add_ssh_key(name, make_key(home / "lost"))
    assert find_key(rented.client(), rented.ledger, register=True).name == f"{name}-2"


def test_a_key_behind_a_passphrase_lets_nobody_in(rented: Renting, home: Path) -> None:
    rented.cloud.add_ssh_key("laptop", make_key(home / ".ssh/id_work", "secret"))
    with pytest.raises(InputError, match="ssh-add"):
        find_key(rented.client(), rented.ledger)


# --- the hunt


@pytest.mark.usefixtures("no_guard")
def test_only_missing_capacity_moves_the_search_on(rented: Renting) -> None:
    rented.cloud.set_capacity(TYPE, "us-west-1", 0, advertised=True)
    rented.cloud.set_capacity(TYPE, "us-east-1", 0, advertised=True)
    entry = rented.launch(Wish((TYPE, A100)))
    assert (entry.type_name, entry.region, entry.price_cents_per_hour) == (A100, "us-west-1", 129)
    assert rented.cloud.count(LAUNCH) == 3
    assert len(rented.ledger.entries()) == 1
    end_all(rented)


def test_no_capacity_leaves_nothing_behind(rented: Renting) -> None:
    rented.cloud.set_capacity(TYPE, "us-west-1", 0, advertised=True)
    with pytest.raises(CloudError, match=r"No capacity for gpu_1x_a10 in us-west-1\. .*--wait-for-capacity"):
        rented.launch(Wish((TYPE,), ("us-west-1",)))
    assert rented.ledger.entries() == []
    until(lambda: not list(rented.ledger.folder.glob("guard-*.lock")))  # its guard has gone as well


@pytest.mark.usefixtures("no_guard")
def test_capacity_is_waited_for(rented: Renting) -> None:
    rented.cloud.no_capacity()
    rented.cloud.set_capacity(TYPE, "us-south-1", 1, after_s=0.5)
    entry = rented.launch(Wish((TYPE,), wait_s=20))
    assert entry.region == "us-south-1"
    assert rented.cloud.count(LAUNCH) == 1  # asked for once it was there, not before
    assert any("waiting since" in line for line in rented.said)
    end_all(rented)
    rented.cloud.no_capacity()
    with pytest.raises(CloudError, match="within 0 s"):
        rented.launch(Wish((TYPE,), wait_s=0.3))


STOPS: dict[str, tuple[Fault, type[Exception]]] = {
    "wrong key": (status(401, "global/invalid-api-key"), AuthError),
    "inactive": (status(403, "global/account-inactive"), AuthError),
    "quota": (status(400, "global/quota-exceeded"), QuotaError),
    "invalid": (status(400, "global/invalid-parameters"), CloudError),
    "busy": (status(429, "global/too-many-requests", retry_after=9), CloudError),
}


@pytest.mark.usefixtures("no_guard")
@pytest.mark.parametrize(("fault", "kind"), STOPS.values(), ids=STOPS)
def test_any_other_refusal_stops_the_search_with_nothing_open(rented: Renting, fault: Fault, kind: type[Exception]) -> None:  # fmt: skip
    rented.cloud.script(LAUNCH, fault)
    with pytest.raises(kind):
        rented.launch()
    assert rented.cloud.count(LAUNCH) == 1
    assert rented.ledger.entries() == []


LOST: dict[str, tuple[Fault, bool]] = {  # and whether it happened
    "answer lost": (lose_answer(), True),
    "answer torn": (tear(), True),
    "garbage, done": (garbage(done=True), True),
    "garbage, not done": (garbage(), False),
    "500, done": (status(500, "global/internal-error", done=True), True),
    "502, not done": (status(502), False),
    "provider, done": (status(400, "provider/internal-unavailable", done=True), True),
    "cut": (cut(), False),
    "late": (delay(3.0), True),
}


@pytest.mark.parametrize(("fault", "happened"), LOST.values(), ids=LOST)
def test_a_lost_answer_is_settled_by_name_before_anything_else(rented: Renting, fault: Fault, happened: bool) -> None:
    rented.cloud.hidden_s = 0.1
    rented.cloud.script(LAUNCH, fault)
    wait = replace(QUICK, settle_s=4.0 if fault.kind == "delay" else QUICK.settle_s)
    entry = rented.launch(settings=replace(SETTINGS, waits=wait))
    assert rented.names() == {entry.name}
    assert rented.cloud.launches == 1
    assert rented.cloud.count(LAUNCH) == (1 if happened else 2)
    assert guard.alive(rented.ledger, entry.name)
    end_all(rented)


@pytest.mark.usefixtures("no_guard")
def test_asleep_in_the_request_it_is_looked_for_as_long(rented: Renting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The intent is hours old when the lost answer is noticed, and the machine not shown yet."""
    rented.cloud.hidden_s = 0.2
    rented.cloud.script(LAUNCH, lose_answer())
    client = rented.client()
    real = client.launch

    def asleep(**options: object) -> str:
        rented.ledger.change(str(options["name"]), asked_at=time.time() - 3 * 3600)
        return real(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "launch", asleep)
    launch(client, rented.ledger, WISH, rented.key, rented.say, settings=SETTINGS)
    assert rented.cloud.launches == 1
    end_all(rented)


@pytest.mark.usefixtures("no_guard")
def test_lost_answers_do_not_go_on_forever(rented: Renting) -> None:
    rented.cloud.script(LAUNCH, *[cut()] * 9)
    with pytest.raises(CloudError, match="2 launches had no answer"):
        rented.launch()
    assert rented.open_names() == set()


@pytest.mark.usefixtures("no_guard")
def test_an_api_that_is_out_while_settling_leaves_the_intent(rented: Renting) -> None:
    rented.cloud.script(LAUNCH, lose_answer())
    rented.cloud.script("GET /instances", ok(), *[cut()] * 40)
    with pytest.raises(ConnectionLost):
        rented.launch()
    (intent,) = rented.ledger.open()
    assert intent.owner is None  # free for the guard and the next command
    with pytest.raises(CloudError):
        current(rented.client(), rented.ledger, rented.say, SETTINGS)
    rented.cloud.unscript()
    assert rented.launch().name == intent.name
    assert rented.cloud.launches == 1
    end_all(rented)


@pytest.mark.usefixtures("no_guard")
def test_interrupted_in_the_request_the_intent_stays(rented: Renting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, or SIGTERM: the request may have gone out."""

    def interrupted(*words: object, **options: object) -> str:
        raise KeyboardInterrupt

    client = rented.client()
    monkeypatch.setattr(client, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch(client, rented.ledger, WISH, rented.key, rented.say, settings=SETTINGS)
    (intent,) = rented.ledger.open()
    assert (intent.state, intent.owner) == ("intended", None)
    with pytest.raises(CloudError, match="not settled"):
        current(rented.client(), rented.ledger, rented.say, SETTINGS)
    terminate(rented.client(), rented.ledger, intent, rented.say, waits=QUICK)
    assert rented.open_names() == set()


@pytest.mark.usefixtures("no_guard")
def test_a_price_that_rose_ends_it_at_once(rented: Renting, monkeypatch: pytest.MonkeyPatch) -> None:
    client = rented.client()
    real = client.launch

    def dearer(**options: object) -> str:
        rented.cloud.set_price(TYPE, 9900)
        return real(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "launch", dearer)
    with pytest.raises(CloudError, match=r"99\.00 USD/h, more than the 1\.00 you allow, and is ended again"):
        launch(client, rented.ledger, Wish((TYPE,), max_price_usd=1.0), rented.key, rented.say, settings=SETTINGS)
    assert rented.cloud.launches == 1
    assert rented.cloud.living() == []
    assert rented.ledger.entries()[0].price_cents_per_hour == 9900


def test_the_real_rate_limits_are_kept(tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the pace of the state folder, which the guard shares."""
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    with renting(tmp_path / "state", key_file) as one:
        one.cloud.rate = True
        monkeypatch.setenv("FRACTAL_LAMBDA_URL", one.cloud.url)
        with from_env(one.ledger.folder) as client:
            settings = replace(SETTINGS, request_s=1.05)
            entry = launch(client, one.ledger, WISH, one.key, one.say, settings=settings)
            terminate(client, one.ledger, entry, one.say, waits=QUICK)
        assert one.cloud.living() == []


@pytest.mark.usefixtures("no_guard")
def test_everything_that_is_wished_arrives(rented: Renting) -> None:
    rented.client().create_file_system("models", "us-east-1")
    rented.launch(Wish((TYPE,), ("us-east-1",), image="lambda-stack-24-04", file_systems=("models",)))
    (body,) = [call.body for call in rented.cloud.requests if call.path.endswith("/launch")]
    assert body["image"] == {"family": "lambda-stack-24-04"}
    assert body["file_system_names"] == ["models"]
    assert body["region_name"] == "us-east-1"
    assert body["ssh_key_names"] == ["mine"]
    end_all(rented)


# --- a second launch


def test_a_second_launch_uses_the_first_and_says_so(rented: Renting) -> None:
    first = rented.launch()
    second = rented.launch(Wish((A100, TYPE), max_hours=7.0, max_dollars=3.0), terminate_after=True)
    assert second.id == first.id
    assert (second.max_hours, second.max_dollars, second.terminate_after) == (7.0, 3.0, True)
    assert any("used again, no other is launched" in line for line in rented.said)
    assert rented.cloud.launches == 1
    for wish, said in ((Wish((A100,)), A100), (Wish((TYPE,), ("us-east-1",)), "us-east-1")):
        with pytest.raises(InputError, match=f"is alive, and you ask for {said}.*invoke terminate"):
            rented.launch(wish)
    rented.ledger.change(first.name, asked_at=time.time() - 2 * 3600)
    with pytest.raises(InputError, match="past the limits you give"):
        rented.launch(Wish((TYPE,), max_hours=1.0))
    rented.cloud.set_price(TYPE, 10)
    rented.ledger.change(first.name, price_cents_per_hour=75)
    with pytest.raises(InputError, match="dearer"):
        rented.launch(Wish((TYPE,), max_price_usd=0.5))
    end_all(rented)
    assert rented.launch().name != first.name
    end_all(rented)


TWO = """
import sys, time
from pathlib import Path
from fractal.cloud.instance import _alone
from fractal.cloud.ledger import Ledger
with _alone(Ledger(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_operators_at_once(rented: Renting) -> None:
    """The second is told who is at it; when that one is killed, nothing is in the way."""
    other = subprocess.Popen([sys.executable, "-c", TWO, str(rented.ledger.folder)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match=f"process {other.pid} is launching") as told:
            rented.launch()
        assert "\n" not in str(told.value)
    finally:
        other.kill()
        other.wait()
    rented.launch()
    end_all(rented)


def test_threads_that_launch_at_once_rent_one(rented: Renting) -> None:
    found: list[object] = []

    def work() -> None:
        try:
            found.append(rented.launch().name)
        except InputError as error:
            found.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert rented.cloud.launches == 1
    end_all(rented)


# --- what becomes of it: after each, nothing is open that is not alive, and `current` says what to do


def preempted(one: Renting, entry: Entry) -> None:
    one.cloud.preempt(str(entry.id))


def ended(one: Renting, entry: Entry) -> None:
    one.cloud.end_from_outside(str(entry.id))


def forgotten(one: Renting, entry: Entry) -> None:
    one.cloud.end_from_outside(str(entry.id), forget=True)
    one.cloud.keep_terminated_s = 0.0


FATES: dict[str, tuple[Callable[[Renting, Entry], None], str]] = {
    "preempted": (preempted, "preempted"),
    "ended from outside": (ended, "ended from outside"),
    "forgotten": (forgotten, "gone"),
}


@pytest.mark.usefixtures("no_guard")
@pytest.mark.parametrize(("happens", "reason"), FATES.values(), ids=FATES)
def test_an_end_from_outside_is_noticed_and_named(rented: Renting, happens: Callable[[Renting, Entry], None], reason: str) -> None:  # fmt: skip
    entry = rented.launch()
    happens(rented, entry)
    if reason == "gone":
        rented.ledger.change(entry.name, launched_at=time.time() - 60)
    with pytest.raises(CloudError, match=f"No instance is running.*{reason}.*invoke launch"):
        current(rented.client(), rented.ledger, rented.say, SETTINGS)
    with pytest.raises(CloudError, match=f"has ended: .*{reason}.*invoke launch"):
        wait_active(rented.client(), rented.ledger, entry, rented.say, waits=QUICK)
    assert rented.open_names() == set()
    terminate(rented.client(), rented.ledger, entry, rented.say, waits=QUICK)  # nothing to do
    assert rented.launch().name != entry.name
    end_all(rented)


@pytest.mark.usefixtures("no_guard")
def test_hidden_right_after_the_launch_is_not_gone(rented: Renting) -> None:
    rented.cloud.hidden_s = 0.4
    entry = rented.launch()
    reconcile(rented.client(), rented.ledger, rented.say, SETTINGS)
    assert rented.open_names() == {entry.name}
    assert wait_active(rented.client(), rented.ledger, entry, rented.say, waits=QUICK).ip
    end_all(rented)
    rented.cloud.hidden_s = 0.3
    entry = rented.launch()
    terminate(rented.client(), rented.ledger, entry, rented.say, waits=QUICK)  # nor ended, because it is not shown
    assert rented.cloud.living() == []


@pytest.mark.usefixtures("no_guard")
def test_an_address_while_booting_is_no_readiness(rented: Renting) -> None:
    rented.cloud.boot_s, rented.cloud.ip_before_active = 0.5, True
    begin = time.monotonic()
    entry = wait_active(rented.client(), rented.ledger, rented.launch(), rented.say, waits=QUICK)
    assert time.monotonic() - begin >= 0.5
    assert [event.what for event in entry.timeline] == ["launch", "boot"]
    rented.cloud.move(str(entry.id))
    moved = current(rented.client(), rented.ledger, rented.say, SETTINGS)
    assert moved.ip not in (None, entry.ip)
    end_all(rented)


@pytest.mark.usefixtures("no_guard")
def test_unhealthy_and_endless_booting_are_named_with_the_remedy(rented: Renting) -> None:
    rented.cloud.boot_s = 3600
    entry = rented.launch()
    with pytest.raises(
        CloudError, match=r"not ready after 0 s: booting\. It is billed: end it with `invoke terminate`"
    ):
        wait_active(rented.client(), rented.ledger, entry, rented.say, timeout_s=0.2, waits=QUICK)
    rented.cloud.unhealthy(str(entry.id))
    with pytest.raises(CloudError, match=r"unhealthy.*billed.*invoke terminate"):
        wait_active(rented.client(), rented.ledger, entry, rented.say, waits=QUICK)
    rented.cloud.terminate_s = 0.3
    rented.client().terminate([str(entry.id)])
    with pytest.raises(CloudError, match="being ended, not by this client"):
        wait_active(rented.client(), rented.ledger, entry, rented.say, waits=QUICK)
    end_all(rented)


@pytest.mark.usefixtures("no_guard")
def test_a_network_that_is_gone_for_a_while_is_waited_out(rented: Renting) -> None:
    entry = rented.launch()
    rented.cloud.script("GET /instances/*", *[cut()] * 6)
    wait_active(rented.client(patience_s=0.05), rented.ledger, entry, rented.say, waits=QUICK)
    rented.cloud.key = "another"
    with pytest.raises(AuthError):
        wait_active(rented.client(), rented.ledger, entry, rented.say, waits=QUICK)
    rented.cloud.key = "secret-key"
    end_all(rented)


@pytest.mark.usefixtures("no_guard")
def test_a_short_illness_is_waited_out(rented: Renting) -> None:
    entry = rented.launch()
    rented.cloud.unhealthy(str(entry.id))
    threading.Timer(0.1, rented.cloud.unhealthy, (str(entry.id), True)).start()
    wait_active(rented.client(), rented.ledger, entry, rented.say, waits=QUICK)
    end_all(rented)


# --- the end


TROUBLES = {
    "429": [status(429, "global/too-many-requests")] * 3,
    "500": [status(500, "global/internal-error")] * 3,
    "provider": [status(400, "provider/internal-unavailable")] * 3,
    "lost answer": [lose_answer(), cut()],
    "garbage": [garbage(), garbage(done=True)],
    "torn": [tear()] * 2,
}


@pytest.mark.usefixtures("no_guard")
@pytest.mark.parametrize("faults", TROUBLES.values(), ids=TROUBLES)
def test_terminate_goes_on_until_it_is_confirmed(rented: Renting, faults: list[Fault]) -> None:
    rented.cloud.terminate_s = 0.2
    entry = rented.launch()
    rented.cloud.script("POST /instance-operations/terminate", *faults)
    rented.cloud.script("GET /instances/*", *faults)
    terminate(rented.client(), rented.ledger, entry, rented.say, "done", QUICK)
    assert rented.cloud.living() == []
    now = rented.ledger.find(entry.name)
    assert now is not None
    assert (now.state, now.end_reason) == ("ended", "done")


@pytest.mark.usefixtures("no_guard")
def test_who_only_saw_the_end_does_not_give_its_reason(rented: Renting, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, real = rented.launch(), life.end

    def and_another_looks(*words: Any) -> None:
        real(*words)
        reconcile(rented.client(), rented.ledger, rented.say, SETTINGS)
        seen = rented.ledger.find(entry.name)
        assert seen is not None
        assert seen.end_reason == life.OUTSIDE

    monkeypatch.setattr(life, "end", and_another_looks)
    terminate(rented.client(), rented.ledger, entry, rented.say, "done", QUICK)
    now = rented.ledger.find(entry.name)
    assert now is not None
    assert now.end_reason == "done"


@pytest.mark.usefixtures("no_guard")
def test_an_end_that_does_not_come_is_loud_and_stays_open(rented: Renting) -> None:
    rented.cloud.terminate_s = 3600
    entry = rented.launch()
    waits = replace(QUICK, end_s=0.4)
    with pytest.raises(CloudError, match=r"may still be billed: it is still 'terminating'.*invoke terminate.*https"):
        terminate(rented.client(), rented.ledger, entry, rented.say, waits=waits)
    rented.cloud.script("* *", *[cut()] * 200)
    with pytest.raises(CloudError, match=r"may still be billed.*invoke terminate"):
        terminate(rented.client(patience_s=0.1), rented.ledger, entry, rented.say, waits=waits)
    rented.cloud.unscript()
    rented.cloud.key = "another"
    with pytest.raises(CloudError, match="still billed"):
        terminate(rented.client(), rented.ledger, entry, rented.say, waits=waits)
    assert rented.open_names() == {entry.name}
    rented.cloud.key = "secret-key"
    rented.cloud.end_from_outside(str(entry.id))


@pytest.mark.usefixtures("no_guard")
def test_a_key_of_another_account_ends_nothing_in_the_ledger(rented: Renting) -> None:
    """To it the instance is not there: that must not count as ended."""
    entry = rented.launch()
    with renting(rented.ledger.folder.parent / "other", rented.key.file, key="other-key") as other:
        stranger = replace(entry, name="fractal-0a1b2c-00000001", account="0" * 12)
        rented.ledger.add(replace(stranger, url=other.cloud.url))
        with pytest.raises(InputError, match=r"another key.*may be billed"):
            terminate(rented.client(), rented.ledger, rented.ledger.open()[1], rented.say, waits=QUICK)
        reconcile(other.client("other-key"), rented.ledger, rented.say, SETTINGS)
        assert len(rented.ledger.open()) == 2
    rented.ledger.end(stranger.name, "test")
    rented.cloud.key = "rotated"  # the same account
    terminate(rented.client("rotated"), rented.ledger, entry, rented.say, waits=QUICK)
    assert rented.cloud.living() == []


def test_a_full_disk_at_the_worst_moment(tiny_disk: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id cannot be written down: the instance is ended at once; and ending needs no disk."""
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    monkeypatch.setattr(guard, "start", lambda ledger, name, settings: None)
    with renting(tiny_disk / "state", key_file) as one:
        client, real, filler = one.client(), one.client().launch, tiny_disk / "filler"

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * 512)
                except OSError:
                    pass

        def then_full(**options: object) -> str:
            id = real(**options)  # type: ignore[arg-type]
            fill()
            return id

        monkeypatch.setattr(client, "launch", then_full)
        with pytest.raises(OutsideError, match=r"(no space|Make room).*is ended again"):
            launch(client, one.ledger, WISH, one.key, one.say, settings=SETTINGS)
        assert one.cloud.launches == 1
        assert one.cloud.living() == []
        filler.unlink()
        entry = one.launch()
        fill()
        with pytest.raises(OutsideError):
            terminate(one.client(), one.ledger, entry, one.say, waits=QUICK)
        assert one.cloud.living() == []
        filler.unlink()
        reconcile(one.client(), one.ledger, one.say, SETTINGS)
        assert one.open_names() == set()


def test_a_broken_ledger_stops_before_money(rented: Renting) -> None:
    rented.ledger.folder.mkdir(exist_ok=True)
    rented.ledger.file.write_bytes(b"{")
    with pytest.raises(InputError, match="invoke reap"):
        rented.launch()
    assert rented.cloud.count("POST *") == 0
    assert rented.ledger.file.read_bytes() == b"{"
    rented.ledger.file.unlink()


@pytest.mark.usefixtures("no_guard")
@pytest.mark.parametrize("hours", [-1000.0, 1000.0], ids=["back", "forth"])
def test_a_clock_that_jumped_neither_loses_nor_doubles(rented: Renting, hours: float) -> None:
    """The clock was wrong when the launch was asked for and the answer lost; then it jumped."""
    entry = rented.launch()
    past = time.time() - hours * 3600
    rented.ledger.change(entry.name, state="intended", id=None, launched_at=None, owner=None, asked_at=past, max_hours=None)  # fmt: skip
    again = rented.launch(replace(WISH, max_hours=None))
    assert again.name == entry.name
    assert rented.cloud.launches == 1
    rented.ledger.change(entry.name, launched_at=past)
    reconcile(rented.client(), rented.ledger, rented.say, SETTINGS)
    assert rented.open_names() == {entry.name}
    end_all(rented)
    assert all(entry.dollars(time.time()) >= 0 for entry in rented.ledger.entries())


# --- reconcile and reap


def test_an_intent_in_hand_is_left_alone(rented: Renting) -> None:
    """Another client is launching: whoever looks must not decide for it."""
    entry = rented.launch()
    end_guards(rented.ledger.folder)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        owner = Process(other.pid, _started(other.pid) or 0.0)
        rented.ledger.change(
            entry.name, state="intended", id=None, launched_at=None, owner=owner, asked_at=time.time() - 100
        )
        reconcile(rented.client(), rented.ledger, rented.say, SETTINGS)
        (now,) = rented.ledger.open()
        assert now.state == "intended"
        assert reap(rented.client(), rented.ledger, rented.say, yes=True, others=True, waits=QUICK) == []
        with pytest.raises(InputError, match=f"being launched by process {other.pid}"):
            terminate(rented.client(), rented.ledger, now, rented.say, waits=QUICK)
    finally:
        other.kill()
        other.wait()
    reconcile(rented.client(), rented.ledger, rented.say, SETTINGS)
    assert rented.ledger.open()[0].id == entry.id
    end_all(rented)


@pytest.mark.usefixtures("no_guard")
def test_never_happened_takes_time_to_say(rented: Renting) -> None:
    entry = rented.launch()
    end_all(rented)
    never = replace(entry, name=rented.ledger.new_name(), state="intended", id=None, launched_at=None, owner=None)
    rented.ledger.add(replace(never, asked_at=time.time()))
    reconcile(rented.client(), rented.ledger, rented.say, SETTINGS)
    assert rented.open_names() == {never.name}
    rented.ledger.change(never.name, asked_at=time.time() - 10)
    reconcile(rented.client(), rented.ledger, rented.say, SETTINGS)
    assert rented.open_names() == set()


@pytest.mark.usefixtures("no_guard")
def test_what_was_given_up_and_lives_is_taken_back(rented: Renting) -> None:
    entry = rented.launch()
    rented.ledger.change(entry.name, state="ended", id=None, end_reason=life.NEVER, ended_at=1.0)
    reconcile(rented.client(), rented.ledger, rented.say, SETTINGS)
    assert rented.open_names() == {entry.name}
    end_all(rented)


def stray(one: Renting, name: str) -> None:
    one.client().launch(region="us-east-1", type_name=TYPE, ssh_key="mine", name=name)


def test_reap_ends_what_nobody_owns_and_nothing_else(rented: Renting) -> None:
    entry = rented.launch()
    ours, theirs, foreign = rented.ledger.new_name(), "fractal-ffffff-00000001", "my-own-machine"
    for name in (ours, theirs, foreign, "fractal-but-not-ours"):
        stray(rented, name)
    client, ledger, say = rented.client(), rented.ledger, rented.say
    assert reap(client, ledger, say, waits=QUICK) == []  # nobody was asked
    asked: list[str] = []
    assert reap(client, ledger, say, ask=lambda question: bool(asked.append(question)), waits=QUICK) == []
    assert len(asked) == 1
    assert ours in asked[0]
    assert reap(client, ledger, say, yes=True, waits=QUICK) == [ours]
    assert entry.name in rented.names()  # its client lives: this process
    ledger.change(entry.name, owner=None)
    assert reap(client, ledger, say, yes=True, waits=QUICK) == []  # its guard lives
    end_guards(ledger.folder)
    assert reap(client, ledger, say, yes=True, waits=QUICK) == [entry.name]
    assert any(theirs in line and "--others" in line for line in rented.said)
    assert reap(client, ledger, say, yes=True, others=True, waits=QUICK) == [theirs]
    assert rented.names() == {foreign, "fractal-but-not-ours"}
    for one in rented.cloud.living():
        rented.client().terminate([one["id"]])


def test_reap_goes_on_after_one_that_does_not_end(rented: Renting) -> None:
    names = [rented.ledger.new_name() for _ in range(2)]
    for name in names:
        stray(rented, name)
    rented.cloud.script("POST /instance-operations/terminate", status(401, "global/invalid-api-key"))
    with pytest.raises(CloudError, match="still billed"):
        reap(rented.client(), rented.ledger, rented.say, yes=True, waits=QUICK)
    assert len(rented.cloud.living()) == 1
    assert len(reap(rented.client(), rented.ledger, rented.say, yes=True, waits=QUICK)) == 1


def test_reap_believes_the_api_not_the_ledger(rented: Renting) -> None:
    entry = rented.launch()
    rented.ledger.end(entry.name, "invoke terminate")
    until(lambda: not guards(rented.ledger.folder))
    assert reap(rented.client(), rented.ledger, rented.say, yes=True, waits=QUICK) == [entry.name]
    assert rented.cloud.living() == []


@pytest.mark.usefixtures("no_guard")
def test_two_living_instances_are_told(rented: Renting) -> None:
    entry = rented.launch()
    name = rented.ledger.new_name()
    stray(rented, name)
    rented.ledger.add(replace(entry, name=name, state="intended", id=None, owner=None))
    with pytest.raises(CloudError, match="2 instances are billed"):
        current(rented.client(), rented.ledger, rented.say, SETTINGS)
    end_all(rented)


def test_the_laptop_needs_no_torch_and_the_room_is_shut() -> None:
    code = "import sys, fractal.cloud.instance, fractal.cloud.cost; print(sorted({'torch', 'vllm', 'docker', 'numpy', 'fractal.images.build'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "[]"
