"""Images on their way: to a real registry, and over ssh to a real second engine; cut off, refused, resumed, and nothing left."""

import base64
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import docker.errors
import psutil
import pytest
import requests

from fractal.errors import InputError, OutsideError
from fractal.images import push, push_errors, registry_program, remote_engine, ssh
from tests.conftest import ROOT, until
from tests.engines import Engine
from tests.machine import Machine, Unavailable

KB, MB = 1000, 1_000_000
USER, PASSWORD = "joe", "right horse"
HTPASSWD = f"{USER}:$2b$04$1z8vIz2wKP8qBgQVLAcECu3uTzGpKaZuVOSbhpoLeSxJAf3H96dkS\n"  # bcrypt, 4 rounds


# What needs no Docker


# What an engine says of a push to reg.example:5000 (engine 20.10.24, registry 2.8.2), the kind of error, words of it.
PUSH_FAILURES = """
no basic auth credentials | PushError | Run: docker login reg.example:5000
unauthorized: authentication required | PushError | Run: docker login reg.example:5000
denied: requested access to the resource is denied | PushError | does not let this user push
dial tcp 127.0.0.1:1: connect: connection refused | PushConnectionError | does not answer
dial tcp: lookup x.invalid on 10.0.0.53:53: no such host | PushConnectionError | Check its name
Get "https://172.17.0.1:5554/v2/": http: server gave HTTP response to HTTPS client | PushError | insecure-registries
x509: certificate signed by unknown authority | PushError | /etc/docker/certs.d/reg.example:5000/ca.crt
received unexpected HTTP status: 500 Internal Server Error | PushConnectionError | broke off
Patch "http://127.0.0.1:5000/v2/pt/blobs/uploads/7f?_state=c2VjcmV0": EOF | PushConnectionError | broke off
http: server closed idle connection | PushConnectionError | broke off
net/http: request canceled (Client.Timeout exceeded while awaiting headers) | PushConnectionError | does not answer
write /var/lib/docker/tmp/x: no space left on device | PushError | Make room
something new | PushError | something new
"""
# What ssh prints (OpenSSH 9.2).
SSH_FAILURES = """
ubuntu@10.0.0.1: Permission denied (publickey). | SshError | does not let us in
Host key verification failed. | SshError | Connect once and confirm
@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @ | SshHostKeyError | ssh-keygen -R
ssh: Could not resolve hostname lambda: Name or service not known | SshConnectionError | add the alias
ssh: connect to host 10.0.0.1 port 22: Connection refused | SshConnectionError | still booting
ssh: connect to host 10.0.0.1 port 22: Connection timed out | SshConnectionError | firewall
Timeout, server 10.0.0.1 not responding. | SshConnectionError | ended
/x/config: line 1: Bad configuration option: nonsense | SshError | rejects its configuration
 | SshConnectionError | without a word
"""


def test_an_engines_or_sshs_output_becomes_one_line_with_the_remedy() -> None:
    wrong = []
    for table, error_of in (
        (PUSH_FAILURES, lambda output: push_errors.error_from_engine(output, "reg.example:5000/team/x")),
        (SSH_FAILURES, lambda output: ssh.error_from_output("lambda", output)),
    ):
        for line in table.strip("\n").splitlines():
            output, kind, expected = (part.strip() for part in line.split(" | "))
            error = error_of(output)
            if type(error).__name__ != kind or expected not in str(error) or "\n" in str(error):
                wrong.append(f"{output}: {error!r}")
    assert wrong == []


def test_no_signature_and_no_password_of_a_url_is_repeated() -> None:
    message = 'Put "https://joe:hunter2@r.example/v2/x/blobs/uploads/1?X-Amz-Signature=abc&_state=def": EOF'
    assert str(push_errors.error_from_engine(message, "r.example/x")).count("r.example") == 2
    for secret in ("hunter2", "abc", "def"):
        assert secret not in str(push_errors.error_from_engine(message, "r.example/x"))


def test_the_digest_is_found_in_the_events_of_any_engine() -> None:
    digest = f"sha256:{'0a' * 32}"
    assert push.reported_digest({"progressDetail": {}, "aux": {"Tag": "1", "Digest": digest}}) == digest  # 20.10.24
    assert push.reported_digest({"status": f"1: digest: {digest} size: 748"}) == digest  # 26.1.5, containerd's store
    assert push.reported_digest({"status": "Pushed", "progressDetail": {}, "id": "0a0a0a0a0a0a"}) is None


