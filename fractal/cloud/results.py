"""A run's folder on both sides: home while the stage runs, verified by digest at its end; back to a fresh machine.

rsync carries; this module decides the direction. The run belongs to whoever has more of it: records only grow.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout

from fractal.cloud.remote import ROOT, Remote, RemoteError, Say, sent
from fractal.errors import InputError, OutsideError

EVERY_S = 20.0
LOCK_TIMEOUT_S = 30.0
RECORDS = ("samples.jsonl", "labels.jsonl", "outputs.jsonl", "scores.jsonl", "selection.jsonl")
NEVER = (".lock", ".rsync-partial", ".*.lock", ".manifest.json.*")  # a process's own, on either side
EXCLUDES = tuple(f"--exclude={name}" for name in NEVER)
PREPARE = f"""\
cd && mkdir -p "{ROOT}/runs/$1" {ROOT}/inputs {ROOT}/models || exit 1
echo "$(id -u):$(id -g)"; pwd
if nvidia-smi -L 2> /dev/null; then :; fi
"""
DRIVER = "nvidia-smi --query-gpu=driver_version,name --format=csv,noheader 2> /dev/null"
LOOK = f"""\
cd "{ROOT}/runs/$1" 2> /dev/null || exit 0
for name in {" ".join(RECORDS)}; do [ -e $name ] && echo "$(wc -c < $name) $name"; done
[ ! -e manifest.json ] || {{ echo manifest; cat manifest.json; }}
"""
DIGESTS = f"""\
cd "{ROOT}/runs/$1" || exit 1
find . \\( {" -o ".join(f"-name '{name}'" for name in NEVER)} \\) -prune -o -type f -exec sha256sum {{}} +
"""
RUNS = f'cd {ROOT}/runs 2> /dev/null && find . -mindepth 2 -maxdepth 2 -name manifest.json | sed "s#^./##; s#/.*##"'


@dataclass(frozen=True, slots=True)
class Place:
    """What the machine offers a run."""

    user: str  # "uid:gid" of the one who owns its files
    home: str
    gpus: tuple[str, ...]  # as `nvidia-smi -L` names them


class Driver(NamedTuple):
    """The machine's NVIDIA driver, and the GPUs that it drives."""

    version: str  # "580.95.05"; empty where there is none
    cards: tuple[str, ...]  # names


@dataclass(frozen=True, slots=True)
class State:
    """How far a run's folder got, on one side."""

    created: str | None  # the manifest's time stamp: which run it is; None where there is none
    sizes: Mapping[str, int]  # bytes of the record files


def prepare(remote: Remote, run: str) -> Place:
    lines = remote.must("make the run's folder", PREPARE, run).splitlines()
    return Place(lines[0], lines[1], tuple(line for line in lines[2:] if line.startswith("GPU ")))


def driver(remote: Remote) -> Driver:
    return parse_driver(remote.run(DRIVER).stdout)


def parse_driver(text: str) -> Driver:
    """`text`: a line "580.95.05, NVIDIA H100 80GB HBM3" for each GPU; what is no such line counts for nothing."""
    pairs = [line.strip().split(", ", 1) for line in text.splitlines() if re.match(r"\d+\.\d+[\d.]*, ", line)]
    return Driver(pairs[0][0] if pairs else "", tuple(name for _, name in pairs))


def there(remote: Remote, run: str) -> State:
    return parse_state(remote.must("read the run's folder", LOOK, run))


def parse_state(text: str) -> State:
    records, marker, manifest = text.partition("manifest\n")
    sizes = {}
    for line in records.splitlines():
        size, _, name = line.strip().partition(" ")
        if name in RECORDS and size.isdigit():
            sizes[name] = int(size)
    return State(_created(manifest) if marker else None, sizes)


def here(folder: Path) -> State:
    manifest = folder / "manifest.json"
    sizes = {name: (folder / name).stat().st_size for name in RECORDS if (folder / name).exists()}
    return State(_created(manifest.read_text()) if manifest.exists() else None, sizes)


def _created(manifest: str) -> str:
    try:
        return str(json.loads(manifest)["created"])
    except (ValueError, KeyError, TypeError):
        return "unreadable"


def direction(ours: State, theirs: State, run: str) -> Literal["fetch", "send", "neither"]:
    """Who has more of the run. Raises InputError where they are two runs, or each has what the other lacks."""
    if theirs.created is None:
        return "send" if ours.created else "neither"
    if ours.created is None:
        return "fetch"
    if ours.created != theirs.created:
        raise InputError(
            f"runs/{run} here (made {ours.created}) and the one on the machine (made {theirs.created}) are two runs. "
            "Name another --run, or move one of them away."
        )
    names = set(ours.sizes) | set(theirs.sizes)
    more = [name for name in names if ours.sizes.get(name, 0) > theirs.sizes.get(name, 0)]
    less = [name for name in names if ours.sizes.get(name, 0) < theirs.sizes.get(name, 0)]
    if more and less:
        raise InputError(
            f"runs/{run} went on in both places: {', '.join(sorted(more))} is longer here, {', '.join(sorted(less))} "
            "on the machine. Move one of the two folders away; both are untouched."
        )
    return "send" if more else "fetch"


