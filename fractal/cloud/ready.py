"""From an address to a machine that runs GPU containers: a ladder, each rung with its own deadline, words and repair.

port open -> host key pinned -> ssh lets us in -> cloud-init done -> Docker answers -> rsync -> a container with a GPU
"""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fractal import ssh
from fractal.cloud import alias
from fractal.cloud.lambda_api import CloudError
from fractal.cloud.ledger import Entry
from fractal.cloud.remote import Say
from fractal.records import write_whole

PORT_TIMEOUT_S = float(os.environ.get("FRACTAL_READY_TIMEOUT_S", "600"))  # large types boot for minutes
KEY_TIMEOUT_S = 60.0
LOGIN_TIMEOUT_S = 120.0  # the user's key is put there by cloud-init
CLOUD_INIT_TIMEOUT_S = 900.0
REPAIR_TIMEOUT_S = 300.0
LOOK_S = 1.0
CLOUD_INIT = """\
command -v cloud-init > /dev/null || { echo absent; exit 0; }
timeout "$1" cloud-init status --wait --long 2>&1
code=$?
echo "code $code"
"""
DOCKER = """\
command -v docker > /dev/null || { echo absent; exit 0; }
try() {
  for docker in docker 'sudo -n docker'; do
    $docker version > /dev/null 2>&1 < /dev/null && { echo "answers $docker"; exit 0; }
  done
}
for i in 1 2 3 4 5; do try; systemctl is-active docker 2> /dev/null | grep -q activating || break; sleep 1; done
sudo -n systemctl start docker 2>&1 && echo repaired && try
for docker in docker 'sudo -n docker'; do $docker version 2>&1 < /dev/null | tail -n 1; done
"""
GROUP = 'sudo -n usermod -aG docker "$(id -un)" 2>&1'
RSYNC = """\
command -v rsync > /dev/null && { echo there; exit 0; }
{ sudo -n apt-get update && sudo -n apt-get install -y rsync; } > /tmp/fractal-apt 2>&1 < /dev/null
command -v rsync > /dev/null && { echo repaired; exit 0; }
tail -n 1 /tmp/fractal-apt
exit 1
"""
# A tiny image of the machine's own files, so that no registry is needed; NVIDIA's hook puts nvidia-smi into it.
GPU = """\
docker=$1
command -v nvidia-smi > /dev/null || { echo 'no nvidia-smi: there is no NVIDIA driver'; exit 1; }
host=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1) || { echo "nvidia-smi: $host"; exit 1; }
if ! $docker image inspect fractal-gpu-probe > /dev/null 2>&1; then
  files='/bin/sh /bin/ls /bin/sed /bin/cat'
  libraries=$(ldd /bin/sh /bin/ls $(command -v sed) $(command -v nvidia-smi) 2> /dev/null |
    grep -o '/[^ :)]*[.]so[^ :)]*')
  opened=$(ldconfig -p 2> /dev/null | grep -oE '/[^ ]*/lib(m|dl|rt|pthread)[.]so[.][0-9]+$')  # by NVIDIA's own
  libraries="$libraries $opened"
  tar --hard-dereference -chC / $(printf '%s\\n' $files $libraries | sort -u | cut -c 2-) 2> /dev/null |
    $docker import -c 'ENV PATH=/usr/bin:/bin' - fractal-gpu-probe > /dev/null || exit 1
fi
inside=$($docker run --rm --network none --gpus all fractal-gpu-probe nvidia-smi -L 2>&1)
code=$?
[ $code = 0 ] && { echo "gpu $host"; exit 0; }
echo "$inside" | tail -n 1
exit 1
"""
CTK = """\
command -v nvidia-ctk > /dev/null || { echo absent; exit 1; }
sudo -n nvidia-ctk runtime configure --runtime=docker 2>&1 && sudo -n systemctl restart docker 2>&1
"""


@dataclass(slots=True)
class Ready:
    """What was found on the way up."""

    docker: str = ""  # how its user calls Docker
    gpu: str | None = None  # "NVIDIA A100-SXM4-80GB, 580.95.05": name and driver
    repaired: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each rung

    def __str__(self) -> str:
        repaired = f"; repaired: {', '.join(self.repaired)}" if self.repaired else ""
        return f"{self.gpu or 'no GPU'}, {self.docker}, {sum(self.seconds.values()):.0f} s{repaired}"


