"""What a registry holds, read over its HTTP API (OCI distribution); and a registry's program, where none can be pulled.

The program is Debian's docker-registry, packed with the libraries it needs: a root file system for `docker import`.
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

import docker.auth
import platformdirs
import requests

from fractal.errors import OutsideError
from fractal.install import apt
from fractal.jsonl import write_whole

HTTP_TIMEOUT_S = 30.0
IMAGES = ("application/vnd.docker.distribution.manifest.v2+json", "application/vnd.oci.image.manifest.v1+json")
INDEXES = ("application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.oci.image.index.v1+json")
PACKAGE = "docker-registry"
PROGRAM = "usr/bin/docker-registry"
CONFIG = """\
version: 0.1
storage: {filesystem: {rootdirectory: /var/lib/registry}}
http: {addr: ":5000"}
"""  # volume and port as in the public image registry:2
CHANGES = ('ENTRYPOINT ["/registry"]', 'CMD ["serve", "/config.yml"]')  # of `docker import`


class RegistryError(OutsideError):
    """A registry's answer cannot be used, or its program not be had: one line."""


class Blob(NamedTuple):
    digest: str
    size: int  # bytes as they travel


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image as the registry has it."""

    digest: str  # of what the reference names: the image's manifest, or the index that lists it
    config: str  # digest of the image's configuration: the image id
    layers: tuple[Blob, ...]  # bottom first, as the image's diff ids


def loopback(host: str) -> bool:
    """Whether host:port is this machine, where Docker engines speak plain HTTP."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def read_manifest(host: str, repository: str, reference: str, platform: str) -> Manifest:
    """The manifest, by HTTPS, else plain HTTP without credentials. Raises RegistryError, requests.RequestException."""
    with requests.Session() as session:
        session.trust_env = not loopback(host)  # a proxy has another loopback
        if loopback(host):
            return _read(session, f"http://{host}", repository, reference, platform, login(host))
        try:
            return _read(session, f"https://{host}", repository, reference, platform, login(host))
        except requests.ConnectionError:  # an SSLError is one
            return _read(session, f"http://{host}", repository, reference, platform, None)


def login(host: str) -> tuple[str, str] | None:
    """User and password of Docker's own configuration, helpers included; None also where there is only a token."""
    found = docker.auth.load_config().resolve_authconfig(host) or {}
    user = found.get("username") or found.get("Username")
    return (user, found.get("password") or found.get("Password") or "") if user else None


def _read(
    session: requests.Session,
    base: str,
    repository: str,
    reference: str,
    platform: str,
    known: tuple[str, str] | None,
) -> Manifest:
    digest, content = _manifest(session, f"{base}/v2/{repository}/manifests/{reference}", known)
    if content.get("mediaType") in INDEXES or "manifests" in content:
        wanted = platform.split("/")
        for entry in content["manifests"]:
            if [entry.get("platform", {}).get(key) for key in ("os", "architecture")] == wanted:
                _, content = _manifest(session, f"{base}/v2/{repository}/manifests/{entry['digest']}", known)
                break
        else:
            raise RegistryError(f"{repository}:{reference} is there, but not for {platform}.")
    try:
        layers = tuple(Blob(layer["digest"], layer["size"]) for layer in content["layers"])
        return Manifest(digest, content["config"]["digest"], layers)
    except (KeyError, TypeError) as error:
        raise RegistryError(f"{repository}:{reference}: not a manifest that we know: {str(content)[:100]}") from error


def _manifest(session: requests.Session, url: str, known: tuple[str, str] | None) -> tuple[str, dict[str, Any]]:
    """Digest and content. The digest is computed from what came, not taken from a header."""
    headers = {"Accept": ", ".join((*IMAGES, *INDEXES))}
    reply = session.get(url, headers=headers, timeout=HTTP_TIMEOUT_S)
    if reply.status_code == 401:
        challenge = reply.headers.get("WWW-Authenticate", "")
        if challenge.lower().startswith("bearer "):
            headers["Authorization"] = f"Bearer {_token(session, challenge, known)}"
            reply = session.get(url, headers=headers, timeout=HTTP_TIMEOUT_S)
        elif known:
            reply = session.get(url, headers=headers, auth=known, timeout=HTTP_TIMEOUT_S)
    reply.raise_for_status()
    return f"sha256:{hashlib.sha256(reply.content).hexdigest()}", reply.json()


def _token(session: requests.Session, challenge: str, known: tuple[str, str] | None) -> str:
    """A token from the place that the registry names, as docker login's users get one."""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = urlsplit(fields.get("realm", ""))
    if realm.scheme != "https" and not loopback(realm.netloc):
        raise RegistryError(f"the registry names {realm.geturl()[:100]} for tokens: credentials go by https only")
    query = {key: fields[key] for key in ("service", "scope") if key in fields}
    reply = session.get(realm.geturl(), params=query, auth=known, timeout=HTTP_TIMEOUT_S)
    reply.raise_for_status()
    content = reply.json()
    return str(content.get("token") or content.get("access_token") or "")


def unpack_program(folder: Path) -> Path:
    """Debian's docker-registry, fetched into a folder, not installed; its path. Raises RegistryError."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise RegistryError("a registry's program comes from a Debian package, and this is no Debian or Ubuntu")
    words = ["apt-get", "download", "-q", PACKAGE]
    failure = _run(words, folder)
    if failure and apt.allowed():  # a machine whose package lists were never fetched
        _run(["apt-get", "update", "-q"], folder)
        failure = _run(words, folder)
    found = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    failure = failure or (None if found else "no package came") or _run(["dpkg-deb", "-x", str(found[0]), "."], folder)
    if failure:
        raise RegistryError(f"Debian's package {PACKAGE} cannot be had: {failure}")
    return folder / PROGRAM


def _run(words: list[str], folder: Path) -> str | None:
    """None, or why it failed."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        return f"{words[0]}: no end after 300 s"
    return apt.reason(done.stdout + done.stderr) if done.returncode else None


def program_name(architecture: str) -> str:
    """The image's name on the far side; changes when what goes into it changes."""
    recipe = repr((PACKAGE, CONFIG, CHANGES, architecture))
    return f"fractal-registry:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def program_archive(architecture: str) -> Path:
    """The program's root file system as .tar.gz, made once on this machine. Raises RegistryError."""
    stem = program_name(architecture).replace(":", "-")
    archive = platformdirs.user_cache_path("fractal") / "images" / f"{stem}.tar.gz"
    if archive.exists():
        return archive
    with tempfile.TemporaryDirectory(prefix="fractal-registry-") as name:
        folder = Path(name)
        program = unpack_program(folder)
        own = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True).stdout.strip()
        if own != architecture:
            raise RegistryError(f"Debian's package {PACKAGE} here is for {own}, the far side is {architecture}")
        needed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, timeout=30).stdout
        files = [Path(path) for path in re.findall(r"(?:=>|^\s*)\s*(/\S+)", needed, re.M)]
        write_whole(archive, pack(program, files))
    return archive


def pack(program: Path, libraries: list[Path]) -> bytes:
    """A root file system with the program as /registry and its libraries where they were; the same bytes each time."""
    entries = [("registry", program.read_bytes(), 0o755), ("config.yml", CONFIG.encode(), 0o644)]
    entries += [(str(path).lstrip("/"), path.read_bytes(), 0o755) for path in sorted(libraries)]
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for path, data, mode in entries:
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(data), mode
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()
