"""Image as a value: what it refuses, what it renders, what it is named by. Needs no Docker."""

import json
import os
import re
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fractal.images import builder, recipes
from fractal.images.image import Image, ImageError
from fractal.images.rendering import COMMITTED, Rendering, instructions
from fractal.sandbox.host import source
from tests.conftest import ROOT

GOLDEN = Path(__file__).parent / "golden"
CLOSED = Rendering(settings=True, wheels="fractal-wheels:0123456789ab")
CLASSIC = Rendering(mounts=False)
HASH = "0" * 64
LOCK = f"rich==15.0.0 \\\n    --hash=sha256:{HASH}\n    # via nothing\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project, with much that has no place in an image."""
    root = tmp_path_factory.mktemp("project")
    files = {
        "app/__init__.py": "", "app/main.py": "print('main')\n", "app/data/words.txt": "one\n", "tool.py": "print('tool')\n",
        "app/__pycache__/main.pyc": "x", "app/.env": "KEY=1", "app/deep/id_rsa": "x", "app/deep/model.safetensors": "x",
        "app/deep/.git/config": "x", "app/deep/key.pem": "x", "app/.mypy_cache/x": "x", "runs/one/samples.jsonl": "x",
        ".git/config": "x", ".env": "KEY=1", "config.json": "{}", "with space/file one.txt": "x", "requirements.lock": LOCK,
        "empty/.gitkeep.pyc": "", "my lock.txt": LOCK, "it's.txt": "x", "unpinned.lock": "rich>=1\n", "blank.lock": "# no\n",
        "unhashed.lock": "rich==15.0.0\n", "star.lock": f"rich==15.* --hash=sha256:{HASH}\n", "noext": "x",
        "options.lock": f"--index-url https://user:hunter2@pypi.example/simple\n{LOCK}", "key.pem": "x", "model.gguf": "x",
    }  # fmt: skip
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (root / "binary.lock").write_bytes(b"\xff\xfe")
    (root / "link.json").symlink_to("config.json")
    (root / "hidden.txt").symlink_to(".env")
    (root / "app/inner").symlink_to("main.py")
    (root / "loop").symlink_to("loop")
    return root


@pytest.fixture
def image(project: Path) -> Image:
    return Image.debian_slim(root=project)


# --- renderings


def chains(root: Path) -> dict[str, tuple[Image, Rendering]]:
    """Typical images, each with the rendering that its golden file holds."""
    start = Image.debian_slim(root=root)
    web = (
        start.title("A small service.\n\n  docker run service")
        .apt_install("python3", "gcc")
        .uv_sync("requirements.lock")
        .pip_install("colorama==0.4.6", extra_options="--no-deps")
        .env({"LANG": "C.UTF-8", "GREETING": 'it\'s $5 a "day"'})
        .user("1000:1000")
        .workdir("/work")
        .entrypoint(["python3", "-m", "app"])
        .add_local_python_source("app")
        .add_local_file("config.json", "/etc/app/")
    )
    copied = (
        Image.from_registry("ubuntu:24.04", root=root, digests={"ubuntu:24.04": f"sha256:{HASH}"})
        .add_local_dir("app", "/opt/app", copy=True, ignore=["data/"])
        .run_commands(["make -C /opt/app", "true || false"], comment="Two layers.")
        .force_build()
        .add_local_file("with space/file one.txt", "/opt/a b.txt")
    )
    rootfs = Image.from_rootfs("base.tar.xz", root=root).run_commands("true")
    own = Image.from_dockerfile("own/Dockerfile", root=root).run_commands("true")
    return {
        "service": (web, COMMITTED),
        "service-classic": (web, CLASSIC),
        "service-closed": (web, CLOSED),
        "copied": (copied, COMMITTED),
        "rootfs": (rootfs, COMMITTED),
        "own": (own, COMMITTED),
    }


@pytest.mark.parametrize("name", ["service", "service-classic", "service-closed", "copied", "rootfs", "own"])
def test_typical_images_render_as_their_golden_files(name: str, project: Path) -> None:
    """FRACTAL_GOLDEN=1 writes the files anew; read the difference before you commit it."""
    (project / "base.tar.xz").write_bytes(b"tar")
    (project / "own").mkdir(exist_ok=True)
    (project / "own/Dockerfile").write_text(
        "# syntax=docker/dockerfile:1\nARG V=1\nFROM debian:12 AS build\nRUN make \\\n  FROM=x\n\n\n\n"
        "FROM --platform=linux/amd64 \\\n  debian:12\nCOPY --from=build /x /x\n"
    )
    image, rendering = chains(project)[name]
    file = GOLDEN / f"{name}.Dockerfile"
    if os.environ.get("FRACTAL_GOLDEN"):
        file.write_text(image.dockerfile(rendering))
    assert image.dockerfile(rendering) == file.read_text()


@pytest.mark.parametrize("path", recipes.renderings())
def test_the_committed_dockerfiles_are_the_recipes_renderings(path: str) -> None:
    assert (ROOT / path).read_text() == recipes.renderings()[path], "run: invoke render"


def test_the_sandbox_finds_its_image_by_the_recipes_name() -> None:
    assert source.image_name() == recipes.recipes()["sandbox"].name


def test_what_runs_in_the_sandbox_is_what_its_image_holds() -> None:
    assert recipes.sandbox().context() == {name: ROOT / name for name in source.files()}