def test_a_registrys_prefix_comes_before_the_name() -> None:
    cases = {
        ("fractal-sandbox:1a", "reg.example:5000/team"): ("reg.example:5000/team/fractal-sandbox", "1a"),
        ("a:1", "localhost:5000"): ("localhost:5000/a", "1"),
        ("a:1", "team"): ("team/a", "1"),
        ("a:1", "[::1]:5000"): ("[::1]:5000/a", "1"),
        ("a:1", "10.0.0.1:5000/x/y"): ("10.0.0.1:5000/x/y/a", "1"),
    }
    assert {case: push.target(*case) for case in cases} == cases


def test_what_is_no_name_and_no_host_is_bad_input() -> None:
    for prefix in ("https://reg.example", "", "reg.example/Team", "reg.example/"):
        with pytest.raises(InputError):
            push.target("a:1", prefix)
    for host in ("", "-oProxyCommand=touch /tmp/x", "a b", "a\nb"):
        with pytest.raises(InputError):
            ssh.SshConnection(host, "exit")


def test_a_host_without_docker_gets_the_remedy() -> None:
    no_daemon = (
        "no docker: Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?\n"
    )
    no_right = "no docker: permission denied while trying to connect to the Docker daemon socket\nno sudo -n docker: sudo: a password is required\n"
    for output, expected in (
        ("absent\n", "has no Docker"),
        (no_daemon, "systemctl start docker"),
        (no_right, "usermod -aG docker"),
        ("", "no output"),
    ):
        with pytest.raises(remote_engine.RemoteEngineError, match=expected):
            remote_engine.parse_engine("lambda", output)


def test_the_remote_engine_is_found_behind_chatter_and_sudo() -> None:
    output = "Welcome!\nno docker: permission denied\nok linux/amd64 sudo -n docker\n"
    assert remote_engine.parse_engine("lambda", output) == remote_engine.Engine("sudo -n docker", "linux/amd64")


def test_a_tunnel_begins_at_the_same_port_each_time() -> None:
    assert list(remote_engine.local_ports("lambda")) == list(remote_engine.local_ports("lambda"))
    assert len(set(remote_engine.local_ports("lambda"))) == 20
    assert next(remote_engine.local_ports("lambda")) != next(remote_engine.local_ports("ubuntu@10.0.0.1"))


def test_progress_counts_layers_and_bytes() -> None:
    progress = push.PushProgress()
    texts = []
    for event in (
        {"status": "The push refers to repository [x]"},
        {"status": "Pushing", "id": "a", "progressDetail": {"current": 3 * MB, "total": 8 * MB}},
        {"status": "Layer already exists", "id": "b", "progressDetail": {}},
        {"status": "Pushed", "id": "a", "progressDetail": {}},
    ):
        progress.update(event)
        texts.append(f"{progress.began} {progress}")
    assert texts == [
        "False 0 of 0 layers are there, 0 of 0 MB sent",
        "True 0 of 1 layers are there, 3 of 8 MB sent",
        "True 1 of 2 layers are there, 3 of 8 MB sent",
        "True 2 of 2 layers are there, 3 of 8 MB sent",
    ]
    assert progress.sent == {"a"}


# What the tests with Docker share


def write_credentials(folder: Path, monkeypatch: pytest.MonkeyPatch, host: str, password: str = PASSWORD) -> None:
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[docker.DockerClient]:
    """A client with no credentials; afterwards no tag, no container, no ssh process and no folder is left."""
    (tmp_path / "docker").mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setattr(push, "PAUSES_S", (0.5, 1.0))
    monkeypatch.setattr(remote_engine, "PULL_REGISTRY_TIMEOUT_S", 1)
    monkeypatch.setenv(SESSION, str(tmp_path))  # tells this test's processes from those of others
    client = docker.from_env()
    before = folders()
    MADE.clear()
    yield client
    for image in MADE:
        with contextlib.suppress(docker.errors.ImageNotFound):  # another engine's
            found = names(client, image)
            client.images.remove(image, force=True)
            assert all(name.startswith("fractal-push-test:") for name in found), found
    until(lambda: not processes() and folders() <= before, 15, lambda: f"left: {processes()} {folders() - before}")
    client.close()


MADE: list[str] = []  # ids of the test's images


SESSION = "FRACTAL_TEST_PUSH"


def ssh_processes() -> dict[int, str]:
    """The machine's ssh clients of pushes: process id -> command line."""
    lines = {process.pid: " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])}
    return {pid: line for pid, line in lines.items() if "fractal-ssh-" in line}


def processes() -> set[str]:
    """The command lines of this test's ssh clients."""
    own = set()
    for pid, line in ssh_processes().items():
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).environ().get(SESSION) == os.environ[SESSION]:
                own.add(line)
    return own


