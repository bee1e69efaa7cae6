"""The sandbox image: its name, its context, its base, and a real build."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from fractal.images import build, debian
from fractal.records import OutsideError
from fractal.sandbox import source

DEB822 = """\
# comment
Types: deb
# another
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb deb-src
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
URIs: http://mirror.example/tools
Suites: bookworm
Components: main

Types: deb
URIs: http://mirror.example/debian
Suites: bookworm
Components: main
Enabled: no
"""
ONE_LINE = """\
deb [arch=amd64 trusted=yes] http://mirror.example/debian bookworm main contrib
deb-src http://mirror.example/debian bookworm main
deb http://mirror.example/debian bookworm-backports main
# deb http://mirror.example/debian bookworm-updates main
deb http://mirror.example/docker/debian bookworm stable
"""


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of what the image is made of, with a small judge."""
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/sandbox.Dockerfile").write_bytes((source.ROOT / source.DOCKERFILE).read_bytes())
    (tmp_path / "fractal/sandbox").mkdir(parents=True)
    (tmp_path / "fractal/__init__.py").write_text("")
    (tmp_path / "fractal/sandbox/supervisor.py").write_text("print('judge', __file__)\n")
    monkeypatch.setattr(source, "ROOT", tmp_path)
    monkeypatch.delenv("FRACTAL_BASE_IMAGE", raising=False)
    return tmp_path


@pytest.fixture
def client() -> Iterator[docker.DockerClient]:
    client = build.connect()
    yield client
    client.close()


def test_name_and_context_depend_on_content_alone(clone: Path) -> None:
    name, context = source.image_name(), source.context()
    judge = clone / "fractal/sandbox/supervisor.py"
    os.utime(judge, (1e9, 1e9))
    judge.chmod(0o600)
    assert (source.image_name(), source.context()) == (name, context)
    judge.write_text("print('other')\n")
    assert source.image_name() != name
    assert source.context() != context


def test_the_hosts_end_does_not_change_the_image(clone: Path) -> None:
    name = source.image_name()
    (clone / "fractal/sandbox/container.py").write_text("import docker\n")
    (clone / "fractal/sandbox/notes.txt").write_text("not a program\n")
    assert source.image_name() == name
    (clone / "fractal/sandbox/zygote.py").write_text("")
    assert source.image_name() != name


def test_the_context_holds_the_dockerfile_and_the_sources(clone: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(source.context())) as tar:
        entries = tar.getmembers()
    assert [entry.name for entry in entries] == [
        "docker/sandbox.Dockerfile",
        "fractal/__init__.py",
        "fractal/sandbox/supervisor.py",
    ]
    assert {(entry.mtime, entry.uid, entry.gid, entry.mode) for entry in entries} == {(0, 0, 0, 0o644)}


def test_only_debians_own_sources_are_used() -> None:
    key = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
    assert debian.sources(DEB822) == [
        f"deb {key}http://mirror.example/debian bookworm main",
        f"deb {key}http://mirror.example/debian bookworm-updates main",
        "deb http://mirror.example/debian-security bookworm-security main",
    ]
    assert debian.sources(ONE_LINE) == ["deb [arch=amd64 trusted=yes] http://mirror.example/debian bookworm main"]


def test_the_mirror_is_the_one_named_or_the_hosts_or_the_default(tmp_path: Path) -> None:
    assert debian.mirror_arguments({}, tmp_path) == []
    (tmp_path / "apt/sources.list.d").mkdir(parents=True)
    (tmp_path / "apt/sources.list.d/ubuntu.sources").write_text(DEB822.replace("bookworm", "noble"))
    assert debian.mirror_arguments({}, tmp_path) == []  # another system's packages are of no use
    (tmp_path / "apt/sources.list").write_text(ONE_LINE)
    (tmp_path / "apt/sources.list.d/more.list").write_text("deb http://mirror.example/debian/ bookworm main\n")
    assert debian.mirror_arguments({}, tmp_path) == debian.sources(ONE_LINE)  # once, with its options
    assert debian.mirror_arguments({"FRACTAL_DEBIAN_MIRROR": "http://m.example/debian"}, tmp_path) == [
        "http://m.example/debian"
    ]


