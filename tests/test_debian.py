"""A base from Debian's packages: which mirrors, what is left out, same bytes. Making one is test_images.py's."""

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from fractal.images import debian

DEB822 = """\
# comment
Types: deb
# another
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib

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
deb http://mirror.example/debian bookworm main contrib
deb-src http://mirror.example/debian bookworm main
deb http://mirror.example/debian bookworm-backports main
# deb http://mirror.example/debian bookworm-updates main
deb http://mirror.example/docker/debian bookworm stable
"""


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt")
def test_the_mirror_is_the_one_named_or_the_hosts_own_or_the_default(tmp_path: Path) -> None:
    (tmp_path / "apt.conf").write_text(f'Dir::Etc "{tmp_path}/apt";\n')
    environ = {**os.environ, "APT_CONFIG": str(tmp_path / "apt.conf")}
    environ.pop("FRACTAL_DEBIAN_MIRROR", None)
    (tmp_path / "apt/sources.list.d").mkdir(parents=True)
    assert debian.mirror_arguments(environ) == []
    (tmp_path / "apt/sources.list.d/ubuntu.sources").write_text(DEB822.replace("bookworm", "noble"))
    assert debian.mirror_arguments(environ) == []  # another system's packages are of no use
    (tmp_path / "apt/sources.list").write_text(ONE_LINE)
    mirror = "deb http://mirror.example/debian/ bookworm main"
    assert debian.mirror_arguments(environ) == [mirror]
    (tmp_path / "apt/sources.list.d/debian.sources").write_text(DEB822)
    assert debian.mirror_arguments(environ) == [
        mirror,  # once, though it stands in both
        "deb http://mirror.example/debian/ bookworm-updates main",
        "deb http://mirror.example/debian-security/ bookworm-security main",
    ]
    named = {**environ, "FRACTAL_DEBIAN_MIRROR": "http://m.example/debian"}
    assert debian.mirror_arguments(named) == ["http://m.example/debian"]


@pytest.mark.parametrize(("kind", "kept", "dropped"), [
    ("small", ["usr/bin/python3.11", "usr/lib/x86_64-linux-gnu/libc.so.6", "usr/share/zoneinfo/UTC", "var/cache", "dev"],
     ["usr/bin/perl5.36.0", "usr/share/doc/bash/copyright", "var/cache/apt/pkgcache.bin", "etc/apt/sources.list", "run/x"]),
    ("whole", ["usr/bin/perl5.36.0", "etc/apt/sources.list", "var/lib/dpkg/info/bash.list"], ["usr/share/man/x", "etc/machine-id"]),
])  # fmt: skip
def test_what_a_base_leaves_out(kind: str, kept: list[str], dropped: list[str], tmp_path: Path) -> None:
    made = []
    for day in (50_000_000, 90_000_000):  # when it was made: mmdebstrap writes some files then
        whole, settled = tmp_path / "whole.tar", tmp_path / "settled.tar"
        with tarfile.open(whole, "w") as tar:
            for name in [*kept, *dropped]:
                entry = tarfile.TarInfo(f"./{name}")
                entry.mode, entry.mtime = 0o6755, 12345
                tar.addfile(entry)
            shadow = tarfile.TarInfo("./etc/shadow")
            (tmp_path / "shadow").write_text(f"root:*:{day // 86400}:0:99999:7:::\n")
            shadow.size, shadow.mtime = (tmp_path / "shadow").stat().st_size, day
            tar.addfile(shadow, (tmp_path / "shadow").open("rb"))
        one = debian.KINDS[kind]
        with tarfile.open(whole) as old, tarfile.open(settled, "w", format=tarfile.GNU_FORMAT) as new:
            debian.normalize(old, new, one.left_out, one.modes, day)
        made.append(settled.read_bytes())
        with tarfile.open(settled) as tar:
            names = [entry.name.removeprefix("./") for entry in tar]
            assert names == [*kept, "etc/shadow", *debian.EMPTY]
            entries = [tar.getmember(f"./{name}") for name in kept]
            assert {(entry.mode, entry.mtime) for entry in entries} == {(0o6755 & one.modes, 12345)}
            text = tar.extractfile("./etc/shadow")
            assert text is not None
            assert text.read() == b"root:*::0:99999:7:::\n"
    assert made[0] == made[1]


def test_the_bases_have_names_of_their_own() -> None:
    assert len({kind.name for kind in debian.KINDS.values()}) == 2
    assert all(kind.name.startswith("fractal-base:bookworm-") for kind in debian.KINDS.values())


def test_mmdebstraps_first_error_is_the_reason(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("I: fetching\nErr:1 http://m.example bookworm InRelease\nE: apt-get update failed\n")
    with (tmp_path / "log").open() as log:
        assert debian.reason(log) == "Err:1 http://m.example bookworm InRelease"
    with (tmp_path / "log").open() as log:
        log.seek(0, 2)
        assert debian.reason(log) == "no output"


def test_mmdebstrap_that_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        debian.BootstrapError, match=r"mmdebstrap failed: E: no such suite\. .*FRACTAL_DEBIAN_MIRROR; log: "
    ):
        debian.run(["sh", "-c", "echo I: one; echo E: no such suite; exit 1"], tmp_path / "log")