def folders() -> set[str]:
    """Folders of connections that no ssh client uses."""
    used = " ".join(ssh_processes().values())
    return {str(path) for path in Path("/tmp").glob("fractal-ssh-*") if str(path) not in used}


def names(client: docker.DockerClient, image: str) -> list[str]:
    attrs = client.images.get(image).attrs
    return [*(attrs["RepoTags"] or ()), *(attrs["RepoDigests"] or ())]


def load(client: docker.DockerClient, *layers: bytes, architecture: str = "amd64") -> str:
    """An image of files with these contents, a layer for each; its name."""
    name = f"fractal-push-test:{os.urandom(4).hex()}"
    packed = [tar({f"file-{number}": data}) for number, data in enumerate(layers)]
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Labels": {"fractal.test": name}},  # an id of its own, whatever the layers
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in packed]},
    }
    files = {f"{number}.tar": layer for number, layer in enumerate(packed)}
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": list(files)}]
    files |= {"config.json": json.dumps(config).encode(), "manifest.json": json.dumps(manifest).encode()}
    (image,) = client.images.load(tar(files))
    MADE.append(image.id)
    return name


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as packed:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            packed.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def quiet(text: str) -> None:
    """A `say` for where nobody listens."""


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return registry_program.unpack_program(tmp_path_factory.mktemp("registry"))
    except registry_program.RegistryProgramError as error:
        pytest.skip(str(error))


class Registry:
    """Debian's docker-registry as a process, with a folder of its own."""

    def __init__(self, program: Path, folder: Path, address: str = "127.0.0.1", locked: bool = False) -> None:
        self.program, self.folder, self.address = program, folder, address
        with socket.socket() as probe:
            probe.bind((address, 0))
            self.port = probe.getsockname()[1]
        self.host = f"{address}:{self.port}"
        settings: dict[str, object] = {
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
            "http": {"addr": self.host},
        }
        if locked:
            (folder / "htpasswd").write_text(HTPASSWD)
            settings["auth"] = {"htpasswd": {"realm": "r", "path": str(folder / "htpasswd")}}
        (folder / "registry.json").write_text(json.dumps(settings))

    def __enter__(self) -> "Registry":
        with (self.folder / "log").open("ab") as log:
            argv = [self.program, "serve", self.folder / "registry.json"]
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(self.listens, 10, lambda: (self.folder / "log").read_text())
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.address, self.port)) == 0

    def blobs(self) -> int:
        """How many are there. By os.walk, which takes it that uploads' folders go meanwhile."""
        folders = os.walk(self.folder / "data")
        return sum("/blobs/sha256/" in folder and "data" in files for folder, _, files in folders)

    def digest(self, path: str, tag: str) -> str:
        reply = requests.get(
            f"http://{self.host}/v2/{path}/manifests/{tag}",
            headers={"Accept": "application/vnd.docker.distribution.manifest.v2+json"},
            timeout=10,
        )
        return reply.headers["Docker-Content-Digest"]


@pytest.fixture
def server(program: Path, tmp_path: Path) -> Iterator[Registry]:
    with Registry(program, tmp_path) as one:
        yield one


