"""The instance as a remote host: its engine, a job's output without a lost or doubled line, results fetched."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fractal.cloud import jobs, run_commands, transfer
from fractal.cloud.remote_host import Remote, RemoteError, script
from fractal.errors import InputError, OutsideError
from fractal.images import ssh
from tests.conftest import ROOT, until
from tests.machine import Machine

pytestmark = [pytest.mark.docker, pytest.mark.cloud, pytest.mark.usefixtures("openssh")]
TINY = """\
set -e
sudo docker image inspect tiny > /dev/null 2>&1 && exit
files=$(for p in sh sleep seq cat; do command -v $p; ldd $(command -v $p) | grep -o '/[^ ]*'; done | sort -u)
tar -ch $files 2> /dev/null | sudo docker import -c 'ENV PATH=/usr/bin:/bin' - tiny > /dev/null
"""


@pytest.fixture(scope="module")
def machine(simulated_machine: Machine) -> Machine:
    """The shared machine, with a tiny image of its own files."""
    done = simulated_machine.ssh(TINY)
    assert done.returncode == 0, done.stderr
    return simulated_machine


def begin(remote: Remote, script: str, *options: str, run: str = "demo") -> str:
    """A job whose program is this script."""
    job = jobs.new_id("all")
    labels = [
        word
        for key, value in jobs.job_labels(job, run, ("--stage", "all")).items()
        for word in ("--label", f"{key}={value}")
    ]
    words = [
        "run",
        "-d",
        "--network=none",
        "--name",
        f"fractal-job-{job}",
        *labels,
        *options,
        "tiny",
        "sh",
        "-c",
        script,
    ]
    done = remote.run('docker "$@"', *words)
    assert done.returncode == 0, done.stderr
    return job


def cut(remote: Remote) -> None:
    """The connection breaks."""
    remote.link._process.kill()


def test_the_sdk_works_with_the_instances_engine(remote: Remote, machine: Machine) -> None:
    with remote.engine() as client:
        assert client.info()["Name"] == machine.sh("hostname").strip()
        done = client.containers.run("tiny", ["seq", "3"], remove=True, network_mode="none")
        assert done == b"1\n2\n3\n"
        assert client.images.get("tiny").id


@pytest.mark.long
def test_many_calls_at_once_are_no_trouble(remote: Remote) -> None:
    job = begin(remote, "sleep 60")
    with remote.engine() as client:
        container = client.containers.get(f"fractal-job-{job}")
        assert [container.exec_run(["seq", "1"]).exit_code for _ in range(30)] == [0] * 30
    jobs.remove(remote, job)


def test_an_engine_that_breaks_off_is_one_line(remote: Remote) -> None:
    with pytest.raises(OutsideError, match="lambda"), remote.engine() as client:
        cut(remote)
        client.containers.run("tiny", ["sleep", "5"], remove=True)


def test_no_line_is_lost_or_doubled_however_often_the_link_breaks(
    remote: Remote, logged: list[str], tmp_path: Path
) -> None:
    job = begin(
        remote, "i=0; while [ $i -lt 600 ]; do echo line $i; i=$((i+1)); sleep 0.01; done; echo end >&2; exit 7"
    )
    log, shown = tmp_path / "logs/job.log", bytearray()
    done = threading.Event()

    def breaker() -> None:
        while not done.wait(random.uniform(0.5, 1.5)):
            with contextlib.suppress(Exception):
                cut(remote)

    thread = threading.Thread(target=breaker)
    thread.start()
    try:
        ended = jobs.follow(remote, job, log, shown.extend)
    finally:
        done.set()
        thread.join()
    expected = "".join(f"line {i}\n" for i in range(600)) + "end\n"
    assert log.read_text() == expected
    assert shown.decode() == expected
    assert ended.exit_code == 7
    assert [text for text in logged if "connected again" in text]
    jobs.remove(remote, job)
    assert job not in [found.id for found in jobs.list_jobs(remote)]
    jobs.remove(remote, job)  # again: nothing to do


def test_progress_bars_come_through_as_a_terminal_would_get_them(remote: Remote, tmp_path: Path) -> None:
    job = begin(remote, r"printf 'a\033[1A\r50%%\r100%%\nend\n'", "-t")
    shown = bytearray()
    jobs.follow(remote, job, tmp_path / "log", shown.extend)
    assert bytes(shown) == b"a\x1b[1A\r50%\r100%\r\nend\r\n"
    jobs.remove(remote, job)


FOLLOWER = """
import sys
from pathlib import Path
from fractal.cloud import jobs
from fractal.cloud.remote_host import Remote
config, host, job, log = sys.argv[1:]
with Remote(Path(config), lambda: None, print, host=host) as remote:
    jobs.follow(remote, job, Path(log), lambda data: None)
