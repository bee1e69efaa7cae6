"""Same input, same labels: any number of slots, any order, a busy machine; and many samples through one container."""

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import docker
import pytest

from fractal.problems.formats import read_problems
from fractal.problems.sets import STARTER
from fractal.records import Label, Problem, Sample
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits

pytestmark = [pytest.mark.docker, pytest.mark.long]
PROBLEMS = {p.task_id: p for p in read_problems(STARTER)}
TASK = "10000"
PROBLEMS[TASK] = Problem(TASK, "", "def f(x):\n    return x\n", ["assert f(1) == 1", "assert f('a') == 'a'"], "", "f", "test")  # fmt: skip
ODD = {
    "spins": "def f(x):\n    while True:\n        pass\n",
    "sleeps": "import time\ndef f(x):\n    time.sleep(99)\n",
    "spins for a while": "import time\ndef f(x):\n    while time.process_time() < 0.4:\n        pass\n    return x\n",
    "sleeps for a while": "import time\ndef f(x):\n    time.sleep(0.4)\n    return x\n",
    "memory": "def f(x):\n    return [0] * (1 << 30)\n",
    "recursion": "def f(x):\n    return f(x)\n",
    "leaves": "import os\ndef f(x):\n    os._exit(0)\n",
    "crashes": "import ctypes\ndef f(x):\n    ctypes.string_at(0)\n",
    "sets": "def f(x):\n    return sorted({'b', 'a', x}, key=hash)\n",
    "random": "import random\ndef f(x):\n    return x if random.random() > 0.5 else None\n",
    "prints": "def f(x):\n    print(x)\n    return None\n",
    "opens": "def f(x):\n    return open('/etc/shadow').read()\n",
    "is fine": "def f(x):\n    return x\n",
}


def samples() -> list[Sample]:
    """References, references cut in half, and odd programs."""
    codes = [
        (p.task_id, text) for p in PROBLEMS.values() for text in (p.reference, p.reference[: len(p.reference) // 2])
    ]
    codes += [(TASK, code) for code in ODD.values()]
    return [Sample(task, i, "", code, "stop", 0, None, None, "t") for i, (task, code) in enumerate(codes)]


@contextmanager
def busy(loops: int) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def labels(image: str, order: list[Sample], **options: Any) -> dict[int, tuple[str, list[str]]]:
    with Sandbox(limits=Limits(cpu_s=1.0, wall_s=3.0), image=image, **options) as sandbox:
        found: list[Label] = list(sandbox.verify(order, PROBLEMS))
    return {label.sample_id: (label.status, list(label.tests)) for label in found}


def test_labels_do_not_depend_on_slots_order_cache_isolation_or_load(image: str) -> None:
    work = samples()
    first = labels(image, work, slots=2)
    assert first[len(work) - 1][0] == "passed"
    shuffled = list(work)
    random.Random(1).shuffle(shuffled)
    assert labels(image, shuffled, slots=1, cache=False) == first
    assert labels(image, work[::-1], slots=4, isolate=True) == first
    with busy(4):
        assert labels(image, work, slots=3) == first


def test_thousands_of_samples_leave_nothing_behind(image: str) -> None:
    """No zombie, no process, no file, no growing memory, though every tenth program does harm."""
    harm = [
        ODD["leaves"],
        ODD["crashes"],
        ODD["recursion"],
        "open('a', 'w').write('x' * 9999)\ndef f(x):\n    return x\n",
    ]
    work = []
    for i in range(6000):
        code = harm[i // 10 % len(harm)] if i % 10 == 0 else f"def f(x):\n    return x if {i} else None\n"
        work.append(Sample(TASK, i, "", code, "stop", 0, None, None, "t"))
    with Sandbox(limits=Limits(cpu_s=1.0, wall_s=3.0), image=image, cache=False) as sandbox:
        container = docker.from_env().containers.get(sandbox._connection.container)
        list(sandbox.verify(work[:2000], PROBLEMS))
        before = container.stats(stream=False)["memory_stats"]["usage"]
        processes = len(container.top()["Processes"])
        found = list(sandbox.verify(work[2000:], PROBLEMS))
        after = container.stats(stream=False)["memory_stats"]["usage"]
        top = container.top()["Processes"]
    assert abs(len(top) - processes) <= 2  # shared candidates, there or about to be
    assert not [row for row in top if "defunct" in " ".join(row)]
    assert after < before + (32 << 20)
    assert sum(label.passed for label in found) == 3600 + 100
    assert not [label for label in found if label.status == "sandbox_error"]
