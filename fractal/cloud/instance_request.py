"""Which instance to rent: the user's request, checked against Lambda's list of types before money is spent."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fractal.cloud.lambda_api import Client
from fractal.cloud.lambda_types import Offer
from fractal.errors import InputError


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


class Candidate(NamedTuple):
    """A type and region that has capacity now. The fields are named as in a ledger entry."""

    type_name: str
    region: str
    price_cents_per_hour: int


def check_request(client: Client, request: LaunchRequest) -> dict[str, Offer]:
    """What Lambda offers now, by name. Raises InputError with the list of valid values if the request is not valid.

    A lack of capacity is no error here.
    """
    offers = client.instance_types()
    table = "\n" + "\n".join(describe(offers.values()))
    if not request.types:
        raise InputError(f"No instance type is named. Name one or more with --type:{table}")
    if unknown := [name for name in request.types if name not in offers]:
        raise InputError(f"Lambda has no instance type {', '.join(unknown)}. Name one of these:{table}")
    if not affordable(request, offers):
        cheapest = min(offers[name].price_cents_per_hour for name in request.types)
        raise InputError(
            f"{', '.join(request.types)}: none costs {request.max_price_usd:.2f} USD/h or less; the cheapest costs "
            f"{cheapest / 100:.2f}. Raise --max-price, or name another type:{table}"
        )
    regions = {region.name for offer in offers.values() for region in offer.regions}
    if not regions.issuperset(request.regions):  # only the list of images names regions without capacity
        regions |= {image.region.name for image in client.images()}
    if unknown := [name for name in request.regions if name not in regions]:
        raise InputError(
            f"Lambda has no region {', '.join(unknown)}. Its regions are {', '.join(sorted(regions))}; with capacity "
            f"now:{table}"
        )
    _check_image(client, request)
    _check_file_systems(client, request)
    return offers


def affordable(request: LaunchRequest, offers: Mapping[str, Offer]) -> list[Offer]:
    """The requested types that cost no more than the highest price, in the user's order."""
    named = [offers[name] for name in dict.fromkeys(request.types) if name in offers]
    return [offer for offer in named if not too_expensive(offer.price_cents_per_hour, request.max_price_usd)]


def too_expensive(price_cents_per_hour: int, max_price_usd: float | None) -> bool:
    return max_price_usd is not None and price_cents_per_hour > max_price_usd * 100 + 1e-6


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
        gpu = offer.instance_type.gpu_description
        if offer.gpus != 1:
            gpu = f"{offer.gpus} x {gpu}"
        rows.append((offer.instance_type.name, f"{offer.price_cents_per_hour / 100:.2f}", gpu, regions))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}" for a, b, c, d in rows]


def _check_image(client: Client, request: LaunchRequest) -> None:
    if request.image is None:
        return
    images = client.images()
    if all(request.image not in (image.id, image.family) for image in images):
        families = ", ".join(sorted({image.family for image in images}))
        raise InputError(f"Lambda has no image {request.image}. Its families are {families}.")


def _check_file_systems(client: Client, request: LaunchRequest) -> None:
    """A file system exists in one region, which has to be named: the launch must not end up in another."""
    if not request.file_systems:
        return
    regions = {system.name: system.region.name for system in client.file_systems()}
    for name in request.file_systems:
        if name not in regions:
            raise InputError(
                f"Lambda has no file system {name}. There is {', '.join(sorted(regions)) or 'none yet'}: make it at "
                "https://cloud.lambda.ai/file-systems, or leave it out."
            )
        if request.regions != (regions[name],):
            raise InputError(f"The file system {name} is in {regions[name]}: give --region={regions[name]}.")
