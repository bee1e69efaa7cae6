"""The user's project for a job of `invoke exec`: which files go to the instance, and how they get there.

They are those that git tracks in the repository around the present folder, and what `--include` names; without a
repository all of the folder. Each job has a folder of its own on the instance, ~/fractal/exec/NAME:

    source    the project's files; equal ones are hard links between jobs, and no job sees them
    work      a copy, in which the job runs; nothing that it does there reaches another job
    synced    its time tells what the job has made or changed
    fetch     patterns of the files that come home, one a line
"""

import fnmatch
import glob
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fractal.cloud.remote_host import ROOT, SYNC_EXCLUDES, Log, Remote, script, transferred
from fractal.cloud.transfer import RemoteUser
from fractal.errors import InputError

MAX_BYTES = 500_000_000
PYTHON_VALUE_OPTIONS = ("-X", "-W", "--check-hash-based-pycs")


@dataclass(frozen=True, slots=True)
class Project:
    """Files of this machine, by their paths below the root."""

    root: Path
    folder: str  # the present folder below the root, where the command runs; "" for the root itself
    files: tuple[str, ...]
    untracked: tuple[str, ...]  # that git neither tracks nor ignores, and no --include names
    outward_links: tuple[str, ...]  # symbolic links that lead out of the root; they are copied as links


class JobFolder(NamedTuple):
    """What make_job_folder.sh prints."""

    user: RemoteUser
    exists: bool  # the job has a working folder already
    earlier: tuple[str, ...]  # jobs whose files may be linked to


def read_project(present: Path, include: Iterable[str] = ()) -> Project:
    """Raises InputError if there is nothing, too much, or a pattern of `include` that names nothing."""
    present = present.resolve()
    repository = _repository(present)
    root = repository or present
    if repository is None:
        names, untracked = set(_walk(root, root)), set[str]()
    else:
        names = set(_git(root, "ls-files", "-z", "--cached", "--recurse-submodules"))
        untracked = {
            name
            for name in _git(root, "ls-files", "-z", "--others", "--exclude-standard")
            if not _excluded(Path(), name) and not name.startswith("runs/")
        }
    for pattern in include:
        names |= _included(root, present, pattern)
    sizes = dict(_sizes(root, names))
    if not sizes:
        what = "there is no file" if repository is None else "git tracks no file here. Run: git add"
        raise InputError(f"{root}: {what}; or name files, as: --include=experiments/*.py")
    _check_size(root, sizes)
    outward = tuple(sorted(name for name in sizes if _leads_out(root, name)))
    folder = present.relative_to(root).as_posix()
    return Project(
        root,
        "" if folder == "." else folder,
        tuple(sorted(sizes)),
        tuple(sorted(untracked - sizes.keys())),
        outward,
    )


