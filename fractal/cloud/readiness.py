"""Wait until an instance can run GPU containers: a list of checks, each with its own timeout, message and repair.

port open -> host key pinned -> ssh login -> cloud-init done -> Docker answers -> rsync -> a container with a GPU

If the connection is lost in between, as when the instance boots again, the checks start again at its present address.
"""

import os
import shlex
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fractal.cloud import gpu_driver, ssh_config
from fractal.cloud.account import Log
from fractal.cloud.gpu_driver import Driver
from fractal.cloud.lambda_errors import CloudError
from fractal.cloud.ledger import Entry
from fractal.cloud.remote_host import script
from fractal.images import ssh
from fractal.jsonl import write_whole

PORT_TIMEOUT_S = float(os.environ.get("FRACTAL_READY_TIMEOUT_S", "600"))  # large types boot for minutes
KEY_TIMEOUT_S = 60.0
LOGIN_TIMEOUT_S = 120.0  # cloud-init installs the user's key
CLOUD_INIT_TIMEOUT_S = 900.0
ANSWER_TIMEOUT_S = 20.0  # of a running engine
REPAIR_TIMEOUT_S = 150.0  # of one command that repairs; a check runs three at most
GPU_TIMEOUT_S = 120.0  # a driver without persistence takes seconds for each GPU
POLL_S = 1.0
CLOUD_INIT_SLICE_S = 20.0  # of the wait for cloud-init; in between a message may be logged
ADDRESS_POLL_S = 15.0  # between two requests for the address while the port is closed
ATTEMPTS = 3
BILLED = "It is billed: try again with `invoke wait`, or end it with `invoke terminate`"
DRIVER_FAILURES = (
    "version mismatch",
    "driver not loaded",
    "couldn't communicate with the NVIDIA driver",
    "initialize NVML",
)
PROBE_LACKS = ("loading shared libraries", "couldn't find libnvidia", "no such file or directory")
ADD_TO_GROUP = 'sudo -n usermod -aG docker "$(id -un)" 2>&1'


@dataclass(slots=True)
class Readiness:
    """What the checks found and repaired."""

    docker: str = ""  # the user's docker command
    driver: Driver = field(default_factory=Driver)
    repaired: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each check

    def __str__(self) -> str:
        names = self.driver.gpus
        gpu = f"{names[0]}, {self.driver.version}" if names else "no GPU known"
        gpu = f"{len(names)} x {gpu}" if len(names) > 1 else gpu
        repaired = f"; repaired: {', '.join(self.repaired)}" if self.repaired else ""
        return f"{gpu}, {self.docker}, {sum(self.seconds.values()):.0f} s{repaired}"


def wait_ready(
    folder: Path, entry: Entry, log: Log, *, gpus: bool = True, refresh: Callable[[], str] | None = None
) -> Readiness:
    """Run the checks until all pass. The alias has to refer to the instance already.

    `refresh` updates the alias to the instance's present address and returns it; it raises if the instance is gone. It
    is called when the connection was lost, and at intervals while the port is closed. Raises CloudError or SshError
    with the remedy.
    """
    checks = _Checks(folder, entry, log, refresh)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            checks.run(gpus)
            break
        except ssh.SshConnectionError as error:
            if attempt == ATTEMPTS:
                raise CloudError(
                    f"The connection was lost {ATTEMPTS} times before the instance was ready. {error} {BILLED}."
                ) from error
        log("the connection is lost, as if the instance boots again: starting again with the first check")
        if refresh:
            checks.ip = refresh()
    return checks.result


