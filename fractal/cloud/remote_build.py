"""Builds images on the instance: by its own engine and docker command, over the one ssh connection.

Rendering, locks, names, labels and configuration are those of a build here (fractal/images); this machine needs no
Docker. What is sent: Dockerfile and context, and as files in memory there what the network asks for (certificates,
settings of pip and apt). A lost connection ends the build there; repeated, it goes on from the builder's cache.
"""

import io
import os
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import IO, NamedTuple

import docker

from fractal.cloud import layer_cache
from fractal.cloud.remote_host import Remote, RemoteError, script
from fractal.console import note
from fractal.errors import OutsideError
from fractal.images import (
    base_archive,
    buildkit,
    debian,
    docker_client,
    image_config,
    network,
    placement,
    recipes,
    remote_engine,
    ssh,
)
from fractal.images import build as images
from fractal.images.build_errors import BuildError
from fractal.images.recipes import Recipe
from fractal.install import docker_engine

APT_TIMEOUT_S = 180
BASE_TIMEOUT_S = 900.0
END_TIMEOUT_S = 15.0  # for the builder there to end after an interruption here
ATTEMPTS = 10  # of a build whose connection is lost
PROBE_BYTES = 500_000  # sent once to measure the uplink


class DockerCommand(NamedTuple):
    """A docker command of the instance that can use BuildKit."""

    sudo: str  # "sudo -n", or "" where the user may call it
    program: str  # its path


def find_docker(remote: Remote) -> DockerCommand:
    """A docker command with BuildKit on the instance; the plugin is installed where it lacks. Raises RemoteError."""
    output = remote.check("look for docker", script("find_builder"))
    if "lacks " in output and not output.startswith(("direct ", "sudo ")):
        note("BuildKit's plugin is missing there: installing it", "lambda")
        remote.run(script("install_buildx"), str(APT_TIMEOUT_S), timeout_s=6 * APT_TIMEOUT_S)
        output = remote.check("look for docker", script("find_builder"))
    for line in output.splitlines():
        how, _, program = line.partition(" ")
        if how in ("direct", "sudo"):
            return DockerCommand("sudo -n" if how == "sudo" else "", program)
    if output:
        raise RemoteError(
            f"Docker on {remote.host} cannot use BuildKit. There run: sudo apt-get install docker-buildx-plugin, or "
            "docker-buildx; or build here: --on=here."
        )
    raise RemoteError(f"No docker command of {remote.host} reaches an engine. Run: invoke wait, which repairs that.")


def build(
    link: ssh.SshConnection, command: DockerCommand, request: buildkit.BuildRequest, name: str, log: Path
) -> tuple[str, int]:
    """Build on the instance. Returns the image's id and how many steps were run.

    Raises BuildError, and SshConnectionError if the connection is lost, which ends the build.
    """
    arguments = {key: value for key, value in request.build_arguments.items() if key not in buildkit.PROXIES}
    with tempfile.TemporaryDirectory(prefix="fractal-build-") as temporary:
        folder = Path(temporary)
        buildkit.write_files(request, folder)
        secrets, context = folder / "secrets.tar", folder / "context.tar.gz"
        _pack(secrets, "w", folder, *(f"secrets/{key}" for key in request.secrets))
        _pack(context, "w:gz", folder, buildkit.DOCKERFILE, "context")
        sizes = [str(file.stat().st_size) for file in (secrets, context)]
        words = [f"{key}={value}" for key, value in (buildkit.ENVIRONMENT | arguments).items()]
        there = f"/tmp/fractal-build-{token_hex(8)}"
        words += [command.program, *buildkit.command_line(request, arguments, there)]
        child = link.stream(
            script("build_image"),
            *(command.sudo, there, *sizes, str(ssh.HEARTBEAT_TIMEOUT_S), *words),
            stdin=subprocess.PIPE,
        )
        output, ids = buildkit.BuildOutput(), list[str]()
        with secrets.open("rb") as first, context.open("rb") as second, _Input(child, first, second):
            assert child.stdout is not None
            text = io.TextIOWrapper(io.BufferedReader(child.stdout), errors="replace")  # type: ignore[type-var]
            output.read_all(_without_id(text, ids), name, log)
            code = child.wait()
    if code in (0, 255) and not ids:  # 255: of ssh itself
        time.sleep(0.2)
        link.check_alive()
        raise ssh.SshConnectionError(f"The build on {link.host} broke off. Run the command again: it goes on.")
    if code:
        raise output.error(name, log, link.host)
    return ids[0], output.steps_run


