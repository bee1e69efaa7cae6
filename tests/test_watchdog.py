"""The watchdog: when it ends an instance (pure), that it does so through any failure, and on a simulated machine alone."""

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.cloud import guard, jobs, lambda_api, reconcile, session, ssh_config, watchdog, watchdog_service
from fractal.cloud.account import Account, Timing
from fractal.cloud.instance import update
from fractal.cloud.launch import LaunchRequest
from fractal.cloud.ledger import Entry, Ledger, Watchdog
from fractal.cloud.watchdog_service import Service, Settings, Watch
from fractal.errors import InputError
from tests.conftest import ROOT, until
from tests.fake_lambda.machines import Machines
from tests.fake_lambda.server import FakeLambda, cut, garbage, hang, status
from tests.machine import GOOD, Condition, Machine, Unavailable
from tests.renting import TYPE, Renting, end_guards
from tests.test_lambda_api import RawServer
from tests.test_ledger import entry as ledger_entry

KEY = "secret-key"
SETTINGS = Settings(
    id="i-1", url="http://127.0.0.1:9/api/v1", account="0123456789ab", key=KEY, left_s=3600.0, ends_at=1e9, idle_s=None,
    guard_s=None, tick_s=0.05,
)  # fmt: skip
LONG_AGO, FAR_AHEAD = 978307200.0, 4102444800.0  # 2001 and 2100


# --- when it ends the instance

limits = st.none() | st.integers(1, 60).map(float)


@given(left_s=limits, idle_s=limits, guard_s=limits, looks=st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans()), min_size=1, max_size=40))  # fmt: skip
def test_it_ends_the_instance_at_the_first_look_after_a_limit_and_never_before(
    left_s: float | None, idle_s: float | None, guard_s: float | None, looks: list[tuple[int, bool, bool]]
) -> None:
    """Against a slow oracle: whether anything happened in the seconds before each look."""
    begin = 1000.0
    watch = Watch(replace(SETTINGS, left_s=left_s, idle_s=idle_s, guard_s=guard_s), begin, begin, begin)
    now, worked, seen = begin, [begin], [begin]
    for pause, works, beats in looks:
        now += pause
        if works:
            watch.busy_at = now
            worked.append(now)
        if beats:
            watch.guard_at = now
            seen.append(now)
        expected = [
            left_s is not None and now >= begin + left_s,
            idle_s is not None and not [at for at in worked if at > now - idle_s],
            guard_s is not None and not [at for at in seen if at > now - guard_s],
        ]
        assert (watch.due(now) is not None) == any(expected)


# --- the service, in this process: each step by hand


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[FakeLambda]:
    """With two instances: the watchdog's, and one of another operator."""
    with FakeLambda(key=KEY, rate=False) as fake:
        fake.add_ssh_key("mine", "ssh-ed25519 AAAA")
        for name in ("mine", "theirs"):
            client = lambda_api.Client(KEY, fake.url, lambda_api.RateLimiter(tmp_path, request_s=0, launch_s=0))
            client.launch(region="us-east-1", type_name=TYPE, ssh_key="mine", name=name)
        yield fake
        assert fake.troubles == []
        assert [one["name"] for one in fake.living()] in (["mine", "theirs"], ["theirs"])


def of(cloud: FakeLambda, **changes: Any) -> Settings:
    return replace(SETTINGS, id=cloud.launched[0], url=cloud.url, **changes)


def ended(cloud: FakeLambda) -> bool:
    return [one["name"] for one in cloud.living()] == ["theirs"]


OUT = [
    [cut()],
    [status(503)],
    [status(429, "global/too-many-requests", retry_after=9)],
    [status(401, "global/invalid-api-key"), status(403)],  # the key is revoked, and valid again
    [hang(1.0)],
    [garbage()],  # 200 from something in between: the instance still runs, and it is asked again
    [cut()] * 12,
]


