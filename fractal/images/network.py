"""What a build inside Docker has to know of this machine's network: certificates, settings of pip and apt, wheels.

All of it reaches the build as secrets and bind mounts, which leave nothing in a layer. On an open network it is empty.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fractal.images import debian
from fractal.records import InputError

# pip's setting -> uv's variable for it; https://docs.astral.sh/uv/reference/environment/
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "no-index": "UV_NO_INDEX",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
DEFAULT_BUNDLE = Path(
    "/etc/ssl/certs/ca-certificates.crt"
)  # Debian's; a machine with its own CA names it in SSL_CERT_FILE


@dataclass(frozen=True, slots=True)
class Network:
    """Secrets for the build by id (settings, ca, apt, sources), and a folder of wheels. Empty: an open network."""

    secrets: Mapping[str, bytes] = field(default_factory=dict)
    wheels: Path | None = None


def describe(
    ca: Path | None, pip: Mapping[str, str], apt: list[str], sources: list[str], wheels: Path | None
) -> Network:
    """Put it together. `pip`: its settings by name; `apt`: configuration lines; `sources`: Debian's, one line each."""
    shell = []
    secrets: dict[str, bytes] = {}
    if ca is not None:
        secrets["ca"] = ca.read_bytes()
        names = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
        shell += [f"export {name}=/run/secrets/ca" for name in names]
        apt = [*apt, 'Acquire::https::CAInfo "/run/secrets/ca";']
    for name, uv in UV_NAMES.items():
        # A path of this machine means nothing in there; a folder of wheels is mounted instead.
        value = " ".join(word for word in pip.get(name, "").split() if not word.startswith(("file:", "/")))
        if value:
            shell += [f"export PIP_{name.upper().replace('-', '_')}={shlex.quote(value)} {uv}={shlex.quote(value)}"]
    if sources:
        secrets["sources"] = "\n".join(sources).encode() + b"\n"
        apt = [*apt, 'Dir::Etc::sourcelist "/run/secrets/sources";', 'Dir::Etc::sourceparts "-";']
    if apt:
        secrets["apt"] = "\n".join(apt).encode() + b"\n"
        shell.append("export APT_CONFIG=/run/secrets/apt")
    if shell:
        secrets["settings"] = "\n".join(shell).encode() + b"\n"
    return Network(secrets, wheels)


def of_this_machine(*, sources: bool, ca: Path | None = None, wheels: Path | None = None) -> Network:
    """The settings found here. `sources`: also where Debian's packages come from. Raises InputError for wrong options.

    `ca` and `wheels` come before what FRACTAL_CA and FRACTAL_WHEELS, SSL_CERT_FILE and pip's own settings say.
    """
    pip = pip_settings()
    named = [ca, *(Path(os.environ[name]) for name in ("FRACTAL_CA", "SSL_CERT_FILE") if os.environ.get(name))]
    bundle = next((path for path in named if path is not None), None)
    if bundle is not None and not bundle.is_file():
        raise InputError(f"{bundle}: there is no such file of certificates. See --ca, FRACTAL_CA and SSL_CERT_FILE.")
    folders = [
        wheels,
        *(Path(p) for p in [os.environ.get("FRACTAL_WHEELS", ""), *pip.get("find-links", "").split()] if p),
    ]
    folder = next((path for path in folders if path is not None), None)
    if folder is not None and not folder.is_dir():
        if folder in (wheels, Path(os.environ.get("FRACTAL_WHEELS", ""))):
            raise InputError(f"{folder}: there is no such folder of wheels. See --wheels and FRACTAL_WHEELS.")
        folder = None
    lines = debian.mirror_arguments(os.environ) if sources else []
    entries = [line if line.startswith("deb ") else f"deb {line} {debian.SUITE} main" for line in lines]
    return describe(bundle, pip, apt_settings(), entries, folder)


def pip_settings() -> dict[str, str]:
    """What pip's configuration files and PIP_ variables say, by the option's name; the variables win."""
    argv = [sys.executable, "-m", "pip", "config", "list"]
    try:
        text = subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = re.findall(r"^(\S+?)\.([\w-]+)='(.*)'$", text.replace("\\n", " "), re.MULTILINE)
    environment = {key.lstrip("."): value for section, key, value in found if section == ":env:"}
    return {key: value for section, key, value in found if section in ("global", "install")} | environment


def apt_settings() -> list[str]:
    """This machine's apt settings about proxies and retries."""
    if shutil.which("apt-config") is None:
        return []
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, timeout=30).stdout
    wanted = r'Acquire::(https?::Proxy|https?::Verify|Retries)\b.* "[^"]'
    return [line for line in dump.splitlines() if re.match(wanted, line)]
