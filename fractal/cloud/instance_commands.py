"""The tasks about the rented instance itself: launch, wait, ps, ssh, cost, terminate and so on."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from fractal import console
from fractal.cloud import guard, instance, jobs, options, reconcile, ssh_config, watchdog
from fractal.cloud.account import Account
from fractal.cloud.cost import cost_table
from fractal.cloud.launch import LaunchRequest, check_request
from fractal.cloud.launch import launch as launch_instance
from fractal.cloud.ledger import Entry, Ledger
from fractal.cloud.options import PREFERRED_TYPES, Options
from fractal.cloud.session import Session, ask, log
from fractal.cloud.ssh_keys import find_key
from fractal.errors import InputError

LIST_PROCESSES = "ps -eo pid,etime,pcpu,pmem,args --sort=-pcpu | grep -E 'PID|[p]ython|[f]ractal' | cut -c1-160"


def launch(session: Session, task_options: Options, *, wait: bool = True) -> None:
    """Rent an instance, or find that one is rented; wait until it is ready, unless a later task does."""
    terminate_after = bool(task_options.get("terminate") or session.ends_instance())
    account = session.account()
    request = _with_types(account, options.launch_request(task_options))
    check_request(account.client, request)  # before the user is asked for a key
    key = find_key(account, register=task_options["register_key"], ask=ask if sys.stdin.isatty() else None)
    entry = launch_instance(account, request, key, terminate_after=terminate_after)
    if terminate_after:
        session.to_terminate.add(entry.name)
    if wait and not session.has_later("launch", "build", "push", "run", "exec"):
        session.start_watchdog(session.make_ready(account, instance.current(account)))
    elif not entry.ready_at:
        log("it boots while the next task runs")


def _with_types(account: Account, request: LaunchRequest) -> LaunchRequest:
    """Without a type named: that of the living instance, else the preferred types that Lambda offers."""
    if request.types:
        return request
    if living := [entry.type_name for entry in account.ledger.open_entries()]:
        return replace(request, types=tuple(living))
    offers = account.client.instance_types()
    return replace(request, types=tuple(name for name in PREFERRED_TYPES if name in offers))


def wait(session: Session) -> None:
    """Run the readiness checks, with their repairs."""
    account = session.account()
    entry = session.make_ready(account, instance.current(account), again=True)
    session.start_watchdog(entry)
    log(f"{entry.type_name} at {entry.ip}: ssh {ssh_config.ALIAS}; end it: invoke terminate")


def setup_ssh(session: Session) -> None:
    """Let the alias refer to the present address, and add the Include line to the user's configuration."""
    account = session.account()
    entry = instance.current(account)
    ssh_config.write(account.ledger.folder, entry)
    added = ssh_config.include(Path.home(), account.ledger.folder)
    log(f"`ssh {ssh_config.ALIAS}` connects to {entry.ip}" + ("; ~/.ssh/config has one line more" if added else ""))


def terminate(session: Session, name: str = "") -> None:
    """Terminate the instances of this ledger, or the one of that name, and show what they cost. Raises InputError."""
    account = session.account()
    instance.update(account)
    entries = [entry for entry in account.ledger.open_entries() if name in ("", entry.name)]
    if name and not entries:
        raise InputError(f"--name={name}: no living instance of that name is in the ledger. See: invoke ps")
    for entry in entries:
        reconcile.terminate(account, entry)
        session.show_bill(entry.name)
    if not entries:
        log("the ledger knows no living instance. To look for others of this account: invoke reap")


def reap(session: Session, *, yes: bool, others: bool) -> None:
    """Terminate instances of Fractal's that nobody uses."""
    instance.reap(session.account(), yes=yes, others=others, ask=ask if sys.stdin.isatty() else None)


def ps(session: Session) -> None:
    """Show the instances with their guards, jobs, and the processes on the ready one."""
    account = session.account()
    listed = {found.id: found.status for found in instance.update(account)}
    entries, now = account.ledger.open_entries(), time.time()
    for entry in entries:
        status = listed.get(entry.id or "", entry.state)
        console.say(
            f"{entry.name}: {entry.type_name} in {entry.region}, {status} at {entry.ip or 'no address yet'}; "
            f"{entry.hours(now):.2f} h, {entry.dollars(now):.2f} $ so far; {_guard_text(account.ledger, entry)}"
        )
    if not entries:
        log("no instance is rented. To rent one: invoke launch")
        return
    entry = instance.current(account)
    if not entry.ready_at:
        log("it is not ready yet: invoke wait")
        return
    with session.remote(entry) as (remote, _):
        if entry.watchdog is not None:
            console.say(f"{entry.name}: {watchdog.read_state(remote) or 'NO WATCHDOG runs there'}")
        listed_jobs = jobs.list_jobs(remote)
        for job in listed_jobs:
            state = job.state if not job.ended else f"ended with {job.exit_code}"
            if waits_for := job.waits_for(listed_jobs):
                state = f"number {len(waits_for)} in the queue, behind {', '.join(waits_for)}"
            console.say(f"job {job.id}: runs/{job.run}, {state}, since {job.started[:19]}Z: {job.command}")
        if not listed_jobs:
            console.say("no job is there")
        console.say(remote.check("list processes", LIST_PROCESSES).rstrip())


def _guard_text(ledger: Ledger, entry: Entry) -> str:
    watch = "a guard watches it" if guard.alive(ledger, entry.name) else "NO GUARD watches it (invoke terminate)"
    return f"{watch}, {reconcile.end_text(entry)}"


def gpu(session: Session) -> None:
    """Show nvidia-smi's output."""
    with session.remote() as (remote, _):
        console.say(remote.check("show its GPU", "nvidia-smi").rstrip())


def shell(session: Session, command: str) -> int:
    """Open a shell on the instance, or run one command; its exit code."""
    with session.remote() as (remote, _):
        return subprocess.call(remote.shell(command))


def sync(session: Session, folder: str) -> None:
    """Copy a folder to the instance."""
    with session.remote() as (remote, _):
        log(remote.sync(Path(folder)))


def cost(session: Session) -> None:
    """Show what every instance of this ledger cost, or costs; needs no key."""
    console.say(cost_table(session.ledger.entries(), time.time()))
