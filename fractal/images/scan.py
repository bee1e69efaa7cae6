"""Looks through every layer of an image for what must not be in it: secrets, this machine's traces, weights, caches.

    python -m fractal.images.scan sandbox pipeline-cpu     # exit code 1 if something was found

A layer is read as the engine saves it, one piece at a time: what a later layer hides is found too. What is known to be
harmless is listed with its reason, not left out. A secret that was found is told by its place, never by its text.
"""

import base64
import fnmatch
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast
from urllib.parse import urlsplit

import certifi
import docker

from fractal import console
from fractal.errors import OutsideError
from fractal.images import build, network, recipes
from fractal.images.recipes import ROOT

Kind = Literal[
    "private key",
    "token",
    "password",  # in an address
    "machine",  # a certificate, address or path of the machine that built
    "private file",  # by its name: .netrc, pip.conf, credentials
    "weights",
    "cache",
    "setuid",
    "root",  # the image's program runs as root
]
WEIGHTS_BYTES, BIN_BYTES = 100_000, 5_000_000  # below is no model: .pth is also a file of paths, .bin is anything
SPARE_BYTES = 2_000_000_000  # others use the engine's disk too
PIECE = 1 << 20
OVERLAP = 4096  # what is searched for is shorter, or begins with what is
TAR_BUFFER = 1 << 17  # tarfile copies its buffer at each header: larger is slower


class ScanError(OutsideError):
    """An image cannot be looked through here: one line."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing at one place. `excuse`: why it may be there; empty if it may not."""

    kind: Kind
    layer: int | None  # 0 is the base; None: the configuration or the history
    path: str
    what: str
    excuse: str = ""


class Needle(NamedTuple):
    """What is searched for in contents: `anchor` is a fast test, `pattern` the proof, tried where the anchor stands."""

    kind: Kind
    what: str
    anchor: bytes
    pattern: re.Pattern[bytes] | None = None


# Formats as their issuers document them; the last one is Lambda Cloud's.
NEEDLES = (
    Needle("private key", "a private key (PEM)", b"PRIVATE KEY-----",
           re.compile(rb"PRIVATE KEY-----(\\n|\s)+([\w-]+: [^\n]*\s+)*[A-Za-z0-9+/=]{40}")),
    Needle("token", "an AWS access key", b"AKIA", re.compile(rb"AKIA[0-9A-Z]{16}(?![0-9A-Za-z])")),
    Needle("token", "an AWS access key", b"ASIA", re.compile(rb"ASIA[0-9A-Z]{16}(?![0-9A-Za-z])")),
    Needle("token", "a GitHub token", b"ghp_", re.compile(rb"ghp_[A-Za-z0-9]{36}")),
    Needle("token", "a GitHub token", b"gho_", re.compile(rb"gho_[A-Za-z0-9]{36}")),
    Needle("token", "a GitHub token", b"ghs_", re.compile(rb"ghs_[A-Za-z0-9]{36}")),
    Needle("token", "a GitHub token", b"github_pat_", re.compile(rb"github_pat_\w{60}")),
    Needle("token", "a Hugging Face token", b"hf_", re.compile(rb"hf_[A-Za-z0-9]{34}(?![A-Za-z0-9_])")),
    Needle("token", "a JSON web token", b"eyJ",
           re.compile(rb"eyJ[\w-]{10,2000}\.eyJ[\w-]{10,2000}\.[\w-]{20}")),
    Needle("token", "a PyPI token", b"pypi-AgE", re.compile(rb"pypi-AgE[\w-]{50}")),
    Needle("token", "a Lambda Cloud key", b"secret_", re.compile(rb"secret_[\w-]{1,64}_[0-9a-f]{32}\.\w{32}")),
    Needle("password", "an address with a password", b"://",
           re.compile(rb"://([^\s/:@\"'`<>\\]{1,64}):([^\s/:@\"'`<>\\]{3,128})@[\w.-]{3}")),
)  # fmt: skip
# Passwords of templates and examples: https://%s:%s@, https://${USER}:${TOKEN}@, https://user:password@host
TEMPLATE = re.compile(rb"%[^0-9A-Fa-f]|[{}$*()\[\]|]")
EXAMPLE = re.compile(rb"(my|the|some)?[_-]?(pass(word|wd)?|pwd?|secret|token|x+|redacted|bar|repo)\d*", re.IGNORECASE)
PRIVATE_NAMES = re.compile(
    r"\.netrc|_netrc|\.env(\..+)?|pip\.conf|uv\.toml|\.pypirc|\.npmrc|\.git-credentials|\.dockercfg|\.htpasswd"
    r"|credentials(\.(json|ini|toml|ya?ml|xml|csv|txt))?|id_(rsa|dsa|ecdsa|ed25519)|.+\.(key|p12|pfx|jks|kdbx|ovpn)|\.vault-token"
)
PRIVATE_PLACES = re.compile(r"(^|/)(\.ssh|\.aws|\.docker|\.kube|\.gnupg|\.git)/|^run/secrets/")
WEIGHTS = re.compile(r".+\.(safetensors|gguf|ggml|pt|pth|ckpt|onnx|h5)")
CACHES = re.compile(
    r"^(root|home/[^/]+|cache)/\.?cache/|(^|/)\.cache/|^var/lib/apt/lists/[^/]+$|^var/cache/(?!debconf/)"
    r"|^(var/)?tmp/|^app/.*(__pycache__|\.(mypy|ruff|pytest)_cache|\.hypothesis)/|^var/log/"
)

