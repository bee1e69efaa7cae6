"""Pushes a local image to a registry, or over SSH to a host's own Docker engine. Only missing layers travel.

Credentials are Docker's (`docker login`), or ssh's. The same push again continues where the last one stopped.
"""

import json
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import docker
import docker.errors
import requests
import urllib3
from docker.models.images import Image

from fractal.console import activity, note
from fractal.errors import InputError
from fractal.images import remote_engine, ssh
from fractal.images.build import ensure
from fractal.images.docker_client import Say, connect, first_line, request_timeout
from fractal.images.push_errors import HOST, PushConnectionError, PushError, error_from_engine, without_secrets
from fractal.images.recipes import Recipe
from fractal.images.registry_program import RegistryProgramError
from fractal.install import docker_engine

ENGINE_TIMEOUT_S = 900  # without an event: a registry that checks a layer of 10 GB sends none meanwhile
PAUSES_S = (2.0, 5.0, 15.0)  # before each further attempt; the engine itself tries each layer 5 times in 50 s
DISK_CHECK_S = 4.0  # between checks of the remote disk while the engine retries
CONTINUES = "The same command goes on from there."
REMOTE_REPOSITORY = "fractal"  # one for all images: the engine looks for a layer under 10 MB in this repository only
PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REGISTRY = re.compile(rf"{HOST}(?:/{PART})*|{PART}(?:/{PART})*")


@dataclass(frozen=True, slots=True)
class Pushed:
    """An image that is now at its destination."""

    name: str  # at the destination
    digest: str  # "sha256:..." of the manifest
    image_id: str
    layers: int  # distinct ones
    layers_sent: int
    bytes_sent: int  # of the layers sent, before compression
    seconds: float


class PushProgress:
    """Counts over all attempts of one push; `update` takes each event of the engine's push API."""

    def __init__(self) -> None:
        self.sent: set[str] = set()  # layers sent: 12 digits of a diff id or of a blob's digest, as in the events
        self.began = False  # whether the registry answered and the engine came to the layers
        self._present: dict[str, bool] = {}
        self._bytes: dict[str, tuple[int, int]] = {}  # layer -> bytes sent, bytes in all; uncompressed

    def update(self, event: dict[str, Any]) -> None:
        layer, status = event.get("id"), str(event.get("status", ""))
        if layer is None:
            return
        self.began = True
        self._present[layer] = status.startswith(("Layer already exists", "Mounted from", "Pushed"))
        if status == "Pushed":
            self.sent.add(layer)
        detail = event.get("progressDetail") or {}
        if status == "Pushing" and "current" in detail:
            # The archive's own blocks come on top of the files' sizes, which make the total.
            self._bytes[layer] = detail["current"], max(detail.get("total", 0), detail["current"])

    @property
    def bytes_sent(self) -> int:
        """Bytes of the layers that were sent, before compression."""
        return sum(total for layer, (_, total) in self._bytes.items() if layer in self.sent)

    def __str__(self) -> str:
        sent = sum(done for done, _ in self._bytes.values()) / 1e6
        total = sum(size for _, size in self._bytes.values()) / 1e6
        return (
            f"{sum(self._present.values())} of {len(self._present)} layers are there, {sent:.0f} of {total:.0f} MB sent"
        )


@contextmanager
def as_push_error() -> Iterator[None]:
    """Turn what goes wrong below into PushError, or PushConnectionError where another attempt may succeed."""
    try:
        yield
    except ssh.SshConnectionError as error:
        raise PushConnectionError(str(error)) from error
    except (ssh.SshError, remote_engine.RemoteEngineError, RegistryProgramError) as error:
        raise PushError(str(error)) from error
    except docker.errors.DockerException as error:
        raise PushError(
            f"The Docker engine failed: {without_secrets(first_line(error))}. {docker_engine.problem() or CONTINUES}"
        ) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise PushError(
            f"The Docker engine broke off ({type(error).__name__}). {docker_engine.problem() or CONTINUES}"
        ) from error
    except OSError as error:
        raise PushError(f"Cannot push: {error}. Mend that and run the command again.") from error


