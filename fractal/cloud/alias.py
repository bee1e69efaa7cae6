"""The ssh alias of the rented machine: a config file of our own, and on demand one Include line in the user's.

The host key is pinned under the instance's id: another address of the same machine is fine, another machine at the same
address is not.
"""

import contextlib
import fnmatch
import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path

from fractal.errors import InputError, OutsideError

ALIAS = "lambda"
USER = "ubuntu"
SHORT = Path("/tmp")  # where the user's folder for sockets is made if the state folder's name is too long
SOCKET_BYTES = (
    103 - 17
)  # a socket's name has 104 bytes on macOS, the zero included; ssh first appends a dot and 16 letters


def config_file(folder: Path) -> Path:
    return folder / "ssh" / "config"


def known_hosts(folder: Path) -> Path:
    return folder / "ssh" / "known_hosts"


def write(
    folder: Path, *, ip: str, key_file: Path, instance_id: str, alias: str = ALIAS, port: int = 22, user: str = USER
) -> Path:
    """Let the alias lead there; the config file. Raises InputError, OutsideError."""
    place = config_file(folder)
    text = render(folder, ip=ip, key_file=key_file, instance_id=instance_id, alias=alias, port=port, user=user)
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.parent.chmod(0o700)  # the socket's protection
        if not place.exists() or place.read_bytes() != text.encode():
            replace(place, text.encode(), 0o600)
    except OSError as error:
        raise OutsideError(
            f"{place}: cannot be written: {error.strerror or error}. Mend that and try again."
        ) from error
    return place


def render(folder: Path, *, ip: str, key_file: Path, instance_id: str, alias: str, port: int, user: str) -> str:
    """ssh_config(5). The shared connection is for a person's own ssh; our commands share one of their own."""
    socket = control_path(folder, f"{instance_id} {user}@{ip}:{port}")
    settings = {
        "HostName": ip,
        "Port": port,
        "User": user,
        "IdentityFile": quoted(key_file),
        "IdentitiesOnly": "yes",
        "HostKeyAlias": instance_id,
        "UserKnownHostsFile": quoted(known_hosts(folder)),
        "StrictHostKeyChecking": "yes",
        "ControlMaster": "auto" if socket else "no",
        "ControlPath": quoted(socket) if socket else "none",
        "ControlPersist": "60",
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "4",
    }
    lines = [f"  {name} {value}" for name, value in settings.items()]
    return "\n".join(["# Written by fractal; changes are lost.", f"Host {alias}", *lines, ""])


def control_path(folder: Path, machine: str) -> Path | None:
    """The shared connection's socket, whose name is short and new with each machine and address; None: do not share.

    In a folder that is ours alone: ssh hands its terminal to whoever listens there.
    """
    name = f"c-{hashlib.sha256(machine.encode()).hexdigest()[:8]}"
    if len(os.fsencode(folder / "ssh" / name)) <= SOCKET_BYTES:
        return folder / "ssh" / name
    place = SHORT / f"fractal-{os.getuid()}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
    except OSError:
        return None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return place / name if ours else None


def quoted(path: Path) -> str:
    """A path as one word of ssh_config. Raises InputError for one that OpenSSH's versions do not all read alike."""
    text = str(path)
    if found := re.search(r'["\\%$*?\[\]\n\r]', text):
        raise InputError(
            f"{text!r}: ssh's configuration cannot hold a path with {found[0]!r}. Use another folder for Fractal's "
            "state (FRACTAL_STATE), or another name for the key."
        )
    return f'"{text}"'


def include(home: Path, folder: Path) -> bool:
    """Put the one Include line first into ~/.ssh/config, unless it is there; whether it was put.

    First, since an Include below a Host line belongs to that host. Everything else stays as it is, byte for byte.
    Raises InputError, OutsideError.
    """
    line = f"Include {quoted(config_file(folder))}"
    by_hand = f"Put this line first by hand: {line}"
    place = Path(os.path.realpath(home / ".ssh" / "config"))  # what a link points to, not the link
    try:
        (home / ".ssh").mkdir(mode=0o700, parents=True, exist_ok=True)
        before, mode = b"", 0o600
        if place.exists():
            before, mode = place.read_bytes(), stat.S_IMODE(place.stat().st_mode)
            if not mode & stat.S_IWUSR or not os.access(place, os.W_OK):
                raise OutsideError(f"{place} is read-only, and stays as it is. {by_hand}")
        lines = before.splitlines(keepends=True)
        if next((one.strip() for one in lines if one.strip() and not one.startswith(b"#")), b"") == line.encode():
            return False
        others = b"".join(one for one in lines if one.strip() != line.encode())  # one that came to stand further down
        replace(place, line.encode() + b"\n" + others, mode)
    except OSError as error:
        raise OutsideError(f"{place}: cannot be changed: {error.strerror or error}. {by_hand}") from error
    return True


def own_alias(home: Path, alias: str = ALIAS) -> bool:
    """Whether the user's config has a host of that name, "*" aside. Ours comes first and wins.

    Files that it includes are not read.
    """
    try:
        text = (home / ".ssh" / "config").read_text(errors="replace")
    except OSError:
        return False
    for match in re.finditer(r"(?im)^[ \t]*Host(?:[ \t]*=[ \t]*|[ \t]+)(.*)$", text):
        patterns = match[1].split("#")[0].replace('"', " ").split()
        named = any(fnmatch.fnmatchcase(alias, one) for one in patterns if set(one) != {"*"})
        if named and f"!{alias}" not in patterns:
            return True
    return False


def replace(path: Path, data: bytes, mode: int) -> None:
    """Write a file by one rename; it never has another mode, which ssh would refuse. Raises OSError."""
    number, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(number, "wb") as out:
            os.fchmod(out.fileno(), mode)
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
