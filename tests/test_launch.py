"""Launching against the strict fake over HTTP: what may be requested, which error tries the next region, and what has to
hold whatever the API, the clock, the disk or another operator does: no instance is alive that the ledger does not name.
"""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fractal.cloud import file_system, guard, instance
from fractal.cloud.account import Account
from fractal.cloud.instance import current
from fractal.cloud.lambda_api import from_env
from fractal.cloud.lambda_errors import AuthError, CloudError, ConnectionLostError
from fractal.cloud.lambda_types import InstanceType, Offer, Region
from fractal.cloud.launch import Candidate, LaunchRequest, candidates, check_request, launch
from fractal.cloud.ledger import FileSystemMount
from fractal.cloud.reconcile import terminate
from fractal.errors import InputError, OutsideError
from tests.conftest import ROOT, until
from tests.fake_lambda.server import cut, delay, garbage, lose_answer, ok, status, tear
from tests.renting import QUICK, REQUEST, TYPE, Renting, guards, renting

pytestmark = pytest.mark.usefixtures("openssh")
LAUNCH = "POST /instance-operations/launch"
A100 = "gpu_1x_a100_sxm4"


# --- the request

WRONG = [
    (
        LaunchRequest(("gpu_1x_a11",)),
        f"no instance type gpu_1x_a11.*{TYPE} +0.75  A10 .24 GB PCIe. +us-west-1, us-east",
    ),
    (LaunchRequest(()), "--type"),
    (LaunchRequest((TYPE,), ("mars-1",)), "no region mars-1. .*europe-central-1.*us-west-1.*CAPACITY NOW"),
    (LaunchRequest((TYPE, A100), max_price_usd=0.5), "0.50 USD/h or less; the cheapest costs 0.75.*CAPACITY NOW"),
    (LaunchRequest((TYPE,), image="lambda-stack-99"), "no image lambda-stack-99. .*lambda-stack-24-04"),
    (LaunchRequest((TYPE,), file_systems=("other",)), "no file system other. There is: models in us-east-1"),
    (LaunchRequest((TYPE,), file_systems=("models",)), "--region=us-east-1"),
]


def test_a_wrong_request_is_refused_before_money_with_what_is_valid(rented: Renting) -> None:
    rented.cloud.add_file_system("models", "us-east-1")
    for request, text in WRONG:
        with pytest.raises(InputError, match=f"(?s){text}"):
            rented.launch(request)
    assert rented.cloud.count("POST *") == 0
    assert rented.ledger.entries() == []
    check_request(rented.client(), LaunchRequest((TYPE,), ("us-east-1",), file_systems=("models",)))
    # a region without capacity is valid
    check_request(rented.client(), LaunchRequest((TYPE,), ("us-south-1",), image="lambda-stack-24-04"))


def offer(name: str, cents: int, *regions: str) -> Offer:
    return Offer(InstanceType(name, cents, "GPU"), tuple(Region(region) for region in regions))


def test_the_order_of_types_decides_then_that_of_regions() -> None:
    offers = {"a": offer("a", 100, "r1", "r2"), "b": offer("b", 50, "r2"), "c": offer("c", 900, "r1")}
    a1, a2, b2 = Candidate("a", "r1", 100), Candidate("a", "r2", 100), Candidate("b", "r2", 50)
    assert candidates(LaunchRequest(("b", "a", "b")), offers) == [b2, a1, a2]
    assert candidates(LaunchRequest(("a", "b"), ("r2", "r1", "r9")), offers) == [a2, a1, b2]
    assert candidates(LaunchRequest(("a", "c"), max_price_usd=1.0), offers) == [a1, a2]
    assert candidates(LaunchRequest(("gone",)), offers) == []


# --- capacity


@pytest.mark.usefixtures("no_guard")
def test_only_missing_capacity_tries_the_next_candidate(rented: Renting) -> None:
    rented.cloud.set_capacity(TYPE, "us-west-1", 0, advertised=True)
    rented.cloud.set_capacity(TYPE, "us-east-1", 0, advertised=True)
    entry = rented.launch(LaunchRequest((TYPE, A100)))
    assert (entry.type_name, entry.region, entry.price_cents_per_hour) == (A100, "us-west-1", 129)
    assert rented.cloud.count(LAUNCH) == 3
    assert len(rented.ledger.entries()) == 1
    rented.terminate_all()


