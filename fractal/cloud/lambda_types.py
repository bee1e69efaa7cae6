"""What Lambda's API answers, as values: decoded from its JSON, with the fields that Fractal uses.

Other fields are allowed and dropped: a listing that failed for a new field would keep us from
terminating what is billed.
"""

from typing import Annotated

import msgspec

InstanceId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,100}\Z")]
Address = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F.:]*\Z")]  # it goes into a configuration file of ssh
MountPoint = Annotated[str, msgspec.Meta(pattern=r"^/[A-Za-z0-9_./-]+\Z")]  # it goes into Docker's SOURCE:TARGET


class Region(msgspec.Struct, frozen=True):
    name: str


class InstanceType(msgspec.Struct, frozen=True):
    name: str
    price_cents_per_hour: Annotated[int, msgspec.Meta(ge=0)]
    gpu_description: str = ""


class Offer(msgspec.Struct, frozen=True):
    """An instance type and the regions that have capacity for it now, which is no promise."""

    instance_type: InstanceType
    regions: tuple[Region, ...] = msgspec.field(name="regions_with_capacity_available")

    @property
    def price_cents_per_hour(self) -> int:
        return self.instance_type.price_cents_per_hour


class Instance(msgspec.Struct, frozen=True):
    id: str
    status: str  # booting, active, unhealthy, terminating, terminated, preempted; another one: billed, and not usable
    region: Region
    instance_type: InstanceType
    name: str | None = None
    ip: Address | None = None  # may be set before the instance is active


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
    mount_point: MountPoint  # where an instance has it that was launched with its name