def exchange(remote: Remote, folder: Path, say: Say) -> None:
    """Before a job: both sides as far as the farther one. Raises InputError."""
    ours, theirs = here(folder), there(remote, folder.name)
    match direction(ours, theirs, folder.name):
        case "fetch":
            fetch(remote, folder)
        case "send":
            send(remote, folder, say)


def send(remote: Remote, folder: Path, say: Say) -> None:
    """The run as it is here, to a machine that has less of it."""
    said = remote.rsync("--stats", *EXCLUDES, f"{folder}/", _place(remote, folder))
    say(f"{folder} goes on over there: sent {sent(said)}")


def fetch(remote: Remote, folder: Path, *how: str) -> str:
    """What is new of the run comes home; what, in few words. A file is replaced whole, never half.

    `how`: further options of rsync.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        return sent(remote.rsync("--stats", *how, *EXCLUDES, _place(remote, folder), f"{folder}/"))


def _place(remote: Remote, folder: Path) -> str:
    """The run's folder over there, as rsync names it."""
    return f"{remote.host}:{ROOT}/runs/{folder.name}/"


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """No stage works in the folder here meanwhile. Raises InputError."""
    try:
        with FileLock(folder / ".lock", timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout:
        raise InputError(f"{folder}: another process works in this run here. Wait for it, then fetch again.") from None
    except OSError as error:
        raise OutsideError(f"{folder}: cannot be written: {error.strerror}. Check owner and disk.") from error


def settle(remote: Remote, folder: Path) -> str:
    """The last fetch, proven: every file over there has the same sha256 here. Raises RemoteError."""
    total = fetch(remote, folder)
    for attempt in range(3):
        expected = digests(remote, folder.name)
        wrong = [name for name, digest in expected.items() if _digest(folder / name) != digest]
        if not wrong:
            size = sum((folder / name).stat().st_size for name in expected)
            return f"{len(expected)} files, {size / 1e6:.1f} MB, digests equal; new now: {total}"
        if attempt < 2:  # a job still writes, or the disk here lies: by content this time
            fetch(remote, folder, "--checksum")
    raise RemoteError(
        f"{len(wrong)} files of {folder} are not as on {remote.host}, {wrong[0]} first. Does something write them? "
        f"Run: invoke fetch --run={folder}"
    )


def digests(remote: Remote, run: str) -> dict[str, str]:
    """sha256 of every file of the run over there, by its path in the run."""
    lines = remote.must("read the run's files", DIGESTS, run, timeout_s=600).splitlines()
    pairs = (line.split("  ", 1) for line in lines if "  " in line)
    return {name.removeprefix("./"): digest for digest, name in pairs}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def names(remote: Remote) -> list[str]:
    """The runs over there."""
    return sorted(remote.run(RUNS).stdout.split())


@contextmanager
def coming_home(remote: Remote, folder: Path, every_s: float = EVERY_S) -> Iterator[None]:
    """Results and checkpoints are fetched again and again meanwhile; a failure waits for the next time, or the end."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(every_s):
            with contextlib.suppress(OutsideError, InputError):
                fetch(remote, folder)

    thread = threading.Thread(target=work, name="fetch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(60)


def input_place(path: Path) -> str:
    """Where a file or folder from here lies over there, below ~/fractal/inputs: the same content, the same place."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            stat = file.stat()
            total.update(f"{file.relative_to(path)}\0{stat.st_size}\0".encode())
            with file.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
    return f"{total.hexdigest()[:12]}/{path.name}"


def send_input(remote: Remote, path: Path, say: Say) -> str:
    """A problems file or a model's folder from here; its path below ~/fractal/inputs. Sent once."""
    place = input_place(path)
    remote.must("make a folder", f'mkdir -p "{ROOT}/inputs/$1"', place.split("/")[0])
    _copy(remote, path, f"inputs/{place}", say)
    return place


def send_model(remote: Remote, folder: Path, say: Say) -> None:
    """A model that was prepared here, to ~/fractal/models, where FRACTAL_MODELS looks."""
    _copy(remote, folder, f"models/{folder.name}", say)


def _copy(remote: Remote, path: Path, place: str, say: Say) -> None:
    ends = "/" if path.is_dir() else ""
    words = ["--stats", "--copy-links", "--chmod=Da+rx,Fa+r"]  # whoever the container's user is
    said = sent(remote.rsync(*words, f"{path}{ends}", f"{remote.host}:{ROOT}/{place}{ends}"))
    if not said.startswith("0 files"):
        say(f"{path.name} is over there: {said}")
