"""The audit of other graders: plain `python {file}`, a grader that accepts nothing, one that accepts all, and one that hangs."""

import json
import os
import sys
from pathlib import Path

import pytest

from fractal.__main__ import run_command
from fractal.audit import audit
from fractal.audit.programs import read_programs
from fractal.errors import InputError

PLAIN = [sys.executable, "{file}"]
# Accepts a program by its text alone: that of a suite's reference. No program can forge that.
EXACT = [
    sys.executable, "-c",
    "import sys; sys.exit(open(sys.argv[1]).read() not in open(sys.argv[3]).read() or not open(sys.argv[2]).read())",
    "{program}", "{tests}", str(audit.ATTACKS / "suites.txt"),
]  # fmt: skip


def test_plain_python_accepts_forgeries_and_says_which(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    options = ["--no-container", "--family", "leave", "--timeout", "5", "--json", str(out)]
    assert run_command(["audit", *options, "--", *PLAIN]) == 1
    report = json.loads(out.read_text())
    outcomes = {attack["name"]: attack["outcome"] for attack in report["attacks"]}
    assert outcomes["sys.exit at import"] == outcomes["os._exit in the call"] == "accepted"
    assert outcomes["kills itself with SIGKILL"] == "refused"
    assert report["command"] == PLAIN
    shown = capfd.readouterr().out
    accepted = sum(outcome == "accepted" for outcome in outcomes.values())
    assert f"audit: {accepted} of {len(outcomes)} wrong programs were accepted." in shown


def test_a_grader_that_cannot_be_forged_has_exit_code_0(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["audit", "--no-container", "--family", "write", "--", *EXACT]) == 0
    assert "audit: none of 3 wrong programs was accepted." in capfd.readouterr().out


def test_what_the_command_leaves_behind_is_ended_and_removed(tmp_path: Path) -> None:
    """A program's child that would write a file later does not live to do so."""
    late = tmp_path / "late"
    child, grader = tmp_path / "child.py", tmp_path / "grader.py"
    child.write_text(f"import time\ntime.sleep(1.5)\nopen({str(late)!r}, 'w')\n")
    grader.write_text(
        f"import subprocess, sys, tempfile\nsubprocess.Popen([sys.executable, {str(child)!r}])\ntempfile.mkdtemp()\n"
    )
    suite = read_programs(audit.ATTACKS / "suites.txt")["double"]
    before = set(Path(os.environ.get("TMPDIR", "/tmp")).glob("fractal-audit-*"))
    assert audit.run([sys.executable, str(grader), "{file}"], "", suite, 20) == "accepted"
    assert audit.run(["sleep", "60"], "", suite, 2) == "timeout"
    assert not late.exists()
    assert set(Path(os.environ.get("TMPDIR", "/tmp")).glob("fractal-audit-*")) <= before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["true", "{file}"], "accepted an honest wrong program"),
        (["false", "{file}"], "refused an honest right program"),
        (["sh", "-c", "sleep 60", "{file}"], "did not finish with an honest right program"),
        (["/nowhere/grader", "{file}"], "cannot be started"),
        (["true"], "either {file}"),
        (["true", "{program}"], "either {file}"),
        (["true", "{file}", "{tests}"], "either {file}"),
    ],
)
def test_a_command_that_teaches_nothing_is_refused(command: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words.replace("{", r"\{")):
        audit.audit(command, timeout_s=1, jobs=2, families=["write"])


def test_outside_a_container_it_asks_for_a_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "CONTAINER_FILES", ())
    monkeypatch.setattr(audit, "CONTROL_GROUPS", ())
    monkeypatch.delenv("container", raising=False)
    assert run_command(["audit", "--", "true", "{file}"]) == 2
    assert "--no-container" in capfd.readouterr().err
    assert run_command(["audit", "--no-container", "--family", "odd", "--", "true", "{file}"]) == 2


def test_every_suite_has_a_right_and_a_wrong_control_under_plain_python() -> None:
    """Or the attacks on it would never be run. The lenient ones are those whose tests pass a program that raises."""
    suites = read_programs(audit.ATTACKS / "suites.txt")
    raises = "def f(*args, **kwargs):\n    raise ValueError\n"
    for name, suite in suites.items():
        assert audit.run(PLAIN, suite.code, suite, 20) == "accepted", name
        assert audit.run(PLAIN, audit.WRONG, suite, 20) == "refused", name
        lenient = audit.run(PLAIN, raises, suite, 20) == "accepted"
        assert lenient == (name in audit.LENIENT_SUITES), name
