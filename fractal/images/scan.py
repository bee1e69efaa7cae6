"""Looks through every layer of an image for what must not be in it: secrets, this machine's traces, weights, caches.

    python -m fractal.images.scan sandbox pipeline-cpu     # exit code 1 if something was found

A layer is read as the engine saves it, one piece at a time: what a later layer hides is found too. What is known to be
harmless is listed with its reason, not left out. A secret that was found is told by its place, never by its text.
"""

import fnmatch
import hashlib
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import certifi
import docker

from fractal import console
from fractal.images import build, network, recipes
from fractal.images.docker_client import connect
from fractal.images.recipes import ROOT
from fractal.images.saved_layers import PIECE, ScanError, saved_layers
from fractal.images.secret_patterns import PATTERNS, SECRET_NAME, Kind, Pattern, search

WEIGHTS_BYTES, BIN_BYTES = 100_000, 5_000_000  # below is no model: .pth is also a file of paths, .bin is anything


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that should not be in an image, or is known to be harmless."""

    kind: Kind
    layer: int | None  # 0 is the base; None: the configuration or the history
    path: str
    what: str
    known: str = ""  # why it is harmless; "" if it is not


PRIVATE_NAMES = re.compile(
    r"\.netrc|_netrc|\.env(\..+)?|pip\.conf|uv\.toml|\.pypirc|\.npmrc|\.git-credentials|\.dockercfg|\.htpasswd"
    r"|credentials(\.(json|ini|toml|ya?ml|xml|csv|txt))?|id_(rsa|dsa|ecdsa|ed25519)|.+\.(key|p12|pfx|jks|kdbx|ovpn)|\.vault-token"
)
PRIVATE_FOLDERS = re.compile(r"(^|/)(\.ssh|\.aws|\.docker|\.kube|\.gnupg|\.git)/|^run/secrets/")
WEIGHTS = re.compile(r".+\.(safetensors|gguf|ggml|pt|pth|ckpt|onnx|h5)")
CACHES = re.compile(
    r"^(root|home/[^/]+|cache)/\.?cache/|(^|/)\.cache/|^var/lib/apt/lists/[^/]+$|^var/cache/(?!debconf/)"
    r"|^(var/)?tmp/|^app/.*(__pycache__|\.(mypy|ruff|pytest)_cache|\.hypothesis)/|^var/log/"
)

# What is known to be harmless: kind, path, reason.
DEBIAN = "Debian's; the pipeline's container has no-new-privileges, so it gives none"
PACKAGES = "opt/venv/lib/python3*/site-packages"
KNOWN: tuple[tuple[Kind, str, str], ...] = (
    *(("setuid", f"usr/{name}", DEBIAN) for name in
      ("bin/chage", "bin/chfn", "bin/chsh", "bin/expiry", "bin/gpasswd", "bin/newgrp", "bin/passwd", "bin/su",
       "bin/mount", "bin/umount", "sbin/unix_chkpwd")),
    ("private key", "usr/lib/*/libgnutls.so.*", "keys of the library's own self-tests"),
    ("token", f"{PACKAGES}/transformers/*testing_utils.*py*", "the public test account of the hub's test server"),
    ("token", f"{PACKAGES}/pyjwt-*.dist-info/METADATA", "the example of its manual"),
    ("password", f"{PACKAGES}/httpx*/*_urls.*py*", "the example of its documentation"),
    ("password", f"{PACKAGES}/playwright/driver/*/utilsBundle.js", "the example of dotenv's documentation"),
    ("weights", f"{PACKAGES}/compressed_tensors/transform/utils/hadamards.safetensors", "matrices of mathematics"),
)  # fmt: skip
ROOT_REASON = "the sandbox's supervisor starts as root: it gives each untrusted program a user of its own"


def check_member(member: tarfile.TarInfo) -> Iterator[tuple[Kind, str]]:
    """What a file's name, mode and size reveal: kind of finding, description."""
    path, size = _path(member), member.size
    name = path.rpartition("/")[2]
    if not member.isreg():
        return
    if member.mode & 0o6000:
        bit = "setuid" if member.mode & 0o4000 else "setgid"
        yield "setuid", f"{bit} {'root' if member.uid == 0 else member.uid}, mode {member.mode:o}"
    if size == 0:
        return
    if PRIVATE_NAMES.fullmatch(name) or PRIVATE_FOLDERS.search(path):
        yield "private file", f"{size} bytes"
    if (WEIGHTS.fullmatch(name) and size > WEIGHTS_BYTES) or (name.endswith(".bin") and size > BIN_BYTES):
        yield "weights", f"{size / 1e6:,.1f} MB"
    if CACHES.search(path):
        yield "cache", f"{size:,} bytes"


def _path(member: tarfile.TarInfo) -> str:
    return member.name.removeprefix("./").lstrip("/")


def known_reason(kind: Kind, path: str) -> str:
    """Why this is known to be harmless, or ""."""
    return next((reason for known, glob, reason in KNOWN if known == kind and fnmatch.fnmatch(path, glob)), "")


@dataclass
class Report:
    """What a scan found."""

    findings: list[Finding] = field(default_factory=list)
    layers: int = 0
    files: int = 0
    bytes: int = 0

    @property
    def bad(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.known]


