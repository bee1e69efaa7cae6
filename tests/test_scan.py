"""The scan of images: planted secrets in real layers, hidden ones too; contents across borders; a clean image passes."""

import base64
import hashlib
import io
import itertools
import secrets
import tarfile
from collections.abc import Iterator
from pathlib import Path

import certifi
import docker
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.images import saved_layers, scan
from fractal.images.secret_patterns import PATTERNS, Pattern, mask, search

# Put together here: written out, they would be found in this file by others' scans.
AWS = b"AKIA" + b"Q3EGAXWZ7LMNOPRT"
GITHUB = b"ghp_" + b"a1B2c3D4e5F6g7H8i9J0a1B2c3D4e5F6g7H8"
HUB = b"hf_" + b"AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"
WEB = b"eyJhbGciOiJIUzI1NiJ9" + b"." + b"eyJzdWIiOiIxMjM0NTY3ODkwIn0" + b"." + b"dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
LAMBDA = b"secret_" + b"laptop_" + b"0123456789abcdef" * 2 + b"." + b"Ab3" * 10 + b"xy"
OPENAI = b"sk-proj-" + b"a1B2c3D4e5F6g7H8i9J0" + b"T3Blbk" + b"FJa1B2c3D4e5F6g7H8i9J0"
KEY = b"-----BEGIN RSA PRIVATE" + b" KEY-----\n" + base64.b64encode(bytes(range(48))) + b"\n"
ADDRESS = b"index = https://ci-robot:" + b"9fK2xLq71z@pypi.internal.example/simple\n"


def kinds(text: bytes, *more: Pattern) -> set[str]:
    return {pattern.kind for pattern in search([text], (*PATTERNS, *more))}


def test_secrets_are_found() -> None:
    secrets_of = {
        AWS: "token",
        b'key = "' + GITHUB + b'"': "token",
        b"HF_TOKEN=" + HUB + b"\n": "token",
        b"Authorization: Bearer " + WEB: "token",
        b"LAMBDA_API_KEY=" + LAMBDA: "token",
        OPENAI: "token",
        KEY: "private key",
        KEY.replace(b"\n", b"\\n"): "private key",  # in JSON
        ADDRESS: "password",
    }
    assert {text: kinds(b"before\n" + text + b"\0after") for text in secrets_of} == {
        text: {kind} for text, kind in secrets_of.items()
    }


def test_mentions_and_examples_are_no_secrets() -> None:
    for text in (
        b"",
        b'HEADER = "-----BEGIN RSA PRIVATE KEY-----"\nif HEADER in text: pass',
        b"postgresql://user:password@localhost/db https://%s:%s@host https://${USER}:${TOKEN}@host",
        b"amqp://guest:guest@localhost/ https://REDACTED:REDACTED@host.example",
        b"http://localhost:8000/a@b ssh://git@github.com/x",
        b"_Zhf_" + HUB[3:] + b" " + b"x" + AWS,  # the middle of a longer word
    ):
        assert kinds(text) == set(), text


def test_a_text_for_a_message_shows_no_secret() -> None:
    for secret in (AWS, GITHUB, HUB, LAMBDA):
        assert mask(f"before {secret.decode()} after") == "before *** after"
    assert mask("https://ci:hunter2@pypi.example/simple") == "https://***@pypi.example/simple"


@given(st.binary(max_size=50), st.sampled_from([AWS, HUB, KEY, ADDRESS]), st.lists(st.integers(0, 400), max_size=6))
def test_borders_of_pieces_hide_nothing(before: bytes, secret: bytes, cuts: list[int]) -> None:
    text = before + b" " + secret + b" "
    places = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert search(pieces, PATTERNS) == search([text], PATTERNS)


def entry(name: str, size: int = 10, mode: int = 0o644) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.size, found.mode = size, mode
    return found


# Path, size in bytes, mode, kind of the finding.
FILES = """
root/.netrc 10 644 private file
etc/pip.conf 10 644 private file
work/.env 10 644 private file
home/x/.aws/config 10 644 private file
run/secrets/settings 10 644 private file
opt/tls/server.key 10 644 private file
opt/model.safetensors 10000000 644 weights
opt/model.bin 10000000 644 weights
root/.cache/uv/a 10 644 cache
var/lib/apt/lists/a_Packages 10 644 cache
app/fractal/__pycache__/a.pyc 10 644 cache
usr/bin/su 10 4755 setuid
etc/pip.conf 0 644
opt/venv/lib/python3.11/site-packages/a.pth 10 644
opt/venv/lib/python3.11/site-packages/a/credentials.py 10 644
opt/venv/lib/python3.11/site-packages/__pycache__/a.pyc 10 644
"""  # the empty file is a mount point that a mount left


def test_names_and_modes() -> None:
    wrong = []
    for line in FILES.strip().splitlines():
        path, size, mode, *kind = line.split(" ", 3)
        if [found for found, _ in scan.check_member(entry(path, int(size), int(mode, 8)))] != kind:
            wrong.append(line)
    assert wrong == []


def test_what_is_known_is_of_one_kind_and_path() -> None:
    assert scan.known_reason("setuid", "usr/bin/su")
    assert not scan.known_reason("setuid", "usr/bin/python3")
    assert not scan.known_reason("token", "usr/bin/su")


