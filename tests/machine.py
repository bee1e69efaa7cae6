"""A machine of the tests' own, in a container: Debian with sshd and a Docker engine. It stands for a rented instance.

    with Machine() as machine:
        machine.ssh("sudo docker ps")                      # as user ubuntu, who is not in group docker
        machine.sh("iptables -L")                          # as root, without ssh
        subprocess.run(["ssh", "-F", machine.ssh_config, machine.alias])
    with Machine(condition=Condition(toolkit="absent", cloud_init="error")) as machine: ...

The programs that a container cannot have (nvidia-smi, NVIDIA's toolkit, cloud-init, systemctl) are stand-ins, the scripts
in tests/stand_ins/; sshd, sudo, Docker, rsync and apt are real. `docker run --gpus all` works there.

Its image is made once from Debian's packages (a minute) and kept as fractal-test-machine:<hash>. Needs mmdebstrap, or root
on Debian to install it, and a Docker engine that grants SYS_ADMIN and NET_ADMIN; else `Unavailable` says why.
"""

import hashlib
import io
import os
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import docker
import docker.errors
import filelock

from fractal.images import debian
from fractal.install import apt

USER = "ubuntu"
PACKAGES = (
    "ca-certificates",
    "debian-archive-keyring",
    "docker.io",
    "e2fsprogs",
    "iproute2",
    "iptables",
    "mmdebstrap",
    "openssh-server",
    "procps",
    "python3",
    "rsync",
    "sudo",
)
STAND_INS = Path(__file__).with_name("stand_ins")
START = "/usr/lib/machine/start"
LABEL = "fractal.test"  # its value is "machine"
FOLDER = "fractal.folder"  # a label as well: the machine's keys, on the host
# Debian's rsync stays there as a package source of the machine's own: apt-get works without a network.
HOOK = f"""\
chroot "$1" useradd --create-home --shell /bin/bash {USER}
echo '{USER} ALL=(ALL) NOPASSWD:ALL' > "$1/etc/sudoers.d/{USER}"
mkdir "$1/opt/packages" "$1/usr/lib/machine"
cp "$1"/var/cache/apt/archives/rsync_*.deb "$1/opt/packages/rsync.deb"
{{
  chroot "$1" dpkg-deb -f /opt/packages/rsync.deb
  echo "Filename: ./rsync.deb"
  echo "Size: $(stat -c %s "$1/opt/packages/rsync.deb")"
  echo "SHA256: $(sha256sum "$1/opt/packages/rsync.deb" | cut -d ' ' -f 1)"
}} > "$1/opt/packages/Packages"
rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/etc/ssh/ssh_host_* "$1"/var/cache/apt/archives/*.deb
rm -f "$1"/var/lib/apt/lists/*_*
echo 'deb [trusted=yes] file:/opt/packages ./' > "$1/etc/apt/sources.list"
install -m 755 STAND_INS/* "$1/usr/lib/machine/"
"""
OPTIONS = {
    "cap_add": ["SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE"],  # --privileged is refused where the host lacks a capability
    "security_opt": ["seccomp=unconfined", "apparmor=unconfined"],
    "device_cgroup_rules": ["a *:* rwm"],
    "init": True,
}
VOLUMES = ("/var/lib/docker",)  # overlay2 does not stack on overlay2
START_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Condition:
    """In what condition a machine boots. As it stands: a GPU instance of Lambda's own image on a good day."""

    gpus: int = 1
    gpu: str = "NVIDIA A100-SXM4-80GB"
    driver: str = "580.95.05"
    toolkit: Literal[
        "works",
        "late",  # installed after the engine had started: --gpus works once the engine starts again
        "absent",
        "broken",  # driver and its library differ, as after an upgrade without a reboot
    ] = "works"
    docker: Literal["runs", "stopped", "absent"] = "runs"
    docker_group: bool = False  # whether ubuntu may call docker without sudo
    rsync: bool = True
    cloud_init: Literal["done", "degraded", "error", "absent"] = "done"
    host_key: Literal["taken", "ignored"] = "taken"  # what cloud-init does with the one in the user data
    cloud_init_s: float = 0.0  # until it is done; a user-data script runs after that
    ssh_after_s: float = 0.0  # sshd does not listen before
    file_systems: Literal["mounted", "read-only", "absent"] = "mounted"  # those that the instance was launched with
    disk_mib: int = 0  # for the engine's images and /home together; 0: as large as the host's

    def settings(self) -> str:
        """/etc/machine.conf, which the stand-ins read."""
        values = {
            "gpus": self.gpus,
            "gpu": shlex.quote(self.gpu),
            "driver": shlex.quote(self.driver),
            "toolkit": self.toolkit,
            "docker": self.docker,
            "docker_group": "yes" if self.docker_group else "no",
            "rsync": "yes" if self.rsync else "no",
            "cloud_init": self.cloud_init,
            "host_key": self.host_key,
            "cloud_init_s": self.cloud_init_s,
            "ssh_after_s": self.ssh_after_s,
            "disk_mib": self.disk_mib,
        }
        return "".join(f"{name}={value}\n" for name, value in values.items())


