"""What the engine is asked for a sandbox: the hardened container, from its configuration to its open streams.

Imports little, so that a command can ask for its container first and load the rest meanwhile:

    with ContainerAhead(limits=limits) as ahead:
        ...                                          # imports, files
        with Sandbox(limits=limits, ahead=ahead) as sandbox:
"""

import os
import random
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from fractal.sandbox.host import engine, source
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
LABEL_VARIABLE, SESSION_LABEL = "FRACTAL_LABEL", "fractal.session"


def hardening(slots: int, limits: Limits, first_uid: int, cpus: int) -> dict[str, Any]:
    """The host's part of the configuration, which walls the container in: HostConfig of the engine's API."""
    scratch = f"rw,noexec,nosuid,nodev,size={limits.file_mib}m,nr_inodes=1024,mode=0710,uid=0"
    memory = container_memory(slots, limits)
    return {
        "NetworkMode": "none",
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "CapAdd": ["SETUID", "SETGID", "KILL"],
        "SecurityOpt": ["no-new-privileges", f"seccomp={SECCOMP.read_text()}"],
        "PidsLimit": container_processes(slots),
        "Memory": memory,
        "MemorySwap": memory,
        "NanoCpus": min(slots, cpus) * 1_000_000_000,
        "Tmpfs": {f"/scratch/{i}": f"{scratch},gid={first_uid + i}" for i in range(slots)}
        | {"/tmp": "ro,noexec,nosuid,nodev,size=4k,mode=0700"},  # gVisor would put a writable one there
        "IpcMode": "none",
        "AutoRemove": True,
        "LogConfig": {"Type": "none"},
    }


def configuration(
    image: str, limits: Limits, slots: int | None, runtime: str | None, cpus: int, volume: str | None = None
) -> dict[str, Any]:
    """The container's configuration as the engine's API has it; with a volume for its socket, or attached streams."""
    slots = min(slots or cpus, MAX_SLOTS)
    # A container's own range of uids: RLIMIT_NPROC counts a uid's processes across containers.
    first_uid = random.SystemRandom().randrange(100_000, 1_000_000_000, 1000)
    host = hardening(slots, limits, first_uid, cpus)
    command = ["--slots", str(slots), "--first-uid", str(first_uid)]
    if runtime:
        host["Runtime"] = runtime
    if is_gvisor(runtime):
        host["PidsLimit"] += GVISOR_THREADS
    if volume:
        host["Binds"] = [f"{volume}:{SOCKET.rpartition('/')[0]}:rw"]
        command += ["--socket", SOCKET]
    attached = volume is None  # with StdinOnce: when this process dies, the container's input ends, and so does it
    return {
        "Image": image,
        "Cmd": command,
        "OpenStdin": attached,
        "StdinOnce": attached,
        "AttachStdin": attached,
        "AttachStdout": True,
        "AttachStderr": True,
        "Env": ["PYTHONHASHSEED=0", "LANG=C.UTF-8", "TZ=UTC"],
        "Labels": {"fractal.sandbox": "1", **session_label()},
        "HostConfig": host,
    }


def session_label() -> dict[str, str]:
    """With FRACTAL_LABEL=NAME: the label that tells a session's containers and volumes from those of others."""
    session = os.environ.get(LABEL_VARIABLE)
    return {SESSION_LABEL: session} if session else {}


def is_gvisor(runtime: str | None) -> bool:
    return runtime is not None and "runsc" in runtime


class Started(NamedTuple):
    """A container that runs, and its attached streams."""

    container: str  # its id
    streams: socket.socket


def start(image: str, limits: Limits, slots: int | None, runtime: str | None) -> Started:
    """Create and start a container. Raises engine.RequestError (404 where the engine lacks the image), OSError."""
    cpus = int(engine.request("GET", "/info").get("NCPU", 1))
    created = engine.request("POST", "/containers/create", configuration(image, limits, slots, runtime, cpus))["Id"]
    streams: socket.socket | None = None
    try:
        streams = engine.attach(created)
        engine.request("POST", f"/containers/{created}/start")
    except BaseException:
        if streams is not None:
            streams.close()
        engine.remove(created)
        raise
    return Started(created, streams)


class ContainerAhead:
    """A container that starts in a thread while its user is busy with something else. A context manager.

    The first Sandbox that is given it takes the container; later ones start their own. One that nobody took is removed
    at the end, and what was given back is gone by then.
    """

    def __init__(
        self,
        *,
        limits: Limits = DEFAULT_LIMITS,
        slots: int | None = None,
        image: str | None = None,
        runtime: str | None = None,
    ) -> None:
        self._arguments = (image or source.image_name(), limits, slots, runtime)
        self._started: Started | None = None
        self._error: Exception | None = None
        self._removing: list[threading.Thread] = []
        self._thread: threading.Thread | None = threading.Thread(target=self._start, name="container")
        self._thread.start()

    def _start(self) -> None:
        try:
            self._started = start(*self._arguments)
        except Exception as error:
            self._error = error

    def take(self) -> Started | None:
        """The container, for the first who asks. Raises what `start` raises."""
        if self._thread is None:
            return None
        thread, self._thread = self._thread, None
        try:
            thread.join()
        except BaseException:
            self._thread = thread  # Ctrl-C: left to __exit__
            raise
        if self._error is not None:
            raise self._error
        return self._started

    def remove(self, container: str) -> None:
        """Begin to remove it; __exit__ waits for the end."""
        thread = threading.Thread(target=engine.remove, args=(container,), name="container-removal")
        self._removing.append(thread)
        thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join()
            if self._started is not None:
                self._started.streams.close()
                engine.remove(self._started.container)
        for thread in self._removing:
            thread.join()
