"""Requests keep the distance that Lambda demands, in all processes of a state folder, whatever files and clocks do."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fractal.cloud.lambda_api import Client, RateLimiter
from tests.conftest import ROOT
from tests.fake_lambda.server import FakeLambda

PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60T me@here"
WAITER = """
import sys, time
from pathlib import Path
from fractal.cloud.lambda_api import RateLimiter
limiter = RateLimiter(Path(sys.argv[1]), request_s=float(sys.argv[2]), launch_s=0)
for _ in range(int(sys.argv[3])):
    limiter.wait("request")
    print(time.time(), flush=True)
"""


def waiter(folder: Path, interval_s: float, times: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WAITER, str(folder), str(interval_s), str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_processes_share_the_limit(tmp_path: Path) -> None:
    with waiter(tmp_path, 0.15, 5) as first, waiter(tmp_path, 0.15, 5) as second:
        times = sorted(float(line) for process in (first, second) for line in process.communicate()[0].split())
    assert len(times) == 10
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.1


def test_threads_share_the_limit(tmp_path: Path) -> None:
    limiter = RateLimiter(tmp_path, request_s=0.05)
    begin = time.monotonic()
    threads = [threading.Thread(target=limiter.wait, args=("request",)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin > 0.24


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    with waiter(tmp_path, 30, 2) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        time.sleep(0.3)  # it waits for its second turn, with the lock
        holder.send_signal(signal.SIGKILL)
    os.utime(tmp_path / "last-request", (0, 0))
    begin = time.monotonic()
    RateLimiter(tmp_path, request_s=30).wait("request")
    assert time.monotonic() - begin < 1


def stamp_at(seconds: float) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / "last-request").touch()
        os.utime(folder / "last-request", (seconds, seconds))

    return harm


def folder_is_a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_bytes(b"")


HARMS: dict[str, Callable[[Path], object]] = {
    "future": stamp_at(4e9),
    "past": stamp_at(0),
    "nonsense": lambda folder: (folder / "last-request").write_bytes(b"\xff\x00 nonsense"),
    "stamp is a folder": lambda folder: (folder / "last-request" / "x").mkdir(parents=True),
    "lock is a folder": lambda folder: (folder / "last-request.lock").mkdir(),
    "folder is a file": folder_is_a_file,
}


def test_no_file_and_no_clock_makes_it_wait_longer_than_one_interval(tmp_path: Path) -> None:
    for name, harm in HARMS.items():
        folder = tmp_path / name
        folder.mkdir()
        harm(folder)
        limiter = RateLimiter(folder, request_s=0.3)
        begin = time.monotonic()
        limiter.wait("request")
        first = time.monotonic() - begin
        limiter.wait("request")
        assert first < 0.8, name
        assert 0.2 < time.monotonic() - begin - first < 0.8, name


def test_the_limits_of_the_cloud_are_kept(tmp_path: Path) -> None:
    with FakeLambda(request_interval_s=0.1, launch_interval_s=0.4) as cloud:
        cloud.add_ssh_key("mine", PUBLIC_KEY)
        client = Client("secret-key", cloud.url, RateLimiter(tmp_path, request_s=0.12, launch_s=0.45))
        for number in range(3):
            client.launch(region="us-east-1", type_name="gpu_1x_a10", ssh_key="mine", name=f"n{number}")
            client.instances()
        assert cloud.launches == 3
        assert len(cloud.requests) == 6  # none was refused and repeated
        hasty = Client("secret-key", cloud.url, RateLimiter(tmp_path, request_s=0, launch_s=0), patience_s=10)
        hasty.instances()
        assert len(cloud.requests) > 6  # without the limiter some are refused, and the client waits
