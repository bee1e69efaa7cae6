"""Copy a run's folder between this machine and the instance, and inputs to the instance.

rsync copies; this module decides the direction, and proves by digest that the results have arrived.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout

from fractal.cloud.remote_host import ROOT, Log, Remote, RemoteError, script, transferred
from fractal.errors import InputError, OutsideError
from fractal.jsonl import LATER_PARTS

FETCH_INTERVAL_S = 20.0
LOCK_TIMEOUT_S = 30.0
RECORDS = ("samples.jsonl", "labels.jsonl", "outputs.jsonl", "scores.jsonl", "selection.jsonl")  # these only grow
EXCLUDES = tuple(f"--exclude={name}" for name in (".lock", ".rsync-partial", ".*.lock", ".manifest.json.*"))
PREPARE = """\
cd && mkdir -p "fractal/runs/$1" fractal/inputs fractal/models fractal/queue || exit 1
echo "$(id -u):$(id -g)"; pwd
"""
LIST_RUNS = """\
cd fractal 2> /dev/null || exit 0
{ find runs -mindepth 2 -maxdepth 2 -name manifest.json; ls -d exec/*/work; } 2> /dev/null | cut -d/ -f2 | sort -u
"""


class RemoteUser(NamedTuple):
    """The instance's user."""

    user: str  # "uid:gid", who owns the run's files
    home: str


class FileState(NamedTuple):
    size: int  # bytes
    modified: int  # unix seconds; rsync keeps it


@dataclass(frozen=True, slots=True)
class RunState:
    """How far a run's folder got, on one side."""

    created: str | None = None  # the manifest's time stamp identifies the run; None without a manifest
    files: Mapping[str, FileState] = field(default_factory=dict)


def prepare(remote: Remote, run: str) -> RemoteUser:
    user, home = remote.check("make the run's folder", PREPARE, run).splitlines()
    return RemoteUser(user, home)


def remote_state(remote: Remote, run: str) -> RunState:
    return parse_state(remote.check("read the run's folder", script("list_run_files"), run))


def parse_state(text: str) -> RunState:
    """The output of list_run_files.sh."""
    listing, marker, manifest = f"\n{text}".partition("\nmanifest\n")
    files = {}
    for line in listing.splitlines()[1:]:
        size, modified, name = line.split(" ", 2)
        files[name] = FileState(int(size), int(float(modified)))
    return RunState(_created(manifest) if marker else None, files)


def local_state(folder: Path) -> RunState:
    manifest = folder / "manifest.json"
    files = {}
    for path in folder.rglob("*"):
        if path.is_file():
            stat = path.stat()
            files[path.relative_to(folder).as_posix()] = FileState(stat.st_size, int(stat.st_mtime))
    return RunState(_created(manifest.read_text()) if manifest.exists() else None, files)


def _created(manifest: str) -> str:
    try:
        return str(json.loads(manifest)["created"])
    except (ValueError, KeyError, TypeError):
        return "unreadable"


def direction(local: RunState, remote: RunState, run: str) -> Literal["fetch", "send", "neither"]:
    """Which side has more of the run, compared file by file.

    A record file is ahead where it is longer, a file of the critic where the other side lacks it or has an older one.
    Logs, the report and files of the user's decide nothing. If all else is equal, the newer manifest decides: a stage
    that ran here may have changed nothing else. Raises InputError where the sides are two runs, or each has what the
    other lacks.
    """
    if remote.created is None:
        return "send" if local.created else "neither"
    if local.created is None:
        return "fetch"
    if local.created != remote.created:
        raise InputError(
            f"runs/{run} here (made {local.created}) and the one on the instance (made {remote.created}) are two runs. "
            "Name another --run, or move one of them away."
        )
    names = {name for name in {*local.files, *remote.files} if _decides(name)}
    local_ahead = sorted(name for name in names if _ahead(name, local, remote))
    remote_ahead = sorted(name for name in names if _ahead(name, remote, local))
    if local_ahead and remote_ahead:
        raise InputError(
            f"runs/{run} was continued in both places: here {', '.join(local_ahead[:3])}, on the instance "
            f"{', '.join(remote_ahead[:3])}. Move one of the two folders away; both are untouched."
        )
    if not local_ahead and not remote_ahead:
        return "send" if _ahead("manifest.json", local, remote) else "fetch"
    return "send" if local_ahead else "fetch"


def _decides(name: str) -> bool:
    """Whether it is a record file or a file of the critic; drafts of a killed training are not."""
    return _is_record(name) or (name.startswith("critic/") and "/." not in name)


def _is_record(name: str) -> bool:
    """Whether it is a record file, or a part of one."""
    return name in RECORDS or fnmatchcase(name, LATER_PARTS)


def _ahead(name: str, side: RunState, other: RunState) -> bool:
    """Whether this side's file has more than the other's."""
    if _is_record(name):
        empty = FileState(0, 0)
        return side.files.get(name, empty).size > other.files.get(name, empty).size
    if name not in side.files or name not in other.files:
        return name in side.files
    return side.files[name] != other.files[name] and side.files[name].modified > other.files[name].modified


def exchange(remote: Remote, folder: Path, log: Log) -> None:
    """Before a job: bring both sides to the state of the one that has more. Raises InputError."""
    match direction(local_state(folder), remote_state(remote, folder.name), folder.name):
        case "fetch":
            fetch(remote, folder)
        case "send":
            stats = remote.rsync("--stats", *EXCLUDES, f"{folder}/", _remote_folder(remote, folder))
            log(f"{folder} continues on the instance: sent {transferred(stats)}")


def fetch(remote: Remote, folder: Path, *options: str) -> str:
    """Copy what is new of the run to this machine; returns how much. A file is replaced whole, never half.

    `options`: further options of rsync.
    """
    remote.check("collect the job's files", script("collect_job_files"), folder.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=LOCK_TIMEOUT_S):  # no stage works in the folder meanwhile
            return transferred(
                remote.rsync("--stats", *options, *EXCLUDES, _remote_folder(remote, folder), f"{folder}/")
            )
    except Timeout:
        raise InputError(f"{folder}: another process works in this run here. Wait for it, then fetch again.") from None
    except OSError as error:
        raise OutsideError(f"{folder}: cannot be written: {error.strerror}. Check owner and disk.") from error


def _remote_folder(remote: Remote, folder: Path) -> str:
    """The run's folder on the instance, as rsync names it."""
    return f"{remote.host}:{ROOT}/runs/{folder.name}/"


def fetch_verified(remote: Remote, folder: Path) -> str:
    """Fetch, and check that every file on the instance has the same sha256 here. Raises RemoteError."""
    total = fetch(remote, folder)
    for attempt in range(3):
        expected = digests(remote, folder.name)
        wrong = [name for name, digest in expected.items() if _digest(folder / name) != digest]
        if not wrong:
            size = sum((folder / name).stat().st_size for name in expected)
            return f"{len(expected)} files, {size / 1e6:.1f} MB, digests equal; new now: {total}"
        if attempt < 2:  # a job still writes, or a time stamp misled rsync: compare by content this time
            fetch(remote, folder, "--checksum")
    raise RemoteError(
        f"{len(wrong)} files of {folder} differ from those on {remote.host}, the first is {wrong[0]}. Does a process "
        f"write them? Run: invoke fetch --run={folder}"
    )


def digests(remote: Remote, run: str) -> dict[str, str]:
    """sha256 of every file of the run on the instance, by its path in the run."""
    lines = remote.check("read the run's files", script("digest_run_files"), run, timeout_s=600).split("\0")
    pairs = (line.split("  ", 1) for line in lines if "  " in line)
    return {name.removeprefix("./"): digest for digest, name in pairs}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def run_names(remote: Remote) -> list[str]:
    """The runs on the instance."""
    return sorted(remote.run(LIST_RUNS).stdout.split())


@contextmanager
def periodic_fetch(remote: Remote, folder: Path) -> Iterator[None]:
    """Fetch results and checkpoints at intervals meanwhile; after a failure the next time, or the end, tries again."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(FETCH_INTERVAL_S):
            with contextlib.suppress(OutsideError, InputError):
                fetch(remote, folder)

    thread = threading.Thread(target=work, name="fetch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(60)


def input_path(path: Path) -> str:
    """Where a local file or folder is kept on the instance, below inputs/: the same content, the same path."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            total.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
            total.update(bytes.fromhex(_digest(file)))
    return f"{total.hexdigest()[:12]}/{path.name}"


def send_input(remote: Remote, path: Path, root: str, log: Log) -> str:
    """Send a problems file or a model's folder, unless it is there; returns its path below ROOT/inputs.

    `root`: Fractal's folder there, in the home or on a file system.
    """
    name = input_path(path)
    remote.check("make a folder", 'mkdir -p "$1"', f"{root}/inputs/{name.split('/')[0]}")
    _send(remote, path, f"{root}/inputs/{name}", log)
    return name


def send_model(remote: Remote, folder: Path, root: str, log: Log) -> None:
    """Send a model that was prepared here to ROOT/models, where FRACTAL_MODELS refers to."""
    _send(remote, folder, f"{root}/models/{folder.name}", log)


def _send(remote: Remote, path: Path, target: str, log: Log) -> None:
    slash = "/" if path.is_dir() else ""
    options = ["--stats", "--copy-links", "--chmod=Da+rx,Fa+r"]  # readable for any user of the container
    stats = transferred(remote.rsync(*options, f"{path}{slash}", f"{remote.host}:{target}{slash}"))
    if not stats.startswith("0 files"):
        log(f"{path.name} is on the instance: {stats}")