def test_it_asks_until_the_instance_ends_whatever_the_api_does(
    cloud: FakeLambda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog_service, "REQUEST_TIMEOUT_S", 0.5)
    for faults in OUT:
        cloud.unscript()
        cloud.script("POST *", *faults)
        service = Service(of(cloud, left_s=0.0), tmp_path)
        assert service.step() == 0.0
        before = cloud.count("POST *terminate")
        pauses = [service.step() for _ in range(len(faults))]
        assert not ended(cloud), faults
        assert all(2.0 <= pause <= 60.0 for pause in pauses)  # polite, and never given up
        assert cloud.count("POST *terminate") == before + len(faults)
    assert service.step() == watchdog_service.REPEAT_S
    assert ended(cloud)
    asked = {path for _, _, path, _ in cloud.requests if path.startswith("/instances/")}
    assert asked <= {f"/instances/{cloud.launched[0]}"}
    assert all(
        body == {"instance_ids": [cloud.launched[0]]} for *_, path, body in cloud.requests if "terminate" in path
    )


def test_a_revoked_key_is_told_before_it_is_needed(
    cloud: FakeLambda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog_service, "CHECK_S", 0.0)
    service = Service(of(cloud), tmp_path)
    service.step()
    assert json.loads((tmp_path / "state").read_text())["problem"] == ""
    cloud.key = "another-key"
    service.step()
    state = (tmp_path / "state").read_text()
    assert json.loads(state)["problem"] == "the API answers HTTP 401 to GET"
    assert KEY not in state


