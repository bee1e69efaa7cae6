"""From an address to a machine that runs GPU containers: a ladder, each rung with its own deadline, words and repair.

port open -> host key pinned -> ssh lets us in -> cloud-init done -> Docker answers -> rsync -> a container with a GPU

A machine that is lost on the way, as one that boots again, is climbed anew, at whatever address it has then.
"""

import os
import shlex
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fractal.cloud import alias
from fractal.cloud.lambda_api import CloudError
from fractal.cloud.ledger import Entry
from fractal.cloud.remote import Say
from fractal.images import ssh
from fractal.jsonl import write_whole

PORT_TIMEOUT_S = float(os.environ.get("FRACTAL_READY_TIMEOUT_S", "600"))  # large types boot for minutes
KEY_TIMEOUT_S = 60.0
LOGIN_TIMEOUT_S = 120.0  # the user's key is put there by cloud-init
CLOUD_INIT_TIMEOUT_S = 900.0
ANSWER_TIMEOUT_S = 20.0  # of an engine that runs
REPAIR_TIMEOUT_S = 150.0  # of one program that repairs; its rung calls three at most
GPU_TIMEOUT_S = 120.0  # a driver without persistence takes seconds for each GPU
LOOK_S = 1.0
SLICE_S = 20.0  # of a wait over there: we speak up in between
ADDRESS_S = 15.0  # between two questions for the address while the port is closed
CLIMBS = 3
BILL = "It is billed: try again with `invoke wait`, or end it with `invoke terminate`"
DRIVER = ("version mismatch", "driver not loaded", "couldn't communicate with the NVIDIA driver", "initialize NVML")
PROBE_LACKS = ("loading shared libraries", "couldn't find libnvidia", "no such file or directory")
CLOUD_INIT = """\
command -v cloud-init > /dev/null || { echo absent; exit 0; }
timeout "$1" cloud-init status --wait > /dev/null 2>&1
code=$?
[ $code = 124 ] || cloud-init status --long 2>&1
echo "code $code"
"""
# An engine that still starts is waited for, and not called repaired.
DOCKER = """\
limit=$1 repair=$2 left=60
command -v docker > /dev/null || { echo absent; exit 0; }
version() { timeout -k 3 "$limit" $docker version 2>&1 < /dev/null; }
try() {
  for docker in docker 'sudo -n docker'; do version > /dev/null && { echo "answers $docker"; exit 0; }; done
}
try
while [ $left -gt 0 ] && [ "$(systemctl is-active docker 2> /dev/null)" = activating ]; do
  sleep 1
  left=$((left - 1))
  try
done
timeout "$repair" sudo -n systemctl start docker 2>&1 < /dev/null && echo repaired && try
for docker in docker 'sudo -n docker'; do
  said=$(version)
  if [ $? = 124 ]; then echo "$docker version: no end after $limit s"; else printf '%s\\n' "$said" | tail -n 1; fi
done
"""
GROUP = 'sudo -n usermod -aG docker "$(id -un)" 2>&1'
RSYNC = """\
limit=$1
command -v rsync > /dev/null && { echo there; exit 0; }
apt() {
  timeout "$limit" sudo -n env DEBIAN_FRONTEND=noninteractive \\
    apt-get -q -o DPkg::Lock::Timeout=120 "$@" 2>&1 < /dev/null
}
said=$(apt install -y rsync) || { apt update > /dev/null; said=$(apt install -y rsync); }
command -v rsync > /dev/null && { echo repaired; exit 0; }
printf '%s\\n' "$said" | grep '^E:' || printf '%s\\n' "$said" | tail -n 1
exit 1
"""
# A tiny image of the machine's own files, so that no registry is needed; NVIDIA's hook puts nvidia-smi into it. Where
# the libraries go depends on debian_version, and whether they are found on ld.so.conf.
GPU = """\
docker=$1 limit=$2 name=fractal-gpu-probe-$$
command -v nvidia-smi > /dev/null || { echo 'no nvidia-smi: there is no NVIDIA driver'; exit 1; }
host=$(timeout "$limit" nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1)
code=$?
[ $code = 124 ] && host="no end after $limit s"
[ $code = 0 ] || { echo "nvidia-smi: $host"; exit 1; }
if ! $docker image inspect fractal-gpu-probe > /dev/null 2>&1; then
  files='/bin/sh /bin/ls /bin/sed /bin/cat /etc/debian_version /etc/ld.so.conf /etc/ld.so.conf.d'
  libraries=$(ldd /bin/sh /bin/ls $(command -v sed) $(command -v nvidia-smi) 2> /dev/null |
    grep -o '/[^ :)]*[.]so[^ :)]*')
  opened=$(ldconfig -p 2> /dev/null | grep -oE '/[^ ]*/lib(m|dl|rt|pthread)[.]so[.][0-9]+$')  # by NVIDIA's own
  libraries="$libraries $opened"
  tar --hard-dereference -chC / $(printf '%s\\n' $files $libraries | sort -u | cut -c 2-) 2> /dev/null |
    $docker import -c 'ENV PATH=/usr/bin:/bin' - fractal-gpu-probe 2>&1 > /dev/null || exit 1
fi
# Docker's client does not end by a mere TERM while the container starts; sudo would not pass on a KILL.
bounded=${docker%docker}"timeout -k 3 $limit docker"
inside=$($bounded run --rm --name "$name" --network none --gpus all fractal-gpu-probe nvidia-smi -L 2>&1)
code=$?
[ $code = 0 ] && { echo gpu; echo "$host"; exit 0; }
echo "$inside"
case $code in
  124 | 137)
    echo "no end after $limit s"
    $bounded rm -f "$name" > /dev/null 2>&1 ;;
esac
exit 1
"""
# The engine's new start ends whatever runs in it.
CTK = """\
docker=$1 limit=$2
command -v nvidia-ctk > /dev/null || { echo absent; exit 1; }
[ -z "$($docker ps -q)" ] || { echo busy; exit 1; }
sudo -n nvidia-ctk runtime configure --runtime=docker 2>&1 && timeout "$limit" sudo -n systemctl restart docker 2>&1
"""


