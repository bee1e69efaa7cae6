"""Builds images: chooses a base, hands over context and secrets, names the result by its content.

`python -m fractal.images.build [IMAGE]` prints one line. The base is the recipe's, pulled, where a registry answers;
else one made here from Debian's packages; the image's label fractal.base tells which. Closed networks: network.py.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import docker
import docker.errors
import filelock
import platformdirs
import requests

from fractal.console import note, report_errors
from fractal.images import buildkit, debian, image_config, network, recipes
from fractal.images.build_errors import DISK_FULL, BuildError, is_disk_full
from fractal.images.docker_client import Say, connect, first_line, has_image, pull, remove_unused
from fractal.images.recipes import Recipe
from fractal.images.rendering import Rendering
from fractal.install import apt, docker_engine
from fractal.sandbox.host.container import PACKAGES_LABEL

BASE_LABEL, PARTS_LABEL = "fractal.base", "fractal.parts"
BOOTSTRAPPED = "bootstrapped"  # how a base's origin ends that was made here from Debian's packages
OTHER_BASE = "Load it, or name another one with --base."
LOCK_TIMEOUT_S = 3600  # for another process that builds the same image
BINFMT = Path("/proc/sys/fs/binfmt_misc")  # which programs run those of other processors


@dataclass(frozen=True, slots=True)
class Options:
    """How to build, for closed networks; what is not given is read from this machine's settings."""

    base: str | None = None  # an image instead of the recipe's base
    ca: Path | None = None  # certificates, PEM
    wheels: Path | None = None  # a folder of wheels
    no_cache: bool = False


@dataclass(frozen=True, slots=True)
class Builder:
    """What builds images for an engine. As it stands: this machine."""

    build: Callable[[buildkit.BuildRequest, str, Path], tuple[str, int]]  # returns the image's id, and steps run
    bootstrap: Callable[[debian.Kind, Path], str]  # makes a base of this kind; its name
    host: str = ""  # where, if not here
    cache: str = ""  # a registry's repository there that keeps layers


def local_builder(client: docker.DockerClient) -> Builder:
    """Builds with a docker command of this machine. Raises BuildError where there is none that can."""
    command = buildkit.find_command()
    return Builder(
        lambda request, name, log: buildkit.build(command, request, name, log),
        lambda kind, log: debian.bootstrap(client, kind, log),
    )


@dataclass(frozen=True, slots=True)
class Built:
    """An image that the engine has."""

    name: str  # repository:tag
    digest: str  # "sha256:...", of its configuration: the image's id
    base: str  # where its base came from: "debian:bookworm-slim pulled", "... bootstrapped", "... given"
    bytes: int
    built: bool  # by this call
    layers_built: int  # steps that were run, not taken from the builder's cache
    seconds: float

    def as_json(self) -> str:
        """One line for programs."""
        fields = {"image": self.name, "digest": self.digest, "built": self.built, "layers_built": self.layers_built,
                  "bytes": self.bytes, "seconds": round(self.seconds, 3), "base": self.base}  # fmt: skip
        return json.dumps(fields)


def ensure_sandbox_image(client: docker.DockerClient, say: Say) -> Built:
    """The sandbox's image of the present sources; built if the engine does not have it."""
    (recipe,) = recipes.choose("sandbox")
    return ensure(client, recipe, say)


def ensure(
    client: docker.DockerClient,
    recipe: Recipe,
    say: Say,
    options: Options | None = None,
    builder: Builder | None = None,
) -> Built:
    """The recipe's image; built if the engine does not have it, by `builder`, or by this machine.

    Raises BuildError or InputError.
    """
    start = time.monotonic()
    options = options or Options()
    name = recipe.name
    host = builder.host if builder else ""
    try:
        if present := existing(client, recipe, name, options, start):
            return present
        folder = platformdirs.user_cache_path("fractal") / "images"
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{name.replace(':', '-')}.log"
        with build_lock(folder / f"{recipe.key}{host and '-'}{host}.lock", name, say):
            if present := existing(client, recipe, name, options, start):  # built by another process meanwhile
                return present
            log.write_text("")
            return build(client, builder or local_builder(client), recipe, name, say, options, log, start)
    except apt.AptError as error:
        raise BuildError(str(error)) from error
    except (docker.errors.DockerException, requests.RequestException) as error:
        if is_disk_full(str(error)):
            raise BuildError(f"Making {name}: {DISK_FULL}") from error
        remedy = (None if host else docker_engine.problem()) or "Run the command again."
        engine = f"The Docker engine of {host}" if host else "The Docker engine"
        raise BuildError(f"{engine} failed while making {name}: {first_line(error)}. {remedy}") from error
    except OSError as error:
        raise BuildError(f"Cannot make {name}: {error}. Mend that and run the command again.") from error


