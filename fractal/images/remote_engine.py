"""A Docker engine behind ssh, and a registry on its loopback for as long as a push lasts.

The registry's blobs stay in the far side's volume `fractal-registry`, so that the next push sends what is missing
(`docker volume rm fractal-registry` there gives the room back). Its container ends with the connection, whichever way
that ends.
"""

import contextlib
import secrets
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import requests

from fractal.errors import OutsideError
from fractal.images import registry, ssh

PUBLIC_PROGRAM = "registry:2"
VOLUME = "fractal-registry"
PULL_PROGRAM_TIMEOUT_S = 20  # a public registry gives its 10 MB in about five
START_TIMEOUT_S = 15.0  # of the registry; it takes under a second
SEND_TIMEOUT_S = 600.0  # 8 MB
PULL_TIMEOUT_S = 3600.0  # from the far loopback: tens of GB
PORTS = range(20_000, 30_000)  # below Linux's ephemeral ports
Program = Literal[
    "auto",  # what is there, else pulled, else debian
    "pull",  # registry:2
    "debian",  # ours, from Debian's package
]

PROBE = """\
command -v docker > /dev/null || { echo absent; exit; }
for docker in docker 'sudo -n docker'; do
  found=$($docker version --format '{{.Server.Os}}/{{.Server.Arch}}' 2>&1 < /dev/null) &&
    { echo "ok $found $docker"; exit; }
  printf 'no %s: %s\\n' "$docker" "$(printf %s "$found" | tr '\\n' ' ')"
done
"""
# sudo may read its standard input on behalf of the command, and would eat the heartbeats: < /dev/null. The parent that
# is killed last is this connection's sshd: engine 20.10 leaves the sockets of a push given up open, and ssh would wait.
KEEPER = f"""\
read -r docker && read -r image && read -r name || exit 0
d() {{ $docker "$@" < /dev/null; }}
for old in $(d ps -aq --filter label=fractal.keeper); do
  keeper=$(d inspect -f '{{{{index .Config.Labels "fractal.keeper"}}}}' "$old")
  [ -d "/proc/$keeper" ] || d rm -fv "$old" > /dev/null 2>&1
done
trap 'd rm -fv "$name" > /dev/null 2>&1; kill "$PPID"' EXIT
trap exit HUP INT TERM
said=$(d run -d --rm --name "$name" --label "fractal.keeper=$$" -p 127.0.0.1::5000 -v {VOLUME}:/var/lib/registry \\
  --cap-drop ALL --security-opt no-new-privileges --read-only "$image" 2>&1) && said=$(d port "$name" 5000/tcp 2>&1) ||
  {{ printf 'registry failed %s\\n' "$(printf %s "$said" | tr '\\n' ' ')"; exit 1; }}
echo "registry port ${{said##*:}}"
{ssh.BEATS}
"""
HAVE_PROGRAM = """\
docker=$1; shift
for image in "$@"; do $docker image inspect "$image" > /dev/null 2>&1 && { echo "$image"; exit; }; done
"""
PULL_PROGRAM = 'timeout "$3" $1 pull -q "$2"'
SEND_PROGRAM = '$1 import --change "$3" --change "$4" - "$2"'
# By digest: nothing is tagged before it is whole and proven, and the reference goes with the shell.
PULL = """\
docker=$1 reference=$2 name=$3 expected=$4
trap '$docker rmi "$reference" > /dev/null 2>&1' EXIT
trap exit HUP INT TERM
$docker pull -q "$reference" > /dev/null || exit 1
id=$($docker image inspect -f '{{.Id}}' "$reference") || exit 1
case " $expected " in *" $id "*) $docker tag "$reference" "$name" || exit 1;; esac
echo "$id"
"""


