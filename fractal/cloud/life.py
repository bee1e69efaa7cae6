"""What became of each entry of the ledger: asked of the API, never guessed. Intents are settled, instances ended.

Nothing here launches. What cannot be told stays open in the ledger: an entry is only ended when the API says so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fractal.cloud.lambda_api import INSTANCES, AuthError, Client, CloudError, Instance, NotFound
from fractal.cloud.ledger import Entry, Ledger, Process
from fractal.errors import InputError, OutsideError

Say = Callable[[str], None]
ENDED = ("terminated", "preempted")
NEVER = "never launched: no machine of this name came up"
OUTSIDE = "ended from outside"
FORGOTTEN = "gone: ended from outside, and forgotten"
UNEXPLAINED = (OUTSIDE, FORGOTTEN)  # written by who only saw the end: yields to the reason of who asked for it


@dataclass(frozen=True, slots=True)
class Waits:
    """How patient we are with the API, in seconds."""

    look_s: float = 5.0  # between two looks
    settle_s: float = 90.0  # a launch without answer shows its machine within this, or did not happen
    send_s: float = 240.0  # from intent to request, at most: the guard's start, the client's pace and patience
    grace_s: float = 180.0  # a new instance may not be found
    resend_s: float = 60.0  # terminate is asked for again
    end_s: float = 900.0  # until an instance is terminated
    unhealthy_s: float = 60.0  # it may recover
    capacity_s: float = 20.0  # between two questions for capacity


WAITS = Waits()


def ours(client: Client, entry: Entry) -> bool:
    """Whether this client would see the entry's instance."""
    return (entry.url, entry.account) == (client.url, client.account)


def look(client: Client, ledger: Ledger, say: Say, waits: Waits = WAITS) -> list[Instance]:
    """Bring the ledger up to date with the API by one look; returns all instances of the account.

    An intent that a client works on is left alone. An instance that was given up as never launched or gone, and is
    alive after all, is taken back.
    """
    before = {entry.name: entry for entry in ledger.entries()}  # what is launched after this cannot be missing below
    listed = client.instances()
    by_name = _by_name(listed)
    by_id = {one.id: one for one in listed}
    for entry in before.values():
        if entry.url != client.url:
            continue
        found = by_id.get(entry.id or "") or by_name.get(entry.name)
        if not ours(client, entry):
            if found is None or entry.state == "ended":
                continue
            entry = ledger.change(entry.name, account=client.account)  # the same account, another key
        if entry.state == "intended":
            if found is not None and not _in_hand(entry):
                adopt(ledger, entry, found, say)
            elif found is None and not _in_hand(entry) and _overdue(entry, waits):
                ledger.end(entry.name, NEVER, expected=entry)
        elif entry.state == "launched":
            note(ledger, entry, found or ask(client, entry), say, waits)  # a list may lag
        elif found is not None and found.status not in (*ENDED, "terminating") and given_up(entry):
            adopt(ledger, entry, found, say)
    return listed


def ask(client: Client, entry: Entry) -> Instance | None:
    """The instance of a launched entry; None if the API does not show it."""
    assert entry.id is not None
    try:
        return client.instance(entry.id)
    except NotFound:
        return None


def note(ledger: Ledger, entry: Entry, found: Instance | None, say: Say, waits: Waits = WAITS) -> Entry:
    """Write down what the API says of a launched instance; `found` is None where it says that there is none."""
    if found is None:
        if time.time() < visible_from(entry, waits):
            return entry
        reason = FORGOTTEN
    elif found.status == "preempted":
        reason = "preempted: Lambda took the machine back"
    elif found.status == "terminated":
        reason = OUTSIDE
    else:
        now: dict[str, Any] = {
            "ip": found.ip or entry.ip,
            "region": found.region,
            "price_cents_per_hour": found.price_cents_per_hour,
        }
        return ledger.change(entry.name, **now) if any(getattr(entry, k) != v for k, v in now.items()) else entry
    if ledger.end(entry.name, reason):
        say(f"{entry.name} ({entry.type_name}, {entry.id}) has ended: {reason}.")
    return ledger.find(entry.name) or entry


def adopt(ledger: Ledger, entry: Entry, found: Instance, say: Say) -> Entry:
    """The machine of an intent was found by its name."""
    before = entry
    entry = ledger.change(
        entry.name,
        expected=before,
        state="launched",
        id=found.id,
        ip=found.ip,
        type_name=found.type_name,
        region=found.region,
        price_cents_per_hour=found.price_cents_per_hour,
        launched_at=time.time(),
        ended_at=None,
        end_reason=None,
    )
    if entry == before or entry.id != found.id:  # another was quicker
        return entry
    say(
        f"{entry.name}: found as {found.id} ({found.type_name} in {found.region}, "
        f"{found.price_cents_per_hour / 100:.2f} USD/h, {found.status}); its launch had no answer here."
    )
    return note(ledger, entry, found, say) if found.status in ENDED else entry


