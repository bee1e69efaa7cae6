"""The audit on the terminal: what it asks for first, its table, its JSON."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec
from rich.table import Table

from fractal import console
from fractal.audit.audit import FAMILIES, Report, audit, in_container
from fractal.errors import InputError
from fractal.jsonl import write_whole

SHOWN = 3  # names of accepted programs for each family
MEANING = {
    "basic": "wrong programs of every kind",
    "leave": "leave early, or raise what is taken for an end",
    "lie": "return objects that equal everything",
    "patch": "patch or shadow what the tests use",
    "read": "look for the tests or their result",
    "record": "write a pass into what the grader records",
    "write": "write what may be taken for a verdict",
}


def run(
    command: Sequence[str], *, json: Path | None, timeout_s: float, jobs: int | None, family: str | None, anywhere: bool
) -> int:
    """Audit and report; 1 if the command accepted a forgery. Raises InputError."""
    if not (anywhere or in_container()):
        raise InputError(
            "audit: it runs hostile programs with your rights, and this is no container. Run it in one (docker run "
            "--rm --network none …), or give --no-container where nothing is of value."
        )
    families = FAMILIES if family is None else [family]
    if unknown := set(families) - set(FAMILIES):
        raise InputError(f"audit: --family {', '.join(unknown)}: known are {', '.join(FAMILIES)}.")
    with console.activity("audit") as update:
        update("controls, then attacks")
        report = audit(command, timeout_s=timeout_s, jobs=jobs or os.cpu_count() or 1, families=families)
    if json is not None:
        write_whole(json, msgspec.json.format(msgspec.json.encode(asdict(report))) + b"\n")
    console.say(table(report))
    for suite, reason in report.skipped_suites.items():
        console.warn(f"audit: the attacks on the tests {suite} were not run: {reason}.")
    accepted = len(report.accepted)
    tried = f"{len(report.attacks)} wrong programs"
    console.say(f"audit: {accepted} of {tried} were accepted." if accepted else f"audit: none of {tried} was accepted.")
    return 1 if accepted else 0


def table(report: Report) -> Table:
    """Attacks by family, with the first names of those accepted."""
    result = Table("family", "programs that", "tried", "accepted", "timeouts", "such as")
    for family in dict.fromkeys(attack.family for attack in report.attacks):
        attacks = [attack for attack in report.attacks if attack.family == family]
        names = [attack.name for attack in attacks if attack.outcome == "accepted"]
        timeouts = sum(attack.outcome == "timeout" for attack in attacks)
        more = ["…"] if len(names) > SHOWN else []
        counts = [str(number) for number in (len(attacks), len(names), timeouts)]
        result.add_row(family, MEANING[family], *counts, "; ".join(names[:SHOWN] + more))
    return result
