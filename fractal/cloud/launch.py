"""Launch one instance: reuse a living one that fits the request, else ask for each type and region in turn.

The intent is in the ledger, and the guard watches, before the request is sent. Whatever kills the client, the ledger
names what is billed, and the next command, or the guard, finds out whether the launch happened.
"""

import contextlib
import math
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fractal.cloud import guard, instance, reconcile
from fractal.cloud.account import Account
from fractal.cloud.lambda_api import Client
from fractal.cloud.lambda_errors import CapacityError, CloudError, LaunchUnknownError
from fractal.cloud.lambda_types import Offer
from fractal.cloud.ledger import Entry, FileSystemMount, Process, Watchdog
from fractal.cloud.ssh_keys import HostKey, Key, make_host_key
from fractal.errors import InputError, OutsideError

LOST_MAX = 2  # launches without a response before giving up


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What to rent. `types` and `regions` are in the user's order of preference."""

    types: tuple[str, ...]
    regions: tuple[str, ...] = ()  # empty: any
    max_price_usd: float | None = None  # per hour
    wait_s: float = 0.0  # for capacity
    max_hours: float | None = 4.0  # the guard terminates it then, counted from the launch request
    max_dollars: float | None = None
    image: str | None = None  # a family, or an id
    file_systems: tuple[str, ...] = ()
    watchdog: Watchdog | None = None  # on the instance, too, something ends it
    strict_host_key: bool = False  # refuse an instance that shows another host key than the one made for it

    @property
    def entry_fields(self) -> dict[str, Any]:
        """Those fields that a ledger entry has, too."""
        names = ("max_hours", "max_dollars", "max_price_usd", "strict_host_key")
        return {name: getattr(self, name) for name in names}


class Offered(NamedTuple):
    """What Lambda has for a request."""

    types: dict[str, Offer]  # all instance types, by name
    file_systems: tuple[FileSystemMount, ...]  # those of the request


class Candidate(NamedTuple):
    """A type and region that has capacity now. The fields are named as in a ledger entry."""

    type_name: str
    region: str
    price_cents_per_hour: int


def check_request(client: Client, request: LaunchRequest) -> Offered:
    """What Lambda has now. Raises InputError with the list of valid values if the request is not valid.

    A lack of capacity is no error here.
    """
    offers = client.instance_types()
    table = "\n" + "\n".join(describe(offers.values()))

    def check(what: str, names: Iterable[str], known: Collection[str]) -> None:
        if unknown := [name for name in names if name not in known]:
            valid = ", ".join(sorted(known)) or "none"
            raise InputError(f"Lambda has no {what} {', '.join(unknown)}. There is: {valid}. With capacity now:{table}")

    if not request.types:
        raise InputError(f"No instance type is named. Name one or more with --type:{table}")
    check("instance type", request.types, offers)
    if not affordable(request, offers):
        cheapest = min(offers[name].price_cents_per_hour for name in request.types)
        raise InputError(
            f"{', '.join(request.types)}: none costs {request.max_price_usd:.2f} USD/h or less; the cheapest costs "
            f"{cheapest / 100:.2f}. Raise --max-price, or name another type:{table}"
        )
    regions = {region.name for offer in offers.values() for region in offer.regions}
    images = [] if request.image is None and regions.issuperset(request.regions) else client.images()
    # Only the list of images names regions without capacity.
    check("region", request.regions, regions | {image.region.name for image in images})
    if request.image is not None and all(request.image != image.id for image in images):
        check("image", [request.image], {image.family for image in images})
    systems = {system.name: system for system in client.file_systems()} if request.file_systems else {}
    if request.file_systems:
        if unknown := [name for name in request.file_systems if name not in systems]:
            valid = ", ".join(f"{name} in {system.region.name}" for name, system in sorted(systems.items())) or "none"
            raise InputError(
                f"Lambda has no file system {', '.join(unknown)}. There is: {valid}. They are made on its website."
            )
        where = ",".join(sorted({systems[name].region.name for name in request.file_systems}))
        if ",".join(request.regions) != where:  # the launch must not end up in another
            raise InputError(
                f"{', '.join(request.file_systems)}: the file system is in {where}: give --region={where}."
            )
    return Offered(offers, tuple(FileSystemMount(name, systems[name].mount_point) for name in request.file_systems))


def affordable(request: LaunchRequest, offers: Mapping[str, Offer]) -> list[Offer]:
    """The requested types that cost no more than the highest price, in the user's order."""
    cents = math.inf if request.max_price_usd is None else request.max_price_usd * 100 + 1e-6
    named = [offers[name] for name in dict.fromkeys(request.types) if name in offers]
    return [offer for offer in named if offer.price_cents_per_hour <= cents]