def wait(folder: Path, entry: Entry, say: Say, *, gpus: bool = True) -> Ready:
    """Climb. The alias has to lead to the entry's machine already. Raises CloudError, SshError with the remedy."""
    assert entry.ip is not None
    assert entry.id is not None
    found, ip, id = Ready(), entry.ip, entry.id
    bill = "It is billed: try again with `invoke wait`, or end it with `invoke terminate`"

    def rung(name: str, work: Callable[[], None]) -> None:
        begin = time.monotonic()
        work()
        found.seconds[name] = time.monotonic() - begin
        if found.seconds[name] > 5.0:
            say(f"{name}: {found.seconds[name]:.0f} s")

    rung("port open", lambda: _port(ip, 22, say, bill))
    rung("host key pinned", lambda: _pin(folder, ip, id, say, bill))
    rung("ssh lets us in", lambda: _login(folder, bill).close())
    with _login(folder, bill) as link:
        rung("cloud-init done", lambda: _cloud_init(link, say, bill))
        rung("docker answers", lambda: _docker(link, found, bill))
        rung("rsync there", lambda: _rsync(link, found, bill))
        if gpus:
            rung("a container has the GPU", lambda: _gpu(link, found, say, bill))
        else:
            say("this type has no GPU: none is looked for")
    if found.docker != "docker":
        rung("docker without sudo", lambda: _group(folder, found, say, bill))
    return found


def _port(ip: str, port: int, say: Say, bill: str) -> None:
    deadline, told = time.time() + PORT_TIMEOUT_S, False
    while True:
        try:
            socket.create_connection((ip, port), timeout=5).close()
            return
        except OSError as error:
            if time.time() > deadline:
                raise CloudError(
                    f"{ip}: port {port} is not open after {PORT_TIMEOUT_S:.0f} s ({error.strerror or error}): it still "
                    f"boots, or a firewall is in the way (Lambda's console has one for each region). {bill}."
                ) from error
            if not told:
                say(f"waiting for port {port} of {ip}")
                told = True
            time.sleep(LOOK_S)


def _pin(folder: Path, ip: str, instance_id: str, say: Say, bill: str) -> None:
    """The key of the first contact is the instance's from then on; ssh itself compares it at each login."""
    place = alias.known_hosts(folder)
    lines = place.read_text().splitlines() if place.exists() else []
    if any(line.startswith(f"{instance_id} ") for line in lines):
        return
    deadline = time.time() + KEY_TIMEOUT_S
    while True:
        scan = subprocess.run(
            ["ssh-keyscan", "-T", "10", "-t", "ed25519,ecdsa,rsa", ip], capture_output=True, text=True, timeout=60
        )
        keys = [line.split(" ", 1)[1] for line in scan.stdout.splitlines() if line and not line.startswith("#")]
        if keys:
            break
        if time.time() > deadline:
            raise CloudError(f"{ip}: no sshd shows its host key within {KEY_TIMEOUT_S:.0f} s. {bill}.")
        time.sleep(LOOK_S)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(place, "".join(f"{line}\n" for line in [*lines, *(f"{instance_id} {key}" for key in keys)]).encode())
    say(f"the host key of {instance_id} is pinned, as seen at its first contact")


def _login(folder: Path, bill: str) -> ssh.Link:
    deadline = time.time() + LOGIN_TIMEOUT_S
    while True:
        try:
            link = ssh.Link(alias.ALIAS, ssh.BEATS, alias.config_file(folder))
            link.tell()
            return link
        except ssh.SshError as error:
            if time.time() > deadline or "is not the one in your known_hosts" in str(error):  # waiting changes nothing
                raise CloudError(f"{error} {bill}.") from error
            time.sleep(LOOK_S)


