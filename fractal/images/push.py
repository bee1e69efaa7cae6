"""Pushes a local image: to a registry, or over SSH to a machine's own Docker engine. Only missing layers travel.

    python -m fractal.images.push NAME (--registry=HOST[:PORT][/PATH] | --host=ALIAS)

Credentials are Docker's (`docker login`), or ssh's. The same call again goes on where the last one stopped.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import docker
import docker.errors
import requests
import urllib3

from fractal.console import note, report_errors
from fractal.errors import InputError, OutsideError
from fractal.images import recipes, remote_engine, ssh
from fractal.images.build import Say, connect, ensure, first_line, patience
from fractal.images.progress import board
from fractal.images.registry import Manifest, RegistryError, read_manifest
from fractal.install import docker_engine

SILENCE_S = 900  # of the engine: a registry that checks a layer of 10 GB says nothing meanwhile
PAUSES_S = (2.0, 5.0, 15.0)  # before each further attempt; the engine itself tries each layer 5 times in 50 s
DISK_CHECK_S = 4.0  # while the engine tries again
AGAIN = "The same command goes on from there."
FAR_REPOSITORY = "fractal"  # one for all images: the engine looks for a layer under 10 MB in its own repository only
HOST = r"(?:localhost|[\w-]+(?:\.[\w-]+)+|[\w.-]+(?=:)|\[[0-9a-fA-F:]+\])(?::\d+)?"  # else it is part of the path
PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REGISTRY = re.compile(rf"{HOST}(?:/{PART})*|{PART}(?:/{PART})*")
NAME = re.compile(rf"(?:{HOST}/)?(?P<path>{PART}(?:/{PART})*)(?::(?P<tag>\w[\w.-]{{0,127}}))?", re.A)

T = TypeVar("T")


class PushError(OutsideError):
    """The image could not be pushed: one line with the remedy."""


class LostError(PushError):
    """The way to the registry broke, or is not there: another attempt may get through."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """An image that is now at its destination."""

    name: str  # over there
    digest: str  # "sha256:..." of the manifest, as read back
    image_id: str  # digest of the configuration, the same on both sides
    layers: int  # different ones
    layers_sent: int
    bytes_sent: int | None  # compressed, of the layers sent; None where the registry shows its manifest to engines only
    seconds: float


@dataclass(frozen=True, slots=True)
class Local:
    """The image here."""

    name: str  # repository:tag
    id: str
    platform: str  # "linux/amd64"
    diff_ids: tuple[str, ...]  # of its layers, bottom first


@dataclass(slots=True)
class Sending:
    """What the attempts so far have done."""

    sent: set[str] = field(default_factory=set)  # as in the engine's events: 12 digits of a diff id or a blob's digest
    begun: bool = False  # the registry answered and the engine got to the layers

    def see(self, event: dict[str, Any]) -> None:
        if layer := event.get("id"):
            self.begun = True
            if event.get("status") == "Pushed":
                self.sent.add(layer)

    def pushed(self, name: str, digest: str, image: Local, manifest: Manifest | None, began: float) -> Pushed:
        seconds = time.monotonic() - began
        if manifest is None:
            layers = len(set(image.diff_ids))
            return Pushed(name, digest, image.id, layers, min(layers, len(self.sent)), None, seconds)
        pairs = zip(image.diff_ids, manifest.layers, strict=False)
        sent = {blob for diff_id, blob in pairs if {diff_id[7:19], blob.digest[7:19]} & self.sent}
        size = sum(blob.size for blob in sent)
        return Pushed(name, digest, manifest.config, len(set(manifest.layers)), len(sent), size, seconds)


@contextmanager
def one_line() -> Iterator[None]:
    """What goes wrong below comes out as PushError, or as LostError where another attempt may help."""
    try:
        yield
    except ssh.SshLost as error:
        raise LostError(str(error)) from error
    except (ssh.SshError, remote_engine.FarError, RegistryError) as error:
        raise PushError(str(error)) from error
    except docker.errors.DockerException as error:
        raise PushError(
            f"The Docker engine failed: {clean(first_line(error))}. {docker_engine.problem() or AGAIN}"
        ) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise PushError(
            f"The Docker engine broke off ({type(error).__name__}). {docker_engine.problem() or AGAIN}"
        ) from error
    except OSError as error:
        raise PushError(f"Cannot push: {error}. Mend that and run the command again.") from error


@one_line()
def to_registry(client: docker.DockerClient, name: str, registry: str, *, say: Say) -> Pushed:
    """Push `name` as REGISTRY/NAME, where the registry is HOST[:PORT][/PATH]. Raises InputError, PushError."""
    began = time.monotonic()
    repository, tag = target(name, registry)
    image = find(client, name)
    sending = Sending()
    say(f"{image.name} goes to {repository}:{tag}")

    @one_line()
    def attempt() -> Pushed:
        digest = send(client, repository, tag, sending)
        manifest = read_back(client, repository, tag, digest, image)
        return sending.pushed(f"{repository}:{tag}", digest, image, manifest, began)

    with tagged(client, image, repository, tag):
        return persist(attempt, sending, say)


@one_line()
def to_host(
    client: docker.DockerClient,
    name: str,
    host: str,
    *,
    say: Say,
    program: remote_engine.Program = "auto",
    ssh_config: Path | None = None,
) -> Pushed:
    """Push `name` to the engine of `host`, an OpenSSH destination; it has the same name there.

    `program` says where a registry's program comes from, `ssh_config` stands in for ~/.ssh/config.
    Raises InputError, PushError.
    """
    began = time.monotonic()
    image = find(client, name)
    sending = Sending()

    @one_line()
    def attempt() -> Pushed:
        with remote_engine.connect(host, ssh_config) as link:
            there = remote_engine.engine(link)
            if there.platform != image.platform:
                raise PushError(
                    f"{image.name} is made for {image.platform}, and {host} is {there.platform}: nothing was sent. "
                    f"Build it over there: DOCKER_HOST=ssh://{host} invoke build."
                )
            served = remote_engine.start_registry(link, there, remote_engine.ensure_program(link, there, program, say))
            repository, tag = f"127.0.0.1:{served.local_port}/{FAR_REPOSITORY}", image.id[7:19]
            say(f"{image.name} goes to {host}")
            with tagged(client, image, repository, tag, ours=True):
                digest = through_tunnel(client, image, link, there, served, tag, sending)
                manifest = read_back(client, repository, tag, digest, image)
            if manifest is None:
                raise LostError(f"The registry on {host} does not show what it was given.")
            say(f"{host} takes it from its own loopback")
            remote_engine.pull(link, there, served.port, FAR_REPOSITORY, manifest, image.name)
            return sending.pushed(image.name, digest, image, manifest, began)

    return persist(attempt, sending, say)


def through_tunnel(
    client: docker.DockerClient,
    image: Local,
    link: ssh.Link,
    there: remote_engine.Engine,
    served: remote_engine.Registry,
    tag: str,
    sending: Sending,
) -> str:
    """Push to the far registry; the manifest's digest. Knows what a failure means there."""
    next_check = 0.0

    def retrying() -> None:
        nonlocal next_check
        link.check()
        if time.monotonic() >= next_check:
            remote_engine.check_disk(link, there, served.container)
            next_check = time.monotonic() + DISK_CHECK_S

    try:
        repository = f"127.0.0.1:{served.local_port}/{FAR_REPOSITORY}"
        return send(client, repository, tag, sending, anonymous=True, retrying=retrying)
    except LostError as error:
        link.check()
        if not sending.begun and remote_engine.answers(served.local_port):
            raise PushError(
                f"The Docker engine does not reach port {served.local_port} of this machine: it has another loopback, "
                "as Docker Desktop, colima and a remote DOCKER_HOST have. Push to a registry (--registry), "
                f"or send the whole image: docker save {image.name} | ssh {link.host} {there.words} load"
            ) from error
        remote_engine.check_disk(link, there, served.container)
        raise


