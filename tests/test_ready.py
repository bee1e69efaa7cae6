"""The ladder to a ready machine, on simulated ones: each rung's repair, and what it says when it cannot be climbed."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fractal.cloud import alias, ready
from fractal.cloud.lambda_api import CloudError
from fractal.cloud.ledger import Entry
from tests.machine import GOOD, Condition, Machine, Unavailable

pytestmark = [pytest.mark.docker, pytest.mark.cloud, pytest.mark.usefixtures("openssh")]


def entry(machine: Machine, ip: str = "") -> Entry:
    return Entry(
        name="fractal-abcdef-01234567", url="http://127.0.0.1", account="a", type_name="gpu_1x_a10", region="us-west-1",
        price_cents_per_hour=75, ssh_key="mine", key_file=str(machine.folder / "key"), asked_at=time.time(),
        max_hours=1.0, max_dollars=None, max_price_usd=None, state="launched", id="i-1", ip=ip or machine.ip,
    )  # fmt: skip


class Climb:
    """One machine and a state folder."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self.folder, self.said = machine, folder, list[str]()

    def __call__(self, *, gpus: bool = True) -> ready.Ready:
        self.point()
        return ready.wait(self.folder, entry(self.machine), self.said.append, gpus=gpus, refresh=self.point)

    def point(self) -> str:
        alias.write(self.folder, ip=self.machine.ip, key_file=self.machine.folder / "key", instance_id="i-1")
        return self.machine.ip

    def fails(self, *words: str) -> str:
        """Climb, and be told so in one line, in time; the words."""
        begin = time.monotonic()
        with pytest.raises(CloudError) as caught:
            self()
        assert time.monotonic() - begin < 20
        said = str(caught.value)
        for word in (*words, "invoke terminate"):
            assert word in said
        assert "\n" not in said
        return said


@pytest.fixture
def climb(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Climb]:
    monkeypatch.setattr(ready, "LOGIN_TIMEOUT_S", 4.0)
    monkeypatch.setattr(ready, "PORT_TIMEOUT_S", 15.0)
    monkeypatch.setattr(ready, "ADDRESS_S", 1.0)
    try:
        with Machine(condition=getattr(request, "param", GOOD)) as machine:
            yield Climb(machine, tmp_path)
    except Unavailable as error:
        pytest.skip(str(error))


def test_a_good_machine_and_what_may_change_of_it(climb: Climb) -> None:
    found = climb()
    assert found.gpu == "NVIDIA A100-SXM4-80GB, 580.95.05"
    assert (found.docker, found.repaired) == ("docker", ["its user was added to the group docker"])
    assert list(found.seconds) == [
        "port open", "host key pinned", "ssh lets us in", "cloud-init done", "docker answers", "rsync there",
        "a container has the GPU", "docker without sudo",
    ]  # fmt: skip
    pinned = alias.known_hosts(climb.folder).read_text()
    assert all(line.startswith("i-1 ") for line in pinned.splitlines())
    assert climb().repaired == []
    climb.machine.restart(new_ip=True)
    assert climb().repaired == []
    assert alias.known_hosts(climb.folder).read_text() == pinned
    climb.machine.restart(new_host_key=True)
    begin = time.monotonic()
    said = climb.fails("not the one of its first contact")
    assert time.monotonic() - begin < 3.5
    subprocess.run(said.split("forget the old one: ")[1].split(". It is")[0].split(), check=True, capture_output=True)
    assert climb().repaired == []
    climb.machine.put("/home/ubuntu/.ssh/authorized_keys", b"", 0o600)
    climb.fails("does not let us in", str(climb.machine.folder / "key"), "'mine'")


@pytest.mark.parametrize(
    ("climb", "repaired"),
    [
        (Condition(docker="stopped", docker_group=True), ["the Docker engine was started"]),
        (Condition(rsync=False, docker_group=True), ["rsync was installed"]),
        (
            Condition(toolkit="late", docker_group=True),
            ["NVIDIA's container toolkit was configured and Docker restarted"],
        ),
        (Condition(ssh_after_s=1.5, cloud_init_s=3.0, docker_group=True), []),
        (Condition(cloud_init="absent", docker_group=True), []),
        (Condition(cloud_init="degraded", docker_group=True), []),
    ],
    indirect=["climb"],
)
def test_what_can_be_repaired_is_repaired_and_said(climb: Climb, repaired: list[str]) -> None:
    found = climb()
    assert (found.repaired, found.docker) == (repaired, "docker")
    assert found.gpu is not None
    assert climb().repaired == []


