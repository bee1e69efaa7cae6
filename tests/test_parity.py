"""Honest programs (tests/data/parity) get the label of plain evaluation; each family in one call.

Plain evaluation is `exec` of program, setup and tests in one namespace, in a fork of an interpreter started with -I; it
passes if nothing is raised. A program whose header has `differs` is a known difference, with its reason.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal.records import Problem, Sample
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits
from tests.programs import DATA, Program, read_programs

pytestmark = pytest.mark.sandbox
FILES = sorted((DATA / "parity").glob("*.txt"))

# Forks a process for each program, in an empty folder of its own; prints what was raised, or None where all tests held.
PLAIN_EVALUATION = r"""
import os, sys
programs = eval(sys.stdin.read())
null = os.open(os.devnull, os.O_RDWR)
for number, (code, setup, tests) in enumerate(programs):
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
        namespace = {}
        raised = None
        try:
            for part in (code, setup, *tests):
                exec(part, namespace)
        except BaseException as error:
            raised = type(error).__name__
        os.write(writer, repr(raised).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    print(os.read(reader, 999).decode() or repr('died'), flush=True)
    os.close(reader)
"""


@pytest.fixture(scope="module")
def patient(place: dict[str, Any]) -> Iterator[Sandbox]:
    """With a wall limit that results of 50 MB do not reach on a busy machine."""
    with Sandbox(limits=Limits(cpu_s=2.0, wall_s=20.0), **place) as sandbox:
        yield sandbox


def evaluate_plainly(programs: list[Program], folder: Path) -> list[str | None]:
    """What plain evaluation raises for each program; None where it passes."""
    text = repr([(program.code, program.setup, program.tests) for program in programs])
    command = [sys.executable, "-I", "-c", PLAIN_EVALUATION]
    done = subprocess.run(command, input=text, cwd=folder, capture_output=True, text=True, timeout=500, check=True)
    return [None if line == "None" else line.strip("'") for line in done.stdout.splitlines()]


def as_problem(number: int, program: Program) -> Problem:
    """The reference defines the program's names, but ends at once: it is run where a program is slow."""
    reference = program.code + "\nraise ValueError\n"
    return Problem(str(number), "", reference, list(program.tests), program.setup, "f", "test")


def test_the_families_are_large() -> None:
    programs = [program for path in FILES for program in read_programs(path).values()]
    assert len(programs) >= 349
    assert sum("differs" in program.options for program in programs) <= 67
    assert all(program.tests for program in programs)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_honest_program_has_the_label_of_plain_evaluation(patient: Sandbox, tmp_path: Path, path: Path) -> None:
    """A known difference that is none any more fails, too: `differs` is to be taken out of its header."""
    programs = list(read_programs(path).values())
    problems = {str(number): as_problem(number, program) for number, program in enumerate(programs)}
    samples = [Sample(str(i), 0, "", program.code, "stop", 0, None, None, "test") for i, program in enumerate(programs)]
    labels = list(patient.verify(samples, problems))
    raised = evaluate_plainly(programs, tmp_path)
    assert [label for label in labels if label.status == "sandbox_error"] == []
    wrong = [
        (program.name, label.status, label.detail, error)
        for program, label, error in zip(programs, labels, raised, strict=True)
        if (label.passed == (error is None)) == ("differs" in program.options)
    ]
    assert wrong == []
