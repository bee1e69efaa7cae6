"""Wrong programs, forbidden acts and poison (tests/data/attacks) against the real sandbox, a family in one call.

Each family runs with two slots, and in the long set with one, in a shuffled order, neighbours after every program: honest
and wrong ones whose status must stay their own. A program marked `alone` may use up what all share: it has a container
of its own.
"""

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from fractal.audit import audit
from fractal.records import Label, Problem, Sample
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits
from tests.programs import DATA, Program, read_programs

pytestmark = pytest.mark.sandbox
FOLDER = DATA / "attacks"
FAMILIES = (*audit.FAMILIES, "forge", "harm")
LIMITS = Limits(cpu_s=1.0, wall_s=3.0)
LONGEST_S = LIMITS.wall_s + 2.0  # a judge is replaced 0.8 s after the wall limit; the rest is for a busy machine
SUITES = read_programs(audit.ATTACKS / "suites.txt") | read_programs(FOLDER / "kinds.txt")
TASKS = {name: str(number) for number, name in enumerate(SUITES)}


def suite_problem(name: str, suite: Program) -> Problem:
    kind: Any = suite.options.get("kind", "asserts")
    compare, expected = suite.options.get("compare", ""), list(suite.expected)
    tests = list(suite.tests)
    entry = "" if kind == "stdin" else "f"
    return Problem(TASKS[name], name, suite.code, tests, suite.setup, entry, "test", kind, expected, compare=compare)


PROBLEMS = {TASKS[name]: suite_problem(name, suite) for name, suite in SUITES.items()}
BY_CALLS = [
    pytest.param(
        name, suite, marks=() if name in ("basic", "lie", "forge") and "given" not in suite else pytest.mark.long
    )
    for name in FAMILIES
    for suite in ("double by calls", "double by given calls", "a set by calls")
]
NEIGHBOURS = read_programs(FOLDER / "neighbours.txt")
USUAL = ("right", "wrong")
# Before each forbidden act: the act is refused by an exception, however it is made.
FORBIDDEN_PRELUDE = (FOLDER / "forbidden_prelude.txt").read_text()
# Before each program marked `raw`, which speaks the channel's protocol itself.
RAW_PRELUDE = (FOLDER / "prelude.txt").read_text()


def family(name: str) -> dict[str, Program]:
    """Those that forge a verdict stand in the package: `fractal audit` runs them against other graders."""
    return read_programs((audit.ATTACKS if name in audit.FAMILIES else FOLDER) / f"{name}.txt")


def sample(program: Program) -> Sample:
    code = RAW_PRELUDE + program.code if "raw" in program.options else program.code
    return code_sample(code, program.options.get("tests", "double"))


def code_sample(code: str, suite: str = "double") -> Sample:
    return Sample(TASKS[suite], 0, "", code, "stop", 0, None, None, "test")


def run(
    sandbox: Sandbox, programs: Mapping[str, Sample], neighbours: Collection[str] = USUAL
) -> tuple[dict[str, Label], list[object]]:
    """The label of each program, and the neighbours that did not keep their status.

    The order is shuffled, the same in each run; identical programs run again.
    """
    order = list(programs)
    random.Random(7).shuffle(order)
    queue: list[tuple[str, str, Sample]] = []
    for name in order:
        queue.append((name, "", programs[name]))
        queue += [(name, neighbour, code_sample(NEIGHBOURS[neighbour].code)) for neighbour in neighbours]
    labels: dict[str, Label] = {}
    changed: list[object] = []
    verified = sandbox.verify([queued for _, _, queued in queue], PROBLEMS)
    for (name, neighbour, _), label in zip(queue, verified, strict=True):
        if not neighbour:
            labels[name] = label
        elif label.status != NEIGHBOURS[neighbour].options["status"]:
            changed.append((name, neighbour, label.status, label.detail[:200]))
    return labels, changed


def offenders(labels: Mapping[str, Label]) -> list[object]:
    """Wrong programs that passed, were no label (sandbox_error is our fault), or held their slot too long."""
    return [
        (name, label)
        for name, label in labels.items()
        if label.status in ("passed", "sandbox_error") or label.seconds >= LONGEST_S
    ]


@pytest.fixture(scope="module", params=[2, pytest.param(1, marks=pytest.mark.long)], ids=["two slots", "one slot"])
def attacked(request: pytest.FixtureRequest, place: dict[str, Any]) -> Iterator[Sandbox]:
    with Sandbox(limits=LIMITS, slots=request.param, cache=False, **place) as sandbox:
        yield sandbox


