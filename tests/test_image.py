"""Image as a value: what it refuses, what it renders, what it is named by. Needs no Docker."""

import json
import os
import re
import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fractal.images import buildkit, recipes
from fractal.images.image import Image, ImageError
from fractal.images.rendering import COMMITTED, Rendering
from fractal.sandbox.host import source
from tests.conftest import ROOT

GOLDEN = ROOT / "tests/golden"
REFUSED = ROOT / "tests/data/refused_image_calls.txt"
CLOSED = Rendering(settings=True, wheels="fractal-wheels:0123456789ab")
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
        "service-closed": (web, CLOSED),
        "copied": (copied, COMMITTED),
        "rootfs": (rootfs, COMMITTED),
        "own": (own, COMMITTED),
    }


def test_typical_images_render_as_their_golden_files(project: Path) -> None:
    """FRACTAL_GOLDEN=1 writes the files anew; read the difference before you commit it."""
    (project / "base.tar.xz").write_bytes(b"tar")
    (project / "own").mkdir(exist_ok=True)
    (project / "own/Dockerfile").write_text(
        "# syntax=docker/dockerfile:1\nARG V=1\nFROM debian:12 AS build\nRUN make \\\n  FROM=x\n\n\n\n"
        "FROM --platform=linux/amd64 \\\n  debian:12\nCOPY --from=build /x /x\n"
    )
    different = []
    for name, (image, rendering) in chains(project).items():
        file = GOLDEN / f"{name}.Dockerfile"
        if os.environ.get("FRACTAL_GOLDEN"):
            file.write_text(image.dockerfile(rendering))
        if image.dockerfile(rendering) != file.read_text():
            different.append(name)
    assert different == []


def test_the_committed_dockerfiles_are_the_recipes_renderings() -> None:
    different = [path for path, text in recipes.renderings().items() if (ROOT / path).read_text() != text]
    assert different == [], "run: invoke render"


def test_the_sandbox_finds_its_image_by_the_recipes_name() -> None:
    assert source.image_name() == recipes.recipes()["sandbox"].name


def test_what_runs_in_the_sandbox_is_what_its_image_holds() -> None:
    assert recipes.sandbox().context() == {name: ROOT / name for name in source.files()}


# --- what is refused, when it is written

METHODS = {
    "tag": "from_registry", "root": "debian_slim|from_registry", "dockerfile": "from_dockerfile", "rootfs": "from_rootfs",
    "apt": "apt_install", "pip": "pip_install", "lock": "uv_sync", "run": "run_commands",
    "file": "add_local_file|add_local_dir", "dir": "add_local_dir", "source": "add_local_python_source",
}  # fmt: skip


def refused_calls() -> dict[str, tuple[str, str]]:
    """Name of a case -> the call, and what its error says."""
    lines = [line for line in REFUSED.read_text().splitlines() if line and not line.startswith("#")]
    return {name: (call, remedy) for name, call, remedy in (line.split(" | ") for line in lines)}


def test_a_wrong_argument_is_refused_when_it_is_written(image: Image) -> None:
    wrong = []
    for name, (call, remedy) in refused_calls().items():
        try:
            eval(call, {"Image": Image, "image": image})
            wrong.append(f"{name}: accepted")
        except ImageError as error:
            method = name.partition(":")[0]
            names_call = re.match(rf"(Image\.)?({METHODS.get(method, method)})\b", str(error))
            if not names_call or remedy not in str(error) or "\n" in str(error) or "hunter2" in str(error):
                wrong.append(f"{name}: {error}")
    assert wrong == []
    assert len(refused_calls()) == 109


TOKEN = "hf_" + "x1" * 17
SECRETS = {
    "run": lambda i: i.run_commands(f"curl -H 'Authorization: Bearer {TOKEN}' https://h.example"),
    "address": lambda i: i.pip_install(f"x @ https://me:{TOKEN}@h.example/x.whl#sha256={HASH}"),
    "no hash": lambda i: i.pip_install(f"x @ https://me:{TOKEN}@h.example/x.whl"),
    "options": lambda i: i.pip_install("rich==15.0.0", extra_options=f"--index-url https://me:{TOKEN}@pypi.example"),
    "env": lambda i: i.env({"PAGE": f"https://me:{TOKEN}@h.example"}),
    "entrypoint": lambda i: i.entrypoint(["serve", TOKEN]),
}  # fmt: skip