def _pack(archive: Path, mode: str, folder: Path, *names: str) -> None:
    """An archive of files and folders; those below secrets/ lie at its root, and only their owner reads them."""

    def entry(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        if member.name.startswith("secrets/"):
            member.name, member.mode = member.name.removeprefix("secrets/"), 0o400
        return member

    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        for name in names:
            tar.add(folder / name, name, filter=entry)


def _without_id(lines: Iterator[str] | IO[str], ids: list[str]) -> Iterator[str]:
    """The builder's lines; the image's id goes into `ids`."""
    for line in lines:
        if line.startswith("fractal-image "):
            ids.append(line.split()[1])
        else:
            yield line


class _Input:
    """Writes files and then heartbeats into a process; on leaving, its input ends, and soon the process."""

    def __init__(self, child: subprocess.Popen[bytes], *files: IO[bytes]) -> None:
        self._child, self._files, self._ended = child, files, threading.Event()
        self._thread = threading.Thread(target=self._write, name="build's input", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(2.0)
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(END_TIMEOUT_S)
        self._child.kill()  # nothing, if it has ended
        self._child.wait()
        self._thread.join()
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                stream.close()

    def _write(self) -> None:
        stdin = self._child.stdin
        assert stdin is not None
        with suppress(OSError, ValueError):  # the process has ended: its output says why
            for file in self._files:
                while data := file.read(1 << 16):
                    view = memoryview(data)
                    while view:
                        view = view[stdin.write(view) :]
            while not self._ended.wait(ssh.HEARTBEAT_S):
                stdin.write(b".")
        with suppress(OSError):
            stdin.close()


def bootstrap(link: ssh.SshConnection, command: DockerCommand, ca: Path | None, kind: debian.Kind, log: Path) -> str:
    """Make a base image of Debian's packages on the instance; its name. Raises BootstrapError."""
    packed = io.BytesIO()
    settings = network.of_this_machine(sources=True, ca=ca)
    files = {key: settings.secrets[key] for key in ("apt", "ca", "sources") if key in settings.secrets}
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in {**files, "filter.py": Path(base_archive.__file__).read_bytes()}.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o400 if name in files and name != "apt" else 0o600
            tar.addfile(member, io.BytesIO(data))
    with tempfile.TemporaryFile() as archive:
        archive.write(packed.getvalue())
        archive.seek(0)
        left_out = debian.left_out(kind, own_sources="sources" in files)
        done = link.run(
            script("bootstrap_base"),
            *(*command, kind.name, debian.SUITE, kind.variant, ",".join(kind.packages), left_out, str(kind.modes)),
            stdin=archive,
            timeout_s=BASE_TIMEOUT_S,
        )
    with log.open("a") as file:
        file.write(done.stdout + done.stderr)
    if done.returncode:
        reason = debian.reason(io.StringIO(done.stdout + done.stderr)).rstrip(".")
        raise debian.BootstrapError(
            f"{link.host} reaches no registry, and makes no base from Debian's packages: {reason}. Name an image that "
            f"it can pull: --base=; or build here: --on=here. Log: {log}"
        )
    return kind.name


def ensure(remote: Remote, recipe: Recipe, options: images.Options, file_system: str = "") -> images.Built:
    """The recipe's image on the instance; built there if it is missing. A lost connection is made again.

    `file_system`: Fractal's folder on a file system there, which keeps layers; "" if there is none. Raises BuildError,
    InputError, RemoteError, SshError.
    """
    for _ in range(ATTEMPTS):
        link = remote.link
        try:
            command = find_docker(remote)
            cache = _layer_cache(remote, command, file_system)
            link = remote.link
            builder = images.Builder(
                partial(build, link, command), partial(bootstrap, link, command, options.ca), remote.host, cache
            )
            with remote.engine() as client:
                wanted = options == images.Options() and not docker_client.has_image(client, recipe.name)
                if cache and wanted and layer_cache.take(client, cache, recipe):
                    note(f"{recipe.name} was kept on the file system", "lambda")
                built = images.ensure(client, recipe, note, options, builder)
                if cache and built.built:
                    layer_cache.keep(remote, client, *command, cache, recipe)
                return built
        except OutsideError as error:
            if (lost := _lost(link, error)) is None:
                raise
            remote.reconnect(lost, link)
    raise BuildError(
        f"Building {recipe.name} on {remote.host}: the connection was lost {ATTEMPTS} times. Run it again."
    )


def _layer_cache(remote: Remote, command: DockerCommand, file_system: str) -> str:
    """The repository that keeps layers; "" if there is none, or it does not start, which is said."""
    if not file_system:
        return ""
    try:
        return layer_cache.start(remote, *command, file_system)
    except (RemoteError, remote_engine.RemoteEngineError) as error:
        note(f"layers are not kept on the file system: {error}", "lambda")
        return ""


def _lost(link: ssh.SshConnection, error: OutsideError) -> ssh.SshConnectionError | None:
    """The loss of the connection that an error comes from, if that is its cause."""
    if isinstance(error, ssh.SshConnectionError):
        return error
    try:
        link.check_alive()
    except ssh.SshConnectionError as lost:
        return lost
    return None


def choose(remote: Remote, recipe: Recipe, uplink_bits_per_s: float) -> placement.Choice:
    """Whether to build the recipe's image on the instance, or here and push it."""
    with remote.engine() as client:
        processors = int(client.info()["NCPU"])
        present = [image.attrs for image in client.images.list() if any("fractal-" in tag for tag in image.tags)]
    layers: dict[str, int] = {}
    engine_here = docker_engine.problem() is None
    if engine_here:
        with closing(docker_client.connect()) as here:
            layers = layer_sizes(here, recipe.name)
    facts = placement.Facts(
        host=remote.host,
        engine_here=engine_here,
        built_here=bool(layers),
        same_processor=recipe.processor == recipes.NATIVE,
        push_bytes=placement.missing_bytes(
            recipe.key, layers, {layer for attrs in present for layer in attrs["RootFS"]["Layers"]}
        ),
        context_bytes=sum(path.lstat().st_size for path in recipe.image.context().values()),
        uplink_bits_per_s=uplink_bits_per_s,
        processors_here=os.cpu_count() or 1,
        processors_there=processors,
    )
    return placement.choose(facts)


def layer_sizes(client: docker.DockerClient, name: str) -> dict[str, int]:
    """Diff id -> bytes of the layers of an image; empty if the engine does not have it."""
    if not docker_client.has_image(client, name):
        return {}
    layers = client.images.get(name).attrs["RootFS"]["Layers"]
    lines = image_config.layer_history(client.api.history(name), len(layers))
    return {layer: int(line["Size"]) for layer, line in zip(layers, lines, strict=True)}


def uplink(remote: Remote) -> float:
    """Bits a second from here to the instance, by sending PROBE_BYTES that cannot be compressed."""
    link = remote.link
    link.run("true")
    began = time.monotonic()
    link.run("true")
    empty_s = time.monotonic() - began
    with tempfile.TemporaryFile() as probe:
        probe.write(os.urandom(PROBE_BYTES))
        probe.seek(0)
        began = time.monotonic()
        link.run("cat > /dev/null", stdin=probe)
        return 8 * PROBE_BYTES / max(1e-3, time.monotonic() - began - empty_s)


def only_there(remote: Remote, chosen: Iterable[Recipe]) -> set[str]:
    """The keys of those recipes whose image the instance has and this machine lacks: there is nothing to push."""
    with ExitStack() as stack:
        there = stack.enter_context(remote.engine())
        here = None if docker_engine.problem() else stack.enter_context(closing(docker_client.connect()))
        return {
            recipe.key
            for recipe in chosen
            if docker_client.has_image(there, recipe.name) and not (here and docker_client.has_image(here, recipe.name))
        }


def compare(remote: Remote, name: str) -> str | None:
    """Whether the layers of an image there are those of the image here, and where not; None if it is not here."""
    if docker_engine.problem() is not None:
        return None
    with closing(docker_client.connect()) as here:
        if not docker_client.has_image(here, name):
            return None
        ours = here.images.get(name).attrs["RootFS"]["Layers"]
        lines = image_config.layer_history(here.api.history(name), len(ours))
    with remote.engine() as client:
        theirs = client.images.get(name).attrs["RootFS"]["Layers"]
    return difference(name, ours, theirs, [str(line["CreatedBy"]) for line in lines])


def difference(name: str, here: list[str], there: list[str], commands: list[str]) -> str:
    """A line about the layers of an image built twice. `here`, `there`: diff ids; `commands` made those here."""
    differing = [i for i, pair in enumerate(zip(here, there, strict=False)) if pair[0] != pair[1]]
    if len(here) != len(there):
        return f"{name} has {len(there)} layers there and {len(here)} here: the bases differ"
    if not differing:
        return f"{name}: all {len(here)} layers are those of the image built here"
    shown = ", ".join(f"{i + 1} ({buildkit.shorten(commands[i]) or 'the base'})" for i in differing)
    return f"{name}: of {len(here)} layers, these differ from the image built here: {shown}"