def target(name: str, registry: str) -> tuple[str, str]:
    """Repository and tag at the registry: a registry in the local name is left out. Raises InputError."""
    if not REGISTRY.fullmatch(registry):
        raise InputError(f"{registry!r} is no registry. Give HOST[:PORT][/PATH] in small letters, without https://.")
    path, tag = parse(name)
    return f"{registry}/{path}", tag


def parse(name: str) -> tuple[str, str]:
    """Path and tag of a local name. Raises InputError."""
    match = NAME.fullmatch(name)
    if not match:
        raise InputError(f"{name!r} is no image's name. Give repository:tag, as `docker images` shows it.")
    return match["path"], match["tag"] or "latest"


def find(client: docker.DockerClient, name: str) -> Local:
    """The image. Raises InputError, PushError if it is not here."""
    _, tag = parse(name)
    whole = name if name.endswith(f":{tag}") else f"{name}:{tag}"
    try:
        attrs = client.images.get(whole).attrs
    except docker.errors.ImageNotFound as error:
        raise PushError(
            f"There is no image {whole} here. Run: invoke build; `docker images` lists what there is."
        ) from error
    platform = f"{attrs['Os']}/{attrs['Architecture']}"
    return Local(whole, attrs["Id"], platform, tuple(attrs.get("RootFS", {}).get("Layers") or ()))