def test_a_builder_without_mounts_gets_no_secrets() -> None:
    with pytest.raises(ValueError, match="mount"):
        Rendering(mounts=False, settings=True)


# --- what is refused, when it is written

REFUSED: dict[str, tuple[Callable[[Image], object], str]] = {
    # where to begin
    "tag: none": (lambda i: Image.from_registry("debian"), "Write debian:TAG"),
    "tag: latest": (lambda i: Image.from_registry("debian:latest"), "Write debian:TAG"),
    "tag: a port is none": (lambda i: Image.from_registry("localhost:5000/x"), "Write localhost:5000/x:TAG"),
    "tag: empty": (lambda i: Image.from_registry(""), "Write repository:tag"),
    "tag: upper case": (lambda i: Image.from_registry("Debian:12"), "Write repository:tag"),
    "tag: a line more": (lambda i: Image.from_registry("debian:12\nRUN x"), "Write repository:tag"),
    "tag: a stage's name": (lambda i: Image.from_registry("debian:12 AS x"), "Write repository:tag"),
    "tag: None": (lambda i: Image.from_registry(None), "Write repository:tag"),  # type: ignore[arg-type]
    "tag: half a digest": (lambda i: Image.from_registry("debian:12@sha256:abc"), "Write repository:tag"),
    "tag: a wrong digest": (lambda i: Image.from_registry("a:1", digests={"a:1": "md5:1"}), "Write repository:tag"),
    "root: a file": (lambda i: Image.debian_slim(root=i.root / "tool.py"), "Write the one that holds your files"),
    "root: not there": (lambda i: Image.debian_slim(root="/no/such"), "Write the one that holds your files"),
    "root: None": (lambda i: Image.debian_slim(root=None), "Write the one that holds your files"),  # type: ignore[arg-type]
    "dockerfile: not there": (lambda i: Image.from_dockerfile("no", root=i.root), "Check the path"),
    "dockerfile: a folder": (lambda i: Image.from_dockerfile("app", root=i.root), "Name a text file"),
    "dockerfile: not text": (lambda i: Image.from_dockerfile("binary.lock", root=i.root), "Name a text file"),
    "dockerfile: no FROM": (lambda i: Image.from_dockerfile("tool.py", root=i.root), "Write FROM"),
    "rootfs: a folder": (lambda i: Image.from_rootfs("app", root=i.root), "Give a file that ends in .tar"),
    "rootfs: not a tar": (lambda i: Image.from_rootfs("tool.py", root=i.root), "Give a file that ends in .tar"),
    # Debian packages
    "apt: nothing": (lambda i: i.apt_install(), "Write at least one"),
    "apt: a list": (lambda i: i.apt_install(["gcc", "g++"]), "one by one"),  # type: ignore[arg-type]
    "apt: several in one": (lambda i: i.apt_install("gcc g++"), "one by one"),
    "apt: an option": (lambda i: i.apt_install("-y", "gcc"), "extra_options='-y'"),
    "apt: removes": (lambda i: i.apt_install("gcc-"), "write NAME or NAME=VERSION"),
    "apt: empty": (lambda i: i.apt_install(""), "write NAME or NAME=VERSION"),
    "apt: None": (lambda i: i.apt_install(None), "write NAME or NAME=VERSION"),  # type: ignore[arg-type]
    "apt: shell": (lambda i: i.apt_install("gcc;reboot"), "write NAME or NAME=VERSION"),
    "apt: a line more": (lambda i: i.apt_install("gcc\nRUN x"), "write NAME or NAME=VERSION"),
    "apt: an end of line": (lambda i: i.apt_install("gcc\n"), "write NAME or NAME=VERSION"),
    "apt: as pip's": (lambda i: i.apt_install("gcc==12"), "write NAME or NAME=VERSION"),
    "apt: options as a list": (lambda i: i.apt_install("gcc", extra_options=["-t"]), "one string"),  # type: ignore[arg-type]
    "apt: options of two lines": (lambda i: i.apt_install("gcc", extra_options="-t\nx"), "one string"),
    "apt: an open quote": (lambda i: i.apt_install("gcc", extra_options="-o 'x"), "Close what is open"),
    "apt: an open line": (lambda i: i.apt_install("gcc", extra_options="-o x\\"), "Close what is open"),
    # Python packages
    "pip: nothing": (lambda i: i.pip_install(), "Write at least one"),
    "pip: a list": (lambda i: i.pip_install(["rich==15.0.0"]), "one by one"),  # type: ignore[arg-type]
    "pip: several in one": (lambda i: i.pip_install("rich==15.0.0 numpy==2.3.0"), "Write NAME==VERSION"),
    "pip: no version": (lambda i: i.pip_install("rich"), "Write rich==VERSION"),
    "pip: at least": (lambda i: i.pip_install("rich>=15"), "Write rich==VERSION"),
    "pip: any of 15": (lambda i: i.pip_install("rich==15.*"), "Write rich==VERSION"),
    "pip: about": (lambda i: i.pip_install("rich~=15.0"), "Write rich==VERSION"),
    "pip: more than a pin": (lambda i: i.pip_install("rich==15.0,!=14"), "Write rich==VERSION"),
    "pip: as Debian's": (lambda i: i.pip_install("rich=15.0.0"), "Write NAME==VERSION"),
    "pip: a requirements file": (lambda i: i.pip_install("-r", "requirements.txt"), "extra_options='-r'"),
    "pip: an address without a hash": (lambda i: i.pip_install("x @ https://h.example/x.whl"), "Add #sha256="),
    "pip: a line more": (lambda i: i.pip_install("rich==15.0.0\nRUN x"), "write NAME==VERSION"),
    "pip: a number": (lambda i: i.pip_install(3), "write NAME==VERSION"),  # type: ignore[arg-type]
    "pip: backend": (lambda i: i.pip_install("torch==2.13.0", torch_backend="gpu; x"), "write cpu, auto"),
    "pip: no backend": (lambda i: i.pip_install("torch==2.13.0", torch_backend=None), "write cpu, auto"),  # type: ignore[arg-type]
    # a lock
    "lock: not there": (lambda i: i.uv_sync("no.lock"), "Check the path"),
    "lock: a folder": (lambda i: i.uv_sync("app"), "Name a text file"),
    "lock: not text": (lambda i: i.uv_sync("binary.lock"), "Name a text file"),
    "lock: empty": (lambda i: i.uv_sync("blank.lock"), "invoke lock"),
    "lock: no versions": (lambda i: i.uv_sync("unpinned.lock"), "invoke lock"),
    "lock: any version": (lambda i: i.uv_sync("star.lock"), "Write rich==VERSION"),
    "lock: no hashes": (lambda i: i.uv_sync("unhashed.lock"), "invoke lock"),
    "lock: options": (lambda i: i.uv_sync("options.lock"), "invoke lock"),
    "lock: a space": (lambda i: i.uv_sync("my lock.txt"), "Rename it"),
    "lock: None": (lambda i: i.uv_sync(None), "Write one, relative to"),  # type: ignore[arg-type]
    # commands
    "run: nothing": (lambda i: i.run_commands(), 'run_commands("make install")'),
    "run: an empty list": (lambda i: i.run_commands([]), 'run_commands("make install")'),
    "run: empty": (lambda i: i.run_commands(" "), "Write a line for the shell"),
    "run: a number": (lambda i: i.run_commands(3), "Write a line for the shell"),  # type: ignore[arg-type]
    "run: None in a list": (lambda i: i.run_commands(["x", None]), "Write a line for the shell"),  # type: ignore[list-item]
    "run: a comment": (lambda i: i.run_commands("# later"), "Write a line for the shell"),
    "run: two lines": (lambda i: i.run_commands("a\nb"), "Join lines with &&"),
    "run: a carriage return": (lambda i: i.run_commands("a\r"), "Join lines with &&"),
    "run: an open line": (lambda i: i.run_commands("a \\"), "Join lines with &&"),
    "run: an open line and a space": (lambda i: i.run_commands("a \\ "), "Join lines with &&"),
    "run: Docker's option": (lambda i: i.run_commands("--mount=type=secret,id=x cat"), "Write the command first"),
    "run: a list for Docker": (lambda i: i.run_commands('["echo", "x y"]'), "Write \"echo 'x y'\""),
    "run: a document": (lambda i: i.run_commands("cat > x <<EOF"), "add_local_file"),
    "run: a comment that is none": (lambda i: i.run_commands("a", comment=3), "Write a string"),  # type: ignore[arg-type]
    # settings
    "env: nothing": (lambda i: i.env({}), "Write a dictionary"),
    "env: a text": (lambda i: i.env("A=1"), "Write a dictionary"),  # type: ignore[arg-type]
    "env: a list": (lambda i: i.env(["A=1"]), "Write a dictionary"),  # type: ignore[arg-type]
    "env: None": (lambda i: i.env(None), "Write a dictionary"),  # type: ignore[arg-type]
    "env: a number": (lambda i: i.env({"A": 1}), "Write a string"),  # type: ignore[dict-item]
    "env: two lines": (lambda i: i.env({"A": "1\nRUN x"}), "Write a string"),
    "env: a name with a space": (lambda i: i.env({"A B": "1"}), "Write letters"),
    "env: a name with a line": (lambda i: i.env({"A\n": "1"}), "Write letters"),
    "env: a name that is none": (lambda i: i.env({1: "1"}), "Write letters"),  # type: ignore[dict-item]
    "env: a token": (lambda i: i.env({"HF_TOKEN": "hunter2"}), "docker run -e HF_TOKEN"),
    "env: a cloud's key": (lambda i: i.env({"AWS_SECRET_ACCESS_KEY": "hunter2"}), "docker run -e"),
    "workdir: relative": (lambda i: i.workdir("app"), "Write an absolute one"),
    "workdir: up": (lambda i: i.workdir("/app/../etc"), "Write an absolute one"),
    "workdir: a variable": (lambda i: i.workdir("/$HOME"), "Write an absolute one"),
    "workdir: a line more": (lambda i: i.workdir("/app\nRUN x"), "Write an absolute one"),
    "workdir: an open line": (lambda i: i.workdir("/app\\"), "Write an absolute one"),
    "workdir: None": (lambda i: i.workdir(None), "Write an absolute one"),  # type: ignore[arg-type]
    "user: a number": (lambda i: i.user(1000), 'Write "1000:1000"'),  # type: ignore[arg-type]
    "user: empty": (lambda i: i.user(""), 'Write "1000:1000"'),
    "user: a line more": (lambda i: i.user("me\nRUN x"), 'Write "1000:1000"'),
    "user: a variable": (lambda i: i.user("$ME"), 'Write "1000:1000"'),
    "entrypoint: a text": (lambda i: i.entrypoint("python3 -m x"), "as a list"),
    "entrypoint: an open quote": (lambda i: i.entrypoint("it's"), "as a list"),
    "entrypoint: numbers": (lambda i: i.entrypoint([1, 2]), "as a list"),  # type: ignore[list-item]
    "entrypoint: None": (lambda i: i.entrypoint(None), "as a list"),  # type: ignore[arg-type]
    "title: empty": (lambda i: i.title(" "), "write a text"),
    "title: an order to Docker": (lambda i: i.title("syntax=evil/frontend:1"), "an order to Docker"),
    "title: None": (lambda i: i.title(None), "write a text"),  # type: ignore[arg-type]
    "pipe: no function": (lambda i: i.pipe("apt"), "Write one that takes an Image"),  # type: ignore[arg-type]
    "pipe: gives nothing": (lambda i: i.pipe(lambda image: None), "Let it return"),
    # local files
    "file: not there": (lambda i: i.add_local_file("no.txt", "/x"), "Check the path"),
    "file: empty": (lambda i: i.add_local_file("", "/x"), "Write one, relative to"),
    "file: None": (lambda i: i.add_local_file(None, "/x"), "Write one, relative to"),  # type: ignore[arg-type]
    "file: nobody's": (lambda i: i.add_local_file("~no-such-user/x", "/x"), "Check the path"),
    "file: a loop": (lambda i: i.add_local_file("loop", "/x"), "Check the path"),
    "file: a null byte": (lambda i: i.add_local_file("a\0b", "/x"), "Check the path"),
    "file: a folder": (lambda i: i.add_local_file("app", "/x"), "A folder: add_local_dir"),
    "file: a quote": (lambda i: i.add_local_file("it's.txt", "/x"), "Rename it"),
    "file: to a relative path": (lambda i: i.add_local_file("tool.py", "tool.py"), "Write an absolute one"),
    "file: to /": (lambda i: i.add_local_dir("app", "//"), "Write an absolute one"),
    "file: up": (lambda i: i.add_local_file("tool.py", "/app/../etc/passwd"), "Write an absolute one"),
    "file: a line more": (lambda i: i.add_local_file("tool.py", "/x\nRUN y"), "Write an absolute one"),
    "file: nowhere": (lambda i: i.add_local_file("tool.py", None), "Write an absolute one"),  # type: ignore[arg-type]
    "file: .env": (lambda i: i.add_local_file(".env", "/x"), "Mount it"),
    "file: .env by another name": (lambda i: i.add_local_file("hidden.txt", "/x"), "Mount it"),
    "file: a key": (lambda i: i.add_local_file("key.pem", "/x"), "Mount it"),
    "file: a private key": (lambda i: i.add_local_file("app/deep/id_rsa", "/x"), "Mount it"),
    "file: weights": (lambda i: i.add_local_file("model.gguf", "/x"), "Mount it"),
    "dir: a file": (lambda i: i.add_local_dir("tool.py", "/x"), "A file: add_local_file"),
    "dir: nothing in it": (lambda i: i.add_local_dir("empty", "/x"), "Is everything ignored"),
    "dir: runs": (lambda i: i.add_local_dir("runs", "/x"), "Is everything ignored"),
    "dir: all ignored": (lambda i: i.add_local_dir("app", "/x", ignore=["*"]), "Is everything ignored"),
    "dir: ignores a number": (lambda i: i.add_local_dir("app", "/x", ignore=3), "write a list"),  # type: ignore[arg-type]
    "dir: ignores numbers": (lambda i: i.add_local_dir("app", "/x", ignore=[3]), "write a list"),  # type: ignore[list-item]
    "dir: ignores what no pattern is": (lambda i: i.add_local_dir("app", "/x", ignore=["!"]), "gitignore's patterns"),
    "source: nothing": (lambda i: i.add_local_python_source(), "Write at least one"),
    "source: not there": (lambda i: i.add_local_python_source("nothing"), "root="),
    "source: no module": (lambda i: i.add_local_python_source("noext"), "root="),
    "source: a file's name": (lambda i: i.add_local_python_source("tool.py"), "without dots and .py"),
    "source: a submodule": (lambda i: i.add_local_python_source("app.main"), "without dots and .py"),
    "source: a list": (lambda i: i.add_local_python_source(["app"]), "one by one"),  # type: ignore[arg-type]
}
METHODS = {
    "tag": "from_registry", "root": "debian_slim|from_registry", "dockerfile": "from_dockerfile", "rootfs": "from_rootfs",
    "apt": "apt_install", "pip": "pip_install", "lock": "uv_sync", "run": "run_commands",
    "file": "add_local_file|add_local_dir", "dir": "add_local_dir", "source": "add_local_python_source",
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_argument_is_refused_when_it_is_written(what: str, image: Image) -> None:
    write, remedy = REFUSED[what]
    with pytest.raises(ImageError) as caught:
        write(image)
    text = str(caught.value)
    method = what.partition(":")[0]
    assert re.match(rf"(Image\.)?({METHODS.get(method, method)})\b", text)  # names the call
    assert remedy in text
    assert "\n" not in text
    assert "hunter2" not in text


TOKEN = "hf_" + "x1" * 17
SECRETS = {
    "run": lambda i: i.run_commands(f"curl -H 'Authorization: Bearer {TOKEN}' https://h.example"),
    "address": lambda i: i.pip_install(f"x @ https://me:{TOKEN}@h.example/x.whl#sha256={HASH}"),
    "no hash": lambda i: i.pip_install(f"x @ https://me:{TOKEN}@h.example/x.whl"),
    "options": lambda i: i.pip_install("rich==15.0.0", extra_options=f"--index-url https://me:{TOKEN}@pypi.example"),
    "env": lambda i: i.env({"PAGE": f"https://me:{TOKEN}@h.example"}),
    "entrypoint": lambda i: i.entrypoint(["serve", TOKEN]),
}  # fmt: skip


@pytest.mark.parametrize("where", SECRETS)
def test_a_secret_is_refused_and_not_repeated(where: str, image: Image) -> None:
    with pytest.raises(ImageError) as caught:
        SECRETS[where](image)
    assert TOKEN not in str(caught.value)


def test_right_arguments_that_look_wrong(image: Image) -> None:
    image.apt_install("g++", "libstdc++6=12.2.0-14+deb12u1", "libc6:amd64", extra_options="-t bookworm-backports")
    image.pip_install("torch[opt]==2.13.0+cpu", "x===1.0", f"y @ https://h.example/y.whl#sha256={HASH}")
    image.pip_install("rich==15.0.0; python_version < '3.12'", torch_backend="cu130")
    image.env({"TOKENIZERS_PARALLELISM": "false", "HF_TOKEN": "", "A": "a\tb\\"})
    image.run_commands("echo $((1<<3)) [ x ]", "[ -e /x ] || true", "grep -x '#' <<< x")
    image.entrypoint([])
    image.entrypoint(["python3", "-c", "print(1)\nprint(2)"])
    Image.from_registry("nvcr.io/nvidia/cuda:13.0.1-base")
    Image.from_registry("localhost:5000/a/b:1")
    Image.from_registry(f"debian@sha256:{HASH}")


# --- build steps after local files


@pytest.mark.parametrize("add", [
    lambda i: i.add_local_python_source("app"), lambda i: i.add_local_file("tool.py", "/x").add_local_dir("app", "/y", ignore=["data/"]),
    lambda i: i.add_local_file("tool.py", "/a", copy=True).add_local_file("tool.py", "/b"),
])  # fmt: skip
@pytest.mark.parametrize("late", [
    lambda i: i.run_commands("make"), lambda i: i.pip_install("rich==15.0.0"), lambda i: i.env({"A": "it's"}),
    lambda i: i.add_local_file("config.json", "/c", copy=True), lambda i: i.force_build(), lambda i: i.workdir("/app"),
])  # fmt: skip
def test_a_step_after_local_files_shows_two_programs_that_build(add: Any, late: Any, project: Path) -> None:
    image = add(Image.debian_slim(root=project).title("A title.").apt_install("python3"))
    with pytest.raises(ImageError) as caught:
        late(image)
    programs = re.findall(r"^\(\n.*?^\)$", str(caught.value), re.DOTALL | re.MULTILINE)
    last, copied = [eval(program) for program in programs]
    assert [step.kind for step in last.last] == [step.kind for step in image.last]
    assert len(last.steps) == len(copied.steps) - len(image.last) == len(image.steps) + 1
    assert not copied.last
    for made in (last, copied):
        assert made.digest()
        assert "a title" in made.dockerfile().lower()


def test_more_local_files_may_follow_local_files(image: Image) -> None:
    image.add_local_python_source("app").add_local_file("tool.py", "/x").title("One.")


# --- the context


def test_what_has_no_place_in_an_image_never_enters(project: Path) -> None:
    names = set(Image.debian_slim(root=project).add_local_dir(".", "/all").context())
    assert names >= {"app/main.py", "app/data/words.txt", "with space/file one.txt", "it's.txt", "app/inner"}
    assert not [n for n in names if re.search(r"\.git/|\.env|runs/|id_rsa|\.pem|safetensors|gguf|pyc|_cache", n)]


def test_patterns_of_ignore(image: Image) -> None:
    def names(*ignore: str) -> list[str]:
        return [name.removeprefix("app/") for name in image.add_local_dir("app", "/x", ignore=ignore).context()]

    assert names() == ["__init__.py", "data/words.txt", "inner", "main.py"]
    assert names("data/") == names("*.txt") == ["__init__.py", "inner", "main.py"]
    assert names("*", "!*.txt") == ["data/words.txt"]  # the last that matches decides, also below an ignored folder
    assert image.add_local_dir("app", "/x", ignore="*.txt") == image.add_local_dir("app", "/x", ignore=["*.txt"])


def test_links_stay_links_and_a_link_that_is_added_is_its_file(image: Image, project: Path) -> None:
    assert image.add_local_dir("app", "/x").context()["app/inner"] == project / "app/inner"
    added = image.add_local_file("link.json", "/etc/")
    assert added.context() == {"config.json": project / "config.json"}
    assert "COPY config.json /local/etc/link.json" in added.dockerfile()


def test_a_socket_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "ok.txt").write_text("")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "one.sock"))
        with pytest.raises(ImageError, match=r"one.sock: is neither a file nor a folder. .*ignore=\['one.sock'\]"):
            Image.debian_slim(root=tmp_path).add_local_dir(".", "/x")


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("")
    with pytest.raises(ImageError, match="Rename it"):
        Image.debian_slim(root=tmp_path).add_local_dir(".", "/x")