class FarError(OutsideError):
    """The far side's engine does not do what a push needs: one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Engine:
    """Docker on the far side, as its user may call it."""

    words: str  # "docker" or "sudo -n docker"
    platform: str  # "linux/amd64"


@dataclass(frozen=True, slots=True)
class Registry:
    """A registry on the far loopback, and the way to it."""

    container: str
    port: int  # there
    local_port: int  # here, through the tunnel


def connect(host: str, config: Path | None) -> ssh.Link:
    return ssh.Link(host, KEEPER, config)


def engine(link: ssh.Link) -> Engine:
    """Docker there, directly or by sudo. Raises FarError with what to do if neither works."""
    return read_probe(link.host, link.run(PROBE).stdout)


def read_probe(host: str, output: str) -> Engine:
    lines = output.splitlines()
    for line in lines:
        kind, *rest = line.split(" ", 2)
        if kind == "ok" and len(rest) == 2 and "/" in rest[0]:
            return Engine(rest[1], rest[0])
    if "absent" in lines:
        raise FarError(f"{host} has no Docker. There, on Debian or Ubuntu, run: sudo apt-get install docker.io")
    if "Cannot connect to the Docker daemon" in output or "Is the docker daemon running" in output:
        raise FarError(f"Docker is installed on {host}, but no engine runs. There, run: sudo systemctl start docker")
    if "permission denied" in output:
        raise FarError(
            f"Docker on {host} wants root, and sudo there a password. There, run: sudo usermod -aG docker $USER; "
            "then push again."
        )
    raise FarError(f"Docker on {host} does not answer: {clip(output) or 'no output'}. Try: ssh {host} docker version")


def clip(text: str, length: int = 200) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-length:].rstrip(". ") if lines else ""


def ensure_program(link: ssh.Link, engine: Engine, choice: Program, say: Callable[[str], None]) -> str:
    """The name, there, of an image with a registry's program; pulled or sent if need be. Raises FarError, SshError."""
    architecture = engine.platform.split("/")[1]
    ours = registry.program_name(architecture)
    wanted = {"auto": (PUBLIC_PROGRAM, ours), "pull": (PUBLIC_PROGRAM,), "debian": (ours,)}[choice]
    if have := link.run(HAVE_PROGRAM, engine.words, *wanted).stdout.strip():
        return have
    failure = "not tried"
    if choice != "debian":
        say(f"{link.host} fetches a registry's program, {PUBLIC_PROGRAM}")
        done = link.run(PULL_PROGRAM, engine.words, PUBLIC_PROGRAM, str(PULL_PROGRAM_TIMEOUT_S))
        if done.returncode == 0:
            return PUBLIC_PROGRAM
        failure = clip(done.stderr) or f"no end after {PULL_PROGRAM_TIMEOUT_S} s"
    try:
        if choice == "pull":
            raise registry.RegistryError("ours was not wanted")
        archive = registry.program_archive(architecture)
    except registry.RegistryError as error:
        raise FarError(
            f"No registry's program for {link.host}: it cannot pull {PUBLIC_PROGRAM} ({failure}), and {error}. "
            f"Where it can be pulled, run: docker pull {PUBLIC_PROGRAM} && "
            f"docker save {PUBLIC_PROGRAM} | ssh {link.host} {engine.words} load"
        ) from error
    say(f"sending a registry's program to {link.host}, once, {archive.stat().st_size / 1e6:.1f} MB")
    with archive.open("rb") as file:
        done = link.run(SEND_PROGRAM, engine.words, ours, *registry.CHANGES, stdin=file, timeout_s=SEND_TIMEOUT_S)
    if done.returncode:
        raise failed(link, "does not take the registry's program", done.stderr)
    return ours


def failed(link: ssh.Link, what: str, words: str) -> FarError:
    """A failure there; a full disk is named."""
    if "no space left on device" in words:
        return FarError(
            f"The disk of {link.host} is full. Make room there (docker image prune, docker volume rm {VOLUME}), "
            "then push again."
        )
    return FarError(f"{link.host} {what}: {clip(words) or 'no reason given'}. Mend that, then push again.")


def start_registry(link: ssh.Link, engine: Engine, program: str) -> Registry:
    """It runs as long as the link. Raises FarError, SshError."""
    name = f"fractal-registry-{secrets.token_hex(4)}"
    link.tell(engine.words, program, name)
    kind, _, said = link.hear("registry", ssh.RUN_TIMEOUT_S).partition(" ")
    if kind != "port":
        raise failed(link, "does not start a registry", said)
    local = next((port for port in local_ports(link.host) if free(port) and link.forward(port, int(said))), None)
    if local is None:
        raise FarError(
            f"No port from {PORTS[0]} to {PORTS[-1]} can be tunnelled to {link.host}. End other pushes to it."
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while not answers(local):
        link.check()
        if time.monotonic() > deadline:
            check_disk(link, engine, name)
            raise FarError(
                f"The registry on {link.host} does not answer through the tunnel. Look at AllowTcpForwarding in the "
                "sshd_config there."
            )
        time.sleep(0.05)
    return Registry(name, int(said), local)


def local_ports(host: str) -> Iterator[int]:
    """Where the tunnel to this host may begin: the same each time, since engines remember what they sent by host:port.

    With another port, layers under 10 MB would be sent again (engine 20.10).
    """
    first = zlib.crc32(host.encode())
    return (PORTS[(first + 977 * step) % len(PORTS)] for step in range(20))


def free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def answers(port: int) -> bool:
    """Whether a registry answers on our loopback."""
    with requests.Session() as session, contextlib.suppress(requests.RequestException):
        session.trust_env = False
        return session.get(f"http://127.0.0.1:{port}/v2/", timeout=5).ok
    return False


def logs(link: ssh.Link, engine: Engine, container: str) -> str:
    return link.run('$1 logs --tail 50 "$2" 2>&1', engine.words, container).stdout


def check_disk(link: ssh.Link, engine: Engine, container: str) -> None:
    """Raises FarError if the registry there complains of a full disk: to us it says no more than 500."""
    words = logs(link, engine, container)
    if "no space left on device" in words:
        raise failed(link, "", words)


def pull(link: ssh.Link, engine: Engine, port: int, repository: str, manifest: registry.Manifest, name: str) -> str:
    """Let the far engine take the image from its loopback and tag it; its image id. Raises FarError, SshError."""
    reference = f"127.0.0.1:{port}/{repository}@{manifest.digest}"
    expected = f"{manifest.config} {manifest.digest}"  # an engine on containerd's store names images by manifest
    done = link.run(PULL, engine.words, reference, name, expected, timeout_s=PULL_TIMEOUT_S)
    if done.returncode:
        raise failed(link, f"cannot take {name} from its registry", done.stderr)
    found = done.stdout.strip()
    if found not in expected.split():
        raise FarError(
            f"{name} on {link.host} would be {found}, and here it is {manifest.config}: not tagged there. Remove the "
            f"registry's volume there (docker volume rm {VOLUME}) and push again."
        )
    return found