def test_an_own_certificate_is_a_trace_and_a_public_one_is_not(tmp_path: Path) -> None:
    body = base64.encodebytes(secrets.token_bytes(900)).decode()
    public = Path(certifi.where()).read_text()
    (tmp_path / "ca.pem").write_text(f"{public}-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n")
    patterns = scan.machine_patterns({"FRACTAL_CA": str(tmp_path / "ca.pem")})
    assert [pattern.what for pattern in patterns if "certificate" in pattern.what] == [patterns[0].what]
    assert "machine" in kinds(body.encode(), *patterns)
    assert kinds(public.encode(), *patterns) == set()


def test_only_addresses_that_not_everybody_uses_betray_a_machine() -> None:
    text = "deb https://deb.debian.org/debian x\nexport A='https://mirror.corp.example:8080/simple' http://localhost:1/"
    assert scan.private_hosts(text) == {"mirror.corp.example"}


def archive(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in files.items():
            one = entry(name, len(data))
            tar.addfile(one, io.BytesIO(data))
    return packed.getvalue()


@pytest.mark.parametrize("size", [1, 700, 10**6])
def test_layers_are_read_from_pieces_of_any_size_and_known_by_their_hash(size: int) -> None:
    layers = [archive({"a": b"1" * 5000}), archive({}), archive({"b": b"2", "c": b""})]
    whole = archive(
        {"x.json": b"{}", **{f"{i}/layer.tar": data for i, data in enumerate(layers)}, "manifest.json": b"[]"}
    )
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    found = [
        ([member.name for member, _ in layer.members], layer.diff_id()) for layer in saved_layers.read_layers(pieces)
    ]
    assert found == [
        (names, f"sha256:{hashlib.sha256(data).hexdigest()}")
        for names, data in zip([["a"], [], ["b", "c"]], layers, strict=True)
    ]


# --- a real engine


def make(client: docker.DockerClient, *layers: dict[str, bytes], lines: str = "USER 1000") -> Iterator[str]:
    """An image of these layers, on nothing; gone afterwards."""
    name = f"fractal-test-scan:{secrets.token_hex(6)}"
    context = {f"layer{i}{path}": data for i, layer in enumerate(layers) for path, data in layer.items()}
    copies = [f"COPY layer{i} /" for i in range(len(layers))]
    context["Dockerfile"] = "\n".join(["FROM scratch", *copies, lines]).encode()
    client.images.build(fileobj=io.BytesIO(archive(context)), custom_context=True, tag=name, rm=True)
    try:
        yield name
    finally:
        client.images.remove(name)


@pytest.fixture
def planted(client: docker.DockerClient) -> Iterator[str]:
    below = {"/root/.netrc": b"machine x", "/a": AWS, "/b": KEY, "/c": ADDRESS, "/d/m.gguf": b"G" * 200_000}
    above = {"/root/.netrc": b"", "/a": b"", "/b": b"", "/e": b"x" * 3_000_000 + b"the checkout /home/someone/here"}
    lines = f"LABEL maintainer={HUB.decode()}\nENV API_TOKEN=x"
    yield from make(client, below, above, lines=lines)


@pytest.mark.docker
def test_planted_secrets_are_found_in_every_layer(client: docker.DockerClient, planted: str) -> None:
    mine = Pattern("machine", "a path", b"/home/someone/here")
    found = scan.scan(client, planted, [mine])
    assert {(f.kind, f.layer, f.path) for f in found.bad} == {
        ("private file", 0, "root/.netrc"),
        ("token", 0, "a"),
        ("private key", 0, "b"),
        ("password", 0, "c"),
        ("weights", 0, "d/m.gguf"),
        ("machine", 1, "e"),
        ("token", None, "configuration"),
        ("token", None, "history"),
        ("root", None, "configuration"),
    }
    assert AWS.decode() not in repr(found.findings)


@pytest.fixture
def clean(client: docker.DockerClient) -> Iterator[str]:
    yield from make(client, {"/app/main.py": b"print('https://user:password@host')"}, {"/etc/motd": b"hello"})


@pytest.mark.docker
def test_a_clean_image_passes(client: docker.DockerClient, clean: str) -> None:
    found = scan.scan(client, clean, scan.machine_patterns())
    assert found.findings == []
    assert (found.layers, found.files) == (2, 2)


@pytest.mark.docker
def test_the_sandbox_image_is_clean(client: docker.DockerClient, image: str) -> None:
    found = scan.scan(client, image, scan.machine_patterns())
    assert found.bad == []
    assert [f.kind for f in found.findings] == ["root"]
    assert found.findings[0].known == scan.ROOT_REASON


class Forgetful:
    """An engine that hands out a part of the image."""

    def __init__(self, client: docker.DockerClient) -> None:
        self.images, self.info, self.api = client.images, client.info, self
        self.history = client.api.history

    def get_image(self, name: str) -> list[bytes]:
        return [archive({"manifest.json": b"[]"})]


@pytest.mark.docker
def test_an_image_that_was_not_read_whole_is_not_called_clean(client: docker.DockerClient, clean: str) -> None:
    with pytest.raises(saved_layers.ScanError, match="2 of its layers"):
        scan.scan(Forgetful(client), clean)
