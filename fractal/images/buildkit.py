"""Builds an image with BuildKit: finds a docker command for it, hands it context and secrets, reads its output."""

import ctypes
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fractal import console
from fractal.images.build_errors import BuildError, error_message, without_passwords
from fractal.images.image import Image
from fractal.images.rendering import SHELL, Rendering

CANCEL_TIMEOUT_S = 3  # a tenth of it as a rule
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # prctl.h
DOCKERFILE = "Dockerfile.rendered"
# The engine's own builder, whichever the user has made current, so that the image lands in the engine.
ENVIRONMENT = {"DOCKER_BUILDKIT": "1", "BUILDX_BUILDER": "default", "SOURCE_DATE_EPOCH": "0"}


def find_command() -> str:
    """A docker command that can use BuildKit: clients since 23 need the plugin buildx, older ones have it built in.

    Raises BuildError with the remedy if there is none.
    """
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    commands = dict.fromkeys(filter(None, (shutil.which("docker", path=folder) for folder in folders)))
    if not commands:
        raise BuildError("There is no docker command. Install docker-ce-cli with docker-buildx-plugin, or docker.io.")
    for command in commands:
        if _has_buildx(command) or _major_version(command) < 23:
            return command
    raise BuildError(
        f"{', '.join(commands)} cannot use BuildKit. Install the plugin: apt-get install docker-buildx-plugin."
    )


def _has_buildx(command: str) -> bool:
    return subprocess.run([command, "buildx", "version"], capture_output=True, timeout=30).returncode == 0


def _major_version(command: str) -> int:
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=30)
    match = re.search(r"version (\d+)\.", done.stdout)
    return int(match[1]) if match else 99


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What the builder is given."""

    image: Image
    rendering: Rendering
    base: str
    labels: Mapping[str, str]
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    no_cache: bool = False
    platform: str = ""  # "linux/arm64", where it is not the engine's own
    cache: str = ""  # an image in a registry whose layers may be taken, and which layers are taken from later

    @property
    def build_arguments(self) -> dict[str, str]:
        """Values of the Dockerfile's ARG lines, by name."""
        arguments = {key: os.environ[key] for key in PROXIES if key in os.environ}
        if self.image.base:
            arguments["BASE"] = self.base
        if self.image.forced:
            arguments["FRACTAL_FORCE"] = str(time.time())
        if self.cache:
            arguments["BUILDKIT_INLINE_CACHE"] = "1"
        return arguments


def write_context(image: Image, folder: Path) -> None:
    """Write the build context as a new folder with the same modes and times on any machine."""
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


def write_files(request: BuildRequest, folder: Path) -> None:
    """Write what `command_line` names into a folder: the Dockerfile, context/, and in secrets/ a file for each."""
    Path(folder, DOCKERFILE).write_text(request.image.dockerfile(request.rendering))
    write_context(request.image, Path(folder, "context"))
    Path(folder, "secrets").mkdir(0o700)
    for key, secret in request.secrets.items():
        Path(folder, "secrets", key).write_bytes(secret)


def command_line(request: BuildRequest, arguments: Iterable[str], folder: str) -> list[str]:
    """The arguments of `docker` for the folder of `write_files`, where it writes the image's id into the file id.

    `arguments`: names of build arguments. Their values come from its environment: a proxy may have a password.
    `folder`: a new one each time: of a folder that it knows, BuildKit takes files of equal size and time as unchanged.
    """
    argv = ["build", "--progress=plain", f"--iidfile={folder}/id", f"--file={folder}/{DOCKERFILE}"]
    for key in arguments:
        argv += ["--build-arg", key]
    for key, value in request.labels.items():
        argv += ["--label", f"{key}={value}"]
    for key in request.secrets:
        argv += ["--secret", f"id={key},src={folder}/secrets/{key}"]
    argv += [f"--platform={request.platform}"] * bool(request.platform)
    argv += [f"--cache-from={request.cache}"] * bool(request.cache)
    argv += ["--no-cache"] * request.no_cache
    return [*argv, f"{folder}/context"]


def build(command: str, request: BuildRequest, name: str, log: Path) -> tuple[str, int]:
    """Build with a docker command. Returns the image's id and how many steps were run. Raises BuildError."""
    with tempfile.TemporaryDirectory(prefix="fractal-build-") as folder:
        write_files(request, Path(folder))
        arguments = request.build_arguments
        child = subprocess.Popen(
            [command, *command_line(request, arguments, folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | arguments | ENVIRONMENT,
            start_new_session=True,  # Ctrl-C reaches it once, from this process
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        assert child.stdout is not None
        output = BuildOutput()
        try:
            output.read_all(io.TextIOWrapper(child.stdout, errors="replace"), name, log)
            code = child.wait()
        finally:
            stop(child)
        if code:
            raise output.error(name, log)
        return Path(folder, "id").read_text().strip(), output.steps_run


def _die_with_parent() -> None:
    """Without this, the builder of a killed process would go on and leave an image without a name."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a builder that is still at work. One that has only just begun its step ignores SIGTERM."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(CANCEL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class BuildOutput:
    """BuildKit's plain progress output, read line by line."""

    def __init__(self) -> None:
        self.current = "sending the context"  # what is being done
        self._titles: dict[str, str] = {}  # number of a step -> its title
        self._started: set[str] = set()
        self._cached: set[str] = set()
        self._output: dict[str, list[str]] = {}  # number of a step -> lines that its command printed
        self._failed = ""
        self._last_lines: list[str] = []

    def read_all(self, lines: Iterable[str], name: str, log: Path) -> None:
        """Read lines until they end, into the log as well, and show what is being done."""
        with log.open("a") as out, console.activity(name) as show:
            for raw_line in lines:
                line = without_passwords(raw_line)
                out.write(line)
                out.flush()
                self.read(line)
                show(self.current)

    def error(self, name: str, log: Path, host: str = "") -> BuildError:
        """The error of a build that failed. `name`: what was being built; `host`: where, if not here."""
        message = error_message(self.failure(), self.failed_step, host)
        return BuildError(f"Building {name}{' on ' * bool(host)}{host} failed: {message} The whole story: {log}")

    def read(self, line: str) -> None:
        line = line.rstrip()
        if line:
            self._last_lines = [*self._last_lines[-19:], line]
        match = re.match(r"#(\d+) (?:(\[.*\] .*)|(CACHED)|(ERROR.*)|([\d.]+ .*)|.*)", line)
        if not match:
            return
        number, title, cached, error, printed = match.groups()
        if title:
            self._titles[number] = title
            if re.match(r"\[[^]]*\] (RUN|COPY|ADD|WORKDIR)", title):
                self._started.add(number)
            self.current = shorten(title)
        elif cached:
            self._cached.add(number)
        elif error:
            self._failed = number
        elif printed:
            self._output.setdefault(number, []).append(printed.partition(" ")[2])

    @property
    def failed_step(self) -> str:
        """The title of the step that failed."""
        return shorten(self._titles.get(self._failed, ""))

    @property
    def steps_run(self) -> int:
        """How many steps were run, not taken from the cache."""
        return len(self._started - self._cached)

    def failure(self) -> list[str]:
        """The last lines of the step that failed, then the builder's."""
        return [*self._output.get(self._failed, [])[-15:], *self._last_lines[-3:]]


def shorten(title: str) -> str:
    """A step's title without what we add to each."""
    title = title.replace(f"/bin/sh -c {SHELL} ", "")  # as an image's history has it
    return re.sub(r"--mount=\S+\s*|\. /run/secrets/settings\s+&&\s*", "", title)[:100]
