"""What building, pushing and keeping our images costs, as ratios, seconds and bytes: `invoke bench --what=images`.

For each image: nothing changed, one line of our code changed, one dependency changed, everything anew; what a registry
gets each time; the same commit on a second engine, layer by layer; what the bytes are; and a scan for secrets. Changes
are made in a copy of the checkout. Figures go to runs/bench. Images of the changes are removed, the cache is the
builder's.

Exit codes: 0 done; 1 something failed; 2 bad input or usage; 3 something outside is missing; 130 interrupted.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import docker
import docker.errors
import platformdirs
import requests
from rich import box
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is run as a script

from benchmarks.verify import BenchError, machine, outcome, save, show
from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.images import recipes, scan
from fractal.images.docker_client import connect, first_line
from fractal.images.image_config import reproducible_configuration
from fractal.images.saved_layers import PIECE, ScanError, saved_layers
from fractal.images.secret_patterns import PATTERNS, Pattern
from fractal.install import apt, docker_engine

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = "sandbox,pipeline-cpu"  # pipeline is 11 GB: --image=all
BUILD_TIMEOUT_S = 3600
# Small, pure Python, with older releases: one that the lock has is changed.
DEPENDENCIES = ("idna", "tqdm", "certifi", "packaging", "attrs")
TEST_PACKAGES = ("pytest", "_pytest", "pytest_docker", "pytest_timeout", "mypy", "mypyc", "ruff", "hypothesis")
SECOND_ENGINE_BYTES = 5e9  # a larger image would need its size four times on the disk
WANTED = {"nothing": ("s", 1.0), "line": ("s", 10.0), "line pushed": ("bytes", 1e6)}  # issue 5
PACKAGES = re.compile(r"opt/venv/lib/python3[^/]*/site-packages/")


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    images: list[str]
    repeats: int = 5  # of what takes a second; a third of it for what takes several
    cold: bool = False  # also everything anew, on this engine
    second: bool = True  # also on a second engine

    @property
    def edits(self) -> int:
        return max(1, self.repeats // 2)


class Run(NamedTuple):
    """One build, timed from outside."""

    seconds: float
    report: dict[str, Any]  # build's --json


class Pushed(NamedTuple):
    """What one push brought to the registry that it had not."""

    seconds: float
    bytes: int  # compressed, as they travel; configuration and manifest included
    layers: int
    of_layers: int
    whole_bytes: int  # all layers of the image, compressed


# --- arithmetic and texts ---------------------------------------------------------------------------------------------


def title(command: str, last: bool = False) -> str:
    """What made a layer, in a few words, from the history's or the builder's text. `last`: of the last layer."""
    text = re.sub(r"--mount=\S+\s*", "", " ".join(command.split()))
    text = re.sub(r"^(\[[^]]*\] )?(RUN )?(/bin/sh -c )?(begun=.*?\|\| :; } )?(\. /run/secrets/settings && )?", "", text)
    text = text.removeprefix("RUN ")
    if not text:
        return "base"
    if match := re.search(r"-r /run/(\S+)", text):
        return f"Python packages of {match[1]}" if "uv.lock" not in match[1] else "uv itself"
    if "apt-get install" in text:
        return "uv's Debian packages" if "python3-venv" in text else "Debian packages"
    if re.search(r"\buv venv", text):
        return "empty environment"
    if "pip install" in text:
        return f"Python package {text.split()[-3] if text.endswith('# buildkit') else text.split()[-1]}"
    if "chmod -R" in text and "/local " in text:
        return "modes and times of local files"
    if text.startswith("COPY --from=local") or "COPY /local/" in text:
        return "our code" if last else "local files"
    return text.removesuffix("# buildkit").strip()[:44]


def titles(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """A title for each layer of an image, from its configuration's history."""
    commands = [str(entry.get("created_by", "")) for entry in history if not entry.get("empty_layer")]
    copies = [number for number, text in enumerate(commands) if "COPY /local/" in text]
    return [title(text, last=number == (copies or [-1])[-1]) for number, text in enumerate(commands)]