def test_ten_gigabytes_by_mistake_are_refused_at_once_with_the_largest(tmp_path: Path) -> None:
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "small.txt").write_text("x")
    for name, size in {"data/raw/a.csv": 6e9, "data/raw/b.csv": 4e9, "big.iso": 2e9}.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(int(size))
    image = Image.debian_slim(root=tmp_path).add_local_dir(".", "/x")
    with pytest.raises(
        ImageError, match=r"12,000 MB, over 100 MB\. The largest: data/raw \(10,000 MB\), big\.iso \(2,000 MB\)"
    ):
        image.digest()
    (tmp_path / "Dockerfile").write_text("FROM debian:12\nCOPY . /x\n")
    with pytest.raises(ImageError, match="12,000 MB"):
        Image.from_dockerfile("Dockerfile", root=tmp_path).digest()
    (tmp_path / "root.tar").write_bytes(b"")
    os.truncate(tmp_path / "root.tar", int(2e8))
    assert Image.from_rootfs("root.tar", root=tmp_path).context()  # a base is large


def test_files_outside_the_root_do_not_mix(project: Path, tmp_path: Path) -> None:
    for name in ("one/conf/a.txt", "two/conf/b.txt", "two/tool.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    image = Image.debian_slim(root=project).add_local_dir(tmp_path / "one/conf", "/one")
    assert list(image.context()) == ["outside/conf/a.txt"]
    assert "COPY outside/conf/ /local/one" in image.dockerfile()
    assert image.add_local_file(tmp_path / "two/tool.py", "/two/").add_local_file("tool.py", "/three/").digest()
    with pytest.raises(ImageError, match=r"two/conf.* would be mixed with .*one/conf.* Rename one"):
        image.add_local_dir(tmp_path / "two/conf", "/two")
    with pytest.raises(ImageError, match="would be mixed"):
        image.add_local_file(tmp_path / "two/tool.py", "/x").add_local_file(
            shutil.copy(project / "tool.py", tmp_path), "/y"
        )


def test_what_one_call_ignores_no_other_brings_back(image: Image) -> None:
    one = image.add_local_dir("app", "/one", ignore=["data/"])
    for more in (lambda: one.add_local_dir("app", "/two"), lambda: one.add_local_file("app/data/words.txt", "/x")):
        with pytest.raises(ImageError, match=r"app/data/words.txt is added here and ignored there"):
            more()
    assert one.add_local_dir("app", "/two", ignore=["data/"]).add_local_file("app/main.py", "/x").digest()


# --- names


def test_the_digest_depends_on_contents_alone(project: Path, tmp_path: Path) -> None:
    def digest(root: Path) -> str:
        return Image.debian_slim(root=root).add_local_python_source("app").add_local_file("config.json", "/c").digest()

    clone = tmp_path / "elsewhere"
    shutil.copytree(project, clone, symlinks=True)
    for path in clone.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o600)
            os.utime(path, (1e9, 1e9))
    (clone / "app").chmod(0o700)
    assert digest(clone) == digest(project)
    (clone / "app/main.py").chmod(0o700)  # a program is another thing
    assert (programs := digest(clone)) != digest(project)
    (clone / "app/main.py").chmod(0o755)
    assert digest(clone) == programs
    (clone / "app/main.py").chmod(0o644)
    (clone / "app/inner").unlink()
    (clone / "app/inner").write_text("main.py")  # no link
    assert digest(clone) != digest(project)


