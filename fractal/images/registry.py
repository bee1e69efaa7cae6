"""Reads a manifest over a registry's HTTP API (OCI distribution), and packs a registry's program for hosts without one.

The program is Debian's docker-registry with the libraries that it needs: a root file system for `docker import`.
"""

import gzip
import hashlib
import io
import ipaddress
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import platformdirs
import requests

from fractal.errors import OutsideError
from fractal.install import apt
from fractal.jsonl import write_whole

HTTP_TIMEOUT_S = 30.0
MANIFEST_TYPES = ("application/vnd.docker.distribution.manifest.v2+json", "application/vnd.oci.image.manifest.v1+json")
INDEX_TYPES = ("application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.oci.image.index.v1+json")
PACKAGE = "docker-registry"
PROGRAM = "usr/bin/docker-registry"
CONFIG = """\
version: 0.1
storage: {filesystem: {rootdirectory: /var/lib/registry}}
http: {addr: ":5000"}
"""  # volume and port as in the public image registry:2
CHANGES = ('ENTRYPOINT ["/registry"]', 'CMD ["serve", "/config.yml"]')  # of `docker import`


class RegistryError(OutsideError):
    """A registry's reply cannot be used, or its program cannot be packed: one line."""


class Blob(NamedTuple):
    digest: str
    size: int  # bytes, compressed


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image's manifest."""

    digest: str  # of what the reference names: the manifest, or the index that lists it
    config: str  # digest of the image's configuration: the image id
    layers: tuple[Blob, ...]  # bottom first, in the order of the image's diff ids


def is_loopback(host: str) -> bool:
    """Whether HOST[:PORT] is this machine, where Docker engines speak plain HTTP."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def read_manifest(host: str, repository: str, reference: str, platform: str) -> Manifest:
    """The manifest for a platform such as linux/amd64, by HTTPS, else by plain HTTP; no credentials are sent.

    Raises RegistryError, requests.RequestException.
    """
    with requests.Session() as session:
        session.trust_env = not is_loopback(host)  # a proxy has another loopback
        if is_loopback(host):
            return _read(session, f"http://{host}/v2/{repository}/manifests", reference, platform)
        try:
            return _read(session, f"https://{host}/v2/{repository}/manifests", reference, platform)
        except requests.ConnectionError:  # an SSLError is one
            return _read(session, f"http://{host}/v2/{repository}/manifests", reference, platform)


def _read(session: requests.Session, url: str, reference: str, platform: str) -> Manifest:
    digest, content = _get(session, f"{url}/{reference}")
    if content.get("mediaType") in INDEX_TYPES or "manifests" in content:
        for listed in content["manifests"]:
            if [listed.get("platform", {}).get(key) for key in ("os", "architecture")] == platform.split("/"):
                _, content = _get(session, f"{url}/{listed['digest']}")
                break
        else:
            raise RegistryError(f"{url}/{reference} is there, but not for {platform}.")
    try:
        layers = tuple(Blob(layer["digest"], layer["size"]) for layer in content["layers"])
        return Manifest(digest, content["config"]["digest"], layers)
    except (KeyError, TypeError) as error:
        raise RegistryError(f"{url}/{reference}: not a manifest that we know: {str(content)[:100]}") from error


def _get(session: requests.Session, url: str) -> tuple[str, dict[str, Any]]:
    """Digest and content. The digest is computed from the reply's body, not taken from a header."""
    reply = session.get(url, headers={"Accept": ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))}, timeout=HTTP_TIMEOUT_S)
    reply.raise_for_status()
    return f"sha256:{hashlib.sha256(reply.content).hexdigest()}", reply.json()


def unpack_program(folder: Path) -> Path:
    """Download Debian's docker-registry into a folder without installing it; its path. Raises RegistryError."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise RegistryError("a registry's program comes from a Debian package, and this is no Debian or Ubuntu")
    download = ["apt-get", "download", "-q", PACKAGE]
    failure = _run(download, folder)
    if failure and apt.allowed():  # the package lists were perhaps never downloaded
        _run(["apt-get", "update", "-q"], folder)
        failure = _run(download, folder)
    packages = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    failure = failure or (None if packages else "no package came")
    failure = failure or _run(["dpkg-deb", "-x", str(packages[0]), "."], folder)
    if failure:
        raise RegistryError(f"Debian's package {PACKAGE} cannot be had: {failure}")
    return folder / PROGRAM


def _run(argv: list[str], folder: Path) -> str | None:
    """None, or why the command failed."""
    try:
        done = subprocess.run(
            argv,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        return f"{argv[0]}: no end after 300 s"
    return apt.reason(done.stdout + done.stderr) if done.returncode else None


def program_image(architecture: str) -> str:
    """The name of the program's image on a remote host; it changes with what the image is made of."""
    recipe = repr((PACKAGE, CONFIG, CHANGES, architecture))
    return f"fractal-registry:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def program_archive(architecture: str) -> Path:
    """The program's root file system as .tar.gz, made once on this machine. Raises RegistryError."""
    stem = program_image(architecture).replace(":", "-")
    archive = platformdirs.user_cache_path("fractal") / "images" / f"{stem}.tar.gz"
    if archive.exists():
        return archive
    with tempfile.TemporaryDirectory(prefix="fractal-registry-") as folder:
        program = unpack_program(Path(folder))
        own = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True).stdout.strip()
        if own != architecture:
            raise RegistryError(f"Debian's package {PACKAGE} here is for {own}, the host is {architecture}")
        needed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, timeout=30).stdout
        libraries = [Path(path) for path in re.findall(r"(?:=>|^\s*)\s*(/\S+)", needed, re.M)]
        write_whole(archive, pack(program, libraries))
    return archive


def pack(program: Path, libraries: list[Path]) -> bytes:
    """A root file system with the program as /registry and libraries at their own paths; the same bytes each time."""
    files = [("registry", program.read_bytes(), 0o755), ("config.yml", CONFIG.encode(), 0o644)]
    files += [(str(path).lstrip("/"), path.read_bytes(), 0o755) for path in sorted(libraries)]
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for path, data, mode in files:
            member = tarfile.TarInfo(path)
            member.size, member.mode = len(data), mode
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()
