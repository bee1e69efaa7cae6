"""Builds the sandbox image, once for each content. `python -m fractal.images.build` prints one line.

The base is debian:bookworm-slim where a registry answers, else one bootstrapped from Debian's packages; the image's
label fractal.base tells which. FRACTAL_BASE_IMAGE names another base.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import docker
import docker.errors
import filelock
import platformdirs
import requests

from fractal import apt, engine
from fractal.images import debian
from fractal.records import OutsideError
from fractal.sandbox.source import context, image_name

PUBLIC_BASE = "debian:bookworm-slim"
LABEL = "fractal.base"
REGISTRY_TIMEOUT_S = 8  # a public registry answers in about one
BUILD_TIMEOUT_S = 600  # without a word from the engine
LOCK_TIMEOUT_S = 1800  # for another process that builds the same image
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")

Say = Callable[[str], None]


class ImageError(OutsideError):
    """The image could not be built: one line with the remedy."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image that the engine has."""

    name: str  # repository:tag
    id: str  # "sha256:..."
    base: str  # where its base came from: "debian:bookworm-slim pulled", "... bootstrapped", "... given"
    size_bytes: int
    built: bool  # by this call
    seconds: float


class Base(NamedTuple):
    name: str
    origin: str  # the label's text
    has_python: bool  # then the build needs no network


def connect() -> docker.DockerClient:
    """A client of the engine that set-up found. Raises ImageError with the remedy if none answers."""
    try:
        return docker.from_env()
    except docker.errors.DockerException as error:
        raise ImageError(engine.problem() or f"The Docker engine at {engine.address()} refuses: {error}.") from error


def ensure_sandbox_image(client: docker.DockerClient, say: Say) -> ImageInfo:
    """The image of the present sources; built if the engine does not have it. Raises ImageError (an OutsideError)."""
    begun = time.monotonic()
    name = image_name()
    try:
        if found := existing(client, name, begun):
            return found
        folder = platformdirs.user_cache_path("fractal") / "images"
        folder.mkdir(parents=True, exist_ok=True)
        stem = name.replace(":", "-")
        with filelock.FileLock(folder / f"{stem}.lock", timeout=LOCK_TIMEOUT_S):
            if found := existing(client, name, begun):  # by a process that we waited for
                return found
            log = folder / f"{stem}.log"
            log.write_text("")
            base = choose_base(client, say, log)
            build(client, name, base, log)
            image = client.images.get(name)
    except filelock.Timeout as error:
        raise ImageError(
            f"Another process has been building {name} for {LOCK_TIMEOUT_S} s. End it, then run again."
        ) from error
    except apt.AptError as error:
        raise ImageError(str(error)) from error
    except (docker.errors.DockerException, requests.RequestException) as error:
        remedy = engine.problem() or "Run the command again."
        raise ImageError(f"The Docker engine failed while making {name}: {first_line(error)}. {remedy}") from error
    except OSError as error:
        raise ImageError(f"Cannot make {name}: {error}. Mend that and run the command again.") from error
    return ImageInfo(name, image.id, base.origin, image.attrs["Size"], True, time.monotonic() - begun)


def existing(client: docker.DockerClient, name: str, begun: float) -> ImageInfo | None:
    """The image, if the engine has it on the base that is wanted."""
    try:
        image = client.images.get(name)
    except docker.errors.ImageNotFound:
        return None
    origin = image.labels.get(LABEL, "unknown")
    wanted = os.environ.get("FRACTAL_BASE_IMAGE")
    if wanted and origin != f"{wanted} given":
        return None
    return ImageInfo(name, image.id, origin, image.attrs["Size"], False, time.monotonic() - begun)


def choose_base(client: docker.DockerClient, say: Say, log: Path) -> Base:
    """The base to build on, fetched or made if need be; says which and why. Raises ImageError, BootstrapError."""
    if given := os.environ.get("FRACTAL_BASE_IMAGE"):
        if not has(client, given) and (failure := pull(client, given)):
            raise ImageError(f"FRACTAL_BASE_IMAGE={given} cannot be pulled: {failure}. Load it, or name another one.")
        say(f"building the sandbox image on {given}, as FRACTAL_BASE_IMAGE says")
        return Base(given, f"{given} given", False)
    if has(client, PUBLIC_BASE):
        say(f"building the sandbox image on {PUBLIC_BASE}, which the engine has")
        return Base(PUBLIC_BASE, f"{PUBLIC_BASE} pulled", False)
    made = debian.base_name()
    if has(client, made):
        say(f"building the sandbox image on {made}, made here earlier from Debian's packages")
        return Base(made, f"{made} bootstrapped", True)
    failure = pull(client, PUBLIC_BASE)
    if failure is None:
        say(f"building the sandbox image on {PUBLIC_BASE}, pulled from a registry")
        return Base(PUBLIC_BASE, f"{PUBLIC_BASE} pulled", False)
    say(f"no registry gives us {PUBLIC_BASE} ({failure}): making a base from Debian's packages, half a minute")
    return Base(debian.bootstrap(client, log), f"{made} bootstrapped", True)


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


def build(client: docker.DockerClient, name: str, base: Base, log: Path) -> None:
    """Build by the engine's own builder, which every engine has and which needs no client. Raises ImageError."""
    proxies = {key: os.environ[key] for key in PROXIES if key in os.environ}
    stream = client.api.build(
        fileobj=io.BytesIO(context()),
        custom_context=True,
        dockerfile="docker/sandbox.Dockerfile",
        tag=name,
        buildargs={"BASE": base.name, **proxies},
        labels={LABEL: base.origin},
        network_mode="none" if base.has_python else "default",
        rm=True,
        forcerm=True,
        decode=True,
        timeout=BUILD_TIMEOUT_S,
    )
    if failure := follow(stream, log):
        raise ImageError(f"Building {name} failed: {failure}. The whole story: {log}")


def follow(stream: Iterable[dict[str, Any]], log: Path) -> str | None:
    """Write the build's words to the log as they come. None, or the builder's error."""
    failure = None
    with log.open("a") as out:
        for event in stream:
            out.write(event.get("stream") or event.get("error") or "")
            out.flush()
            if "error" in event:
                failure = str(event["error"]).strip().splitlines()[0][:300]
    return failure


def main() -> int:
    try:
        client = connect()
        try:
            image = ensure_sandbox_image(client, lambda text: print(f"image: {text}", file=sys.stderr, flush=True))
        finally:
            client.close()
    except OutsideError as error:
        print(f"image: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("image: interrupted. Run the command again.", file=sys.stderr)
        return 130
    done = f"built in {image.seconds:.0f} s" if image.built else "is there"
    print(f"image: {image.name} {done}, {image.size_bytes / 1e6:.0f} MB, base {image.base}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