def _group(folder: Path, found: Ready, say: Say, bill: str) -> None:
    """Its user may call sudo, so this opens nothing; a new connection has the new group."""
    with _login(folder, bill) as link:
        done = link.run(GROUP)
    with _login(folder, bill) as link:
        answer = link.run(DOCKER, timeout_s=REPAIR_TIMEOUT_S).stdout
    if "answers docker\n" in answer:
        found.docker = "docker"
        found.repaired.append("its user was added to the group docker")
    else:
        why = (done.stdout.strip() or answer.strip())[:200]
        say(f"its user needs sudo for docker, and cannot be added to the group: {why}")


def _cloud_init(link: ssh.Link, say: Say, bill: str) -> None:
    done = link.run(CLOUD_INIT, f"{CLOUD_INIT_TIMEOUT_S:.0f}", timeout_s=CLOUD_INIT_TIMEOUT_S + 30)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip(". ")]
    if lines == ["absent"]:
        say("this machine has no cloud-init: nothing to wait for")
        return
    code = lines[-1].removeprefix("code ") if lines else "unknown"
    if code == "124":
        raise CloudError(f"cloud-init is not done after {CLOUD_INIT_TIMEOUT_S:.0f} s. {bill}.")
    if code == "2":
        say("cloud-init is done, with errors that it calls recoverable: cloud-init status --long shows them")
    elif code != "0":
        why = next((line.lstrip("- ") for line in lines if line.startswith("- ")), lines[0] if lines else "no reason")
        raise CloudError(f"cloud-init failed: {why[:200]}. Look at /var/log/cloud-init-output.log there. {bill}.")


def _docker(link: ssh.Link, found: Ready, bill: str) -> None:
    lines = link.run(DOCKER, timeout_s=REPAIR_TIMEOUT_S).stdout.splitlines()
    if "absent" in lines:
        raise CloudError(
            f"There is no Docker on the machine. Take an image with it (--family=lambda-stack-24-04), or install it "
            f"there: sudo apt-get install docker.io. {bill}."
        )
    answer = next((line for line in lines if line.startswith("answers ")), None)
    if answer is None:
        raise CloudError(f"Docker does not answer there: {lines[-1] if lines else 'no reason given'}. {bill}.")
    if "repaired" in lines:
        found.repaired.append("the Docker engine was started")
    found.docker = answer.removeprefix("answers ")


def _rsync(link: ssh.Link, found: Ready, bill: str) -> None:
    done = link.run(RSYNC, timeout_s=REPAIR_TIMEOUT_S)
    last = (done.stdout.strip().splitlines() or ["no reason given"])[-1]
    if done.returncode:
        raise CloudError(f"There is no rsync on the machine, and it cannot be installed: {last[:200]}. {bill}.")
    if last == "repaired":
        found.repaired.append("rsync was installed")


def _gpu(link: ssh.Link, found: Ready, say: Say, bill: str) -> None:
    done = link.run(GPU, found.docker, timeout_s=REPAIR_TIMEOUT_S)
    words = done.stdout.strip() or done.stderr.strip()
    if done.returncode and ("could not select device driver" in words or "unknown runtime" in words.lower()):
        fix = link.run(CTK, timeout_s=REPAIR_TIMEOUT_S)
        if fix.returncode == 0:
            found.repaired.append("NVIDIA's container toolkit was configured and Docker restarted")
            done = link.run(GPU, found.docker, timeout_s=REPAIR_TIMEOUT_S)
            words = done.stdout.strip() or done.stderr.strip()
        elif "absent" in fix.stdout:
            raise CloudError(
                "Docker there has no NVIDIA container toolkit: --gpus all is refused. Install it there: sudo apt-get "
                f"install nvidia-container-toolkit, then `invoke wait`. {bill}."
            )
    last = "; ".join(line.strip() for line in words.splitlines() if line.strip())[-250:] or "no reason given"
    if done.returncode and any(word in words for word in ("loading shared libraries", "not found", "no such file")):
        # The hook has run: the probe lacks something that NVIDIA's programs want, and the pipeline's image has.
        say(f"Docker takes --gpus all; the probe itself does not run ({last}), the pipeline will tell")
        found.gpu = "GPU"
        return
    if done.returncode:
        raise CloudError(f"No container on the machine sees its GPU: {last.rstrip('. ')}. {bill}.")
    found.gpu = words.splitlines()[-1].removeprefix("gpu ").strip()
