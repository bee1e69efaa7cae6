"""What one may rent, and what the user would rent: checked against Lambda's list before money is spent."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fractal.cloud.lambda_api import Client, InstanceType
from fractal.errors import InputError


@dataclass(frozen=True, slots=True)
class Wish:
    """What to rent. `types` and `regions` stand in the user's order of preference."""

    types: tuple[str, ...]
    regions: tuple[str, ...] = ()  # empty: any
    max_price_usd: float | None = None  # per hour
    wait_s: float = 0.0  # for capacity
    max_hours: float | None = 4.0  # the guard ends it then, counted from the launch
    max_dollars: float | None = None
    image: str | None = None  # a family, or an id
    file_systems: tuple[str, ...] = ()


class Place(NamedTuple):
    """One thing to ask for."""

    type_name: str
    region: str
    price_cents_per_hour: int


def check(client: Client, wish: Wish) -> dict[str, InstanceType]:
    """What Lambda offers now, by name. Raises InputError with the list of what is valid if the wish is not.

    That there is no capacity now is no error.
    """
    _check_numbers(wish)
    offers = client.instance_types()
    table = "\n" + "\n".join(describe(offers.values()))
    if not wish.types:
        raise InputError(f"No instance type is named. Name one or more with --type:{table}")
    if unknown := [name for name in wish.types if name not in offers]:
        raise InputError(f"Lambda has no instance type {', '.join(unknown)}. Name one of these:{table}")
    if not affordable(wish, offers):
        cheapest = min(offers[name].price_cents_per_hour for name in wish.types)
        raise InputError(
            f"{', '.join(wish.types)}: nothing at {wish.max_price_usd:.2f} USD/h or less; the cheapest of it is "
            f"{cheapest / 100:.2f}. Raise --max-price, or name another type:{table}"
        )
    known = {region.name for offer in offers.values() for region in offer.regions}
    if not known.issuperset(wish.regions):  # those without capacity are found nowhere else
        known |= {image.region for image in client.images()}
    if unknown := [name for name in wish.regions if name not in known]:
        raise InputError(
            f"Lambda has no region {', '.join(unknown)}. Its regions are {', '.join(sorted(known))}; with capacity now:"
            + table
        )
    _check_image(client, wish)
    _check_file_systems(client, wish)
    return offers


def affordable(wish: Wish, offers: Mapping[str, InstanceType]) -> list[InstanceType]:
    """The wished types that are within the highest price, in the user's order."""
    found = [offers[name] for name in dict.fromkeys(wish.types) if name in offers]
    return [offer for offer in found if not too_dear(offer.price_cents_per_hour, wish.max_price_usd)]


def too_dear(price_cents_per_hour: int, max_price_usd: float | None) -> bool:
    return max_price_usd is not None and price_cents_per_hour > max_price_usd * 100 + 1e-6


def places(wish: Wish, offers: Mapping[str, InstanceType]) -> list[Place]:
    """Where the wish can be had now, best first: the order of types decides, then that of regions."""
    return [
        Place(offer.name, region, offer.price_cents_per_hour)
        for offer in affordable(wish, offers)
        for region in wish.regions or [region.name for region in offer.regions]
        if any(region == one.name for one in offer.regions)
    ]


def describe(offers: Iterable[InstanceType]) -> list[str]:
    """A plain table, the cheapest first: type, price, GPU, regions with capacity now."""
    rows = [("TYPE", "USD/H", "GPU", "CAPACITY NOW")]
    for offer in sorted(offers, key=lambda offer: (offer.price_cents_per_hour, offer.name)):
        regions = ", ".join(region.name for region in offer.regions) or "-"
        gpu = offer.gpu_description if offer.gpus == 1 else f"{offer.gpus} x {offer.gpu_description}"
        rows.append((offer.name, f"{offer.price_cents_per_hour / 100:.2f}", gpu, regions))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}" for a, b, c, d in rows]


def _check_numbers(wish: Wish) -> None:
    for option, value in (("max-hours", wish.max_hours), ("max-dollars", wish.max_dollars)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"--{option}={value:g}: expected a number above 0.")
    if wish.max_price_usd is not None and not (math.isfinite(wish.max_price_usd) and wish.max_price_usd >= 0):
        raise InputError(f"--max-price={wish.max_price_usd:g}: expected USD per hour, 0 or more.")
    if not (math.isfinite(wish.wait_s) and wish.wait_s >= 0):
        raise InputError(f"--wait-for-capacity={wish.wait_s:g}: expected seconds, 0 or more.")


def _check_image(client: Client, wish: Wish) -> None:
    if wish.image is None:
        return
    images = client.images()
    if all(wish.image not in (image.id, image.family) for image in images):
        families = ", ".join(sorted({image.family for image in images}))
        raise InputError(f"Lambda has no image {wish.image}. Its families are {families}.")


def _check_file_systems(client: Client, wish: Wish) -> None:
    """They bind to a region, which must then be named: the hunt must not end where they are not."""
    if not wish.file_systems:
        return
    known = {system.name: system.region for system in client.file_systems()}
    for name in wish.file_systems:
        if name not in known:
            raise InputError(
                f"Lambda has no file system {name}. There is {', '.join(sorted(known)) or 'none yet'}: make it at "
                "https://cloud.lambda.ai/file-systems, or leave it out."
            )
        if wish.regions != (known[name],):
            raise InputError(f"The file system {name} is in {known[name]}: give --region={known[name]}.")