@dataclass(slots=True)
class Ready:
    """What was found on the way up."""

    docker: str = ""  # how its user calls Docker
    gpu: str | None = None  # "NVIDIA A100-SXM4-80GB, 580.95.05": name and driver; "8 x ..." of several
    cards: list[str] = field(default_factory=list)  # the GPUs' names
    driver: str = ""  # "580.95.05"
    repaired: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each rung

    def __str__(self) -> str:
        repaired = f"; repaired: {', '.join(self.repaired)}" if self.repaired else ""
        return f"{self.gpu or 'no GPU'}, {self.docker}, {sum(self.seconds.values()):.0f} s{repaired}"


def wait(folder: Path, entry: Entry, say: Say, *, gpus: bool = True, refresh: Callable[[], str] | None = None) -> Ready:
    """Climb. The alias has to lead to the entry's machine already. Raises CloudError, SshError with the remedy.

    `refresh` brings the alias to the machine's present address, and gives it; it raises if the machine is gone. It is
    asked when the machine was lost on the way, and now and then while its port is closed.
    """
    found = Ready()
    assert entry.ip is not None
    ip = entry.ip
    for climb in range(1, CLIMBS + 1):
        try:
            _climb(folder, entry, ip, say, found, gpus, refresh)
            break
        except ssh.SshConnectionError as error:
            if climb == CLIMBS:
                raise CloudError(f"The machine was lost {CLIMBS} times on the way up. {error} {BILL}.") from error
        say("the machine was lost on the way, as if it boots again: once more from the first rung")
        ip = refresh() if refresh else ip
    return found