# What is known to be harmless: kind, path, reason.
DEBIAN = "Debian's; the pipeline's container has no-new-privileges, so it gives none"
PACKAGES = "opt/venv/lib/python3*/site-packages"
EXCUSES: tuple[tuple[Kind, str, str], ...] = (
    *(("setuid", f"usr/{name}", DEBIAN) for name in
      ("bin/chage", "bin/chfn", "bin/chsh", "bin/expiry", "bin/gpasswd", "bin/newgrp", "bin/passwd", "bin/su",
       "bin/mount", "bin/umount", "sbin/unix_chkpwd")),
    ("private key", "usr/lib/*/libgnutls.so.*", "keys of the library's own self-tests"),
    ("token", f"{PACKAGES}/transformers/*testing_utils.*py*", "the public test account of the hub's test server"),
    ("token", f"{PACKAGES}/pyjwt-*.dist-info/METADATA", "the example of its manual"),
    ("password", f"{PACKAGES}/httpx*/*_urls.*py*", "the example of its documentation"),
    ("weights", f"{PACKAGES}/compressed_tensors/transform/utils/hadamards.safetensors", "matrices of mathematics"),
)  # fmt: skip
ROOT_EXCUSE = "the sandbox's supervisor starts as root: it gives each untrusted program a user of its own"


# --- what an engine saves


class Layer:
    """One layer of a saved image: its entries, each with its content, to be read one after the other."""

    def __init__(self, file: "_Hashed") -> None:
        self._file = file
        self.entries = _entries(file)

    def diff_id(self) -> str:
        """sha256 of the layer's archive; reads what is left of it."""
        for _ in self.entries:
            pass
        while self._file.read(PIECE):
            pass
        return f"sha256:{self._file.hash.hexdigest()}"


class _Stream:
    """Pieces of bytes as a file that can only be read on; counts."""

    def __init__(self, pieces: Iterable[bytes], advance: Callable[[int], None]) -> None:
        self._pieces, self._advance, self._rest = iter(pieces), advance, b""

    def read(self, size: int) -> bytes:
        parts, missing = [], size
        while missing > 0:
            if not self._rest:
                self._rest = next(self._pieces, b"")
                if not self._rest:
                    break
                self._advance(len(self._rest))
            parts.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)


class _Hashed:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.hash = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.hash.update(data)
        return data


def layers(pieces: Iterable[bytes], advance: Callable[[int], None] = lambda count: None) -> Iterator[Layer]:
    """The layers of `docker save`'s archive, in its order; read each one's entries before the next."""
    stream = _Stream(pieces, advance)
    with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|", bufsize=TAR_BUFFER) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isreg() else None
            if file is None:
                continue
            data: IO[bytes] = io.BufferedReader(cast(io.RawIOBase, file), PIECE)
            head = cast(io.BufferedReader, data).peek(512)[:512]
            if head.startswith(b"\x1f\x8b"):  # containerd's store keeps them compressed
                data = cast(IO[bytes], gzip.GzipFile(fileobj=data))
            elif not (head[257:262] == b"ustar" or (member.name.endswith("layer.tar") and not head.strip(b"\0"))):
                continue  # a configuration or a manifest
            layer = Layer(_Hashed(data))
            yield layer
            layer.diff_id()  # reads what the caller has left


def _entries(file: _Hashed) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r|", bufsize=TAR_BUFFER) as archive:
        for entry in archive:
            archive.members = []  # type: ignore[attr-defined]  # else tarfile keeps every entry
            yield entry, archive.extractfile(entry) if entry.isreg() else None


