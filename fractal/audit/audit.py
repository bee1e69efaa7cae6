"""`fractal audit -- COMMAND`: which wrong programs another grader accepts.

COMMAND gets a program and its tests as files and exits with 0 for "passed". Before the attacks come controls: for each
set of tests a right program, which COMMAND has to accept, and a wrong one, which it has to refuse. The programs are
hostile, and run with the rights of whoever calls this.
"""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fractal.audit.programs import Program, read_programs
from fractal.errors import InputError

ATTACKS = Path(__file__).with_name("attacks")
FAMILIES = ("basic", "leave", "lie", "patch", "read", "record", "write")
WRONG = "def f(*args, **kwargs):\n    return None\n"
FIRST_SUITE = "double"  # a command that cannot judge this one is not used rightly
# Their tests pass programs that raise, in plain evaluation, too: accepting one is no forgery.
LENIENT_SUITES = frozenset({"bare", "finally"})
PLACEHOLDERS = ("{program}", "{tests}", "{file}")
CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv")
CONTROL_GROUPS = ("docker", "kubepods", "containerd", "libpod", "lxc")

Outcome = Literal["accepted", "refused", "timeout"]


@dataclass(frozen=True, slots=True)
class Attack:
    """A wrong program, and what the command made of it."""

    family: str
    name: str
    suite: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Report:
    """What a command did with the programs."""

    command: list[str]
    attacks: list[Attack]
    skipped_suites: dict[str, str]  # why their attacks were not run

    @property
    def accepted(self) -> list[Attack]:
        return [attack for attack in self.attacks if attack.outcome == "accepted"]


def in_container() -> bool:
    """Whether this process seems to run inside a container."""
    named = os.environ.get("container")  # noqa: SIM112  (set by podman and systemd)
    if named or any(Path(name).exists() for name in CONTAINER_FILES):
        return True
    try:
        groups = Path("/proc/1/cgroup").read_text()
    except OSError:
        return False
    return any(name in groups for name in CONTROL_GROUPS)


def check_command(command: Sequence[str]) -> None:
    """Raise InputError unless the command takes both a program and tests."""
    used = {name for name in PLACEHOLDERS if any(name in word for word in command)}
    if used not in ({"{file}"}, {"{program}", "{tests}"}):
        raise InputError(
            "audit: COMMAND takes either {file}, which holds program and tests, or both {program} and {tests}, as in: "
            "fractal audit -- python {file}"
        )


def audit(command: Sequence[str], *, timeout_s: float, jobs: int, families: Sequence[str] = FAMILIES) -> Report:
    """Run the controls and then every attack. Raises InputError where the controls show that nothing can be learnt."""
    check_command(command)
    suites = read_programs(ATTACKS / "suites.txt")
    programs = [
        (family, program, suite)
        for family in families
        for program in read_programs(ATTACKS / f"{family}.txt").values()
        if (suite := program.options.get("tests", FIRST_SUITE)) not in LENIENT_SUITES
    ]
    needed = sorted({suite for _, _, suite in programs} | {FIRST_SUITE})
    with ThreadPoolExecutor(jobs) as threads:

        def outcome(code: str, suite: str) -> Outcome:
            return run(command, code, suites[suite], timeout_s)

        right = list(threads.map(lambda suite: outcome(suites[suite].code, suite), needed))
        wrong = list(threads.map(lambda suite: outcome(WRONG, suite), needed))
        skipped = dict(_unfit(needed, right, wrong))
        if FIRST_SUITE in skipped:
            raise InputError(
                f"audit: the command is not used rightly: {skipped[FIRST_SUITE]}. It has to exit with 0 for a program "
                f"that passes and with another code otherwise, within {timeout_s:g} s (--timeout)."
            )
        fit = [(family, program, suite) for family, program, suite in programs if suite not in skipped]
        outcomes = threads.map(lambda item: outcome(item[1].code, item[2]), fit)
        attacks = [
            Attack(family, program.name.partition(" / ")[2], suite, result)
            for (family, program, suite), result in zip(fit, outcomes, strict=True)
        ]
    return Report(list(command), attacks, skipped)


def _unfit(suites: Sequence[str], right: Sequence[Outcome], wrong: Sequence[Outcome]) -> Iterator[tuple[str, str]]:
    """The sets of tests that the command cannot judge, with the reason."""
    for suite, right_outcome, wrong_outcome in zip(suites, right, wrong, strict=True):
        if right_outcome != "accepted":
            reason = "refused" if right_outcome == "refused" else "did not finish with"
            yield suite, f"it {reason} an honest right program"
        elif wrong_outcome == "accepted":
            yield suite, "it accepted an honest wrong program"


def run(command: Sequence[str], code: str, suite: Program, timeout_s: float) -> Outcome:
    """Let the command judge one program, in a folder that goes away and a process group that is ended."""
    tests = "\n".join([suite.setup, *suite.tests])
    with tempfile.TemporaryDirectory(prefix="fractal-audit-", ignore_cleanup_errors=True) as name:
        texts = {"{program}": code, "{tests}": tests, "{file}": f"{code}\n{tests}\n"}
        words = list(command)
        for placeholder, text in texts.items():
            path = Path(name) / f"{placeholder.strip('{}')}.py"
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
            words = [word.replace(placeholder, str(path)) for word in words]
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "TMPDIR": name},
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(f"audit: {words[0]} cannot be started: {error.strerror}.") from error
        try:
            return "accepted" if process.wait(timeout_s) == 0 else "refused"
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # all of the group have ended
            process.wait()