def _climb(
    folder: Path, entry: Entry, ip: str, say: Say, found: Ready, gpus: bool, refresh: Callable[[], str] | None
) -> None:
    # `invoke ssh` would climb first, and end at the same rung.
    there = f"ssh -F {shlex.quote(str(alias.config_file(folder)))} {alias.ALIAS}"

    def rung(name: str, work: Callable[[], None]) -> None:
        begin = time.monotonic()
        try:
            work()
        finally:
            took_s = time.monotonic() - begin
            found.seconds[name] = found.seconds.get(name, 0.0) + took_s
        if took_s > 5.0:
            say(f"{name}: {took_s:.0f} s")

    def port() -> None:
        nonlocal ip
        ip = _port(ip, 22, say, refresh)

    rung("port open", port)
    rung("host key pinned", lambda: _pin(folder, ip, entry, say))
    rung("ssh lets us in", lambda: _login(folder, entry).close())
    with _login(folder, entry) as link:
        rung("cloud-init done", lambda: _cloud_init(link, say, there))
        rung("docker answers", lambda: _docker(link, found, there))
        rung("rsync there", lambda: _rsync(link, found, there))
        if gpus:
            rung("a container has the GPU", lambda: _gpu(link, found, say, there))
        else:
            say("this type has no GPU: none is looked for")
    if found.docker != "docker":
        rung("docker without sudo", lambda: _group(folder, entry, found, say))


def _port(ip: str, port: int, say: Say, refresh: Callable[[], str] | None = None) -> str:
    """The machine's address, once its port is open. Raises CloudError."""
    deadline, asked, told = time.time() + PORT_TIMEOUT_S, time.time(), False
    while True:
        try:
            socket.create_connection((ip, port), timeout=5).close()
            return ip
        except OSError as error:
            if time.time() > deadline:
                raise CloudError(
                    f"{ip}: port {port} is not open after {PORT_TIMEOUT_S:.0f} s ({error.strerror or error}): it still "
                    f"boots, or a firewall is in the way (Lambda's console has one for each region). {BILL}."
                ) from error
        if not told:
            say(f"waiting for port {port} of {ip}")
            told = True
        time.sleep(LOOK_S)
        if refresh and time.time() - asked > ADDRESS_S:
            ip, asked = refresh(), time.time()


def _pin(folder: Path, ip: str, entry: Entry, say: Say) -> None:
    """The key of the first contact is the instance's from then on; ssh itself compares it at each login."""
    place = alias.known_hosts(folder)
    lines = place.read_text().splitlines() if place.exists() else []
    if any(line.startswith(f"{entry.id} ") for line in lines):
        return
    deadline = time.time() + KEY_TIMEOUT_S
    words = ["ssh-keyscan", "-T", "10", "-t", "ed25519,ecdsa,rsa", ip]
    while True:
        try:
            shown = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
        except subprocess.TimeoutExpired:
            shown = ""
        except FileNotFoundError as error:
            raise ssh.SshError(
                "There is no ssh-keyscan here. On Debian or Ubuntu run: apt-get install openssh-client."
            ) from error
        keys = [line.split(" ", 1)[1] for line in shown.splitlines() if " " in line and not line.startswith("#")]
        if keys:
            break
        if time.time() > deadline:
            raise ssh.SshConnectionError(f"{ip}: no sshd shows its host key within {KEY_TIMEOUT_S:.0f} s.")
        time.sleep(LOOK_S)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(place, "".join(f"{line}\n" for line in [*lines, *(f"{entry.id} {key}" for key in keys)]).encode())
    say(f"the host key of {entry.id} is pinned, as seen at its first contact")


