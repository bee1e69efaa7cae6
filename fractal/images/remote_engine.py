"""A Docker engine behind SSH, and a registry on its loopback for as long as a push lasts.

The registry's blobs stay in the remote volume `fractal-registry`, so that the next push sends only what is missing. Its
container ends with the SSH connection, however that ends. The programs that run on the remote host are in scripts/.
"""

import contextlib
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import requests

from fractal.errors import OutsideError
from fractal.images import registry_program, ssh

PUBLIC_IMAGE = "registry:2"
VOLUME = "fractal-registry"
PULL_REGISTRY_TIMEOUT_S = 20  # a public registry sends its 10 MB in about five
START_TIMEOUT_S = 15.0  # of the registry; it takes under a second
SEND_TIMEOUT_S = 600.0  # 8 MB
PULL_TIMEOUT_S = 3600.0  # from the remote loopback: tens of GB
PORTS = range(20_000, 30_000)  # below Linux's ephemeral ports
DISK_FULL = "no space left on device"


class RemoteEngineError(OutsideError):
    """The remote Docker engine cannot do what a push needs: one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The remote Docker engine."""

    command: str  # as the remote user may call it: "docker" or "sudo -n docker"
    platform: str  # "linux/amd64"


@dataclass(frozen=True, slots=True)
class Registry:
    """A registry on the remote loopback, and the tunnel to it."""

    container: str
    remote_port: int
    local_port: int


def script(name: str) -> str:
    """The text of a shell program in scripts/."""
    return (Path(__file__).parent / "scripts" / name).read_text()


def connect(host: str, config: Path | None) -> ssh.SshConnection:
    """A connection that `start_registry` can use once."""
    return ssh.SshConnection(host, script("registry_session.sh"), VOLUME, str(ssh.HEARTBEAT_TIMEOUT_S), config=config)


def find_engine(connection: ssh.SshConnection) -> Engine:
    """Docker on the host, called directly or by sudo. Raises RemoteEngineError with the remedy if neither works."""
    return parse_engine(connection.host, connection.run(script("find_docker.sh")).stdout)


def parse_engine(host: str, output: str) -> Engine:
    """The engine in the output of find_docker.sh. Raises RemoteEngineError."""
    lines = output.splitlines()
    for line in lines:
        kind, *rest = line.split(" ", 2)
        if kind == "ok" and len(rest) == 2 and "/" in rest[0]:
            return Engine(rest[1], rest[0])
    if "absent" in lines:
        message = f"{host} has no Docker. There, on Debian or Ubuntu, run: sudo apt-get install docker.io"
    elif "Cannot connect to the Docker daemon" in output:
        message = f"Docker is installed on {host}, but no engine runs. There, run: sudo systemctl start docker"
    elif "permission denied" in output:
        message = (
            f"Docker on {host} wants root, and sudo there a password. There, run: sudo usermod -aG docker $USER; "
            "then push again."
        )
    else:
        message = (
            f"Docker on {host} does not answer: {last_line(output) or 'no output'}. Try: ssh {host} docker version"
        )
    raise RemoteEngineError(message)


def last_line(text: str) -> str:
    """The last line that is not empty, cut to its last 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-200:].rstrip(". ") if lines else ""


def ensure_registry_image(connection: ssh.SshConnection, engine: Engine, say: Callable[[str], None]) -> str:
    """The name of a registry's image on the host; pulled or sent if need be. Raises RemoteEngineError, SshError."""
    architecture = engine.platform.split("/")[1]
    own = registry_program.image_name(architecture)
    if present := connection.run(script("first_image.sh"), engine.command, PUBLIC_IMAGE, own).stdout.strip():
        return present
    say(f"{connection.host} pulls a registry's image, {PUBLIC_IMAGE}")
    done = connection.run('timeout "$3" $1 pull -q "$2"', engine.command, PUBLIC_IMAGE, str(PULL_REGISTRY_TIMEOUT_S))
    if done.returncode == 0:
        return PUBLIC_IMAGE
    failure = last_line(done.stderr) or f"no end after {PULL_REGISTRY_TIMEOUT_S} s"
    try:
        archive = registry_program.archive(architecture)
    except registry_program.RegistryProgramError as error:
        raise RemoteEngineError(
            f"No registry for {connection.host}: it cannot pull {PUBLIC_IMAGE} ({failure}), and {error}. "
            f"Where it can be pulled, run: docker pull {PUBLIC_IMAGE} && "
            f"docker save {PUBLIC_IMAGE} | ssh {connection.host} {engine.command} load"
        ) from error
    say(f"sending a registry's image to {connection.host}, once, {archive.stat().st_size / 1e6:.1f} MB")
    with archive.open("rb") as file:
        done = connection.run(
            '$1 import --change "$3" --change "$4" - "$2"',
            engine.command,
            own,
            *registry_program.CHANGES,
            stdin=file,
            timeout_s=SEND_TIMEOUT_S,
        )
    if done.returncode:
        raise command_failed(connection, "does not take the registry's image", done.stderr)
    return own


