"""An attached file system: found, made ready for jobs, and named where it is not as it should be."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fractal.cloud import file_system
from fractal.cloud.ledger import Entry, FileSystemMount
from fractal.cloud.remote_host import Remote
from tests.machine import Machine
from tests.test_ledger import entry

pytestmark = [pytest.mark.docker, pytest.mark.cloud, pytest.mark.usefixtures("openssh")]
MOUNT = "/lambda/nfs/models"
WITH_MODELS = entry(file_systems=(FileSystemMount("models", MOUNT),))


@pytest.fixture
def machine(simulated_machine: Machine) -> Iterator[Machine]:
    """The shared machine, with a file system that root made."""
    simulated_machine.sh(f"mkdir -p {MOUNT} && mount -t tmpfs -o mode=755 tmpfs {MOUNT}")
    yield simulated_machine
    simulated_machine.sh(f"while umount {MOUNT} 2> /dev/null; do :; done")


def prepare(remote: Remote, rented: Entry = WITH_MODELS) -> str:
    return file_system.prepare(remote.run, rented)


def test_its_folders_belong_to_the_user_of_jobs_whoever_made_them(remote: Remote, machine: Machine) -> None:
    assert prepare(remote, replace(WITH_MODELS, file_systems=())) == ""
    assert prepare(remote) == ""
    listed = machine.sh(f"cd {MOUNT}/fractal && stat -c '%n %U %a' . *")
    assert listed.splitlines() == [". ubuntu 755", "cache ubuntu 755", "inputs ubuntu 755", "models ubuntu 755"]
    machine.sh(f"chown -R 4242:4242 {MOUNT}")
    assert prepare(remote) == ""
    assert machine.sh(f"stat -c %U {MOUNT}/fractal/cache") == "ubuntu\n"
    machine.sh(f"mkdir {MOUNT}/fractal/layers")  # what is not of jobs is left alone
    assert prepare(remote) == ""
    assert machine.sh(f"stat -c %U {MOUNT}/fractal/layers") == "root\n"


BROKEN = [  # how, back again, what is said
    (f"umount {MOUNT}", "true", f"file system models is not mounted at {MOUNT}"),
    (f"mount -o remount,ro {MOUNT}", "true", "cannot be written on the instance [(].*Read-only file system[)]"),
    (
        f"mkdir {MOUNT}/fractal && chown 4242 {MOUNT}/fractal && sed -i s/NOPASSWD:// /etc/sudoers.d/ubuntu",
        "sed -i 's/) ALL/) NOPASSWD:ALL/' /etc/sudoers.d/ubuntu",
        "cannot be written on the instance [(].*password is required[)]",
    ),
    (
        f"umount {MOUNT} && mount -t tmpfs -o size=4k,uid=1000,nr_inodes=3 tmpfs {MOUNT}",
        "true",
        "cannot be written on the instance [(].*No space left on device[)]",
    ),
]


@pytest.mark.parametrize(("begin", "end", "text"), BROKEN, ids=["absent", "read-only", "of-another-user", "full"])
def test_a_file_system_that_cannot_be_used_is_named(
    remote: Remote, machine: Machine, begin: str, end: str, text: str
) -> None:
    machine.sh(begin)
    try:
        said = prepare(remote)
    finally:
        machine.sh(end)
    assert "\n" not in said
    assert re.search(text, said), said
