"""The operator's chain as a user types it, against the fake cloud: what is refused, what is ended, what is never touched."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fractal.cloud.ledger import Ledger
from fractal.install import docker_engine
from tests.conftest import ROOT, until
from tests.fake_lambda.server import FakeLambda, lose_answer, status
from tests.renting import end_guards

pytestmark = pytest.mark.usefixtures("openssh")

KEY = "secret-key-of-the-chain"
Invoke = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fake() -> Iterator[FakeLambda]:
    with FakeLambda(key=KEY, rate=False) as one:
        yield one
        assert one.troubles == []


@pytest.fixture
def environment(fake: FakeLambda, tmp_path: Path) -> Iterator[dict[str, str]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FRACTAL_", "LAMBDA_"))}
    kept |= {"FRACTAL_LAMBDA_URL": fake.url, "LAMBDA_API_KEY": KEY, "FRACTAL_STATE": str(tmp_path / "state")}
    yield kept | {"HOME": str(tmp_path / "home")}
    left, book = fake.living(), Ledger(tmp_path / "state")
    for one in left:
        fake.end_from_outside(str(one["id"]))
    end_guards(book.folder)
    assert left == []


@pytest.fixture
def invoke(environment: dict[str, str]) -> Invoke:
    def call(*words: str, timeout_s: float = 120, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "invoke", *words], cwd=ROOT, env={**environment, **changed}, text=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s,
        )  # fmt: skip

    return call


def one_line(done: subprocess.CompletedProcess[str], code: int, *says: str) -> None:
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stdout + done.stderr
    assert KEY not in done.stdout + done.stderr
    for word in says:
        assert word in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "--stage=everything"), "everything"),
        (("run", "-n", "many"), "valid integer"),
        (("run", "--problems=no/such/file.jsonl"), "no such file"),
        (("run", "--model=./no-such-model"), "no such file or folder"),
        (("run", "--run=runs/a b"), "cannot be a run's name"),
        (("run", "--image=sandbox"), "holds no pipeline"),
        (("run", "--more=--frobnicate 3"), "frobnicate"),
        (("run", "--more=--temperature 'x"), "No closing quotation"),
        (("run", "--where=there"), "expected auto, lambda or here"),
        (("push", "--image=pipelin"), "pipelin"),
        (("push", "--to=https://x"), "no registry"),
        (("build", "--image=nonsense", "push", "run"), "nonsense"),
    ],
)
def test_a_wrong_option_anywhere_is_refused_before_money_is_spent(
    words: tuple[str, ...], says: str, invoke: Invoke, fake: FakeLambda
) -> None:
    one_line(invoke("launch", *words, *([] if "run" in words else ["run"])), 2, says)
    assert fake.requests == []


@pytest.mark.parametrize(
    "words", [("--max-hours=-1",), ("--max-price=cheap",), ("--max-dollars=0",), ("--wait-for-capacity=x",)]
)
def test_a_wrong_limit_is_refused(words: tuple[str, ...], invoke: Invoke, fake: FakeLambda) -> None:
    one_line(invoke("launch", *words), 2, words[0].split("=")[0])
    assert fake.requests == []


@pytest.mark.parametrize("types", ["gpu_1x_gh200", "gpu_1x_a10,gpu_1x_gh200"])
def test_an_arm_machine_is_refused_before_money_is_spent(types: str, invoke: Invoke, fake: FakeLambda) -> None:
    """The list of preferences has none either."""
    for words in (("launch",), ("up",)):
        one_line(invoke(*words, f"--type={types}"), 2, "--type=gpu_1x_gh200: its processor is an Arm")
    assert fake.requests == []
    assert "gh200" not in invoke("--dry", "launch").stdout


def test_a_dry_run_says_what_would_happen_and_touches_nothing(invoke: Invoke, fake: FakeLambda, tmp_path: Path) -> None:
    done = invoke(
        "--dry", "launch", "--type=gpu_1x_a10", "build", "push", "run", "--stage=all", "-n", "50", "--terminate"
    )
    one_line(
        done,
        0,
        "gpu_1x_a10",
        "ended after 4 h",
        "fractal-pipeline:",
        "fractal run --run runs/default --stage all --n 50",
    )
    one_line(invoke("--dry", "up", "-n", "50", "--max-dollars=5"), 0, "5 $", "then the instance would be ended")
    for task in ("ps", "terminate", "reap", "fetch", "gpu", "wait", "logs"):
        one_line(invoke("--dry", task), 0)
    assert fake.requests == []
    assert not (tmp_path / "state").exists()


def test_no_key_and_a_wrong_key(invoke: Invoke, fake: FakeLambda) -> None:
    one_line(invoke("launch", LAMBDA_API_KEY=""), 2, "LAMBDA_API_KEY")
    one_line(invoke("launch", LAMBDA_API_KEY="wrong"), 3, "key")
    one_line(invoke("ps", LAMBDA_API_KEY=""), 2, "LAMBDA_API_KEY")
    assert fake.living() == []


def test_an_unknown_type_or_region_shows_what_there_is(invoke: Invoke, fake: FakeLambda) -> None:
    one_line(invoke("launch", "--type=gpu_9x"), 2, "gpu_9x", "gpu_1x_a10", "USD/H")
    one_line(invoke("launch", "--type=gpu_1x_a10", "--region=mars-1", "--register-key"), 2, "mars-1", "us-west-1")
    assert fake.living() == []


def test_no_key_of_ours_at_lambda_is_said_with_the_way_out(invoke: Invoke, fake: FakeLambda) -> None:
    one_line(invoke("launch", "--type=gpu_1x_a10"), 2, "--register-key")
    assert fake.living() == []


def test_without_an_instance_each_task_says_what_to_do(invoke: Invoke) -> None:
    for task in ("wait", "setup-ssh", "gpu", "logs", "fetch", "stop", "ssh", "sync"):
        one_line(invoke(task), 3, "invoke launch")
    one_line(invoke("run", "--where=lambda"), 3, "invoke launch")
    one_line(invoke("ps"), 0, "no instance")
    one_line(invoke("cost"), 0, "total")
    one_line(invoke("terminate"), 0, "no living instance")
    one_line(invoke("reap", "--yes"), 0)


def test_a_machine_that_never_answers_is_named_and_still_known(
    invoke: Invoke, fake: FakeLambda, tmp_path: Path
) -> None:
    """The fake without machines gives 127.0.0.2: nothing listens there."""
    done = invoke("launch", "--type=gpu_1x_a10", "--register-key", FRACTAL_READY_TIMEOUT_S="3")
    one_line(done, 3, "22")
    assert len(fake.living()) == 1
    assert [entry.id for entry in Ledger(tmp_path / "state").open()] == [fake.living()[0]["id"]]
    one_line(invoke("ps"), 0, "gpu_1x_a10", "on watch and ends it at")
    one_line(invoke("cost"), 0, "BILLED NOW")
    one_line(invoke("terminate"), 0, "is ended")
    assert fake.living() == []


@pytest.mark.docker
def test_a_chain_that_asked_for_it_ends_the_instance_when_a_task_before_the_run_fails(
    invoke: Invoke, fake: FakeLambda
) -> None:
    done = invoke("launch", "--type=gpu_1x_a10", "--register-key", "build", "--image=sandbox", "--base=no.such.registry.invalid/x:1", "--no-cache",
                  "push", "run", "--terminate")  # fmt: skip
    assert done.returncode != 0
    assert "is ended" in done.stderr
    assert (fake.launches, fake.living()) == (1, [])


@pytest.mark.docker
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_up_ends_the_instance_on_every_way_out(number: int, environment: dict[str, str], fake: FakeLambda) -> None:
    fake.boot_s = 3600.0
    words = [sys.executable, "-m", "invoke", "up", "--type=gpu_1x_a10", "--register-key", "--image=pipeline-cpu"]
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until(fake.living)
    time.sleep(2.0)
    process.send_signal(number)
    _, said = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "Traceback" not in said
    assert (fake.launches, fake.living()) == (1, [])


def test_a_lost_answer_launches_once(invoke: Invoke, fake: FakeLambda) -> None:
    fake.script("POST /instance-operations/launch", lose_answer())
    invoke("launch", "--type=gpu_1x_a10", "--register-key", FRACTAL_READY_TIMEOUT_S="1")
    assert (fake.launches, len(fake.living())) == (1, 1)
    one_line(invoke("terminate"), 0, "is ended")
    assert fake.living() == []


def test_quota_is_one_line(invoke: Invoke, fake: FakeLambda) -> None:
    fake.script("POST /instance-operations/launch", status(400, "global/quota-exceeded", message="Quota exceeded."))
    one_line(invoke("launch", "--type=gpu_1x_a10", "--register-key"), 3, "uota")
    assert (fake.launches, fake.living()) == (0, [])


@pytest.mark.docker
def test_no_engine_here_is_said_before_money_is_spent(invoke: Invoke, fake: FakeLambda, tmp_path: Path) -> None:
    if docker_engine.problem():
        pytest.skip("no engine")
    done = invoke("launch", "--register-key", "build", "push", "run", DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    one_line(done, 3, "Docker")
    assert fake.launches == 0
