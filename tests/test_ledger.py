"""The ledger: nothing is lost, whoever is killed and however many write; what cannot be read is never written over."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from rich.console import Console

from fractal.cloud.cost import bill, cost_table
from fractal.cloud.ledger import NAME, Entry, Event, Ledger, Process, process_start, state_dir
from fractal.errors import InputError, OutsideError
from tests.conftest import ROOT


def entry(name: str = "fractal-0a1b2c-00000001", **fields: object) -> Entry:
    first = Entry(
        name=name,
        url="https://example.org/api/v1",
        account="0123456789ab",
        type_name="gpu_1x_a10",
        region="us-west-1",
        price_cents_per_hour=75,
        ssh_key="mine",
        key_file="/home/me/.ssh/id_ed25519",
        asked_at=1000.0,
        max_hours=4.0,
        max_dollars=None,
        max_price_usd=None,
    )
    return replace(first, **fields)  # type: ignore[arg-type]


class LedgerMachine(RuleBasedStateMachine):
    """The file agrees with a plain dict after any operations, also when drafts of killed writers lie about."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model: dict[str, Entry] = {}
        self.count = 0

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder)  # each time anew: nothing may live in memory

    def some(self, data: st.DataObject) -> str | None:
        return data.draw(st.sampled_from(sorted(self.model))) if self.model else None

    @rule(hours=st.none() | st.floats(0.001, 1e6), text=st.text(max_size=5))
    def add(self, hours: float | None, text: str) -> None:
        self.count += 1
        added = entry(f"fractal-0a1b2c-{self.count:08x}", max_hours=hours, key_file=text)
        self.ledger.add(added)
        self.model[added.name] = added

    @rule(data=st.data(), ip=st.none() | st.ip_addresses(v=4).map(str), id=st.text(max_size=5))
    def change(self, data: st.DataObject, ip: str | None, id: str) -> None:
        if name := self.some(data):
            fields = {"state": "launched", "id": id, "ip": ip}
            self.model[name] = replace(self.model[name], **fields)  # type: ignore[arg-type]
            assert self.ledger.change(name, **fields) == self.model[name]

    @rule(data=st.data(), stale=st.booleans(), why=st.sampled_from(["seen", "done", "limit"]), knows=st.booleans())
    def end(self, data: st.DataObject, stale: bool, why: str, knows: bool) -> None:
        if name := self.some(data):
            before = self.model[name]
            expected = replace(before, asked_at=-1.0) if stale else before
            done = self.ledger.end(name, why, expected=expected, instead_of=["seen"] if knows else [])
            now = self.ledger.find(name)
            assert now is not None
            if before.state == "ended":
                assert done == (knows and before.end_reason == "seen")
                assert now == (replace(before, end_reason=why) if done else before)
            else:
                assert done == (not stale)
                assert (now.end_reason, now.state) == (why, "ended") if done else now == before
            self.model[name] = now

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if name := self.some(data):
            self.ledger.drop(name)
            if self.model[name].state == "intended":
                del self.model[name]

    @rule(data=st.data(), seconds=st.floats(0, 1e6))
    def event(self, data: st.DataObject, seconds: float) -> None:
        if name := self.some(data):
            self.ledger.add_event(name, "boot", 1.0, seconds)
            self.model[name] = replace(
                self.model[name], timeline=(*self.model[name].timeline, Event("boot", 1.0, seconds))
            )

    @rule(junk=st.binary(max_size=20))
    def killed_writer(self, junk: bytes) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / ".ledger.json.123").write_bytes(junk)

    @invariant()
    def agrees(self) -> None:
        assert self.ledger.entries() == list(self.model.values())
        assert self.ledger.open_entries() == [known for known in self.model.values() if known.state != "ended"]


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)

WRITER = """
import sys
from pathlib import Path
from fractal.cloud.ledger import Ledger
from tests.test_ledger import entry
ledger = Ledger(Path(sys.argv[1]))
for n in range(int(sys.argv[3])):
    ledger.add(entry(f"fractal-0a1b2c-{int(sys.argv[2]) * 100000 + n:08x}"))
    print(n, flush=True)
"""