@pytest.mark.parametrize(
    ("climb", "says"),
    [
        (Condition(docker="absent"), "no Docker on the machine"),
        (Condition(toolkit="absent"), "nvidia-container-toolkit"),
        (Condition(toolkit="broken"), "version mismatch"),
        (Condition(gpus=0), "no NVIDIA driver"),
        (Condition(cloud_init="error"), "cloud-init failed"),
    ],
    indirect=["climb"],
)
def test_what_cannot_be_repaired_is_named_with_the_remedy(climb: Climb, says: str) -> None:
    with pytest.raises(CloudError, match=says) as caught:
        climb()
    assert "\n" not in str(caught.value)
    assert "invoke terminate" in str(caught.value)


@pytest.mark.parametrize("climb", [Condition(gpus=2, driver="535.183.01", docker_group=True)], indirect=True)
def test_names_and_driver_are_found_on_the_way_up(climb: Climb) -> None:
    found = climb()
    assert (found.cards, found.driver) == (["NVIDIA A100-SXM4-80GB"] * 2, "535.183.01")


@pytest.mark.parametrize("climb", [Condition(gpus=0, toolkit="absent")], indirect=True)
def test_a_type_without_a_gpu_needs_none(climb: Climb) -> None:
    assert climb(gpus=False).gpu is None


@pytest.fixture(scope="module")
def shared() -> Iterator[Machine]:
    try:
        with Machine(condition=Condition(docker_group=True, gpus=2)) as machine:
            yield machine
    except Unavailable as error:
        pytest.skip(str(error))


BROKEN_SMI = (
    "#!/bin/sh\necho 'NVIDIA-SMI has failed because it couldn'\\''t communicate with the NVIDIA driver.'; exit 9\n"
)
HOOK = "/usr/bin/nvidia-container-runtime-hook"


@pytest.mark.parametrize(
    ("begin", "end", "words"),
    [
        (
            "systemctl stop docker; mkdir -p /etc/docker; echo nonsense > /etc/docker/daemon.json",
            "rm /etc/docker/daemon.json; systemctl start docker",
            ["cannot be started", "Job for docker.service failed", "journalctl -u docker"],
        ),
        (
            "pkill -STOP -x dockerd",
            "pkill -CONT -x dockerd",
            ["Docker does not answer", "docker version: no end after 2 s"],
        ),
        (
            "sed -i s/NOPASSWD:// /etc/sudoers.d/ubuntu; gpasswd -d ubuntu docker",
            "sed -i 's/) ALL/) NOPASSWD:ALL/' /etc/sudoers.d/ubuntu; usermod -aG docker ubuntu",
            ["sudo a password", "usermod -aG docker"],
        ),
        (
            "mv /opt/packages /opt/gone; mv /usr/bin/rsync /opt/rsync; dpkg --purge --force-all rsync; rm -rf /var/lib/apt/lists/*",
            "mv /opt/gone /opt/packages; mv /opt/rsync /usr/bin/rsync",
            ["no rsync", "E: ", "apt-get install -y rsync"],
        ),
        (
            f"cp /usr/bin/nvidia-smi /opt/; cat > /usr/bin/nvidia-smi << 'END'\n{BROKEN_SMI}END",
            "cp /opt/nvidia-smi /usr/bin/",
            ["couldn't communicate with the NVIDIA driver", "sudo reboot"],
        ),
        (
            f"cp {HOOK} /opt/hook; printf '#!/bin/sh\\n' > {HOOK}",
            f"cp /opt/hook {HOOK}",
            ["No container on the machine sees its GPU", "not found"],
        ),
        (
            f"cp {HOOK} /opt/hook; printf '#!/bin/sh\\nsleep 12\\n' > {HOOK}",
            f"cp /opt/hook {HOOK}",
            ["No container on the machine sees its GPU", "no end after 3 s"],
        ),
    ],
    ids=["engine-fails", "engine-hangs", "sudo-asks", "no-package", "no-driver", "hook-does-nothing", "hook-hangs"],
)  # fmt: skip
def test_what_breaks_on_a_machine_is_named_and_after_its_mending_all_is_well(
    shared: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str, end: str, words: list[str]
) -> None:
    monkeypatch.setattr(ready, "ANSWER_TIMEOUT_S", 2.0)
    monkeypatch.setattr(ready, "REPAIR_TIMEOUT_S", 5.0)
    monkeypatch.setattr(ready, "GPU_TIMEOUT_S", 3.0)
    climb = Climb(shared, tmp_path)
    try:
        shared.sh(begin)
        climb.fails(*words)
    finally:
        shared.sh(end)
    found = climb()
    assert (found.docker, found.gpu) == ("docker", "2 x NVIDIA A100-SXM4-80GB, 580.95.05")
    shared.sh('for i in $(seq 30); do [ -n "$(docker ps -aq)" ] || exit 0; sleep 0.5; done; exit 1')