def candidates(request: LaunchRequest, offers: Mapping[str, Offer]) -> list[Candidate]:
    """What fits the request and has capacity now, best first: the order of types decides, then that of regions."""
    return [
        Candidate(offer.instance_type.name, region, offer.price_cents_per_hour)
        for offer in affordable(request, offers)
        for region in request.regions or [region.name for region in offer.regions]
        if any(region == available.name for available in offer.regions)
    ]


def describe(offers: Iterable[Offer]) -> list[str]:
    """A plain table, the cheapest first: type, price, GPU, regions with capacity now."""
    rows = [("TYPE", "USD/H", "GPU", "CAPACITY NOW")]
    for offer in sorted(offers, key=lambda offer: (offer.price_cents_per_hour, offer.instance_type.name)):
        regions = ", ".join(region.name for region in offer.regions) or "-"
        price = f"{offer.price_cents_per_hour / 100:.2f}"
        rows.append((offer.instance_type.name, price, offer.instance_type.gpu_description, regions))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}" for a, b, c, d in rows]


def launch(account: Account, request: LaunchRequest, key: Key, *, terminate_after: bool = False) -> Entry:
    """An instance that is billed from now on: a living one that fits the request, or a new one, with a guard.

    Raises InputError where the request cannot be met or another process launches, CloudError where Lambda cannot.
    """
    offered = check_request(account.client, request)
    ledger = account.ledger
    with ledger.lock("launch", "launching an instance", timeout_s=0):
        for entry in ledger.open_entries():
            if entry.state == "intended" and account.sees(entry):  # its client is dead: this process holds the lock
                reconcile.resolve_launch(account, entry)
        instance.update(account)
        for entry in [entry for entry in ledger.open_entries() if account.sees(entry)]:
            found = reconcile.get_instance(account.client, entry)
            if found is not None and found.status == "terminating":
                reconcile.terminate(account, entry, "was being terminated")
            elif reconcile.record_status(account, entry, found).state == "launched":
                return _reuse(account, entry, request, terminate_after)
        return _launch_first_available(account, request, offered, key, terminate_after)


def _reuse(account: Account, entry: Entry, request: LaunchRequest, terminate_after: bool) -> Entry:
    """The living instance, under this request's limits. Raises InputError if it does not fit the request."""
    what = f"{entry.name} ({entry.type_name} in {entry.region}, {entry.usd_per_hour:.2f} USD/h)"
    limited, now, misfit = replace(entry, **request.entry_fields), time.time(), ""
    if entry.type_name not in request.types:
        misfit = f"you ask for {', '.join(request.types)}"
    elif request.regions and entry.region not in request.regions:
        misfit = f"you ask for {', '.join(request.regions)}"
    elif lacking := set(request.file_systems) - {system.name for system in entry.file_systems}:
        misfit = f"was launched without the file system {', '.join(sorted(lacking))}, which cannot be attached later"
    elif limited.too_expensive:
        misfit = f"costs more than the {request.max_price_usd:.2f} USD/h"
    elif (limited.ends_at() or math.inf) <= now:
        misfit = f"its {entry.hours(now):.2f} h ({entry.dollars(now):.2f} USD) are past the limits you give"
    if misfit:
        raise InputError(f"{what} is alive, and {misfit}. Ask for what it is, or end it first: invoke terminate.")
    owner = Process.current()
    entry = account.ledger.change(entry.name, **request.entry_fields, terminate_after=terminate_after, owner=owner)
    if request.watchdog is not None:
        entry = account.ledger.change(entry.name, watchdog=request.watchdog)
    if not guard.alive(account.ledger, entry.name):  # `update` could not start one, and logged why
        guard.start(account, entry.name)
    account.log(f"{what} is alive and used again, no other is launched; {reconcile.end_text(entry)}.")
    return entry