@contextmanager
def tagged(client: docker.DockerClient, image: Local, repository: str, tag: str, ours: bool = False) -> Iterator[None]:
    """The image has another name meanwhile; what had that name has it again after, unless it is ours alone."""

    def digests() -> set[str]:  # references that a push adds
        found = client.images.get(image.id).attrs["RepoDigests"] or ()
        return {one for one in found if one.startswith(f"{repository}@")}

    reference, before = f"{repository}:{tag}", None
    with suppress(docker.errors.ImageNotFound):
        before = None if ours else client.images.get(reference).id
    had = digests()
    try:
        client.api.tag(image.id, repository, tag)
        yield
    finally:
        with suppress(docker.errors.DockerException, requests.RequestException):  # the engine is gone: said elsewhere
            for digest in digests() - had:
                client.api.remove_image(digest, noprune=True)
            if before is None:
                client.api.remove_image(reference, noprune=True)
            elif before != image.id:
                client.api.tag(before, repository, tag)


def persist(attempt: Callable[[], T], sending: Sending, say: Say) -> T:
    """Attempts until one gets through, a bounded number. What never began is not tried again."""
    for pause_s in PAUSES_S:
        try:
            return attempt()
        except LostError as error:
            if not sending.begun:
                raise
            say(f"{error} Trying again in {pause_s:.0f} s.")
            time.sleep(pause_s)
    try:
        return attempt()
    except LostError as error:
        raise LostError(f"{error} {AGAIN}") from error


def send(
    client: docker.DockerClient,
    repository: str,
    tag: str,
    sending: Sending,
    *,
    anonymous: bool = False,
    retrying: Callable[[], None] = lambda: None,
) -> str:
    """`docker push`; the digest that it reports. `retrying` is called while the engine waits to try a layer again."""
    digest = ""
    credentials: dict[str, str] | None = {} if anonymous else None  # None: the SDK reads Docker's configuration
    try:
        with warnings.catch_warnings(), patience(client, SILENCE_S), board("push") as shown:
            warnings.simplefilter("ignore")  # the SDK's about a missing helper, which raises as well
            events = client.api.push(repository, tag=tag, stream=True, decode=True, auth_config=credentials)
            with closing(events):  # an engine whose client is gone ends the push
                for event in events:
                    if "error" in event:
                        raise explain(str(event["error"]), repository)
                    shown.see(event)
                    sending.see(event)
                    if str(event.get("status", "")).startswith("Retrying"):
                        retrying()
                    digest = reported(event) or digest
    except docker.errors.APIError as error:
        raise explain(first_line(error), repository) from error
    except docker.errors.DockerException as error:
        helper = re.search(r"docker-credential-[\w-]+", str(error))
        if helper is None:
            raise
        raise PushError(
            f"{helper[0]}, which Docker's configuration names for credentials, does not work. Mend it, or take it "
            f"out of config.json and run: docker login {repository.split('/')[0]}"
        ) from error
    if not digest:
        raise PushError(f"The Docker engine broke off in the middle of the push. {docker_engine.problem() or AGAIN}")
    return digest


def reported(event: dict[str, Any]) -> str | None:
    """The manifest's digest, if this event tells it: `aux` of classic engines, words where containerd keeps images."""
    if found := event.get("aux", {}).get("Digest"):
        return str(found)
    match = re.search(r"\bdigest: (sha256:[0-9a-f]{64})\b", str(event.get("status", "")))
    return match[1] if match else None


def read_back(client: docker.DockerClient, repository: str, tag: str, digest: str, image: Local) -> Manifest | None:
    """The manifest in the registry, proven to be the one pushed; None if only an engine may read there."""
    host, _, path = repository.partition("/")
    manifest = None
    try:
        if re.fullmatch(HOST, host):
            manifest = read_manifest(host, path, tag, image.platform)
    except (RegistryError, requests.RequestException, docker.errors.DockerException):
        pass
    if manifest and manifest.digest != digest:  # a remote engine's localhost is another one
        manifest = None
    found = manifest.digest if manifest else ""
    if not manifest:  # the engine's way: the same credentials, certificates, proxies and loopback as the push
        try:
            found = str(client.api.inspect_distribution(f"{repository}:{tag}")["Descriptor"]["digest"])
        except docker.errors.APIError as error:
            raise explain(first_line(error), repository) from error
    if found != digest:
        raise PushError(
            f"{repository}:{tag} was pushed as {digest}, and the registry shows {found}: something else pushes "
            "the same name. Push again when it is done."
        )
    if manifest and image.id not in (manifest.config, manifest.digest):  # containerd's store names images by manifest
        raise PushError(f"{repository}:{tag} holds image {manifest.config}, and here it is {image.id}. Push again.")
    return manifest