def steps(log: str) -> list[tuple[str, float]]:
    """Seconds of each of BuildKit's steps, longest first, from its plain output; cached ones are left out."""
    names: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for line in log.splitlines():
        if match := re.match(r"#(\d+) (\[[^]]*\] (?:RUN|COPY|ADD|WORKDIR) .*|exporting to image)$", line):
            names[match[1]] = match[2]
        elif (match := re.match(r"#(\d+) DONE ([\d.]+)s", line)) and match[1] in names:
            seconds[match[1]] = float(match[2])
    last = max((n for n, name in names.items() if "COPY --from=local" in name), key=int, default="")
    titled = [(title(names[number], last=number == last), s) for number, s in seconds.items()]
    return sorted(titled, key=lambda pair: -pair[1])


def pinned(lock: str, name: str) -> str | None:
    """The version of a package in a lock file."""
    match = re.search(rf"^{re.escape(name)}==([^\s;\\]+)", lock, re.MULTILINE)
    return match[1] if match else None


def repinned(lock: str, name: str, version: str, hashes: Iterable[str]) -> str:
    """The lock file with another version of one package. Raises BenchError if it is not there."""
    lines = " \\\n".join(f"    --hash=sha256:{digest}" for digest in sorted(hashes))
    pattern = rf"^{re.escape(name)}==[^\s;\\]+([^\\\n]*)\\\n(?:    --hash=\S+ \\\n)*    --hash=\S+$"
    changed, count = re.subn(
        pattern, lambda m: f"{name}=={version}{m[1].rstrip()} \\\n{lines}", lock, flags=re.MULTILINE
    )
    if count != 1:
        raise BenchError(f"{name} stands {count} times in the lock file.")
    return changed


class Facts(NamedTuple):
    """What a layer's archive says of one path."""

    kind: str
    mode: int
    owner: str
    time: float
    size: int
    link: str
    content: str
    extra: str  # extended headers


def differences(ours: Mapping[str, Facts], theirs: Mapping[str, Facts]) -> dict[str, list[str]]:
    """What differs between two layers, each kind of difference with its paths; `order`: the archives' order."""
    different: dict[str, list[str]] = {
        "only here": sorted(ours.keys() - theirs.keys()),
        "only there": sorted(theirs.keys() - ours.keys()),
    }
    for path in sorted(ours.keys() & theirs.keys()):
        for name, here, there in zip(Facts._fields, ours[path], theirs[path], strict=True):
            if here != there:
                different.setdefault(name, []).append(path)
    if not any(different.values()) and list(ours) != list(theirs):
        different["order"] = ["the same entries in another order"]
    return {name: paths for name, paths in different.items() if paths}


def verdict(different: Mapping[str, Sequence[str]]) -> str:
    """`same contents`: every path with the same type, mode, owner and bytes; times and the order may differ."""
    return "differs" if different.keys() - {"time", "order"} else "same contents"


def item(path: str) -> str:
    """What a path counts to: a Python package, or the first two folders."""
    if match := PACKAGES.match(path):
        parts = path[match.end() :].split("/")
        return "/".join(parts[:2]) if parts[0] == "nvidia" else parts[0]
    return "/".join(path.split("/")[:2])


def weigh(sizes: Mapping[str, int]) -> dict[str, Any]:
    """The largest items of an image, and what each way to shrink it would give, in bytes; the ways overlap."""
    items: dict[str, int] = {}
    less = dict.fromkeys(("compiled Python", "static archives", "tests of packages", "tools for tests"), 0)
    for path, size in sizes.items():
        items[item(path)] = items.get(item(path), 0) + size
        package = PACKAGES.match(path)
        less["compiled Python"] += size * path.endswith(".pyc")
        less["static archives"] += size * path.endswith(".a")
        less["tests of packages"] += size * bool(package and re.search(r"/tests?/", path))
        name = path[package.end() :].split("/")[0] if package else path.removeprefix("opt/venv/bin/")
        tool = re.split(r"[-.]", name)[0] in TEST_PACKAGES or re.fullmatch(r"[0-9a-f]+__mypyc\..*", name)
        less["tools for tests"] += size * bool(tool)  # the second: mypy itself, compiled
    largest = sorted(items.items(), key=lambda pair: -pair[1])
    return {"bytes": sum(sizes.values()), "largest": dict(largest[:8]), "less": less}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "runs": len(seconds)}


# --- building ---------------------------------------------------------------------------------------------------------


