"""What a build inside Docker has to know of this machine's network: certificates, settings of pip and apt, wheels.

All of it reaches the build as secrets and bind mounts, which leave nothing in a layer. On an open network it is empty.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import docker
from packaging.specifiers import Specifier
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion

from fractal.errors import InputError
from fractal.images import debian
from fractal.images.docker_client import has_image
from fractal.images.image import Image
from fractal.images.rendering import Step
from fractal.sandbox.host.source import content_hash

# pip's setting -> uv's variable for it; https://docs.astral.sh/uv/reference/environment/
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "no-index": "UV_NO_INDEX",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",  # as PIP_DEFAULT_TIMEOUT is called
}
SECRET_LIMIT_KB = 500  # BuildKit's


@dataclass(frozen=True, slots=True)
class Network:
    """Secrets for the build by id (settings, ca, apt, sources), and a folder of wheels. Empty: an open network."""

    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    wheels: Path | None = None


def build_secrets(
    ca: bytes | None, pip: Mapping[str, str], apt: list[str], sources: list[str], wheels: Path | None
) -> Network:
    """The secrets of a build. Pure.

    `ca`: certificates, PEM; `pip`: its settings by name; `apt`: configuration lines; `sources`: Debian's, one a line.
    """
    shell = []
    secrets: dict[str, bytes] = {}
    if ca is not None:
        secrets["ca"] = ca
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
    bundle = ca or os.environ.get("FRACTAL_CA") or os.environ.get("SSL_CERT_FILE") or pip.get("cert")
    certificates = _certificates(Path(bundle)) if bundle else None
    folders = [Path(word) for word in pip.get("find-links", "").split()]  # or addresses
    if asked := wheels or os.environ.get("FRACTAL_WHEELS"):
        folders = [Path(asked)]
        if not folders[0].is_dir():
            raise InputError(f"{asked}: there is no such folder of wheels. See --wheels and FRACTAL_WHEELS.")
    folder = next((path for path in folders if path.is_dir()), None)
    lines = debian.mirror_arguments(os.environ) if sources else []
    entries = [line if line.startswith("deb ") else f"deb {line} {debian.SUITE} main" for line in lines]
    # Those settings of apt that mean the same inside a build.
    apt = debian.apt_settings(r"(https?::Proxy|https?::Verify|Retries)\b")
    return build_secrets(certificates, pip, apt, entries, folder)


def _certificates(bundle: Path) -> bytes:
    data = bundle.read_bytes() if bundle.is_file() else b""
    if not re.search(b"-----BEGIN (TRUSTED )?CERTIFICATE-----", data) or len(data) > SECRET_LIMIT_KB * 1000:
        raise InputError(
            f"{bundle}: no file of certificates in PEM's form, or over {SECRET_LIMIT_KB} kB, a builder's limit. "
            "Name your own CA alone; see --ca, FRACTAL_CA, SSL_CERT_FILE and pip's cert."
        )
    return data


def pip_settings() -> dict[str, str]:
    """What pip's configuration files and PIP_ variables say, by the option's name; the variables win."""
    argv = [sys.executable, "-m", "pip", "config", "list"]
    try:
        text = subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = re.findall(r"^(\S+?)\.([\w-]+)=(['\"].*)$", text, re.MULTILINE)
    settings = [(section, key, " ".join(str(ast.literal_eval(value)).split())) for section, key, value in lines]
    environment = {key: value for section, key, value in settings if section == ":env:"}
    return {key: value for section, key, value in settings if section in ("global", "install")} | environment


def import_wheels(client: docker.DockerClient, folder: Path, image: Image) -> str | None:
    """Make an image of those wheels in a folder that `image` asks for, which its build mounts.

    Returns its name, None if there are none.
    """
    wanted = [pin for step in image.steps if step.kind == "python" for pin in pins(step)]
    files = [file for file in sorted(folder.glob("*.whl")) if is_wanted(file.name, wanted)]
    if not files:
        return None
    sizes = {file.name: str(file.stat().st_size).encode() for file in files}
    name = f"fractal-wheels:{content_hash(sizes)[:12]}"
    if has_image(client, name):
        return name
    with tempfile.TemporaryDirectory(prefix="fractal-wheels-") as temporary:
        archive = Path(temporary, "wheels.tar")
        with tarfile.open(archive, "w") as tar:
            for file in files:
                member = tarfile.TarInfo(file.name)
                member.size = file.stat().st_size
                with file.open("rb") as content:
                    tar.addfile(member, content)
        repository, tag = name.split(":")
        client.api.import_image(src=str(archive), repository=repository, tag=tag)
    return name


def pins(step: Step) -> list[tuple[str, str]]:
    """Canonical names of the Python packages that a step installs, each with its version, as ==1.2."""
    requirements = "\n".join([*step.text, *(local.source.read_text() for local in step.locals)])
    found = re.findall(r"^([A-Za-z0-9][\w.\-]*)(?:\[[^]]*\])?\s*(===?[^\s;,\\]+)", requirements, re.MULTILINE)
    return [(canonicalize_name(name), version) for name, version in found]


def is_wanted(wheel: str, wanted: Iterable[tuple[str, str]]) -> bool:
    """Whether a wheel's file is of one of the packages, in its version."""
    try:
        name, version, _, _ = parse_wheel_filename(wheel)
    except (InvalidWheelFilename, InvalidVersion):
        return False
    return any(name == pinned and version in Specifier(specifier) for pinned, specifier in wanted)
