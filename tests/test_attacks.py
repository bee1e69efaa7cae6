"""Wrong programs, forbidden acts and poison from `attacks.py` against the real sandbox, many to a call.

Each table runs once with two slots and once with one, in a shuffled order, neighbours after every entry; then each test
looks up its own labels. An entry marked `alone` may use up what all share: it has a container of its own.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from fractal.records import Label, Problem, Sample
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits
from tests.attacks import ATTACKS, CONTAINED, NEIGHBOURS, POISON, SUITES, Attack

pytestmark = pytest.mark.sandbox
LIMITS = Limits(cpu_s=1.0, wall_s=3.0)
LONGEST_S = LIMITS.wall_s + 2.0  # a judge is replaced 0.8 s after the wall limit; the rest is for a busy machine
TASKS = {name: number for number, name in enumerate(SUITES)}
PROBLEMS = {
    TASKS[name]: Problem(TASKS[name], name, suite.reference, list(suite.tests), suite.setup, "f", "test")
    for name, suite in SUITES.items()
}
TOGETHER = {name: attack for name, attack in ATTACKS.items() if not attack.alone}
ALONE = {name: attack for name, attack in ATTACKS.items() if attack.alone}
USUAL = ("right", "wrong")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one attack and of the programs that ran after it."""

    label: Label
    neighbours: dict[str, Label]


def run(sandbox: Sandbox, table: Mapping[str, Attack], neighbours: tuple[str, ...]) -> dict[str, Outcome]:
    """The outcome of each entry. The order is shuffled, the same in each run; identical programs run again."""
    order = list(table)
    random.Random(7).shuffle(order)
    queue: list[tuple[str, str, Sample]] = []
    for name in order:
        queue.append((name, "", sample(table[name].code, table[name].suite)))
        queue += [(name, neighbour, sample(NEIGHBOURS[neighbour][0], "double")) for neighbour in neighbours]
    labels: dict[str, dict[str, Label]] = {name: {} for name in order}
    for (name, which, _), label in zip(queue, sandbox.verify([one for _, _, one in queue], PROBLEMS), strict=True):
        labels[name][which] = label
    return {name: Outcome(found.pop(""), found) for name, found in labels.items()}


def sample(code: str, suite: str) -> Sample:
    return Sample(TASKS[suite], 0, "", code, "stop", 0, None, None, "test")


def changed(outcome: Outcome) -> dict[str, tuple[str, str]]:
    """Neighbours whose status is not their own: {name: (status, detail)}."""
    return {
        name: (label.status, label.detail[:200])
        for name, label in outcome.neighbours.items()
        if label.status != NEIGHBOURS[name][1]
    }


@pytest.fixture(scope="module", params=[2, 1], ids=["two slots", "one slot"])
def two_and_one(request: pytest.FixtureRequest, place: dict[str, Any]) -> Iterator[Sandbox]:
    with Sandbox(limits=LIMITS, slots=request.param, cache=False, **place) as one:
        yield one


@pytest.fixture(scope="module")
def attacked(two_and_one: Sandbox) -> dict[str, Outcome]:
    return run(two_and_one, TOGETHER, USUAL)


@pytest.fixture(scope="module")
def contained(two_and_one: Sandbox) -> dict[str, Outcome]:
    return run(two_and_one, CONTAINED, USUAL)


@pytest.fixture(scope="module")
def poisoned(two_and_one: Sandbox) -> dict[str, Outcome]:
    return run(two_and_one, POISON, tuple(NEIGHBOURS))


@pytest.fixture
def crowd(place: dict[str, Any]) -> Iterator[Sandbox]:
    with Sandbox(limits=LIMITS, slots=2, cache=False, **place) as one:
        yield one


def test_the_tables_are_large_and_every_entry_is_its_own() -> None:
    codes = [(attack.code, attack.suite) for attack in [*ATTACKS.values(), *CONTAINED.values()]]
    assert len(set(codes)) == len(codes)
    assert (len(ATTACKS) >= 200, len(CONTAINED) >= 60, len(POISON) >= 30) == (True, True, True)


def test_every_suite_passes_its_reference_and_every_neighbour_has_its_status(crowd: Sandbox) -> None:
    """Without this the attacks could fail for the wrong reason."""
    labels = crowd.verify([sample(suite.reference, name) for name, suite in SUITES.items()], PROBLEMS)
    assert [(name, v.status, v.detail) for name, v in zip(SUITES, labels, strict=True) if not v.passed] == []
    labels = crowd.verify([sample(code, "double") for code, _ in NEIGHBOURS.values()], PROBLEMS)
    found = [(name, label.status, label.detail[:300]) for name, label in zip(NEIGHBOURS, labels, strict=True)]
    assert [one for one in found if one[1] != NEIGHBOURS[one[0]][1]] == []


@pytest.mark.parametrize("name", TOGETHER)
def test_a_wrong_program_is_never_passed(attacked: dict[str, Outcome], name: str) -> None:
    """It gets a label (never sandbox_error, which is ours), the label is not passed, and it holds its slot no longer."""
    label = attacked[name].label
    assert label.status not in ("passed", "sandbox_error"), label
    assert label.seconds < LONGEST_S, label


@pytest.mark.parametrize("name", TOGETHER)
def test_a_wrong_program_changes_no_other_label(attacked: dict[str, Outcome], name: str) -> None:
    assert changed(attacked[name]) == {}


@pytest.mark.parametrize("name", CONTAINED)
def test_a_forbidden_act_never_succeeds(contained: dict[str, Outcome], name: str) -> None:
    """The program returns the right answer only if the act succeeded."""
    label = contained[name].label
    assert label.status in ("forbidden", "error", "crashed", "memory"), label


@pytest.mark.parametrize("name", CONTAINED)
def test_a_forbidden_act_changes_no_other_label(contained: dict[str, Outcome], name: str) -> None:
    assert changed(contained[name]) == {}


@pytest.mark.parametrize("name", POISON)
def test_poison_reaches_no_neighbour(poisoned: dict[str, Outcome], name: str) -> None:
    """What ran before or beside leaves nothing: right neighbours pass, wrong ones find no help."""
    assert changed(poisoned[name]) == {}


@pytest.mark.parametrize("name", POISON)
def test_poison_has_a_label_of_its_own(poisoned: dict[str, Outcome], name: str) -> None:
    label = poisoned[name].label
    assert label.status != "sandbox_error", label
    assert label.seconds < LONGEST_S, label


@pytest.mark.parametrize("name", ALONE)
def test_a_hog_ends_with_a_label_and_alone(crowd: Sandbox, name: str) -> None:
    """What fills the judge's memory, or keeps it busy in C, is the program's fault and nobody else's."""
    attack = ALONE[name]
    right, wrong = (sample(NEIGHBOURS[which][0], "double") for which in USUAL)
    queue = [right, wrong, sample(attack.code, attack.suite), right, wrong, right, wrong]
    labels = list(crowd.verify(queue, PROBLEMS))
    hog = labels.pop(2)
    assert hog.status not in ("passed", "sandbox_error"), hog
    assert hog.seconds < LONGEST_S, hog
    assert [label.status for label in labels] == ["passed", "failed"] * 3
