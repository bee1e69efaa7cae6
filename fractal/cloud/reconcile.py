"""Bring the ledger up to date with what the API says of each instance; terminate instances.

Nothing here launches. What is unknown stays open in the ledger: an entry ends only when the API says so.
"""

import contextlib
import time

from fractal.cloud.account import Account
from fractal.cloud.lambda_api import Client
from fractal.cloud.lambda_errors import INSTANCES_PAGE, AuthError, CloudError, NotFoundError
from fractal.cloud.lambda_types import Instance
from fractal.cloud.ledger import Entry, Process, limits_text
from fractal.errors import InputError, OutsideError

ENDED = ("terminated", "preempted")
NEVER_LAUNCHED = "never launched: no machine of this name came up"
ENDED_OUTSIDE = "ended from outside"
DISAPPEARED = "gone: ended from outside, and forgotten"
ENDED_WATCHDOG = "ended by its watchdog or from outside"
DISAPPEARED_WATCHDOG = "gone: ended by its watchdog or from outside, and forgotten"
# A reason that begins so is of a process that only saw the end: that of the process which requested it replaces it.
UNEXPLAINED = (ENDED_OUTSIDE, DISAPPEARED, ENDED_WATCHDOG, DISAPPEARED_WATCHDOG)


def refresh(account: Account) -> list[Instance]:
    """Update the ledger from one listing of the API; returns all instances of the account.

    An intent whose client is alive is left alone. An instance that was presumed ended and is alive is open again.
    """
    before = account.ledger.entries()  # read first: what is launched after this cannot be missing in the listing
    listed = account.client.instances()
    by_name = _by_name(listed)
    by_id = {instance.id: instance for instance in listed}
    overdue_s = account.timing.launch_request_s + account.timing.unknown_launch_s
    for entry in before:
        if entry.url != account.client.url:
            continue
        instance = by_id.get(entry.id or "") or by_name.get(entry.name)
        if not account.sees(entry):
            if instance is None or entry.state == "ended":
                continue
            entry = account.ledger.change(entry.name, account=account.client.account)  # same account, another key
        if entry.state == "intended":
            if instance is not None and not has_client(entry):
                record_found(account, entry, instance)
            elif instance is None and not has_client(entry) and time.time() - entry.asked_at > overdue_s:
                account.ledger.end(entry.name, NEVER_LAUNCHED, expected=entry)
        elif entry.state == "launched":
            record_status(account, entry, instance or get_instance(account.client, entry))  # a listing may lag
        elif instance is not None and instance.status not in (*ENDED, "terminating") and presumed_ended(entry):
            record_found(account, entry, instance)
    return listed


def get_instance(client: Client, entry: Entry) -> Instance | None:
    """The instance of a launched entry; None if the API does not know it."""
    assert entry.id is not None
    try:
        return client.instance(entry.id)
    except NotFoundError:
        return None


def record_status(account: Account, entry: Entry, instance: Instance | None) -> Entry:
    """Write to the ledger what the API says of a launched instance; None where it does not know it."""
    if instance is None:
        if time.time() < visible_from(account, entry):
            return entry
        reason = unexplained(entry, gone=True)
    elif instance.status == "preempted":
        reason = "preempted: Lambda took the machine back"
    elif instance.status == "terminated":
        reason = unexplained(entry)
    else:
        return account.ledger.change(
            entry.name,
            ip=instance.ip or entry.ip,
            region=instance.region.name,
            price_cents_per_hour=instance.instance_type.price_cents_per_hour,
        )
    if account.ledger.end(entry.name, reason):
        account.log(f"{describe(entry)} has ended: {reason}.")
    return account.ledger.find(entry.name) or entry


def record_found(account: Account, entry: Entry, instance: Instance) -> Entry:
    """Write to the ledger that the instance of an intent was found by its name."""
    before = entry
    entry = account.ledger.change(
        entry.name,
        expected=before,
        state="launched",
        id=instance.id,
        ip=instance.ip or None,
        type_name=instance.instance_type.name,
        region=instance.region.name,
        price_cents_per_hour=instance.instance_type.price_cents_per_hour,
        launched_at=time.time(),
        ended_at=None,
        end_reason=None,
    )
    if entry == before or entry.id != instance.id:  # another process was quicker
        return entry
    account.log(
        f"{entry.name}: found as {instance.id} ({entry.type_name} in {entry.region}, {entry.usd_per_hour:.2f} USD/h, "
        f"{instance.status}); its launch had no response here."
    )
    return record_status(account, entry, instance) if instance.status in ENDED else entry


def resolve_launch(account: Account, entry: Entry) -> Entry:
    """Find out whether a launch without a response happened; the entry is then launched or ended.

    Takes up to `unknown_launch_s`. No client may be launching it. The age of the intent decides nothing: this machine
    may have slept during the request.
    """
    begin, timeout_s = time.monotonic(), account.timing.unknown_launch_s
    account.log(f"{entry.name}: its launch had no response here. Looking for its name for {timeout_s:.0f} s.")
    while True:
        current = account.ledger.find(entry.name)
        if current is None or current.state != "intended":
            return current or entry
        last = time.monotonic() - begin >= timeout_s
        if instance := _by_name(account.client.instances()).get(entry.name):
            record_found(account, current, instance)
        elif not last:
            time.sleep(account.timing.poll_s)
        elif account.ledger.end(current.name, NEVER_LAUNCHED, expected=current):
            account.log(f"{current.name}: {NEVER_LAUNCHED}.")