def test_the_families_are_large_and_every_program_is_its_own() -> None:
    programs = [program for name in FAMILIES for program in family(name).values()]
    assert len({(program.code, program.options.get("tests")) for program in programs}) == len(programs)
    sizes = len(programs), len(family("forbidden")), len(family("poison"))
    assert sizes >= (499, 196, 116), "a family has lost programs"


def test_every_suite_passes_its_reference_and_every_neighbour_has_its_status(attacked: Sandbox) -> None:
    """Without this the attacks could fail for the wrong reason."""
    labels = list(attacked.verify([code_sample(suite.code, name) for name, suite in SUITES.items()], PROBLEMS))
    assert [(name, v.status, v.detail) for name, v in zip(SUITES, labels, strict=True) if not v.passed] == []
    labels = list(attacked.verify([code_sample(program.code) for program in NEIGHBOURS.values()], PROBLEMS))
    wrong = [
        (name, label.status, label.detail[:300])
        for (name, program), label in zip(NEIGHBOURS.items(), labels, strict=True)
        if label.status != program.options["status"]
    ]
    assert wrong == []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_program_is_never_passed_and_changes_no_other_label(attacked: Sandbox, name: str) -> None:
    programs = {program.name: sample(program) for program in family(name).values() if "alone" not in program.options}
    labels, changed = run(attacked, programs)
    assert offenders(labels) == []
    assert changed == []


@pytest.mark.parametrize(("name", "suite"), BY_CALLS)
def test_a_wrong_program_is_never_passed_by_calls(attacked: Sandbox, name: str, suite: str) -> None:
    """The same programs, where the arguments go to them and what they return is compared."""
    programs = {
        program.name: replace(sample(program), task_id=TASKS[suite])
        for program in family(name).values()
        if not {"alone", "tests"} & program.options.keys()
    }
    labels, changed = run(attacked, programs)
    assert offenders(labels) == []
    assert changed == []


def test_a_wrong_script_is_never_passed_and_changes_no_other_label(attacked: Sandbox) -> None:
    scripts = {name: code_sample(program.code, "a sum by standard input") for name, program in family("script").items()}
    labels, changed = run(attacked, scripts)
    assert offenders(labels) == []
    assert changed == []


def test_a_forbidden_act_never_succeeds_and_changes_no_other_label(attacked: Sandbox) -> None:
    """The program returns the right answer only if the act succeeded."""
    programs = {}
    for program in family("forbidden").values():
        body = "".join(f"    {line}\n" for line in program.code.rstrip("\n").split("\n"))
        programs[program.name] = code_sample(f"{FORBIDDEN_PRELUDE}def f(x):\n{body}    return x * 2\n")
    labels, changed = run(attacked, programs)
    refused = ("forbidden", "error", "crashed", "memory")
    assert [(name, label) for name, label in labels.items() if label.status not in refused] == []
    assert changed == []


def test_poison_reaches_no_neighbour(attacked: Sandbox) -> None:
    """What ran before or beside leaves nothing: right neighbours pass, wrong ones find no help."""
    labels, changed = run(
        attacked, {program.name: sample(program) for program in family("poison").values()}, NEIGHBOURS
    )
    broken = ("sandbox_error",)
    assert [(n, v) for n, v in labels.items() if v.status in broken or v.seconds >= LONGEST_S] == []
    assert changed == []


def test_every_ending_has_its_status(attacked: Sandbox) -> None:
    endings = family("endings")
    labels, changed = run(attacked, {name: sample(program) for name, program in endings.items()})
    wrong = [(name, label) for name, label in labels.items() if label.status != endings[name].options["status"]]
    assert wrong == []
    assert changed == []


ALONE = [program.name for name in FAMILIES for program in family(name).values() if "alone" in program.options]


@pytest.mark.long
@pytest.mark.parametrize("name", ALONE)
def test_a_program_that_uses_up_what_is_shared_ends_with_a_label_and_alone(name: str, place: dict[str, Any]) -> None:
    """What fills the judge's memory, or keeps it busy in C, is the program's fault and nobody else's."""
    program = family(name.split(" / ")[0])[name]
    right, wrong = (code_sample(NEIGHBOURS[which].code) for which in USUAL)
    with Sandbox(limits=LIMITS, slots=2, cache=False, **place) as sandbox:
        labels = list(sandbox.verify([right, wrong, sample(program), right, wrong, right, wrong], PROBLEMS))
    label = labels.pop(2)
    assert offenders({name: label}) == []
    assert [neighbour.status for neighbour in labels] == ["passed", "failed"] * 3
