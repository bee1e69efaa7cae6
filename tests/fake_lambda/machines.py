"""Instances of the fake cloud that one can really enter: a simulated machine in a container for each.

    with Machines() as machines, FakeLambda(machines=machines) as cloud: ...

Each is labelled with the process that owns it: what a killed one has left, the next `Machines` removes.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import docker
import docker.errors
import psutil

from tests.machine import FOLDER, GOOD, LABEL, Condition, Machine, ensure_image

INSTANCE = "fractal.instance"
FILE_SYSTEM = "file-system"  # value of the label LABEL of a volume that stands for a file system
OWNER = "fractal.owner"


def owner(pid: int) -> str:
    """This process and no later one with its number, seen from the same container."""
    return f"{pid}/{psutil.Process(pid).create_time()}/{os.readlink(f'/proc/{pid}/ns/pid')}"


def is_alive(mark: str) -> bool:
    """Whether the owner lives; yes if that cannot be known from here."""
    try:
        pid, _, namespace = mark.split("/")
        if namespace != os.readlink("/proc/self/ns/pid"):
            return True
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE and owner(int(pid)) == mark
    except (psutil.Error, OSError):
        return False
    except ValueError:
        return True


def sweep() -> list[str]:
    """Remove machines, with their disks, and file systems whose owner is dead; the names of the instances."""
    removed = []
    client = docker.from_env()
    try:
        for container in client.containers.list(
            all=True, ignore_removed=True, filters={"label": [f"{LABEL}=machine", OWNER]}
        ):
            if not is_alive(container.labels[OWNER]):
                try:
                    container.remove(force=True, v=True)
                except docker.errors.APIError:
                    continue  # another sweep has it
                shutil.rmtree(container.labels.get(FOLDER, ""), ignore_errors=True)
                removed.append(container.labels.get(INSTANCE, container.name))
        for volume in client.volumes.list(filters={"label": f"{LABEL}={FILE_SYSTEM}"}):
            if not is_alive(volume.attrs["Labels"][OWNER]):
                with contextlib.suppress(docker.errors.APIError):
                    volume.remove()
    finally:
        client.close()
    return removed


class Running:
    """A machine that boots or runs. `machine` is for the test: sh, silent, host_key."""

    def __init__(self, machine: Machine, ended: Callable[[], None]) -> None:
        self.machine = machine
        self._ended = ended
        self._lock = threading.Lock()
        self._alive = True

    @property
    def ip(self) -> str:
        return self.machine.ip

    def restart(self) -> str:
        """Boot it again, its disk stays; the new address."""
        with self._lock:
            return self.machine.restart(new_ip=True)

    def stop(self) -> None:
        """End it, and its disk; once more is no error."""
        with self._lock:
            if self._alive:
                self._alive = False
                self.machine.stop()
                self._ended()


class Machines:
    """Starts a machine for each instance; on leaving, those that still run are ended, and file systems removed."""

    def __init__(self, condition: Condition = GOOD) -> None:
        self.condition = condition  # of the next one that starts
        self.running: dict[str, Running] = {}  # by instance id
        self._file_systems: dict[str, str] = {}  # by name: a volume of the engine, which outlives the machines
        self._lock = threading.Lock()
        sweep()
        client = docker.from_env()
        try:
            ensure_image(client)  # not inside an answer to a launch
        finally:
            client.close()

    def start(self, instance_id: str, public_key: str, file_systems: Mapping[str, str], user_data: str = "") -> Running:
        """Back in about half a second, as soon as the machine has an address; it is still booting then.

        `file_systems`: their names by where they are mounted.
        """
        volumes = {path: self._volume(name) for path, name in file_systems.items()}
        machine = Machine(
            condition=self.condition,
            public_key=public_key,
            user_data=user_data,
            labels={INSTANCE: instance_id, OWNER: owner(os.getpid())},
            file_systems=volumes,
            wait=False,
        )
        machine.start()
        running = Running(machine, lambda: self._forget(instance_id))
        with self._lock:
            self.running[instance_id] = running
        return running

    def _volume(self, name: str) -> str:
        """The volume that stands for the file system of this name."""
        with self._lock:
            if name not in self._file_systems:
                client = docker.from_env()
                try:
                    labels = {LABEL: FILE_SYSTEM, OWNER: owner(os.getpid())}
                    self._file_systems[name] = str(client.volumes.create(labels=labels).name)
                finally:
                    client.close()
            return self._file_systems[name]

    def stop_all(self) -> None:
        with self._lock:
            running = list(self.running.values())
        for one in running:
            one.stop()

    def _forget(self, instance_id: str) -> None:
        with self._lock:
            self.running.pop(instance_id, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop_all()
        client = docker.from_env()
        try:
            for volume in self._file_systems.values():
                client.volumes.get(volume).remove()
        finally:
            client.close()
