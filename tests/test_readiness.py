"""The readiness checks on simulated machines: what each repairs, and what it says when it fails."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fractal.cloud import prerequisites, readiness, ssh_config
from fractal.cloud.lambda_errors import CloudError
from fractal.cloud.ledger import Entry, FileSystemMount
from fractal.cloud.prerequisites import Address
from fractal.cloud.readiness import Readiness
from fractal.cloud.remote_host import Driver
from fractal.cloud.ssh_keys import make_host_key
from fractal.images.ssh import SshHostKeyError
from tests.machine import GOOD, Condition, Machine, Unavailable
from tests.test_ledger import entry as ledger_entry

pytestmark = [pytest.mark.docker, pytest.mark.cloud, pytest.mark.usefixtures("openssh")]


def entry(machine: Machine, ip: str = "") -> Entry:
    return Entry(
        name="fractal-abcdef-01234567", url="http://127.0.0.1", account="a", type_name="gpu_1x_a10", region="us-west-1",
        price_cents_per_hour=75, ssh_key="mine", key_file=str(machine.folder / "key"), asked_at=time.time(),
        max_hours=1.0, max_dollars=None, max_price_usd=None, state="launched", id="i-1", ip=ip or machine.ip,
    )  # fmt: skip


class Instance:
    """A simulated machine, the host key that was made for it, and a state folder."""

    def __init__(self, machine: Machine, folder: Path, host_key: str | None = None) -> None:
        self.machine, self.folder, self.host_key, self.logged = machine, folder, host_key, list[str]()

    def wait_ready(self, **changes: object) -> Readiness:
        """`changes`: fields of the entry."""
        self.update_alias()
        rented = replace(entry(self.machine), **{"host_key": self.host_key, **changes})  # type: ignore[arg-type]
        return readiness.wait_ready(self.folder, rented, self.logged.append, self.update_alias)

    def known_keys(self) -> list[str]:
        return ssh_config.known_hosts(self.folder).read_text().splitlines()

    def update_alias(self) -> str:
        ssh_config.write(self.folder, entry(self.machine))
        return self.machine.ip

    def fails(self, *texts: str) -> str:
        """The checks fail in time, with one line that holds these texts; returns it."""
        begin = time.monotonic()
        with pytest.raises(CloudError) as caught:
            self.wait_ready()
        assert time.monotonic() - begin < 20
        message = str(caught.value)
        for text in (*texts, "invoke terminate"):
            assert text in message
        assert "\n" not in message
        return message


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "LOGIN_TIMEOUT_S", 4.0)
    monkeypatch.setattr(readiness, "PORT_TIMEOUT_S", 15.0)
    monkeypatch.setattr(readiness, "ADDRESS_POLL_S", 1.0)
    monkeypatch.setattr(readiness, "MADE_KEY_TIMEOUT_S", 1.0)
    monkeypatch.setattr(prerequisites, "addresses", list)


@pytest.fixture
def instance(request: pytest.FixtureRequest, tmp_path: Path, short: None) -> Iterator[Instance]:
    """With a machine of its own, in the condition that the test asks for."""
    host_key = make_host_key()
    try:
        with Machine(condition=getattr(request, "param", GOOD), user_data=host_key.user_data) as machine:
            yield Instance(machine, tmp_path, host_key.public)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def shared(simulated_machine: Machine, tmp_path: Path, short: None) -> Instance:
    """With the machine that all tests share: its user is in the group docker."""
    return Instance(simulated_machine, tmp_path)


def test_a_good_machine_and_what_may_change_of_it(instance: Instance) -> None:
    found = instance.wait_ready()
    assert found.driver == Driver("580.95.05", ("NVIDIA A100-SXM4-80GB",))
    assert found.repaired == ["its user was added to the group docker"]
    proven = instance.known_keys()
    assert proven == [f"i-1 {instance.host_key}"]
    assert "the host key of i-1 is the one that was made for it: the first contact is proven" in instance.logged
    assert instance.wait_ready().repaired == []
    instance.machine.restart(new_ip=True)
    assert instance.wait_ready().repaired == []
    assert instance.known_keys() == proven
    instance.machine.restart(new_host_key=True)
    begin = time.monotonic()
    said = instance.fails("not the one of its first contact")
    assert time.monotonic() - begin < 3.5
    subprocess.run(said.split("forget the old one: ")[1].split(". It is")[0].split(), check=True, capture_output=True)
    assert instance.wait_ready().repaired == []
    assert set(instance.known_keys()).isdisjoint(proven)
    assert any("did not take that one. Pinned at first contact" in text for text in instance.logged)
    instance.machine.put("/home/ubuntu/.ssh/authorized_keys", b"", 0o600)
    instance.fails("does not let us in", str(instance.machine.folder / "key"), "'mine'")


@pytest.mark.long
@pytest.mark.parametrize("instance", [Condition(host_key="ignored", docker_group=True)], indirect=True)
def test_an_image_that_ignores_the_host_key_is_pinned_and_that_is_said(instance: Instance) -> None:
    with pytest.raises(CloudError, match=r"does not show the host key that was made for i-1.*--strict-host-key"):
        instance.wait_ready(strict_host_key=True)
    assert not ssh_config.known_hosts(instance.folder).exists()
    instance.wait_ready()
    pinned = instance.known_keys()
    assert " ".join(instance.machine.host_key().split()[:2]) in {line.removeprefix("i-1 ") for line in pinned}
    assert [text for text in instance.logged if "its image did not take that one. Pinned at first contact" in text]
    instance.machine.restart(new_host_key=True)
    instance.fails("not the one of its first contact")


def test_the_made_host_key_is_waited_for_while_the_image_shows_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sshd may start before cloud-init has put the key in place."""
    shown = [[], ["ssh-rsa AAAA", "ssh-ed25519 OWN"], ["ssh-ed25519 OWN"], ["ssh-ed25519 MADE"]]
    monkeypatch.setattr(readiness, "_scan_host_keys", lambda ip: shown.pop(0))
    monkeypatch.setattr(readiness, "POLL_S", 0.01)
    rented = replace(ledger_entry(), id="i-1", ip="127.0.0.2", host_key="ssh-ed25519 MADE")
    readiness._Checks(tmp_path, rented, lambda _: None)._pin_host_key("127.0.0.2")
    assert ssh_config.known_hosts(tmp_path).read_text() == "i-1 ssh-ed25519 MADE\n"


