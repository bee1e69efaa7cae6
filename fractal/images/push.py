"""Pushes a local image to a registry, or over SSH to a host's own Docker engine. Only missing layers travel.

    python -m fractal.images.push NAME (--registry=HOST[:PORT][/PATH] | --host=ALIAS)

Credentials are Docker's (`docker login`), or ssh's. The same command again continues where the last one stopped.
Exit codes: 0, 2 usage, 3 something outside is missing, 130 interrupted.
"""

import argparse
import json
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import docker
import docker.errors
import requests
import urllib3

from fractal.console import activity, note, report_errors
from fractal.errors import InputError
from fractal.images import recipes, remote_engine, ssh
from fractal.images.build import ensure
from fractal.images.docker_client import Say, connect, first_line, registry_digest, request_timeout
from fractal.images.progress import PushProgress
from fractal.images.push_errors import HOST, PushConnectionError, PushError, error_from_engine, without_secrets
from fractal.images.registry_program import RegistryProgramError
from fractal.install import docker_engine

ENGINE_TIMEOUT_S = 900  # without an event: a registry that checks a layer of 10 GB sends none meanwhile
PAUSES_S = (2.0, 5.0, 15.0)  # before each further attempt; the engine itself tries each layer 5 times in 50 s
DISK_CHECK_S = 4.0  # between checks of the remote disk while the engine retries
CONTINUES = "The same command goes on from there."
REMOTE_REPOSITORY = "fractal"  # one for all images: the engine looks for a layer under 10 MB in this repository only
PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REGISTRY = re.compile(rf"{HOST}(?:/{PART})*|{PART}(?:/{PART})*")
NAME = re.compile(rf"(?:{HOST}/)?(?P<path>{PART}(?:/{PART})*)(?::(?P<tag>\w[\w.-]{{0,127}}))?", re.A)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pushed:
    """An image that is now at its destination."""

    name: str  # at the destination
    digest: str  # "sha256:..." of the manifest, as read back
    image_id: str
    layers: int  # distinct ones
    layers_sent: int
    bytes_sent: int  # of the layers sent, before compression
    seconds: float


@dataclass(frozen=True, slots=True)
class LocalImage:
    """An image of this machine's engine."""

    name: str  # repository:tag
    id: str
    platform: str  # "linux/amd64"
    diff_ids: tuple[str, ...]  # of its layers, bottom first


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
    image = find_image(client, name)
    progress = PushProgress()
    say(f"{image.name} goes to {repository}:{tag}")

    @as_push_error()
    def attempt() -> Pushed:
        digest = send(client, repository, tag, progress)
        read_back(client, repository, tag, digest)
        return result(f"{repository}:{tag}", digest, image, progress, start)

    with temporary_tag(client, image, repository, tag):
        return retry(attempt, progress, say)


@as_push_error()
def to_host(
    client: docker.DockerClient,
    name: str,
    host: str,
    *,
    say: Say,
    program: remote_engine.Program = "auto",
    ssh_config: Path | None = None,
) -> Pushed:
    """Push `name` to the Docker engine of `host`, an OpenSSH destination; it gets the same name there.

    `program` says where the registry's image comes from; `ssh_config` is used instead of ~/.ssh/config.
    Raises InputError, PushError.
    """
    start = time.monotonic()
    image = find_image(client, name)
    progress = PushProgress()

    @as_push_error()
    def attempt() -> Pushed:
        with remote_engine.connect(host, ssh_config) as connection:
            engine = remote_engine.find_engine(connection)
            if engine.platform != image.platform:
                raise PushError(
                    f"{image.name} is made for {image.platform}, and {host} is {engine.platform}: nothing was sent. "
                    f"Build it over there: DOCKER_HOST=ssh://{host} invoke build."
                )
            registry_image = remote_engine.ensure_registry_image(connection, engine, program, say)
            registry = remote_engine.start_registry(connection, engine, registry_image)
            repository, tag = f"127.0.0.1:{registry.local_port}/{REMOTE_REPOSITORY}", image.id[7:19]
            say(f"{image.name} goes to {host}")
            with temporary_tag(client, image, repository, tag, ours=True):
                digest = send_through_tunnel(client, image, connection, engine, registry, tag, progress)
                read_back(client, repository, tag, digest)
            say(f"{host} takes it from its own loopback")
            reference = f"127.0.0.1:{registry.remote_port}/{REMOTE_REPOSITORY}@{digest}"
            remote_engine.pull_by_digest(connection, engine, reference, image.name)
            return result(image.name, digest, image, progress, start)

    return retry(attempt, progress, say)


def result(name: str, digest: str, image: LocalImage, progress: PushProgress, start: float) -> Pushed:
    """What a finished push did; `start` is a time of time.monotonic()."""
    layers = len(set(image.diff_ids))
    sent = min(layers, len(progress.sent))
    return Pushed(name, digest, image.id, layers, sent, progress.bytes_sent, time.monotonic() - start)


def send_through_tunnel(
    client: docker.DockerClient,
    image: LocalImage,
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
                f"or send the whole image: docker save {image.name} | ssh {connection.host} {engine.command} load"
            ) from error
        remote_engine.check_disk(connection, engine, registry.container)
        raise


def target(name: str, registry: str) -> tuple[str, str]:
    """Repository and tag at the registry: a registry in the local name is left out. Raises InputError."""
    if not REGISTRY.fullmatch(registry):
        raise InputError(f"{registry!r} is no registry. Give HOST[:PORT][/PATH] in small letters, without https://.")
    path, tag = parse_name(name)
    return f"{registry}/{path}", tag