def _repository(present: Path) -> Path | None:
    """The root of the git repository around this folder; None without one, or without git. Raises InputError."""
    try:
        done = subprocess.run(
            ["git", "-C", str(present), "rev-parse", "--show-toplevel"],
            capture_output=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        return None
    if done.returncode == 0:
        return Path(os.fsdecode(done.stdout.removesuffix(b"\n")))
    reason = done.stderr.decode(errors="replace").strip()
    if "not a git repository" in reason:
        return None
    raise InputError(f"{present}: git says: {reason.splitlines()[0] if reason else 'nothing'}. Mend that first.")


def _git(root: Path, *words: str) -> list[str]:
    """The names that git prints, ended by NUL. Raises InputError."""
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise InputError(f"{root}: git cannot list its files: {reason[0]}. Mend that first.")
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _walk(root: Path, folder: Path) -> Iterator[str]:
    """All files and links below a folder but those that `invoke sync` leaves out; too much is an error at once."""
    total, sizes = 0, dict[str, int]()
    for place, folders, files in os.walk(folder):
        below = Path(place).relative_to(root)
        kept = [name for name in folders if not _excluded(below, name)]
        folders[:] = [name for name in kept if not os.path.islink(os.path.join(place, name))]
        for name in [*files, *(name for name in kept if name not in folders)]:
            if not _excluded(below, name):
                path = (below / name).as_posix()
                sizes |= dict(_sizes(root, [path]))
                total += sizes.get(path, 0)
                if total > MAX_BYTES:
                    _check_size(root, sizes)
                yield path


def _excluded(below: Path, name: str) -> bool:
    whole = f"/{(below / name).as_posix()}"
    return any(
        whole == pattern if pattern.startswith("/") else fnmatch.fnmatch(name, pattern) for pattern in SYNC_EXCLUDES
    )


def _included(root: Path, present: Path, pattern: str) -> set[str]:
    check_pattern("--include", pattern)
    found = set()
    for name in glob.glob(pattern, root_dir=present, recursive=True, include_hidden=True):
        path = present / name
        if path.is_dir() and not path.is_symlink():
            found |= set(_walk(root, path))
        else:
            found.add(path.relative_to(root).as_posix())
    if not found:
        raise InputError(f"--include={pattern}: no such file in {present}.")
    return found


def _sizes(root: Path, names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Of regular files and links; what is deleted here though git tracks it is left out."""
    for name in names:
        try:
            status = os.lstat(root / name)
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
            yield name, status.st_size


def _check_size(root: Path, sizes: dict[str, int]) -> None:
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        shown = ", ".join(f"{name!r} ({sizes[name] / 1e6:.0f} MB)" for name in largest)
        raise InputError(
            f"{root}: over {MAX_BYTES / 1e6:.0f} MB would go to the instance, the largest files are {shown}. Let git "
            "ignore them; `invoke sync --dir=FOLDER` sends a folder of any size, which jobs see at /work/src/FOLDER."
        )


def _leads_out(root: Path, name: str) -> bool:
    path = root / name
    if not path.is_symlink():
        return False
    target = os.readlink(path)
    inside = os.path.normpath(os.path.join(os.path.dirname(name), target))
    return os.path.isabs(target) or inside == ".." or inside.startswith("../")


def check_pattern(option: str, pattern: str) -> None:
    """Raises InputError for a pattern that is no path below the project's folder."""
    parts = pattern.split("/")
    if (
        not pattern.strip("/. ")
        or "\n" in pattern
        or "\0" in pattern
        or pattern.startswith(("/", "~"))
        or ".." in parts
    ):
        raise InputError(
            f"{option}={pattern!r}: not a pattern of files in this folder. Write one, as {option}='*.png'."
        )


def check_script(project: Project, command: Sequence[str]) -> None:
    """Where the command is `python FILE`, the file has to be among those that are sent. Raises InputError."""
    name = script_of(command)
    if name is None:
        return
    path = os.path.normpath(os.path.join(project.folder, name))
    if os.path.isabs(name) or path.startswith("../"):
        raise InputError(f"{name}: is outside of {project.root}. Name a script of the project, by its relative path.")
    if path in project.files:
        return
    if not (project.root / path).exists():
        raise InputError(f"{name}: no such script in {project.root / project.folder}.")
    raise InputError(f"{name}: git does not track it, so it is not sent. Run: git add {name}; or --include={name}.")


def script_of(command: Sequence[str]) -> str | None:
    """The script in `python [OPTIONS] SCRIPT ...`; None for a module, a program given as text, or another command."""
    if not command or not fnmatch.fnmatch(command[0].rpartition("/")[2], "python*"):
        return None
    words = iter(command[1:])
    for word in words:
        if word in ("-", "-m", "-c") or word.startswith(("-m", "-c")):
            return None
        if word in PYTHON_VALUE_OPTIONS:
            next(words, None)
        elif not word.startswith("-"):
            return word
    return None


def make_folder(remote: Remote, name: str) -> JobFolder:
    """The job's folder on the instance, made if it is not there."""
    output = remote.check("make the job's folder", script("make_job_folder"), name)
    user, home, state, *earlier = output.splitlines()
    return JobFolder(RemoteUser(user, home), state == "exists", tuple(earlier))


def send(remote: Remote, project: Project, name: str, folder: JobFolder, patterns: Sequence[str], log: Log) -> None:
    """Send the project and make the working folder; of a job that goes on, what is newer here.

    `patterns`: of files that come home. `fetch_patterns` makes them.
    """
    names = [*project.files, *([project.folder] if project.folder else [])]
    with tempfile.NamedTemporaryFile(prefix="fractal-files-") as listing:
        listing.write(b"\0".join(os.fsencode(f"./{name}") for name in names))  # else rsync takes #name as a comment
        listing.flush()
        options = ["--stats", "--from0", f"--files-from={listing.name}"]
        options += [f"--link-dest=../../{other}/source" for other in folder.earlier]
        stats = remote.rsync(*options, f"{project.root}/", f"{remote.host}:{ROOT}/exec/{name}/source/")
    remote.check("copy the project", script("copy_job_files"), name, *patterns, timeout_s=600)
    log(f"{len(project.files)} files of {project.root} are there; sent {transferred(stats)}")


def send_results(remote: Remote, files: Path, name: str) -> None:
    """Results of an earlier instance, so that a job goes on with them; what is newer there stays."""
    remote.rsync("--update", f"{files}/", f"{remote.host}:{ROOT}/exec/{name}/work/")


def fetch_patterns(project_folder: str, patterns: Iterable[str]) -> list[str]:
    """Patterns of `find`'s -path below the working folder, for --fetch as the user wrote it.

    One with a slash is a path from the present folder; one without names files and folders at any depth. A folder
    stands for all that is in it. `*` matches slashes, too. Raises InputError.
    """
    found = []
    for pattern in patterns:
        check_pattern("--fetch", pattern)
        path = pattern.removeprefix("./").rstrip("/")
        literal = re.sub(r"[\\*?\[]", r"\\\g<0>", project_folder)
        above = os.path.join(".", literal).rstrip("/") if "/" in path else "*"
        found += [f"{above}/{path}", f"{above}/{path}/*"]
    return found
