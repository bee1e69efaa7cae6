"""Images with more Python packages: `--packages numpy==2.3.5,pandas==2.3.3` for the programs in a sandbox, `--package`
for a user's command in the pipeline's image, whose own packages keep their versions.

What is asked for is resolved once, by uv, with hashes and for wheels alone, and locked in the user's cache. The lock is
part of the image, whose name follows from its content: asked for again, nothing is resolved and nothing built.
Closed networks: pip's settings, FRACTAL_WHEELS and FRACTAL_CA, as for every build (network.py).
"""

import os
import re
import subprocess
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import platformdirs
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.images import lock, network, recipes
from fractal.images.build_errors import without_passwords
from fractal.images.recipes import Recipe
from fractal.install import docker_engine, setup
from fractal.jsonl import write_whole
from fractal.sandbox.host import engine
from fractal.sandbox.host.source import content_hash

LOCK = "packages.lock"
GLIBC = "manylinux_2_28"  # of wheels; the image's Debian 12 has 2.36


class PackagesError(OutsideError):
    """There is no image with these packages: one line with the remedy."""


class Target(NamedTuple):
    """What packages are resolved for."""

    machine: str  # processor, as wheels name it
    option: str = "--packages"  # that asked for them
    python: str = "3.11"
    constraints: tuple[Path, ...] = ()  # requirements files that bound versions, and
    overrides: tuple[Path, ...] = ()  # that replace what other packages ask for
    present: tuple[str, ...] = ()  # packages that are there, and not locked again
    without: tuple[str, ...] = ()  # packages that are left out, with what only they need


def image_for(text: str) -> str:
    """The name of the sandbox image with these packages; locked and built if it is not there.

    Raises InputError for what is not pinned, PackagesError, BuildError.
    """
    packages = parse(text)
    found = recipe(packages, lock_file(packages, Target(_machine())))
    try:
        engine.image(found.name)
    except (engine.RequestError, OSError):  # to be built; what is wrong with the engine, build says
        from fractal.images import build, docker_client

        with closing(docker_client.connect()) as client:
            build.ensure(client, found, console.note)
    return found.name


def parse(text: str, option: str = "--packages") -> tuple[str, ...]:
    """NAME==VERSION, several with commas, sorted and with canonical names. Raises InputError for anything else."""
    found: dict[str, str] = {}
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise InputError(f"{option} {text!r}: names no package. Write NAME==VERSION, several with commas.")
    for word in words:
        shown = without_passwords(word)
        if word.startswith("-"):
            raise InputError(f"{option}: {shown} is an option. Write NAME==VERSION; indexes belong in pip's settings.")
        try:
            requirement = Requirement(word)
        except InvalidRequirement:
            raise InputError(f"{option}: {shown} is not NAME==VERSION. Write one, such as numpy==2.3.5.") from None
        name = canonicalize_name(requirement.name)
        if requirement.url or requirement.marker:
            raise InputError(f"{option}: {shown} has a URL or a marker. Write {name}==VERSION.")
        pins = list(requirement.specifier)
        if len(pins) != 1 or pins[0].operator != "==" or not _is_version(pins[0].version):
            raise InputError(f"{option}: {shown} is not pinned. Write {name}==VERSION.")
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        pinned = f"{name}{extras}=={pins[0].version}"
        if found.setdefault(name, pinned) != pinned:
            raise InputError(f"{option}: {name} stands twice. Name one version.")
    return tuple(sorted(found.values()))


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def recipe(packages: tuple[str, ...], locked: Path) -> Recipe:
    """The sandbox's image with the packages of a lock file, those that were asked for loaded before any program."""
    return Recipe("sandbox-packages", recipes.sandbox(packages, locked), "", True, packages=packages)


def pipeline_recipe(key: str, packages: tuple[str, ...], processor: str) -> Recipe:
    """The pipeline's image of this key with what it lacks of these packages, and of what they need, as a layer more.

    `processor`: as Docker names it. Raises InputError for another version of a package that the image has,
    PackagesError.
    """
    (pipeline,) = recipes.choose(key, processor)
    assert pipeline.accelerator is not None
    has = versions(pipeline.accelerator, recipes.MACHINES[processor])
    lacking = []
    for package in packages:
        name, _, version = package.partition("==")
        if (present := has.get(canonicalize_name(name.partition("[")[0]))) is None:
            lacking.append(package)
        elif Version(present) != Version(version):
            raise InputError(f"--package={package}: the image has {present}, which the rest of it needs. Leave it out.")
    if not lacking:
        return pipeline
    target = Target(
        recipes.MACHINES[processor],
        "--package",
        recipes.PYTHON[pipeline.accelerator],
        constraints=tuple(recipes.ROOT / name for name in recipes.LOCKS[pipeline.accelerator]),
        overrides=(recipes.ROOT / f"docker/{pipeline.accelerator}.overrides.txt",),
        present=tuple(sorted(has)),
        without=("torch",) if pipeline.accelerator == "cpu" else (),  # the image's build of it is not on PyPI
    )
    image = recipes.pipeline(pipeline.accelerator, lock_file(tuple(lacking), target))
    return replace(pipeline, key=f"{key}-packages", image=image, packages=packages)


