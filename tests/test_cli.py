"""Bad input by hand: one line, the right exit code, no traceback, nothing half-written."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fractal.__main__ import app, run_command
from tests.conftest import ROOT, until

PROBLEM = {"task_id": 11, "text": "Double.", "code": "def f(x): return 2 * x", "test_list": ["assert f(1) == 2"]}
SAMPLE = {"task_id": 11, "solution": "def f(x): return 2 * x"}
WITHOUT_CODE = {name: value for name, value in PROBLEM.items() if name != "code"}
FILES = {
    "p": [PROBLEM],
    "s": [SAMPLE],
    "empty": [],
    "no-code": [WITHOUT_CODE],
    "text-id": [{**PROBLEM, "task_id": "x"}],
    "twice": [PROBLEM, PROBLEM],
    "stranger": [{**SAMPLE, "task_id": 5}],
    "same-id": [{**SAMPLE, "sample_id": 3}] * 2,
    "weightless/config.json": [{}],
    "weightless/tokenizer.json": [{}],
    "untalkative/config.json": [{}],
    "untalkative/tokenizer.json": [{}],
    "untalkative/model.safetensors": [{}],
    "folder/file": [{}],
}
# Command, exit code, part of the message. V stands for `verify --out labels.jsonl`.
CASES = """
generate --run r --problems none.jsonl                                       2  none.jsonl: no such file
generate --run r --problems .                                                2  is a folder
generate --run r --problems starter --split dev                              2  unknown split dev
generate --run r --problems starter --n 0                                    2  --n 0: must be at least 1
generate --run r --problems starter --temperature -1                         2  --temperature -1
generate --run r --problems starter --backend magic                          2  --backend magic: unknown
generate --run r --problems starter --model weightless                       2  has no weights
generate --run r --problems starter --model untalkative                      2  has no chat template
generate --run r --problems starter --model ./nothing                        2  no such folder
generate --run r --problems starter --criterion 'x > 0'                      2  unknown name 'x'
V --problems empty --samples s                                               2  is empty
V --problems broken --samples s                                              2  broken: line 2
V --problems no-code --samples s                                             2  field code is missing
V --problems text-id --samples s                                             2  line 1: field task_id
V --problems twice --samples s                                               2  line 2: task_id 11 stands already
V --problems p --samples stranger                                            2  stranger: line 1
V --problems p --samples same-id                                             2  stands twice
V --problems p --samples empty                                               2  empty: is empty
verify --problems p --samples s --out folder                                 2  is a folder
verify --problems p --samples s --out s                                      2  is the file given as --samples
V --problems p --samples s --socket none                                     3  no sandbox listens there
V --problems p --samples s --socket none --slots 2                           2  give them to `fractal serve`
V --problems p --samples s --slots 0                                         2  --slots 0: must be from 1 to 500
V --problems p --samples s --memory 8                                        2  --memory 8: limits out of range
verify                                                                       2  give either --run RUN
verify --run r                                                               2  no run is there
verify --run r --cpu 0                                                       2  limits out of range
report --run p                                                               2  is a file
train --run r --mode magic                                                   2  no run is there
score --run r --critic x                                                     2  no run is there
convert --problems p --out o                                                 2  give either --to FORM
convert --problems none --out o --from evalplus --results r                  2  none: no such file
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The input files, in the current folder."""
    for name, rows in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "broken").write_text(json.dumps(PROBLEM) + '\n{"task_id": 12, ')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FRACTAL_CACHE", str(tmp_path / ".cache"))
    monkeypatch.delenv("FRACTAL_SOCKET", raising=False)
    return tmp_path


def test_bad_input_is_one_line_and_an_exit_code(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for case in CASES.strip().splitlines():
        command, code, message = case[:76].strip(), int(case[77]), case[80:]
        before = {path for path in here.rglob("*") if ".cache" not in path.parts}
        result = run_command(shlex.split(command.replace("V ", "verify --out labels.jsonl ")))
        # In the CUDA image without a GPU a warning comes first.
        lines = [line for line in capsys.readouterr().err.splitlines() if "transformers decodes" not in line]
        left = {path for path in here.rglob("*") if ".cache" not in path.parts} - before
        as_expected = result == code and len(lines) == 1 and lines[0].startswith("fractal: ") and message in lines[0]
        if not as_expected or not {path.name for path in left} <= {"r", ".lock"}:
            wrong.append((command, result, lines, left))
        shutil.rmtree(here / "r", ignore_errors=True)
    assert wrong == []


def test_no_docker_is_something_outside_and_is_noticed_before_generation(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    for command in ("verify --problems p --samples s --out labels.jsonl", "run --run r --problems starter"):
        assert run_command(command.split()) == 3
        error = capsys.readouterr().err
        assert "Docker" in error
        assert error.count("\n") == 1
    assert not (here / "labels.jsonl").exists()
    assert not (here / "r/samples.jsonl").exists()


USAGE = ["--nonsense", "verify --nonsense", "run --run r --stage x", "nothing", "generate --run r --n many"]
COMMANDS = [
    "",
    "generate",
    "adopt",
    "verify",
    "convert",
    "train",
    "score",
    "select",
    "report",
    "run",
    "serve",
    "doctor",
]


def test_wrong_usage_is_exit_2_without_a_traceback_and_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert [line for line in USAGE if run_command(line.split()) != 2] == []
    assert "Traceback" not in capsys.readouterr().err
    runner, short = CliRunner(), []
    for command in COMMANDS:
        result = runner.invoke(app, [*command.split(), "--help"])
        if result.exit_code or "Usage" not in result.output or len(result.output) < 300:
            short.append((command, result.output))
    assert short == []


def test_options_that_stand_in_two_commands_are_the_same_in_both() -> None:
    """`run` has what generate, verify, train and select have."""
    runner = CliRunner()
    options = {}
    for command in ("run", "generate", "verify", "train", "select"):
        shown = runner.invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output
        options[command] = {word for word in shown.split() if word.startswith("--")}
    of_verify = options["verify"] - {"--samples", "--out", "--by-problem"}
    missing = (options["generate"] | of_verify | options["train"] | options["select"]) - options["run"]
    assert missing == set()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_of_the_process_is_one_line_and_130(here: Path, sign: signal.Signals) -> None:
    (here / "p").unlink()
    os.mkfifo(here / "p")  # nobody writes: the command waits for its problems
    command = "-m fractal verify --problems p --samples s --out labels.jsonl"
    child = subprocess.Popen(
        [sys.executable, *command.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    writers: list[int] = []

    def is_read() -> bool:
        with contextlib.suppress(OSError):  # ENXIO until it has opened its end
            writers.append(os.open(here / "p", os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    until(is_read)
    child.send_signal(sign)
    _, error = child.communicate(timeout=30)
    os.close(*writers)
    assert child.returncode == 130
    assert error.count("\n") == 1
    assert "interrupted" in error
    assert not (here / "labels.jsonl").exists()