def build(
    client: docker.DockerClient,
    builder: Builder,
    recipe: Recipe,
    name: str,
    say: Say,
    options: Options,
    log: Path,
    start: float,
) -> Built:
    """Build, pin the configuration, and only then give the image its name. `start`: a time of time.monotonic()."""
    platform = foreign_platform(client, recipe, builder.host)
    if platform:  # the builder pulls it itself: the engine's own tag may name the one of another processor
        given = given_base(recipe, options.base)
        base = Base(given or recipe.image.base, f"{given or recipe.image.base} {'given' if given else 'pulled'}")
    else:
        base = choose_base(client, recipe, options.base, say, log, builder)
    settings = network.Network()
    bootstrapped = base.origin.endswith(BOOTSTRAPPED)
    if not bootstrapped or recipe.with_apt:  # the small base has all that the sandbox needs
        by_mirror = recipe.image.base.startswith("debian:") and "FRACTAL_DEBIAN_MIRROR" in os.environ
        own_sources = bootstrapped or by_mirror
        settings = network.of_this_machine(sources=own_sources, ca=options.ca, wheels=options.wheels)
    wheels = network.import_wheels(client, settings.wheels, recipe.image) if settings.wheels else None
    rendering = Rendering(settings=bool(settings.secrets), wheels=wheels)
    labels = {BASE_LABEL: base.origin, PARTS_LABEL: json.dumps(recipe.image.parts())}
    if recipe.packages:
        labels[PACKAGES_LABEL] = ",".join(recipe.packages)
    cache = f"{builder.cache}:{recipe.key}-{recipe.processor}" if builder.cache else ""
    request = buildkit.BuildRequest(
        recipe.image, rendering, base.name, labels, settings.secrets, options.no_cache, platform, cache
    )
    try:
        image_id, steps = builder.build(request, name, log)
        if cache:  # as the builder made it, it tells later builds which layers it has; the pinned one does not
            client.api.tag(image_id, builder.cache, cache.rpartition(":")[2])
        image_config.pin(client, image_id, name)
        image = client.images.get(name)
    finally:
        if wheels is not None and not builder.host:  # there, the next build would have to be sent them again
            remove_unused(client, wheels)
    return Built(name, image.id, base.origin, image.attrs["Size"], True, steps, time.monotonic() - start)


def foreign_platform(client: docker.DockerClient, recipe: Recipe, host: str) -> str:
    """What `docker build --platform` is given: "" for the engine's own processor. Raises BuildError for one that the
    engine cannot emulate.
    """
    own = str(client.version()["Arch"])
    if recipe.processor == own:
        return ""
    processors = recipes.PROCESSORS
    wanted, has = processors.get(recipe.processor, recipe.processor), processors.get(own, own)
    if host:
        raise BuildError(f"{recipe.name} is for {wanted}, and {host} has {has}. Leave --for out, or build --on=here.")
    emulator = f"qemu-{recipes.MACHINES[recipe.processor]}" if recipe.processor in recipes.MACHINES else ""
    # Docker's engines for other systems bring an emulator; on Linux the kernel says whether there is one.
    if sys.platform == "linux" and not any(BINFMT.glob(f"*{emulator}*")):
        raise BuildError(
            f"{recipe.name} is for {wanted}, this machine has {has} and no emulator for that. Build it on an instance "
            "that has one: --on=there; or, slow, run: apt-get install qemu-user-static binfmt-support."
        )
    return f"linux/{recipe.processor}"


def existing(client: docker.DockerClient, recipe: Recipe, name: str, options: Options, start: float) -> Built | None:
    """The image, if the engine has it on the base that is wanted and nothing forces a build."""
    if options.no_cache or recipe.image.forced:
        return None
    try:
        image = client.images.get(name)
    except docker.errors.ImageNotFound:
        return None
    origin = image.labels.get(BASE_LABEL, "unknown")
    wanted = given_base(recipe, options.base)
    if wanted and origin != f"{wanted} given":
        return None
    return Built(name, image.id, origin, image.attrs["Size"], False, 0, time.monotonic() - start)