class Proxy:
    """A TCP proxy that can be slow, cut all connections, turn new ones away, or fall silent."""

    def __init__(self, address: tuple[str, int], rate: float = 0) -> None:
        self.address, self.rate = address, rate  # bytes a second from client to server, 0: as fast as can be
        self.sent = 0  # bytes from client to server
        self.cut_after = 0  # bytes; once
        self.refuse = self.silent = False
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.lock = threading.Lock()
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.silent = False
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.cut()

    def still(self) -> bool:
        before = self.sent
        time.sleep(0.3)
        return self.sent == before

    def cut(self) -> None:
        for pair in self.pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self.pairs.clear()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                if self.refuse:
                    near.close()
                    continue
                try:
                    pair = near, socket.create_connection(self.address, 5)
                except OSError:
                    near.close()
                    continue
                self.pairs.append(pair)
                threading.Thread(target=self.pump, args=pair, kwargs={"up": True}, daemon=True).start()
                threading.Thread(target=self.pump, args=pair[::-1], kwargs={"up": False}, daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                while self.silent:
                    time.sleep(0.05)
                if up:
                    with self.lock:
                        self.sent += len(data)
                        if self.rate:
                            time.sleep(len(data) / self.rate)
                    if self.cut_after and self.sent > self.cut_after:
                        self.cut_after = 0
                        self.cut()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


PROGRAM = """
import sys
from contextlib import closing
from pathlib import Path
from fractal import console
from fractal.images import push
from fractal.images.docker_client import connect
name, to, *config = sys.argv[1:]
def work():
    with closing(connect()) as client:
        if config:
            push.to_host(client, name, to, say=console.note, ssh_config=Path(config[0]))
        else:
            push.to_registry(client, name, to, say=console.note)
sys.exit(console.report_errors(work, "push"))
"""


def command(*arguments: str) -> "subprocess.Popen[str]":
    """A push as a process: `name registry`, or `name host ssh_config`."""
    argv = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# To a registry


@pytest.mark.docker
def test_a_registry_gets_the_image_and_then_only_what_it_lacks(client: docker.DockerClient, server: Registry) -> None:
    layers = [os.urandom(30 * KB), os.urandom(300 * KB), os.urandom(MB)]
    first = load(client, *layers)
    tag = first.split(":")[1]
    pushed = push.to_registry(client, first, f"{server.host}/team", say=quiet)
    assert pushed.name == f"{server.host}/team/{first}"
    assert pushed.digest == server.digest("team/fractal-push-test", tag)
    assert pushed.image_id == client.images.get(first).id
    assert (pushed.layers, pushed.layers_sent) == (3, 3)
    assert 1_330_000 < pushed.bytes_sent < 1_360_000  # with the blocks of tar

    again = push.to_registry(client, first, f"{server.host}/team", say=quiet)
    assert (again.digest, again.layers, again.layers_sent, again.bytes_sent) == (pushed.digest, 3, 0, 0)

    second = load(client, layers[0], os.urandom(200 * KB), layers[2])
    changed = push.to_registry(client, second, f"{server.host}/team", say=quiet)
    assert (changed.layers, changed.layers_sent) == (3, 1)
    assert 200_000 < changed.bytes_sent < 210_000


@pytest.mark.docker
def test_credentials_are_dockers_own(
    program: Path, client: docker.DockerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = load(client, os.urandom(KB))

    def push_anew(host: str) -> push.Pushed:
        with contextlib.closing(docker.from_env()) as fresh:  # reads the configuration
            return push.to_registry(fresh, name, host, say=quiet)

    with Registry(program, tmp_path, locked=True) as server:
        with pytest.raises(push.PushError, match=f"docker login {server.host}"):
            push_anew(server.host)

        write_credentials(tmp_path, monkeypatch, server.host, "wrong horse")
        with pytest.raises(push.PushError, match=f"docker login {server.host}") as caught:
            push_anew(server.host)
        assert "wrong horse" not in str(caught.value)

        write_credentials(tmp_path, monkeypatch, server.host)
        pushed = push_anew(server.host)
        assert (pushed.layers, pushed.layers_sent, pushed.bytes_sent >= KB) == (1, 1, True)

        (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {server.host: "fractal-test"}}))
        with pytest.raises(push.PushError, match="docker-credential-fractal-test, which"):
            push_anew(server.host)

        helper = tmp_path / "docker-credential-fractal-test"
        helper.write_text(f"#!/bin/sh\necho '{json.dumps({'Username': USER, 'Secret': PASSWORD})}'\n")
        helper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert push_anew(server.host).digest == pushed.digest


@pytest.mark.docker
def test_a_registry_that_is_not_there_is_named(program: Path, client: docker.DockerClient, tmp_path: Path) -> None:
    name = load(client, os.urandom(KB))
    begun = time.monotonic()
    with pytest.raises(push.PushError, match=r"127.0.0.1:1 does not answer"):
        push.to_registry(client, name, "127.0.0.1:1", say=quiet)
    with pytest.raises(push.PushError, match=r"no-such.invalid:5000 does not answer"):
        push.to_registry(client, name, "no-such.invalid:5000/team", say=quiet)
    assert time.monotonic() - begun < 30


@pytest.mark.docker
def test_a_registry_without_tls_is_told_from_one_that_is_down(
    program: Path, client: docker.DockerClient, tmp_path: Path
) -> None:
    address = next((a.address for a in psutil.net_if_addrs().get("docker0", []) if a.family == socket.AF_INET), None)
    if address is None:
        pytest.skip("no docker0 to listen on")
    with Registry(program, tmp_path, address) as server, pytest.raises(push.PushError, match="insecure-registries"):
        push.to_registry(client, load(client, os.urandom(KB)), server.host, say=quiet)