@as_push_error()
def to_registry(client: docker.DockerClient, name: str, registry: str, *, say: Say) -> Pushed:
    """Push `name` as REGISTRY/NAME, where the registry is HOST[:PORT][/PATH]. Raises InputError, PushError."""
    start = time.monotonic()
    repository, tag = target(name, registry)
    image = client.images.get(name)
    progress = PushProgress()
    say(f"{name} goes to {repository}:{tag}")

    def attempt() -> Pushed:
        digest = send(client, repository, tag, progress)
        return result(f"{repository}:{tag}", digest, image, progress, start)

    with temporary_tag(client, image.id, repository, tag):
        return retry(attempt, progress, say)


@as_push_error()
def to_host(client: docker.DockerClient, name: str, host: str, *, say: Say, ssh_config: Path | None = None) -> Pushed:
    """Push `name` to the Docker engine of `host`, an OpenSSH destination; it gets the same name there.

    `ssh_config` is used instead of ~/.ssh/config. Raises InputError, PushError.
    """
    start = time.monotonic()
    image = client.images.get(name)
    platform = f"{image.attrs['Os']}/{image.attrs['Architecture']}"
    progress = PushProgress()

    def attempt() -> Pushed:
        with remote_engine.connect(host, ssh_config) as connection:
            engine = remote_engine.find_engine(connection)
            if engine.platform != platform:
                raise PushError(
                    f"{name} is made for {platform}, and {host} is {engine.platform}: nothing was sent. "
                    "Build it there: invoke build --on=there."
                )
            registry_image = remote_engine.ensure_registry_image(connection, engine, say)
            registry = remote_engine.start_registry(connection, engine, registry_image)
            tag = image.id[7:19]
            say(f"{name} goes to {host}")
            with temporary_tag(
                client, image.id, f"127.0.0.1:{registry.local_port}/{REMOTE_REPOSITORY}", tag, ours=True
            ):
                digest = send_through_tunnel(client, name, connection, engine, registry, tag, progress)
            say(f"{host} takes it from its own loopback")
            reference = f"127.0.0.1:{registry.remote_port}/{REMOTE_REPOSITORY}@{digest}"
            remote_engine.pull_by_digest(connection, engine, reference, name)
            return result(name, digest, image, progress, start)

    return retry(attempt, progress, say)


def result(name: str, digest: str, image: Image, progress: PushProgress, start: float) -> Pushed:
    """What a finished push did; `start` is a time of time.monotonic()."""
    layers = len(set(image.attrs["RootFS"].get("Layers") or ()))
    sent = min(layers, len(progress.sent))
    return Pushed(name, digest, image.id, layers, sent, progress.bytes_sent, time.monotonic() - start)


def send_through_tunnel(
    client: docker.DockerClient,
    name: str,
    connection: ssh.SshConnection,
    engine: remote_engine.Engine,
    registry: remote_engine.Registry,
    tag: str,
    progress: PushProgress,
) -> str:
    """Push to the remote registry through the tunnel; returns the manifest's digest."""
    next_check = 0.0

    def on_retry() -> None:
        nonlocal next_check
        connection.check_alive()
        if time.monotonic() >= next_check:
            remote_engine.check_disk(connection, engine, registry.container)
            next_check = time.monotonic() + DISK_CHECK_S

    try:
        repository = f"127.0.0.1:{registry.local_port}/{REMOTE_REPOSITORY}"
        return send(client, repository, tag, progress, anonymous=True, on_retry=on_retry)
    except PushConnectionError as error:
        connection.check_alive()
        if not progress.began and remote_engine.answers(registry.local_port):
            raise PushError(
                f"The Docker engine does not reach port {registry.local_port} of this machine: it has another "
                "loopback, as Docker Desktop, colima and a remote DOCKER_HOST have. Push to a registry (--registry), "
                f"or send the whole image: docker save {name} | ssh {connection.host} {engine.command} load"
            ) from error
        remote_engine.check_disk(connection, engine, registry.container)
        raise


def target(name: str, registry: str) -> tuple[str, str]:
    """Repository and tag at the registry of an image that is called repository:tag here. Raises InputError."""
    if not REGISTRY.fullmatch(registry):
        raise InputError(f"{registry!r} is no registry. Give HOST[:PORT][/PATH] in small letters, without https://.")
    repository, _, tag = name.partition(":")
    return f"{registry}/{repository}", tag