"""


@pytest.mark.long
def test_a_killed_follower_is_followed_by_another(remote: Remote, machine: Machine, tmp_path: Path) -> None:
    job = begin(remote, "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); sleep 0.02; done")
    log = tmp_path / "logs/job.log"
    words = [sys.executable, "-c", FOLLOWER, str(machine.ssh_config), machine.alias, job, str(log)]
    for _ in range(3):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
        deadline, before = time.monotonic() + 20, log.stat().st_size if log.exists() else 0
        while time.monotonic() < deadline and (log.stat().st_size if log.exists() else 0) <= before:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    shown = bytearray()
    jobs.follow(remote, job, log, shown.extend)
    expected = "".join(f"line {i}\n" for i in range(300))
    assert (log.read_text(), shown.decode()) == (expected, expected)
    jobs.remove(remote, job)


@pytest.mark.long
def test_a_second_follower_sees_all_and_writes_nothing(remote: Remote, machine: Machine, tmp_path: Path) -> None:
    job = begin(remote, "for i in $(seq 20); do echo line $i; sleep 0.1; done")
    log, first, second = tmp_path / "log", bytearray(), bytearray()
    thread = threading.Thread(target=lambda: jobs.follow(remote, job, log, first.extend))
    thread.start()
    with Remote(machine.ssh_config, lambda: None, print, host=machine.alias) as other:
        time.sleep(0.5)
        jobs.follow(other, job, log, second.extend)
    thread.join()
    assert first == second == log.read_bytes() == "".join(f"line {i}\n" for i in range(1, 21)).encode()
    jobs.remove(remote, job)


def test_a_follower_of_a_quiet_job_leaves_nothing_there(remote: Remote, machine: Machine, tmp_path: Path) -> None:
    job = begin(remote, "echo once; exec sleep 600")
    seen: list[bytes] = []

    def stop(data: bytes) -> None:
        seen.append(data)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.follow(remote, job, jobs.log_file(tmp_path, job), stop)
    assert seen == [b"once\n"]  # at once, though it is short
    until(lambda: "docker logs" not in machine.sh("ps axww -o args | grep -v grep"))
    jobs.remove(remote, job)


def test_one_look_does_not_wait_for_the_end(remote: Remote, tmp_path: Path) -> None:
    job = begin(remote, "echo begun; sleep 60")
    time.sleep(0.5)
    state = jobs.follow(remote, job, tmp_path / "log", lambda _: None, once=True)
    assert (state.ended, (tmp_path / "log").read_text()) == (False, "begun\n")
    jobs.remove(remote, job)
    with pytest.raises(RemoteError, match="is not on lambda any more"):
        jobs.follow(remote, job, tmp_path / "log", lambda _: None)


def test_a_job_that_its_follower_removes_meanwhile_is_no_trouble(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, follow = begin(remote, "echo done"), jobs.follow
    until(lambda: jobs.find(remote, job).ended)

    def late(*words: Any, **more: Any) -> jobs.Job:
        jobs.remove(remote, job)
        return follow(*words, **more)

    monkeypatch.setattr(jobs, "follow", late)
    run_commands.collect_ended_jobs(remote, tmp_path)
    assert jobs.list_jobs(remote) == []


def test_a_container_that_goes_while_it_is_listed_is_no_trouble(remote: Remote) -> None:
    """What the engine prints for one that is gone is no state of a container."""
    job = begin(remote, "sleep 60")
    listing = script("list_jobs").replace("label=fractal.job)", "label=fractal.job; echo gone)")
    assert listing != script("list_jobs")
    assert job in [found.id for found in jobs.parse(remote.check("list", listing))]
    jobs.remove(remote, job)


def test_a_job_killed_from_outside_says_so(remote: Remote, tmp_path: Path) -> None:
    job = begin(remote, "echo begun; sleep 60")
    remote.check("kill", 'docker kill "fractal-job-$1"', job)
    ended = jobs.follow(remote, job, tmp_path / "log", lambda _: None)
    assert ended.exit_code == 137
    assert "died (killed)" in (jobs.diagnose(ended, "") or "")
    jobs.remove(remote, job)


def make_run(folder: Path, created: str = "now", lines: int = 3) -> Path:
    (folder / "critic/epoch-1").mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "manifest.json").write_text(f'{{"created": "{created}"}}')
    (folder / "samples.jsonl").write_text("{}\n" * lines)
    (folder / "critic/epoch-1/model.safetensors").write_bytes(random.Random(0).randbytes(300_000))
    return folder


def test_a_run_goes_there_and_comes_home_proven(remote: Remote, logged: list[str], tmp_path: Path) -> None:
    name = f"run{time.time_ns()}"
    folder = make_run(tmp_path / "here" / name)
    place = transfer.prepare(remote, name)
    assert re.fullmatch(r"\d+:\d+", place.user)
    assert place.home == "/home/ubuntu"
    transfer.exchange(remote, folder, logged.append)  # there is nothing there yet: ours goes
    assert transfer.digests(remote, name).keys() >= {"samples.jsonl", "critic/epoch-1/model.safetensors"}
    remote.check(
        "write", f"cd fractal/runs/{name} && echo '{{}}' >> samples.jsonl && mkdir logs; echo x > logs/verify.log"
    )
    transfer.exchange(remote, folder, logged.append)  # it is farther there: theirs comes
    assert (folder / "samples.jsonl").read_text() == "{}\n" * 4
    (folder / "critic/epoch-1/model.safetensors").write_bytes(bytes(300_000))  # as long, and as old
    os.utime(folder / "critic/epoch-1/model.safetensors", (1, 1))
    remote.check("age", f"touch -d @1 fractal/runs/{name}/critic/epoch-1/model.safetensors")
    assert "digests equal" in transfer.fetch_verified(remote, folder)
    assert (folder / "critic/epoch-1/model.safetensors").read_bytes() == random.Random(0).randbytes(300_000)
    (folder / "samples.jsonl").write_text("{}\n" * 9)
    transfer.exchange(remote, folder, logged.append)  # it went on here
    assert transfer.remote_state(remote, name).files["samples.jsonl"].size == 27
    assert name in transfer.run_names(remote)


def test_another_run_of_the_same_name_is_refused_and_both_stay(
    remote: Remote, logged: list[str], tmp_path: Path
) -> None:
    name = f"run{time.time_ns()}"
    transfer.prepare(remote, name)
    transfer.exchange(remote, make_run(tmp_path / "a" / name, "then"), logged.append)
    other = make_run(tmp_path / "b" / name, "now", lines=1)
    with pytest.raises(InputError, match="are two runs"):
        transfer.exchange(remote, other, logged.append)
    assert (other / "samples.jsonl").read_text() == "{}\n"
    assert transfer.remote_state(remote, name).files["samples.jsonl"].size == 9


def test_results_come_home_while_the_job_writes(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"run{time.time_ns()}"
    transfer.prepare(remote, name)
    folder = tmp_path / name
    monkeypatch.setattr(transfer, "FETCH_INTERVAL_S", 0.2)
    with transfer.periodic_fetch(remote, folder):
        for i in range(10):
            remote.check(
                "write",
                f"cd fractal/runs/{name}; echo {{}} >> samples.jsonl; mkdir -p critic/epoch-{i}; echo {i} > critic/epoch-{i}/head",
            )
        until((folder / "critic/epoch-9/head").exists, 20)
        cut(remote)
        remote.check("write", f"echo more >> fractal/runs/{name}/samples.jsonl")
    transfer.fetch_verified(remote, folder)
    assert (folder / "samples.jsonl").read_text() == "{}\n" * 10 + "more\n"


@pytest.mark.long
def test_a_cut_transfer_goes_on(remote: Remote, logged: list[str], tmp_path: Path) -> None:
    name = f"run{time.time_ns()}"
    transfer.prepare(remote, name)
    remote.check("write", f"head -c 80000000 /dev/urandom > fractal/runs/{name}/big")
    folder = tmp_path / name
    timer = threading.Timer(0.4, lambda: cut(remote))
    timer.start()
    assert "digests equal" in transfer.fetch_verified(remote, folder)
    timer.join()
    assert (folder / "big").stat().st_size == 80_000_000


def test_a_full_disk_here_is_one_line_and_whole_files_stay(remote: Remote, tiny_disk: Path) -> None:
    name = f"run{time.time_ns()}"
    transfer.prepare(remote, name)
    remote.check("write", f"cd fractal/runs/{name}; echo '{{}}' > samples.jsonl; head -c 300000 /dev/zero > big")
    with pytest.raises(RemoteError, match="is full"):
        transfer.fetch(remote, tiny_disk / name)
    assert not (tiny_disk / name / "big").exists()
    assert not list((tiny_disk / name).glob("*.jsonl")) or (tiny_disk / name / "samples.jsonl").read_text() == "{}\n"


def test_a_run_in_use_here_is_not_written(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    name = f"run{time.time_ns()}"
    transfer.prepare(remote, name)
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.setattr(transfer, "LOCK_TIMEOUT_S", 0.1)
    with FileLock(folder / ".lock"), pytest.raises(InputError, match="another process works"):
        transfer.fetch(remote, folder)


def test_a_projects_folder_goes_there_without_what_git_ignores(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "research/data").mkdir(parents=True)
    for name in ("plan.md", "data/kept.txt", "data/big.bin", "secret.env"):
        (tmp_path / "research" / name).write_text(name)
    (tmp_path / "research/.gitignore").write_text("*.bin\nsecret.env\n")
    monkeypatch.chdir(tmp_path)
    assert "3 files" in remote.sync(Path("research"))
    found = remote.check("list", "cd fractal/src/research && find . -type f | sort").split()
    assert found == ["./.gitignore", "./data/kept.txt", "./plan.md"]
    (tmp_path / "research/plan.md").unlink()
    remote.sync(Path("research"))
    assert "./plan.md" not in remote.check("list", "cd fractal/src/research && find . -type f")
    with pytest.raises(InputError, match="no such folder"):
        remote.sync(tmp_path / "none")


def test_an_input_is_sent_once(remote: Remote, logged: list[str], tmp_path: Path) -> None:
    (tmp_path / "my problems.jsonl").write_text("{}\n")
    place = transfer.send_input(remote, tmp_path / "my problems.jsonl", "fractal", logged.append)
    assert transfer.send_input(remote, tmp_path / "my problems.jsonl", "fractal", logged.append) == place
    assert len(logged) == 1
    assert remote.check("read", f"cat 'fractal/inputs/{place}'") == "{}\n"


def test_a_shell_is_the_users_own_ssh(machine: Machine, remote: Remote) -> None:
    words = remote.shell("echo $((1 + 1)); exit 5")
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (5, "2\n")


def test_a_machine_that_is_gone_ends_the_patience(machine: Machine, logged: list[str], tmp_path: Path) -> None:
    config = machine.config(f"gone{time.time_ns()}", HostName="127.0.0.1", Port=1)
    with (
        pytest.raises(ssh.SshConnectionError, match="nothing listens"),
        Remote(config, lambda: None, logged.append, host=machine.alias, patience_s=2),
    ):
        pass
    assert "Trying for" in logged[0]


def test_a_missing_rsync_here_is_an_error(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(RemoteError, match="no rsync here"):
        remote.rsync("a", "b")
