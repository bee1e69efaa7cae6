"""What a build hears of this machine's network: pip's and apt's settings, certificates, wheels. Real pip, real files."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

from fractal.errors import InputError
from fractal.images import network
from fractal.images.image import Image
from fractal.images.network import Network, build_secrets

PEM = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"

WITH_PIP = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="no pip here, as in the pipeline's image")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an open network, whatever this machine's is."""
    import os

    for name in os.environ:
        if name.startswith("PIP_") or name in (
            "FRACTAL_CA",
            "SSL_CERT_FILE",
            "FRACTAL_WHEELS",
            "FRACTAL_DEBIAN_MIRROR",
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(network.debian, "apt_settings", lambda names: [])


def test_an_open_network_needs_nothing() -> None:
    assert build_secrets(None, {}, [], [], None) == Network()
    assert network.of_this_machine(sources=False) == Network()


def test_a_closed_network_put_together() -> None:
    pip = {"index-url": "https://me:it's@pypi.example/simple", "extra-index-url": "https://a.example file:///opt/x /opt/y https://b.example",
           "trusted-host": "a.example", "timeout": "9", "no-color": "1"}  # fmt: skip
    found = build_secrets(
        PEM, pip, ['Acquire::Retries "3";'], ["deb http://m.example/debian bookworm main"], Path("/wheels")
    )
    assert found.wheels == Path("/wheels")
    assert found.secrets["ca"] == PEM
    assert found.secrets["sources"] == b"deb http://m.example/debian bookworm main\n"
    assert found.secrets["apt"].decode().splitlines() == [
        'Acquire::Retries "3";', 'Acquire::https::CAInfo "/run/secrets/ca";',
        'Dir::Etc::sourcelist "/run/secrets/sources";', 'Dir::Etc::sourceparts "-";',
    ]  # fmt: skip
    shell = found.secrets["settings"].decode() + "env"
    output = subprocess.run(
        ["sh", "-ec", shell], capture_output=True, text=True, env={}, check=True
    ).stdout.splitlines()
    assert {line for line in output if not line.startswith("PWD=")} == {
        "SSL_CERT_FILE=/run/secrets/ca", "PIP_CERT=/run/secrets/ca", "REQUESTS_CA_BUNDLE=/run/secrets/ca", "CURL_CA_BUNDLE=/run/secrets/ca",
        "PIP_INDEX_URL=https://me:it's@pypi.example/simple", "UV_DEFAULT_INDEX=https://me:it's@pypi.example/simple",
        "PIP_EXTRA_INDEX_URL=https://a.example https://b.example", "UV_INDEX=https://a.example https://b.example",  # no path of this machine
        "PIP_TRUSTED_HOST=a.example", "UV_INSECURE_HOST=a.example", "PIP_TIMEOUT=9", "UV_HTTP_TIMEOUT=9", "APT_CONFIG=/run/secrets/apt",
    }  # fmt: skip


def test_secrets_do_not_show() -> None:
    pip = {"index-url": "https://me:hunter2@pypi.example/simple"}
    assert "hunter2" not in repr(build_secrets(None, pip, [], [], None))


@WITH_PIP
def test_pips_settings_are_read_by_pip_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://me:it's@pypi.example/simple\nextra-index-url =\n    https://a.example\n    https://b.example\n"
        "timeout = 7\n[install]\ntrusted-host = a.example\n[freeze]\ntimeout = 10\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_TRUSTED_HOST", "c.example")  # variables win
    found = network.pip_settings()
    wanted = {"index-url": "https://me:it's@pypi.example/simple", "extra-index-url": "https://a.example https://b.example", "timeout": "7", "trusted-host": "c.example"}  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted


def test_what_is_named_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("option", "fractal", "ssl", "pip"):
        (tmp_path / name).write_bytes(PEM + name.encode())
    pip = {"cert": f"{tmp_path}/pip", "find-links": f"https://h.example/list {tmp_path}/no {tmp_path}"}
    monkeypatch.setattr(network, "pip_settings", lambda: pip)

    def ca(option: Path | None = None) -> bytes:
        return network.of_this_machine(sources=False, ca=option).secrets["ca"].removeprefix(PEM)

    assert ca() == b"pip"
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ssl"))
    assert ca() == b"ssl"
    monkeypatch.setenv("FRACTAL_CA", str(tmp_path / "fractal"))
    assert ca() == b"fractal"
    assert ca(tmp_path / "option") == b"option"
    assert network.of_this_machine(sources=False).wheels == tmp_path  # the first folder that is there
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("FRACTAL_WHEELS", str(tmp_path / "wheels"))
    assert network.of_this_machine(sources=False).wheels == tmp_path / "wheels"
    assert network.of_this_machine(sources=False, wheels=tmp_path).wheels == tmp_path


def test_wrong_options_are_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "pip_settings", dict)
    (tmp_path / "key").write_text("-----BEGIN PRIVATE KEY-----\n")
    (tmp_path / "big").write_bytes(PEM * 10_000)
    for name in ("no", "key", "big"):
        with pytest.raises(InputError, match=rf"{name}: no file of certificates in PEM's form, or over 500 kB.*--ca"):
            network.of_this_machine(sources=False, ca=tmp_path / name)
    monkeypatch.setenv("FRACTAL_WHEELS", str(tmp_path / "no"))
    with pytest.raises(InputError, match="no such folder of wheels"):
        network.of_this_machine(sources=False)


def test_a_mirror_becomes_a_line_of_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRACTAL_DEBIAN_MIRROR", "http://m.example/debian")
    assert network.of_this_machine(sources=True).secrets["sources"] == b"deb http://m.example/debian bookworm main\n"


def test_of_a_folder_of_wheels_only_those_that_an_image_asks_for_are_taken() -> None:
    image = Image.debian_slim().pip_install("torch==2.13.0", "Some.Thing[extra]==1.0").run_commands("true")
    wanted = [pin for step in image.steps if step.kind == "python" for pin in network.pins(step)]
    assert wanted == [("some-thing", "==1.0"), ("torch", "==2.13.0")]
    tag = "py3-none-any.whl"
    for name, taken in (("torch-2.13.0+cpu", True), ("torch-2.14.0", False), ("some_thing-1.0", True), ("x-1", False)):
        assert network.is_wanted(f"{name}-{tag}", wanted) is taken
    assert not network.is_wanted("torch.whl", wanted)