def saved(client: docker.DockerClient, name: str) -> Iterator[Layer]:
    """The layers of an image that the engine has, with a progress bar. Raises ScanError if its disk is too full."""
    size = client.images.get(name).attrs["Size"]
    info = client.info()
    place = Path(info.get("DockerRootDir") or "/nowhere")
    here = info.get("Name") == socket.gethostname() and place.is_dir()  # else the disk is another machine's
    if here and (free := shutil.disk_usage(place).free) < size + SPARE_BYTES:
        raise ScanError(
            f"The engine copies an image before it hands it out: {name} needs {(size + SPARE_BYTES) / 1e9:.1f} GB on "
            f"its disk, {free / 1e9:.1f} are free. `docker system df` shows what takes it."
        )
    pieces = iter(client.api.get_image(name))
    with console.activity(name) as show:
        show("the engine packs it")
        first = next(pieces, b"")
    with console.bar(f"reading {name}", size // 1_000_000) as bar:
        yield from layers(itertools.chain([first], pieces), megabytes(bar.advance))


def megabytes(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Counts bytes, tells whole megabytes."""
    rest = 0

    def count(size: int) -> None:
        nonlocal rest
        done, rest = divmod(rest + size, 1_000_000)
        if done:
            advance(done)

    return count


# --- one entry, one content


def search(pieces: Iterable[bytes], needles: Iterable[Needle]) -> set[Needle]:
    """The needles that stand in a content, which comes in pieces; across their borders too."""
    open_, found, tail = list(needles), set(), b""
    for piece in pieces:
        text = tail + piece
        for needle in [n for n in open_ if n.anchor in text and _proved(n, text)]:
            found.add(needle)
            open_.remove(needle)
        tail = text[-OVERLAP:]
    return found


def _proved(needle: Needle, text: bytes) -> bool:
    if needle.pattern is None:
        return True
    for match in needle.pattern.finditer(text):
        before = text[match.start() - 1 : match.start()]
        if needle.kind == "token" and re.match(rb"\w", before):
            continue  # the middle of a longer word
        if needle.kind == "password":
            user, password = match.groups()
            if user == password or TEMPLATE.search(user + password) or EXAMPLE.fullmatch(password):
                continue
        return True
    return False


def look(entry: tarfile.TarInfo) -> Iterator[tuple[Kind, str]]:
    """What an entry's name, mode and size say."""
    path, size = _path(entry), entry.size
    name = path.rpartition("/")[2]
    if not entry.isreg():
        return
    if entry.mode & 0o6000:
        bit = "setuid" if entry.mode & 0o4000 else "setgid"
        yield "setuid", f"{bit} {'root' if entry.uid == 0 else entry.uid}, mode {entry.mode:o}"
    if size == 0:
        return
    if PRIVATE_NAMES.fullmatch(name) or PRIVATE_PLACES.search(path):
        yield "private file", f"{size} bytes"
    if (WEIGHTS.fullmatch(name) and size > WEIGHTS_BYTES) or (name.endswith(".bin") and size > BIN_BYTES):
        yield "weights", f"{size / 1e6:,.1f} MB"
    if CACHES.search(path):
        yield "cache", f"{size:,} bytes"


def _path(entry: tarfile.TarInfo) -> str:
    return entry.name.removeprefix("./").lstrip("/")


def excuse(kind: Kind, path: str) -> str:
    """Why this may be there, or nothing."""
    return next((reason for k, glob, reason in EXCUSES if k == kind and fnmatch.fnmatch(path, glob)), "")


# --- the whole image


@dataclass
class Report:
    """What a scan saw."""

    findings: list[Finding] = field(default_factory=list)
    layers: int = 0
    files: int = 0
    bytes: int = 0

    @property
    def bad(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.excuse]


def scan(client: docker.DockerClient, name: str, needles: Iterable[Needle] = ()) -> Report:
    """Look through an image, each different layer once. `needles`: besides NEEDLES, as machine_needles() gives them.

    Raises ScanError for an image that cannot be read whole.
    """
    wanted = (*NEEDLES, *needles)
    image = client.images.get(name)
    order = {diff_id: number for number, diff_id in enumerate(image.attrs["RootFS"]["Layers"])}
    unread = set(order)
    report = Report()
    report.findings += _configuration(image.attrs, client.api.history(name), wanted)
    for layer in saved(client, name):
        found: list[tuple[Kind, str, str]] = []
        for entry, file in layer.entries:
            path = _path(entry)
            found += [(kind, path, what) for kind, what in look(entry)]
            if file is not None:
                report.files += 1
                report.bytes += entry.size
                needles_here = search(iter(lambda file=file: file.read(PIECE), b""), wanted)  # type: ignore[misc]
                found += [(needle.kind, path, needle.what) for needle in needles_here]
        diff_id = layer.diff_id()
        unread.discard(diff_id)
        number = order.get(diff_id, len(order))
        report.layers += 1
        report.findings += [Finding(k, number, path, what, excuse(k, path)) for k, path, what in sorted(found)]
    if unread:  # never "nothing found" of what was not read
        raise ScanError(f"{name}: {len(unread)} of its layers are not in what the engine hands out: {min(unread)}.")
    return report


def _configuration(
    attrs: Mapping[str, Any], history: list[dict[str, Any]], needles: tuple[Needle, ...]
) -> Iterator[Finding]:
    config = attrs["Config"]
    texts = {"configuration": json.dumps(config), "history": json.dumps(history)}
    for place, text in texts.items():
        for needle in search([text.encode()], needles):
            yield Finding(needle.kind, None, place, needle.what)
    for variable in config.get("Env") or []:
        name, _, value = variable.partition("=")
        if value and re.search(r"(TOKEN|SECRET|PASSWORD|API_KEY|_PROXY)$", name, re.IGNORECASE):
            yield Finding("token", None, "configuration", f"a value in {name}")
    if (config.get("User") or "0").partition(":")[0] in ("0", "root"):
        supervised = any("supervisor.py" in word for word in config.get("Entrypoint") or [])
        yield Finding("root", None, "configuration", "runs as root", ROOT_EXCUSE if supervised else "")


# --- this machine


def machine_needles(environ: Mapping[str, str] = os.environ) -> list[Needle]:
    """What would betray this machine: its own certificates, its indexes and mirrors, the checkout's path."""
    found = []
    bundles = [Path(environ[name]) for name in ("FRACTAL_CA", "SSL_CERT_FILE") if environ.get(name)]
    known = _certificates(Path(certifi.where())) | {
        one for path in Path("/usr/share/ca-certificates").rglob("*.crt") for one in _certificates(path)
    }
    for certificate in sorted({one for path in bundles for one in _certificates(path)} - known):
        found += certificate_needles(certificate)
    here = network.of_this_machine(sources=True)
    for address in sorted(addresses(b"\n".join(v for k, v in here.secrets.items() if k != "ca").decode())):
        found.append(Needle("machine", "an address of an index, mirror or proxy", address.encode()))
    found.append(Needle("machine", "the path of the checkout", f"{ROOT}/".encode()))
    if here.wheels is not None:
        found.append(Needle("machine", "the path of the folder of wheels", f"{here.wheels.resolve()}/".encode()))
    return found


PUBLIC = ("pypi.org", "files.pythonhosted.org", "deb.debian.org", "security.debian.org", "download.pytorch.org",
          "localhost", "127.0.0.1")  # fmt: skip


def addresses(text: str) -> set[str]:
    """The hosts that addresses in a text name, without the ones that everybody uses."""
    hosts = {urlsplit(address).hostname or "" for address in re.findall(r"\w+://[^\s'\"]+", text)}
    return {host for host in hosts if host and host not in PUBLIC}


def certificate_needles(body: str) -> list[Needle]:
    """A certificate (base64 without its line ends) as PEM and as DER: pieces of its middle."""
    data = base64.b64decode(body)
    name = f"a certificate of the build machine ({hashlib.sha256(data).hexdigest()[:8]})"
    line = len(body) // 64 // 2 * 64  # PEM has 64 characters a line
    middle = len(data) // 2
    return [Needle("machine", name, body[line : line + 64].encode()),
            Needle("machine", name, data[middle : middle + 48])]  # fmt: skip


def _certificates(bundle: Path) -> set[str]:
    try:
        text = bundle.read_text(errors="replace")
    except OSError:
        return set()
    bodies = re.findall(r"-----BEGIN CERTIFICATE-----(.*?)-----END", text, re.DOTALL)
    return {"".join(body.split()) for body in bodies}


# --- the command


def main(argv: list[str] | None = None) -> int:
    keys = (sys.argv[1:] if argv is None else argv) or ["sandbox"]
    return console.report_errors(lambda: _scan_all(keys))


def _scan_all(keys: list[str]) -> int:
    wanted = [recipe for key in keys for recipe in recipes.choose(key)]
    client = build.connect()
    needles = machine_needles()
    bad = 0
    try:
        for recipe in wanted:
            image = build.ensure(client, recipe, console.note)
            report = scan(client, image.name, needles)
            bad += len(report.bad)
            for finding in report.findings:
                place = "" if finding.layer is None else f"layer {finding.layer}: "
                mark = f"known: {finding.excuse}" if finding.excuse else "FOUND"
                print(f"{recipe.key}: {finding.kind}: {place}{finding.path}: {finding.what} ({mark})")
            print(f"scan: {image.name}, {report.layers} layers, {report.files:,} files, {len(report.bad)} findings")
    finally:
        client.close()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
