"""The builder: which docker command can use BuildKit, what it is told, and what its words mean for a person.

Where no command has BuildKit, the engine's own old builder takes an equivalent rendering through the API.
"""

import ctypes
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import docker

from fractal import console
from fractal.errors import OutsideError
from fractal.images.image import Image
from fractal.images.rendering import COMMITTED, Rendering
from fractal.install import docker_engine

SILENCE_S = 1800  # without a word from the engine: a layer of several GB is being written
END_S = 3  # what a builder takes to cancel its work; a tenth as a rule
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
MACHINES = ("amd64", "x86_64", "arm64", "aarch64")
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # prctl.h
NO_SPACE = ("no space left on device", "disk quota exceeded")


class BuildError(OutsideError):
    """The image could not be built: one line with the remedy."""


class Builder(NamedTuple):
    """Who builds: a docker command with BuildKit, or the engine's own old builder through its API."""

    command: str | None
    why_not: str = ""


def check_machine(client: docker.DockerClient) -> None:
    """Raise BuildError for a processor that our packages are not made for."""
    machine = str(client.version().get("Arch", "unknown"))
    if machine not in MACHINES:
        raise BuildError(
            f"The Docker engine at {docker_engine.address()} runs on {machine}; vLLM and torch are made for amd64 and "
            "arm64. Build on such a machine: DOCKER_HOST=ssh://USER@HOST invoke build."
        )


def find_builder(client: docker.DockerClient) -> Builder:
    """A docker command that can use BuildKit: clients since 23 need the plugin buildx, older ones have it built in."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    commands = dict.fromkeys(filter(None, (shutil.which("docker", path=folder) for folder in folders)))
    if not commands:
        return Builder(
            None, "there is no docker command. Install docker-ce-cli with docker-buildx-plugin, or docker.io."
        )
    if not _engine_has_buildkit(client):
        return Builder(None, "the engine is too old for BuildKit (18.09 has it).")
    for command in commands:
        if _plugin(command) or _major(command) < 23:
            return Builder(command)
    found = ", ".join(commands)
    return Builder(None, f"{found} cannot use BuildKit. Install the plugin: apt-get install docker-buildx-plugin.")


def _engine_has_buildkit(client: docker.DockerClient) -> bool:
    reply = client.api._get(client.api._url("/_ping"))
    return bool(reply.headers.get("Builder-Version") == "2" or reply.headers.get("Api-Version", "0") >= "1.39")


def _plugin(command: str) -> bool:
    return subprocess.run([command, "buildx", "version"], capture_output=True, timeout=30).returncode == 0


def _major(command: str) -> int:
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=30)
    match = re.search(r"version (\d+)\.", done.stdout)
    return int(match[1]) if match else 99


@dataclass(frozen=True, slots=True)
class Request:
    """All that a builder is told."""

    image: Image
    rendering: Rendering
    base: str
    labels: Mapping[str, str]
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    no_cache: bool = False

    @property
    def arguments(self) -> dict[str, str]:
        found = {key: os.environ[key] for key in PROXIES if key in os.environ}
        if self.image.base:
            found["BASE"] = self.base
        if self.image.forced:
            found["FRACTAL_FORCE"] = str(time.time())
        return found


RENDERED = "Dockerfile.rendered"


def context_tar(image: Image, rendering: Rendering = COMMITTED) -> bytes:
    """The old builder's context: same sources, same bytes, on any machine and at any time."""
    files = image.context()
    texts = {RENDERED: image.dockerfile(rendering)}
    if ".dockerignore" not in files:
        texts[".dockerignore"] = f"{RENDERED}\n.dockerignore\n"  # for COPY . in a Dockerfile of the user's own
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted([*files, *texts]):
            entry = tarfile.TarInfo(name)  # mtime, uid and gid are 0
            path = files.get(name)
            content = b""
            if path is None:
                content = texts[name].encode()
            elif path.is_symlink():
                entry.type, entry.linkname = tarfile.SYMTYPE, str(path.readlink())
            else:
                content = path.read_bytes()
                entry.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def context_folder(image: Image, folder: Path) -> None:
    """BuildKit's context, as a new folder with the same modes and times on any machine."""
    folder.mkdir()
    for name, source in image.context().items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
            continue
        shutil.copyfile(source, target)
        target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
        os.utime(path, (0, 0), follow_symlinks=False)


