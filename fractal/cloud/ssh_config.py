"""The ssh alias of the instance: a configuration file of Fractal's, and on request one Include line in the user's.

The host key is pinned under the instance's id: another address of the same instance is accepted, another machine at the
same address is not.
"""

import re
import stat
from pathlib import Path

from fractal.cloud.ledger import Entry
from fractal.errors import InputError, OutsideError
from fractal.jsonl import write_whole

ALIAS = "lambda"
TEMPLATE = f"""\
# Written by fractal; changes are lost.
Host {ALIAS}
  HostName {{entry.ip}}
  User ubuntu
  IdentityFile {{key_file}}
  IdentitiesOnly yes
  HostKeyAlias {{entry.id}}
  UserKnownHostsFile {{known_hosts}}
  StrictHostKeyChecking yes
  ServerAliveInterval 15
  ServerAliveCountMax 4
"""


def config_file(folder: Path) -> Path:
    return folder / "ssh" / "config"


def known_hosts(folder: Path) -> Path:
    return folder / "ssh" / "known_hosts"


def write(folder: Path, entry: Entry) -> Path:
    """Let the alias refer to the instance's address; returns the file. Raises InputError, OutsideError."""
    if not entry.ip:
        raise InputError(f"{entry.name} has no address yet: it boots. Wait for it: invoke wait")
    path, key_file = config_file(folder), quoted(Path(entry.key_file))
    text = TEMPLATE.format(entry=entry, key_file=key_file, known_hosts=quoted(known_hosts(folder)))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        if not path.exists() or path.read_text() != text:
            write_whole(path, text.encode(), mode=0o600)
    except OSError as error:
        raise OutsideError(f"{path}: cannot be written: {error.strerror}. Correct that and try again.") from error
    return path


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
    path = home / ".ssh" / "config"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600
        if not mode & stat.S_IWUSR:
            raise OutsideError(f"{path} is read-only, and stays as it is. {by_hand}")
        lines = before.splitlines(keepends=True)
        if next((text.strip() for text in lines if text.strip() and not text.startswith(b"#")), b"") == line.encode():
            return False
        others = b"".join(text for text in lines if text.strip() != line.encode())  # one further down
        write_whole(path, line.encode() + b"\n" + others, mode=mode)
    except OSError as error:
        raise OutsideError(f"{path}: cannot be changed: {error.strerror}. {by_hand}") from error
    return True