@pytest.mark.long
@pytest.mark.parametrize(
    ("instance", "repaired"),
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
    indirect=["instance"],
)
def test_what_can_be_repaired_is_repaired_and_said(instance: Instance, repaired: list[str]) -> None:
    found = instance.wait_ready()
    assert found.repaired == repaired
    assert found.driver.gpus
    assert instance.wait_ready().repaired == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("instance", "says"),
    [
        (Condition(docker="absent"), "no Docker on the instance"),
        (Condition(toolkit="absent"), "nvidia-container-toolkit"),
        (Condition(toolkit="broken"), "version mismatch"),
        (Condition(gpus=0), "no NVIDIA driver"),
        (Condition(cloud_init="error"), "cloud-init failed"),
    ],
    indirect=["instance"],
)
def test_what_cannot_be_repaired_is_named_with_the_remedy(instance: Instance, says: str) -> None:
    with pytest.raises(CloudError, match=says) as caught:
        instance.wait_ready()
    assert "\n" not in str(caught.value)
    assert "invoke terminate" in str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize("instance", [Condition(gpus=2, driver="535.183.01", docker_group=True)], indirect=True)
def test_names_and_driver_are_found_on_the_way_up(instance: Instance) -> None:
    found = instance.wait_ready()
    assert found.driver == Driver("535.183.01", ("NVIDIA A100-SXM4-80GB",) * 2)


@pytest.mark.long
@pytest.mark.parametrize("instance", [Condition(gpus=0, toolkit="absent")], indirect=True)
def test_a_type_without_a_gpu_needs_none(instance: Instance) -> None:
    assert instance.wait_ready(type_name="cpu_4x_general").driver.gpus == ()


BROKEN_SMI = (
    "#!/bin/sh\necho 'NVIDIA-SMI has failed because it couldn'\\''t communicate with the NVIDIA driver.'; exit 9\n"
)
HOOK = "/usr/bin/nvidia-container-runtime-hook"