def build_by_cli(command: str, request: Request, name: str, log: Path) -> tuple[str, int]:
    """Build with BuildKit. Returns the image's id and how many steps were run. Raises BuildError."""
    with tempfile.TemporaryDirectory(prefix="fractal-build-") as folder:
        argv = [command, "build", "--progress=plain", f"--iidfile={folder}/id", f"--file={folder}/{RENDERED}"]
        for key in request.arguments:  # their values come from its environment: a proxy may have a password
            argv += ["--build-arg", key]
        for key, value in request.labels.items():
            argv += ["--label", f"{key}={value}"]
        for key, secret in request.secrets.items():
            Path(folder, key).write_bytes(secret)
            argv += ["--secret", f"id={key},src={folder}/{key}"]
        argv += ["--no-cache"] * request.no_cache
        # BUILDX_BUILDER: the engine's own, whichever the user has made current, so that the image lands in the engine.
        environ = (
            os.environ
            | request.arguments
            | {"DOCKER_BUILDKIT": "1", "BUILDX_BUILDER": "default", "SOURCE_DATE_EPOCH": "0"}
        )
        story = Story(name)
        Path(folder, RENDERED).write_text(request.image.dockerfile(request.rendering))
        context_folder(request.image, Path(folder, "context"))
        child = subprocess.Popen(
            [*argv, f"{folder}/context"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,  # Ctrl-C reaches it once, from us
            preexec_fn=_end_with_us if sys.platform == "linux" else None,
        )
        assert child.stdout is not None
        try:
            with log.open("a") as out, console.activity(name) as show:
                for said in io.TextIOWrapper(child.stdout, errors="replace"):
                    line = masked(said)
                    out.write(line)
                    out.flush()
                    story.read(line)
                    show(story.now)
            code = child.wait()
        finally:
            end(child)
        if code:
            raise BuildError(f"Building {name} failed: {explain(story.failure(), story.step)} The whole story: {log}")
        return Path(folder, "id").read_text().strip(), story.ran


def _end_with_us() -> None:
    """Else the builder of a killed process goes on, and leaves an image without a name."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end(child: subprocess.Popen[bytes]) -> None:
    """End a builder that is still at work. One that has only just begun its step does not hear the request."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def build_by_api(client: docker.DockerClient, request: Request, name: str, log: Path) -> tuple[str, int]:
    """Build with the engine's old builder, which needs no command and knows no mounts."""
    stream = client.api.build(
        fileobj=io.BytesIO(context_tar(request.image, request.rendering)),
        custom_context=True,
        dockerfile=RENDERED,
        buildargs=request.arguments,
        labels=dict(request.labels),
        nocache=request.no_cache,
        rm=True,
        forcerm=True,
        decode=True,
        timeout=SILENCE_S,
    )
    return follow(stream, name, log)


def follow(stream: Iterable[dict[str, Any]], name: str, log: Path) -> tuple[str, int]:
    """Write the old builder's words to the log as they come. Returns the image's id and the steps that were run."""
    made, ran, step = "", 0, ""
    last: list[str] = []
    with log.open("a") as out:
        for event in stream:
            text = masked(event.get("stream") or event.get("error") or "")
            out.write(text)
            out.flush()
            ran += text.startswith(" ---> Running in")
            step = text.partition(" : ")[2].strip() if text.startswith("Step ") else step
            last = [*last[-15:], *text.splitlines()]
            made = event.get("aux", {}).get("ID", made)
            if "error" in event:
                raise BuildError(f"Building {name} failed: {explain(last, step)} The whole story: {log}")
    return made, ran


class Story:
    """What BuildKit's plain output says so far: feed it line by line."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.now = "sending the context"
        self.steps: dict[str, str] = {}  # vertex number -> its title
        self.started: set[str] = set()
        self.cached: set[str] = set()
        self.said: dict[str, list[str]] = {}
        self.failed = ""
        self.last: list[str] = []

    def read(self, line: str) -> None:
        line = line.rstrip()
        if line:
            self.last = [*self.last[-19:], line]
        match = re.match(r"#(\d+) (?:(\[.*\] .*)|(CACHED)|(ERROR.*)|([\d.]+ .*)|.*)", line)
        if not match:
            return
        number, title, cached, error, words = match.groups()
        if title:
            self.steps[number] = title
            if re.match(r"\[[^]]*\] (RUN|COPY|ADD|WORKDIR)", title):
                self.started.add(number)
            self.now = brief(title)
        elif cached:
            self.cached.add(number)
        elif error:
            self.failed = number
        elif words:
            self.said.setdefault(number, []).append(words.partition(" ")[2])

    @property
    def step(self) -> str:
        """The step that failed."""
        return brief(self.steps.get(self.failed, ""))

    @property
    def ran(self) -> int:
        """Steps that were run, not taken from the cache."""
        return len(self.started - self.cached)

    def failure(self) -> list[str]:
        """The failed step's own last words, then the builder's."""
        return [*self.said.get(self.failed, [])[-15:], *self.last[-3:]]


def brief(title: str) -> str:
    """A step's title without what we add to each."""
    return re.sub(r"--mount=\S+\s*|\. /run/secrets/settings\s+&&\s*", "", title)[:100]


def masked(text: str) -> str:
    """A builder's words without the passwords in addresses."""
    return re.sub(r"(?<=://)[^/\s@]+(?=@)", "***", text)


def disk_full(text: str) -> str | None:
    """The message for a full disk, if that is what a text tells of."""
    if any(words in text.lower() for words in NO_SPACE):
        return (
            "the engine's disk is full. `docker system df` shows what takes it, `docker builder prune` and "
            "`docker image prune -a` free it; nothing was tagged."
        )
    return None


CERTIFICATE = r"certificate verify failed|UnknownIssuer|invalid peer certificate|self.signed certificate"
NETWORK = (
    r"Temporary failure resolving|Could not resolve|failed to lookup address|dns error|Connection refused"
    r"|network is unreachable|no such host|Temporary failure in name resolution|tcp connect error|i/o timeout"
)
NO_BASE = (
    r"pull access denied for [^\s,]+|manifest for \S+ not found|failed to resolve source metadata for [^\s:]+:\S+"
    r"|https?://\S+/v2/\S+/manifests/[^\s\"]+|\S+: not found: manifest unknown"
)


def explain(words: list[str], step: str = "") -> str:
    """What a failed build's words come to, with the remedy. `step`: the one that failed."""
    text = "\n".join(words)
    if full := disk_full(text):
        return full
    if re.search(CERTIFICATE, text, re.I):
        return "a certificate is not trusted inside the build. Give your network's own: --ca=FILE or FRACTAL_CA."
    if match := re.search(NO_BASE, text):
        return (
            f"its base is not to be had ({match[0].rstrip(':')}). Load it into the engine, or name another one: "
            "--base, or FROM in a Dockerfile."
        )
    if match := re.search(NETWORK, text, re.I):
        return (
            f"the network is not to be reached from inside the build ({match[0]}; {_last(words)}). "
            "Behind a proxy set http_proxy and https_proxy; with mirrors FRACTAL_DEBIAN_MIRROR and pip's index-url."
        )
    if match := re.search(r"E: Version '(\S+)' for '(\S+)' was not found", text):
        return f"Debian has no version {match[1]} of {match[2]} in the base's release. Leave the version out."
    if match := re.search(r"E: Unable to locate package (\S+)|E: Package '(\S+)' has no installation candidate", text):
        return f"Debian has no package {match[1] or match[2]} in the base's release. Check its name."
    if match := re.search(r"Hash mismatch for `([^`]+)`|DO NOT MATCH THE HASHES[\s\S]*?\n\s*(\S+==\S+)", text):
        what = match[1] or match[2]
        return f"{what}: the file that was downloaded is not the one that was locked. If that is right: invoke lock."
    if match := re.search(
        r"no version of (\S+?==\S+?)[, ]|not found in the package registry and you require (\S+?),", text
    ):
        what = match[1] or match[2]
        return f"No index has the Python package {what} for this Python and processor. Check name, version and index."
    if match := re.search(
        r"No solution found when resolving[^\n]*\n(?:\s*\n)*\s*\S+ (Because .*(?:\n {4,}\S.*)*)", text
    ):
        return f"the Python packages do not fit together. {' '.join(match[1].split())[:400]} Change a version."
    if match := re.search(r"Could not find a version that satisfies the requirement (\S+)", text):
        return f"No index has the Python package {match[1]}. Check name, version and index."
    if match := re.search(r'"(/[^"]*)" not found', text):
        return (
            f"{step}: the build context has no {match[1][1:]}. It is not there, or one of what never gets into an "
            "image: secrets, caches, weights, what .dockerignore names."
        )
    return f"{step}: {_last(words)}." if step else f"{_last(words)}."


# The builder's own words around a failure.
NOISE = re.compile(
    r"------|> \[|\d+ \| |Dockerfile\.rendered:\d|executor failed running|process \"|ERROR: failed to solve: process|"
    r"The command '|Removing intermediate|---> |Step \d"
)


def _last(words: list[str]) -> str:
    """The error in a failed step's own words, else its last one, else the builder's."""
    lines = [line.strip() for line in words if line.strip()]
    own = [line for line in lines if not NOISE.match(line)]
    errors = [line for line in own if re.match(r"(E:|error|ERROR)", line)]
    code = re.findall(r"(?:exit|non-zero) code: \d+", "\n".join(lines))
    return (errors or own[-1:] or code or lines or ["no reason given"])[-1][:300].rstrip(".")
