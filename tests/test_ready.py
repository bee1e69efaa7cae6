"""The ladder to a ready machine, on simulated ones: each rung's repair, and what it says when it cannot be climbed."""

import time
from collections.abc import Iterator
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
        alias.write(self.folder, ip=self.machine.ip, key_file=self.machine.folder / "key", instance_id="i-1")
        return ready.wait(self.folder, entry(self.machine), self.said.append, gpus=gpus)


@pytest.fixture
def climb(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Climb]:
    monkeypatch.setattr(ready, "LOGIN_TIMEOUT_S", 4.0)
    monkeypatch.setattr(ready, "PORT_TIMEOUT_S", 10.0)
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
    with pytest.raises(CloudError, match="host key"):
        climb()
    assert time.monotonic() - begin < 8
    alias.known_hosts(climb.folder).unlink()
    climb.machine.put("/home/ubuntu/.ssh/authorized_keys", b"", 0o600)
    with pytest.raises(CloudError, match="does not let us in"):
        climb()


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


@pytest.mark.parametrize("climb", [Condition(gpus=0, toolkit="absent")], indirect=True)
def test_a_type_without_a_gpu_needs_none(climb: Climb) -> None:
    assert climb(gpus=False).gpu is None


def test_a_port_that_never_opens_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "PORT_TIMEOUT_S", 0.5)
    with pytest.raises(CloudError, match="port 1 is not open"):
        ready._port("127.0.0.1", 1, lambda _: None, "It is billed")
