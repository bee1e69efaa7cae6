"""Rent one machine, and know at any time what is rented: launch, reconcile, current, wait, terminate, reap.

The intent is in the ledger, and the guard on watch, before the request goes out. Whatever kills the client, the ledger
names what is billed, and the next command, or the guard, finds out what became of it. Knows no ssh and no Docker.

    with lambda_api.from_env(state_dir()) as client:
        ledger = Ledger(state_dir())
        wish = Wish(types=("gpu_1x_a10",), max_hours=2.0)
        entry = launch(client, ledger, wish, find_key(client, ledger), print)
        entry = wait_active(client, ledger, entry, print)
        terminate(client, ledger, entry, print)
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from filelock import FileLock, Timeout

from fractal.cloud import guard, life
from fractal.cloud.guard import SETTINGS, Settings
from fractal.cloud.keys import Key as Key
from fractal.cloud.keys import find_key as find_key
from fractal.cloud.lambda_api import (
    AuthError,
    CapacityError,
    Client,
    CloudError,
    Instance,
    InstanceType,
    LaunchUnknown,
    NotFound,
)
from fractal.cloud.ledger import NAME, Entry, Ledger, Process
from fractal.cloud.life import WAITS, Say, Waits
from fractal.cloud.life import terminate as terminate
from fractal.cloud.offers import Wish as Wish
from fractal.cloud.offers import check as check
from fractal.cloud.offers import places, too_dear
from fractal.errors import InputError, OutsideError

LOST_MAX = 2  # launches without an answer before we give up
BOOT_TIMEOUT_S = 1200.0  # large types take ten minutes
TOLD_S = 60.0  # between two lines about the same waiting


def launch(
    client: Client,
    ledger: Ledger,
    wish: Wish,
    key: Key,
    say: Say,
    *,
    terminate_after: bool = False,
    settings: Settings = SETTINGS,
) -> Entry:
    """A machine that is billed from now on: a living one that fits the wish, or a new one, with a guard.

    Raises InputError where the wish cannot be met or another process launches, CloudError where Lambda cannot.
    """
    offers = check(client, wish)
    waits = settings.waits
    with _alone(ledger):
        for entry in ledger.open():
            if entry.state == "intended" and life.ours(client, entry):  # of a client that is no more: the lock is ours
                life.settle(client, ledger, entry, say, waits)
        reconcile(client, ledger, say, settings)
        for entry in [entry for entry in ledger.open() if life.ours(client, entry)]:
            found = life.ask(client, entry)
            if found is not None and found.status == "terminating":
                terminate(client, ledger, entry, say, "was being ended", waits)
            elif life.note(ledger, entry, found, say, waits).state == "launched":
                return _reuse(client, ledger, entry, wish, say, terminate_after, settings)
        return _hunt(client, ledger, wish, offers, key, say, terminate_after, settings)


def reconcile(client: Client, ledger: Ledger, say: Say, settings: Settings = SETTINGS) -> list[Instance]:
    """Bring the ledger up to date by one look at the API, and see that what lives has a guard.

    Returns all instances of the account.
    """
    listed = life.look(client, ledger, say, settings.waits)
    ending = {one.id for one in listed if one.status == "terminating"}
    for entry in ledger.open():
        guarded = entry.state == "intended" or entry.id in ending or guard.alive(ledger, entry.name)
        if life.ours(client, entry) and not guarded:
            try:
                guard.start(ledger, entry.name, settings)
                say(f"{entry.name}: its guard was gone; a new one is on watch.")
            except CloudError as error:
                say(f"{entry.name} has no guard, nothing ends it at its limits: {error}")
    return listed


def current(client: Client, ledger: Ledger, say: Say = lambda text: None, settings: Settings = SETTINGS) -> Entry:
    """The living instance as the API shows it now; it may still boot. Raises CloudError with what to do without one."""
    reconcile(client, ledger, say, settings)
    mine = [entry for entry in ledger.entries() if life.ours(client, entry)]
    living = [entry for entry in mine if entry.state == "launched"]
    if len(living) > 1:
        names = ", ".join(f"{entry.name} ({entry.type_name})" for entry in living)
        raise CloudError(f"{len(living)} instances are billed: {names}. End one: invoke terminate --name=NAME.")
    if living:
        return living[0]
    if any(entry.state == "intended" for entry in mine):
        raise CloudError("A launch is not settled yet. Run `invoke launch`: it finds out, and goes on.")
    last = f" The last one, {mine[-1].name}, has ended: {mine[-1].end_reason}." if mine else ""
    raise CloudError(f"No instance is running.{last} Start one: invoke launch.")


def wait_active(
    client: Client,
    ledger: Ledger,
    entry: Entry,
    say: Say,
    *,
    timeout_s: float = BOOT_TIMEOUT_S,
    waits: Waits = WAITS,
) -> Entry:
    """Return when the API says that it is active and has an address. Raises CloudError with the remedy."""
    begin, at, told_at, said = time.monotonic(), time.time(), -math.inf, ""
    unhealthy_since: float | None = None
    assert entry.id is not None
    what = f"{entry.name} ({entry.type_name}, {entry.id})"
    bill = "It is billed: end it with `invoke terminate`"
    while True:
        found, trouble = None, ""
        try:
            found = life.ask(client, entry)
        except AuthError:
            raise
        except CloudError as error:  # a network that is gone for a while
            trouble = str(error)
        if not trouble:
            entry = life.note(ledger, entry, found, say, waits)
        if entry.state == "ended":
            raise CloudError(f"{what} has ended: {entry.end_reason}. Start another: invoke launch.")
        state = found.status if found else trouble or "not shown yet"
        if found is not None:
            _check_price(client, ledger, entry, say, waits)
        if state == "active" and entry.ip is not None and found is not None and found.ip is not None:
            if not any(event.what == "boot" for event in entry.timeline):
                ledger.event(entry.name, "boot", at, time.monotonic() - begin)
            return ledger.find(entry.name) or entry
        if state == "terminating":
            raise CloudError(f"{what} is being ended, not by this client. Start another: invoke launch.")
        unhealthy_since = None if state != "unhealthy" else unhealthy_since or time.monotonic()
        if unhealthy_since is not None and time.monotonic() - unhealthy_since >= waits.unhealthy_s:
            raise CloudError(f"{what} is unhealthy: Lambda cannot reach it. {bill}, and launch again.")
        if time.monotonic() - begin > timeout_s:
            raise CloudError(f"{what} is not ready after {timeout_s:.0f} s: {state.rstrip('.')}. {bill}.")
        if state != said or time.monotonic() - told_at >= TOLD_S:
            say(f"{what}, {time.time() - entry.asked_at:.0f} s after the launch: {state}")
            said, told_at = state, time.monotonic()
        time.sleep(waits.look_s)


def reap(
    client: Client,
    ledger: Ledger,
    say: Say,
    *,
    yes: bool = False,
    others: bool = False,
    ask: Callable[[str], bool] | None = None,
    waits: Waits = WAITS,
) -> list[str]:
    """End what is ours and nobody owns: no living client works with it, and no guard watches over it.

    `others` adds what other operators of the account launched with fractal; machines without our prefix are never
    touched. Asks first, unless `yes`. Returns the names of what was ended. Raises CloudError if some would not end.
    """
    for entry in ledger.open():
        if entry.state == "intended" and life.ours(client, entry) and not owned(ledger, entry):
            life.settle(client, ledger, entry, say, waits)
    listed = life.look(client, ledger, say, waits)
    operator = ledger.operator()
    entries = ledger.entries()  # read after the list: what was launched in between has its intent here
    ended, failed = [], []
    for one in listed:
        match = NAME.fullmatch(one.name)
        known = next((e for e in entries if e.id == one.id or (e.id is None and e.name == one.name)), None)
        if one.status in (*life.ENDED, "terminating") or (match is None and known is None):
            continue
        if known is not None and owned(ledger, known):
            continue
        foreign = known is None and match is not None and match[1] != operator
        whose = "of another operator" if foreign else "ours" if known else "ours, but not in the ledger"
        what = f"{one.name} ({one.type_name} in {one.region}, {one.price_cents_per_hour / 100:.2f} USD/h, {one.id})"
        if foreign and not others:
            say(f"{what} is {whose}: left alone without --others.")
            continue
        if not yes and not (ask is not None and ask(f"{what} is {whose}, and nobody works with it. End it?")):
            say(f"{what} stays, and is billed.")
            continue
        try:
            if known is not None and known.state != "ended":
                terminate(client, ledger, known, say, "invoke reap", waits)
            else:
                life.end(client, one.id, what, say, 0.0, waits)
                say(f"{what} is ended.")
            ended.append(one.name)
        except (InputError, OutsideError) as error:  # the others shall end all the same
            failed.append(str(error))
    if failed:
        raise CloudError(" ".join(failed))
    return ended


def owned(ledger: Ledger, entry: Entry) -> bool:
    """Whether a living client works with it, or a guard watches over it."""
    return (entry.owner is not None and entry.owner.alive()) or guard.alive(ledger, entry.name)


# --- the hunt


@contextmanager
def _alone(ledger: Ledger) -> Iterator[None]:
    """One launch at a time for one ledger. Raises InputError that names who is at it."""
    file = ledger.folder / "launch.lock"
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    try:
        ledger.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire()
        file.write_text(f"{os.getpid()}\n")
    except Timeout:
        pid = file.read_text().strip() or "unknown"
        raise InputError(
            f"{ledger.folder}: process {pid} is launching an instance right now. Wait for it, or end it (kill {pid})."
        ) from None
    except (OSError, NotImplementedError) as error:
        lock.release()
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OutsideError(f"{file}: cannot be written: {why}. Check owner and disk.") from error
    try:
        yield
    finally:
        lock.release()


def _reuse(
    client: Client,
    ledger: Ledger,
    entry: Entry,
    wish: Wish,
    say: Say,
    terminate_after: bool,
    settings: Settings,
) -> Entry:
    """The living instance, under this wish's limits."""
    usd = entry.price_cents_per_hour / 100
    what = f"{entry.name} ({entry.type_name} in {entry.region}, {usd:.2f} USD/h)"
    remedy = "Ask for what it is, or end it first: invoke terminate."
    if entry.type_name not in wish.types:
        raise InputError(f"{what} is alive, and you ask for {', '.join(wish.types)}. {remedy}")
    if wish.regions and entry.region not in wish.regions:
        raise InputError(f"{what} is alive, and you ask for {', '.join(wish.regions)}. {remedy}")
    if too_dear(entry.price_cents_per_hour, wish.max_price_usd):
        raise InputError(f"{what} is alive, and dearer than the {wish.max_price_usd:.2f} USD/h you allow. {remedy}")
    limits = replace(
        entry, max_hours=wish.max_hours, max_dollars=wish.max_dollars, max_price_usd=wish.max_price_usd
    )  # fmt: skip
    now, until = time.time(), limits.ends_at()
    if until is not None and until <= now:
        raise InputError(
            f"{what} is alive, and its {entry.hours(now):.2f} h ({entry.dollars(now):.2f} USD) are past the limits you "
            "give. Give larger ones (--max-hours, --max-dollars), or end it: invoke terminate."
        )
    entry = ledger.change(
        entry.name,
        max_hours=wish.max_hours,
        max_dollars=wish.max_dollars,
        max_price_usd=wish.max_price_usd,
        terminate_after=terminate_after,
        owner=Process.here(),
    )
    if not guard.alive(ledger, entry.name):  # reconcile could not start one, and said why
        guard.start(ledger, entry.name, settings)
    say(f"{what} is alive since {entry.hours(now):.2f} h and used again, no other is launched; {_limits(entry)}.")
    return entry


