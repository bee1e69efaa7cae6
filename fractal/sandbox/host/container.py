"""What Docker is asked for a sandbox: to start the hardened container, or a sidecar, and to connect to it.

    with Sandbox() as sandbox:
        for label in sandbox.verify(samples, problems):
            reward = float(label.passed)

What is sent over the connection is client.py's; what a program may use stands in limits.py.
"""

import os
import random
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import docker
import docker.errors
import requests

from fractal.errors import InputError
from fractal.install import docker_engine
from fractal.sandbox.host import source
from fractal.sandbox.host.client import SandboxError, UnsafeError, Verifier
from fractal.sandbox.host.connection import AttachedConnection, SocketConnection
from fractal.sandbox.host.limits import (
    DEFAULT_LIMITS,
    GVISOR_THREADS,
    MAX_SLOTS,
    Limits,
    container_memory,
    container_processes,
)

SECCOMP = Path(__file__).parents[3] / "docker" / "seccomp.json"
SOCKET = "/run/fractal/sandbox.sock"  # of a sidecar, in its volume
# What cannot be seen from inside gVisor, a kernel of its own below the container: it takes the place of the host's
# seccomp profile, and the host's cgroups hold it as a whole. The named option that allows this is --runtime=runsc.
UNSEEN_IN_GVISOR = frozenset({"seccomp", "scratch", "memory_limit", "pids_limit"})
LABEL_VARIABLE, SESSION_LABEL = "FRACTAL_LABEL", "fractal.session"
SIDECAR = "fractal-sandbox"  # default name of the container and of its volume


def hardening(slots: int, limits: Limits, first_uid: int, cpus: int) -> dict[str, Any]:
    """Options of `docker run` that wall the container in; names as in docker.types.HostConfig."""
    scratch = f"rw,noexec,nosuid,nodev,size={limits.file_mib}m,nr_inodes=1024,mode=0710,uid=0"
    memory = container_memory(slots, limits)
    return {
        "network_mode": "none",
        "read_only": True,
        "cap_drop": ["ALL"],
        "cap_add": ["SETUID", "SETGID", "KILL"],
        "security_opt": ["no-new-privileges", f"seccomp={SECCOMP.read_text()}"],
        "pids_limit": container_processes(slots),
        "mem_limit": memory,
        "memswap_limit": memory,
        "nano_cpus": min(slots, cpus) * 1_000_000_000,
        "tmpfs": {f"/scratch/{i}": f"{scratch},gid={first_uid + i}" for i in range(slots)}
        | {"/tmp": "ro,noexec,nosuid,nodev,size=4k,mode=0700"},  # gVisor would put a writable one there
        "ipc_mode": "none",
        "auto_remove": True,
    }


def session_label() -> dict[str, str]:
    """With FRACTAL_LABEL=NAME: the label that tells a session's containers and volumes from those of others."""
    session = os.environ.get(LABEL_VARIABLE)
    return {SESSION_LABEL: session} if session else {}


def connect() -> docker.DockerClient:
    """A client of the Docker engine. Raises SandboxError that says which of the usual things is wrong."""
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