def test_no_capacity_leaves_nothing_behind(rented: Renting) -> None:
    rented.cloud.set_capacity(TYPE, "us-west-1", 0, advertised=True)
    with pytest.raises(CloudError, match=r"No capacity for gpu_1x_a10 in us-west-1\. .*--wait-for-capacity"):
        rented.launch(LaunchRequest((TYPE,), ("us-west-1",)))
    assert rented.ledger.entries() == []
    until(lambda: not guards(rented.ledger.folder))  # its guard has ended as well


@pytest.mark.usefixtures("no_guard")
def test_capacity_is_waited_for(rented: Renting) -> None:
    rented.cloud.no_capacity()
    rented.cloud.set_capacity(TYPE, "us-south-1", 1, after_s=0.5)
    entry = rented.launch(LaunchRequest((TYPE,), wait_s=20))
    assert entry.region == "us-south-1"
    assert rented.cloud.count(LAUNCH) == 1  # requested once it was there, not before
    assert any("yet; waited" in line for line in rented.logged)
    rented.terminate_all()
    rented.cloud.no_capacity()
    with pytest.raises(CloudError, match="within 0 s"):
        rented.launch(LaunchRequest((TYPE,), wait_s=0.3))


@pytest.mark.usefixtures("no_guard")
def test_any_other_refusal_stops_with_nothing_open(rented: Renting) -> None:
    for fault, kind in (
        (status(401, "global/invalid-api-key"), AuthError),
        (status(403, "global/account-inactive"), AuthError),
        (status(400, "global/quota-exceeded"), CloudError),
        (status(400, "global/invalid-parameters"), CloudError),
        (status(429, "global/too-many-requests", retry_after=9), CloudError),
    ):
        before = rented.cloud.count(LAUNCH)
        rented.cloud.script(LAUNCH, fault)
        with pytest.raises(kind):
            rented.launch()
        assert rented.cloud.count(LAUNCH) == before + 1
        assert rented.ledger.entries() == []


# --- a lost response

LOST = [  # fault, and whether the launch happened
    (lose_answer(), True),
    (tear(), True),
    (garbage(done=True), True),
    (garbage(), False),
    (status(500, "global/internal-error", done=True), True),
    (status(502), False),
    (status(400, "provider/internal-unavailable", done=True), True),
    (cut(), False),
    (delay(3.0), True),
]


@pytest.mark.usefixtures("no_guard")
def test_a_launch_without_a_response_is_looked_for_by_name_before_anything_else(rented: Renting) -> None:
    rented.cloud.hidden_s = 0.1
    for fault, happened in LOST:
        before, launches = rented.cloud.count(LAUNCH), rented.cloud.launches
        rented.cloud.script(LAUNCH, fault)
        timing = replace(QUICK, unknown_launch_s=4.0) if fault.kind == "delay" else QUICK
        entry = rented.launch(timing=timing)
        assert rented.names() == {entry.name}, fault
        assert rented.cloud.launches == launches + 1
        assert rented.cloud.count(LAUNCH) == before + (1 if happened else 2), fault
        rented.terminate_all()


