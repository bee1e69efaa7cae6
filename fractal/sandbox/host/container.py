"""The sandbox of this machine's engine: a container of one's own, or a sidecar.

    with Sandbox() as sandbox:
        for label in sandbox.verify(samples, problems):
            reward = float(label.passed)

What is sent over the connection is client.py's; what the engine is asked for is launch.py's; limits.py says what a
program may use.
"""

import os
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fractal.errors import InputError
from fractal.install import docker_engine
from fractal.sandbox.host import engine, launch, source
from fractal.sandbox.host.client import SandboxError, UnsafeError, Verifier
from fractal.sandbox.host.connection import AttachedConnection, SocketConnection
from fractal.sandbox.host.launch import LABEL_VARIABLE, SESSION_LABEL, SOCKET, ContainerAhead, session_label
from fractal.sandbox.host.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    import docker  # late: see engine.py

__all__ = ["LABEL_VARIABLE", "SESSION_LABEL", "SOCKET", "Sandbox", "SandboxError", "session_label"]

# What cannot be seen from inside gVisor, a kernel of its own below the container: it takes the place of the host's
# seccomp profile, and the host's cgroups hold it as a whole. The named option that allows this is --runtime=runsc.
UNSEEN_IN_GVISOR = frozenset({"seccomp", "scratch", "memory_limit", "pids_limit"})
PACKAGES_LABEL = "fractal.packages"  # of an image: images/packages.py
SIDECAR = "fractal-sandbox"  # default name of the container and of its volume


