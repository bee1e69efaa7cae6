"""Wait until an instance can run GPU containers: a list of checks, each with its own timeout, message and repair.

If the connection is lost in between, as when the instance boots again, the checks start again at its present address.
"""

import math
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fractal.cloud import file_system, prerequisites, ssh_config
from fractal.cloud.account import Log
from fractal.cloud.lambda_errors import CloudError
from fractal.cloud.ledger import Entry
from fractal.cloud.remote_host import Driver, parse_driver, script
from fractal.images import ssh
from fractal.jsonl import write_whole

PORT_TIMEOUT_S = float(os.environ.get("FRACTAL_READY_TIMEOUT_S", "600"))  # large types boot for minutes
KEY_TIMEOUT_S = 60.0
MADE_KEY_TIMEOUT_S = 20.0  # sshd may answer before cloud-init has put the instance's own key in place
LOGIN_TIMEOUT_S = 120.0  # cloud-init installs the user's key
CLOUD_INIT_TIMEOUT_S = 900.0
ANSWER_TIMEOUT_S = 20.0  # of a running engine
REPAIR_TIMEOUT_S = 150.0  # of one command that repairs; a check runs three at most
GPU_TIMEOUT_S = 120.0  # a driver without persistence takes seconds for each GPU
POLL_S = 1.0
ADDRESS_POLL_S = 15.0  # between two requests for the address while the port is closed
MOVED_TIMEOUT_S = 1.5  # for Lambda to name another address, where another machine answers at this one
ATTEMPTS = 3
BILLED = "It is billed: try again with `invoke wait`, or end it with `invoke terminate`"
PROBE_LACKS = ("loading shared libraries", "couldn't find libnvidia", "no such file or directory")


@dataclass(slots=True)
class Readiness:
    """What the checks found and repaired."""

    driver: Driver = field(default_factory=Driver)
    repaired: list[str] = field(default_factory=list)
    free_bytes: float = math.nan  # of disk for images and models

    def __str__(self) -> str:
        gpus = f"{', '.join(self.driver.gpus)}; driver {self.driver.version}" if self.driver.gpus else "no GPU known"
        disk = f"{self.free_bytes / 1e9:.0f} GB of free disk" if self.free_bytes >= 0 else "free disk unknown"
        return f"{gpus}; {disk}; repaired: {', '.join(self.repaired) or 'nothing'}"


def wait_ready(
    folder: Path, entry: Entry, log: Log, refresh: Callable[[], str], *, lambda_offset_s: float = 0.0
) -> Readiness:
    """Run the checks until all pass. The alias has to refer to the instance already.

    `refresh` updates the alias to the instance's present address and returns it; it raises if the instance is gone. It
    is called when the connection was lost, and at intervals while the port is closed. `lambda_offset_s`: Lambda's clock
    minus this machine's. Raises CloudError or SshError with the remedy.
    """
    assert entry.ip is not None
    checks, ip = _Checks(folder, entry, log, lambda_offset_s), entry.ip
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ip = wait_port(ip, 22, log, refresh)
            checks.run(ip)
            break
        except ssh.SshHostKeyError as error:
            if (present := _present_address(ip, refresh)) == ip or attempt == ATTEMPTS:
                raise checks.other_host_key() from error
            log(f"the instance is at {present} now, and another machine at {ip}: starting again with the first check")
            ip = present
            continue
        except ssh.SshConnectionError as error:
            if attempt == ATTEMPTS:
                raise CloudError(
                    f"The connection was lost {ATTEMPTS} times before the instance was ready. {error} {BILLED}."
                ) from error
        log("the connection is lost, as if the instance boots again: starting again with the first check")
        ip = refresh()
    return checks.result