def terminate(account: Account, entry: Entry, reason: str = "invoke terminate") -> None:
    """Terminate an instance and wait for the API's confirmation. Raises CloudError where it may still be billed."""
    entry = account.ledger.find(entry.name) or entry
    if entry.state == "ended":
        return
    if not account.sees(entry):
        refresh(account)  # another key of the same account will do
        entry = account.ledger.find(entry.name) or entry
        if not account.sees(entry):
            raise InputError(
                f"{entry.name} was launched with another key, or at {entry.url}: LAMBDA_API_KEY and FRACTAL_LAMBDA_URL "
                f"have to be those. It may be billed: set them, or terminate it at {INSTANCES_PAGE}."
            )
    if entry.state == "intended":
        if entry.owner not in (None, Process.current()) and has_client(entry):
            raise InputError(
                f"{entry.name} is being launched by process {entry.owner.pid}: wait for it, or end that process; then "
                "run `invoke terminate` again."
            )
        entry = resolve_launch(account, entry)
    if entry.state == "launched":
        assert entry.id is not None
        reason = reason_to_record(account, entry, reason)
        terminate_instance(account, entry.id, describe(entry), visible_from(account, entry))
        try:
            account.ledger.end(entry.name, reason, instead_of=UNEXPLAINED)
        except (InputError, OutsideError) as error:
            raise type(error)(f"{entry.name} is terminated and costs no more; but {error}") from error
        entry, now = account.ledger.find(entry.name) or entry, time.time()
        account.log(f"{entry.name} is terminated ({reason}): {entry.hours(now):.2f} h, {entry.dollars(now):.2f} USD.")


def terminate_instance(account: Account, id: str, what: str, visible_from: float) -> None:
    """Request the end of an instance until the API confirms it. Raises CloudError. `what` names it in messages.

    Before `visible_from` (unix seconds) a 404 may mean that it is not listed yet.
    """
    client, timing = account.client, account.timing
    begin = time.monotonic()
    visible_from = min(visible_from, time.time() + timing.hidden_s)  # clocks jump
    accepted_at: float | None = None
    logged, refused = "", False
    while True:
        try:
            if accepted_at is None or time.monotonic() - accepted_at >= timing.repeat_terminate_s:
                client.terminate(id)
                accepted_at = time.monotonic()
            status = client.instance(id).status
            if status in ENDED:
                return
            state = f"it is still '{status}'"
        except NotFoundError:
            if accepted_at is not None or time.time() >= visible_from:
                return
            state = "the API does not list it yet"
        except CloudError as error:
            state, refused = str(error).rstrip("."), isinstance(error, AuthError)
        if refused or time.monotonic() - begin > timing.terminate_timeout_s:
            raise CloudError(
                f"{what} is not confirmed as terminated after {time.monotonic() - begin:.0f} s, and may still be "
                f"billed: {state}. Run `invoke terminate` again, or terminate it at {INSTANCES_PAGE}."
            )
        if state != logged:
            account.log(f"{what}: waiting for its termination; {state}.")
            logged = state
        time.sleep(timing.poll_s)


def unexplained(entry: Entry, *, gone: bool = False) -> str:
    """Why an instance ended that no process here ended, as far as can be known; `gone`: the API does not know it.

    What its watchdog knew is lost with the instance, and the API does not say who ended it.
    """
    if entry.watchdog is None:
        return DISAPPEARED if gone else ENDED_OUTSIDE
    ends_at = entry.ends_at()
    due = ends_at is not None and time.time() >= ends_at
    limit = f"its limit ({limits_text(entry.max_hours, entry.max_dollars)}) was due" if due else "no limit was due"
    return f"{DISAPPEARED_WATCHDOG if gone else ENDED_WATCHDOG}; {limit}"


def reason_to_record(account: Account, entry: Entry, reason: str) -> str:
    """`reason`, to be asked before the request to terminate: not if the instance's watchdog was first."""
    if entry.watchdog is not None:
        with contextlib.suppress(CloudError):
            found = get_instance(account.client, entry)
            if found is not None and found.status in (*ENDED, "terminating"):
                return unexplained(entry)
    return reason


def describe(entry: Entry) -> str:
    return f"{entry.name} ({entry.type_name}, {entry.id})"


def end_text(entry: Entry) -> str:
    """When its guard terminates it, for a message."""
    until = entry.ends_at()
    return "no limit ends it" if until is None else time.strftime("ends at %Y-%m-%d %H:%M", time.localtime(until))


def visible_from(account: Account, entry: Entry) -> float:
    """From this time on (unix seconds) the API lists the instance if it exists."""
    return (entry.launched_at or entry.asked_at) + account.timing.hidden_s


def has_client(entry: Entry) -> bool:
    """Whether a living client works with it."""
    return entry.owner is not None and entry.owner.alive()


def presumed_ended(entry: Entry) -> bool:
    """Whether it was marked as ended because it was not found, not because its end was seen."""
    return (entry.end_reason or "").startswith((NEVER_LAUNCHED, DISAPPEARED, DISAPPEARED_WATCHDOG))


def _by_name(listed: list[Instance]) -> dict[str, Instance]:
    """By name; of several with one name, one that is alive."""
    return {
        instance.name or "": instance for instance in sorted(listed, key=lambda instance: instance.status not in ENDED)
    }
