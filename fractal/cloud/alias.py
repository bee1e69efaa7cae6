"""The ssh alias of the rented machine: a config file of our own, and on demand one Include line in the user's.

The host key is pinned under the instance's id: another address of the same machine is fine, another machine at the same
address is not.
"""

import os
import re
from pathlib import Path

from fractal.records import OutsideError, write_whole

ALIAS = "lambda"
USER = "ubuntu"


def config_file(folder: Path) -> Path:
    return folder / "ssh" / "config"


def known_hosts(folder: Path) -> Path:
    return folder / "ssh" / "known_hosts"


def write(
    folder: Path, *, ip: str, key_file: Path, instance_id: str, alias: str = ALIAS, port: int = 22, user: str = USER
) -> Path:
    """Let the alias lead there; the config file. Raises OutsideError."""
    place = config_file(folder)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = render(folder, ip=ip, key_file=key_file, instance_id=instance_id, alias=alias, port=port, user=user)
    if not place.exists() or place.read_text() != text:
        write_whole(place, text.encode())
        place.chmod(0o600)
    return place


def render(folder: Path, *, ip: str, key_file: Path, instance_id: str, alias: str, port: int, user: str) -> str:
    """ssh_config(5). The shared connection is for a person's own ssh; our commands share one of their own."""
    settings = {
        "HostName": ip,
        "Port": port,
        "User": user,
        "IdentityFile": quoted(key_file),
        "IdentitiesOnly": "yes",
        "HostKeyAlias": instance_id,
        "UserKnownHostsFile": quoted(known_hosts(folder)),
        "StrictHostKeyChecking": "yes",
        "ControlMaster": "auto",
        "ControlPath": "/tmp/fractal-%C",  # a socket's name has 104 bytes at most
        "ControlPersist": "60",
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "4",
    }
    lines = [f"  {name} {value}" for name, value in settings.items()]
    return "\n".join(["# Written by fractal; changes are lost.", f"Host {alias}", *lines, ""])


def quoted(path: Path) -> str:
    """A path in ssh_config: quoted, and a % is no token."""
    return '"' + str(path).replace("%", "%%") + '"'


def include(home: Path, folder: Path) -> bool:
    """Put the one Include line first into ~/.ssh/config, unless it is there; whether it was added. Raises OutsideError.

    First, since an Include below a Host line belongs to that host. Everything else stays as it is, byte for byte.
    """
    place = Path(os.path.realpath(home / ".ssh" / "config"))
    line = f'Include "{config_file(folder)}"'
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = place.read_bytes() if place.exists() else b""
        if line.encode() in before.splitlines():
            return False
        mode = place.stat().st_mode & 0o777 if place.exists() else 0o600
        write_whole(place, line.encode() + b"\n" + before)
        place.chmod(mode)
    except (OSError, OutsideError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OutsideError(f"{place}: cannot be changed: {why}. Put this line first by hand: {line}") from error
    return True


def own_alias(home: Path, alias: str = ALIAS) -> bool:
    """Whether the user's config has a host of that name; ours comes first and wins."""
    place = home / ".ssh" / "config"
    try:
        text = place.read_text(errors="replace")
    except OSError:
        return False
    return bool(re.search(rf"(?im)^\s*Host\s+(?:.*\s)?{re.escape(alias)}(?:\s|$)", text))