def settle(client: Client, ledger: Ledger, entry: Entry, say: Say, waits: Waits = WAITS) -> Entry:
    """Find out whether a launch without answer happened; takes up to `settle_s`. The entry is then launched or ended.

    No client may be launching it. How old the intent is says nothing: the machine may have slept within the request.
    """
    begin = time.monotonic()
    say(f"{entry.name}: its launch had no answer here. Looking for a machine of that name, for {waits.settle_s:.0f} s.")
    while True:
        now = ledger.find(entry.name)
        if now is None or now.state != "intended":
            return now or entry
        last = time.monotonic() - begin >= waits.settle_s
        if found := _by_name(client.instances()).get(entry.name):
            adopt(ledger, now, found, say)
        elif not last:
            time.sleep(waits.look_s)
        elif ledger.end(now.name, NEVER, expected=now):
            say(f"{now.name}: {NEVER}.")


def terminate(
    client: Client, ledger: Ledger, entry: Entry, say: Say, reason: str = "invoke terminate", waits: Waits = WAITS
) -> None:
    """End an instance, until the API confirms it. Raises CloudError, loudly, where it may still be billed."""
    entry = ledger.find(entry.name) or entry
    if entry.state == "ended":
        return
    if not ours(client, entry):
        look(client, ledger, say, waits)  # another key of the same account would do
        entry = ledger.find(entry.name) or entry
        if not ours(client, entry):
            raise InputError(
                f"{entry.name} was launched with another key, or at {entry.url}: LAMBDA_API_KEY and FRACTAL_LAMBDA_URL "
                f"must be those. It may be billed: set them, or end it at {INSTANCES}."
            )
    if entry.state == "intended":
        if entry.owner not in (None, Process.here()) and _in_hand(entry):
            raise InputError(
                f"{entry.name} is being launched by process {entry.owner.pid}: wait for it, or end that process; then "
                "run `invoke terminate` again."
            )
        entry = settle(client, ledger, entry, say, waits)
    if entry.state == "launched":
        assert entry.id is not None
        end(client, entry.id, f"{entry.name} ({entry.type_name}, {entry.id})", say, visible_from(entry, waits), waits)
        try:
            ledger.end(entry.name, reason, instead_of=UNEXPLAINED)
        except (InputError, OutsideError) as error:
            raise type(error)(f"{entry.name} is ended, it costs no more; but {error}") from error
        now = ledger.find(entry.name) or entry
        say(f"{entry.name} is ended ({reason}): {now.hours(time.time()):.2f} h, {now.dollars(time.time()):.2f} USD.")


def end(client: Client, id: str, what: str, say: Say, visible_from: float, waits: Waits = WAITS) -> None:
    """Ask for the end of an instance until the API says that it is over. Raises CloudError.

    Before `visible_from` (unix seconds) a 404 may only mean that it is not shown yet.
    """
    begin = time.monotonic()
    visible_from = min(visible_from, time.time() + waits.grace_s)  # clocks jump
    accepted: float | None = None
    said = ""
    while True:
        try:
            if accepted is None or time.monotonic() - accepted >= waits.resend_s:
                client.terminate([id])
                accepted = time.monotonic()
            if (status := client.instance(id).status) in ENDED:
                return
            trouble = f"it is still '{status}'"
        except NotFound:
            if accepted is not None or time.time() >= visible_from:
                return
            trouble = "the API does not show it yet"
        except AuthError as error:
            raise CloudError(f"{what} is not ended and still billed: {error} Or end it at {INSTANCES}.") from error
        except CloudError as error:
            trouble = str(error).rstrip(".")
        if time.monotonic() - begin > waits.end_s:
            raise CloudError(
                f"{what} is not known to be ended after {waits.end_s:.0f} s, and may still be billed: {trouble}. Run "
                f"`invoke terminate` again, or end it at {INSTANCES}."
            )
        if trouble != said:
            say(f"{what}: waiting for its end; {trouble}.")
            said = trouble
        time.sleep(waits.look_s)


def visible_from(entry: Entry, waits: Waits = WAITS) -> float:
    """From then on the API shows it, if it is there."""
    return (entry.launched_at or entry.asked_at) + waits.grace_s


def _by_name(listed: list[Instance]) -> dict[str, Instance]:
    """The living one, where a name stands twice."""
    return {one.name: one for one in sorted(listed, key=lambda one: one.status not in ENDED)}


def _in_hand(entry: Entry) -> bool:
    """A client works on it right now."""
    return entry.owner is not None and entry.owner.alive()


def _overdue(entry: Entry, waits: Waits) -> bool:
    return time.time() - entry.asked_at > waits.send_s + waits.settle_s


def given_up(entry: Entry) -> bool:
    """Ended because nothing was seen of it, not because its end was."""
    return entry.end_reason in (NEVER, FORGOTTEN)