@pytest.mark.docker
@pytest.mark.long
def test_a_registry_that_dies_in_the_middle_and_comes_back_gets_all(
    client: docker.DockerClient, server: Registry
) -> None:
    name = load(client, os.urandom(100 * KB), os.urandom(3 * MB))
    with Proxy(("127.0.0.1", server.port), rate=3 * MB) as proxy:

        def restart() -> None:
            until(lambda: proxy.sent > MB, 20)
            server.__exit__()
            time.sleep(1)
            server.__enter__()

        thread = threading.Thread(target=restart)
        thread.start()
        pushed = push.to_registry(client, name, f"127.0.0.1:{proxy.port}", say=quiet)
        thread.join()
    assert (pushed.layers, pushed.layers_sent) == (2, 2)
    assert server.digest(*name.split(":")) == pushed.digest


@pytest.mark.docker
@pytest.mark.long  # the engine itself tries for 50 s
def test_a_registry_that_stays_dead_is_given_up(client: docker.DockerClient, server: Registry) -> None:
    name = load(client, os.urandom(100 * KB), os.urandom(3 * MB))
    messages: list[str] = []
    with Proxy(("127.0.0.1", server.port), rate=3 * MB) as proxy:
        proxy.cut_after = 2 * MB
        threading.Thread(target=lambda: (until(lambda: proxy.sent > MB, 20), setattr(proxy, "refuse", True))).start()
        with pytest.raises(push.PushError, match="the same command goes on from there"):
            push.to_registry(client, name, f"127.0.0.1:{proxy.port}", say=messages.append)
        assert sum("Trying again" in line for line in messages) == 2
        proxy.refuse, proxy.rate = False, 0
        pushed = push.to_registry(client, name, f"127.0.0.1:{proxy.port}", say=quiet)
        assert pushed.layers_sent == 1


@pytest.mark.docker
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_an_interrupted_push_leaves_no_tag_and_goes_on_later(
    number: int, code: int, client: docker.DockerClient, server: Registry
) -> None:
    name = load(client, os.urandom(50 * KB), os.urandom(60 * KB), os.urandom(60 * MB))
    with Proxy(("127.0.0.1", server.port), rate=4 * MB) as proxy:
        process = command(name, f"127.0.0.1:{proxy.port}")
        until(lambda: server.blobs() == 2, 30, lambda: process.communicate(timeout=5))
        time.sleep(1)  # the engine learns of it
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
        assert process.returncode == code
        assert "Traceback" not in stderr
        assert names(client, name) == [name]
        until(proxy.still, 10)
        assert proxy.sent < 50 * MB  # the engine gave up, too; kernels hold megabytes
        there = server.blobs()
        proxy.rate = 0
        pushed = push.to_registry(client, name, f"127.0.0.1:{proxy.port}", say=quiet)
    assert there == 2
    assert (pushed.layers, pushed.layers_sent) == (3, 1)


# Over ssh


@pytest.fixture(scope="module")
def machine(openssh: None) -> Iterator[Machine]:
    try:
        with Machine() as one:
            yield one
    except Unavailable as error:
        pytest.skip(str(error))


BLOBS = 'find /var/lib/docker/volumes/fractal-registry -path "*/blobs/*" -name data 2> /dev/null | wc -l'


@pytest.fixture
def remote(machine: Machine, client: docker.DockerClient) -> Iterator[Machine]:
    """The machine; afterwards it runs no container, and has no names but those of images that were pushed."""
    yield machine
    until(lambda: machine.sh("docker ps -aq") == "", 15, lambda: machine.sh("docker ps -a"))
    until(lambda: machine.sh("pgrep -f '[f]ractal-begins' || :") == "", 15)
    until(
        lambda: "127.0.0.1" not in machine.sh("docker images --digests"),
        15,
        lambda: machine.sh("docker images --digests"),
    )


def push_to(
    client: docker.DockerClient,
    name: str,
    machine: Machine,
    say: Callable[[str], None] = quiet,
    config: Path | None = None,
) -> push.Pushed:
    return push.to_host(client, name, machine.alias, say=say, ssh_config=config or machine.ssh_config)