class Sandbox(Verifier):
    """A hardened container that runs untrusted programs against tests. A context manager; threads may share it.

    `socket`: use the sidecar that listens there instead of a container of its own. `allow`: names of protections that
    may be missing (see `checks`). `ahead`: a container that is starting. Raises SandboxError when Docker, the image,
    or another protection is missing, and InputError for an unknown name in `allow`.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        slots: int | None = None,
        image: str | None = None,
        runtime: str | None = None,
        cache: bool = True,
        isolate: bool = False,
        allow: Collection[str] = (),
        socket: Path | None = None,
        ahead: ContainerAhead | None = None,
    ) -> None:
        super().__init__(self._connect, limits=limits, cache=cache, isolate=isolate)
        self.image = image or (source.image_name() if socket is None else "")
        self.image_id = ""
        self.packages: list[str] = []  # NAME==VERSION of those that were asked for, beside the standard library
        self._asked_slots = slots
        self._runtime = runtime
        self._allow = frozenset(allow)
        self._socket = socket
        self._ahead = ahead

    def check(self) -> None:
        """Whether the engine answers and has the image; starts nothing. Raises SandboxError."""
        if self._socket is not None:
            if not self._socket.is_socket():
                raise SandboxError(f"--socket {self._socket}: no sandbox listens there. Start one: `fractal serve`.")
            # Whoever started the sidecar knows its image: images/containers.py.
            name, _, self.image_id = os.environ.get("FRACTAL_SANDBOX_IMAGE", "").partition("@")
            self.image = name or f"sidecar {self._socket}"
            return
        try:
            self._look_up_image()
        except (engine.RequestError, OSError) as error:
            raise self._start_error(error) from error

    def _look_up_image(self) -> None:
        self.image_id, labels = engine.image(self.image)
        self.packages = [package for package in labels.get(PACKAGES_LABEL, "").split(",") if package]

    def __enter__(self) -> Self:
        if self._socket is not None:
            self.check()
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_protections(self, checks: dict[str, dict[str, Any]]) -> None:
        """Refuse to go on unless every protection is in force, or may be missing by name."""
        if unknown := self._allow - checks.keys():
            names = ", ".join(checks)
            raise InputError(f"--allow-missing {', '.join(sorted(unknown))}: no such protection. There are: {names}.")
        allow = self._allow | (UNSEEN_IN_GVISOR if launch.is_gvisor(self._runtime) else frozenset())
        missing = [f"{n} ({c['found']})" for n, c in checks.items() if not c["ok"] and n not in allow]
        if missing:
            raise UnsafeError(
                f"The sandbox is not safe: not in force: {', '.join(missing)}. The engine dropped an option; no "
                "program was run. `fractal doctor` shows the details; --allow-missing NAME runs all the same."
            )
        self.checks = {n: {**c, "allowed": True} if not c["ok"] else c for n, c in checks.items()}

    def _connect(self) -> AttachedConnection | SocketConnection:
        return self._connect_sidecar() if self._socket is not None else self._start_container()

    def _connect_sidecar(self) -> SocketConnection:
        assert self._socket is not None
        try:
            return SocketConnection(self._socket)
        except OSError as error:
            raise SandboxError(
                f"--socket {self._socket}: {error.strerror}. Start a sidecar: `fractal serve`."
            ) from error

    def _start_container(self) -> AttachedConnection:
        remove = engine.remove
        try:
            started = self._ahead.take() if self._ahead is not None else None
            if started is not None and self._ahead is not None:
                remove = self._ahead.remove
            else:
                started = launch.start(self.image, self.limits, self._asked_slots, self._runtime)
            connection = AttachedConnection(started.container, started.streams, remove)
            if not self.image_id:
                self._look_up_image()
            return connection
        except (engine.RequestError, OSError) as error:
            raise self._start_error(error) from error

    def _start_error(self, error: engine.RequestError | OSError) -> SandboxError:
        """Which of the usual things is wrong, in one line."""
        if isinstance(error, OSError):
            reason = docker_engine.problem() or f"The Docker engine at {docker_engine.address()} fails: {error}."
            return SandboxError(reason)
        if error.status == 404 and "image" in str(error).lower():
            build = "`python -m fractal.images.build`"
            return SandboxError(f"Docker: the sandbox image {self.image} is not here. Build it: {build}.")
        remedy = " Is gVisor installed, and named in /etc/docker/daemon.json?" if "runtime" in str(error) else ""
        return SandboxError(f"Docker: the sandbox container does not start: {str(error)[:300]}.{remedy}")


def connect() -> "docker.DockerClient":
    """A client of the Docker engine, by the SDK. Raises SandboxError that says which of the usual things is wrong."""
    import docker
    import docker.errors
    import requests

    if trouble := docker_engine.problem():
        raise SandboxError(trouble)
    client: docker.DockerClient | None = None
    try:
        client = docker.from_env(timeout=120)
        client.ping()
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        if client is not None:
            client.close()
        raise SandboxError(
            f"The Docker engine at {docker_engine.address()} refuses: {str(error)[:300]}. Run `docker info` to see why."
        ) from error
    return client


def start_sidecar(
    *,
    volume: str = SIDECAR,
    name: str = SIDECAR,
    limits: Limits | None = None,
    slots: int | None = None,
    image: str | None = None,
    runtime: str | None = None,
    client: "docker.DockerClient | None" = None,
) -> str:
    """Start a sandbox that serves a Unix socket in a volume, detached; returns the container's id.

    `volume` is the name of a Docker volume or a folder's absolute path; other containers mount it and use
    Sandbox(socket=...). `client`: of another engine than the machine's. Raises SandboxError, also when one of that name
    runs already.
    """
    import docker.errors
    import requests

    given, client = client, client or connect()
    try:
        image = image or source.image_name()
        if not volume.startswith("/"):  # made here, for its label; one that is there stays as it is
            client.api.create_volume(volume, labels=session_label())
        cpus = int(client.info().get("NCPU", 1))
        configuration = launch.configuration(image, limits or DEFAULT_LIMITS, slots, runtime, cpus, volume)
        created: str = client.api.create_container_from_config(configuration, name)["Id"]
        client.api.start(created)
        return created
    except docker.errors.ImageNotFound:
        raise SandboxError(
            f"Docker: the sandbox image {image} is not here. Build it: `python -m fractal.images.build`."
        ) from None
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        remedy = f" `fractal serve --stop --name {name}` ends it." if "already in use" in str(error) else ""
        raise SandboxError(f"Docker: the sidecar does not start: {str(error)[:300]}.{remedy}") from error
    finally:
        if given is None:
            client.close()


def stop_sidecar(name: str = SIDECAR, client: "docker.DockerClient | None" = None) -> bool:
    """End a sidecar; False if there is none of that name."""
    import docker.errors

    given, client = client, client or connect()
    try:
        client.api.remove_container(name, force=True)
    except docker.errors.NotFound:
        return False
    except docker.errors.DockerException as error:
        raise SandboxError(f"Docker: cannot end {name}: {str(error)[:300]}.") from error
    finally:
        if given is None:
            client.close()
    return True
