"""A base image from Debian's packages alone, for where no registry answers: mmdebstrap, filtered, imported.

Two kinds: `small` for the sandbox, without what Python's standard library does not need (apt, perl, documentation), and
`whole` for the pipeline, on which apt works. Same packages, same bytes: times and order of the files are made the same.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import docker

from fractal.errors import OutsideError
from fractal.images.base_archive import EMPTY, normalize
from fractal.install import apt

SUITE = "bookworm"


@dataclass(frozen=True, slots=True)
class Kind:
    """What goes into a base. `left_out`: paths in the image that are dropped."""

    variant: str  # mmdebstrap's
    packages: tuple[str, ...]
    left_out: str
    modes: int  # of these bits a file keeps its own

    @property
    def name(self) -> str:
        """Name of the base image; changes when what goes into it changes."""
        return f"fractal-base:{SUITE}-{hashlib.sha256(repr((SUITE, self, EMPTY)).encode()).hexdigest()[:8]}"


LISTS = r"var/lib/apt/lists/.|var/cache/apt/.|var/cache/(?!apt$).|(dev|var/log|run|tmp)/.|etc/machine-id$"
DOCS = r"usr/share/(doc|man|info|locale|lintian|bug)/."
KINDS = {
    # tzdata: zoneinfo reads it, and debian:bookworm-slim has it. No interpreter but Python and the shell.
    "small": Kind(
        "essential",
        ("python3", "python3-distutils", "tzdata"),
        rf"{LISTS}|{DOCS}|etc/apt/.|usr/share/perl5?/.|usr/lib/[^/]+/(perl[^/]*|gconv)/.|usr/bin/(perl|localedef)"
        r"|var/lib/apt/(?!lists$).|var/lib/dpkg/info/.",
        0o1777,  # no program changes the user who runs it
    ),
    "whole": Kind("apt", ("ca-certificates", "tzdata"), rf"{LISTS}|{DOCS}", 0o7777),
}
MERGED_USR = Path("/usr/share/mmdebstrap/hooks/merged-usr")  # without it Debian's usrmerge brings 47 MB of perl along
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
BOOTSTRAP_TIMEOUT_S = 900  # 21 s with 2 cores and a near mirror


class BootstrapError(OutsideError):
    """No base image could be made from Debian's packages: one line with the remedy."""


def mirror_arguments(environ: Mapping[str, str]) -> list[str]:
    """Where packages come from: FRACTAL_DEBIAN_MIRROR, else this Debian 12's own sources, else mmdebstrap's default."""
    if mirror := environ.get("FRACTAL_DEBIAN_MIRROR"):
        return [mirror]
    if shutil.which("apt-get") is None:
        return []
    # What apt would download, by the sources in whichever files they stand.
    argv = ["apt-get", "update", "--print-uris"]
    uris = subprocess.run(argv, capture_output=True, text=True, timeout=30, env=environ).stdout
    own = rf"^'(\S*debian\S*/)dists/({SUITE}(?:-updates|-security)?)/main/\S*/Packages"
    sources = [f"deb {uri} {suite} main" for uri, suite in dict.fromkeys(re.findall(own, uris, re.M))]
    return sources if any(f" {SUITE} " in source for source in sources) else []


def network_options() -> list[str]:
    """The host's apt settings about proxies, certificates and retries, for mmdebstrap; the image does not keep them."""
    return [f"--aptopt={line}" for line in apt_settings(r"(https?|Retries)\b")]


def apt_settings(names: str) -> list[str]:
    """The host's apt settings below Acquire, of the names that match; a line of configuration for each."""
    if shutil.which("apt-config") is None:
        return []
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, timeout=30).stdout
    return [line for line in dump.splitlines() if re.match(rf'Acquire::{names}.* "[^"]', line)]


def bootstrap(client: docker.DockerClient, kind: Kind, log: Path) -> str:
    """Make the base image; returns its name. Raises BootstrapError, AptError."""
    if shutil.which("mmdebstrap") is None or not KEYRING.exists():
        if not apt.allowed():
            raise BootstrapError(
                "No registry answers, and mmdebstrap, which makes a base from Debian's packages, is not installed. "
                "Run: sudo apt-get install mmdebstrap debian-archive-keyring; or name a base with --base."
            )
        apt.install("mmdebstrap", "debian-archive-keyring", log=log)
    hook = [f"--hook-dir={MERGED_USR}"] if MERGED_USR.is_dir() else []
    packages = [*kind.packages, "usr-is-merged"] if hook else [*kind.packages]
    repository, tag = kind.name.split(":")
    with tempfile.TemporaryDirectory(prefix="fractal-base-") as folder:
        whole, filtered = Path(folder, "whole.tar"), Path(folder, "filtered.tar")
        argv = ["mmdebstrap", f"--variant={kind.variant}", f"--include={','.join(packages)}", *hook, *network_options()]
        start = int(time.time())
        mirrors = mirror_arguments(os.environ)
        run([*argv, SUITE, str(whole), *mirrors], log)
        with tarfile.open(whole) as old, tarfile.open(filtered, "w", format=tarfile.GNU_FORMAT) as new:
            normalize(old, new, left_out(kind, own_sources=bool(mirrors)), kind.modes, start)
        reply = str(client.api.import_image(src=str(filtered), repository=repository, tag=tag))
        if '"error"' in reply:
            raise BootstrapError(f"The engine does not take the base image: {reply.strip()[-300:]}")
    return kind.name


def left_out(kind: Kind, *, own_sources: bool) -> str:
    """The pattern of what a base does not keep: options of mmdebstrap, and mirrors, which reach builds as a secret."""
    return rf"{kind.left_out}|etc/apt/apt\.conf\.d/99mmdebstrap" + r"|etc/apt/sources\.list" * own_sources


def run(argv: list[str], log: Path) -> None:
    """Run mmdebstrap to its end; ended early, it gets the time to unmount. Raises BootstrapError."""
    with log.open("a+") as out:
        out.write(f"$ {argv}\n")
        out.flush()
        offset = out.tell()
        # A session of its own: a Ctrl-C reaches it once, from us, and it cleans up.
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        try:
            code = child.wait(BOOTSTRAP_TIMEOUT_S)
        except BaseException as error:
            child.terminate()
            child.wait(60)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BootstrapError(f"mmdebstrap does not end after {BOOTSTRAP_TIMEOUT_S} s. Look at {log}") from error
            raise
        out.seek(offset)
        if code:
            raise BootstrapError(
                f"mmdebstrap failed: {reason(out)}. Check that Debian's mirror can be reached, or name another one "
                f"with FRACTAL_DEBIAN_MIRROR; log: {log}"
            )


def reason(output: IO[str]) -> str:
    """The first error in mmdebstrap's output: the later ones follow from it."""
    lines = [line.strip() for line in output if line.strip()]
    return next((line for line in lines if line.startswith(("E:", "Err:"))), (lines or ["no output"])[-1])[:300]