class _Checks:
    def __init__(self, folder: Path, entry: Entry, log: Log, lambda_offset_s: float = 0.0) -> None:
        self.result = Readiness()
        self._folder, self._entry, self._log, self._lambda_offset_s = folder, entry, log, lambda_offset_s
        self._docker = "docker"  # the command that works in this login
        # For messages; `invoke ssh` would run the checks first, and stop at the same one.
        self._ssh = f"ssh -F {shlex.quote(str(ssh_config.config_file(folder)))} {ssh_config.ALIAS}"

    def run(self, ip: str) -> None:
        self._pin_host_key(ip)
        with self._login() as link:
            self._wait_cloud_init(link)
            self._check_docker(link)
            self._check_file_system(link)
            self._install_rsync(link)
            if self._entry.type_name.startswith("cpu_"):
                self._log("this type has no GPU: none is checked")
            else:
                self._check_gpu(link)
            self._probe_prerequisites(link)

    def other_host_key(self) -> CloudError:
        """The error where the instance's address shows another host key than it had."""
        known = shlex.quote(str(ssh_config.known_hosts(self._folder)))
        return CloudError(
            f"The host key at the address of {self._entry.id} is not the one of its first contact: another machine "
            "has this address now, or someone intercepts the connection. Nothing was sent there. If you gave "
            f"the instance a new key yourself, forget the old one: ssh-keygen -R {self._entry.id} -f {known}. "
            f"{BILLED}."
        )

    def _error(self, problem: str, command: str) -> CloudError:
        """`problem` ends with what the command, which the user runs there, is for."""
        return CloudError(f"{problem}: {self._ssh} {command}. {BILLED}.")

    def _pin_host_key(self, ip: str) -> None:
        """Know the host key before the first login: the one that was made for the instance, else the first one seen.

        It is the instance's from then on; ssh compares it at each login.
        """
        path = ssh_config.known_hosts(self._folder)
        lines = path.read_text().splitlines() if path.exists() else []
        id, made = self._entry.id, self._entry.host_key
        if any(line.startswith(f"{id} ") for line in lines):
            return
        keys = self._wait_host_keys(ip)
        how = "is pinned, as seen at its first contact"
        if made in keys:
            keys, how = [made], "is the one that was made for it: the first contact is proven"
        elif self._entry.strict_host_key:
            raise CloudError(
                f"{ip} does not show the host key that was made for {id}: its image did not take it, or someone "
                f"intercepts the connection. Nothing was sent there, as --strict-host-key wants it. {BILLED}."
            )
        elif made is not None:
            how = "is not the one that was made for it: its image did not take that one. Pinned at first contact"
        write_whole(path, "".join(f"{line}\n" for line in [*lines, *(f"{id} {key}" for key in keys)]).encode())
        self._log(f"the host key of {id} {how}")

    def _wait_host_keys(self, ip: str) -> list[str]:
        """The keys that sshd shows, once the one made for the instance is among them; after a while, any."""
        made, deadline = self._entry.host_key, time.time() + KEY_TIMEOUT_S
        any_from: float | None = None
        while True:
            if keys := _scan_host_keys(ip):
                any_from = any_from or time.time() + (MADE_KEY_TIMEOUT_S if made else 0.0)
                if made in keys or time.time() >= any_from:
                    return keys
            elif time.time() > deadline:
                raise ssh.SshConnectionError(f"{ip}: no sshd shows its host key within {KEY_TIMEOUT_S:.0f} s.")
            time.sleep(POLL_S)

    def _login(self) -> ssh.SshConnection:
        """Connect.

        Raises SshConnectionError if the instance does not answer, CloudError if it refuses the login, SshHostKeyError
        if another machine answers.
        """
        deadline = time.time() + LOGIN_TIMEOUT_S
        entry, config = self._entry, ssh_config.config_file(self._folder)
        while True:
            try:
                link = ssh.SshConnection(ssh_config.ALIAS, ssh.WAIT_FOR_HEARTBEATS, config=config)
                link.send_lines()
                return link
            except ssh.SshHostKeyError:  # waiting changes nothing
                raise
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
        self._log("waiting for cloud-init")
        timeout_s, see_log = CLOUD_INIT_TIMEOUT_S, "tail /var/log/cloud-init-output.log"
        output = link.run(script("wait_cloud_init"), f"{timeout_s:.0f}", timeout_s=timeout_s + 60).stdout
        lines = output.splitlines()
        if "code 124" in lines:
            raise self._error(f"cloud-init is not done after {timeout_s:.0f} s. See its output", see_log)
        if not {"absent", "code 0", "code 2"}.intersection(lines):  # 2: errors that it calls recoverable
            raise self._error(f"cloud-init failed: {_one_line(output)}. See why", see_log)

    def _check_docker(self, link: ssh.SshConnection) -> None:
        arguments = (f"{ANSWER_TIMEOUT_S:.0f}", f"{REPAIR_TIMEOUT_S:.0f}")
        output = link.run(script("check_docker"), *arguments, timeout_s=3 * REPAIR_TIMEOUT_S).stdout
        lines = output.splitlines()
        if "absent" in lines:
            problem = "There is no Docker on the instance. Take an image with it (--family=lambda-stack-24-04), or"
            raise self._error(f"{problem} install it there", "sudo apt-get install -y docker.io")
        if not {"answers docker", "joined"}.intersection(lines):
            problem = f"Docker does not answer there, and cannot be repaired: {_one_line(output)}"
            raise self._error(f"{problem}. See why", "sudo journalctl -u docker -n 20")
        if "started" in lines:
            self.result.repaired.append("the Docker engine was started")
        if "joined" in lines:  # it may call sudo, so this opens nothing; the next login has the new group
            self.result.repaired.append("its user was added to the group docker")
        self._docker = "sudo -n docker" if "joined" in lines else "docker"

    def _check_file_system(self, link: ssh.SshConnection) -> None:
        if problem := file_system.prepare(link.run, self._entry):
            raise self._error(f"{problem}. Look at what is mounted there", file_system.LIST_MOUNTS)

    def _install_rsync(self, link: ssh.SshConnection) -> None:
        done = link.run(script("install_rsync"), f"{REPAIR_TIMEOUT_S:.0f}", timeout_s=4 * REPAIR_TIMEOUT_S)
        if done.returncode:
            problem = f"There is no rsync on the instance, and it cannot be installed: {_one_line(done.stdout)}"
            raise self._error(f"{problem}. Install it", "sudo apt-get install -y rsync")
        if done.stdout == "repaired\n":
            self.result.repaired.append("rsync was installed")

    def _probe_prerequisites(self, link: ssh.SshConnection) -> None:
        """Warn about what the instance does not reach, and about clocks. How much disk is needed is known later."""
        asked = prerequisites.addresses()
        began = time.time()
        found = prerequisites.probe(link.run, [address.url for address in asked])
        self.result.free_bytes = found.free_bytes
        for line in prerequisites.warnings(found, asked, here=began, lambda_offset_s=self._lambda_offset_s):
            self._log(line)

    def _check_gpu(self, link: ssh.SshConnection) -> None:
        works, output = self._probe_gpu(link)
        if not works and ("could not select device driver" in output or "unknown runtime" in output):
            self._configure_toolkit(link)
            works, output = self._probe_gpu(link)
        if works:
            self.result.driver = parse_driver(output)
            return
        reason = _one_line(output)
        if any(text in reason for text in PROBE_LACKS):
            # The hook has run: the probe lacks something that NVIDIA's programs need, and the pipeline's image has.
            self._log(f"Docker accepts --gpus all; the probe itself does not run ({reason}), the pipeline may")
            return
        problem = f"No container on the instance sees its GPU: {reason}. A full disk has to be cleared there; a toolkit"
        problem += " that fails, installed anew (sudo apt-get install -y --reinstall nvidia-container-toolkit)"
        raise self._error(f"{problem}; a driver that fails needs a reboot most of the time", "sudo reboot")

    def _probe_gpu(self, link: ssh.SshConnection) -> tuple[bool, str]:
        """Whether a container sees the GPU, and the probe's output."""
        arguments = (self._docker, f"{GPU_TIMEOUT_S:.0f}")
        done = link.run(script("probe_gpu"), *arguments, timeout_s=2 * GPU_TIMEOUT_S + REPAIR_TIMEOUT_S)
        return done.returncode == 0, done.stdout.strip() or done.stderr

    def _configure_toolkit(self, link: ssh.SshConnection) -> None:
        arguments = (self._docker, f"{REPAIR_TIMEOUT_S:.0f}")
        done = link.run(script("configure_nvidia_toolkit"), *arguments, timeout_s=2 * REPAIR_TIMEOUT_S)
        if done.returncode == 0:
            self.result.repaired.append("NVIDIA's container toolkit was configured and Docker restarted")
            return
        problem = "Docker there refuses --gpus all"
        if done.stdout == "absent\n":
            problem += ": it has no NVIDIA container toolkit. Install it"
            raise self._error(problem, "sudo apt-get install -y nvidia-container-toolkit")
        if done.stdout == "busy\n":
            problem += " until it is restarted, and that would end the containers that run now. End them first"
            raise self._error(problem, "docker ps")
        problem += f", and NVIDIA's container toolkit cannot be configured: {_one_line(done.stdout)}. See why"
        raise self._error(problem, "sudo nvidia-ctk runtime configure --runtime=docker")