def _launch_first_available(
    account: Account, request: LaunchRequest, offered: Offered, key: Key, terminate_after: bool
) -> Entry:
    """Ask for each candidate in the user's order; then wait for capacity, as long as requested."""
    begin, logged_at, lost = time.monotonic(), -math.inf, 0
    offers = offered.types
    while True:
        entry: Entry | None = None
        for candidate in candidates(request, offers):
            if entry is None:
                host_key = make_host_key()
                entry = _add_intent(account, request, offered.file_systems, candidate, key, host_key, terminate_after)
            else:  # the request before was refused: the name is free, and its guard watches
                entry = account.ledger.change(entry.name, asked_at=time.time(), **candidate._asdict())
            entry = _request_launch(account, entry, request, host_key)
            if entry.state == "launched":
                with contextlib.suppress(CloudError):  # not listed yet, or no network: `wait_active` checks it again
                    entry = reconcile.record_status(account, entry, account.client.instance(str(entry.id)))
                instance.check_price(account, entry)
                return entry
            if entry.state == "ended":  # no response, and no instance
                lost, entry = lost + 1, None
                if lost >= LOST_MAX:
                    raise CloudError(
                        f"{lost} launches had no response, and no machine came of them. Run the command again in some "
                        "minutes; `invoke ps` looks for late ones."
                    )
        if entry is not None:
            account.ledger.drop(entry.name)
        waited_s = time.monotonic() - begin
        types = ", ".join(request.types)
        if waited_s >= request.wait_s:
            within = f" within {request.wait_s:.0f} s" if request.wait_s else ""
            raise CloudError(
                f"No capacity for {types} in {', '.join(request.regions) or 'any region'}{within}. "
                "Name other types or regions, or wait for it: --wait-for-capacity=HOURS."
            )
        if time.monotonic() - logged_at >= instance.LOG_INTERVAL_S:
            account.log(f"No capacity for {types} yet; waited {waited_s:.0f} s, {request.wait_s:.0f} at most.")
            logged_at = time.monotonic()
        time.sleep(min(account.timing.capacity_poll_s, request.wait_s - waited_s))
        offers = account.client.instance_types()


def _add_intent(
    account: Account,
    request: LaunchRequest,
    file_systems: tuple[FileSystemMount, ...],
    candidate: Candidate,
    key: Key,
    host_key: HostKey,
    terminate_after: bool,
) -> Entry:
    """Write the intent to the ledger and start its guard: no launch without one."""
    entry = Entry(
        name=account.ledger.new_name(),
        url=account.client.url,
        account=account.client.account,
        **candidate._asdict(),
        ssh_key=key.name,
        key_file=str(key.file),
        asked_at=time.time(),
        host_key=host_key.public,
        watchdog=request.watchdog,
        **request.entry_fields,
        file_systems=file_systems,
        owner=Process.current(),
        terminate_after=terminate_after,
    )
    account.ledger.add(entry)
    try:
        guard.start(account, entry.name)
    except BaseException as error:
        account.ledger.drop(entry.name)
        if isinstance(error, CloudError):
            raise CloudError(f"{error} Nothing was launched.") from error
        raise
    return entry


def _request_launch(account: Account, entry: Entry, request: LaunchRequest, host_key: HostKey) -> Entry:
    """Send one request.

    The entry is then launched; still intended where there was no capacity; or ended, without an instance. After an
    error that leaves it open, the guard finds out whether it happened.
    """
    begin = time.monotonic()
    account.log(f"Asking for {entry.type_name} in {entry.region} at {entry.usd_per_hour:.2f} USD/h as {entry.name}.")
    try:
        try:
            id = account.client.launch(
                region=entry.region,
                type_name=entry.type_name,
                ssh_key=entry.ssh_key,
                name=entry.name,
                image=request.image,
                file_systems=request.file_systems,
                user_data=host_key.user_data,
            )
        except CapacityError:
            account.log(f"No capacity for {entry.type_name} in {entry.region}.")
            return entry
        except LaunchUnknownError as error:
            account.log(str(error))
            return reconcile.resolve_launch(account, entry)
        except (CloudError, InputError):  # it certainly did not happen
            account.ledger.drop(entry.name)
            raise
        return _record_launch(account, entry, id, begin)
    except BaseException:
        with contextlib.suppress(InputError, OutsideError):
            account.ledger.change(entry.name, owner=None)
        raise


def _record_launch(account: Account, entry: Entry, id: str, begin: float) -> Entry:
    """Write the id to the ledger at once. If that fails, the instance is terminated: nothing could be done with it."""
    now = time.time()
    try:
        entry = account.ledger.change(
            entry.name, state="launched", id=id, launched_at=now, ended_at=None, end_reason=None
        )
        account.ledger.add_event(entry.name, "launch", entry.asked_at, time.monotonic() - begin)
    except (InputError, OutsideError) as error:
        what = f"{entry.name} ({entry.type_name}, {id})"
        account.log(f"{what} was launched, but {error} Terminating it.")
        reconcile.terminate_instance(account, id, what, now + account.timing.hidden_s)
        raise OutsideError(f"{error} {what} was launched and is terminated.") from error
    ends = reconcile.end_text(entry)
    account.log(f"{entry.name} is launched as {id}. It is billed from now on, until `invoke terminate`; {ends}.")
    return account.ledger.find(entry.name) or entry