GOOD = Condition()


class Unavailable(Exception):
    """No such machine can be had here: the reason."""


def image_name() -> str:
    stand_ins = [(file.name, file.read_bytes()) for file in sorted(STAND_INS.iterdir())]
    recipe = repr((debian.SUITE, PACKAGES, HOOK, stand_ins))
    return f"fractal-test-machine:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def ensure_image(client: docker.DockerClient) -> str:
    """The machine's image, made if it is not there. Raises Unavailable."""
    name = image_name()
    folder = Path(tempfile.gettempdir()) / "fractal-test-machine"
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / "lock", timeout=600):
        if not client.images.list(name):
            try:
                make_image(client, name, folder / "log")
            except debian.BootstrapError as error:
                raise Unavailable(f"no machine image: {error}") from error
    return name


def need(program: str, *packages: str, log: Path) -> None:
    """Install what a program comes in, unless it is there. Raises Unavailable."""
    if shutil.which(program) is None:
        install(*packages, log=log)


def install(*packages: str, log: Path) -> None:
    """Raises Unavailable."""
    if not apt.allowed():
        raise Unavailable(f"no {' '.join(packages)}, and not root to install it")
    try:
        with filelock.FileLock(Path(tempfile.gettempdir(), "fractal-test-apt.lock")):  # two workers may come at once
            apt.install(*packages, log=log)
    except apt.AptError as error:
        raise Unavailable(f"no {' '.join(packages)}: {error}") from error


def make_image(client: docker.DockerClient, name: str, log: Path) -> None:
    need("mmdebstrap", "mmdebstrap", "debian-archive-keyring", log=log)
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder, "machine.tar")
        hook = HOOK.replace("STAND_INS", shlex.quote(str(STAND_INS)))
        argv = ["mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", f"--customize-hook={hook}"]
        argv += ["--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"]
        argv += [*debian.network_options(), debian.SUITE, str(tar), *debian.mirror_arguments(os.environ)]
        debian.run(argv, log)
        repository, tag = name.split(":")
        client.api.import_image(src=str(tar), repository=repository, tag=tag)