@pytest.mark.docker
def test_a_host_gets_the_image_and_then_only_what_it_lacks(client: docker.DockerClient, remote: Machine) -> None:
    layers = [os.urandom(30 * KB), os.urandom(300 * KB), os.urandom(MB)]
    first = load(client, *layers)
    messages: list[str] = []
    pushed = push_to(client, first, remote, messages.append)
    assert (pushed.name, pushed.layers, pushed.layers_sent) == (first, 3, 3)
    assert (
        remote.sh(f"docker image inspect -f '{{{{.Id}}}}' {first}").strip()
        == pushed.image_id
        == client.images.get(first).id
    )
    assert 1_330_000 < pushed.bytes_sent < 1_360_000  # with the blocks of tar

    with Proxy((remote.ip, 22)) as proxy:
        again = push_to(
            client, first, remote, messages.append, remote.config("proxy", HostName="127.0.0.1", Port=proxy.port)
        )
        assert (again.digest, again.layers_sent, again.bytes_sent) == (pushed.digest, 0, 0)
        assert proxy.sent < 100 * KB  # of ssh and HTTP themselves
    assert sum("sending a registry's image" in line for line in messages) == 1

    second = load(client, layers[0], os.urandom(200 * KB), layers[2])
    changed = push_to(client, second, remote)
    assert (changed.layers, changed.layers_sent) == (3, 1)
    assert remote.sh(f"docker image inspect -f '{{{{.Id}}}}' {second}").strip() == changed.image_id


@pytest.mark.docker
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_client_killed_in_the_middle_leaves_nothing_and_goes_on_later(
    number: int, client: docker.DockerClient, remote: Machine
) -> None:
    push_to(client, load(client, b""), remote)
    name = load(client, os.urandom(50 * KB), os.urandom(60 * KB), os.urandom(60 * MB))
    before, folders_before = int(remote.sh(BLOBS)), folders()
    with Proxy((remote.ip, 22), rate=4 * MB) as proxy:
        config = remote.config("proxy", HostName="127.0.0.1", Port=proxy.port)
        process = command(name, remote.alias, str(config))
        until(lambda: int(remote.sh(BLOBS)) == before + 2, 30, lambda: process.communicate(timeout=5))
        time.sleep(1)  # the engine learns of it
        assert remote.sh("docker ps -q")
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[number]
        assert "Traceback" not in stderr
        until(lambda: remote.sh("docker ps -aq") == "", 15)
        until(lambda: not any(str(config) in one for one in processes()), 15)
    assert remote.sh(f"docker images -q {name}") == ""
    assert int(remote.sh(BLOBS)) == before + 2
    pushed = push_to(client, name, remote)
    assert (pushed.layers, pushed.layers_sent) == (3, 1)
    for folder in folders() - folders_before:  # SIGKILL leaves a folder with ssh's words; nothing else
        assert number == signal.SIGKILL
        assert [path.name for path in Path(folder).iterdir()] == ["log"]
        shutil.rmtree(folder)


@pytest.mark.docker
def test_a_lost_connection_is_made_again(client: docker.DockerClient, remote: Machine) -> None:
    name = load(client, os.urandom(50 * KB), os.urandom(3 * MB))
    messages: list[str] = []
    with Proxy((remote.ip, 22), rate=4 * MB) as proxy:
        proxy.cut_after = 2 * MB
        pushed = push_to(
            client, name, remote, messages.append, remote.config("proxy", HostName="127.0.0.1", Port=proxy.port)
        )
    assert (pushed.layers, pushed.layers_sent) == (2, 2)
    assert sum("Trying again" in line for line in messages) == 1