def timed(argv: Sequence[str | Path], folder: Path, host: str | None = None) -> Run:
    """Run a build command of the checkout in `folder`, as a user would. Raises BenchError with its last words."""
    environ = {**os.environ, "PYTHONPATH": str(folder), **({"DOCKER_HOST": host} if host else {})}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *map(str, argv)],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{' '.join(map(str, argv))} does not end after {BUILD_TIMEOUT_S} s.") from error
    seconds = time.perf_counter() - start
    if done.returncode:
        raise BenchError(f"{' '.join(map(str, argv))}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return Run(seconds, json.loads(done.stdout.strip().splitlines()[-1]))


def by_module(key: str, folder: Path, *options: str, host: str | None = None) -> Run:
    return timed(["-m", "fractal.images.build", key, "--json", *options], folder, host)


def commands(key: str) -> dict[str, list[str]]:
    """The commands that a user can give, by a name for the table."""
    argv = {"module": ["-m", "fractal.images.build", key, "--json"]}
    help_text = subprocess.run(
        [sys.executable, "-m", "invoke", "--help", "build"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if "--image" in help_text.stdout and "--json" in help_text.stdout:
        argv["invoke"] = ["-m", "invoke", "build", f"--image={key}", "--json"]
    return argv


@contextmanager
def copy_of_checkout() -> Iterator[Path]:
    """The checkout's files in a temporary folder: tracked ones, and new ones that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        raise OutsideError(f"{ROOT} is no git checkout, of which a copy could be changed.")
    with tempfile.TemporaryDirectory(prefix="fractal-bench-") as folder:
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        yield Path(folder)


def changed_file(key: str) -> str:
    """The file of which a line is changed: one that is in the image."""
    return "fractal/sandbox/inside/judge.py" if key == "sandbox" else "fractal/verify/stage.py"


def change_line(folder: Path, key: str, mark: str) -> None:
    """One line of our code more: a comment that was never built before."""
    path = folder / changed_file(key)
    path.write_text((ROOT / changed_file(key)).read_text() + f"# bench {mark}\n")


def change_dependency(folder: Path, key: str, mark: str) -> str | None:
    """Another real version of one package in the image's lock. Returns what was changed; None: no lock.

    The comment makes the step new to the builder, however often this is run.
    """
    locks = [step.locals[0].context for step in recipes.recipes()[key].image.steps
             if step.kind == "python" and step.locals]  # fmt: skip
    for name in locks[::-1]:
        text = (ROOT / name).read_text()
        for package in DEPENDENCIES:
            if before := pinned(text, package):
                version, hashes = older(package, before)
                changed = repinned(text, package, version, hashes)
                (folder / name).write_text(f"# bench {mark}\n{changed}")
                return f"{package} {before} to {version} in {Path(name).name}"
    return None


def older(package: str, version: str) -> tuple[str, list[str]]:
    """The newest release before a version, and its wheel's hash, as pip's index has them. Raises BenchError."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder, f"{package}<{version}"]
        # Constraints of this machine would forbid it.
        environ = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"}
        done = subprocess.run(
            [sys.executable, "-m", "pip", *arguments], env=environ, capture_output=True, text=True, timeout=300
        )
        files = list(Path(folder).glob("*.whl"))
        if done.returncode or len(files) != 1:
            why = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise BenchError(f"pip has no {package} older than {version}: {why}")
        return files[0].name.split("-")[1], [hashlib.sha256(files[0].read_bytes()).hexdigest()]


def forget(client: docker.DockerClient, name: str) -> None:
    """Remove an image that this benchmark made."""
    try:
        client.api.remove_image(name)
    except docker.errors.APIError as error:
        console.warn(f"bench: {name} stays: {error.explanation}")


# --- a registry -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registry:
    """Debian's docker-registry on this machine's loopback, with a folder of its own."""

    host: str
    folder: Path

    def blobs(self) -> dict[str, int]:
        """What it holds: digest -> bytes."""
        files = (self.folder / "docker/registry/v2/blobs/sha256").glob("*/*/data")
        return {f"sha256:{path.parent.name}": path.stat().st_size for path in files}

    def clear(self) -> None:
        """Make it empty again, for the next image and for the disk."""
        shutil.rmtree(self.folder / "docker", ignore_errors=True)

    def push(self, client: docker.DockerClient, name: str) -> Pushed:
        """Push an image the way `docker push` does. Raises BenchError."""
        repository, tag = name.split(":")
        remote_name = f"{self.host}/{repository}"
        client.images.get(name).tag(remote_name, tag)
        before = self.blobs()
        start = time.perf_counter()
        try:
            for event in client.api.push(remote_name, tag, stream=True, decode=True):
                if "error" in event:
                    raise BenchError(f"pushing {name}: {event['error']}")
        finally:
            client.api.remove_image(f"{remote_name}:{tag}")
        seconds = time.perf_counter() - start
        new = {digest: size for digest, size in self.blobs().items() if digest not in before}
        accept = {"Accept": "application/vnd.docker.distribution.manifest.v2+json"}
        address = f"http://{self.host}/v2/{repository}/manifests/{tag}"
        with requests.Session() as session:
            session.trust_env = False  # a proxy has another loopback
            layers = session.get(address, headers=accept, timeout=60).json()["layers"]
        brought = sum(layer["digest"] in new for layer in layers)
        return Pushed(seconds, sum(new.values()), brought, len(layers), sum(layer["size"] for layer in layers))


@contextmanager
def registry() -> Iterator[Registry]:
    """Raises OutsideError where it cannot be had."""
    if shutil.which("docker-registry") is None:
        if not apt.allowed():
            raise OutsideError("there is no docker-registry. Run: sudo apt-get install docker-registry")
        try:
            apt.install("docker-registry", log=platformdirs.user_cache_path("fractal") / "bench-registry.log")
        except apt.AptError as error:
            raise OutsideError(str(error)) from error
    if not docker_engine.address().startswith("unix:"):
        raise OutsideError("the engine is on another machine, whose loopback is not ours")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="fractal-registry-") as folder:
        storage = Path(folder, "storage")
        settings = {"version": 0.1, "log": {"level": "error", "accesslog": {"disabled": True}},
                    "storage": {"filesystem": {"rootdirectory": str(storage)}}, "http": {"addr": host}}  # fmt: skip
        config, log = Path(folder, "config.yml"), Path(folder, "log")
        config.write_text(json.dumps(settings))  # JSON is YAML
        with log.open("wb") as out:
            child = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + 30
            while socket.socket().connect_ex(("127.0.0.1", int(host.rpartition(":")[2]))):
                if child.poll() is not None or time.monotonic() > deadline:
                    raise OutsideError(f"docker-registry does not start: {log.read_text().strip()[-300:]}")
                time.sleep(0.05)
            yield Registry(host, storage)
        finally:
            child.terminate()
            child.wait(30)


# --- a second engine --------------------------------------------------------------------------------------------------


@contextmanager
def second_engine() -> Iterator[str]:
    """The address of an engine with empty caches, in a container: the tests' machine. Raises OutsideError."""
    try:
        from tests.machine import Machine, Unavailable
    except ImportError as error:
        raise OutsideError("this checkout has no tests/machine.py, which starts a second engine") from error
    with ExitStack() as stack:
        try:
            other = stack.enter_context(Machine())
        except Unavailable as error:
            raise OutsideError(str(error)) from error
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fractal-engine-"))
        other.sh("chmod 666 /var/run/docker.sock")  # its user is not in group docker
        options = ["-N", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"]
        forward = ["-L", f"{folder}/engine.sock:/var/run/docker.sock"]
        tunnel = subprocess.Popen(["ssh", "-F", str(other.ssh_config), *options, *forward, other.alias])
        stack.callback(tunnel.wait, 30)
        stack.callback(tunnel.terminate)
        host, deadline = f"unix://{folder}/engine.sock", time.monotonic() + 30
        while docker_engine.engine_state(host) != "answers":
            if tunnel.poll() is not None or time.monotonic() > deadline:
                raise OutsideError("the second engine's socket cannot be reached over ssh")
            time.sleep(0.1)
        yield host


def history_of(client: docker.DockerClient, name: str) -> tuple[list[str], list[str]]:
    """Titles and diff ids of an image's layers, bottom first."""
    attrs = client.images.get(name).attrs
    return titles(reproducible_configuration(attrs, client.api.history(name))["history"]), attrs["RootFS"]["Layers"]


def compare(ours: docker.DockerClient, name: str, theirs: docker.DockerClient, other: str) -> dict[str, Any]:
    """Two images of one recipe, layer by layer; where a layer's digest differs, its contents."""
    names, own_layers = history_of(ours, name)
    _, other_layers = history_of(theirs, other)
    rows: list[dict[str, Any]] = []
    listings: tuple[dict[str, dict[str, Facts]], ...] = ({}, {})
    compared = own_layers != other_layers
    if compared:
        try:
            listings = (
                listing(ours, name, set(own_layers) - set(other_layers)),
                listing(theirs, other, set(other_layers) - set(own_layers)),
            )
        except ScanError as error:
            compared = False
            console.warn(f"bench: contents are not compared: {error}")
    for i, (layer, own) in enumerate(zip(names, own_layers, strict=True)):
        others = other_layers[i] if i < len(other_layers) else ""
        if own == others:
            rows.append({"layer": layer, "verdict": "same digest"})
            continue
        if not compared:
            rows.append({"layer": layer, "verdict": "another digest", "entries": 0})
            continue
        different = differences(listings[0].get(own, {}), listings[1].get(others, {}))
        counts = {kind: {"count": len(paths), "paths": paths[:20]} for kind, paths in different.items()}
        rows.append({"layer": layer, "verdict": verdict(different), "entries": len(listings[0].get(own, {})), **counts})
    same = ours.images.get(name).id == theirs.images.get(other).id
    return {"image": "same digest" if same else "another digest", "layers": rows}


def listing(client: docker.DockerClient, name: str, wanted: set[str]) -> dict[str, dict[str, Facts]]:
    """The entries of some layers, by diff id."""
    listings: dict[str, dict[str, Facts]] = {}
    for layer in saved_layers(client, name):
        entries = {}
        for member, file in layer.members:
            content = hashlib.sha256()
            while file is not None and (piece := file.read(PIECE)):
                content.update(piece)
            entries[member.name] = Facts(
                member.type.decode(), member.mode, f"{member.uid}:{member.gid}", member.mtime, member.size,
                member.linkname, content.hexdigest() if file else "", repr(sorted(member.pax_headers.items())),
            )  # fmt: skip
        if (diff_id := layer.diff_id()) in wanted:
            listings[diff_id] = entries
    return listings


# --- one image --------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What the images share while they are measured."""

    plan: Plan
    client: docker.DockerClient
    folder: Path  # the copy of the checkout
    registry: Registry | None
    second: str | None  # address of the second engine
    patterns: list[Pattern]
    mark: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y%m%d%H%M%S"))

    def image(self, key: str, figures: dict[str, Any]) -> None:
        """Measure one image; `figures` gets each figure as it is known, so that a failure loses none."""
        run = by_module(key, ROOT)
        name = run.report["image"]
        figures |= {"image": name, **{k: run.report[k] for k in ("digest", "base", "bytes")}}
        figures["nothing"] = self.nothing(key)
        if self.registry:
            console.say(f"{key}: pushing all of it to an empty registry")
            figures["push"] = self.registry.push(self.client, name)._asdict()
        figures["line"] = self.line(key)
        figures["dependency"] = self.dependency(key)
        if self.registry:
            self.registry.clear()
        if self.plan.cold:
            figures["cold"] = self.cold(key, name)
        if self.second and run.report["bytes"] < SECOND_ENGINE_BYTES:
            figures["second"] = self.elsewhere(key, name, self.second)
        figures["sizes"] = weigh(sizes(self.client, name))
        try:
            figures["scan"] = self.scan(name)
        except ScanError as error:
            console.warn(f"bench: left out the scan: {error}")

    def nothing(self, key: str) -> dict[str, Any]:
        """The command again, with nothing changed."""
        figures: dict[str, Any] = {}
        for label, argv in commands(key).items():
            runs = [timed(argv, ROOT) for _ in range(self.plan.repeats)]
            figures[label] = spread([run.seconds for run in runs])
            figures[label] |= {"built": any(run.report["built"] for run in runs),
                             "steps_run": max(run.report["layers_built"] for run in runs)}  # fmt: skip
        return figures

    def line(self, key: str) -> dict[str, Any]:
        """One line of our code changed, several times."""
        runs, pushes = [], []
        for number in range(self.plan.edits):
            change_line(self.folder, key, f"{self.mark} {number}")
            console.say(f"{key}: a line of {changed_file(key)} changed ({number + 1} of {self.plan.edits})")
            run, pushed = self.changed(key)
            runs.append(run)
            pushes += [pushed] if pushed else []
        shutil.copy2(ROOT / changed_file(key), self.folder / changed_file(key))
        return {**spread([run.seconds for run in runs]), "steps_run": max(r.report["layers_built"] for r in runs),
                "file": changed_file(key), "image": runs[-1].report["image"], **_push(pushes)}  # fmt: skip

    def dependency(self, key: str) -> dict[str, Any] | None:
        """One Python package in another version, once. None for an image without any."""
        what = change_dependency(self.folder, key, self.mark)
        if what is None:
            return None
        console.say(f"{key}: {what}")
        before = dict(zip(*history_of(self.client, recipes.recipes()[key].name)[::-1], strict=True))
        run, pushed = self.changed(key, keep=True)
        names, layers = history_of(self.client, run.report["image"])
        forget(self.client, run.report["image"])
        for lock in ("cpu.lock", "cuda.lock", "cuda-torch.lock"):
            shutil.copy2(ROOT / "docker" / lock, self.folder / "docker" / lock)
        new = [name for name, layer in zip(names, layers, strict=True) if layer not in before]
        return {"what": what, **spread([run.seconds]), "steps_run": run.report["layers_built"], "new_layers": new,
                **_push([pushed] if pushed else [])}  # fmt: skip

    def changed(self, key: str, keep: bool = False) -> tuple[Run, Pushed | None]:
        """Build the changed copy and push it; the image goes."""
        run = by_module(key, self.folder)
        if not run.report["built"]:
            raise BenchError(f"{key}: a change in the copy of the checkout built nothing.")
        try:
            return run, self.registry.push(self.client, run.report["image"]) if self.registry else None
        finally:
            if not keep:
                forget(self.client, run.report["image"])

    def cold(self, key: str, name: str) -> dict[str, Any]:
        """Every layer anew on this engine, downloads in the builder's cache; compared with what was there."""
        console.say(f"{key}: every layer anew (--no-cache)")
        before = self.client.images.get(name)
        run = by_module(key, ROOT, "--no-cache")
        figures = {**spread([run.seconds]), "steps_run": run.report["layers_built"], "steps": steps(_log(name))[:6]}
        after = self.client.images.get(name)
        figures["same"] = compare(self.client, before.id, self.client, after.id)
        if after.id != before.id:
            before.tag(*name.split(":"))
            forget(self.client, after.id)
        return figures

    def elsewhere(self, key: str, name: str, host: str) -> dict[str, Any]:
        """The same commit on the second engine, base included."""
        console.say(f"{key}: the same commit on a second engine with empty caches")
        run = by_module(key, self.folder, host=host)
        figures = {**spread([run.seconds]), "steps_run": run.report["layers_built"], "steps": steps(_log(name))[:6]}
        with closing(docker.DockerClient(base_url=host, timeout=BUILD_TIMEOUT_S)) as client:
            figures["same"] = compare(self.client, name, client, run.report["image"])
        return figures

    def scan(self, name: str) -> dict[str, Any]:
        """Every layer, searched."""
        user = self.client.images.get(name).attrs["Config"].get("User") or "root"
        start = time.perf_counter()
        report = scan.scan(self.client, name, self.patterns)
        return {"seconds": time.perf_counter() - start, "layers": report.layers, "files": report.files,
                "bytes": report.bytes, "searched_for": len(PATTERNS) + len(self.patterns), "user": user,
                "findings": [asdict(finding) | {"excuse": finding.known} for finding in report.findings]}  # fmt: skip


def sizes(client: docker.DockerClient, name: str) -> dict[str, int]:
    """The files of an image and their bytes, as they are seen inside."""
    command = ["/", "-xdev", "-type", "f", "-printf", "%s %P\\n"]
    output = client.containers.run(name, command, entrypoint="find", user="0", network_mode="none", remove=True)
    pairs = (line.partition(" ") for line in output.decode(errors="replace").splitlines())
    return {path: int(size) for size, _, path in pairs}


def _push(pushes: Sequence[Pushed]) -> dict[str, Any]:
    if not pushes:
        return {}
    seconds = statistics.median(p.seconds for p in pushes)
    return {"push": {**max(pushes, key=lambda p: p.bytes)._asdict(), "seconds": seconds}}


def _log(name: str) -> str:
    return (platformdirs.user_cache_path("fractal") / "images" / f"{name.replace(':', '-')}.log").read_text()


# --- what is printed --------------------------------------------------------------------------------------------------


def ratios(figures: dict[str, Any]) -> None:
    """To each change, how it stands to everything: its seconds to a build of all layers, its push to a push of all."""
    whole = (figures.get("cold") or figures.get("second") or {}).get("median_s")
    whole_push = figures.get("push")
    for row in filter(None, [*figures.get("nothing", {}).values(), figures.get("line"), figures.get("dependency")]):
        if whole:
            row["of_whole"] = row["median_s"] / whole
        if whole_push and "push" in row:
            row["push"]["of_whole_bytes"] = row["push"]["bytes"] / whole_push["bytes"]
            row["push"]["of_whole_s"] = row["push"]["seconds"] / whole_push["seconds"]


def rows_of(figures: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for command, row in figures.get("nothing", {}).items():
        yield f"nothing, {command}", row
    if "line" in figures:
        yield "one line", figures["line"]
    if figures.get("dependency"):
        yield "one dependency", figures["dependency"]
    whole = {"push": figures["push"]} if "push" in figures else {}
    if "cold" in figures:
        yield "all anew", {**figures["cold"], **whole}
        whole = {}
    if "second" in figures:
        yield "all, second engine", {**figures["second"], **whole}
        whole = {}
    if whole:
        yield "all pushed", whole


def speed_table(images: Mapping[str, Mapping[str, Any]]) -> Table:
    caption = (
        "seconds: median and min-max, the command timed from outside; pushed: compressed, what the registry had not"
    )
    table = Table(title="build and push", caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("image", no_wrap=True)
    table.add_column("changed", no_wrap=True)
    for column in ("seconds", "min-max", "steps", "of all", "pushed MB", "layers", "push s", "of bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    for key, figures in images.items():
        for number, (what, row) in enumerate(rows_of(figures)):
            push = row.get("push", {})
            spread_ = f"{row['min_s']:.2f}-{row['max_s']:.2f}" if row.get("runs", 1) > 1 else ""
            table.add_row(
                "" if number else key, what, _number(row.get("median_s")), spread_, str(row.get("steps_run", "")),
                _number(row.get("of_whole")), _number(push["bytes"] / 1e6 if push else None),
                f"{push['layers']} of {push['of_layers']}" if push else "", _number(push.get("seconds")),
                _number(push.get("of_whole_bytes")),
            )  # fmt: skip
        table.add_section()
    return table


def same_table(images: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="the same commit built twice", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("image", "layer", "all anew", "second engine"):
        table.add_column(column, no_wrap=True)
    for key, figures in images.items():
        sames = [figures[where]["same"] if where in figures else None for where in ("cold", "second")]
        if not (whole := next(filter(None, sames), None)):
            continue
        table.add_row(key, "the image", *(same["image"] if same else "" for same in sames))
        for number, row in enumerate(whole["layers"]):
            table.add_row("", row["layer"], *(same["layers"][number]["verdict"] if same else "" for same in sames))
        table.add_section()
    return table


def differing(row: Mapping[str, Any]) -> str:
    """A layer's differences as a phrase."""
    parts = [f"{kind} of {paths_of['count']} ({', '.join(paths_of['paths'][:3])})" for kind, paths_of in row.items()
             if isinstance(paths_of, Mapping)]  # fmt: skip
    return f"{'; '.join(parts)}; in {row['entries']:,} entries"


def size_table(images: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="sizes in MB; ways to shrink overlap", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("image", no_wrap=True)
    for column in ("image", "as pushed", ".pyc", ".a", "tests", "test tools"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("largest")
    for key, figures in images.items():
        if "sizes" not in figures:
            continue
        less = figures["sizes"]["less"].values()
        largest = [f"{name} {size / 1e6:,.0f}" for name, size in list(figures["sizes"]["largest"].items())[:3]]
        pushed = figures["push"]["whole_bytes"] if "push" in figures else None
        table.add_row(key, *(f"{v / 1e6:,.1f}" if v is not None else "" for v in (figures["bytes"], pushed, *less)),
                      ", ".join(largest))  # fmt: skip
    return table


def remarks(images: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Limits of issue 5 and how they stand, the time of the steps, and what the scan found."""
    for key, figures in images.items():
        limits = [_limit(f"nothing changed, {command}", row["median_s"], "nothing")
                for command, row in figures.get("nothing", {}).items()]  # fmt: skip
        if "line" in figures:
            limits.append(_limit("one line", figures["line"]["median_s"], "line"))
            if "push" in figures["line"]:
                limits.append(_limit("its push", figures["line"]["push"]["bytes"], "line pushed"))
        yield f"{key}: {'; '.join(limits)}"
        if figures.get("dependency"):
            new_layers = ", ".join(figures["dependency"]["new_layers"])
            yield f"{key}: {figures['dependency']['what']}; new layers: {new_layers}"
        for where in ("cold", "second"):
            if where in figures and figures[where]["steps"]:
                seconds_by_step = ", ".join(f"{name} {seconds:.1f}" for name, seconds in figures[where]["steps"][:5])
                yield f"{key}, {where}, seconds by step: {seconds_by_step}"
            for row in figures.get(where, {}).get("same", {}).get("layers", []):
                if row["verdict"] != "same digest":
                    yield f"{key}, {where}: {row['layer']}: {row['verdict']}: {differing(row)}"
        if not (scanned := figures.get("scan")):
            continue
        bad = [f for f in scanned["findings"] if not f["excuse"]]
        yield (
            f"{key}: scan of {scanned['layers']} different layers, {scanned['files']:,} files, "
            f"{scanned['bytes'] / 1e6:,.0f} MB for {scanned['searched_for']} patterns in {scanned['seconds']:.0f} s: "
            f"{len(bad)} found, "
            f"{len(scanned['findings']) - len(bad)} known and harmless; runs as {scanned['user']}"
        )
        for f in bad:
            yield f"{key}: FOUND {f['kind']}: layer {f['layer']}: {f['path']}: {f['what']}"
        for reason in sorted({f["excuse"] for f in scanned["findings"] if f["excuse"]}):
            kinds = [f for f in scanned["findings"] if f["excuse"] == reason]
            yield f"{key}: known: {len(kinds)} {kinds[0]['kind']} ({reason})"


def _limit(what: str, value: float, name: str) -> str:
    unit, limit = WANTED[name]
    texts = [f"{v / 1e6:.2f} MB" if unit == "bytes" else f"{v:.2f} s" for v in (value, limit)]
    return f"{what} {texts[0]} ({'under' if value < limit else 'NOT under'} {texts[1]})"


def _number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return (
        f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4 if value >= 0.001 else 6}f}"
    )


# --- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="benchmarks/images.py", description=(__doc__ or "").partition("\n")[0])
    add = options.add_argument
    add("--image", default=DEFAULT, help=f"images with commas, or all [{DEFAULT}]; pipeline is 11 GB")
    add("--repeats", type=int, default=5, help="of what takes a second [5]")
    add("--cold", action="store_true", help="also every layer anew on this engine, and compared")
    add("--quick", action="store_true", help="a smoke run: the sandbox's image, once, without a second engine")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON files [runs/bench]")
    return options


def plan_of(given: argparse.Namespace) -> Plan:
    """The options, checked. Raises InputError."""
    if given.repeats < 1:
        raise InputError("--repeats must be positive.")
    if given.quick:
        chosen = recipes.choose("sandbox" if given.image == DEFAULT else given.image)
        return Plan([recipe.key for recipe in chosen], repeats=1, second=False)
    return Plan([recipe.key for recipe in recipes.choose(given.image)], given.repeats, given.cold)


def run(given: argparse.Namespace) -> Path:
    """Measure, print, and return the path of the figures."""
    plan = plan_of(given)
    if trouble := docker_engine.problem():
        raise OutsideError(trouble)
    facts = machine()
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    images: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        client = stack.enter_context(closing(connect()))
        folder = stack.enter_context(copy_of_checkout())
        helpers: dict[str, Any] = {"registry": None, "second engine": None}
        for name, helper in (("registry", registry), ("second engine", second_engine)):
            if name == "second engine" and not plan.second:
                continue
            try:
                helpers[name] = stack.enter_context(helper())
            except OutsideError as error:
                skipped[name] = str(error)
                console.warn(f"bench: left out the {name}: {error}")
        patterns = scan.machine_patterns()
        bench = Bench(plan, client, folder, helpers["registry"], helpers["second engine"], patterns)
        for key in plan.images:
            try:
                bench.image(key, images.setdefault(key, {}))
            except BenchError as error:
                failed[key] = str(error)
            except (docker.errors.DockerException, requests.RequestException) as error:
                failed[key] = f"the engine failed: {first_line(error)}"
            ratios(images[key])
    for table in (speed_table(images), same_table(images), size_table(images)):
        if table.row_count:
            show(table)
    for line in remarks(images):
        console.say(line)
    after = {**facts, "load_after": list(os.getloadavg())}
    path = save(given.out, "images", plan, {"machine": after, "skipped": skipped, "failed": failed, "images": images})
    if failed:
        reasons = "; ".join(f"{key}: {why}" for key, why in failed.items())
        raise BenchError(f"{reasons} What was measured: {path}")
    return path


def main() -> int:
    given = parser().parse_args()
    return outcome(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
