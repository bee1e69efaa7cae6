"""The ssh alias of the instance: a configuration file of Fractal's, and on request one Include line in the user's.

The host key is pinned under the instance's id: another address of the same instance is accepted, another machine at the
same address is not.
"""

import contextlib
import os
import re
import stat
import tempfile
from pathlib import Path

from fractal.errors import InputError, OutsideError

ALIAS = "lambda"
USER = "ubuntu"


def config_file(folder: Path) -> Path:
    return folder / "ssh" / "config"


def known_hosts(folder: Path) -> Path:
    return folder / "ssh" / "known_hosts"


def write(
    folder: Path, *, ip: str, key_file: Path, instance_id: str, alias: str = ALIAS, port: int = 22, user: str = USER
) -> Path:
    """Let the alias refer to this address; returns the configuration file. Raises InputError, OutsideError."""
    path = config_file(folder)
    text = render(folder, ip=ip, key_file=key_file, instance_id=instance_id, alias=alias, port=port, user=user)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        if not path.exists() or path.read_bytes() != text.encode():
            replace(path, text.encode(), 0o600)
    except OSError as error:
        raise OutsideError(
            f"{path}: cannot be written: {error.strerror or error}. Correct that and try again."
        ) from error
    return path


def render(folder: Path, *, ip: str, key_file: Path, instance_id: str, alias: str, port: int, user: str) -> str:
    """The text of ssh_config(5)."""
    settings = {
        "HostName": ip,
        "Port": port,
        "User": user,
        "IdentityFile": quoted(key_file),
        "IdentitiesOnly": "yes",
        "HostKeyAlias": instance_id,
        "UserKnownHostsFile": quoted(known_hosts(folder)),
        "StrictHostKeyChecking": "yes",
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "4",
    }
    lines = [f"  {name} {value}" for name, value in settings.items()]
    return "\n".join(["# Written by fractal; changes are lost.", f"Host {alias}", *lines, ""])


def quoted(path: Path) -> str:
    """A path as one argument in ssh_config. Raises InputError for one that OpenSSH's versions do not all read alike."""
    text = str(path)
    if match := re.search(r'["\\%$*?\[\]\n\r]', text):
        raise InputError(
            f"{text!r}: ssh's configuration cannot hold a path with {match[0]!r}. Use another folder for Fractal's "
            "state (FRACTAL_STATE), or another name for the key."
        )
    return f'"{text}"'


def include(home: Path, folder: Path) -> bool:
    """Make the Include line the first of ~/.ssh/config, unless it is; whether the file was changed.

    It has to be first, since an Include below a Host line belongs to that host. Everything else stays as it is, byte
    for byte. Raises InputError, OutsideError.
    """
    line = f"Include {quoted(config_file(folder))}"
    by_hand = f"Put this line first by hand: {line}"
    path = Path(os.path.realpath(home / ".ssh" / "config"))  # what a link points to, not the link
    try:
        (home / ".ssh").mkdir(mode=0o700, parents=True, exist_ok=True)
        before, mode = b"", 0o600
        if path.exists():
            before, mode = path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
            if not mode & stat.S_IWUSR or not os.access(path, os.W_OK):
                raise OutsideError(f"{path} is read-only, and stays as it is. {by_hand}")
        lines = before.splitlines(keepends=True)
        if next((text.strip() for text in lines if text.strip() and not text.startswith(b"#")), b"") == line.encode():
            return False
        others = b"".join(text for text in lines if text.strip() != line.encode())  # one further down
        replace(path, line.encode() + b"\n" + others, mode)
    except OSError as error:
        raise OutsideError(f"{path}: cannot be changed: {error.strerror or error}. {by_hand}") from error
    return True


def user_has_host(home: Path, alias: str = ALIAS) -> bool:
    """Whether the user's own configuration has a Host line with that name; included files are not read."""
    try:
        text = (home / ".ssh" / "config").read_text(errors="replace")
    except OSError:
        return False
    return any(alias in line.split()[1:] for line in text.splitlines() if line.strip().lower().startswith("host "))


def replace(path: Path, data: bytes, mode: int) -> None:
    """Write a file by one rename, never with another mode, which ssh would refuse. Raises OSError."""
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