@contextmanager
def temporary_tag(
    client: docker.DockerClient, image_id: str, repository: str, tag: str, ours: bool = False
) -> Iterator[None]:
    """Tag an image meanwhile; what the tag and the push add to its names is removed again.

    `ours`: nobody else names images so, and what a killed push left of such names is removed, too.
    """

    def names() -> set[str]:
        attrs = client.images.get(image_id).attrs
        return {*(attrs["RepoTags"] or ()), *(attrs["RepoDigests"] or ())}

    before = set() if ours else names()
    try:
        client.api.tag(image_id, repository, tag)
        yield
    finally:
        with suppress(docker.errors.DockerException, requests.RequestException):  # of a dead engine: reported elsewhere
            for name in names() - before:
                if re.match(rf"{re.escape(repository)}[:@]", name):
                    client.api.remove_image(name, noprune=True)


def retry(attempt: Callable[[], Pushed], progress: PushProgress, say: Say) -> Pushed:
    """Repeat a push whose connection broke, a bounded number of times; one that never began is not repeated."""
    for pause_s in PAUSES_S:
        try:
            with as_push_error():
                return attempt()
        except PushConnectionError as error:
            if not progress.began:
                raise
            say(f"{error} Trying again in {pause_s:.0f} s.")
            time.sleep(pause_s)
    return attempt()


def send(
    client: docker.DockerClient,
    repository: str,
    tag: str,
    progress: PushProgress,
    *,
    anonymous: bool = False,
    on_retry: Callable[[], None] = lambda: None,
) -> str:
    """`docker push`; returns the digest. `on_retry` is called while the engine waits to try a layer again."""
    digest = ""
    credentials: dict[str, str] | None = {} if anonymous else None  # None: the SDK reads Docker's configuration
    try:
        with warnings.catch_warnings(), request_timeout(client, ENGINE_TIMEOUT_S), activity("push") as show:
            warnings.simplefilter("ignore")  # the SDK's about a missing helper, which raises as well
            events = client.api.push(repository, tag=tag, stream=True, decode=True, auth_config=credentials)
            with closing(events):  # an engine whose client is gone ends the push
                for event in events:
                    if "error" in event:
                        raise error_from_engine(str(event["error"]), repository)
                    progress.update(event)
                    show(str(progress))
                    if str(event.get("status", "")).startswith("Retrying"):
                        on_retry()
                    digest = reported_digest(event) or digest
    except docker.errors.APIError as error:
        raise error_from_engine(first_line(error), repository) from error
    except docker.errors.DockerException as error:
        helper = re.search(r"docker-credential-[\w-]+", str(error))
        if helper is None:
            raise
        raise PushError(
            f"{helper[0]}, which Docker's configuration names for credentials, does not work. Mend it, or take it "
            f"out of config.json and run: docker login {repository.split('/')[0]}"
        ) from error
    if not digest:
        raise PushError(
            f"The Docker engine broke off in the middle of the push. {docker_engine.problem() or CONTINUES}"
        )
    return digest


def reported_digest(event: dict[str, Any]) -> str | None:
    """The manifest's digest, if this event has it: in `aux`, or as text from engines with containerd's store."""
    if digest := event.get("aux", {}).get("Digest"):
        return str(digest)
    match = re.search(r"\bdigest: (sha256:[0-9a-f]{64})\b", str(event.get("status", "")))
    return match[1] if match else None


def push_all(
    chosen: list[Recipe],
    registry: str,
    host: str,
    *,
    as_json: bool = False,
    dry: bool = False,
    ssh_config: Path | None = None,
) -> dict[str, str]:
    """Push our own images, built where they are missing: to the registry, or, without one, to the host.

    Prints a line for each; returns their names, by the recipes' keys.
    """
    say = partial(note, what="push")
    names = {}
    if dry:
        for recipe in chosen:
            print(f"push: would send {recipe.name} to {registry or host}, as far as it is not there")
    if dry or not chosen:
        return {}
    with closing(connect()) as client:
        for recipe in chosen:
            names[recipe.key] = name = ensure(client, recipe, note).name
            if registry:
                pushed = to_registry(client, name, registry, say=say)
            else:
                pushed = to_host(client, name, host, say=say, ssh_config=ssh_config)
            if as_json:
                print(json.dumps(asdict(pushed)), flush=True)
                continue
            where = "there" if registry else f"on {host}"
            layers = f"{pushed.layers_sent} of {pushed.layers} layers sent, {pushed.bytes_sent / 1e6:.1f} MB"
            print(f"push: {pushed.name} is {where}, {pushed.digest}, {layers}, {pushed.seconds:.1f} s", flush=True)
    return names
