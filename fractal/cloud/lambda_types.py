"""What Lambda's API answers, as values: decoded from its JSON, with the fields that Fractal uses.

Other fields are allowed and dropped: a listing that failed for a new field would keep us from
terminating what is billed.
"""

import ipaddress
from typing import Annotated

import msgspec
from msgspec.structs import force_setattr

InstanceId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,100}\Z")]
STATUSES = ("booting", "active", "unhealthy", "terminating", "terminated", "preempted")


class Region(msgspec.Struct, frozen=True):
    name: str
    description: str = ""


class Specs(msgspec.Struct, frozen=True):
    gpus: int


class InstanceType(msgspec.Struct, frozen=True):
    name: str
    price_cents_per_hour: Annotated[int, msgspec.Meta(ge=0)]
    gpu_description: str = ""
    specs: Specs | None = None  # missing in the description of an instance


class Offer(msgspec.Struct, frozen=True):
    """An instance type and the regions that have capacity for it now, which is no promise."""

    instance_type: InstanceType
    regions: tuple[Region, ...] = msgspec.field(name="regions_with_capacity_available")

    @property
    def price_cents_per_hour(self) -> int:
        return self.instance_type.price_cents_per_hour

    @property
    def gpus(self) -> int:
        return self.instance_type.specs.gpus if self.instance_type.specs else 0


class Instance(msgspec.Struct, frozen=True):
    id: str
    status: str  # one of STATUSES; an unknown status counts as booting: billed, and not usable yet
    region: Region
    instance_type: InstanceType
    name: str | None = ""  # "" if it has none
    ip: str | None = None  # may be set before the instance is active

    def __post_init__(self) -> None:
        # Anyone in the account may name an instance anything: keep control characters off the terminal.
        force_setattr(self, "name", printable(self.name or ""))
        if self.status not in STATUSES:
            force_setattr(self, "status", "booting")
        if not self.ip:
            force_setattr(self, "ip", None)
            return
        try:  # the address goes into a configuration file of ssh
            ipaddress.ip_address(self.ip if "%" not in self.ip else "")  # ip_address ignores what follows a %
        except ValueError:
            raise ValueError("Expected an address in `ip`") from None


class Launched(msgspec.Struct, frozen=True):
    """The response to a launch of one instance."""

    instance_ids: Annotated[tuple[InstanceId, ...], msgspec.Meta(min_length=1, max_length=1)]


class SshKey(msgspec.Struct, frozen=True):
    name: str
    public_key: str


class ImageInfo(msgspec.Struct, frozen=True):
    id: str
    family: str
    region: Region


class FileSystem(msgspec.Struct, frozen=True):
    name: str
    region: Region


def printable(text: str) -> str:
    """The text with a question mark for each control character."""
    return "".join(char if char.isprintable() else "?" for char in text)
