"""The rented instance: which one is current, wait until it is active, and find those that nobody uses.

Every function updates the ledger from the API first. Knows no ssh and no Docker.
"""

import math
import time
from collections.abc import Callable

from fractal.cloud import guard, reconcile
from fractal.cloud.account import Account
from fractal.cloud.lambda_errors import AuthError, CloudError
from fractal.cloud.lambda_types import Instance
from fractal.cloud.ledger import NAME, Entry, Ledger
from fractal.errors import InputError, OutsideError

BOOT_TIMEOUT_S = 1200.0  # large types take ten minutes
LOG_INTERVAL_S = 60.0  # between two lines about the same wait


def update(account: Account) -> list[Instance]:
    """Update the ledger from one listing of the API, and start a guard for each living instance that has none.

    Returns all instances of the account.
    """
    listed = reconcile.refresh(account)
    terminating = {instance.id for instance in listed if instance.status == "terminating"}
    for entry in account.ledger.open_entries():
        guarded = entry.state == "intended" or entry.id in terminating or guard.alive(account.ledger, entry.name)
        if account.sees(entry) and not guarded:
            try:
                guard.start(account, entry.name)
                account.log(f"{entry.name}: its guard was gone; a new one watches it.")
            except CloudError as error:
                account.log(f"{entry.name} has no guard, nothing terminates it at its limits: {error}")
    return listed


def current(account: Account) -> Entry:
    """The living instance as the API shows it now; it may still boot. Raises CloudError with the remedy without one."""
    update(account)
    known = [entry for entry in account.ledger.entries() if account.sees(entry)]
    living = [entry for entry in known if entry.state == "launched"]
    if len(living) > 1:
        names = ", ".join(f"{entry.name} ({entry.type_name})" for entry in living)
        raise CloudError(f"{len(living)} instances are billed: {names}. End one: invoke terminate --name=NAME.")
    if living:
        return living[0]
    if any(entry.state == "intended" for entry in known):
        raise CloudError(
            "It is not known yet whether the last launch happened. Run `invoke launch`: it finds out, and continues."
        )
    last = f" The last one, {known[-1].name}, has ended: {known[-1].end_reason}." if known else ""
    raise CloudError(f"No instance is running.{last} Start one: invoke launch.")


def wait_active(account: Account, entry: Entry, *, timeout_s: float = BOOT_TIMEOUT_S) -> Entry:
    """Return when the API says that it is active and has an address. Raises CloudError with the remedy."""
    begin, begin_at, logged_at, logged = time.monotonic(), time.time(), -math.inf, ""
    unhealthy_since: float | None = None
    what = reconcile.describe(entry)
    remedy = "It is billed: end it with `invoke terminate`"
    while True:
        try:
            instance = reconcile.get_instance(account.client, entry)
            entry = reconcile.record_status(account, entry, instance)
            state = instance.status if instance else "not listed yet"
        except AuthError:
            raise
        except CloudError as error:  # the network may be back soon
            instance, state = None, str(error)
        if entry.state == "ended":
            raise CloudError(f"{what} has ended: {entry.end_reason}. Start another: invoke launch.")
        if instance is not None:
            check_price(account, entry)
        if instance is not None and instance.status == "active" and instance.ip:
            if not any(event.what == "boot" for event in entry.timeline):
                account.ledger.add_event(entry.name, "boot", begin_at, time.monotonic() - begin)
            return account.ledger.find(entry.name) or entry
        if state == "terminating":
            raise CloudError(f"{what} is being terminated, not by this client. Start another: invoke launch.")
        unhealthy_since = None if state != "unhealthy" else unhealthy_since or time.monotonic()
        if unhealthy_since is not None and time.monotonic() - unhealthy_since >= account.timing.unhealthy_s:
            raise CloudError(f"{what} is unhealthy: Lambda cannot reach it. {remedy}, and launch again.")
        if time.monotonic() - begin > timeout_s:
            raise CloudError(f"{what} is not ready after {timeout_s:.0f} s: {state.rstrip('.')}. {remedy}.")
        if state != logged or time.monotonic() - logged_at >= LOG_INTERVAL_S:
            account.log(f"{what}, {time.time() - entry.asked_at:.0f} s after the launch: {state}")
            logged, logged_at = state, time.monotonic()
        time.sleep(account.timing.poll_s)


def check_price(account: Account, entry: Entry) -> None:
    """Raises CloudError, with the instance terminated, if it costs more than allowed."""
    if not entry.too_expensive:
        return
    problem = (
        f"{entry.name} ({entry.type_name}) costs {entry.usd_per_hour:.2f} USD/h, more than the "
        f"{entry.max_price_usd:.2f} that --max-price allows"
    )
    account.log(f"{problem}: terminating it.")
    reconcile.terminate(account, entry, "more expensive than allowed")
    raise CloudError(f"{problem}, and is terminated. Raise --max-price, or name another type.")


def reap(
    account: Account, *, yes: bool = False, others: bool = False, ask: Callable[[str], bool] | None = None
) -> list[str]:
    """Terminate Fractal's instances that nobody uses: no living client works with them, and no guard watches them.

    `others` adds what other operators of the account launched with fractal. Asks first, unless `yes`. Returns the names
    of those terminated. Raises CloudError if some could not be terminated.
    """
    ledger = account.ledger
    for entry in ledger.open_entries():
        if entry.state == "intended" and account.sees(entry) and not in_use(ledger, entry):
            reconcile.resolve_launch(account, entry)
    listed = reconcile.refresh(account)
    operator = ledger.operator()
    entries = ledger.entries()  # read after the list: what was launched in between has its intent here
    terminated, failed = [], []
    for instance in listed:
        name = instance.name or ""
        match = NAME.fullmatch(name)
        known = next((e for e in entries if e.id == instance.id or (e.id is None and e.name == name)), None)
        if instance.status in (*reconcile.ENDED, "terminating") or (match is None and known is None):
            continue
        if known is not None and in_use(ledger, known):
            continue
        kind = instance.instance_type
        price = f"{kind.price_cents_per_hour / 100:.2f} USD/h"
        what = f"{name} ({kind.name} in {instance.region.name}, {price}, {instance.id})"
        if known is None and match is not None and match[1] != operator and not others:
            account.log(f"{what} is of another operator: left alone without --others.")
            continue
        if not yes and not (ask is not None and ask(f"Nobody uses {what}. Terminate it?")):
            account.log(f"{what} is kept, and is billed.")
            continue
        try:
            if known is not None and known.state != "ended":
                reconcile.terminate(account, known, "invoke reap")
            else:
                reconcile.terminate_instance(account, instance.id, what, 0.0)
                account.log(f"{what} is terminated.")
            terminated.append(name)
        except (InputError, OutsideError) as error:  # the others are terminated all the same
            failed.append(str(error))
    if failed:
        raise CloudError(" ".join(failed))
    return terminated


def in_use(ledger: Ledger, entry: Entry) -> bool:
    """Whether a living client works with it, or a guard watches it."""
    return reconcile.has_client(entry) or guard.alive(ledger, entry.name)