def _hunt(
    client: Client,
    ledger: Ledger,
    wish: Wish,
    offers: dict[str, InstanceType],
    key: Key,
    say: Say,
    terminate_after: bool,
    settings: Settings,
) -> Entry:
    """Ask in the user's order until Lambda gives one; then wait for capacity, as long as is wished."""
    begin, told_at, lost = time.monotonic(), -math.inf, 0
    waits = settings.waits
    while True:
        entry: Entry | None = None
        for place in places(wish, offers):
            if entry is None:
                entry = Entry(
                    name=ledger.new_name(),
                    url=client.url,
                    account=client.account,
                    **place._asdict(),
                    ssh_key=key.name,
                    key_file=str(key.file),
                    asked_at=time.time(),
                    max_hours=wish.max_hours,
                    max_dollars=wish.max_dollars,
                    max_price_usd=wish.max_price_usd,
                    owner=Process.here(),
                    terminate_after=terminate_after,
                )
                ledger.add(entry)
                _guarded(ledger, entry, settings)
            else:  # the request before was refused: the name is free, and its guard on watch
                entry = ledger.change(entry.name, asked_at=time.time(), **place._asdict())
            entry = _ask(client, ledger, entry, wish, say, waits)
            if entry.state == "launched":
                return _seen(client, ledger, entry, say, waits)
            if entry.state == "ended":  # no answer, and no machine
                lost, entry = lost + 1, None
                if lost >= LOST_MAX:
                    raise CloudError(
                        f"{lost} launches had no answer, and no machine came of them. Run the command again in some "
                        "minutes; `invoke ps` looks for late ones."
                    )
        if entry is not None:
            ledger.drop(entry.name)
        waited = time.monotonic() - begin
        if waited >= wish.wait_s:
            raise CloudError(
                f"No capacity for {', '.join(wish.types)} in {', '.join(wish.regions) or 'any region'}"
                + (f" at {wish.max_price_usd:.2f} USD/h or less" if wish.max_price_usd is not None else "")
                + (f" within {wish.wait_s:.0f} s" if wish.wait_s else "")
                + ". Name other types or regions, or wait for it: --wait-for-capacity=HOURS."
            )
        if time.monotonic() - told_at >= TOLD_S:
            say(
                f"No capacity for {', '.join(wish.types)} yet; waiting since {waited:.0f} s, {wish.wait_s:.0f} at most."
            )
            told_at = time.monotonic()
        time.sleep(min(waits.capacity_s, wish.wait_s - waited))
        offers = client.instance_types()