def test_a_secret_is_refused_and_not_repeated(image: Image) -> None:
    for call in SECRETS.values():
        with pytest.raises(ImageError) as caught:
            call(image)
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


def test_a_step_after_local_files_says_how_to_write_it(image: Image) -> None:
    added = [
        image.add_local_python_source("app"),
        image.add_local_file("tool.py", "/a", copy=True).add_local_dir("app", "/y"),
    ]
    steps = {
        "run_commands": lambda i: i.run_commands("make"),
        "pip_install": lambda i: i.pip_install("rich==15.0.0"),
        "env": lambda i: i.env({"A": "it's"}),
        "add_local_file": lambda i: i.add_local_file("config.json", "/c", copy=True),
        "force_build": lambda i: i.force_build(),
        "workdir": lambda i: i.workdir("/app"),
    }
    for before in added:
        for method, step in steps.items():
            with pytest.raises(ImageError, match=rf"^{method}\b.*: a build step after local files.*copy=True\.$"):
                step(before)
    assert added[0].add_local_file("tool.py", "/x").title("One.").digest()


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
    with pytest.raises(ImageError, match=r"two/conf.* would be mixed with .*one/conf.* rename one"):
        image.add_local_dir(tmp_path / "two/conf", "/two")
    with pytest.raises(ImageError, match="would be mixed"):
        image.add_local_file(tmp_path / "two/tool.py", "/x").add_local_file(
            shutil.copy(project / "tool.py", tmp_path), "/y"
        )


def test_what_one_call_ignores_no_other_brings_back(image: Image) -> None:
    one = image.add_local_dir("app", "/one", ignore=["data/"])
    for more in (lambda: one.add_local_dir("app", "/two"), lambda: one.add_local_file("app/data/words.txt", "/x")):
        with pytest.raises(ImageError, match=r"app/data/words.txt would be mixed with .* Ignore the same in both"):
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