def _login(folder: Path, entry: Entry) -> ssh.SshConnection:
    """A connection. Raises SshConnectionError if the machine does not answer, CloudError if it does not let us in."""
    deadline = time.time() + LOGIN_TIMEOUT_S
    while True:
        try:
            link = ssh.SshConnection(alias.ALIAS, ssh.WAIT_FOR_HEARTBEATS, config=alias.config_file(folder))
            link.send_lines()
            return link
        except ssh.SshHostKeyError as error:  # waiting changes nothing
            known = shlex.quote(str(alias.known_hosts(folder)))
            raise CloudError(
                f"The host key at the address of {entry.id} is not the one of its first contact: another machine has "
                "this address now, or someone is in between. Nothing was sent there. If you gave the machine a new key "
                f"yourself, forget the old one: ssh-keygen -R {entry.id} -f {known}. {BILL}."
            ) from error
        except ssh.SshConnectionError:
            if time.time() > deadline:
                raise
        except ssh.SshError as error:
            if time.time() > deadline:
                raise CloudError(
                    f"{error} The key here is {entry.key_file}; the instance was launched with {entry.ssh_key!r} of "
                    f"Lambda's. {BILL}."
                ) from error
        time.sleep(LOOK_S)


def _group(folder: Path, entry: Entry, found: Ready, say: Say) -> None:
    """Its user may call sudo, so this opens nothing; a new connection has the new group."""
    with _login(folder, entry) as link:
        done = link.run(GROUP)
    with _login(folder, entry) as link:
        answer = _ask_docker(link)
    if "answers docker" in answer:
        found.docker = "docker"
        found.repaired.append("its user was added to the group docker")
    else:
        why = _joined(done.stdout.splitlines() or answer)
        say(f"its user needs sudo for docker, and cannot be added to the group: {why}")


def _joined(lines: list[str]) -> str:
    """What a program said, as part of one line; of long words the beginning and the end."""
    text = "; ".join(line.strip() for line in lines if line.strip()).rstrip(". ") or "no reason given"
    return text if len(text) <= 300 else f"{text[:130]} ... {text[-165:]}"


def _cloud_init(link: ssh.SshConnection, say: Say, there: str) -> None:
    deadline, told = time.time() + CLOUD_INIT_TIMEOUT_S, False
    log = f"{there} tail /var/log/cloud-init-output.log"
    while True:
        slice_s = max(1.0, min(SLICE_S, deadline - time.time()))
        lines = link.run(CLOUD_INIT, f"{slice_s:.0f}").stdout.splitlines()
        if lines == ["absent"]:
            say("this machine has no cloud-init: nothing to wait for")
            return
        code = lines.pop().removeprefix("code ") if lines else "unknown"
        if code != "124":
            break
        if not told:
            say("cloud-init is at work")
            told = True
        if time.time() > deadline:
            raise CloudError(
                f"cloud-init is not done after {CLOUD_INIT_TIMEOUT_S:.0f} s. See what it does: {log}. {BILL}."
            )
    if code == "2":
        say(f"cloud-init is done, with errors that it calls recoverable. See them: {there} cloud-init status --long")
    elif code != "0":
        reasons = [line.strip().removeprefix("- ") for line in lines if line.strip().startswith("- ")]
        raise CloudError(f"cloud-init failed: {_joined(reasons[:1] or lines[:1])}. See why: {log}. {BILL}.")


def _ask_docker(link: ssh.SshConnection) -> list[str]:
    words = (f"{ANSWER_TIMEOUT_S:.0f}", f"{REPAIR_TIMEOUT_S:.0f}")
    return link.run(DOCKER, *words, timeout_s=3 * REPAIR_TIMEOUT_S).stdout.splitlines()


def _docker(link: ssh.SshConnection, found: Ready, there: str) -> None:
    lines = _ask_docker(link)
    if "absent" in lines:
        raise CloudError(
            "There is no Docker on the machine. Take an image with it (--family=lambda-stack-24-04), or install it "
            f"there: {there} sudo apt-get install -y docker.io. {BILL}."
        )
    answer = next((line for line in lines if line.startswith("answers ")), None)
    if answer is None and any("password is required" in line for line in lines):
        raise CloudError(
            "Docker there wants root, and sudo a password, as on no image of Lambda's. Let its user call Docker: "
            f"{there} -t 'sudo usermod -aG docker $USER'. {BILL}."
        )
    if answer is None:
        raise CloudError(
            f"Docker does not answer there, and cannot be started: {_joined(lines)}. See why: "
            f"{there} sudo journalctl -u docker -n 20. {BILL}."
        )
    if "repaired" in lines:
        found.repaired.append("the Docker engine was started")
    found.docker = answer.removeprefix("answers ")