def test_what_a_base_leaves_out(tmp_path: Path) -> None:
    keep = ["usr/bin/python3.11", "usr/lib/x86_64-linux-gnu/libc.so.6", "usr/share/zoneinfo/UTC", "var/cache", "dev"]
    drop = ["usr/bin/perl5.36.0", "usr/share/doc/bash/copyright", "var/cache/apt/pkgcache.bin", "etc/apt/sources.list"]
    whole, small = tmp_path / "whole.tar", tmp_path / "small.tar"
    with tarfile.open(whole, "w") as tar:
        for name in [*keep, *drop]:
            entry = tarfile.TarInfo(f"./{name}")
            entry.mode, entry.mtime = 0o6755, 12345
            tar.addfile(entry)
    with tarfile.open(whole) as original, tarfile.open(small, "w") as filtered:
        debian.slim(original, filtered)
    with tarfile.open(small) as tar:
        assert [entry.name.removeprefix("./") for entry in tar] == keep
        assert {(entry.mode, entry.mtime) for entry in tar} == {(0o755, 12345)}


@pytest.mark.parametrize(
    ("events", "failure"),
    [
        ([{"stream": "Step 1/5\n"}, {"aux": {"ID": "sha256:1"}}], None),
        (
            [{"stream": "Step 1/5\n"}, {"error": "no space left on device\nmore", "errorDetail": {}}],
            "no space left on device",
        ),
    ],
)
def test_the_builders_error_is_found(events: list[dict[str, object]], failure: str | None, tmp_path: Path) -> None:
    assert build.follow(events, tmp_path / "log") == failure
    assert (tmp_path / "log").read_text().startswith("Step 1/5\n")


def test_no_engine_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    environ = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/docker.sock"}
    argv = [sys.executable, "-m", "fractal.images.build"]
    done = subprocess.run(argv, cwd=Path(build.__file__).parents[2], env=environ, capture_output=True)
    assert (done.returncode, done.stderr.count(b"\n"), done.stdout) == (3, 1, b"")
    assert b"unset DOCKER_HOST" in done.stderr


@pytest.mark.docker
def test_an_engine_lost_on_the_way_is_our_error(client: docker.DockerClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.api, "base_url", "http+docker://localhost/nowhere")
    with pytest.raises(OutsideError, match=r"The Docker engine failed while making fractal-sandbox:"):
        build.ensure_sandbox_image(client, print)


@pytest.mark.docker
@pytest.mark.usefixtures("clone")
def test_the_image_is_built_once_and_holds_what_it_should(client: docker.DockerClient) -> None:
    judge = source.ROOT / "fractal/sandbox/supervisor.py"
    judge.write_text(f"print('judge {os.getpid()} runs')\n")  # no engine has built this one yet
    said: list[str] = []
    image = build.ensure_sandbox_image(client, said.append)
    try:
        assert image.built
        assert image.base in ("debian:bookworm-slim pulled", f"{debian.base_name()} bootstrapped")
        assert len(said) == 1  # which base, and why
        again = build.ensure_sandbox_image(client, said.append)
        assert (again.built, again.id, again.base, len(said)) == (False, image.id, image.base, 1)
        assert image.size_bytes < 150e6  # 78 MB bootstrapped

        options = {"remove": True, "network_mode": "none", "read_only": True}
        assert client.containers.run(image.name, **options) == f"judge {os.getpid()} runs\n".encode()
        command = '! python3 -m pip 2> /dev/null && [ -z "$(ls /var/lib/apt/lists 2> /dev/null)" ] && ls /sandbox/fractal/sandbox/*/*.pyc'
        inside = client.containers.run(image.name, ["-c", command], entrypoint="sh", **options)
        assert b"/sandbox/__pycache__/supervisor." in inside
    finally:
        client.images.remove(image.name, force=True)


@pytest.mark.docker
def test_a_base_that_cannot_be_had_is_named(
    client: docker.DockerClient, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRACTAL_BASE_IMAGE", "localhost:9/nothing:here")
    (clone / "fractal/sandbox/supervisor.py").write_text("# never built\n")
    with pytest.raises(OutsideError, match=r"FRACTAL_BASE_IMAGE=localhost:9/nothing:here cannot be pulled"):
        build.ensure_sandbox_image(client, print)