def test_an_engine_with_work_is_not_started_anew(shared: Machine, tmp_path: Path) -> None:
    climb = Climb(shared, tmp_path)
    climb()
    shared.sh(
        f"mv {HOOK} /opt/; systemctl restart docker; docker run -di --name work fractal-gpu-probe sh -c 'read never'"
    )
    try:
        climb.fails("would end those that run now")
        assert shared.sh("docker ps -q") != ""
        shared.sh("docker rm -f work")
        climb.fails("still refuses --gpus all", "--reinstall nvidia-container-toolkit")  # its hook is gone
    finally:
        shared.sh(f"docker rm -f work > /dev/null 2>&1; mv /opt/{Path(HOOK).name} {HOOK}; systemctl restart docker")


@pytest.mark.parametrize("climb", [Condition(disk_mib=60)], indirect=True)
def test_a_full_disk_is_named(climb: Climb) -> None:
    with contextlib.suppress(AssertionError):
        climb.machine.sh("dd if=/dev/zero of=/home/ubuntu/big bs=1M count=500")
    climb.fails("disk is full", "docker system df")


@pytest.mark.parametrize("climb", [Condition(cloud_init_s=60)], indirect=True)
def test_cloud_init_that_never_ends_is_named(climb: Climb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "CLOUD_INIT_TIMEOUT_S", 2.0)
    climb.fails("cloud-init is not done after 2 s", "cloud-init-output.log")
    assert "cloud-init is at work" in climb.said


@pytest.mark.parametrize("climb", [Condition(cloud_init_s=4.0)], indirect=True)
def test_a_machine_that_boots_again_in_the_middle_is_followed_to_its_new_address(climb: Climb) -> None:
    before = climb.machine.ip
    after(1.5, lambda: climb.machine.restart(new_ip=True))
    found = climb()
    assert climb.machine.ip != before
    assert found.gpu is not None
    assert any("lost on the way" in said for said in climb.said)
    assert len([said for said in climb.said if "is pinned" in said]) == 1


@pytest.mark.parametrize("climb", [Condition(ssh_after_s=1.0)], indirect=True)
def test_an_address_that_moves_before_the_port_opens_is_asked_for(
    climb: Climb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready, "ADDRESS_S", 1.0)
    gone = entry(climb.machine, "127.0.0.2")  # nothing listens there
    climb.point()
    assert ready.wait(climb.folder, gone, climb.said.append, refresh=climb.point).gpu is not None


def test_an_instance_that_is_gone_is_not_waited_for(climb: Climb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "ADDRESS_S", 0.5)
    monkeypatch.setattr(ready, "PORT_TIMEOUT_S", 60.0)

    def gone() -> str:
        raise CloudError("i-1 has ended")

    with pytest.raises(CloudError, match="has ended"):
        ready.wait(climb.folder, entry(climb.machine, "127.0.0.2"), climb.said.append, refresh=gone)


def after(seconds: float, work: Callable[[], object]) -> None:
    threading.Timer(seconds, work).start()


def test_a_port_that_never_opens_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "PORT_TIMEOUT_S", 0.5)
    with pytest.raises(CloudError, match="port 1 is not open"):
        ready._port("127.0.0.1", 1, lambda _: None)
