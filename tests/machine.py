"""A machine of the tests' own, in a container: Debian with sshd and a Docker engine. It stands for a rented instance.

    with Machine() as machine:
        machine.ssh("sudo docker ps")                      # as user ubuntu, who is not in group docker
        machine.sh("iptables -L")                          # as root, without ssh
        subprocess.run(["ssh", "-F", machine.ssh_config, machine.alias])

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import docker
import docker.errors
import filelock

from fractal import apt
from fractal.images import debian

USER = "ubuntu"
PACKAGES = ("ca-certificates", "docker.io", "iproute2", "iptables", "openssh-server", "procps", "sudo")
# In a container /sys/fs/cgroup and /proc/sys are read-only mounts; the inner engine has to write there.
START = """\
#!/bin/sh
for place in $(awk '$3 ~ /^cgroup/ {print $2}' /proc/mounts); do mount -o remount,bind,rw,nosuid,nodev,noexec $place; done
mount -o remount,bind,rw /proc/sys
mkdir -p /run/sshd
if [ ! -e /etc/no-engine ]; then dockerd > /var/log/dockerd.log 2>&1 & fi
exec /usr/sbin/sshd -D -e
"""
HOOK = f"""\
chroot "$1" useradd --create-home --shell /bin/bash {USER}
echo '{USER} ALL=(ALL) NOPASSWD:ALL' > "$1/etc/sudoers.d/{USER}"
rm -f "$1"/etc/ssh/ssh_host_* "$1"/var/cache/apt/archives/*.deb
install -m 755 /dev/stdin "$1/start"
"""
OPTIONS = {
    "cap_add": ["SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE"],  # --privileged is refused where the host lacks a capability
    "security_opt": ["seccomp=unconfined", "apparmor=unconfined"],
    "device_cgroup_rules": ["a *:* rwm"],
    "volumes": ["/var/lib/docker"],  # overlay2 does not stack on overlay2
    "init": True,
}
START_TIMEOUT_S = 60


class Unavailable(Exception):
    """No such machine can be had here: the reason."""


def image_name() -> str:
    recipe = repr((debian.SUITE, PACKAGES, START, HOOK))
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
    if shutil.which(program) is not None:
        return
    if not apt.allowed():
        raise Unavailable(f"no {program} for the test machine, and not root to install it")
    try:
        apt.install(*packages, log=log)
    except apt.AptError as error:
        raise Unavailable(f"no {program} for the test machine: {error}") from error


def make_image(client: docker.DockerClient, name: str, log: Path) -> None:
    need("mmdebstrap", "mmdebstrap", "debian-archive-keyring", log=log)
    with tempfile.TemporaryDirectory() as folder:
        tar, start = Path(folder, "machine.tar"), Path(folder, "start")
        start.write_text(START)
        hook = HOOK.replace("/dev/stdin", shlex.quote(str(start)))
        argv = ["mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", f"--customize-hook={hook}"]
        argv += ["--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"]
        argv += [*debian.network_options(), debian.SUITE, str(tar), *debian.mirror_arguments(os.environ)]
        debian.run(argv, log)
        repository, tag = name.split(":")
        client.api.import_image(src=str(tar), repository=repository, tag=tag)


class Machine:
    """Started on entering, gone on leaving, with its disk. `alias` stands in `ssh_config` with key and known host."""

    def __init__(self, *, alias: str = "lambda", engine: bool = True) -> None:
        self.alias = alias
        self._engine = engine

    def __enter__(self) -> Self:
        self.client = docker.from_env()
        self.folder = Path(tempfile.mkdtemp(prefix="fractal-machine-"))
        self.container = None
        try:
            need("ssh-keygen", "openssh-client", log=self.folder / "log")
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("key", "host_key"):
            words = [
                "ssh-keygen",
                "-q",
                "-t",
                "ed25519",
                "-N",
                "",
                "-C",
                f"fractal-test-{name}",
                "-f",
                self.folder / name,
            ]
            subprocess.run(words, check=True)
        labels = {"fractal.test": "machine"}
        try:
            self.container = self.client.containers.create(
                ensure_image(self.client), ["/start"], labels=labels, **OPTIONS
            )
            self.put("/etc/ssh/ssh_host_ed25519_key", (self.folder / "host_key").read_bytes(), 0o600)
            self.put(f"/home/{USER}/.ssh/authorized_keys", (self.folder / "key.pub").read_bytes(), 0o644)
            if not self._engine:
                self.put("/etc/no-engine", b"", 0o644)
            self.container.start()
        except docker.errors.APIError as error:
            raise Unavailable(f"the engine does not run a machine with its own engine: {error.explanation}") from error
        self.container.reload()
        self.ip = str(self.container.attrs["NetworkSettings"]["IPAddress"])
        self.known_hosts = self.folder / "known_hosts"
        self.trust((self.folder / "host_key.pub").read_text())
        self.ssh_config = self.config("config")
        self._until("ssh", "pgrep -x sshd")
        if self._engine:
            self._until("docker", "docker version")

    def _until(self, what: str, test: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
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