def _guarded(ledger: Ledger, entry: Entry, settings: Settings) -> None:
    """No launch without a guard."""
    try:
        guard.start(ledger, entry.name, settings)
    except BaseException as error:
        ledger.drop(entry.name)
        if isinstance(error, CloudError):
            raise CloudError(f"{error} Nothing was launched.") from error
        raise


def _ask(client: Client, ledger: Ledger, entry: Entry, wish: Wish, say: Say, waits: Waits) -> Entry:
    """One request. The entry is then launched; still intended where there was no capacity; or ended, without a machine.

    On any error that leaves it open, the guard looks after it.
    """
    begin = time.monotonic()
    usd = entry.price_cents_per_hour / 100
    say(f"Asking for {entry.type_name} in {entry.region} at {usd:.2f} USD/h as {entry.name}.")
    try:
        try:
            id = client.launch(
                region=entry.region,
                type_name=entry.type_name,
                ssh_key=entry.ssh_key,
                name=entry.name,
                image=wish.image,
                file_systems=wish.file_systems,
            )
        except CapacityError:
            say(f"No capacity for {entry.type_name} in {entry.region}.")
            return entry
        except LaunchUnknown as error:
            say(str(error))
            return life.settle(client, ledger, entry, say, waits)
        except (CloudError, InputError):  # it certainly did not happen
            ledger.drop(entry.name)
            raise
        return _launched(client, ledger, entry, id, begin, say, waits)
    except BaseException:
        with contextlib.suppress(InputError, OutsideError):
            ledger.change(entry.name, owner=None)
        raise