@pytest.mark.parametrize(
    ("begin", "end", "texts"),
    [
        (
            "systemctl stop docker; mkdir -p /etc/docker; echo nonsense > /etc/docker/daemon.json",
            "rm /etc/docker/daemon.json; systemctl start docker",
            ["cannot be repaired", "Job for docker.service failed", "journalctl -u docker"],
        ),
        pytest.param(
            "pkill -STOP -x dockerd",
            "pkill -CONT -x dockerd",
            ["Docker does not answer", "docker version: no end after 2 s"],
            marks=pytest.mark.long,
        ),
        (
            "sed -i s/NOPASSWD:// /etc/sudoers.d/ubuntu; gpasswd -d ubuntu docker",
            "sed -i 's/) ALL/) NOPASSWD:ALL/' /etc/sudoers.d/ubuntu; usermod -aG docker ubuntu",
            ["Docker does not answer", "a password is required"],
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
            ["No container on the instance sees its GPU", "not found"],
        ),
        pytest.param(
            f"cp {HOOK} /opt/hook; printf '#!/bin/sh\\nsleep 12\\n' > {HOOK}",
            f"cp /opt/hook {HOOK}",
            ["No container on the instance sees its GPU", "no end after 3 s"],
            marks=pytest.mark.long,
        ),
    ],
    ids=["engine-fails", "engine-hangs", "sudo-asks", "no-package", "no-driver", "hook-does-nothing", "hook-hangs"],
)  # fmt: skip
def test_what_breaks_is_named_and_after_its_repair_all_is_well(
    shared: Instance, monkeypatch: pytest.MonkeyPatch, begin: str, end: str, texts: list[str]
) -> None:
    monkeypatch.setattr(readiness, "ANSWER_TIMEOUT_S", 2.0)
    monkeypatch.setattr(readiness, "REPAIR_TIMEOUT_S", 5.0)
    monkeypatch.setattr(readiness, "GPU_TIMEOUT_S", 3.0)
    try:
        shared.machine.sh(begin)
        shared.fails(*texts)
    finally:
        shared.machine.sh(end)
    found = shared.wait_ready()
    assert found.driver == Driver("580.95.05", ("NVIDIA A100-SXM4-80GB",))
    shared.machine.sh(
        'for i in $(seq 30); do [ -z "$(docker ps -aq --filter name=gpu-probe)" ] && exit 0; sleep 0.5; done; exit 1'
    )


SLOW_DATE = "#!/bin/sh\nexec /bin/date -d '5 years ago' \"$@\"\n"


def test_closed_networks_and_a_wrong_clock_are_said_and_stop_nothing(
    shared: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        Address("the model hub", "http://hub.invalid/", "give --model a folder"),
        Address("the package index", "http://127.0.0.1:1/simple", "build here"),
    ]
    monkeypatch.setattr(prerequisites, "addresses", lambda: asked)
    shared.machine.put("/usr/local/bin/date", SLOW_DATE.encode(), 0o755)
    try:
        found = shared.wait_ready()
    finally:
        shared.machine.sh("rm /usr/local/bin/date")
    assert found.driver.gpus
    assert found.free_bytes > 0
    (reach,) = [line for line in shared.logged if "does not reach" in line]
    assert "the model hub (http://hub.invalid/: " in reach
    assert "the package index (http://127.0.0.1:1/simple: " in reach
    assert "Without it: give --model a folder; build here." in reach
    (clock,) = [line for line in shared.logged if "clock" in line]
    assert "days behind Lambda's" in clock
    shared.logged.clear()
    monkeypatch.setattr(prerequisites, "addresses", list)
    shared.wait_ready()
    assert not [line for line in shared.logged if "reach" in line or "clock" in line]


def test_a_file_system_that_is_not_mounted_stops_before_anything_is_sent(shared: Instance) -> None:
    with pytest.raises(CloudError, match=r"models is not mounted at /lambda/nfs/models .*findmnt.*invoke terminate"):
        shared.wait_ready(file_systems=(FileSystemMount("models", "/lambda/nfs/models"),))


