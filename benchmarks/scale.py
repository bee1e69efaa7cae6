"""Memory, CPU and resumption of a run of many samples: `python benchmarks/scale.py --samples 100000,1000000`.

The generation stage as `fractal generate` runs it, with a stand-in engine that answers at once with one of the
problems' references in a chat reply. Each size is drawn by three calls, each in a process of its own: half of the
samples, the other half, and one that finds them all there.

Exit codes: 0 done; 2 bad input or usage; 130 interrupted.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is run as a script

from rich import box
from rich.table import Table

from benchmarks.verify import SHARED, machine, outcome, save, show
from fractal.errors import InputError
from fractal.generate import stage
from fractal.generate.engine import Completion, Request, Sampling, Server, never_stop
from fractal.problems.sets import load
from fractal.records import Problem
from fractal.rundir import RunDir

BATCH = 256  # completions that the stand-in engine hands out at once
MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    problems: str
    samples: list[int]


class Instant:
    """An engine that answers at once; the seed chooses the reply."""

    def __init__(self, problems: list[Problem]) -> None:
        self._replies = [f"Here it is:\n```python\n{problem.reference.strip()}\n```" for problem in problems]

    def generate(
        self, requests: Iterable[Request], should_stop: Callable[[], bool] = never_stop
    ) -> Iterator[list[Completion]]:
        batch = []
        for request in requests:
            batch.append(Completion(request, self._replies[request.seed % len(self._replies)], True, 70, -17.5))
            if len(batch) == BATCH:
                yield batch
                batch = []
                if should_stop():
                    return
        if batch:
            yield batch

    def close(self) -> None: ...


def draw(place: Path, problems: str, n: int) -> dict[str, Any]:
    """Call the stage in this process; what it cost."""
    problem_set = load(problems)
    stage.connect = lambda *_: Instant(problem_set.problems)  # type: ignore[assignment,misc]
    begin = time.perf_counter()
    with RunDir(place, create=True) as folder:
        stage.run(folder, problem_set, "stand-in", Sampling(n), "openai", server=Server("http://none/v1"))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss * 1024 / MIB,
    }


def measure(problems: str, samples: int) -> list[dict[str, Any]]:
    """The three calls, each with what it drew and found."""
    n = samples // len(load(problems).problems)
    if n < 2:
        raise InputError(f"--samples {samples}: must be at least two for each problem.")
    count = samples // n  # problems
    rows = []
    with tempfile.TemporaryDirectory(prefix="fractal-bench-") as place:
        for there, wanted in ((0, n // 2), (n // 2, n), (n, n)):
            command = [sys.executable, __file__, "--worker", f"{place}/run", problems, str(wanted)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            rows.append({"there": there * count, "drawn": (wanted - there) * count, **figures})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("there", "drawn", "s", "us a sample", "CPU us a sample", "peak MiB"):
        found.add_column(column, justify="right")
    for row in rows:
        each = row["drawn"] or row["there"]
        costs = (f"{1e6 * row[name] / each:,.0f}" for name in ("seconds", "cpu_s"))
        found.add_row(
            f"{row['there']:,}", f"{row['drawn']:,}", f"{row['seconds']:,.1f}", *costs, f"{row['peak_mib']:,.0f}"
        )
    return found


def run(given: argparse.Namespace) -> Path:
    beside = SHARED / "mbpp" / "mbpp.jsonl"
    problems = given.problems or (str(beside) if beside.exists() else "starter")
    try:
        sizes = [int(text) for text in given.samples.split(",")]
    except ValueError:
        raise InputError(f"--samples {given.samples}: expected numbers, as 100000,1000000.") from None
    rows = []
    for samples in sizes:
        rows += measure(problems, samples)
        show(table(rows[-3:]))
    return save(given.out, "scale", Plan(problems, sizes), {"machine": machine(), "rows": rows})


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/scale.py", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--samples", default="100000", help="how many in all, one size after the other, as 100000,1000000 [100000]")
    add("--problems", help="as for fractal generate [default: ../shared/mbpp/mbpp.jsonl, else starter]")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON files [runs/bench]")
    add("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        place, problems, n = given.worker
        print(json.dumps(draw(Path(place), problems, int(n))))
        return 0
    return outcome(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
