"""A client that is killed at its n-th step: before or after each request, each file put in place, each process begun.

    python -m tests.killed_client    # reads jobs as JSON lines, forks a client for each, answers how it went

Forked from a warm process, so that a client costs milliseconds; it is a process of its own all the same.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from fractal.cloud.account import Account
from fractal.cloud.instance import reap, update
from fractal.cloud.lambda_api import Client, RateLimiter
from fractal.cloud.launch import LaunchRequest, launch
from fractal.cloud.ledger import Ledger
from fractal.cloud.reconcile import terminate
from fractal.cloud.ssh_keys import Key
from tests.renting import QUICK, TYPE


class Steps:
    """Counts what happens, and ends this process by SIGKILL at the chosen one."""

    def __init__(self, kill_at: int, report: int) -> None:
        self.count = 0
        self._kill_at = kill_at
        self._report = report

    def step(self, what: str) -> None:
        os.write(self._report, f"{what}\n".encode())
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def wrap(self, place: Any, name: str, tell: Callable[..., str]) -> None:
        real = getattr(place, name)

        def wrapped(*words: Any, **options: Any) -> Any:
            what = tell(*words)
            self.step(f"before {what}")
            done = real(*words, **options)
            self.step(f"after {what}")
            return done

        setattr(place, name, wrapped)


def work(job: dict[str, Any], report: int) -> None:
    steps = Steps(job["kill_at"], report)
    steps.wrap(requests.Session, "send", lambda session, request, **_: f"{request.method} {request.path_url}")
    steps.wrap(os, "replace", lambda source, target: f"replace {Path(target).name}")
    steps.wrap(subprocess.Popen, "__init__", lambda process, command, *_: f"start {command[2]}")
    limiter = RateLimiter(Path(job["folder"]), request_s=0, launch_s=0)
    client = Client("secret-key", job["url"], limiter, patience_s=2.0, backoff_s=0.02)
    account = Account(client, Ledger(Path(job["folder"])), lambda text: None, QUICK)
    if job["command"] == "launch":
        request = LaunchRequest(types=(TYPE,), max_hours=job.get("max_hours", 4.0))
        key = Key("mine", Path(job["key_file"]))
        launch(account, request, key, terminate_after=job.get("terminate_after", False))
    elif job["command"] == "terminate":
        for entry in account.ledger.open_entries():
            terminate(account, entry)
    elif job["command"] == "update":
        update(account)
    elif job["command"] == "reap":
        reap(account, yes=True)
    else:
        raise AssertionError(job["command"])


def main() -> None:
    for line in sys.stdin:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            work(json.loads(line), writer)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as report:
            steps = report.read().splitlines()
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "steps": steps}), flush=True)


if __name__ == "__main__":
    main()
