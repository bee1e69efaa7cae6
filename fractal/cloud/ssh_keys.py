"""The ssh keys of a new instance: the user's, whose public half Lambda knows, and the host key that is made for it."""

import os
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fractal.cloud.account import Account
from fractal.cloud.ledger import Ledger
from fractal.errors import InputError, OutsideError

NOT_KEYS = (".pub", ".cert", "-cert")
MEMORY = Path("/dev/shm")


class Key(NamedTuple):
    """A key pair."""

    name: str  # at Lambda
    file: Path  # the private half, on this machine


@dataclass(frozen=True, slots=True)
class HostKey:
    """An Ed25519 host key. Its private half is in this process's memory alone, and leaves with the launch request."""

    public: str  # type and key material, as in known_hosts
    private: str = field(repr=False)  # in OpenSSH's format, with the last line's end

    @property
    def user_data(self) -> str:
        """The cloud-config that gives the key, and no other, to the instance (cloud-init's module ssh)."""
        return (
            "#cloud-config\nssh_deletekeys: true\nssh_keys:\n  ed25519_private: |\n"
            f"{textwrap.indent(self.private, '    ')}  ed25519_public: {self.public}\n"
        )


def make_host_key() -> HostKey:
    """A new one. ssh-keygen writes to files only: they lie in memory where there is such a folder, for a moment."""
    try:
        with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
            file = Path(folder) / "key"
            if _keygen("-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(file)) is None:
                raise OutsideError(f"{folder}: ssh-keygen makes no key there. Check owner and disk.")
            return HostKey(_blob(Path(f"{file}.pub").read_text()), file.read_text())
    except OSError as error:
        raise OutsideError(f"No host key can be made: {error.strerror}. Check the temporary folder.") from error


def find_key(account: Account, *, register: bool = False, ask: Callable[[str], bool] | None = None) -> Key:
    """A key to launch with; FRACTAL_SSH_KEY comes first, then Fractal's own key, then those in ~/.ssh.

    If none is registered at Lambda, Fractal's own (or FRACTAL_SSH_KEY's) is registered, with `register` or if `ask`
    returns True. Raises InputError where that is refused.
    """
    ledger, registered = account.ledger, account.client.ssh_keys()
    by_blob = {_blob(key.public_key): key for key in registered}
    locked = []
    for file in _candidates(ledger.folder):
        public = _public(file)
        if public is None or (known := by_blob.get(_blob(public))) is None:
            continue
        if _usable(file, public):
            return Key(known.name, file)
        locked.append(f"{file} (registered as {known.name}) has a passphrase: unlock it with ssh-add {file}")
    given = os.environ.get("FRACTAL_SSH_KEY")
    which = f"FRACTAL_SSH_KEY ({given})" if given else "a new key, without passphrase, for fractal alone"
    problem = f"no ssh key here is among the {len(registered)} that Lambda knows" if not locked else "; ".join(locked)
    if not register and not (ask is not None and ask(f"{problem}. Register {which}?")):
        raise InputError(
            f"{problem[0].upper()}{problem[1:]}. Let fractal register {which}: invoke launch --register-key; or add "
            "yours at https://cloud.lambda.ai/ssh-keys, or name its private half in FRACTAL_SSH_KEY."
        )
    file = Path(given).expanduser().absolute() if given else _make(ledger)
    taken, base = {key.name for key in registered}, f"fractal-{ledger.operator()}"
    name = next(name for name in (base, *(f"{base}-{n}" for n in range(2, 1000))) if name not in taken)
    return Key(account.client.add_ssh_key(name, _blob(_public(file) or "")).name, file)


def _candidates(folder: Path) -> Iterator[Path]:
    if given := os.environ.get("FRACTAL_SSH_KEY"):
        file = Path(given).expanduser().absolute()
        if not file.is_file() or _public(file) is None:
            why = "no private ssh key, or one with a passphrase and no .pub file"
            raise InputError(f"FRACTAL_SSH_KEY: {file}: {why}. Name another, or unset it.")
        yield file
        return
    files = [folder / "ssh" / "id_ed25519", *sorted((Path.home() / ".ssh").glob("id_*"))]
    yield from (file for file in files if file.is_file() and not file.name.endswith(NOT_KEYS))


def _public(file: Path) -> str | None:
    """The public half, from the private one where it opens without a passphrase."""
    if (public := _keygen("-y", "-P", "", "-f", str(file))) is not None:
        return public
    file = Path(f"{file}.pub")
    text = file.read_text("utf-8", "replace") if file.is_file() else ""
    return text if len(text.split()) > 1 else None


def _usable(file: Path, public: str) -> bool:
    """Whether ssh can use it without asking for a passphrase."""
    if _keygen("-y", "-P", "", "-f", str(file)) is not None:
        return True
    try:
        agent = subprocess.run(["ssh-add", "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return False
    return _blob(public) in {_blob(line) for line in agent.stdout.splitlines()}


def _blob(public: str) -> str:
    """Type and key material, without the comment."""
    return " ".join(public.split()[:2])


def _keygen(*arguments: str) -> str | None:
    """The output of ssh-keygen; None if it fails."""
    command = ["ssh-keygen", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _make(ledger: Ledger) -> Path:
    """Fractal's own key, made if missing."""
    file = ledger.folder / "ssh" / "id_ed25519"
    comment = f"fractal-{ledger.operator()}"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutsideError(f"{file}: cannot be made: {error.strerror}. Check owner and disk.") from error
    if not file.exists() and _keygen("-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(file)) is None:
        raise OutsideError(f"{file}: ssh-keygen makes no key there. Check owner and disk.")
    return file