def writer(folder: Path, which: int, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(folder), str(which), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [writer(tmp_path, which, 25) for which in range(3)]
    assert [process.wait(60) for process in writers] == [0, 0, 0]
    assert len(Ledger(tmp_path).entries()) == 75


def test_a_killed_writer_leaves_what_it_had_told_and_no_lock(tmp_path: Path) -> None:
    told = 0
    for which in range(3):
        process = writer(tmp_path, which, 100000)
        assert process.stdout is not None
        for _ in range(5 + which):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().count("\n")
        process.wait()
        told += 5 + which + rest
        assert 0 <= len(Ledger(tmp_path).entries()) - told <= which + 1  # one may be written and not yet told
    Ledger(tmp_path).add(entry("fractal-0a1b2c-ffffffff"))


def change_in_a_child(folder: Path, kill_at: int) -> int:
    """Change an entry in a forked process that is killed at its n-th line of fractal's code; its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = kill_at

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename.startswith(f"{ROOT}/fractal/"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    Ledger(folder).change(entry().name, ip="10.0.0.1")
    os._exit(0)


def test_killed_at_any_line_of_a_change_it_is_as_before_or_after(tmp_path: Path) -> None:
    """Line by line through ledger.py and jsonl.py."""
    Ledger(tmp_path).add(entry())
    seen = []
    for kill_at in range(1, 1000):
        code = change_in_a_child(tmp_path, kill_at)
        (now,) = Ledger(tmp_path).entries()
        seen.append(now.ip)
        assert now in (entry(), entry(ip="10.0.0.1"))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        Ledger(tmp_path).change(entry().name, ip=None)  # the lock is free, and it goes on
    assert len(seen) > 60
    assert set(seen) == {None, "10.0.0.1"}


BROKEN = {
    "empty": b"",
    "cut": b'{"version": 1, "entries": [',
    "no object": b"[]",
    "no version": b'{"entries": []}',
    "wrong type": b'{"version": 1, "entries": [{"name": 5}]}',
    "not utf-8": b"\xff\xfe",
    "null": b"\x00" * 500,
    "newer": b'{"version": 99, "entries": {}}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_told_and_never_written_over(content: bytes, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.file.write_bytes(content)
    for act in (ledger.entries, lambda: ledger.add(entry()), lambda: ledger.end("x", "y"), lambda: ledger.drop("x")):
        with pytest.raises(InputError) as told:
            act()
        assert str(ledger.file) in str(told.value)
        assert "\n" not in str(told.value)
        assert "newer" in str(told.value)
    assert ledger.file.read_bytes() == content


def test_a_value_that_would_not_come_back_is_not_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add(entry())
    before = ledger.file.read_bytes()
    for fields in ({"max_hours": float("nan")}, {"ip": 5}, {"state": "alive"}):
        with pytest.raises((ValueError, InputError)):
            ledger.change(entry().name, **fields)
    assert ledger.file.read_bytes() == before


def test_a_full_disk_is_told_and_the_ledger_stays_whole(tiny_disk: Path) -> None:
    ledger = Ledger(tiny_disk / "state")
    with pytest.raises(OutsideError, match=r"disk"):
        for n in range(1000):
            ledger.add(entry(f"fractal-0a1b2c-{n:08x}"))
    known = ledger.entries()
    assert len(known) > 5
    ledger.change(known[0].name, ip=None)


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/state"])
def test_a_folder_that_cannot_be_made_is_told(place: str) -> None:
    with pytest.raises(OutsideError, match="FRACTAL_STATE"):
        Ledger(Path(place)).add(entry())


def test_the_operator_is_made_once_and_outlives_the_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "state")
    operator = ledger.operator()
    ledger.file.write_bytes(b"broken")
    assert Ledger(tmp_path / "state").operator() == operator
    match = NAME.fullmatch(ledger.new_name())
    assert match is not None
    assert match[1] == operator


def test_an_unknown_name_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no instance"):
        Ledger(tmp_path).change("fractal-0a1b2c-ffffffff", ip=None)


def test_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FRACTAL_STATE", str(tmp_path))
    assert state_dir() == tmp_path
    monkeypatch.setenv("FRACTAL_STATE", "relative")
    assert state_dir().is_absolute()
    monkeypatch.delenv("FRACTAL_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_dir() == tmp_path / "fractal"


def test_a_process_is_known_by_more_than_its_number() -> None:
    here = Process.current()
    assert here.alive()
    assert not replace(here, started=here.started - 5).alive()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = process_start(child.pid)
    assert started is not None
    assert Process(child.pid, started).alive()
    child.kill()
    time.sleep(0.1)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not Process(child.pid, started).alive()  # dead, though nobody has waited for it
    child.wait()
    assert not Process(child.pid, started).alive()


def test_limits_and_cost_count_from_the_request() -> None:
    hour = 3600.0
    assert entry(max_hours=None).ends_at() is None
    assert entry().ends_at() == 1000 + 4 * hour
    assert entry(max_dollars=1.5).ends_at() == 1000 + 2 * hour
    assert entry(max_dollars=1.5, price_cents_per_hour=0).ends_at() == 1000 + 4 * hour
    launched = entry(state="launched", id="i")
    assert launched.dollars(1000 + 2 * hour) == pytest.approx(1.5)
    assert launched.dollars(0) == 0  # a clock set back
    assert replace(launched, state="ended", ended_at=1000 + hour).dollars(1e9) == pytest.approx(0.75)
    assert entry(state="ended", ended_at=1e9).dollars(1e9) == 0  # never launched
    assert entry().dollars(1000 + hour) == pytest.approx(0.75)  # it may be: not settled


def test_cost_adds_up_and_marks_what_is_alive() -> None:
    entries = [
        entry("fractal-0a1b2c-00000001", id="a", state="ended", ended_at=4600.0, end_reason="reap [x]"),
        entry("fractal-0a1b2c-00000002", id="b", state="launched", max_dollars=2.0),
        entry("fractal-0a1b2c-00000003", state="ended", ended_at=4600.0),
    ]
    lines = printed(cost_table(entries, 1000 + 7200.0)).splitlines()
    assert len(lines) == 4  # what was never launched is left out
    for text in (" 0.75 ", "reap [x]"):
        assert text in lines[1]
    for text in (" 1.50 ", "BILLED NOW"):
        assert text in lines[2]
    for text in ("total", "0.75 now", "2.25"):
        assert text in lines[3]


def test_a_bill_shows_phases_and_stages() -> None:
    launched = entry(id="b", state="ended", ended_at=1000 + 3600.0, timeline=(Event("boot", 1000.0, 360.0),))
    text = printed(bill(launched, [("verify", 36.0)]))
    assert [row in text for row in ("0.0750", "  verify", "0.0075", "0.7500")] == [True] * 4


def printed(table: object) -> str:
    out = Console(file=io.StringIO(), width=160)
    out.print(table)
    return out.file.getvalue()  # type: ignore[attr-defined,no-any-return]