def _launched(client: Client, ledger: Ledger, entry: Entry, id: str, begin: float, say: Say, waits: Waits) -> Entry:
    """Write it down at once. If that cannot be, it is ended: nothing could be done with it."""
    now = time.time()
    try:
        entry = ledger.change(entry.name, state="launched", id=id, launched_at=now, ended_at=None, end_reason=None)
        ledger.event(entry.name, "launch", entry.asked_at, time.monotonic() - begin)
    except (InputError, OutsideError) as error:
        what = f"{entry.name} ({entry.type_name}, {id})"
        say(f"{what} was launched, but {error} Ending it.")
        life.end(client, id, what, say, now + waits.grace_s, waits)
        raise OutsideError(f"{error} {what} was launched and is ended again.") from error
    say(f"{entry.name} is launched as {id}. It is billed from now on, until `invoke terminate`; {_limits(entry)}.")
    return ledger.find(entry.name) or entry


def _seen(client: Client, ledger: Ledger, entry: Entry, say: Say, waits: Waits) -> Entry:
    """What it really costs, as soon as the API shows it; `wait_active` looks again."""
    assert entry.id is not None
    for _ in range(3):
        try:
            entry = life.note(ledger, entry, client.instance(entry.id), say, waits)
        except NotFound:
            time.sleep(waits.look_s)
        except CloudError as error:
            say(f"{entry.name}: {error}")
            break
        else:
            _check_price(client, ledger, entry, say, waits)
            break
    return entry


def _check_price(client: Client, ledger: Ledger, entry: Entry, say: Say, waits: Waits) -> None:
    """Raises CloudError, with the instance ended, if it is dearer than allowed."""
    if not too_dear(entry.price_cents_per_hour, entry.max_price_usd):
        return
    what = f"{entry.name} ({entry.type_name}) costs {entry.price_cents_per_hour / 100:.2f} USD/h"
    say(f"{what}, more than the {entry.max_price_usd:.2f} you allow: ending it.")
    terminate(client, ledger, entry, say, "dearer than allowed", waits)
    raise CloudError(
        f"{what}, more than the {entry.max_price_usd:.2f} you allow, and is ended again. Raise --max-price, or name "
        "another type."
    )


def _limits(entry: Entry) -> str:
    """When the guard ends it, in words."""
    until = entry.ends_at()
    if until is None:
        return "no limit ends it"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(until))
    usd = (until - entry.asked_at) / 3600 * entry.price_cents_per_hour / 100
    return f"the guard ends it at {when}, {max(0.0, until - time.time()) / 3600:.2f} h from now, at {usd:.2f} USD"