class _Checks:
    def __init__(self, folder: Path, entry: Entry, log: Log, refresh: Callable[[], str] | None) -> None:
        assert entry.ip is not None
        self.ip = entry.ip
        self.result = Readiness()
        self._folder, self._entry, self._log, self._refresh = folder, entry, log, refresh
        # For messages; `invoke ssh` would run the checks first, and stop at the same one.
        self._ssh = f"ssh -F {shlex.quote(str(ssh_config.config_file(folder)))} {ssh_config.ALIAS}"

    def run(self, gpus: bool) -> None:
        self._timed("port open", self._wait_port)
        self._timed("host key pinned", self._pin_host_key)
        self._timed("ssh login", lambda: self._login().close())
        with self._login() as link:
            self._timed("cloud-init done", lambda: self._wait_cloud_init(link))
            self._timed("docker answers", lambda: self._check_docker(link))
            self._timed("rsync installed", lambda: self._install_rsync(link))
            if gpus:
                self._timed("a container has the GPU", lambda: self._check_gpu(link))
            else:
                self._log("this type has no GPU: none is checked")
        if self.result.docker != "docker":
            self._timed("docker without sudo", self._join_docker_group)

    def _timed(self, name: str, check: Callable[[], None]) -> None:
        begin = time.monotonic()
        try:
            check()
        finally:
            seconds = time.monotonic() - begin
            self.result.seconds[name] = self.result.seconds.get(name, 0.0) + seconds
        if seconds > 5.0:
            self._log(f"{name}: {seconds:.0f} s")

    def _wait_port(self) -> None:
        self.ip = wait_port(self.ip, 22, self._log, self._refresh)

    def _pin_host_key(self) -> None:
        """The key of the first contact is the instance's from then on; ssh compares it at each login."""
        path = ssh_config.known_hosts(self._folder)
        lines = path.read_text().splitlines() if path.exists() else []
        id = self._entry.id
        if any(line.startswith(f"{id} ") for line in lines):
            return
        deadline = time.time() + KEY_TIMEOUT_S
        while not (keys := _scan_host_keys(self.ip)):
            if time.time() > deadline:
                raise ssh.SshConnectionError(f"{self.ip}: no sshd shows its host key within {KEY_TIMEOUT_S:.0f} s.")
            time.sleep(POLL_S)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, "".join(f"{line}\n" for line in [*lines, *(f"{id} {key}" for key in keys)]).encode())
        self._log(f"the host key of {id} is pinned, as seen at its first contact")

    def _login(self) -> ssh.SshConnection:
        """Connect. Raises SshConnectionError if the instance does not answer, CloudError if it refuses the login."""
        deadline = time.time() + LOGIN_TIMEOUT_S
        entry = self._entry
        while True:
            try:
                link = ssh.SshConnection(
                    ssh_config.ALIAS, ssh.WAIT_FOR_HEARTBEATS, config=ssh_config.config_file(self._folder)
                )
                link.send_lines()
                return link
            except ssh.SshHostKeyError as error:  # waiting changes nothing
                known = shlex.quote(str(ssh_config.known_hosts(self._folder)))
                raise CloudError(
                    f"The host key at the address of {entry.id} is not the one of its first contact: another machine "
                    "has this address now, or someone intercepts the connection. Nothing was sent there. If you gave "
                    f"the instance a new key yourself, forget the old one: ssh-keygen -R {entry.id} -f {known}. "
                    f"{BILLED}."
                ) from error
            except ssh.SshConnectionError:
                if time.time() > deadline:
                    raise
            except ssh.SshError as error:
                if time.time() > deadline:
                    raise CloudError(
                        f"{error} The key here is {entry.key_file}; the instance was launched with {entry.ssh_key!r} "
                        f"of Lambda's. {BILLED}."
                    ) from error
            time.sleep(POLL_S)

    def _wait_cloud_init(self, link: ssh.SshConnection) -> None:
        deadline, logged = time.time() + CLOUD_INIT_TIMEOUT_S, False
        see_log = f"{self._ssh} tail /var/log/cloud-init-output.log"
        while True:
            slice_s = max(1.0, min(CLOUD_INIT_SLICE_S, deadline - time.time()))
            lines = link.run(script("wait_cloud_init"), f"{slice_s:.0f}").stdout.splitlines()
            if lines == ["absent"]:
                self._log("this instance has no cloud-init: nothing to wait for")
                return
            code = lines.pop().removeprefix("code ") if lines else "unknown"
            if code != "124":
                break
            if not logged:
                self._log("waiting for cloud-init")
                logged = True
            if time.time() > deadline:
                raise CloudError(
                    f"cloud-init is not done after {CLOUD_INIT_TIMEOUT_S:.0f} s. See its output: {see_log}. {BILLED}."
                )
        if code == "2":
            see_status = f"{self._ssh} cloud-init status --long"
            self._log(f"cloud-init is done, with errors that it calls recoverable. See them: {see_status}")
        elif code != "0":
            reasons = [line.strip().removeprefix("- ") for line in lines if line.strip().startswith("- ")]
            raise CloudError(f"cloud-init failed: {_one_line(reasons[:1] or lines[:1])}. See why: {see_log}. {BILLED}.")

    def _check_docker(self, link: ssh.SshConnection) -> None:
        lines = _docker_answer(link)
        if "absent" in lines:
            raise CloudError(
                "There is no Docker on the instance. Take an image with it (--family=lambda-stack-24-04), or install "
                f"it there: {self._ssh} sudo apt-get install -y docker.io. {BILLED}."
            )
        answer = next((line for line in lines if line.startswith("answers ")), None)
        if answer is None and any("password is required" in line for line in lines):
            raise CloudError(
                "Docker there needs root, and sudo a password, as on no image of Lambda's. Let its user call Docker: "
                f"{self._ssh} -t 'sudo usermod -aG docker $USER'. {BILLED}."
            )
        if answer is None:
            raise CloudError(
                f"Docker does not answer there, and cannot be started: {_one_line(lines)}. See why: "
                f"{self._ssh} sudo journalctl -u docker -n 20. {BILLED}."
            )
        if "repaired" in lines:
            self.result.repaired.append("the Docker engine was started")
        self.result.docker = answer.removeprefix("answers ")

    def _join_docker_group(self) -> None:
        """Add the user to the group docker. It may call sudo, so this opens nothing; a new login has the new group."""
        with self._login() as link:
            done = link.run(ADD_TO_GROUP)
        with self._login() as link:
            answer = _docker_answer(link)
        if "answers docker" in answer:
            self.result.docker = "docker"
            self.result.repaired.append("its user was added to the group docker")
        else:
            reason = _one_line(done.stdout.splitlines() or answer)
            self._log(f"its user needs sudo for docker, and cannot be added to the group: {reason}")

    def _install_rsync(self, link: ssh.SshConnection) -> None:
        done = link.run(script("install_rsync"), f"{REPAIR_TIMEOUT_S:.0f}", timeout_s=4 * REPAIR_TIMEOUT_S)
        if done.returncode:
            raise CloudError(
                f"There is no rsync on the instance, and installing it fails: {_one_line(done.stdout.splitlines())}. "
                f"Install it there: {self._ssh} sudo apt-get install -y rsync. {BILLED}."
            )
        if done.stdout == "repaired\n":
            self.result.repaired.append("rsync was installed")

    def _check_gpu(self, link: ssh.SshConnection) -> None:
        works, lines = self._probe_gpu(link)
        if not works and _refuses_gpus(lines):
            self._configure_toolkit(link)
            works, lines = self._probe_gpu(link)
        if works:
            self.result.driver = gpu_driver.parse("\n".join(lines[1:]))
            return
        reason, output = _one_line(lines), "\n".join(lines)
        if any(text in output for text in DRIVER_FAILURES):
            raise CloudError(
                f"NVIDIA's driver does not work there: {reason}. A reboot repairs that most of the time: {self._ssh} "
                f"sudo reboot. {BILLED}."
            )
        if "no space left" in output:
            raise CloudError(
                f"The instance's disk is full. See what fills it: {self._ssh} 'df -h; docker system df'. {BILLED}."
            )
        if any(text in output for text in PROBE_LACKS):
            # The hook has run: the probe lacks something that NVIDIA's programs need, and the pipeline's image has.
            self._log(f"Docker accepts --gpus all; the probe itself does not run ({reason}), the pipeline may")
            return
        if _refuses_gpus(lines):
            raise CloudError(
                f"NVIDIA's container toolkit is configured there, and Docker still refuses --gpus all: {reason}. "
                f"Install it anew: {self._ssh} sudo apt-get install -y --reinstall nvidia-container-toolkit. {BILLED}."
            )
        raise CloudError(
            f"No container on the instance sees its GPU: {reason}. Look at it there: "
            f"{self._ssh} {self.result.docker} run --rm --gpus all fractal-gpu-probe nvidia-smi. {BILLED}."
        )

    def _probe_gpu(self, link: ssh.SshConnection) -> tuple[bool, list[str]]:
        """Whether a container sees the GPU, and the probe's output."""
        arguments = (self.result.docker, f"{GPU_TIMEOUT_S:.0f}")
        done = link.run(script("probe_gpu"), *arguments, timeout_s=2 * GPU_TIMEOUT_S + REPAIR_TIMEOUT_S)
        return done.returncode == 0, (done.stdout.strip() or done.stderr).splitlines()

    def _configure_toolkit(self, link: ssh.SshConnection) -> None:
        arguments = (self.result.docker, f"{REPAIR_TIMEOUT_S:.0f}")
        done = link.run(script("configure_nvidia_toolkit"), *arguments, timeout_s=2 * REPAIR_TIMEOUT_S)
        if done.returncode == 0:
            self.result.repaired.append("NVIDIA's container toolkit was configured and Docker restarted")
        elif done.stdout == "absent\n":
            raise CloudError(
                "Docker there has no NVIDIA container toolkit: --gpus all is refused. Install it: "
                f"{self._ssh} sudo apt-get install -y nvidia-container-toolkit. {BILLED}."
            )
        elif done.stdout == "busy\n":
            raise CloudError(
                "Docker there has to be restarted before its containers get GPUs, and that would end those that run "
                f"now: {self._ssh} docker ps. End them first. {BILLED}."
            )
        else:
            reason = _one_line(done.stdout.splitlines())
            raise CloudError(f"NVIDIA's container toolkit cannot be configured there: {reason}. {BILLED}.")