def wait_port(ip: str, port: int, log: Log, refresh: Callable[[], str]) -> str:
    """Wait until the port is open; the instance's address then. Raises CloudError."""
    deadline, asked_at = time.time() + PORT_TIMEOUT_S, time.time()
    log(f"waiting for port {port} of {ip}")
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
        time.sleep(POLL_S)
        if time.time() - asked_at > ADDRESS_POLL_S:
            ip, asked_at = refresh(), time.time()


def _present_address(ip: str, refresh: Callable[[], str]) -> str:
    """The instance's address, which Lambda may name a moment after it has changed."""
    deadline = time.time() + MOVED_TIMEOUT_S
    while (present := refresh()) == ip and time.time() < deadline:
        time.sleep(POLL_S)
    return present


def _scan_host_keys(ip: str) -> list[str]:
    """The keys that sshd shows; none if it does not answer."""
    command = ["ssh-keyscan", "-T", "10", "-t", "ed25519,ecdsa,rsa", ip]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    return [line.split(" ", 1)[1] for line in output.splitlines() if " " in line and not line.startswith("#")]


def _one_line(output: str) -> str:
    """A program's output as part of one line; of a long one the beginning and the end."""
    text = "; ".join(line.strip() for line in output.splitlines() if line.strip()).rstrip(". ") or "no reason given"
    return text if len(text) <= 300 else f"{text[:130]} ... {text[-165:]}"