class Machine:
    """Started on entering, gone on leaving, with its disk. `alias` stands in `ssh_config` with key and known host."""

    def __init__(
        self,
        *,
        alias: str = "lambda",
        engine: bool = True,
        condition: Condition = GOOD,
        public_key: str | None = None,
        user_data: str = "",
        labels: Mapping[str, str] | None = None,
        file_systems: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        """`public_key`: who is let in, instead of a key made for this machine (`folder`/key).

        `file_systems`: volumes of the host's engine by where they are mounted; they outlive the machine. `user_data`: for
        cloud-init, which takes a host key in the form that Fractal gives it, and runs a script.

        `engine=False`: Docker is installed and not started. `wait=False`: back as soon as it has an address, while it
        boots.
        """
        self.alias = alias
        self.condition = condition if engine else replace(condition, docker="stopped")
        self._public_key = public_key
        self._user_data = user_data
        self._labels = {LABEL: "machine", **(labels or {})}
        self._file_systems = file_systems or {}
        self._wait = wait

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Raises Unavailable."""
        self.client = docker.from_env()
        self.folder = Path(tempfile.mkdtemp(prefix="fractal-machine-"))
        self.known_hosts = self.folder / "known_hosts"
        self.container = None
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        key = self._public_key
        if key is None:
            need("ssh-keygen", "openssh-client", log=self.folder / "log")
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "fractal-test-key", "-f", self.folder / "key"]
            subprocess.run(words, check=True)
            key = (self.folder / "key.pub").read_text()
        mode = {"mounted": "rw", "read-only": "ro", "absent": ""}[self.condition.file_systems]
        volumes = [f"{volume}:{path}:{mode}" for path, volume in self._file_systems.items() if mode]
        try:
            self.container = self.client.containers.create(
                ensure_image(self.client),
                [START],
                labels=self._labels | {FOLDER: str(self.folder)},
                volumes=[*VOLUMES, *volumes],
                **OPTIONS,
            )
            self.put(f"/home/{USER}/.ssh/authorized_keys", f"{key.strip()}\n".encode(), 0o644)
            self.put("/var/lib/cloud/instance/user-data.txt", self._user_data.encode(), 0o600)
            self.put("/etc/machine.conf", self.condition.settings().encode(), 0o644)
            self.container.start()
        except docker.errors.APIError as error:
            raise Unavailable(f"the engine does not run a machine with its own engine: {error.explanation}") from error
        self._begun()

    def _begun(self) -> None:
        """It boots: learn its address, and wait if that is wanted."""
        self.container.reload()
        self.ip = str(self.container.attrs["NetworkSettings"]["IPAddress"])
        self.ssh_config = self.config("config")
        if self._wait:
            self._until("ssh", "pgrep -x sshd")
            key = self.host_key()
            (self.folder / "host_key.pub").write_text(key)
            self.trust(key)
            if self.condition.docker == "runs":
                self._until("docker", "docker version")

    def restart(self, *, new_ip: bool = False, new_host_key: bool = False) -> str:
        """Cut its power and boot it again; the disk stays. Its address, which on demand is not the one before."""
        before = self.ip
        if new_host_key:
            self.sh("rm /etc/ssh/ssh_host_*")
        self.container.kill()
        self.container.wait(timeout=START_TIMEOUT_S)
        takers = []
        try:
            while True:
                if new_ip:  # engines give the lowest address that is free: let somebody have it meanwhile
                    taker = self.client.containers.create(
                        ensure_image(self.client), ["sleep", "60"], labels=self._labels
                    )
                    takers.append(taker)
                    taker.start()
                self.container.start()
                self.container.reload()
                if not new_ip or self.container.attrs["NetworkSettings"]["IPAddress"] != before:
                    break
                self.container.kill()
                self.container.wait(timeout=START_TIMEOUT_S)
        finally:
            for taker in takers:
                taker.remove(force=True, v=True)
        self._begun()
        return self.ip

    def host_key(self) -> str:
        """The public key of its sshd, which it makes at its first boot."""
        self._until("host key", "[ -s /etc/ssh/ssh_host_ed25519_key.pub ]")
        return self.sh("cat /etc/ssh/ssh_host_ed25519_key.pub")

    def _until(self, what: str, test: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S + self.condition.ssh_after_s
        while self.container.exec_run(["sh", "-c", test])[0]:
            self.container.reload()
            if time.monotonic() > deadline or self.container.status != "running":
                words = self.container.logs(tail=3).decode(errors="replace")
                if self.container.status == "running":
                    words += self.container.exec_run(["tail", "-n", "3", "/var/log/dockerd.log"])[1].decode()
                raise Unavailable(f"the test machine's {what} does not start: {words.strip()[-400:]}")
            time.sleep(0.1)

    def config(self, name: str, *, more: str = "", **settings: object) -> Path:
        """An ssh config that knows the machine by its alias; with other settings, such as a proxy's HostName and Port."""
        common = {
            "HostName": self.ip,
            "User": USER,
            "IdentityFile": self.folder / "key",
            "IdentitiesOnly": "yes",
            "HostKeyAlias": self.alias,
            "UserKnownHostsFile": self.known_hosts,
            "StrictHostKeyChecking": "yes",
        }
        lines = [f"  {key} {value}" for key, value in (common | settings).items()]
        path = self.folder / name
        path.write_text("\n".join([f"Host {self.alias}", *lines, more, ""]))
        return path

    def trust(self, public_key: str) -> None:
        """Make this the key that our ssh expects from the machine."""
        self.known_hosts.write_text(f"{self.alias} {public_key}")

    def put(self, path: str, data: bytes, mode: int) -> None:
        """A file on the machine, which need not run; root's."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            entry = tarfile.TarInfo(path.removeprefix("/"))
            entry.size, entry.mode = len(data), mode
            tar.addfile(entry, io.BytesIO(data))
        self.container.put_archive("/", packed.getvalue())

    def sh(self, script: str) -> str:
        """Run a script as root, not through ssh; its output. AssertionError if it fails."""
        out = f"/run/out-{os.urandom(4).hex()}"  # docker-py 7.2.0 loses the output of one exec in 150 on a busy machine
        code, _ = self.container.exec_run(["sh", "-c", f"exec > {out} 2>&1\n{script}"])
        packed = io.BytesIO(b"".join(self.container.get_archive(out)[0]))
        with tarfile.open(fileobj=packed) as tar:
            file = tar.extractfile(tar.getmembers()[0])
            assert file is not None
            text = file.read().decode(errors="replace")
        assert code == 0, f"{script}: exit code {code}: {text}"
        return text

    @contextmanager
    def sshd(self, *lines: str) -> Iterator[None]:
        """Its sshd has these settings meanwhile."""
        place = "/etc/ssh/sshd_config.d/test.conf"
        self.put(place, "\n".join([*lines, ""]).encode(), 0o644)
        self.sh("pkill -HUP -f '[s]shd -D'; sleep 0.3")
        try:
            yield
        finally:
            self.sh(f"rm {place}; pkill -HUP -f '[s]shd -D'; sleep 0.3")

    def ssh(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as the machine's user, through ssh."""
        words = ["ssh", "-F", str(self.ssh_config), "-o", "BatchMode=yes", self.alias, command]
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    def stop(self) -> None:
        if self.container is not None:
            self.container.remove(force=True, v=True)
            self.container = None
        self.client.close()
        shutil.rmtree(self.folder, ignore_errors=True)