def wait_port(ip: str, port: int, log: Log, refresh: Callable[[], str] | None = None) -> str:
    """Wait until the port is open; the instance's address then. Raises CloudError."""
    deadline, asked_at, logged = time.time() + PORT_TIMEOUT_S, time.time(), False
    while True:
        try:
            socket.create_connection((ip, port), timeout=5).close()
            return ip
        except OSError as error:
            if time.time() > deadline:
                raise CloudError(
                    f"{ip}: port {port} is not open after {PORT_TIMEOUT_S:.0f} s ({error.strerror or error}): it still "
                    f"boots, or a firewall blocks it (Lambda's console has one for each region). {BILLED}."
                ) from error
        if not logged:
            log(f"waiting for port {port} of {ip}")
            logged = True
        time.sleep(POLL_S)
        if refresh and time.time() - asked_at > ADDRESS_POLL_S:
            ip, asked_at = refresh(), time.time()


def _scan_host_keys(ip: str) -> list[str]:
    """The keys that sshd shows; none if it does not answer."""
    command = ["ssh-keyscan", "-T", "10", "-t", "ed25519,ecdsa,rsa", ip]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except subprocess.TimeoutExpired:
        return []
    except FileNotFoundError as error:
        raise ssh.SshError(
            "There is no ssh-keyscan here. On Debian or Ubuntu run: apt-get install openssh-client."
        ) from error
    return [line.split(" ", 1)[1] for line in output.splitlines() if " " in line and not line.startswith("#")]


def _docker_answer(link: ssh.SshConnection) -> list[str]:
    arguments = (f"{ANSWER_TIMEOUT_S:.0f}", f"{REPAIR_TIMEOUT_S:.0f}")
    return link.run(script("check_docker"), *arguments, timeout_s=3 * REPAIR_TIMEOUT_S).stdout.splitlines()


def _refuses_gpus(lines: list[str]) -> bool:
    return any("could not select device driver" in line or "unknown runtime" in line for line in lines)


def _one_line(lines: list[str]) -> str:
    """A program's output as part of one line; of a long one the beginning and the end."""
    text = "; ".join(line.strip() for line in lines if line.strip()).rstrip(". ") or "no reason given"
    return text if len(text) <= 300 else f"{text[:130]} ... {text[-165:]}"