def _rsync(link: ssh.SshConnection, found: Ready, there: str) -> None:
    done = link.run(RSYNC, f"{REPAIR_TIMEOUT_S:.0f}", timeout_s=4 * REPAIR_TIMEOUT_S)
    if done.returncode:
        raise CloudError(
            f"There is no rsync on the machine, and it cannot be installed: {_joined(done.stdout.splitlines())}. "
            f"Install it there: {there} sudo apt-get install -y rsync. {BILL}."
        )
    if done.stdout == "repaired\n":
        found.repaired.append("rsync was installed")


def _gpu(link: ssh.SshConnection, found: Ready, say: Say, there: str) -> None:
    def probe() -> tuple[bool, list[str]]:
        done = link.run(GPU, found.docker, f"{GPU_TIMEOUT_S:.0f}", timeout_s=2 * GPU_TIMEOUT_S + REPAIR_TIMEOUT_S)
        return done.returncode == 0, (done.stdout.strip() or done.stderr).splitlines()

    def refused() -> bool:
        return any("could not select device driver" in line or "unknown runtime" in line for line in lines)

    works, lines = probe()
    if not works and refused():
        _configure_toolkit(link, found, there)
        works, lines = probe()
    if works:
        names = lines[1:]
        found.gpu = f"{len(names)} x {names[0]}" if len(names) > 1 else names[0]
        found.cards = [name.rpartition(", ")[0] for name in names]
        found.driver = names[0].rpartition(", ")[2]
        return
    why, said = _joined(lines), "\n".join(lines)
    if any(word in said for word in DRIVER):
        raise CloudError(
            f"NVIDIA's driver does not work there: {why}. A new boot mends that most of the time: {there} sudo reboot. "
            f"{BILL}."
        )
    if "no space left" in said:
        raise CloudError(f"The machine's disk is full. See what fills it: {there} 'df -h; docker system df'. {BILL}.")
    if any(word in said for word in PROBE_LACKS):
        # The hook has run: the probe lacks something that NVIDIA's programs want, and the pipeline's image has.
        say(f"Docker takes --gpus all; the probe itself does not run ({why}), the pipeline will tell")
        found.gpu = "GPU"
        return
    if refused():
        raise CloudError(
            f"NVIDIA's container toolkit is configured there, and Docker still refuses --gpus all: {why}. "
            f"Install it anew: {there} sudo apt-get install -y --reinstall nvidia-container-toolkit. {BILL}."
        )
    raise CloudError(
        f"No container on the machine sees its GPU: {why}. Look at it there: "
        f"{there} {found.docker} run --rm --gpus all fractal-gpu-probe nvidia-smi. {BILL}."
    )


def _configure_toolkit(link: ssh.SshConnection, found: Ready, there: str) -> None:
    done = link.run(CTK, found.docker, f"{REPAIR_TIMEOUT_S:.0f}", timeout_s=2 * REPAIR_TIMEOUT_S)
    if done.returncode == 0:
        found.repaired.append("NVIDIA's container toolkit was configured and Docker restarted")
    elif done.stdout == "absent\n":
        raise CloudError(
            "Docker there has no NVIDIA container toolkit: --gpus all is refused. Install it: "
            f"{there} sudo apt-get install -y nvidia-container-toolkit. {BILL}."
        )
    elif done.stdout == "busy\n":
        raise CloudError(
            "Docker there has to start anew before its containers get GPUs, and that would end those that run now: "
            f"{there} docker ps. End them first. {BILL}."
        )
    else:
        raise CloudError(
            f"NVIDIA's container toolkit cannot be configured there: {_joined(done.stdout.splitlines())}. {BILL}."
        )
