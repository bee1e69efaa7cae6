"""The simulated instance is what it claims to be: the tests of the cloud stand on it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker
import pytest

from tests.conftest import ROOT
from tests.fake_lambda import machines as factory
from tests.fake_lambda.machines import Machines, Running
from tests.machine import Condition, Machine, Unavailable

pytestmark = [pytest.mark.docker, pytest.mark.cloud, pytest.mark.usefixtures("openssh")]

PROBE = """\
tar --hard-dereference -chC / bin/sh bin/ls \
  $(ldd /bin/sh /bin/ls | grep -o '/[^ :]*\\.so[^ :]*' | cut -c 2- | sort -u) | sudo docker import - probe > /dev/null
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    try:
        with Machine() as one:
            one.ssh(PROBE)
            yield one
    except Unavailable as error:
        pytest.skip(str(error))


def make_key(folder: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    return (folder / "key.pub").read_text()


def of_machine(instance: str) -> tuple[list[str], set[str]]:
    """Names of an instance's containers and of their volumes."""
    client = docker.from_env()
    try:
        found = client.containers.list(all=True, filters={"label": f"{factory.INSTANCE}={instance}"})
        disks = {str(mount["Name"]) for one in found for mount in one.attrs["Mounts"] if mount["Type"] == "volume"}
        return [str(one.name) for one in found], disks
    finally:
        client.close()


def left(instance: str) -> list[str]:
    return of_machine(instance)[0]


def volumes() -> set[str]:
    client = docker.from_env()
    try:
        return {str(one.name) for one in client.volumes.list()}
    finally:
        client.close()


def test_it_looks_like_a_rented_instance(machine: Machine) -> None:
    assert "docker" not in machine.ssh("id -nG").stdout.split()
    assert machine.ssh("docker ps").returncode != 0
    assert machine.ssh("sudo -n docker ps").returncode == 0
    assert machine.ssh("rsync --version").stdout.startswith("rsync ")
    assert machine.ssh("cloud-init status --wait").stdout.split() == ["status:", "done"]
    assert machine.ssh("systemctl is-active docker").stdout == "active\n"


def test_its_gpu_answers_as_nvidia_smi_does(machine: Machine) -> None:
    assert machine.ssh("nvidia-smi -L").stdout.startswith("GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-")
    query = "nvidia-smi --query-gpu=driver_version,name --format=csv,noheader"
    assert machine.ssh(query).stdout == "580.95.05, NVIDIA A100-SXM4-80GB\n"
    assert machine.ssh("nvidia-smi --query-gpu=nonsense --format=csv").returncode == 2


def test_gpus_all_brings_nvidia_smi_into_a_container(machine: Machine) -> None:
    run = "sudo docker run --rm --network none"
    assert machine.ssh(f"{run} --gpus all probe nvidia-smi -L").stdout.startswith("GPU 0: NVIDIA A100")
    assert machine.ssh(f"{run} --gpus all --read-only --user 1000 probe nvidia-smi -L").stdout.startswith("GPU 0")
    assert "not found" in machine.ssh(f"{run} probe nvidia-smi -L").stderr
    assert machine.ssh(f"{run} --gpus all probe ls /dev").stdout.count("nvidia") == 0


@pytest.mark.long
def test_a_machine_in_a_bad_condition() -> None:
    bad = Condition(
        gpus=2, gpu="NVIDIA H100 80GB HBM3", toolkit="late", docker="stopped", docker_group=True, rsync=False,
        cloud_init="error", cloud_init_s=5.0, ssh_after_s=0.5, disk_mib=200,
    )  # fmt: skip
    with Machine(condition=bad) as machine:
        assert machine.ssh("cloud-init status").stdout == "status: running\n"
        assert machine.ssh("cloud-init status --wait").returncode == 1
        assert machine.ssh("nvidia-smi -L | tail -n 1").stdout.startswith("GPU 1: NVIDIA H100 80GB HBM3")
        assert machine.ssh("command -v rsync").returncode != 0
        assert machine.ssh("sudo apt-get update && sudo apt-get install -y rsync && rsync --version").returncode == 0
        assert machine.ssh("systemctl is-active docker").stdout == "inactive\n"
        assert machine.ssh("systemctl start docker").returncode == 1  # not without sudo
        assert machine.ssh("sudo systemctl start docker && docker ps").returncode == 0
        assert machine.ssh("dd if=/dev/zero of=big bs=1M count=300").stderr.count("No space left on device")
        assert machine.ssh("sudo docker images").returncode == 0


@pytest.mark.long
def test_a_factory_starts_many_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    key, before = make_key(tmp_path), volumes()
    times: list[tuple[float, float]] = []

    def start(number: int) -> Running:
        begin = time.monotonic()
        one = machines.start(f"many-{number}", key, {})
        times.append((begin, time.monotonic()))
        return one

    def disks() -> set[str]:
        return {name for number in range(3) for name in of_machine(f"many-{number}")[1]} - before

    with Machines() as machines:
        with ThreadPoolExecutor(3) as pool:
            started = list(pool.map(start, range(3)))
        assert len({one.ip for one in started}) == 3
        assert max(begin for begin, _ in times) < min(end for _, end in times)  # at once
        held = disks()
        assert len(held) >= 3
        words = ["ssh", "-F", "none", "-i", str(tmp_path / "key"), "-oStrictHostKeyChecking=no"]
        words += ["-oUserKnownHostsFile=/dev/null", "-oConnectionAttempts=20", f"ubuntu@{started[2].ip}", "true"]
        assert subprocess.run(words, capture_output=True).returncode == 0
        old = started[1].ip
        assert started[1].restart() != old
        held |= disks()
        started[0].stop()
        started[0].stop()
        assert set(machines.running) == {"many-1", "many-2"}
    assert not machines.running
    assert not [name for number in range(3) for name in left(f"many-{number}")]
    assert not volumes() & held


@pytest.mark.long
def test_what_a_killed_owner_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text(make_key(tmp_path))
    code = (
        "import pathlib, sys, time; from tests.fake_lambda.machines import Machines\n"
        f"Machines().start('orphan', pathlib.Path({str(tmp_path / 'key.pub')!r}).read_text(), {{}}); print('up', flush=True)\n"
        "time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    assert factory.sweep() == []  # the owner lives
    assert left("orphan")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert factory.sweep() == ["orphan"]
    assert not left("orphan")
    child.stdout.close()
