"""Builds images: finds a builder and a base, hands over context and secrets, names the result by its content.

`python -m fractal.images.build [IMAGE]` prints one line. An image whose name the engine has is not built again. The
base is the recipe's, pulled, where a registry answers; else one made here from Debian's packages; the image's label
fractal.base tells which. Closed networks: network.py.
"""

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import docker
import docker.errors
import filelock
import platformdirs
import requests

from fractal.console import note, report_errors
from fractal.images import debian, network, recipes
from fractal.images.builder import (
    SILENCE_S,
    BuildError,
    Request,
    build_by_api,
    build_by_cli,
    check_machine,
    disk_full,
    find_builder,
)
from fractal.images.image import Image
from fractal.images.recipes import Recipe
from fractal.images.rendering import Rendering
from fractal.install import apt, docker_engine
from fractal.sandbox.host.source import content_hash

BASE_LABEL, PARTS_LABEL = "fractal.base", "fractal.parts"
REGISTRY_TIMEOUT_S = 8  # a public registry answers in about one
LOCK_TIMEOUT_S = 3600  # for another process that builds the same image
EPOCH = "1970-01-01T00:00:00Z"
CONFIG = ("User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Healthcheck", "Volumes", "WorkingDir", "Labels",
          "OnBuild", "StopSignal", "Shell")  # fmt: skip

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How to build, for closed networks; what is not given is found on this machine."""

    base: str | None = None  # an image instead of the recipe's base
    ca: Path | None = None  # certificates, PEM
    wheels: Path | None = None  # a folder of wheels
    no_cache: bool = False


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


class Base(NamedTuple):
    name: str
    origin: str  # the label's text
    made_here: bool  # from Debian's packages


def connect() -> docker.DockerClient:
    """A client of the engine that set-up found. Raises BuildError with the remedy if none answers."""
    try:
        return docker.from_env(timeout=SILENCE_S, use_ssh_client=True)
    except docker.errors.DockerException as error:
        raise BuildError(
            docker_engine.problem() or f"The Docker engine at {docker_engine.address()} refuses: {error}."
        ) from error


def ensure_sandbox_image(client: docker.DockerClient, say: Say) -> Built:
    """The sandbox's image of the present sources; built if the engine does not have it."""
    (recipe,) = recipes.choose("sandbox")
    return ensure(client, recipe, say)


def ensure(client: docker.DockerClient, recipe: Recipe, say: Say, options: Options | None = None) -> Built:
    """The recipe's image; built if the engine does not have it. Raises BuildError or InputError."""
    begun = time.monotonic()
    options = options or Options()
    name = recipe.name
    try:
        if found := existing(client, recipe, name, options, begun):
            return found
        folder = platformdirs.user_cache_path("fractal") / "images"
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{name.replace(':', '-')}.log"
        with only_one(folder / f"{recipe.key}.lock", name, say):
            if found := existing(client, recipe, name, options, begun):  # by a process that we waited for
                return found
            log.write_text("")
            return make(client, recipe, name, say, options, log, begun)
    except apt.AptError as error:
        raise BuildError(str(error)) from error
    except (docker.errors.DockerException, requests.RequestException) as error:
        if full := disk_full(str(error)):
            raise BuildError(f"Making {name}: {full}") from error
        remedy = docker_engine.problem() or "Run the command again."
        raise BuildError(f"The Docker engine failed while making {name}: {first_line(error)}. {remedy}") from error
    except OSError as error:
        raise BuildError(f"Cannot make {name}: {error}. Mend that and run the command again.") from error


def make(
    client: docker.DockerClient, recipe: Recipe, name: str, say: Say, options: Options, log: Path, begun: float
) -> Built:
    """Build, give it the one configuration that its content asks for, and only then its name."""
    check_machine(client)
    base = choose_base(client, recipe, options, say, log)
    settings = network.Network()
    if not base.made_here or recipe.with_apt:  # the small base has all that the sandbox needs
        own_sources = base.made_here or (
            recipe.image.base.startswith("debian:") and "FRACTAL_DEBIAN_MIRROR" in os.environ
        )
        settings = network.of_this_machine(sources=own_sources, ca=options.ca, wheels=options.wheels)
    builder = find_builder(client)
    if builder.command is None:
        if settings.secrets:
            raise BuildError(
                f"{name} cannot be built: this network's settings have to stay out of it, and {builder.why_not}"
            )
        say(f"{builder.why_not} The engine's old builder makes {name}.")
    wheels = import_wheels(client, settings.wheels, recipe.image) if builder.command else None
    rendering = Rendering(mounts=builder.command is not None, settings=bool(settings.secrets), wheels=wheels)
    labels = {BASE_LABEL: base.origin, PARTS_LABEL: json.dumps(recipe.image.parts())}
    request = Request(recipe.image, rendering, base.name, labels, settings.secrets, options.no_cache)
    try:
        if builder.command:
            made, steps = build_by_cli(builder.command, request, name, log)
        else:
            made, steps = build_by_api(client, request, name, log)
        pin(client, made, name)
        image = client.images.get(name)
    finally:
        if wheels is not None:
            discard(client, wheels)
    return Built(name, image.id, base.origin, image.attrs["Size"], True, steps, time.monotonic() - begun)