class Sandbox(Verifier):
    """A hardened container that runs untrusted programs against tests. A context manager; threads may share it.

    `socket`: use the sidecar that listens there instead of a container of its own. `allow`: names of protections that
    may be missing (see `checks`). Raises SandboxError when Docker, the image, or another protection is missing, and
    InputError for an unknown name in `allow`.
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
    ) -> None:
        super().__init__(self._connect, limits=limits, cache=cache, isolate=isolate)
        self.image = image or (source.image_name() if socket is None else "")
        self.image_id = ""
        self._asked_slots = slots
        self._runtime = runtime
        self._allow = frozenset(allow)
        self._socket = socket
        self._client: docker.DockerClient | None = None

    def check(self) -> None:
        """Whether the engine answers and has the image; starts nothing. Raises SandboxError."""
        if self._socket is not None:
            if not self._socket.is_socket():
                raise SandboxError(f"--socket {self._socket}: no sandbox listens there. Start one: `fractal serve`.")
            # Whoever started the sidecar knows its image: images/containers.py.
            name, _, self.image_id = os.environ.get("FRACTAL_SANDBOX_IMAGE", "").partition("@")
            self.image = name or f"sidecar {self._socket}"
            return
        with closing(connect()) as client:
            self.image_id = _image_id(client, self.image)

    def __enter__(self) -> Self:
        self.check()
        if self._socket is None:
            self._client = connect()
        try:
            self.open()
        except BaseException:
            self._close_client()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._close_client()

    def _close_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def check_protections(self, checks: dict[str, dict[str, Any]]) -> None:
        """Refuse to go on unless every protection is in force, or may be missing by name."""
        if unknown := self._allow - checks.keys():
            names = ", ".join(checks)
            raise InputError(f"--allow-missing {', '.join(sorted(unknown))}: no such protection. There are: {names}.")
        allow = self._allow | (UNSEEN_IN_GVISOR if _is_gvisor(self._runtime) else frozenset())
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
        client = self._client
        assert client is not None
        try:
            created = _create(client, self.image, self.limits, self._asked_slots, self._runtime)
            container = client.containers.get(created)
            stream = client.api.attach_socket(created, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            line = AttachedConnection(container, stream)
            try:
                container.start()
            except BaseException:
                line.close()
                raise
            return line
        except (docker.errors.DockerException, requests.exceptions.RequestException, OSError) as error:
            reason = str(error)
            remedy = " Is gVisor installed, and named in /etc/docker/daemon.json?" if "runtime" in reason else ""
            raise SandboxError(f"Docker: the sandbox container does not start: {reason[:300]}.{remedy}") from error


def _is_gvisor(runtime: str | None) -> bool:
    return runtime is not None and "runsc" in runtime


def _image_id(client: docker.DockerClient, image: str) -> str:
    try:
        return client.images.get(image).id or ""
    except docker.errors.ImageNotFound:
        raise SandboxError(
            f"Docker: the sandbox image {image} is not here. Build it: `python -m fractal.images.build`."
        ) from None
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        raise SandboxError(f"Docker: cannot look for {image}: {str(error)[:300]}.") from error


def _create(
    client: docker.DockerClient,
    image: str,
    limits: Limits,
    slots: int | None,
    runtime: str | None,
    volume: str | None = None,
    name: str | None = None,
) -> str:
    """Create the container, with a volume for its socket or attached streams. Returns its id."""
    cpus = int(client.info().get("NCPU", 1))
    slots = min(slots or cpus, MAX_SLOTS)
    # A container's own range of uids: RLIMIT_NPROC counts a uid's processes across containers.
    first_uid = random.SystemRandom().randrange(100_000, 1_000_000_000, 1000)
    options = hardening(slots, limits, first_uid, cpus)
    if runtime:
        options["runtime"] = runtime
    if _is_gvisor(runtime):
        options["pids_limit"] += GVISOR_THREADS
    command = ["--slots", str(slots), "--first-uid", str(first_uid)]
    if volume:
        options["binds"] = [f"{volume}:{SOCKET.rpartition('/')[0]}:rw"]
        command += ["--socket", SOCKET]
    created = client.api.create_container(
        image,
        name=name,
        command=command,
        stdin_open=volume is None,  # with StdinOnce: when this process dies, the container's input ends, and so does it
        environment={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "TZ": "UTC"},
        labels={"fractal.sandbox": "1", **session_label()},
        host_config=client.api.create_host_config(
            **options, log_config=docker.types.LogConfig(type=docker.types.LogConfig.types.NONE)
        ),
    )
    identity: str = created["Id"]
    return identity


def start_sidecar(
    *,
    volume: str = SIDECAR,
    name: str = SIDECAR,
    limits: Limits | None = None,
    slots: int | None = None,
    image: str | None = None,
    runtime: str | None = None,
    client: docker.DockerClient | None = None,
) -> str:
    """Start a sandbox that serves a Unix socket in a volume, detached; returns the container's id.

    `volume` is the name of a Docker volume or a folder's absolute path; other containers mount it and use
    Sandbox(socket=...). `client`: of another engine than the machine's. Raises SandboxError, also when one of that name
    runs already.
    """
    given, client = client, client or connect()
    try:
        image = image or source.image_name()
        _image_id(client, image)
        if not volume.startswith("/"):  # made here, for its label; one that is there stays as it is
            client.api.create_volume(volume, labels=session_label())
        created = _create(client, image, limits or DEFAULT_LIMITS, slots, runtime, volume, name)
        client.api.start(created)
        return created
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        remedy = f" `fractal serve --stop --name {name}` ends it." if "already in use" in str(error) else ""
        raise SandboxError(f"Docker: the sidecar does not start: {str(error)[:300]}.{remedy}") from error
    finally:
        if given is None:
            client.close()


def stop_sidecar(name: str = SIDECAR, client: docker.DockerClient | None = None) -> bool:
    """End a sidecar; False if there is none of that name."""
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