@pytest.mark.long
def test_an_engine_with_work_is_not_restarted(instance: Instance) -> None:
    instance.wait_ready()
    sh = instance.machine.sh
    sh(f"mv {HOOK} /opt/; systemctl restart docker; docker run -di --name work fractal-gpu-probe sh -c 'read never'")
    instance.fails("would end the containers that run now")
    assert sh("docker ps -q") != ""
    sh("docker rm -f work")
    instance.fails("sees its GPU", "could not select", "--reinstall nvidia-container-toolkit")  # its hook is gone


@pytest.mark.long
@pytest.mark.parametrize("instance", [Condition(disk_mib=60)], indirect=True)
def test_a_full_disk_is_named(instance: Instance) -> None:
    with contextlib.suppress(AssertionError):
        instance.machine.sh("dd if=/dev/zero of=/home/ubuntu/big bs=1M count=500")
    instance.fails("no space left on device")


@pytest.mark.long
@pytest.mark.parametrize("instance", [Condition(cloud_init_s=60)], indirect=True)
def test_cloud_init_that_never_ends_is_named(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "CLOUD_INIT_TIMEOUT_S", 2.0)
    instance.fails("cloud-init is not done after 2 s", "cloud-init-output.log")
    assert "waiting for cloud-init" in instance.logged


@pytest.mark.long
@pytest.mark.parametrize("instance", [Condition(cloud_init_s=4.0)], indirect=True)
def test_a_machine_that_boots_again_in_the_middle_is_followed_to_its_new_address(instance: Instance) -> None:
    before = instance.machine.ip
    after(1.5, lambda: instance.machine.restart(new_ip=True))
    found = instance.wait_ready()
    assert instance.machine.ip != before
    assert found.driver.gpus
    assert any("starting again" in text for text in instance.logged)
    assert len([text for text in instance.logged if "the host key of" in text]) == 1


@pytest.mark.long
@pytest.mark.parametrize("instance", [Condition(ssh_after_s=1.0)], indirect=True)
def test_an_address_that_moves_before_the_port_opens_is_asked_for(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "ADDRESS_POLL_S", 1.0)
    gone = entry(instance.machine, "127.0.0.2")  # nothing listens there
    instance.update_alias()
    assert readiness.wait_ready(instance.folder, gone, instance.logged.append, instance.update_alias).driver.gpus


@pytest.mark.long
def test_an_instance_that_is_gone_is_not_waited_for(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "ADDRESS_POLL_S", 0.5)
    monkeypatch.setattr(readiness, "PORT_TIMEOUT_S", 60.0)

    def gone() -> str:
        raise CloudError("i-1 has ended")

    with pytest.raises(CloudError, match="has ended"):
        readiness.wait_ready(instance.folder, entry(instance.machine, "127.0.0.2"), instance.logged.append, gone)


@pytest.mark.parametrize(
    ("addresses", "asked"),
    [
        (["10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.2"]),  # Lambda names the new one a moment later
        (["10.0.0.1"] * 9, None),
    ],
)
def test_another_machine_at_the_address_is_refused_unless_the_instance_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, addresses: list[str], asked: list[str] | None
) -> None:
    seen: list[str] = []

    def run(checks: Any, ip: str) -> None:
        seen.append(ip)
        if ip == "10.0.0.1":
            raise SshHostKeyError("another key")

    monkeypatch.setattr(readiness, "wait_port", lambda ip, port, log, refresh: ip)
    monkeypatch.setattr(readiness, "POLL_S", 0.01)
    monkeypatch.setattr(readiness, "MOVED_TIMEOUT_S", 0.05)
    monkeypatch.setattr(readiness._Checks, "run", run)
    instance = replace(ledger_entry(), id="i-1", ip="10.0.0.1")
    later = iter(addresses)
    ask = lambda: readiness.wait_ready(tmp_path, instance, lambda _: None, lambda: next(later, addresses[-1]))  # noqa: E731
    if asked:
        ask()
        assert seen == asked
    else:
        with pytest.raises(CloudError, match="another machine has this address now"):
            ask()
        assert seen == ["10.0.0.1"]


def after(seconds: float, work: Callable[[], object]) -> None:
    threading.Timer(seconds, work).start()


def test_a_port_that_never_opens_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "PORT_TIMEOUT_S", 0.5)
    with pytest.raises(CloudError, match="port 1 is not open"):
        readiness.wait_port("127.0.0.1", 1, lambda _: None, lambda: "127.0.0.1")