def existing(client: docker.DockerClient, recipe: Recipe, name: str, options: Options, begun: float) -> Built | None:
    """The image, if the engine has it on the base that is wanted and nothing forces a build."""
    if options.no_cache or recipe.image.forced:
        return None
    try:
        image = client.images.get(name)
    except docker.errors.ImageNotFound:
        return None
    origin = image.labels.get(BASE_LABEL, "unknown")
    wanted = given_base(recipe, options)
    if wanted and origin != f"{wanted} given":
        return None
    return Built(name, image.id, origin, image.attrs["Size"], False, 0, time.monotonic() - begun)


@contextmanager
def only_one(path: Path, name: str, say: Say) -> Iterator[None]:
    """Of two builds of one image at once, the second waits and takes what the first has made."""
    lock = filelock.FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"another process builds {name.partition(':')[0]}, waiting for it")
            lock.acquire(timeout=LOCK_TIMEOUT_S)
    except filelock.Timeout as error:
        raise BuildError(
            f"Another process has been building {name} for {LOCK_TIMEOUT_S} s. End it, then run again."
        ) from error
    try:
        yield
    finally:
        lock.release()


# --- the base


def given_base(recipe: Recipe, options: Options) -> str | None:
    """The base that an option or the environment names."""
    if not recipe.image.base:
        return None
    variable = "FRACTAL_CUDA_BASE_IMAGE" if recipe.image.base.startswith("nvidia/") else "FRACTAL_BASE_IMAGE"
    return options.base or os.environ.get(variable)


def choose_base(client: docker.DockerClient, recipe: Recipe, options: Options, say: Say, log: Path) -> Base:
    """The base to build on, fetched or made if need be; says which and why. Raises BuildError, BootstrapError."""
    public = recipe.image.base
    if not public:
        return Base("", "of its own", False)
    if given := given_base(recipe, options):
        if not has(client, given) and (failure := pull(client, given)):
            raise BuildError(f"The base {given} cannot be pulled: {failure}. Load it, or name another one with --base.")
        say(f"{recipe.key}: building on {given}, as asked for")
        return Base(given, f"{given} given", False)
    if has(client, public):
        say(f"{recipe.key}: building on {public}, which the engine has")
        return Base(public, f"{public} pulled", False)
    kind = debian.KINDS["whole" if recipe.with_apt else "small"]
    replaceable = public.partition("@")[0] in recipes.BASE.values()  # what a user's own image stands on is not
    if replaceable and has(client, kind.name):
        say(f"{recipe.key}: building on {kind.name}, made here earlier from Debian's packages")
        return Base(kind.name, f"{kind.name} bootstrapped", True)
    failure = pull(client, public)
    if failure is None:
        say(f"{recipe.key}: building on {public}, pulled from a registry")
        return Base(public, f"{public} pulled", False)
    if not replaceable:
        raise BuildError(f"The base {public} cannot be pulled: {failure}. Load it, or name another one with --base.")
    say(f"{recipe.key}: no registry gives us {public} ({failure}): making a base from Debian's packages, half a minute")
    return Base(debian.bootstrap(client, kind, log), f"{kind.name} bootstrapped", True)


def has(client: docker.DockerClient, name: str) -> bool:
    try:
        client.images.get(name)
    except docker.errors.ImageNotFound:
        return False
    return True


def pull(client: docker.DockerClient, name: str) -> str | None:
    """None, or why the image could not be pulled. A registry that is silent costs REGISTRY_TIMEOUT_S."""
    try:
        with patience(client, REGISTRY_TIMEOUT_S):
            client.api.inspect_distribution(name)
        client.images.pull(name)
    except requests.Timeout:
        return f"no answer in {REGISTRY_TIMEOUT_S} s"
    except docker.errors.APIError as error:
        return ": ".join(first_line(error).split(": ")[-2:])  # Go wraps errors from the outside in
    return None


@contextmanager
def patience(client: docker.DockerClient, seconds: float) -> Iterator[None]:
    """Another deadline for the client's requests."""
    before, client.api.timeout = client.api.timeout, seconds
    try:
        yield
    finally:
        client.api.timeout = before