@pytest.mark.parametrize("clock", [LONG_AGO, FAR_AHEAD])
def test_no_clock_of_the_instance_ends_it_sooner_or_later(
    cloud: FakeLambda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    now = [5000.0]
    monkeypatch.setattr(time, "time", lambda: clock)
    monkeypatch.setattr(watchdog_service, "boot_time", lambda: now[0])
    heartbeat = tmp_path / "heartbeat"
    service = Service(of(cloud, left_s=3600.0, guard_s=600.0), tmp_path)
    for number in range(11):
        heartbeat.touch()
        os.utime(heartbeat, (clock - number, clock - number))  # the clock is even set back in between
        now[0] += 300.0
        assert service.step() == SETTINGS.tick_s
    now[0] += 301.0
    assert service.step() == 0.0
    assert json.loads((tmp_path / "state").read_text())["reason"] == "a limit is reached"


def test_an_operator_who_is_not_seen(cloud: FakeLambda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5000.0]
    monkeypatch.setattr(watchdog_service, "boot_time", lambda: now[0])
    service = Service(of(cloud, left_s=None, guard_s=600.0), tmp_path)
    now[0] += 599.0
    assert service.step() > 0.0
    now[0] += 1.0
    assert service.step() == 0.0
    service.step()
    assert ended(cloud)
    assert "guard was not seen for 10 minutes" in json.loads((tmp_path / "state").read_text())["reason"]


WORK: list[tuple[str, dict[str, Callable[..., object]]]] = [
    ("a job, or one whose results", {"run": lambda *words: "0123abcd\n" if "docker" in words else "0\n"}),
    ("an engine that does not answer", {"run": lambda *words: None}),
    ("the GPU", {"run": lambda *words: "" if "docker" in words else "0\n37\n"}),
    ("a program", {"run": lambda *words: "", "load": lambda: 0.9}),
    ("an ssh session", {"run": lambda *words: "", "ssh_sessions": lambda: {"0100007F:D431"}}),
    ("", {"run": lambda *words: ""}),
    ("", {"run": lambda *words: "" if "docker" in words else None}),  # no GPU
]


def test_what_runs_keeps_the_instance(cloud: FakeLambda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a job that waits for its turn, and one whose results nobody has fetched."""
    now = [5000.0]
    monkeypatch.setattr(watchdog_service, "boot_time", lambda: now[0])
    for expected, probes in WORK:
        for name, probe in ({"load": lambda: 0.1, "ssh_sessions": set} | probes).items():
            monkeypatch.setattr(watchdog_service, name, probe)
        service = Service(of(cloud, left_s=None, idle_s=600.0), tmp_path)
        for _ in range(4):
            now[0] += 300.0
            service.step()
        state = json.loads((tmp_path / "state").read_text())
        assert state["running"].startswith(expected)
        assert bool(state["reason"]) == (not expected), expected
    assert watchdog_service.JOB_LABEL == jobs.JOB_LABEL


def test_a_heartbeat_is_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a connection of its own; a person's is seen at two looks."""
    monkeypatch.setattr(watchdog_service, "run", lambda *words: "")
    monkeypatch.setattr(watchdog_service, "load", lambda: 0.0)
    seen = [{"a"}, {"b"}, set(), {"c"}, {"c", "d"}]
    monkeypatch.setattr(watchdog_service, "ssh_sessions", lambda: seen.pop(0))
    work = watchdog_service.Work()
    assert [work.seen() for _ in range(5)] == ["", "", "", "", "an ssh session"]


def test_a_look_that_fails_is_not_idleness_and_delays_no_limit(
    cloud: FakeLambda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [5000.0]
    monkeypatch.setattr(watchdog_service, "boot_time", lambda: now[0])
    monkeypatch.setattr(watchdog_service, "ssh_sessions", lambda: 1 / 0)
    service = Service(of(cloud, left_s=3000.0, idle_s=600.0), tmp_path)
    for _ in range(9):
        now[0] += 300.0
        assert service.step() > 0
    assert "ZeroDivisionError" in service.problem
    now[0] += 301.0
    assert service.step() == 0.0


def test_a_folder_that_takes_nothing_ends_no_less(cloud: FakeLambda, tmp_path: Path) -> None:
    service = Service(of(cloud, left_s=0.0), tmp_path / "gone")
    service.step()
    service.step()
    assert ended(cloud)


CA = """\
[ca]
default_ca=own
[own]
new_certs_dir=.
database=index
rand_serial=yes
default_md=sha256
policy=any
x509_extensions=names
[any]
commonName=supplied
[names]
subjectAltName=IP:127.0.0.1
[req]
distinguished_name=name
[name]
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
@pytest.mark.parametrize(
    ("begin", "end", "host", "trusted"),
    [
        ("20200101000000Z", "20210101000000Z", "127.0.0.1", True),  # as on an instance years ahead
        ("20900101000000Z", "20910101000000Z", "127.0.0.1", True),  # years behind
        ("20200101000000Z", "20910101000000Z", "127.0.0.1", True),
        ("20200101000000Z", "20910101000000Z", "localhost", False),
        ("20200101000000Z", "20210101000000Z", "localhost", False),
        ("20200101000000Z", "20210101000000Z", "", False),  # an authority that nobody trusts
    ],
)
def test_a_certificate_is_verified_but_for_its_dates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str, end: str, host: str, trusted: bool
) -> None:
    """A wrong clock must not keep the instance alive."""
    (tmp_path / "config").write_text(CA)
    (tmp_path / "index").touch()
    request = (
        "openssl req -config config -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=127.0.0.1"
    )
    sign = f"openssl ca -batch -config config -selfsign -keyfile key -in request -out cert -startdate {begin} -enddate {end}"
    for command in (f"{request} -keyout key -out request", sign):
        subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    if host:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with RawServer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", tls=tls) as server:
        url = f"https://{host or '127.0.0.1'}:{server.port}/api/v1"
        found = watchdog_service.Api(replace(SETTINGS, url=url)).see()
        assert (found.status == 200) == trusted, found
        assert (KEY.encode() in server.received) == trusted


# --- the service, as the process that it is


class Local:
    """The program in a folder here."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.program = folder / "watchdog.py"
        shutil.copy(watchdog.PROGRAM, self.program)

    def call(self, verb: str, settings: Settings | None = None) -> subprocess.CompletedProcess[str]:
        text = json.dumps(asdict(settings)) if settings else ""
        command = [sys.executable, str(self.program), verb]
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)

    def state(self) -> dict[str, Any] | None:
        output = self.call("status").stdout
        return json.loads(output) if output else None

    def processes(self) -> list[psutil.Process]:
        return [one for one in psutil.process_iter() if str(self.program) in cmdline(one)]

    def end(self) -> None:
        for one in self.processes():
            one.kill()


def cmdline(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    one = Local(tmp_path / "watchdog")
    yield one
    one.end()


def test_it_goes_on_alone_and_keeps_the_key_to_itself(cloud: FakeLambda, local: Local) -> None:
    done = local.call("start", of(cloud, left_s=600.0, guard_s=600.0))
    assert (done.returncode, done.stdout, done.stderr) == (0, "on duty\n", "")
    (process,) = local.processes()
    assert os.getsid(process.pid) == process.pid
    assert process.terminal() is None
    assert KEY not in " ".join(process.cmdline()) + repr(process.environ())
    for file in local.program.parent.iterdir():
        assert KEY not in file.read_text()
    state = local.state()
    assert state is not None
    assert 590 < state["left_s"] <= 600
    assert state["settings"] == json.loads(json.dumps(of(cloud).public() | {"guard_s": 600.0}))


def test_a_second_start_takes_over_with_its_limits_and_its_key(cloud: FakeLambda, local: Local) -> None:
    local.call("start", of(cloud))
    (before,) = local.processes()
    cloud.key = "new-key"
    refused = local.call("start", of(cloud, left_s=0.0))
    assert (refused.returncode, refused.stdout) == (1, "the API answers HTTP 401 to GET\n")
    assert local.processes() == [before]
    assert local.call("start", of(cloud, key="new-key", left_s=9000.0)).returncode == 0
    (after,) = local.processes()
    assert after != before
    state = local.state()
    assert state is not None
    assert state["left_s"] > 8000
    os.kill(after.pid, signal.SIGKILL)
    until(lambda: local.state() is None)
    assert local.call("start", of(cloud, key="new-key", left_s=0.3)).returncode == 0
    until(lambda: ended(cloud))


def test_an_api_that_is_out_at_its_start_is_told_and_waited_for(cloud: FakeLambda, local: Local) -> None:
    cloud.script("* *", *[status(503)] * 2)  # at its start, and when it wants to end the instance
    assert local.call("start", of(cloud, left_s=0.3)).stdout == "on duty\n"
    until(lambda: ended(cloud))


# --- what the ledger says


@pytest.fixture
def watched(rented: Renting, no_guard: None) -> Entry:
    """An instance with a watchdog."""
    return rented.launch(LaunchRequest(types=(TYPE,), watchdog=Watchdog()))


@pytest.mark.usefixtures("openssh")
@pytest.mark.parametrize("forget", [False, True], ids=["terminated", "unknown to the API"])
@pytest.mark.parametrize(("age_h", "due"), [(1.0, "no limit was due"), (4.1, "its limit (4 h) was due")])
def test_an_end_that_nobody_here_asked_for_may_be_the_watchdogs(
    rented: Renting, watched: Entry, forget: bool, age_h: float, due: str
) -> None:
    then = time.time() - age_h * 3600
    rented.ledger.change(watched.name, asked_at=then, launched_at=then)
    rented.cloud.end_from_outside(str(watched.id), forget=forget)
    update(rented.account())
    reason = rented.find(watched).end_reason or ""
    assert "ended by its watchdog or from outside" in reason
    assert due in reason
    assert reconcile.presumed_ended(rented.find(watched)) == forget
    rented.ledger.end(watched.name, "limit reached: 4 h", instead_of=reconcile.UNEXPLAINED)  # the guard had asked
    assert rented.find(watched).end_reason == "limit reached: 4 h"


@pytest.mark.usefixtures("openssh")
def test_of_two_that_end_it_at_once_the_first_has_ended_it(rented: Renting, watched: Entry) -> None:
    rented.cloud.terminate_s = 0.3
    rented.client().terminate(str(watched.id))  # as the watchdog does
    reconcile.terminate(rented.account(), watched)
    assert (rented.find(watched).end_reason or "").startswith("ended by its watchdog or from outside")
    other = rented.launch(LaunchRequest(types=(TYPE,), watchdog=Watchdog()))
    reconcile.terminate(rented.account(), other)
    assert rented.find(other).end_reason == "invoke terminate"


@pytest.mark.usefixtures("openssh")
def test_a_guard_that_comes_second_does_not_claim_the_end(rented: Renting) -> None:
    rented.cloud.terminate_s = 0.5
    entry = rented.launch(LaunchRequest(types=(TYPE,), watchdog=Watchdog()))
    rented.client().terminate(str(entry.id))
    rented.ledger.change(entry.name, asked_at=time.time() - 9 * 3600)
    until(lambda: rented.ledger.open_entries() == [])
    assert "ended by its watchdog or from outside; its limit (4 h) was due" in (rented.find(entry).end_reason or "")


@pytest.mark.usefixtures("openssh")
def test_a_second_launch_changes_limits_and_leaves_the_watchdog(rented: Renting, watched: Entry) -> None:
    again = rented.launch(LaunchRequest(types=(TYPE,), max_hours=8.0))
    assert again.watchdog == Watchdog()
    before, after = (watchdog.settings(rented.account(), entry).public() for entry in (watched, again))
    assert before != after
    third = rented.launch(LaunchRequest(types=(TYPE,), max_hours=8.0, watchdog=Watchdog(idle_s=60.0)))
    assert third.watchdog == Watchdog(idle_s=60.0)
    rented.terminate_all()


def test_wishes_that_cannot_be_met_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fractal.cloud.options import _watchdog

    monkeypatch.delenv("FRACTAL_WATCHDOG", raising=False)

    def asked(flag: bool = False, idle: str = "", unseen: str = "") -> Watchdog | None:
        return _watchdog({"watchdog": flag, "idle_minutes": idle, "guard_minutes": unseen})

    assert asked() is None
    assert asked(True, "10", "0.5") == Watchdog(600.0, 30.0)
    for options, text in (((False, "10"), "give --watchdog"), ((True, "0"), "--idle-minutes=0"), ((True, "", "x"), "--guard-minutes=x")):  # fmt: skip
        with pytest.raises(InputError, match=text):
            asked(*options)
    monkeypatch.setenv("FRACTAL_WATCHDOG", "1")
    assert asked() == Watchdog()
    monkeypatch.setenv("FRACTAL_WATCHDOG", "yes")
    with pytest.raises(InputError, match="FRACTAL_WATCHDOG=yes"):
        asked()


@pytest.mark.usefixtures("openssh")
def test_a_heartbeat_that_fails_is_said_once_and_stops_no_guard(tmp_path: Path) -> None:
    logged: list[str] = []
    heartbeat = watchdog.Heartbeat(tmp_path, 0.0, logged.append)
    nobody = ledger_entry(id="i-1", ip="127.0.0.2", key_file=str(tmp_path / "key"))

    def beat() -> bool:
        heartbeat.beat(nobody)
        return bool(logged)

    until(beat)
    for _ in range(20):
        beat()
        time.sleep(0.02)
    assert logged == ["no heartbeat reaches its watchdog"]
    watchdog.Heartbeat(tmp_path, 0.0, logged.append).beat(replace(nobody, key_file='a"b'))
    assert logged[1].startswith("no heartbeat reaches its watchdog: 'a\"b'")


# --- on a simulated machine


class Rented:
    """What a user types, in this process, and the simulated machine that comes of it."""

    def __init__(self, cloud: FakeLambda, machines: Machines, state: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.cloud, self.machines, self.ledger, self._capfd = cloud, machines, Ledger(state), capfd

    def invoke(self, *arguments: str) -> str:
        """Its output."""
        from invoke.main import program

        self._capfd.readouterr()
        with suppress(SystemExit):
            program.run(["invoke", *arguments])
        output = "".join(self._capfd.readouterr())
        assert "Traceback" not in output
        assert KEY not in output
        return output

    @property
    def machine(self) -> Machine:
        (running,) = self.machines.running.values()
        return running.machine

    @property
    def entry(self) -> Entry:
        return self.ledger.entries()[-1]

    @contextmanager
    def api_reachable(self) -> Iterator[None]:
        """The instance reaches the fake at the same address as this machine."""
        address = self.cloud.url.split("/")[2].split(":")
        words = ["ssh", "-F", str(ssh_config.config_file(self.ledger.folder)), "-oExitOnForwardFailure=yes", "-N"]
        tunnel = subprocess.Popen([*words, "-R", f"{address[1]}:{':'.join(address)}", ssh_config.ALIAS])
        try:
            test = f"python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", {address[1]}))'"
            until(lambda: self.machine.container.exec_run(["sh", "-c", test])[0] == 0)
            yield
        finally:
            tunnel.kill()
            tunnel.wait()

    def is_on_duty(self) -> bool:
        return bool(self.machine.container.exec_run(["pgrep", "-f", "[w]atchdog.py start"])[0] == 0)

    def set_limit(self, seconds: float) -> None:
        """The first limit is reached so many seconds from now."""
        self.ledger.change(self.entry.name, max_hours=(time.time() - self.entry.asked_at + seconds) / 3600)


@pytest.fixture
def rented_machine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], openssh: None
) -> Iterator[Rented]:  # fmt: skip
    """A ready one with a watchdog."""
    timing = Timing(poll_s=0.2, heartbeat_s=0.5, watchdog_tick_s=0.2, guard_tick_s=0.1, request_interval_s=0.0)
    monkeypatch.setattr(session, "Account", lambda client, ledger, log: Account(client, ledger, log, timing))
    monkeypatch.setattr(watchdog, "GRACE_S", 0.0)
    limiter = lambda_api.RateLimiter
    monkeypatch.setattr(lambda_api, "RateLimiter", lambda folder: limiter(folder, request_s=0, launch_s=0))
    monkeypatch.chdir(ROOT)
    try:
        machines = Machines(getattr(request, "param", GOOD))
    except Unavailable as error:
        pytest.skip(str(error))
    for name in [name for name in os.environ if name.startswith(("FRACTAL_", "LAMBDA_"))]:
        monkeypatch.delenv(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with machines, FakeLambda(key=KEY, machines=machines, rate=False) as fake:
        state = tmp_path / "state"
        settings = {"FRACTAL_LAMBDA_URL": fake.url, "LAMBDA_API_KEY": KEY, "FRACTAL_STATE": str(state)}
        for name, value in (settings | {"HOME": str(tmp_path / "home"), "FRACTAL_WATCHDOG": "1"}).items():
            monkeypatch.setenv(name, value)
        one = Rented(fake, machines, state, capfd)
        output = one.invoke("launch", f"--type={TYPE}", "--register-key")
        assert "no watchdog ran there; one is on duty now" in output, output
        assert "could not end it now: the API cannot be reached" in output
        yield one
        end_guards(state)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        assert fake.troubles == []


@pytest.fixture
def unguarded(rented_machine: Rented, monkeypatch: pytest.MonkeyPatch) -> Rented:
    """No guard is alive, and none will be."""
    monkeypatch.setattr(guard, "start", lambda account, name: None)
    end_guards(rented_machine.ledger.folder)
    return rented_machine


def ended_by_its_watchdog(rented: Rented) -> str:
    """The reason that the ledger has for it."""
    until(lambda: rented.cloud.living() == [])
    asked = [call for call in rented.cloud.requests if call.path.endswith("/terminate")]
    assert asked
    assert {tuple(call.body["instance_ids"]) for call in asked} == {(rented.entry.id,)}
    rented.invoke("ps")
    assert rented.ledger.open_entries() == []
    return rented.entry.end_reason or ""


@pytest.mark.docker
@pytest.mark.cloud
def test_without_a_guard_it_ends_the_instance_at_the_limit_that_a_later_command_told_it(
    rented_machine: Rented, request: pytest.FixtureRequest
) -> None:
    rented = rented_machine
    heartbeat = ["test", "-e", "/run/fractal-watchdog/heartbeat"]
    until(lambda: rented.machine.container.exec_run(heartbeat)[0] == 0)
    request.getfixturevalue("unguarded")
    with rented.api_reachable():
        assert "its watchdog looked" in rented.invoke("ps")
        assert KEY not in rented.machine.sh("cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2> /dev/null || true")
        assert rented.machine.sh(f"grep -rlF {KEY} /run /tmp /home /root /etc /var/log || true") == ""
        rented.set_limit(2.0)
        assert "its watchdog has the new limits" in rented.invoke("ps")
        assert ended_by_its_watchdog(rented).startswith("ended by its watchdog or from outside; its limit (")


@pytest.mark.long
@pytest.mark.docker
@pytest.mark.cloud
@pytest.mark.parametrize("rented_machine", [Condition(disk_mib=200, docker_group=True)], indirect=True)
def test_killed_or_on_a_full_disk_the_next_command_brings_it_back_and_it_waits_for_the_api(unguarded: Rented) -> None:
    unguarded.machine.sh(
        "pkill -KILL -f '[w]atchdog.py start'; dd if=/dev/zero of=/home/ubuntu/big bs=1M 2> /dev/null || true"
    )
    assert not unguarded.is_on_duty()
    assert "no watchdog ran there; one is on duty now" in unguarded.invoke("ps")
    assert unguarded.is_on_duty()
    unguarded.set_limit(1.0)
    unguarded.invoke("ps")
    time.sleep(4.0)
    assert len(unguarded.cloud.living()) == 1
    with unguarded.api_reachable():
        assert "; its limit (" in ended_by_its_watchdog(unguarded)


@pytest.mark.long
@pytest.mark.docker
@pytest.mark.cloud
def test_limits_extended_by_a_second_launch_hold(unguarded: Rented) -> None:
    with unguarded.api_reachable():
        unguarded.set_limit(15.0)
        first_end = time.monotonic() + 15.0
        unguarded.invoke("ps")
        assert "its watchdog has the new limits" in unguarded.invoke("launch", f"--type={TYPE}", "--max-hours=2")
        time.sleep(max(0.0, first_end + 1.0 - time.monotonic()))
        assert len(unguarded.cloud.living()) == 1
        assert unguarded.is_on_duty()
        unguarded.invoke("terminate")
    assert unguarded.entry.end_reason == "invoke terminate"


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated machine has the load of its host: here it does not count."""
    text = watchdog.PROGRAM.read_text()
    assert "BUSY_LOAD = 0.5 " in text
    program = tmp_path / "program.py"
    program.write_text(text.replace("BUSY_LOAD = 0.5 ", "BUSY_LOAD = 1e9 "))
    monkeypatch.setattr(watchdog, "PROGRAM", program)


@pytest.mark.long
@pytest.mark.docker
@pytest.mark.cloud
def test_what_keeps_a_real_machine_from_being_idle(alone: None, unguarded: Rented) -> None:
    machine = unguarded.machine

    def state() -> dict[str, Any]:
        return dict(json.loads(machine.sh("python3 /run/fractal-watchdog/watchdog.py status")))

    def sees(what: str) -> None:
        until(lambda: state()["running"] == what if not what else state()["running"].startswith(what))

    sees("")
    machine.sh("docker create --name queued --label fractal.job=1 fractal-gpu-probe sh")
    sees("a job")
    machine.sh("docker rm queued")
    sees("")
    config = str(ssh_config.config_file(unguarded.ledger.folder))
    shell = subprocess.Popen(["ssh", "-F", config, ssh_config.ALIAS, "sleep 100"])
    sees("an ssh session")
    shell.kill()
    shell.wait()
    sees("")
    machine.sh("sed -i 's/value=0 unit/value=37 unit/' /usr/bin/nvidia-smi")
    sees("the GPU")
    machine.sh("sed -i 's/value=37 unit/value=0 unit/' /usr/bin/nvidia-smi")
    unguarded.ledger.change(unguarded.entry.name, watchdog=Watchdog(idle_s=3.0))
    unguarded.invoke("ps")
    until(lambda: state()["reason"] == "nothing ran for 0.05 minutes")
    assert "ending the instance: nothing ran" in unguarded.invoke("ps")
    unguarded.invoke("terminate")