@pytest.mark.usefixtures("no_guard")
def test_a_client_that_slept_during_the_request_looks_as_long(rented: Renting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The intent is hours old when the lost response is noticed, and the instance not listed yet."""
    rented.cloud.hidden_s = 0.2
    rented.cloud.script(LAUNCH, lose_answer())
    client = rented.client()
    real = client.launch

    def asleep(**options: Any) -> str:
        rented.ledger.change(options["name"], asked_at=time.time() - 3 * 3600)
        return real(**options)

    monkeypatch.setattr(client, "launch", asleep)
    launch(rented.account(client), REQUEST, rented.key)
    assert rented.cloud.launches == 1
    rented.terminate_all()


@pytest.mark.usefixtures("no_guard")
def test_lost_responses_are_not_retried_forever(rented: Renting) -> None:
    rented.cloud.script(LAUNCH, *[cut()] * 9)
    with pytest.raises(CloudError, match="2 launches had no response"):
        rented.launch()
    assert rented.open_names() == set()


@pytest.mark.usefixtures("no_guard")
def test_an_api_that_fails_while_it_is_looked_for_leaves_the_intent(rented: Renting) -> None:
    rented.cloud.script(LAUNCH, lose_answer())
    rented.cloud.script("GET /instances", ok(), *[cut()] * 40)
    with pytest.raises(ConnectionLostError):
        rented.launch()
    (intent,) = rented.ledger.open_entries()
    assert intent.owner is None  # the guard and the next command may resolve it
    with pytest.raises(CloudError):
        current(rented.account())
    rented.cloud.unscript()
    assert rented.launch().name == intent.name
    assert rented.cloud.launches == 1
    rented.terminate_all()


@pytest.mark.usefixtures("no_guard")
def test_interrupted_in_the_request_the_intent_stays(rented: Renting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C or SIGTERM: the request may have been sent."""

    def interrupted(**options: Any) -> str:
        raise KeyboardInterrupt

    client = rented.client()
    monkeypatch.setattr(client, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch(rented.account(client), REQUEST, rented.key)
    (intent,) = rented.ledger.open_entries()
    assert (intent.state, intent.owner) == ("intended", None)
    with pytest.raises(CloudError, match="not known yet whether"):
        current(rented.account())
    terminate(rented.account(), intent)
    assert rented.open_names() == set()


@pytest.mark.usefixtures("no_guard")
def test_a_price_that_rose_terminates_it_at_once(rented: Renting, monkeypatch: pytest.MonkeyPatch) -> None:
    client = rented.client()
    real = client.launch

    def more_expensive(**options: Any) -> str:
        rented.cloud.set_price(TYPE, 9900)
        return real(**options)

    monkeypatch.setattr(client, "launch", more_expensive)
    with pytest.raises(CloudError, match=r"99\.00 USD/h, more than the 1\.00 that --max-price.*is terminated"):
        launch(rented.account(client), LaunchRequest((TYPE,), max_price_usd=1.0), rented.key)
    assert rented.cloud.launches == 1
    assert rented.cloud.living() == []
    assert rented.ledger.entries()[0].price_cents_per_hour == 9900


def test_the_real_rate_limits_are_kept(tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rate limiter of the state folder, which the guard shares."""
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    with renting(tmp_path / "state", key_file) as one:
        one.cloud.rate = True
        monkeypatch.setenv("FRACTAL_LAMBDA_URL", one.cloud.url)
        client = from_env(one.ledger.folder)
        account = Account(client, one.ledger, one.logged.append, replace(QUICK, request_interval_s=1.05))
        terminate(account, launch(account, REQUEST, one.key))
        assert one.cloud.living() == []


@pytest.mark.usefixtures("no_guard")
def test_all_of_the_request_arrives(rented: Renting) -> None:
    rented.cloud.add_file_system("models", "us-east-1")
    rented.launch(LaunchRequest((TYPE,), ("us-east-1",), image="lambda-stack-24-04", file_systems=("models",)))
    (body,) = [call.body for call in rented.cloud.requests if call.path.endswith("/launch")]
    assert body["image"] == {"family": "lambda-stack-24-04"}
    assert body["file_system_names"] == ["models"]
    assert body["region_name"] == "us-east-1"
    assert body["ssh_key_names"] == ["mine"]
    (entry,) = rented.ledger.entries()
    assert entry.file_systems == (FileSystemMount("models", "/lambda/nfs/models"),)
    assert file_system.folder(entry) == "/lambda/nfs/models/fractal"
    rented.terminate_all()


@pytest.mark.usefixtures("no_guard")
def test_each_launch_gives_the_instance_a_host_key_whose_private_half_stays_nowhere_here(rented: Renting) -> None:
    rented.cloud.set_capacity(TYPE, "us-west-1", 0, advertised=True)
    entries = []
    for _ in range(2):
        entries.append(rented.launch())
        rented.terminate_all()
    texts = [call.body["user_data"] for call in rented.cloud.requests if call.path.endswith("/launch")]
    assert len(texts) == 4
    assert (texts[0], texts[2]) == (texts[1], texts[3])  # asked again in the next region
    for entry, text in zip(entries, texts[1::2], strict=True):
        assert text.startswith("#cloud-config\nssh_deletekeys: true\nssh_keys:\n  ed25519_private: |\n    -----BEGIN")
        assert text.endswith(f"  ed25519_public: {entry.host_key}\n")
    assert entries[0].host_key != entries[1].host_key
    here = [file.read_text() for file in rented.ledger.folder.rglob("*") if file.is_file()] + rented.logged
    private = {line.strip() for text in texts for line in text.splitlines() if line.startswith("    ")}
    assert not [line for line in private for text in here if line in text]


# --- a second launch


@pytest.mark.usefixtures("no_guard")
def test_a_second_launch_uses_the_first_and_says_so(rented: Renting) -> None:
    first = rented.launch()
    second = rented.launch(LaunchRequest((A100, TYPE), max_hours=7.0, max_dollars=3.0), terminate_after=True)
    assert second.id == first.id
    assert (second.max_hours, second.max_dollars, second.terminate_after) == (7.0, 3.0, True)
    assert any("used again, no other is launched" in line for line in rented.logged)
    assert rented.cloud.launches == 1
    for request, text in ((LaunchRequest((A100,)), A100), (LaunchRequest((TYPE,), ("us-east-1",)), "us-east-1")):
        with pytest.raises(InputError, match=f"is alive, and you ask for {text}.*invoke terminate"):
            rented.launch(request)
    rented.cloud.add_file_system("models", "us-west-1")
    with pytest.raises(InputError, match=r"was launched without the file system models.*invoke terminate"):
        rented.launch(LaunchRequest((TYPE,), ("us-west-1",), file_systems=("models",)))
    rented.ledger.change(first.name, asked_at=time.time() - 2 * 3600)
    with pytest.raises(InputError, match="past the limits you give"):
        rented.launch(LaunchRequest((TYPE,), max_hours=1.0))
    rented.cloud.set_price(TYPE, 10)
    rented.ledger.change(first.name, price_cents_per_hour=75)
    with pytest.raises(InputError, match="costs more"):
        rented.launch(LaunchRequest((TYPE,), max_price_usd=0.5))
    rented.terminate_all()
    assert rented.launch().name != first.name
    rented.terminate_all()


HOLDER = """
import sys, time
from pathlib import Path
from fractal.cloud.ledger import Ledger
with Ledger(Path(sys.argv[1])).lock("launch", "launching"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.usefixtures("no_guard")
def test_two_operators_at_once(rented: Renting) -> None:
    """The second is told which process launches; when that one is killed, nothing is in the way."""
    command = [sys.executable, "-c", HOLDER, str(rented.ledger.folder)]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match=f"process {other.pid} is launching") as caught:
            rented.launch()
        assert "\n" not in str(caught.value)
    finally:
        other.kill()
        other.wait()
    rented.launch()
    rented.terminate_all()


def test_threads_that_launch_at_once_rent_one(rented: Renting) -> None:
    results: list[object] = []

    def work() -> None:
        try:
            results.append(rented.launch().name)
        except InputError as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert rented.cloud.launches == 1
    rented.terminate_all()


# --- disk, ledger, clock


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(b"x" * 512)
        except OSError:
            pass


def test_a_full_disk_at_the_worst_moment(tiny_disk: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id cannot be written: the instance is terminated at once; and terminating needs no disk."""
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    monkeypatch.setattr(guard, "start", lambda account, name: None)
    with renting(tiny_disk / "state", key_file) as one:
        client, filler = one.client(), tiny_disk / "filler"
        real = client.launch

        def then_full(**options: Any) -> str:
            id = real(**options)
            fill(filler)
            return id

        monkeypatch.setattr(client, "launch", then_full)
        with pytest.raises(OutsideError, match=r"disk.*is terminated"):
            launch(one.account(client), REQUEST, one.key)
        assert one.cloud.launches == 1
        assert one.cloud.living() == []
        filler.unlink()
        entry = one.launch()
        fill(filler)
        with pytest.raises(OutsideError):
            terminate(one.account(), entry)
        assert one.cloud.living() == []
        filler.unlink()
        instance.update(one.account())
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
@pytest.mark.parametrize("hours", [-1000.0, 1000.0], ids=["back", "forward"])
def test_a_clock_that_jumped_neither_loses_nor_doubles(rented: Renting, hours: float) -> None:
    """The clock was wrong when the launch was requested and the response lost; then it jumped."""
    entry = rented.launch()
    past = time.time() - hours * 3600
    lost = {"state": "intended", "id": None, "launched_at": None, "owner": None}
    rented.ledger.change(entry.name, **lost, asked_at=past, max_hours=None)
    again = rented.launch(replace(REQUEST, max_hours=None))
    assert again.name == entry.name
    assert rented.cloud.launches == 1
    rented.ledger.change(entry.name, launched_at=past)
    instance.update(rented.account())
    assert rented.open_names() == {entry.name}
    rented.terminate_all()
    assert all(entry.dollars(time.time()) >= 0 for entry in rented.ledger.entries())