def scan(client: docker.DockerClient, name: str, patterns: Iterable[Pattern] = ()) -> Report:
    """Scan an image, each distinct layer once. `patterns`: besides PATTERNS, as machine_patterns() gives them.

    Raises ScanError for an image that cannot be read whole.
    """
    patterns = (*PATTERNS, *patterns)
    image = client.images.get(name)
    numbers = {diff_id: number for number, diff_id in enumerate(image.attrs["RootFS"]["Layers"])}
    unread = set(numbers)
    report = Report(list(check_configuration(image.attrs, client.api.history(name), patterns)))
    for layer in saved_layers(client, name):
        found: list[tuple[Kind, str, str]] = []
        for member, file in layer.members:
            path = _path(member)
            found += [(kind, path, what) for kind, what in check_member(member)]
            if file is not None:
                report.files += 1
                report.bytes += member.size
                pieces = iter(lambda file=file: file.read(PIECE), b"")  # type: ignore[misc]
                found += [(pattern.kind, path, pattern.what) for pattern in search(pieces, patterns)]
        diff_id = layer.diff_id()
        unread.discard(diff_id)
        number = numbers.get(diff_id, len(numbers))
        report.layers += 1
        report.findings += [
            Finding(kind, number, path, what, known_reason(kind, path)) for kind, path, what in sorted(found)
        ]
    if unread:  # a layer that was not read may hold anything
        raise ScanError(f"{name}: {len(unread)} of its layers are not in what the engine hands out: {min(unread)}.")
    return report


def check_configuration(
    attrs: Mapping[str, Any], history: list[dict[str, Any]], patterns: tuple[Pattern, ...]
) -> Iterator[Finding]:
    """Findings in an image's configuration and history, as the engine shows them."""
    config = attrs["Config"]
    for path, text in {"configuration": json.dumps(config), "history": json.dumps(history)}.items():
        for pattern in search([text.encode()], patterns):
            yield Finding(pattern.kind, None, path, pattern.what)
    for variable in config.get("Env") or []:
        name, _, value = variable.partition("=")
        if value and (SECRET_NAME.search(name) or name.upper().endswith("_PROXY")):
            yield Finding("token", None, "configuration", f"a value in {name}")
    if (config.get("User") or "0").partition(":")[0] in ("0", "root"):
        is_sandbox = any("supervisor.py" in argument for argument in config.get("Entrypoint") or [])
        yield Finding("root", None, "configuration", "runs as root", ROOT_REASON if is_sandbox else "")


# --- traces of this machine


def machine_patterns(environ: Mapping[str, str] = os.environ) -> list[Pattern]:
    """What would reveal this machine: its own certificates, its indexes and mirrors, the checkout's path."""
    public = [Path(certifi.where()), *Path("/usr/share/ca-certificates").rglob("*.crt")]
    own = [Path(environ[name]) for name in ("FRACTAL_CA", "SSL_CERT_FILE") if environ.get(name)]
    patterns = []
    for lines in sorted(set().union(*map(_certificates, own)) - set().union(*map(_certificates, public))):
        name = f"a certificate of the build machine ({hashlib.sha256(''.join(lines).encode()).hexdigest()[:8]})"
        patterns.append(Pattern("machine", name, lines[len(lines) // 2].encode()))
    settings = network.of_this_machine(sources=True)
    text = b"\n".join(content for name, content in settings.secrets.items() if name != "ca").decode()
    for host in sorted(private_hosts(text)):
        patterns.append(Pattern("machine", "an address of an index, mirror or proxy", host.encode()))
    folders = {"checkout": ROOT, "folder of wheels": settings.wheels}
    for what, folder in folders.items():
        if folder is not None:
            patterns.append(Pattern("machine", f"the path of the {what}", f"{folder.resolve()}/".encode()))
    return patterns


PUBLIC_HOSTS = ("pypi.org", "files.pythonhosted.org", "deb.debian.org", "security.debian.org", "download.pytorch.org",
                "localhost", "127.0.0.1")  # fmt: skip


def private_hosts(text: str) -> set[str]:
    """The hosts of the addresses in a text, without those that everybody uses."""
    hosts = {urlsplit(address).hostname or "" for address in re.findall(r"\w+://[^\s'\"]+", text)}
    return hosts - {"", *PUBLIC_HOSTS}


def _certificates(bundle: Path) -> set[tuple[str, ...]]:
    """The lines of base64 of each certificate."""
    try:
        text = bundle.read_text(errors="replace")
    except OSError:
        return set()
    bodies = re.findall(r"-----BEGIN CERTIFICATE-----(.*?)-----END", text, re.DOTALL)
    return {tuple(body.split()) for body in bodies}


# --- the command


def main(argv: list[str] | None = None) -> int:
    keys = (sys.argv[1:] if argv is None else argv) or ["sandbox"]
    return console.report_errors(lambda: _scan_all(keys))


def _scan_all(keys: list[str]) -> int:
    chosen = [recipe for key in keys for recipe in recipes.choose(key)]
    patterns = machine_patterns()
    bad = 0
    with closing(connect()) as client:
        for recipe in chosen:
            image = build.ensure(client, recipe, console.note)
            report = scan(client, image.name, patterns)
            bad += len(report.bad)
            for finding in report.findings:
                layer = "" if finding.layer is None else f"layer {finding.layer}: "
                mark = f"known: {finding.known}" if finding.known else "FOUND"
                print(f"{recipe.key}: {finding.kind}: {layer}{finding.path}: {finding.what} ({mark})")
            print(f"scan: {image.name}, {report.layers} layers, {report.files:,} files, {len(report.bad)} findings")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