def test_parts_name_what_differs(project: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(project, clone, symlinks=True)

    def made(root: Path = clone, package: str = "gcc", word: str = "x", comment: str = "") -> Image:
        start = Image.debian_slim(root=root).apt_install(package, "python3").uv_sync("requirements.lock")
        return start.run_commands(f"echo {word}", comment=comment).add_local_python_source("app")

    def changed(other: Image) -> list[str]:
        old, new = made(project).parts(), other.parts()
        return [name for name in {**new, **old} if old.get(name) != new.get(name)]

    assert changed(made()) == []
    assert changed(made(package="g++")) == changed(made(word="y")) == changed(made(comment="why")) == ["its Dockerfile"]
    (clone / "app/main.py").write_text("other")
    assert changed(made()) == ["app"]
    (clone / "requirements.lock").write_text(LOCK.replace("15.0.0", "15.0.1"))
    assert changed(made()) == ["requirements.lock", "app"]
    (clone / "docker").mkdir()
    (clone / "docker/uv.lock").write_text("other")
    assert changed(made()) == ["requirements.lock", "app", "docker/uv.lock"]


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
    for rendering in (COMMITTED, CLOSED):
        check_lines(image, image.dockerfile(rendering), steps, last)
    # Deterministic, and nobody's doing changes an earlier value.
    again = [start, *apply(apply(start, steps, copy=True)[-1], last, copy=False)][-1]
    texts = [value.dockerfile() for value in values]
    assert (again, again.dockerfile(), again.digest()) == (image, texts[-1], image.digest())
    assert [value.dockerfile() for value in values] == texts
    # What stands in a call's arguments in another order is the same image.
    shuffled = [(name, (reordered(name, args),)) for name, (args,) in steps]
    assert apply(apply(start, shuffled, copy=True)[-1], last, copy=False)[-1].digest() == image.digest()


def reordered(name: str, args: list[Any]) -> list[Any]:
    if name in ("apt_install", "pip_install"):
        return list(reversed(args))
    return [dict(reversed(args[0].items()))] if name == "env" else args


def check_lines(image: Image, text: str, steps: list[Any], last: list[Any]) -> None:
    """Read the Dockerfile back: the instructions are those that were asked for, and the files those it copies."""
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
    found = re.sub(r"\\\n\s*", "", "\n".join(lines)).split("\n")
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
    for_python = 3 if python else 0  # of uv and the environment
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
    with pytest.raises(ImageError, match=r"would be mixed .* root="):
        image.add_local_file("sub/c.py", "/x")
    whole = Image.from_dockerfile("./Dockerfile", root=own).add_local_file("./sub/c.py", "/x")
    assert "COPY sub/c.py /local/x" in whole.dockerfile()
    (own / "Dockerfile").write_text("FROM debian:12\nRUN true\n")  # needs no context
    assert Image.from_dockerfile("Dockerfile", root=own).context() == {}


LAST_STAGES = {
    "FROM debian:12": "FROM debian:12 AS base",
    "from debian:12\n\n\n": "from debian:12 AS base",
    "FROM a:1 AS x\nFROM b:1": "FROM a:1 AS x\nFROM b:1 AS base",
    "FROM a:1 AS Last": "FROM a:1 AS Last\nFROM Last AS base",
    "FROM a:1 AS base": "FROM a:1 AS base",
    "FROM \\\n  a:1\nRUN x": "FROM \\\n  a:1 AS base\nRUN x",
    "FROM a:1\nRUN echo \\\n  FROM b": "FROM a:1 AS base\nRUN echo \\\n  FROM b",
    "FROM a:1\nRUN python3 <<EOF\nfrom os import path\nEOF": "FROM a:1 AS base\nRUN python3 <<EOF\nfrom os import path\nEOF",
    "FROM --platform=$BUILDPLATFORM a:1 AS x\n\nFROM b:1\nCOPY --from=x /a /b": "FROM --platform=$BUILDPLATFORM a:1 AS x\n\nFROM b:1 AS base\nCOPY --from=x /a /b",
    "# escape=\\\nFROM a:1": "# escape=\\\nFROM a:1 AS base",
}


def test_the_last_stage_of_a_dockerfile_is_the_base(tmp_path: Path) -> None:
    wrong = []
    for text, base in LAST_STAGES.items():
        (tmp_path / "Dockerfile").write_text(text)
        rendered = Image.from_dockerfile("Dockerfile", root=tmp_path).dockerfile()
        if not rendered.startswith(f"{base}\n# It sets back"):
            wrong.append(f"{text}: {rendered}")
    assert wrong == []


def test_a_dockerfile_that_does_not_go_with_ours(tmp_path: Path) -> None:
    for text in (
        "FROM a:1 AS uv\nFROM b:1",
        "FROM a:1 AS base\nFROM b:1",
        "FROM a:1 AS local1\n",
    ):
        (tmp_path / "Dockerfile").write_text(text)
        with pytest.raises(ImageError, match=r"from_dockerfile\('Dockerfile'.*Rename it"):
            Image.from_dockerfile("Dockerfile", root=tmp_path)


def test_a_title_stays_below_a_dockerfiles_directives(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("# syntax=docker/dockerfile:1\nFROM a:1")
    text = Image.from_dockerfile("Dockerfile", root=tmp_path).title("One").dockerfile()
    assert text.startswith("# syntax=docker/dockerfile:1\n# One\nFROM a:1 AS base\n")


def test_the_build_context_is_the_same_from_another_clone(project: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(project, clone, symlinks=True)
    for path in clone.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o600)
    states = []
    for root in (project, clone):
        folder = tmp_path / f"context{len(states)}"
        buildkit.write_context(Image.debian_slim(root=root).add_local_python_source("app"), folder)
        files = [(str(path.relative_to(folder)), path.lstat()) for path in sorted(folder.rglob("*"))]
        states.append([(name, state.st_mode, state.st_mtime) for name, state in files])
    assert states[0] == states[1]
    assert {mtime for _, _, mtime in states[0]} == {0}
    assert (tmp_path / "context0/app/inner").readlink() == Path("main.py")
