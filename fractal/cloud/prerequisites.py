"""What builds and jobs need of the instance beside Docker and a GPU: addresses to fetch from, the time, free disk.

One script asks for all of it. An address that is not reached is no error: networks may be closed. Too little disk is
one, before anything is sent or built.
"""

import math
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fractal.cloud.remote_host import RemoteError, script
from fractal.images.network import pip_settings

ADDRESS_TIMEOUT_S = 2.0  # all addresses are asked at once
PROBE_TIMEOUT_S = 30.0
CLOCK_TOLERANCE_S = 60.0
HUB = "https://huggingface.co"
DOCKER_HUB = "https://registry-1.docker.io/v2/"
# Bytes that images and their builds' caches take: 10.9 and 3.2 GB unpacked (docs/log.md), and as much again.
BUILD_BYTES = {"pipeline": 25e9, "pipeline-cpu": 8e9, "sandbox": 0.5e9}
UPDATE_BYTES = 1e9  # of an image whose packages are there: our code's layer, and what a build writes meanwhile
BYTES_PER_PARAMETER = 2.0  # bfloat16
PROGRAM = re.compile(r"^(curl: \(\d+\)|bash:( line \d+:)?) ")  # before its message


class Address(NamedTuple):
    """What the instance fetches from, and what to do without it."""

    what: str
    url: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Found:
    """The output of probe_prerequisites.sh."""

    clock: float = math.nan  # unix seconds
    free_bytes: float = math.nan  # for the engine's images and volumes
    repositories: frozenset[str] = frozenset()  # of the engine's images
    unreachable: Mapping[str, str] = field(default_factory=dict)  # address -> reason


def hub() -> str:
    """The address of the model hub that jobs use: this machine's HF_ENDPOINT, unless it holds credentials."""
    given = os.environ.get("HF_ENDPOINT", "")
    return given if given and "@" not in given else HUB


def addresses() -> list[Address]:
    """What a build and a job on the instance fetch from, by this machine's settings."""
    pip = pip_settings()
    index = pip.get("index-url", "").split(" ")[0] or "https://pypi.org/simple/"
    index = re.sub("//[^/]*@", "//", index)  # a password would be seen in the list of processes
    packages = Address("the package index", index, "build here and push, or name a mirror in pip's settings")
    return [
        Address("the model hub", hub(), "give --model a folder of this machine, or name a mirror in HF_ENDPOINT"),
        *([] if pip.get("no-index") else [packages]),
        Address("Docker's registry", DOCKER_HUB, "build here and push"),
    ]


def probe(run: Callable[..., subprocess.CompletedProcess[str]], urls: Iterable[str] = ()) -> Found:
    """Ask the instance, by a connection's `run`; takes ADDRESS_TIMEOUT_S and a round trip at most."""
    arguments = (f"{ADDRESS_TIMEOUT_S:.0f}", *urls)
    return parse(run(script("probe_prerequisites"), *arguments, timeout_s=PROBE_TIMEOUT_S).stdout)


def parse(text: str) -> Found:
    """Lines of other forms are ignored, as those of a login shell."""
    values: dict[str, float] = {}
    repositories, unreachable = set(), {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word in ("clock", "disk") and re.fullmatch("[0-9]{1,18}", rest):
            values[word] = float(rest)
        elif word == "image":
            repositories.add(rest)
        elif word == "address" and " " in rest:
            url, reason = rest.split(" ", 1)
            if reason != "ok":
                unreachable[url] = PROGRAM.sub("", reason).rstrip(". ")[:150]
    free = values.get("disk", math.nan) * 1024
    return Found(values.get("clock", math.nan), free, frozenset(repositories), unreachable)


def warnings(found: Found, asked: Iterable[Address], *, here: float, lambda_offset_s: float) -> list[str]:
    """What is not as it should be and stops nothing, a line each.

    `here`: this machine's clock when the instance told its own; `lambda_offset_s`: Lambda's clock minus this machine's.
    """
    lines = []
    if missing := [address for address in asked if address.url in found.unreachable]:
        listed = ", ".join(f"{one.what} ({one.url}: {found.unreachable[one.url]})" for one in missing)
        remedies = "; ".join(dict.fromkeys(one.remedy for one in missing))
        lines.append(f"the instance does not reach {listed}. Without it: {remedies}.")
    there_s = found.clock - here - lambda_offset_s
    if abs(there_s) > CLOCK_TOLERANCE_S:
        lines.append(
            f"the instance's clock is {_offset_text(there_s)} Lambda's: certificates are refused, times in results are "
            "wrong. Set it: invoke ssh --command='sudo timedatectl set-ntp true'"
        )
    if abs(lambda_offset_s) > CLOCK_TOLERANCE_S:
        lines.append(
            f"this machine's clock is {_offset_text(-lambda_offset_s)} Lambda's: limits are counted by it, and shift "
            "when it is set. Set it now."
        )
    return lines


def _offset_text(seconds: float) -> str:
    size = abs(seconds)
    unit, name = next((unit, name) for unit, name in ((86400, "days"), (3600, "h"), (60, "min")) if size >= unit)
    return f"{size / unit:.0f} {name} {'ahead of' if seconds > 0 else 'behind'}"


def needed_bytes(keys: Iterable[str], found: Found, sizes: Mapping[str, float], model: str = "") -> dict[str, float]:
    """What has to fit on the instance's disk: bytes by what they are for, with the figure's origin.

    `keys`: of the recipes; `sizes`: of images that are here, by key; `model`: a folder or a name, "" for none.
    """
    needed = {}
    for key in keys:
        if f"fractal-{key}" in found.repositories:
            needed[f"{key} (only what changed, an estimate)"] = UPDATE_BYTES
        elif key in sizes:
            needed[f"{key} (its size here)"] = sizes[key]
        else:
            needed[f"{key} (an estimate)"] = BUILD_BYTES[key]
    if size := _model_bytes(model):
        needed[f"{model} ({'its size here' if Path(model).is_dir() else 'by its name'})"] = size
    return needed


def _model_bytes(model: str) -> float:
    """Of the weights: those of a folder, else by the number of parameters in the name, as 1.5B; 0 if unknown."""
    if model and Path(model).is_dir():
        return float(sum(file.stat().st_size for file in Path(model).rglob("*") if file.is_file()))
    match = re.search(r"(?<![\w.])(\d{1,4}(?:\.\d+)?)([bm])(?![a-z0-9])", model, re.IGNORECASE)
    if match is None:
        return 0.0
    return float(match[1]) * (1e9 if match[2] in "bB" else 1e6) * BYTES_PER_PARAMETER


def check_disk(found: Found, needed: Mapping[str, float]) -> None:
    """Raises RemoteError with the amounts if the disk is too small; nothing if its free space is unknown."""
    total = sum(needed.values())
    if not found.free_bytes < total:
        return
    listed = ", ".join(f"{what} {size / 1e9:.1f} GB" for what, size in needed.items())
    raise RemoteError(
        f"The instance has {found.free_bytes / 1e9:.1f} GB of free disk, {total / 1e9:.1f} GB are needed: {listed}. "
        "Make room (invoke ssh --command='docker system prune --all --force'), or take a --type with more disk. It is "
        "billed: end it with `invoke terminate`."
    )