def test_parts_name_the_first_thing_that_differs(project: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(project, clone, symlinks=True)

    def made(root: Path = clone, package: str = "gcc", word: str = "x", comment: str = "") -> Image:
        start = Image.debian_slim(root=root).apt_install(package, "python3").uv_sync("requirements.lock")
        return start.run_commands(f"echo {word}", comment=comment).add_local_python_source("app")

    def first(other: Image) -> str:
        old = made(project).parts()
        return next((name for name, digest in other.parts().items() if old.get(name) != digest), "nothing")

    assert first(made()) == "nothing"
    assert first(made(package="g++")) == "Debian packages: g++ python3"
    assert first(made(word="y")) == "command: 'echo y'"
    assert first(made(comment="why")) == "comments"
    assert first(Image.from_registry("debian:13", root=clone)) == "base debian:13"
    (clone / "app/main.py").write_text("other")
    assert first(made()) == "local files: app"
    (clone / "requirements.lock").write_text(LOCK.replace("15.0.0", "15.0.1"))
    assert first(made()) == "Python packages: requirements.lock"
    (clone / "docker").mkdir()
    (clone / "docker/uv.lock").write_text("other")
    assert first(made()) == "uv"


def test_every_change_of_the_digest_has_a_part(project: Path) -> None:
    start = Image.debian_slim(root=project)
    images = [start, start.title("a"), start.title("b"), start.apt_install("a"), start.apt_install("a", extra_options="-t x"),
              start.run_commands("a"), start.run_commands("a", comment="b"), start.force_build(), start.pip_install("a==1"),
              start.pip_install("a==1", torch_backend="cpu"), start.add_local_file("tool.py", "/x"),
              start.add_local_file("tool.py", "/x", copy=True), start.add_local_file("tool.py", "/y")]  # fmt: skip
    for one in images:
        for other in images:
            assert (one.digest() == other.digest()) == (one.parts() == other.parts())


# --- any chain of right calls

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
STEPS = {
    "apt_install": st.tuples(st.lists(st.sampled_from(["gcc", "python3", "g++", "less=1:2"]), min_size=1, max_size=4)),
    "pip_install": st.tuples(st.lists(st.sampled_from(["rich==15.0.0", "a[b]==1", "c==2; python_version<'3'"]), min_size=1)),
    "uv_sync": st.tuples(st.just(["requirements.lock"])),
    "run_commands": st.tuples(st.lists(WORDS.map(lambda text: "echo " + text.replace("\\", "/").replace("<", "")), min_size=1, max_size=3)),
    "env": st.tuples(st.dictionaries(st.sampled_from(["A", "B", "LANG", "_x1"]), WORDS, min_size=1).map(lambda d: [d])),
    "workdir": st.tuples(st.sampled_from(["/a", "/a b", "/é/ü"]).map(lambda path: [path])),
    "user": st.tuples(st.sampled_from(["1000:1000", "root"]).map(lambda user: [user])),
    "entrypoint": st.tuples(st.lists(WORDS | st.just("a\nb"), max_size=3).map(lambda words: [words])),
    "add_local_file": st.tuples(st.just(["config.json", "/etc/config"])),
    "add_local_dir": st.tuples(st.sampled_from([["app", "/x"], ["with space", "/y z"]])),
    "force_build": st.tuples(st.just([])),
}  # fmt: skip
LAST = {
    "add_local_python_source": st.tuples(st.just(["app"])),
    "add_local_file": st.tuples(st.just(["tool.py", "/bin/tool"])),
}


def calls(table: dict[str, Any]) -> Any:
    return st.lists(st.one_of([st.tuples(st.just(name), args) for name, args in table.items()]), max_size=6)


def apply(image: Image, chain: list[Any], copy: bool) -> list[Image]:
    made = [image]
    for name, (args,) in chain:
        options = {"copy": True} if copy and name.startswith("add_") else {}
        made.append(getattr(made[-1], name)(*args, **options))
    return made


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_chain_of_right_calls(project: Path, data: st.DataObject) -> None:
    steps, last = data.draw(calls(STEPS)), data.draw(calls(LAST))
    start = Image.debian_slim(root=project)
    title = data.draw(st.none() | st.text(min_size=1).filter(lambda text: text.strip() and "=" not in text))
    start = start.title(title) if title else start
    values = apply(apply(start, steps, copy=True)[-1], last, copy=False)
    image = values[-1]
    for rendering in (COMMITTED, CLASSIC, CLOSED):
        check_lines(image, image.dockerfile(rendering), steps, last, rendering)
    # Deterministic, and nobody's doing changes an earlier value.
    again = [start, *apply(apply(start, steps, copy=True)[-1], last, copy=False)][-1]
    texts = [value.dockerfile() for value in values]
    assert (again, again.dockerfile(), again.digest()) == (image, texts[-1], image.digest())
    assert [value.dockerfile() for value in values] == texts
    # What stands in a call's arguments in another order is the same image.
    shuffled = [(name, (reordered(name, args),)) for name, (args,) in steps]
    assert apply(apply(start, shuffled, copy=True)[-1], last, copy=False)[-1].digest() == image.digest()
    assert eval(str(image)) == image
    assert sum(1 for _ in image.parts()) >= 2


def reordered(name: str, args: list[Any]) -> list[Any]:
    if name in ("apt_install", "pip_install"):
        return list(reversed(args))
    return [dict(reversed(args[0].items()))] if name == "env" else args


def check_lines(image: Image, text: str, steps: list[Any], last: list[Any], rendering: Rendering) -> None:
    """Read the Dockerfile back: the instructions are those that were asked for, and the files those it copies."""
    found = [line for _, line in instructions(text.split("\n"))]
    counts = {
        word: sum(line.split()[0] == word for line in found)
        for word in ("ENV", "USER", "WORKDIR", "ENTRYPOINT", "RUN", "COPY")
    }
    kinds = [name for name, _ in steps]
    commands = sum(len(args) for name, (args,) in steps if name == "run_commands")
    python = sum(kind in ("pip_install", "uv_sync") for kind in kinds)
    stages = sum(bool(re.match(r"FROM \S+ AS local\d+", line)) for line in found)
    sources = any(name == "add_local_python_source" for name, _ in last)
    folders = kinds.count("workdir")
    as_root = sum(kind == "workdir" and "user" in kinds[:i] for i, kind in enumerate(kinds))
    for_python = 4 - rendering.mounts if python else 0  # of uv, the environment, and uv's way out
    assert counts["RUN"] == kinds.count("apt_install") + commands + folders + python + for_python + stages
    assert counts["ENV"] == kinds.count("env") + (1 if python else 0) + (1 if sources else 0)
    assert counts["USER"] == kinds.count("user") + stages + 2 * as_root
    assert counts["WORKDIR"] == folders
    assert counts["ENTRYPOINT"] == kinds.count("entrypoint")
    assert {line.split()[0] for line in found} <= {"ARG", "FROM", "SHELL", *counts}
    taken = [*re.findall(r"type=bind,source=([^, ]+)", text)]
    for line in found:
        if line.startswith("COPY ") and not line.startswith("COPY --from"):
            words = line.removeprefix("COPY ")
            taken.append(json.loads(words)[0] if words.startswith("[") else words.split()[0])
    places = {place.rstrip("/") for place in taken}
    files = set(image.context())
    assert all(any(name == place or name.startswith(f"{place}/") for place in places) for name in files)
    assert all(any(name == place or name.startswith(f"{place}/") for name in files) for place in places)


@given(WORDS, WORDS)
def test_values_of_env_are_taken_as_they_stand(one: str, two: str) -> None:
    """As Docker's own parser reads them (parser/line_parsers.go and shell/lex.go): quotes off, nothing expanded."""
    (line,) = [
        line for line in Image.debian_slim().env({"B": two, "A": one}).dockerfile().split("\n\n") if "ENV A=" in line
    ]
    assert shlex.split(line.replace("\\\n", " ")) == ["ENV", f"A={one}", f"B={two}"]


# --- a Dockerfile of the user's own


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for name in ("Dockerfile", "src/a.py", "src/data/b.csv", "notes.md", ".env", "runs/x", "sub/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "Dockerfile").write_text("FROM debian:12\nCOPY . /src\n")
    return tmp_path


def test_a_dockerfiles_context_is_its_folder_without_what_is_ignored(own: Path) -> None:
    def names() -> set[str]:
        return set(Image.from_dockerfile("Dockerfile", root=own).context())

    assert names() == {"Dockerfile", "src/a.py", "src/data/b.csv", "notes.md", "sub/c.py"}
    (own / ".dockerignore").write_text("# all but\n*\n!src\nsrc/data/*.csv\n**/c.py\n")
    assert names() == {"src/a.py"}
    (own / "Dockerfile.dockerignore").write_text("./notes.md\n.dockerignore\nDockerfile*\n")
    assert names() == {"src/a.py", "src/data/b.csv", "sub/c.py"}


def test_a_dockerfiles_context_may_be_another_folder(own: Path) -> None:
    image = Image.from_dockerfile("Dockerfile", context="src", root=own)
    assert set(image.context()) == {"a.py", "data/b.csv"}
    assert eval(str(image)) == image
    with pytest.raises(ImageError, match=r"would be mixed .* root="):
        image.add_local_file("sub/c.py", "/x")
    whole = Image.from_dockerfile("./Dockerfile", root=own).add_local_file("./sub/c.py", "/x")
    assert "COPY sub/c.py /local/x" in whole.dockerfile()
    (own / "Dockerfile").write_text("FROM debian:12\nRUN true\n")  # needs no context
    assert Image.from_dockerfile("Dockerfile", root=own).context() == {}


@pytest.mark.parametrize(("text", "base"), [
    ("FROM debian:12", "FROM debian:12 AS base"), ("from debian:12\n\n\n", "from debian:12 AS base"),
    ("FROM a:1 AS x\nFROM b:1", "FROM a:1 AS x\nFROM b:1 AS base"), ("FROM a:1 AS Last", "FROM a:1 AS Last\nFROM Last AS base"),
    ("FROM a:1 AS base", "FROM a:1 AS base"), ("FROM \\\n  a:1\nRUN x", "FROM \\\n  a:1 AS base\nRUN x"),
    ("FROM a:1\nRUN echo \\\n  FROM b", "FROM a:1 AS base\nRUN echo \\\n  FROM b"),
    ("FROM a:1\nRUN <<EOF\nFROM b\nEOF\nUSER x", "FROM a:1 AS base\nRUN <<EOF\nFROM b\nEOF\nUSER x"),
    ("# escape=\\\nFROM a:1", "# escape=\\\nFROM a:1 AS base"),
])  # fmt: skip
def test_the_last_stage_of_a_dockerfile_is_the_base(text: str, base: str, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(text)
    assert Image.from_dockerfile("Dockerfile", root=tmp_path).dockerfile().startswith(f"{base}\n# It sets back")


@pytest.mark.parametrize(
    "text", ["# escape=`\nFROM a:1", "FROM a:1 AS uv\nFROM b:1", "FROM a:1 AS base\nFROM b:1", "FROM a:1 AS local1\n"]
)
def test_a_dockerfile_that_does_not_go_with_ours(text: str, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(text)
    with pytest.raises(ImageError, match=r"from_dockerfile\('Dockerfile'.*(Rename it|Write it with)"):
        Image.from_dockerfile("Dockerfile", root=tmp_path)


def test_a_title_stays_below_a_dockerfiles_directives(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("# syntax=docker/dockerfile:1\nFROM a:1")
    text = Image.from_dockerfile("Dockerfile", root=tmp_path).title("One").dockerfile()
    assert text.startswith("# syntax=docker/dockerfile:1\n# One\nFROM a:1 AS base\n")


# --- the archive for the builder


def test_the_context_archive_is_the_same_bytes_from_another_clone(project: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(project, clone, symlinks=True)
    for path in clone.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o600)
    one, two = (Image.debian_slim(root=root).add_local_python_source("app") for root in (project, clone))
    assert builder.context_tar(one) == builder.context_tar(two)
    for number, image in enumerate((one, two)):
        builder.context_folder(image, tmp_path / f"context{number}")
    states = [
        {str(path.relative_to(folder)): (path.lstat().st_mode, path.lstat().st_mtime) for path in folder.rglob("*")}
        for folder in (tmp_path / "context0", tmp_path / "context1")
    ]
    assert states[0] == states[1]
    assert {mtime for _, mtime in states[0].values()} == {0}
    assert (tmp_path / "context0/app/inner").readlink() == Path("main.py")