def versions(accelerator: Literal["cuda", "cpu"], machine: str) -> dict[str, str]:
    """The versions of the Python packages in the pipeline's image, by canonical names."""
    python = recipes.PYTHON[accelerator]
    here = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine}
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    found = {"torch": setup.TORCH[accelerator]}
    for path in recipes.LOCKS[accelerator]:
        for text in lock.split_requirements((recipes.ROOT / path).read_text()):
            requirement = Requirement(text.partition("\\")[0])
            if requirement.marker is None or requirement.marker.evaluate({**here, **linux}):
                (pin,) = requirement.specifier
                found[canonicalize_name(requirement.name)] = pin.version
    return found


def lock_file(packages: tuple[str, ...], target: Target) -> Path:
    """The lock of these packages, resolved if it has not been before. Raises PackagesError."""
    facts = {"packages": "\n".join(packages).encode(), "machine": target.machine.encode()}
    if files := (*target.constraints, *target.overrides):
        facts |= {"python": target.python.encode(), **{path.name: path.read_bytes() for path in files}}
    path = platformdirs.user_cache_path("fractal") / "packages" / content_hash(facts)[:16] / LOCK
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with console.activity(f"packages: {', '.join(packages)}"):
            write_whole(path, resolve(packages, target).encode())
    return path


def _machine() -> str:
    """The engine's processor, as wheels name it. Raises PackagesError."""
    try:
        machine = str(engine.request("GET", "/info").get("Architecture"))
    except (engine.RequestError, OSError) as error:
        raise PackagesError(docker_engine.problem() or f"--packages: the Docker engine fails: {error}.") from error
    return recipes.MACHINES.get(machine, machine)


def resolve(packages: tuple[str, ...], target: Target) -> str:
    """Everything that these packages need, with versions and hashes. Raises PackagesError with uv's reason."""
    asked = f"{target.option} {','.join(packages)}"
    with tempfile.TemporaryDirectory(prefix="fractal-packages-") as name:
        folder = Path(name)
        source, out, without = folder / "packages.in", folder / "packages.txt", folder / "without.txt"
        source.write_text("\n".join(packages) + "\n")
        without.write_text("".join(f"{name}; python_version < '3'\n" for name in target.without))  # never true
        options = ["--only-binary", ":all:", "--python-version", target.python]
        options += ["--python-platform", f"{target.machine}-{GLIBC}"]
        options += [word for path in target.constraints for word in ("--constraint", str(path))]
        options += [word for path in (*target.overrides, without) for word in ("--override", str(path))]
        options += [word for name in target.present for word in ("--no-emit-package", name)]
        settings, environment = _network()
        command = [lock.install_uv(folder), "pip", "compile", *options, *lock.OUTPUT_OPTIONS, *settings]
        command += [str(source), "-o", str(out)]
        variables = {**os.environ, **environment}
        try:
            done = subprocess.run(
                command, cwd=folder, env=variables, capture_output=True, text=True, timeout=lock.UV_TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PackagesError(f"{asked}: uv failed: {error}. Check the network.") from error
        if done.returncode:
            raise PackagesError(f"{asked}: {_reason(done.stderr, target)}")
        return out.read_text()


def _network() -> tuple[list[str], dict[str, str]]:
    """uv's options and environment for this machine's network."""
    pip = network.pip_settings()
    folders = [os.environ["FRACTAL_WHEELS"]] if os.environ.get("FRACTAL_WHEELS") else pip.get("find-links", "").split()
    options = [word for folder in folders for word in ("--find-links", folder)]
    # A folder that serves as an index, as file:///..., holds this machine's wheels: uv takes what it lists first.
    environment = {
        uv: " ".join(word for word in pip[name].split() if not word.startswith(("file:", "/")))
        for name, uv in network.UV_NAMES.items()
        if name in pip
    }
    if bundle := os.environ.get("FRACTAL_CA") or os.environ.get("SSL_CERT_FILE") or pip.get("cert"):
        environment["SSL_CERT_FILE"] = bundle
    return options, {name: value for name, value in environment.items() if value}


def _reason(output: str, target: Target) -> str:
    """One line of what uv says, with what to do."""
    text = " ".join(without_passwords(output).split())
    if match := re.search(r"there is no version of (\S+==\S+?),? and|there are no versions of (\S+)", text):
        return f"no index has {match[1] or match[2]} for Python {target.python}. Check name and version."
    if match := re.search(r"(\S+) was not found in the package registry", text):
        return f"no index has a package {match[1]}. Check its name."
    if match := re.search(r"Because (\S+) has no usable wheels", text):
        return f"{match[1]} has no wheel, and nothing is compiled. Name another version, or FRACTAL_WHEELS."
    if target.present and "No solution found" in text:
        named = [name for name in target.present if re.search(rf"\b{re.escape(name)}(?:{{[^}}]*}})?==", text)]
        return f"it needs other versions than the image has of: {', '.join(named) or 'its packages'}. Try a newer one."
    reason = text.removeprefix("error: ")[:400].rstrip(".")
    return f"{reason}. Check versions and network."
