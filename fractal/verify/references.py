"""Problems that no program can be expected to solve: their own reference fails. Found where no sample has passed."""

from collections.abc import Mapping
from pathlib import Path

from fractal import console
from fractal.records import Label, Problem, Sample, task_order
from fractal.sandbox.host.client import Verifier
from fractal.verify.counts import count, first_line

MAX_NAMED = 5


def failing_references(sandbox: Verifier, problems: Mapping[str, Problem], labels: Path) -> list[Label]:
    """The labels of references that do not pass, of problems that have labels and no sample that passed.

    A sample that passes shows that the tests can be passed, so the others cost one run each. Problems without a
    reference are left out, and those whose expected values the reference makes: there it has been run.
    """
    unsolved = [task_id for task_id, counts in count(labels).problems.items() if not counts["passed"]]
    checked = [problems[task_id] for task_id in sorted(unsolved, key=task_order) if problems[task_id].reference]
    samples = [
        Sample(p.task_id, 0, p.reference, p.reference, "stop", 0, None, None, "reference")
        for p in checked
        if p.kind != "calls" or p.expected
    ]
    return [label for label in sandbox.verify(samples, problems) if not label.passed]


def warn_of_failing(sandbox: Verifier, problems: Mapping[str, Problem], labels: Path) -> None:
    """Name these problems in a line."""
    failing = failing_references(sandbox, problems, labels)
    if not failing:
        return
    named = [f"{label.task_id} ({label.status}: {first_line(label.detail)[:80]})" for label in failing[:MAX_NAMED]]
    more = f", and {len(failing) - MAX_NAMED} more" if len(failing) > MAX_NAMED else ""
    console.warn(
        f"verify: {len(failing)} of {len(problems)} problems cannot be solved as they are, their own reference fails: "
        f"{', '.join(named)}{more}. Correct or leave out these problems; their labels say nothing about the programs."
    )
