"""A registry's program for hosts that cannot pull one: Debian's docker-registry with the libraries that it needs.

It is packed as a root file system for `docker import`: no image of it is left in the local engine.
"""

import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import platformdirs

from fractal.errors import OutsideError
from fractal.install import apt
from fractal.jsonl import write_whole

PACKAGE = "docker-registry"
PROGRAM = "usr/bin/docker-registry"
CONFIG = """\
version: 0.1
storage: {filesystem: {rootdirectory: /var/lib/registry}}
http: {addr: ":5000"}
"""  # volume and port as in the public image registry:2
CHANGES = ('ENTRYPOINT ["/registry"]', 'CMD ["serve", "/config.yml"]')  # of `docker import`


class RegistryProgramError(OutsideError):
    """The program cannot be packed here: one line."""


def unpack_program(folder: Path) -> Path:
    """Download Debian's docker-registry into a folder without installing it; its path. Raises RegistryProgramError."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise RegistryProgramError("a registry's program comes from a Debian package, and this is no Debian or Ubuntu")
    download = ["apt-get", "download", "-q", PACKAGE]
    failure = _run(download, folder)
    if failure and apt.allowed():  # the package lists were perhaps never downloaded
        _run(["apt-get", "update", "-q"], folder)
        failure = _run(download, folder)
    packages = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    failure = failure or (None if packages else "no package came")
    failure = failure or _run(["dpkg-deb", "-x", str(packages[0]), "."], folder)
    if failure:
        raise RegistryProgramError(f"Debian's package {PACKAGE} cannot be had: {failure}")
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


def image_name(architecture: str) -> str:
    """The name of the program's image on a remote host; it changes with what the image is made of."""
    recipe = repr((PACKAGE, CONFIG, CHANGES, architecture))
    return f"fractal-registry:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def archive(architecture: str) -> Path:
    """The program's root file system as .tar.gz, made once on this machine. Raises RegistryProgramError."""
    stem = image_name(architecture).replace(":", "-")
    path = platformdirs.user_cache_path("fractal") / "images" / f"{stem}.tar.gz"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(prefix="fractal-registry-") as folder:
        program = unpack_program(Path(folder))
        own = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True).stdout.strip()
        if own != architecture:
            raise RegistryProgramError(f"Debian's package {PACKAGE} here is for {own}, the host is {architecture}")
        needed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, timeout=30).stdout
        libraries = [Path(path) for path in re.findall(r"(?:=>|^\s*)\s*(/\S+)", needed, re.M)]
        write_whole(path, pack(program, libraries))
    return path


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
