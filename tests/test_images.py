"""Images really built: reproducible, without secrets, and one line with a remedy for whatever goes wrong."""

import hashlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from fractal.errors import InputError
from fractal.images import build, buildkit, image_config, recipes
from fractal.images.build import Options, choose_base
from fractal.images.build_errors import BuildError
from fractal.images.buildkit import BuildRequest
from fractal.images.docker_client import has_image
from fractal.images.image import Image
from fractal.images.recipes import Recipe
from fractal.images.rendering import COMMITTED
from tests.conftest import ROOT, until
from tests.engines import Engine

pytestmark = pytest.mark.docker
Made = Callable[..., Recipe]


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def base(client: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small base with Python: Debian's, pulled, or ours."""
    log = tmp_path_factory.mktemp("base") / "log"
    (recipe,) = recipes.choose("sandbox")
    return choose_base(client, recipe, None, quiet, log).name


@pytest.fixture(scope="module")
def base_with_apt(client: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base of images that install packages, pulled or made before a test names mirrors that do not exist."""
    recipe = Recipe("test-base", Image.debian_slim(), "", True)
    return choose_base(client, recipe, None, quiet, tmp_path_factory.mktemp("base") / "log").name


@pytest.fixture
def made(client: docker.DockerClient) -> Iterator[Made]:
    """Recipe of an image under a name of the test's own, which is forgotten at the end; nothing else may be left."""
    made: dict[str, str] = {}  # name -> parts, as they are now: a test may edit its files

    def make(image: Image, with_apt: bool = False, key: str = "") -> Recipe:
        recipe = Recipe(key or f"test-{secrets.token_hex(4)}", image, "", with_apt)
        made[recipe.name] = json.dumps(image.parts())
        return recipe

    yield make
    for name in made:
        if has_image(client, name):
            client.images.remove(name, force=True)
    nameless = client.api.images(filters={"dangling": True})  # not client.images: another's may vanish meanwhile
    left = [one["Id"] for one in nameless if (one["Labels"] or {}).get(build.PARTS_LABEL) in made.values()]
    for one in left:
        client.images.remove(one)
    assert not left, "a build left images without a name"


def run(client: docker.DockerClient, name: str, command: str = "", **options: Any) -> str:
    """What a shell in the image says; without a command, what its own program says."""
    program = {"entrypoint": ["sh", "-c"], "command": [command]} if command else {}
    return client.containers.run(name, remove=True, network_mode="none", **program, **options).decode()


def contents(client: docker.DockerClient, name: str) -> dict[str, tuple[Any, ...]]:
    """Path in the image -> kind, mode, owner, content."""
    container = client.containers.create(name, "true")
    try:
        data = b"".join(container.export())
    finally:
        container.remove()
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for entry in tar:
            file = tar.extractfile(entry) if entry.isreg() else None
            digest = hashlib.sha256(file.read()).hexdigest() if file else entry.linkname
            found[entry.name] = (entry.type, entry.mode, entry.uid, entry.gid, digest)
    return found


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A project with a package."""
    (tmp_path / "clone/app").mkdir(parents=True)
    (tmp_path / "clone/app/__init__.py").write_text("")
    (tmp_path / "clone/app/__main__.py").write_text("print('one')\n")
    (tmp_path / "clone/tool.sh").write_text("#!/bin/sh\necho tool\n")
    (tmp_path / "clone/tool.sh").chmod(0o755)
    return tmp_path / "clone"


def service(root: Path, base: str) -> Image:
    return (
        Image.from_registry(base, root=root)
        .run_commands("mkdir -m 1777 /data", "mkdir -p /deep/er && echo hello > /deep/er/file")
        .env({"QUOTED": 'it\'s $HOME "and" \\', "LANG": "C.UTF-8"})
        .add_local_file("tool.sh", "/usr/local/bin/tool", copy=True)
        .run_commands("tool > /deep/said")
        .workdir("/work")
        .user("1000:1000")
        .entrypoint(["python3", "-m", "app"])
        .add_local_python_source("app")
        .add_local_file("tool.sh", "/data/")
        .add_local_file("tool.sh", "/tmp/")
    )


# --- the sandbox


def test_the_sandbox_image_is_the_same_from_an_empty_cache(client: docker.DockerClient, made: Made) -> None:
    recipe = made(recipes.sandbox())
    first = build.ensure(client, recipe, quiet, Options(no_cache=True))
    again = build.ensure(client, recipe, quiet, Options(no_cache=True))
    assert first.built
    assert again.built
    assert again.layers_built > 0
    assert first.digest == again.digest == client.images.get(recipe.name).id
    third = build.ensure(client, recipe, quiet)
    assert (third.built, third.layers_built, third.digest) == (False, 0, first.digest)
    assert third.seconds < 1
    assert recipe.name.partition(":")[2] == recipes.recipes()["sandbox"].name.partition(":")[2]
    assert first.bytes < 150e6  # 78 MB on a base made here

    config = client.images.get(recipe.name).attrs["Config"]
    assert config["Entrypoint"] == ["python3", "-s", "-P", "-B", "/sandbox/fractal/sandbox/inside/supervisor.py"]
    look = "python3 -m pip 2>&1; find /sandbox ! -user 0 -o -path '*/sandbox/*' -perm /022; ls -A /run | grep -v -x lock; ls /sandbox/fractal/sandbox/inside/__pycache__"
    output = run(client, recipe.name, look, read_only=True)
    assert "No module named pip" in output
    assert "supervisor.cpython-" in output
    assert "/run" not in output
    assert len(output.splitlines()) == 1 + len(list((ROOT / "fractal/sandbox/inside").glob("*.py")))


# --- the same on any machine


def test_a_layer_of_local_files_depends_on_their_contents_alone(
    client: docker.DockerClient, made: Made, clone: Path, base: str, tmp_path: Path
) -> None:
    def layers(root: Path) -> list[str]:
        built = build.ensure(client, made(service(root, base)), quiet, Options(base=base))
        return list(client.images.get(built.name).attrs["RootFS"]["Layers"])

    first = layers(clone)
    other = tmp_path / "another/place"
    shutil.copytree(clone, other)
    for path in other.rglob("*"):  # as cloned under another umask, on another day
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path, (1e9, 1e9))
    request = BuildRequest(service(other, base), COMMITTED, base, {}, no_cache=True)
    command = buildkit.find_command()
    id_, steps = buildkit.build(command, request, "test", tmp_path / "log")
    try:
        assert steps > 5
        assert client.images.get(id_).attrs["RootFS"]["Layers"] == first  # all of them, built anew
    finally:
        client.images.remove(id_)
    (other / "app/__main__.py").write_text("print('two')\n")
    edited = layers(other)
    assert edited[:-1] == first[:-1]
    assert edited[-1] != first[-1]


def test_folders_of_the_base_keep_their_modes_and_nobody_writes_to_the_code(
    client: docker.DockerClient, made: Made, clone: Path, base: str
) -> None:
    built = build.ensure(client, made(service(clone, base)), quiet, Options(base=base))
    assert run(client, built.name) == "one\n"
    output = run(
        client,
        built.name,
        "stat -c '%n %a %u' /tmp /root /data /data/tool.sh /app/app/__main__.py; id -u; touch /app/x /app/app/__main__.py /usr/local/bin/tool 2>&1 || :",
    )
    *modes, uid, one, two, three = output.splitlines()
    assert modes == ["/tmp 1777 0", "/root 700 0", "/data 1777 0", "/data/tool.sh 755 0", "/app/app/__main__.py 644 0"]
    assert uid == "1000"
    assert all("Permission denied" in line for line in (one, two, three))


def test_a_dockerfile_and_a_root_file_system_of_the_users_own(
    client: docker.DockerClient, made: Made, clone: Path, base: str
) -> None:
    (clone / "Dockerfile").write_text(
        f"ARG V=1\nFROM {base} AS first\nRUN echo 1 > /one\nFROM {base}\nCOPY --from=first /one /\nCOPY . /src\nUSER 7\n"
    )
    (clone / ".dockerignore").write_text("Dockerfile\n")
    (clone / ".env").write_text("KEY=1\n")
    own = (
        Image.from_dockerfile("Dockerfile", root=clone)
        .run_commands("id -u > /tmp/user")
        .add_local_file("tool.sh", "/app/")
    )
    built = build.ensure(client, made(own, True), quiet)
    assert built.base == "of its own"
    assert run(
        client, built.name, "cat /one /tmp/user; cd /src; find . -type f | sort; stat -c %u /app/tool.sh"
    ).split() == ["1", "7", "./.dockerignore", "./app/__init__.py", "./app/__main__.py", "./tool.sh", "0"]

    with tarfile.open(clone / "root.tar.gz", "w:gz") as tar:
        tar.add(clone / "tool.sh", "./bin/tool")
    rootfs = build.ensure(client, made(Image.from_rootfs("root.tar.gz", root=clone).env({"A": "1"}), True), quiet)
    assert list(contents(client, rootfs.name)).count("bin/tool") == 1


def test_force_build_builds_what_follows_and_only_that(client: docker.DockerClient, made: Made, base: str) -> None:
    image = Image.from_registry(base).run_commands("echo before").force_build().run_commands("date +%N > /when")
    recipe = made(image)
    first = build.ensure(client, recipe, quiet, Options(base=base))
    second = build.ensure(client, recipe, quiet, Options(base=base))
    assert second.built
    assert second.layers_built == 1
    assert first.digest != second.digest
    assert not has_image(client, first.digest)  # its name has gone to the second


# --- the configuration that an image is given


def test_a_pinned_image_is_an_image_like_any_other(
    client: docker.DockerClient, made: Made, base: str, tmp_path: Path
) -> None:
    image = (
        Image.from_registry(base).workdir("/tmp").workdir("/new/place").run_commands("true", ":", "echo x > /x")
        .env({"A": "1"}).entrypoint(["cat", "/x"])
    )  # fmt: skip
    command = buildkit.find_command()
    ids = []
    for labels in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"}):
        name = made(image, key=f"test-{secrets.token_hex(4)}").name
        id_, _ = buildkit.build(command, BuildRequest(image, COMMITTED, base, labels), name, tmp_path / "log")
        image_config.pin(client, id_, name)
        ids.append(client.images.get(name).id)
        assert not has_image(client, id_)
    assert ids[0] == ids[1]
    attrs = client.images.get(name).attrs
    assert attrs["Created"] == image_config.EPOCH
    assert attrs["Config"]["Labels"] == {"a": "1", "b": "2"}
    lines = [line["CreatedBy"] for line in reversed(client.api.history(name))]
    instructions = "RUN WORKDIR RUN WORKDIR RUN RUN RUN ENV ENTRYPOINT".split()
    assert [
        line.split()[0] for line in lines[-len(instructions) :]
    ] == instructions  # one for each instruction, none lost
    assert run(client, name) == "x\n"

    saved = b"".join(client.images.get(name).save(named=True))
    for tag in {tag for id_ in ids for tag in client.images.get(id_).tags}:
        client.images.remove(tag)
    (loaded,) = client.images.load(saved)
    assert loaded.id == ids[0]
    other = f"fractal-test-{secrets.token_hex(4)}"
    loaded.tag(other, "copy")
    assert run(client, f"{other}:copy") == "x\n"
    client.images.remove(f"{other}:copy")


def test_a_name_that_moves_on_leaves_no_nameless_image(
    client: docker.DockerClient, made: Made, base: str, tmp_path: Path
) -> None:
    command = buildkit.find_command()
    name = made(Image.from_registry(base)).name
    ids = []
    for word in ("one", "two"):
        request = BuildRequest(
            Image.from_registry(base).run_commands(f"echo {word}").env({"W": word}), COMMITTED, base, {}
        )
        id_, _ = buildkit.build(command, request, name, tmp_path / "log")
        image_config.pin(client, id_, name)
        ids.append(client.images.get(name).id)
        if word == "one":
            client.images.get(name).tag(name.partition(":")[0], "kept")
    assert has_image(client, f"{name.partition(':')[0]}:kept")  # somebody gave it another name
    client.images.remove(f"{name.partition(':')[0]}:kept")
    image_config.pin(client, client.images.get(name).id, name)  # of itself
    assert client.images.get(name).id == ids[1]


# --- secrets


def test_no_secret_is_in_the_image_its_history_or_the_log(
    client: docker.DockerClient, made: Made, base_with_apt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = "kaleidoscope" + secrets.token_hex(6)
    certificate = f"# {word}-ca\n-----BEGIN CERTIFICATE-----\n{word}\n-----END CERTIFICATE-----\n"
    (tmp_path / "ca.crt").write_text(certificate)
    (tmp_path / "pip.conf").write_text(
        f"[global]\nindex-url = https://me:{word}-token@{word}.example/simple\nno-index = true\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("FRACTAL_CA", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("FRACTAL_DEBIAN_MIRROR", f"http://{word}.example/debian")
    monkeypatch.setenv("https_proxy", f"http://me:{word}-proxy@{word}.example")
    seen = f'case "$PIP_INDEX_URL $UV_DEFAULT_INDEX" in *{word[:12]}*-token*-token*) ;; *) exit 7; esac; grep -q {word[:12]} /run/secrets/ca /run/secrets/sources; test -s $APT_CONFIG'
    recipe = made(Image.debian_slim().run_commands(seen, "echo done > /done; ls -A /run > /listed"), with_apt=True)
    messages: list[str] = []
    built = build.ensure(client, recipe, messages.append)
    assert (
        run(client, built.name, "ls -A /run | grep -v -x lock; ls -d /run/* | grep secrets || cat /listed")
        == "secrets\n"
    )

    saved = io.BytesIO(b"".join(client.images.get(built.name).save(named=True)))
    texts = [
        json.dumps(client.api.history(built.name)),
        json.dumps(client.images.get(built.name).attrs),
        *messages,
        built.as_json(),
    ]
    log = build.platformdirs.user_cache_path("fractal") / "images" / f"{recipe.name.replace(':', '-')}.log"
    texts.append(log.read_text())
    with tarfile.open(fileobj=saved) as tar:
        for entry in tar:
            if (file := tar.extractfile(entry)) is not None:
                texts.append(file.read().decode("latin-1"))
    assert len(texts) > 6
    assert not [text[:200] for text in texts if word in text]
    assert not [text[:200] for text in texts if "run/secrets/" in text and "RUN" not in text]  # no mount point either


def test_a_secret_is_in_no_error_either(
    client: docker.DockerClient, made: Made, base_with_apt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = "kaleidoscope" + secrets.token_hex(6)
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = https://me:{word}@pypi.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    recipe = made(Image.debian_slim().run_commands('echo "error: $PIP_INDEX_URL"; exit 3'), with_apt=True)
    with pytest.raises(BuildError, match=r"error: https://\*\*\*@pypi\.example/simple\. The whole story") as caught:
        build.ensure(client, recipe, quiet)
    log = Path(str(caught.value).rpartition(" ")[2])
    assert word not in str(caught.value) + log.read_text()


# --- two at once, and killed

SCRIPT = """
import sys
from contextlib import closing
from fractal import console
from fractal.images import build, recipes
from fractal.images.docker_client import connect
from fractal.images.image import Image
key, base, command = sys.argv[1:]
recipe = recipes.Recipe(key, Image.from_registry(base).run_commands(command), "", False)
def work():
    with closing(connect()) as client:
        print(build.ensure(client, recipe, console.note, build.Options(base=base)).as_json(), flush=True)
sys.exit(console.report_errors(work))
"""


def start(key: str, base: str, command: str, folder: Path) -> subprocess.Popen[str]:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    argv = [sys.executable, "-c", SCRIPT, key, base, command]
    return subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_two_builds_at_once_one_builds_and_the_other_takes_it(made: Made, base: str, tmp_path: Path) -> None:
    command = f"sleep 2; echo {secrets.token_hex(4)}"
    recipe = made(Image.from_registry(base).run_commands(command))
    both = [start(recipe.key, base, command, tmp_path) for _ in range(2)]
    ends = [child.communicate(timeout=120) for child in both]
    assert [child.returncode for child in both] == [0, 0], ends
    found = [json.loads(out) for out, _ in ends]
    assert sorted(one["built"] for one in found) == [False, True]
    assert found[0]["digest"] == found[1]["digest"]
    assert sum(f"another process builds fractal-{recipe.key}, waiting for it" in err for _, err in ends) == 1


@pytest.mark.parametrize(
    "sign", [signal.SIGKILL, *(pytest.param(sign, marks=pytest.mark.long) for sign in (signal.SIGTERM, signal.SIGINT))]
)
def test_a_build_that_is_killed_leaves_no_name(
    sign: signal.Signals, client: docker.DockerClient, made: Made, base: str, tmp_path: Path
) -> None:
    command = f"echo here; sleep 9.{secrets.randbelow(10**6)}"
    recipe = made(Image.from_registry(base).run_commands(command))
    child = start(recipe.key, base, command, tmp_path)
    log = build.platformdirs.user_cache_path("fractal") / "images" / f"{recipe.name.replace(':', '-')}.log"
    until(lambda: log.exists() and " here\n" in log.read_text())
    child.send_signal(sign)
    _, err = child.communicate(timeout=30)
    assert child.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[sign], err
    assert "Traceback" not in err
    if sign != signal.SIGKILL:
        assert not list(tmp_path.glob("fractal-build-*"))  # the secrets
    until(lambda: not builders(command.rpartition(" ")[2]))
    assert not has_image(client, recipe.name)


def builders(word: str) -> list[str]:
    """Docker commands at work for a step that only this test has."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_text(errors="replace")
        except OSError:
            continue
        if "build\0--progress=plain" in line and word in line:
            found.append(line)
    return found


# --- what cannot be built

# A step that fails, whether it needs apt in the base, and the message.
FAILURES: dict[str, tuple[Callable[[Image], Image], bool, str]] = {
    "a command": (
        lambda i: i.run_commands("echo something is wrong; exit 3"),
        False,
        r"RUN echo something.*: something is wrong\. The whole story: /",
    ),
    "a silent command": (lambda i: i.run_commands("exit 3"), False, r"RUN exit 3: exit code: 3\."),
    "a Debian package": (
        lambda i: i.apt_install("no-such-package-here"),
        True,
        r"Debian has no such package .*no-such-package-here\)\. Check its name",
    ),
    "its version": (
        lambda i: i.apt_install("less=9.9-9"),
        True,
        r"Debian has no such package .*Version '9\.9-9' for 'less' was not found",
    ),
    "a Python package": (
        lambda i: i.apt_install("python3").pip_install("fractal-no-such-package==1.0"),
        True,
        r"No index has the Python package fractal-no-such-package==1\.0",
    ),
    "a hash": (
        lambda i: i.apt_install("python3").uv_sync("wrong.lock"),
        True,
        r"colorama==0\.4\.6: .* not the one that was locked\. .*invoke lock",
    ),
    "a file below a link of the base": (
        lambda i: i.add_local_file("wrong.lock", "/bin/tool"),
        False,
        "/bin is a link to usr/bin: add files there",
    ),
    "a file that is kept out": (
        lambda i: Image.from_dockerfile("Dockerfile", root=i.root),
        False,
        r"the build context has no \.env\. .*secrets",
    ),
}


def test_what_cannot_be_built_is_one_line_and_no_image(
    client: docker.DockerClient, made: Made, base: str, tmp_path: Path
) -> None:
    (tmp_path / "wrong.lock").write_text(f"colorama==0.4.6 --hash=sha256:{'0' * 64}\n")
    (tmp_path / "Dockerfile").write_text(f"FROM {base}\nCOPY .env /\n")
    (tmp_path / ".env").write_text("KEY=1")
    wrong = []
    for what, (write, with_apt, expected) in FAILURES.items():
        recipe = made(write(Image.debian_slim(root=tmp_path)), with_apt)
        with pytest.raises(BuildError) as caught:
            build.ensure(client, recipe, quiet)
        message = str(caught.value)
        one_line = "\n" not in message and len(message) < 700
        if not re.search(expected, message) or not one_line or has_image(client, recipe.name):
            wrong.append(f"{what}: {message}")
    assert wrong == []


def test_a_base_that_cannot_be_had(
    client: docker.DockerClient, made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = made(Image.debian_slim().run_commands("true"))
    with pytest.raises(
        BuildError,
        match=r"localhost:9/nothing:here cannot be pulled: .*refused\. Load it, or name another one with --base\.$",
    ):
        build.ensure(client, recipe, quiet, Options(base="localhost:9/nothing:here"))
    monkeypatch.setenv("FRACTAL_BASE_IMAGE", "localhost:9/nothing:here")
    with pytest.raises(BuildError, match="localhost:9/nothing:here cannot be pulled"):
        build.ensure(client, recipe, quiet)
    monkeypatch.delenv("FRACTAL_BASE_IMAGE")
    other = made(Image.from_registry("localhost:9/nothing:here"), True)
    with pytest.raises(BuildError, match="localhost:9/nothing:here cannot be pulled"):
        build.ensure(client, other, quiet)  # Debian stands in for our own bases alone
    assert not has_image(client, other.name)
    (tmp_path / "Dockerfile").write_text("FROM localhost:9/nothing:here\n")
    own = made(Image.from_dockerfile("Dockerfile", root=tmp_path), True)
    with pytest.raises(BuildError, match=r"its base is not to be had \(.*localhost:9.*FROM in a Dockerfile"):
        build.ensure(client, own, quiet)
    assert not has_image(client, own.name)


def test_options_reach_the_build(client: docker.DockerClient, made: Made, base: str, tmp_path: Path) -> None:
    """What else can be wrong with them: test_network.py."""
    recipe = made(Image.debian_slim().run_commands("echo wrong"), with_apt=True)
    with pytest.raises(InputError, match="no file of certificates"):
        build.ensure(client, recipe, quiet, Options(base=base, ca=tmp_path / "no.pem"))
    with pytest.raises(InputError, match="no such folder of wheels"):
        build.ensure(client, recipe, quiet, Options(base=base, wheels=tmp_path / "no"))


def test_no_engine_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    environ = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/docker.sock"}
    argv = [sys.executable, "-m", "fractal.images.build"]
    done = subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True)
    assert (done.returncode, done.stderr.count(b"\n"), done.stdout) == (3, 1, b"")
    assert b"unset DOCKER_HOST" in done.stderr


def test_an_engine_lost_on_the_way_is_our_error(
    client: docker.DockerClient, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = made(Image.debian_slim().run_commands("echo lost"))
    monkeypatch.setattr(client.api, "base_url", "http+docker://localhost/nowhere")
    with pytest.raises(BuildError, match=rf"The Docker engine failed while making {recipe.name}"):
        build.ensure(client, recipe, quiet)
    monkeypatch.undo()


@pytest.fixture
def small_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[docker.DockerClient]:
    """An engine whose disk holds 100 MB."""
    if os.geteuid() != 0:
        pytest.skip("an engine of the test's own needs root")
    folder = Path("/var/tmp") / f"fractal-full-{os.getpid()}"
    (folder / "data").mkdir(parents=True)
    disk = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder / "data")]
    if subprocess.run(disk, capture_output=True).returncode:
        shutil.rmtree(folder)
        pytest.skip("cannot mount a small disk")
    own = None
    try:
        own = Engine(folder)
        monkeypatch.setenv("DOCKER_HOST", own.host)
        with_it = docker.DockerClient(base_url=own.host, timeout=120)
        yield with_it
        with_it.close()
    finally:
        if own is not None:
            own.stop()
        subprocess.run(["umount", "-l", str(folder / "data")], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_full_disk_in_mid_build(small_engine: docker.DockerClient, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "root.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo("zeros")
        entry.size = int(1.2e8)
        with open("/dev/zero", "rb") as zeros:
            tar.addfile(entry, zeros)
    recipe = Recipe("test-full", Image.from_rootfs("root.tar.gz", root=tmp_path), "", True)
    with pytest.raises(BuildError, match=r"the engine's disk is full\. `docker system df`.*nothing was tagged"):
        build.ensure(small_engine, recipe, quiet)
    assert small_engine.images.list() == []


def test_a_plain_docker_build_of_the_committed_dockerfile_gives_the_same_layers(client: docker.DockerClient) -> None:
    """For who has docker and nothing of ours: the Dockerfile says all."""
    command = buildkit.find_command()
    ours = build.ensure_sandbox_image(client, quiet)
    base = ours.base.partition(" ")[0]
    tag = f"test-plain:{secrets.token_hex(4)}"
    argv = [command, "build", "-q", "-f", "docker/sandbox.Dockerfile", "--build-arg", f"BASE={base}", "-t", tag, "."]
    environ = os.environ | {"DOCKER_BUILDKIT": "1", "BUILDX_BUILDER": "default"}
    subprocess.run(argv, cwd=ROOT, env=environ, check=True, capture_output=True, timeout=300)
    try:
        plain, named = (client.images.get(name).attrs["RootFS"]["Layers"] for name in (tag, ours.name))
        assert plain == named
    finally:
        client.images.remove(tag)