def first_line(error: Exception) -> str:
    """What an engine's error says, without the HTTP around it."""
    text = str(getattr(error, "explanation", None) or error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")


# --- after the build


def pin(client: docker.DockerClient, made: str, name: str) -> None:
    """Give an image the configuration that its content alone decides, without the time of the build; and its name.

    The image is loaded again from its configuration alone: the engine has its layers. Where the engine does not take
    that (containerd's store), the image keeps what the builder wrote; buildx has heard SOURCE_DATE_EPOCH.
    """
    image = client.images.get(made)
    config = pinned_config(image.attrs, client.api.history(made))
    data = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(data).hexdigest()
    layers = [f"{layer.removeprefix('sha256:')}/layer.tar" for layer in image.attrs["RootFS"]["Layers"]]
    manifest = [{"Config": f"{digest}.json", "RepoTags": [name], "Layers": layers}]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, content in ((f"{digest}.json", data), ("manifest.json", json.dumps(manifest).encode())):
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    before = client.images.get(name).id if has(client, name) else made
    try:
        client.images.load(archive.getvalue())
        loaded = client.images.get(name).id == f"sha256:{digest}"
    except docker.errors.DockerException:
        loaded = False
    if not loaded:
        repository, tag = name.split(":")
        image.tag(repository, tag)
    for old in {made, before}:
        if has(client, old) and not client.images.get(old).tags:
            discard(client, old)


def pinned_config(attrs: Mapping[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
    """An image's configuration (OCI image specification, config.md) from what the engine tells of it, without times."""
    layers = attrs["RootFS"]["Layers"]
    config = {key: attrs["Config"][key] for key in CONFIG if attrs["Config"].get(key)}
    entries = list(reversed(history))
    filled = [entry["Size"] > 0 or not METADATA.match(entry["CreatedBy"]) for entry in entries]
    for i, entry in enumerate(entries):  # a WORKDIR that was there, in the old builder
        if sum(filled) > len(layers) and entry["Size"] == 0:
            filled[i] = False
    lines = []
    for entry, has_layer in zip(entries, filled, strict=True):
        by = re.sub(r"\bFRACTAL_FORCE=[\d.]+", "FRACTAL_FORCE=", entry["CreatedBy"])
        line = {"created": EPOCH, "created_by": by, "comment": entry.get("Comment", "")}
        lines.append({k: v for k, v in line.items() if v} | ({} if has_layer else {"empty_layer": True}))
    if sum(filled) != len(layers):
        lines = [{"created": EPOCH, "created_by": "a layer"} for _ in layers]
    return {
        "architecture": attrs["Architecture"],
        **({"variant": attrs["Variant"]} if attrs.get("Variant") else {}),
        "config": config,
        "created": EPOCH,
        "history": lines,
        "os": attrs["Os"],
        "rootfs": {"type": "layers", "diff_ids": layers},
    }


METADATA = re.compile(
    r"(/bin/sh -c #\(nop\)\s+)?(ENV|LABEL|CMD|ENTRYPOINT|USER|ARG|SHELL|EXPOSE|STOPSIGNAL|MAINTAINER|VOLUME"
    r"|HEALTHCHECK|ONBUILD)\b"
)


def discard(client: docker.DockerClient, image: str) -> None:
    """Forget an image that only helped to build; its layers stay in the builder's cache."""
    try:
        client.images.remove(image)
    except docker.errors.DockerException:  # another build uses it
        pass


# --- a folder of wheels


def import_wheels(client: docker.DockerClient, folder: Path | None, image: Image) -> str | None:
    """An image with those wheels of a folder that the image asks for, to be mounted by its build."""
    if folder is None:
        return None
    asked = {normal(word) for step in image.steps if step.kind == "python" for word in _requirements(step)}
    files = [file for file in sorted(folder.glob("*.whl")) if normal(file.name.partition("-")[0]) in asked]
    if not files:
        return None
    facts = {file.name: str(file.stat().st_size).encode() for file in files}
    name = f"fractal-wheels:{content_hash(facts)[:12]}"
    if has(client, name):
        return name
    with tempfile.TemporaryDirectory(prefix="fractal-wheels-") as place:
        archive = Path(place, "wheels.tar")
        with tarfile.open(archive, "w") as tar:
            for file in files:
                entry = tarfile.TarInfo(file.name)
                entry.size = file.stat().st_size
                with file.open("rb") as content:
                    tar.addfile(entry, content)
        repository, tag = name.split(":")
        client.api.import_image(src=str(archive), repository=repository, tag=tag)
    return name


def _requirements(step: Any) -> list[str]:
    text = "\n".join(local.source.read_text() for local in step.locals)
    return [*step.text, *re.findall(r"^[A-Za-z0-9][\w.\-]*", text, re.MULTILINE)]


def normal(requirement: str) -> str:
    """A distribution's name as PEP 503 writes it."""
    name = re.match(r"[\w.\-]+", requirement)
    return re.sub(r"[-_.]+", "-", name[0]).lower() if name else ""


# --- the command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fractal.images.build", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", nargs="?", default="sandbox", help="sandbox, pipeline-cpu, pipeline, several, or all")
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


def build_all(keys: str, options: Options, *, as_json: bool = False, dry: bool = False) -> None:
    """Build images one after the other and print a line for each. Raises InputError, BuildError."""
    wanted = recipes.choose(keys)
    if dry:
        for recipe in wanted:
            print(f"image: would build {recipe.name}, if the engine does not have it")
        return
    client = connect()
    try:
        for recipe in wanted:
            image = ensure(client, recipe, note, options)
            if as_json:
                print(image.as_json(), flush=True)
                continue
            done = f"built in {image.seconds:.0f} s, {image.layers_built} steps run" if image.built else "is there"
            print(f"image: {image.name} {done}, {image.bytes / 1e6:,.0f} MB, base {image.base}", flush=True)
    finally:
        client.close()


if __name__ == "__main__":
    sys.exit(main())