def clean(message: str) -> str:
    """Without what may be a secret: users in URLs, and their queries, which can be signatures."""
    message = re.sub(r"(\w+://)[^/@\s\"]*@", r"\1", message)
    return re.sub(r"(\w+://[^?\s\"]*)\?[^\s\"]*", r"\1", message)


def explain(message: str, repository: str) -> PushError:
    """An engine's or a registry's words as one line with the remedy. Wording of engine 20.10 and registry 2.8."""
    host = repository.split("/")[0] if re.fullmatch(HOST, repository.split("/")[0]) else ""
    place = host or "the default registry"
    said = clean((message.strip().splitlines() or ["no reason given"])[0])[:300].rstrip(". ")
    text = said.lower()

    def has(*words: str) -> bool:
        return any(word in text for word in words)

    if has("no basic auth credentials", "unauthorized", "authentication required", " 401", "incorrect username"):
        return PushError(f"{place} wants a login for {repository}: {said}. Run: docker login {host}".rstrip())
    if has("denied", "forbidden", " 403", "insufficient_scope"):
        return PushError(
            f"{place} does not let this user push {repository}: {said}. Ask for the right to, or log in as another "
            f"user: docker login {host}".rstrip()
        )
    if has("http response to https client"):
        return PushError(
            f"{place} speaks plain HTTP: {said}. If you trust the way to it, list it under insecure-registries in the "
            "engine's daemon.json and restart the engine."
        )
    if has("x509:", "certificate", "tls: "):
        return PushError(
            f"The engine does not trust the certificate of {place}: {said}. "
            f"Put the CA that signed it into /etc/docker/certs.d/{host}/ca.crt."
        )
    if has("no space left on device"):
        return PushError(f"A disk is full, here or at {place}: {said}. Make room and push again.")
    if has("no such host", "name resolution", "server misbehaving"):
        return LostError(f"The engine knows no machine of the name in {place}: {said}. Check the name and the network.")
    if has("connection refused"):
        return LostError(f"Nothing listens at {place}: {said}. Start the registry, or check host and port.")
    if has("timeout", "timed out", "deadline exceeded", "no route to host", "network is unreachable"):
        return LostError(f"{place} does not answer: {said}. Check the network and the registry.")
    if has(
        "eof",
        "reset by peer",
        "broken pipe",
        "http status: 5",
        "closed network connection",
        "closed idle connection",
        "blob upload",
    ):
        return LostError(f"{place} broke off: {said}. Look at its log.")
    return PushError(f"Pushing to {repository} failed: {said}. Mend that and push again.")


def describe(pushed: Pushed, where: str) -> str:
    size = "" if pushed.bytes_sent is None else f", {pushed.bytes_sent / 1e6:.1f} MB"
    count = f"{pushed.layers_sent} of {pushed.layers} layers sent{size}"
    return f"{pushed.name} is {where}, {pushed.digest}, {count}, {pushed.seconds:.1f} s"


def push_all(
    keys: str, registry: str, host: str, *, as_json: bool = False, dry: bool = False, ssh_config: Path | None = None
) -> dict[str, str]:
    """Push our own images, built where they are missing: to the registry, or, without one, to the host.

    Returns the names of what was pushed, by the recipes' keys.
    """
    wanted = recipes.choose(keys)
    if dry:
        for recipe in wanted:
            print(f"push: would send {recipe.name} to {registry or host}, as far as it is not there")
        return {}
    names = {}
    with closing(connect()) as client:
        for recipe in wanted:
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

    def tell(text: str) -> None:
        note(text, "push")

    if registry:
        pushed, where = to_registry(client, name, registry, say=tell), "there"
    elif host:
        pushed = to_host(client, name, host, say=tell, program=program, ssh_config=ssh_config)
        where = f"on {host}"
    else:
        raise InputError("There is no place to push to. Give a registry or a host.")
    print(json.dumps(asdict(pushed)) if as_json else f"push: {describe(pushed, where)}", flush=True)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fractal.images.push", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", help="repository:tag of an image here")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--registry", metavar="HOST[:PORT][/PATH]", help="push there; log in with docker login")
    where.add_argument("--host", metavar="ALIAS", help="push to this machine's engine, over ssh; or USER@HOST")
    parser.add_argument(
        "--program", choices=get_args(remote_engine.Program), default="auto", help="the far registry's program"
    )
    parser.add_argument("--ssh-config", type=Path, metavar="FILE", help="instead of ~/.ssh/config")
    given = parser.parse_args(words)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else nohup's
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))  # not at once: what was begun is undone

    def work() -> None:
        with closing(connect()) as client:
            push(client, given.name, given.registry, given.host, program=given.program, ssh_config=given.ssh_config)

    return report_errors(work, "push")


if __name__ == "__main__":
    sys.exit(main())