def build_lock(path: Path, name: str, say: Say) -> AbstractContextManager[object]:
    """Of two builds of one image at once, the second waits and takes what the first has made."""
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"another process builds {name.partition(':')[0]}, waiting for it")
    try:
        return lock.acquire(timeout=LOCK_TIMEOUT_S)
    except filelock.Timeout as error:
        raise BuildError(
            f"Another process has been building {name} for {LOCK_TIMEOUT_S} s. End it, then run again."
        ) from error


class Base(NamedTuple):
    name: str  # "" for an image that brings its own
    origin: str  # as in the image's label fractal.base


def given_base(recipe: Recipe, option: str | None) -> str | None:
    """The base that --base or the environment names."""
    if not recipe.image.base:
        return None
    variable = "FRACTAL_CUDA_BASE_IMAGE" if recipe.image.base.startswith("nvidia/") else "FRACTAL_BASE_IMAGE"
    return option or os.environ.get(variable)


def choose_base(
    client: docker.DockerClient,
    recipe: Recipe,
    option: str | None,
    say: Say,
    log: Path,
    builder: Builder | None = None,
) -> Base:
    """The base to build on, pulled or made if need be; reports which and why. Raises BuildError, BootstrapError."""
    public = recipe.image.base
    if not public:
        return Base("", "of its own")

    def chosen(name: str, how: str, why: str) -> Base:
        say(f"{recipe.key}: building on {name}, {why}")
        return Base(name, f"{name} {how}")

    if given := given_base(recipe, option):
        if not has_image(client, given) and (failure := pull(client, given)):
            raise BuildError(f"The base {given} cannot be pulled: {failure}. {OTHER_BASE}")
        return chosen(given, "given", "as asked for")
    if has_image(client, public):
        return chosen(public, "pulled", "which the engine has")
    replaceable = public.partition("@")[0] in recipes.BASE.values()  # by one made here: our own bases alone
    kind = debian.KINDS["whole" if recipe.with_apt else "small"]
    if replaceable and has_image(client, kind.name):
        return chosen(kind.name, BOOTSTRAPPED, "made earlier from Debian's packages")
    if not (failure := pull(client, public)):
        return chosen(public, "pulled", "pulled from a registry")
    if not replaceable:
        raise BuildError(f"The base {public} cannot be pulled: {failure}. {OTHER_BASE}")
    whom = (builder and builder.host) or "us"
    say(f"{recipe.key}: no registry gives {whom} {public} ({failure}): a base of Debian's packages is made")
    made = builder.bootstrap(kind, log) if builder else debian.bootstrap(client, kind, log)
    return Base(made, f"{kind.name} {BOOTSTRAPPED}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fractal.images.build", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", nargs="?", default="sandbox", help=f"{', '.join(recipes.RECIPES)}, several, or all")
    parser.add_argument("--json", action="store_true", help="a JSON object for each image on standard output")
    parser.add_argument("--base", help="an image to build on instead of the recipe's")
    parser.add_argument(
        "--ca", type=Path, help="your network's certificates (PEM); a secret of the build, never in a layer"
    )
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to take packages from first")
    parser.add_argument("--no-cache", action="store_true", help="build every layer anew")
    given = parser.parse_args(argv)
    options = Options(given.base, given.ca, given.wheels, given.no_cache)
    return report_errors(lambda: build_all(given.image, options, as_json=given.json))


def build_all(
    keys: str, options: Options, *, processor: str = recipes.NATIVE, as_json: bool = False, dry: bool = False
) -> None:
    """Build images one after the other and print a line for each. Raises InputError, BuildError."""
    chosen = recipes.choose(keys, processor)
    if dry:
        for recipe in chosen:
            print(f"image: would build {recipe.name}, if the engine does not have it")
        return
    with closing(connect()) as client:
        for recipe in chosen:
            show(ensure(client, recipe, note, options), as_json=as_json)


def show(image: Built, *, host: str = "", as_json: bool = False) -> None:
    """Print a line about an image that is now here, or on the host."""
    if as_json:
        print(image.as_json(), flush=True)
        return
    on = f"on {host}" if host else ""
    done = f"built {on}{' ' * bool(on)}in {image.seconds:.0f} s, {image.layers_built} steps run"
    done = done if image.built else f"is {on or 'there'}"
    print(f"image: {image.name} {done}, {image.bytes / 1e6:,.0f} MB, base {image.base}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