def parse_name(name: str) -> tuple[str, str]:
    """Path and tag of a local image's name. Raises InputError."""
    match = NAME.fullmatch(name)
    if not match:
        raise InputError(f"{name!r} is no image's name. Give repository:tag, as `docker images` shows it.")
    return match["path"], match["tag"] or "latest"


def find_image(client: docker.DockerClient, name: str) -> LocalImage:
    """The local image. Raises InputError; PushError if there is none."""
    _, tag = parse_name(name)
    full_name = name if name.endswith(f":{tag}") else f"{name}:{tag}"
    try:
        attrs = client.images.get(full_name).attrs
    except docker.errors.ImageNotFound as error:
        raise PushError(
            f"There is no image {full_name} here. Run: invoke build; `docker images` lists what there is."
        ) from error
    platform = f"{attrs['Os']}/{attrs['Architecture']}"
    return LocalImage(full_name, attrs["Id"], platform, tuple(attrs.get("RootFS", {}).get("Layers") or ()))


@contextmanager
def temporary_tag(
    client: docker.DockerClient, image: LocalImage, repository: str, tag: str, ours: bool = False
) -> Iterator[None]:
    """Tag the image meanwhile. What had that tag before gets it back, unless the repository is `ours` alone."""

    def digests() -> set[str]:  # references that a push adds
        references = client.images.get(image.id).attrs["RepoDigests"] or ()
        return {reference for reference in references if reference.startswith(f"{repository}@")}

    reference, before = f"{repository}:{tag}", None
    with suppress(docker.errors.ImageNotFound):
        before = None if ours else client.images.get(reference).id
    known = digests()
    try:
        client.api.tag(image.id, repository, tag)
        yield
    finally:
        with suppress(docker.errors.DockerException, requests.RequestException):  # of a dead engine: reported elsewhere
            for digest in digests() - known:
                client.api.remove_image(digest, noprune=True)
            if before is None:
                client.api.remove_image(reference, noprune=True)
            elif before != image.id:
                client.api.tag(before, repository, tag)


def retry(attempt: Callable[[], T], progress: PushProgress, say: Say) -> T:
    """Repeat a push whose connection broke, a bounded number of times; one that never began is not repeated."""
    for pause_s in PAUSES_S:
        try:
            return attempt()
        except PushConnectionError as error:
            if not progress.began:
                raise
            say(f"{error} Trying again in {pause_s:.0f} s.")
            time.sleep(pause_s)
    try:
        return attempt()
    except PushConnectionError as error:
        raise PushConnectionError(f"{error} {CONTINUES}") from error


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


def read_back(client: docker.DockerClient, repository: str, tag: str, digest: str) -> None:
    """Check through the engine, with the credentials of the push, that the registry has what was pushed."""
    try:
        stored = registry_digest(client, f"{repository}:{tag}")
    except docker.errors.APIError as error:
        raise error_from_engine(first_line(error), repository) from error
    if stored != digest:
        raise PushError(
            f"{repository}:{tag} was pushed as {digest}, and the registry shows {stored}: something else pushes "
            "the same name. Push again when it is done."
        )


def push_all(
    keys: str, registry: str, host: str, *, as_json: bool = False, dry: bool = False, ssh_config: Path | None = None
) -> dict[str, str]:
    """Push our own images, built where they are missing: to the registry, or, without one, to the host.

    Returns the names of what was pushed, by the recipes' keys.
    """
    chosen = recipes.choose(keys)
    if dry:
        for recipe in chosen:
            print(f"push: would send {recipe.name} to {registry or host}, as far as it is not there")
        return {}
    names = {}
    with closing(connect()) as client:
        for recipe in chosen:
            names[recipe.key] = ensure(client, recipe, note).name
            push(client, names[recipe.key], registry, host, as_json=as_json, ssh_config=ssh_config)
    return names


def push(
    client: docker.DockerClient,
    name: str,
    registry: str | None,
    host: str | None,
    *,
    program: remote_engine.Program = "auto",
    ssh_config: Path | None = None,
    as_json: bool = False,
) -> None:
    """Push to the registry, or without one to the host, and print a line. Raises InputError, OutsideError."""

    def say(text: str) -> None:
        note(text, "push")

    if registry:
        pushed, where = to_registry(client, name, registry, say=say), "there"
    elif host:
        pushed = to_host(client, name, host, say=say, program=program, ssh_config=ssh_config)
        where = f"on {host}"
    else:
        raise InputError("There is no place to push to. Give a registry or a host.")
    if as_json:
        print(json.dumps(asdict(pushed)), flush=True)
        return
    layers = f"{pushed.layers_sent} of {pushed.layers} layers sent, {pushed.bytes_sent / 1e6:.1f} MB"
    print(f"push: {pushed.name} is {where}, {pushed.digest}, {layers}, {pushed.seconds:.1f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fractal.images.push", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", help="repository:tag of an image here")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--registry", metavar="HOST[:PORT][/PATH]", help="push there; log in with docker login")
    where.add_argument("--host", metavar="ALIAS", help="push to this machine's engine, over ssh; or USER@HOST")
    parser.add_argument(
        "--program",
        choices=get_args(remote_engine.Program),
        default="auto",
        help="where the remote registry comes from",
    )
    parser.add_argument("--ssh-config", type=Path, metavar="FILE", help="instead of ~/.ssh/config")
    given = parser.parse_args(argv)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else nohup's
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))  # not at once: what was begun is undone

    def work() -> None:
        with closing(connect()) as client:
            push(client, given.name, given.registry, given.host, program=given.program, ssh_config=given.ssh_config)

    return report_errors(work, "push")


if __name__ == "__main__":
    sys.exit(main())