def command_failed(connection: ssh.SshConnection, what: str, output: str) -> RemoteEngineError:
    """The error for a remote command that failed; a full disk is named."""
    if DISK_FULL in output:
        return RemoteEngineError(
            f"The disk of {connection.host} is full. Make room there (docker image prune, docker volume rm {VOLUME}), "
            "then push again."
        )
    return RemoteEngineError(
        f"{connection.host} {what}: {last_line(output) or 'no reason given'}. Mend that, then push again."
    )


def start_registry(connection: ssh.SshConnection, engine: Engine, image: str) -> Registry:
    """Start a registry that runs as long as the connection. Raises RemoteEngineError, SshError."""
    name = f"fractal-registry-{secrets.token_hex(4)}"
    connection.send_lines(engine.command, image, name)
    kind, _, value = connection.read_reply("registry", ssh.RUN_TIMEOUT_S).partition(" ")
    if kind != "port":
        raise command_failed(connection, "does not start a registry", value)
    remote_port = int(value)
    candidates = local_ports(connection.host)
    local_port = next((port for port in candidates if connection.forward_port(port, remote_port)), None)
    if local_port is None:
        raise RemoteEngineError(
            f"No port from {PORTS[0]} to {PORTS[-1]} can be tunnelled to {connection.host}. End other pushes to it."
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while not answers(local_port):
        connection.check_alive()
        if time.monotonic() > deadline:
            check_disk(connection, engine, name)
            raise RemoteEngineError(
                f"The registry on {connection.host} does not answer through the tunnel. Look at AllowTcpForwarding in "
                "the sshd_config there."
            )
        time.sleep(0.05)
    return Registry(name, remote_port, local_port)


def local_ports(host: str) -> Iterator[int]:
    """Ports at which the tunnel to this host may begin: the same ones each time."""
    # An engine remembers by host:port what it has sent, and would send layers under 10 MB again (engine 20.10).
    first = zlib.crc32(host.encode())
    return (PORTS[(first + 977 * step) % len(PORTS)] for step in range(20))


def answers(port: int) -> bool:
    """Whether a registry answers at this port of the loopback."""
    with requests.Session() as session, contextlib.suppress(requests.RequestException):
        session.trust_env = False
        return session.get(f"http://127.0.0.1:{port}/v2/", timeout=5).ok
    return False


def check_disk(connection: ssh.SshConnection, engine: Engine, container: str) -> None:
    """Raise RemoteEngineError if the registry's log tells of a full disk: its HTTP reply is only a 500."""
    output = connection.run('$1 logs --tail 50 "$2" 2>&1', engine.command, container).stdout
    if DISK_FULL in output:
        raise command_failed(connection, "", output)


def pull_by_digest(connection: ssh.SshConnection, engine: Engine, reference: str, name: str) -> None:
    """Let the remote engine pull REPOSITORY@DIGEST and tag it. The engine checks the digest of all that comes.

    Raises RemoteEngineError, SshError.
    """
    done = connection.run(script("pull_by_digest.sh"), engine.command, reference, name, timeout_s=PULL_TIMEOUT_S)
    if done.returncode:
        raise command_failed(connection, f"cannot take {name} from its registry", done.stderr)
