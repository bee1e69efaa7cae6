"""Honest programs get the label of plain evaluation: each program of `parity.py` in the sandbox and in a plain interpreter.

Plain evaluation is `exec` of program, setup and tests in one namespace, in a fork of an interpreter started with -I; it
passes if nothing is raised. All programs of a table run in one batch on either side, each test looks up its own.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fractal.records import Label, Problem, Sample
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits
from tests.parity import HONEST, KNOWN, Honest

pytestmark = pytest.mark.sandbox

# Forks one process a program, in an empty folder of its own; writes what was raised, or null where all tests held.
PLAIN = r"""
import os, sys
todo = eval(sys.stdin.read())
null = os.open(os.devnull, os.O_RDWR)
for number, (code, setup, tests) in enumerate(todo):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.mkdir(str(number))
        os.chdir(str(number))
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w')
        import signal
        signal.alarm(20)
        ns = {}
        said = None
        try:
            for part in (code, setup, *tests):
                exec(part, ns)
        except BaseException as error:
            said = type(error).__name__
        os.write(writer, repr(said).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    print(os.read(reader, 999).decode() or repr('died'), flush=True)
    os.close(reader)
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What plain evaluation raises for each program, by name; None where it passes."""
    todo = repr([(one.code, one.setup, one.tests) for one in HONEST.values()])
    folder: Path = tmp_path_factory.mktemp("plain")
    command = [sys.executable, "-I", "-c", PLAIN]
    done = subprocess.run(command, input=todo, cwd=folder, capture_output=True, text=True, timeout=500, check=True)
    said = [None if line == "None" else line.strip("'") for line in done.stdout.splitlines()]
    return dict(zip(HONEST, said, strict=True))


@pytest.fixture(scope="module")
def labels(place: dict[str, Any]) -> dict[str, Label]:
    """What the sandbox says, by name."""
    problems = {i: as_problem(i, one) for i, one in enumerate(HONEST.values())}
    samples = [Sample(i, 0, "", one.code, "stop", 0, None, None, "test") for i, one in enumerate(HONEST.values())]
    with Sandbox(limits=Limits(cpu_s=2.0, wall_s=20.0), **place) as sandbox:
        return dict(zip(HONEST, sandbox.verify(samples, problems), strict=True))


def as_problem(number: int, one: Honest) -> Problem:
    """The reference defines the program's names, but ends at once: it is run where a program is slow."""
    return Problem(number, "", one.code + "\nraise ValueError\n", list(one.tests), one.setup, "f", "test")


def test_the_table_is_large_and_names_only_what_it_has() -> None:
    assert len(HONEST) >= 120
    assert set(KNOWN) <= set(HONEST)
    json.dumps(list(KNOWN.values()))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=KNOWN[name])) if name in KNOWN else name
        for name in HONEST
    ],
)
def test_an_honest_program_has_the_label_of_plain_evaluation(
    labels: dict[str, Label], plain: dict[str, str | None], name: str
) -> None:
    """An entry of KNOWN that no longer differs fails: it is to be taken out there."""
    label = labels[name]
    assert label.status != "sandbox_error", label
    assert label.passed == (plain[name] is None), (label, plain[name])