@pytest.mark.docker
@pytest.mark.long
def test_the_remote_registry_ends_without_heartbeats(
    client: docker.DockerClient, remote: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to(client, load(client, b""), remote)
    monkeypatch.setattr(ssh, "HEARTBEAT_TIMEOUT_S", 2)
    monkeypatch.setattr(ssh, "HEARTBEAT_S", 0.5)
    monkeypatch.setattr(ssh, "END_TIMEOUT_S", 1)
    with (
        Proxy((remote.ip, 22)) as proxy,
        remote_engine.connect(
            remote.alias, remote.config("proxy", HostName="127.0.0.1", Port=proxy.port)
        ) as connection,
    ):
        engine = remote_engine.find_engine(connection)
        assert engine.command == "sudo -n docker"
        served_registry = remote_engine.start_registry(
            connection, engine, remote_engine.ensure_registry_image(connection, engine, quiet)
        )
        time.sleep(3)  # heartbeats keep it
        assert served_registry.container in remote.sh("docker ps")
        proxy.silent = True
        until(lambda: remote.sh("docker ps -aq") == "", 10)


@pytest.mark.docker
def test_a_registry_left_by_a_killed_session_is_replaced_and_a_living_one_is_not(
    client: docker.DockerClient, remote: Machine
) -> None:
    push_to(client, load(client, b""), remote)
    image = remote.sh("docker images -q fractal-registry").strip()
    remote.sh(f"docker run -d --name dead --label fractal.keeper=4194305 {image}")
    remote.sh(f"docker run -d --name living --label fractal.keeper=1 {image}")
    try:
        push_to(client, load(client, b"x"), remote)
        assert remote.sh("docker ps -a --format '{{.Names}}'").split() == ["living"]
    finally:
        remote.sh("docker rm -f living")


@pytest.mark.docker
@pytest.mark.long
def test_two_pushes_to_one_host_do_not_disturb_each_other(client: docker.DockerClient, remote: Machine) -> None:
    two = [load(client, os.urandom(2 * MB)) for _ in range(2)]
    processes = [command(name, remote.alias, str(remote.ssh_config)) for name in two]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for name in two:
        assert remote.sh(f"docker images -q {name}")


@pytest.mark.docker
def test_a_persons_ssh_config_does_not_disturb(client: docker.DockerClient, remote: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = {
            "LocalForward": f"{taken.getsockname()[1]} localhost:80",
            "RemoteCommand": "tmux",
            "RequestTTY": "yes",
            "ControlMaster": "auto",
            "ControlPersist": "60",
            "ControlPath": remote.folder / "own",
        }
        remote.sh("cp /home/ubuntu/.bashrc /root; sed -i '1i echo Welcome' /home/ubuntu/.bashrc")
        try:
            push_to(client, load(client, os.urandom(KB)), remote, config=remote.config("busy", **settings))
        finally:
            remote.sh("cp /root/.bashrc /home/ubuntu/")


@pytest.mark.docker
def test_a_registrys_image_that_is_there_is_taken(client: docker.DockerClient, remote: Machine) -> None:
    push_to(client, load(client, b""), remote)
    ours = registry_program.image_name("amd64")
    with remote_engine.connect(remote.alias, remote.ssh_config) as connection:
        engine = remote_engine.find_engine(connection)
        assert remote_engine.ensure_registry_image(connection, engine, quiet) == ours
        remote.sh(f"docker tag {ours} {remote_engine.PUBLIC_IMAGE}")
        assert remote_engine.ensure_registry_image(connection, engine, quiet) == remote_engine.PUBLIC_IMAGE
        remote.sh(f"docker rmi {remote_engine.PUBLIC_IMAGE}")


def no_program(architecture: str) -> Path:
    raise registry_program.RegistryProgramError(f"there is none for {architecture}")


@pytest.mark.docker
def test_a_host_that_cannot_pull_gets_the_registrys_image_from_here(
    client: docker.DockerClient, remote: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_engine, "PULL_REGISTRY_TIMEOUT_S", 2)
    remote.sh(
        f"docker rmi {registry_program.image_name('amd64')} 2> /dev/null; echo '127.0.0.1 nowhere' > /etc/resolv.conf"
    )
    messages: list[str] = []
    with remote_engine.connect(remote.alias, remote.ssh_config) as connection:
        engine = remote_engine.find_engine(connection)
        with monkeypatch.context() as patch:
            patch.setattr(registry_program, "archive", no_program)
            with pytest.raises(
                remote_engine.RemoteEngineError, match=r"docker save registry:2 \| ssh lambda sudo -n docker load"
            ):
                remote_engine.ensure_registry_image(connection, engine, messages.append)
        assert remote_engine.ensure_registry_image(connection, engine, messages.append) == registry_program.image_name(
            "amd64"
        )
    assert [line.split()[0] for line in messages] == ["lambda", "lambda", "sending"]


@pytest.mark.docker
@pytest.mark.long
def test_an_sshd_that_forbids_what_we_need_is_named(
    client: docker.DockerClient, remote: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_engine, "START_TIMEOUT_S", 2.0)
    name = load(client, b"")
    with remote.sshd("AllowTcpForwarding no"), pytest.raises(push.PushError, match="AllowTcpForwarding"):
        push_to(client, name, remote)
    with remote.sshd("MaxSessions 1"), pytest.raises(push.PushError, match="MaxSessions"):
        push_to(client, name, remote)


@pytest.mark.docker
def test_an_image_for_another_machine_is_not_sent(client: docker.DockerClient, remote: Machine) -> None:
    with pytest.raises(push.PushError, match=r"made for linux/riscv64, and lambda is linux/.*nothing was sent"):
        push_to(client, load(client, b"", architecture="riscv64"), remote)


@pytest.mark.docker
@pytest.mark.long
def test_a_full_disk_there_is_named(client: docker.DockerClient, remote: Machine) -> None:
    push_to(client, load(client, b""), remote)
    place = "/var/lib/docker/volumes/fractal-registry/_data"
    remote.sh(f"mount -t tmpfs -o size=2m tmpfs {place}")
    try:
        with pytest.raises(push.PushError, match=r"The disk of lambda is full. Make room"):
            push_to(client, load(client, os.urandom(3 * MB)), remote)
    finally:
        remote.sh(f"umount {place}")
    remote.sh("mount -t tmpfs -o size=1m tmpfs /var/lib/docker/tmp")  # where the engine keeps what it pulls
    try:
        with pytest.raises(push.PushError, match="The disk of lambda is full"):
            push_to(client, load(client, os.urandom(3 * MB)), remote)
    finally:
        remote.sh("umount /var/lib/docker/tmp")


@pytest.mark.docker
def test_an_engine_with_another_loopback_is_told_apart(client: docker.DockerClient, remote: Machine) -> None:
    if os.geteuid() != 0:
        pytest.skip("an engine of the test's own needs root")
    folder = Path("/var/tmp") / f"fractal-engine-{os.getpid()}"
    folder.mkdir()
    own = Engine(folder)
    try:
        with (
            contextlib.closing(docker.DockerClient(base_url=own.host)) as other,
            pytest.raises(push.PushError, match=r"has another loopback.*docker save"),
        ):
            push_to(other, load(other, os.urandom(KB)), remote)
    finally:
        own.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.docker
def test_who_is_not_let_in_learns_why(client: docker.DockerClient, remote: Machine) -> None:
    name = load(client, b"")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", remote.folder / "other"], check=True)
    with pytest.raises(push.PushError, match="does not let us in"):
        push_to(client, name, remote, config=remote.config("other-key", IdentityFile=remote.folder / "other"))
    with pytest.raises(push.PushError, match="is not known here"):
        push_to(client, name, remote, config=remote.config("unknown", UserKnownHostsFile="/dev/null"))
    with pytest.raises(push.PushError, match="nothing listens"):
        push_to(client, name, remote, config=remote.config("closed", Port=1))
    with pytest.raises(push.PushError, match="No machine is known"):
        push_to(client, name, remote, config=remote.config("nowhere", HostName="no-such.invalid"))
    remote.trust((remote.folder / "other.pub").read_text())
    try:
        with pytest.raises(push.PushError, match="is not the one in your known_hosts"):
            push_to(client, name, remote)
    finally:
        remote.trust((remote.folder / "host_key.pub").read_text())
        (remote.folder / "other").unlink()


@pytest.mark.docker
def test_a_host_that_may_not_use_docker_gets_the_remedy(client: docker.DockerClient, remote: Machine) -> None:
    name = load(client, b"")
    remote.sh("sed -i s/NOPASSWD:// /etc/sudoers.d/ubuntu")
    try:
        with pytest.raises(push.PushError, match="usermod -aG docker"):
            push_to(client, name, remote)
    finally:
        remote.sh("sed -i 's/) ALL/) NOPASSWD:ALL/' /etc/sudoers.d/ubuntu")
    with Machine(engine=False) as bare:
        with pytest.raises(push.PushError, match=r"no engine runs.*systemctl start docker"):
            push_to(client, name, bare)
        bare.sh("rm /usr/bin/docker")
        with pytest.raises(push.PushError, match=r"has no Docker.*apt-get install docker.io"):
            push_to(client, name, bare)


@pytest.mark.docker
@pytest.mark.long
def test_an_engine_that_dies_in_the_middle_is_one_line(
    client: docker.DockerClient, server: Registry, machine: Machine
) -> None:
    with Machine() as other, Proxy(("127.0.0.1", server.port), rate=2 * MB) as proxy:
        other.sh("chmod 666 /var/run/docker.sock")
        tunnels = ["-L", f"{other.folder}/engine:/var/run/docker.sock", "-R", f"5000:127.0.0.1:{proxy.port}"]
        argv = ["ssh", "-F", str(other.ssh_config), "-N", "-oExitOnForwardFailure=yes", *tunnels, other.alias]
        tunnel = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        try:
            until((other.folder / "engine").exists, 10)
            with contextlib.closing(docker.DockerClient(base_url=f"unix://{other.folder}/engine")) as remote_client:
                name = load(remote_client, os.urandom(10 * MB))
                threading.Thread(
                    target=lambda: (until(lambda: proxy.sent > MB, 20), other.sh("pkill -KILL dockerd"))
                ).start()
                with pytest.raises(push.PushError, match=r"^The Docker engine broke off"):
                    push.to_registry(remote_client, name, "127.0.0.1:5000", say=quiet)
        finally:
            tunnel.terminate()
            tunnel.wait()


def test_errors_of_a_push_are_of_the_outside() -> None:
    assert issubclass(push.PushError, OutsideError)
