"""A run on a rented instance and everything that can happen to it. After each: nothing lost, doubled or left alive.

A real simulated machine with the real sandbox image; the pipeline's image has a stand-in, so that a run takes seconds.
"""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from fractal.cloud import guard, readiness, ssh_config
from fractal.cloud.account import Account
from fractal.cloud.instance import wait_active
from fractal.cloud.lambda_api import Client, RateLimiter
from fractal.cloud.launch import LaunchRequest, launch
from fractal.cloud.ledger import Entry, Ledger
from fractal.cloud.reconcile import terminate
from fractal.cloud.remote_host import Remote
from fractal.cloud.ssh_keys import find_key
from fractal.images import driver_compatibility, push, recipes
from fractal.images.build import ensure_sandbox_image
from tests.conftest import ROOT, until
from tests.fake_lambda.machines import Machines, Running
from tests.fake_lambda.server import FakeLambda, status
from tests.machine import Unavailable
from tests.rented_client import STAND_IN
from tests.renting import end_guards, key_pair

pytestmark = [pytest.mark.docker, pytest.mark.cloud, pytest.mark.usefixtures("openssh")]
KEY = "secret-key"
ANY = LaunchRequest(types=("gpu_1x_a10",))


def send_images(config: Path) -> None:
    """The sandbox's image, and for the pipeline's a stand-in, to the instance that this ssh configuration names."""
    here = docker.from_env()
    sandbox = ensure_sandbox_image(here, lambda text: None).name
    push.to_host(here, sandbox, "lambda", say=lambda text: None, ssh_config=config)
    here.close()
    with Remote(config, lambda: None, print) as remote, remote.engine() as engine:
        container = engine.containers.create(sandbox)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(ROOT / "tests/rented_stage.py", "stage.py")
            python = tarfile.TarInfo("usr/local/bin/python")
            python.type, python.linkname = tarfile.SYMTYPE, "/usr/bin/python3"
            tar.addfile(python)
        container.put_archive("/", packed.getvalue())
        changes = ['ENTRYPOINT ["python3", "-u", "/stage.py"]', 'LABEL fractal.base="nvidia/cuda:1 pulled"']
        image = container.commit(*STAND_IN.split(":"), changes=changes)
        for recipe in recipes.choose("pipeline,pipeline-cpu"):
            assert image.tag(*recipe.name.split(":"))
        container.remove()


class RentedInstance:
    """A fake cloud with one rented, ready machine that has the images."""

    def __init__(self, folder: Path, fake: FakeLambda) -> None:
        self.folder, self.fake = folder, fake
        self.ledger = Ledger(folder / "state")
        self.model = folder / "model"
        self.environment = {
            **os.environ, "FRACTAL_LAMBDA_URL": fake.url, "LAMBDA_API_KEY": KEY, "FRACTAL_STATE": str(self.ledger.folder),
        }  # fmt: skip

    def account(self) -> Account:
        limiter = RateLimiter(self.folder, request_s=0, launch_s=0)
        return Account(Client(KEY, self.fake.url, limiter, patience_s=5), self.ledger, print)

    def rent(self, request: LaunchRequest = ANY) -> Entry:
        """Launch, wait until it is ready, send the images."""
        account = self.account()
        key = key_pair(self.folder)
        self.fake.add_ssh_key(f"mine{time.time_ns()}", Path(f"{key}.pub").read_text().strip())
        os.environ |= {**self.environment, "FRACTAL_SSH_KEY": str(key)}  # the guard's
        entry = launch(account, request, find_key(account))
        entry = wait_active(account, entry)
        ssh_config.write(self.ledger.folder, entry)
        readiness.wait_ready(self.ledger.folder, entry, print, lambda: str(entry.ip))
        entry = self.ledger.change(entry.name, ready_at=time.time(), owner=None)
        send_images(ssh_config.config_file(self.ledger.folder))
        return entry

    @property
    def entry(self) -> Entry:
        (entry,) = self.ledger.open_entries()
        return entry

    @property
    def machine(self) -> Running:
        return self.fake.machine(str(self.entry.id))  # type: ignore[return-value]

    def begin(self, run: Path, n: int = 60, **job: Any) -> subprocess.Popen[str]:
        job = {"model": str(self.model), **job, "run": str(run), "n": n}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.rented_client", json.dumps(job)], cwd=ROOT, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str, str]:
        out, err = process.communicate(timeout=timeout_s)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    def call(self, run: Path, n: int = 60, **job: Any) -> tuple[int, str, str]:
        return self.finish(self.begin(run, n, **job))

    def start(self, *words: str, folder: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        """`invoke WORDS` in a folder, by default the state's."""
        return subprocess.Popen(
            [sys.executable, "-m", "invoke", "--search-root", str(ROOT), *words], cwd=folder or self.folder,
            env={**self.environment, **variables}, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def invoke(self, *words: str, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, folder=folder, **variables)
        code, out, err = self.finish(process, 180)
        assert KEY not in out + err
        return subprocess.CompletedProcess(words, code, out, err)

    def containers(self) -> list[str]:
        """What is left of jobs on the instance."""
        return self.machine.machine.sh(
            "docker ps -a --format '{{.Names}}' | grep -E 'fractal-(job|sandbox)' || true"
        ).split()

    def whole(self, run: Path, n: int = 60) -> None:
        """All samples once, the log without a lost or doubled line, nothing left on the instance."""
        lines = (run / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["sample_id"] for line in lines] == list(range(n))
        assert (run / "critic/epoch-1/head.safetensors").stat().st_size == 256 * 64
        said = "".join(path.read_text() for path in sorted((run / "logs").glob("all-*.log")))
        shown = [int(line.split()[1]) for line in said.splitlines() if line.startswith("sample ")]
        assert shown == list(range(n))
        assert self.containers() == []


@pytest.fixture(scope="module")
def module_instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RentedInstance]:
    folder = tmp_path_factory.mktemp("rented")
    kept = dict(os.environ)
    try:
        with Machines() as machines, FakeLambda(key=KEY, machines=machines, rate=False) as fake:
            instance = RentedInstance(folder, fake)
            instance.model.mkdir()
            (instance.model / "config.json").write_text("{}")
            (instance.model / "model.safetensors").write_text("x")
            (instance.model / "tokenizer.json").write_text("{}")
            (instance.model / "chat_template.jinja").write_text("x")
            yield instance
            for entry in instance.ledger.open_entries():
                terminate(instance.account(), entry)
            end_guards(instance.ledger.folder)
            assert fake.living() == []
            assert fake.troubles == []
    except Unavailable as error:
        pytest.skip(str(error))
    finally:
        os.environ.clear()
        os.environ.update(kept)


@pytest.fixture
def rented(module_instance: RentedInstance) -> Iterator[RentedInstance]:
    """The module's instance; another where a test has ended it."""
    if not module_instance.ledger.open_entries() or not module_instance.fake.living():
        for entry in module_instance.ledger.open_entries():
            module_instance.ledger.end(entry.name, "the test before")
        module_instance.rent()
    yield module_instance
    assert {found["name"] for found in module_instance.fake.living()} <= {
        entry.name for entry in module_instance.ledger.open_entries()
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / f"run{time.time_ns()}"


def seen(run: Path, count: int) -> Callable[[], bool]:
    """So many samples are in a log here."""
    return lambda: sum(path.read_text().count("sample ") for path in run.glob("logs/all-*.log")) >= count


def test_a_run_comes_home_whole(rented: RentedInstance, run: Path) -> None:
    code, out, err = rented.call(run)
    assert (code, sum(line.startswith("sample ") for line in out.splitlines())) == (0, 60)
    assert "begin 1000 0.7500 True -" in out  # the owner of the files, the price, the sidecar's socket
    assert "digests equal" in err
    assert "goes on and costs" in err
    rented.whole(run)
    code, _, _ = rented.call(run)  # again: nothing is repeated
    assert code == 0
    rented.whole(run)
    assert (
        sum(
            name == "POST /instance-operations/launch"
            for name in [f"{c.method} {c.path}" for c in rented.fake.requests]
        )
        == 1
    )


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_a_follower_that_ends_leaves_the_job_and_the_next_goes_on(
    rented: RentedInstance, run: Path, number: int
) -> None:
    process = rented.begin(run, n=200)
    until(seen(run, 10))
    process.send_signal(number)
    _, _, err = rented.finish(process)
    if number != signal.SIGKILL:
        assert "the job goes on there" in err
    assert len(rented.fake.living()) == 1
    code, _, err = rented.call(run, n=200)
    assert code == 0
    rented.whole(run, n=200)


def test_a_critic_that_was_trained_here_is_sent(rented: RentedInstance, run: Path) -> None:
    """The record files of both sides are equal: what the instance lacks decides, and the manifest here is kept."""
    assert rented.call(run, n=5)[0] == 0
    (run / "critic/best").mkdir()
    (run / "critic/best/head.safetensors").write_bytes(b"trained here")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["train"] = {"seconds": 1.0}
    (run / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = rented.call(run, n=5, stage="score")
    assert code == 0, err
    there = rented.machine.machine.sh(f"cat /home/ubuntu/fractal/runs/{run.name}/critic/best/head.safetensors")
    assert there == "trained here"
    assert "train" in json.loads((run / "manifest.json").read_text())["stages"]


@pytest.mark.long
@pytest.mark.parametrize("kill_at", range(1, 60, 6))
def test_a_client_killed_at_any_step_is_gone_on_from(rented: RentedInstance, run: Path, kill_at: int) -> None:
    process = rented.begin(run, n=12, kill_at=kill_at)
    process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGKILL, 0)
    code, _, err = rented.call(run, n=12)
    assert code == 0, err
    rented.whole(run, n=12)


def lose_connection(rented: RentedInstance, process: subprocess.Popen[str]) -> None:
    rented.machine.machine.sh("pkill -f '[s]shd: ubuntu' || true")


def sleep_like_a_laptop(rented: RentedInstance, process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    lose_connection(rented, process)
    time.sleep(3)
    os.kill(process.pid, signal.SIGCONT)


def lose_api_too(rented: RentedInstance, process: subprocess.Popen[str]) -> None:
    rented.fake.script("* *", *[status(503)] * 8)
    lose_connection(rented, process)


def kill_sandbox(rented: RentedInstance, process: subprocess.Popen[str]) -> None:
    rented.machine.machine.sh("docker rm -f $(docker ps -q --filter name=fractal-sandbox)")


@pytest.mark.long
@pytest.mark.parametrize("disturb", [lose_connection, sleep_like_a_laptop, lose_api_too, kill_sandbox])
def test_a_run_that_is_disturbed_ends_whole(
    rented: RentedInstance, run: Path, disturb: Callable[[RentedInstance, subprocess.Popen[str]], None]
) -> None:
    process = rented.begin(run, n=300)
    until(seen(run, 5))
    disturb(rented, process)
    code, _, err = rented.finish(process)
    rented.fake.unscript()
    assert code == 0, err
    assert disturb is kill_sandbox or "connected again" in err
    rented.whole(run, n=300)


def restart_engine(rented: RentedInstance) -> None:
    rented.machine.machine.sh("systemctl restart docker")


def remove_job(rented: RentedInstance) -> None:
    rented.machine.machine.sh("docker rm -f $(docker ps -q --filter name=fractal-job)")


def move_address(rented: RentedInstance) -> None:
    rented.fake.move(str(rented.entry.id))  # its power is cut: the job dies


@pytest.mark.long
@pytest.mark.parametrize("kill", [restart_engine, remove_job, move_address])
def test_a_job_that_dies_there_is_an_error_and_the_same_command_goes_on(
    rented: RentedInstance, run: Path, kill: Callable[[RentedInstance], None]
) -> None:
    process = rented.begin(run, n=600)
    until(seen(run, 5))
    kill(rented)
    code, _, err = rented.finish(process, 180)
    assert code != 0
    assert "any more" in err or "died" in err or "not" in err
    assert rented.call(run, n=600)[0] == 0
    lines = (run / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample_id"] for line in lines] == list(range(600))


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "code", "says"), [(1, 1, "CUDA out of memory"), (2, 137, "process died"), (3, 1, "lacks the package vllm")]
)
def test_a_stage_that_fails_is_named_and_its_results_are_home(
    rented: RentedInstance, run: Path, how: int, code: int, says: str
) -> None:
    got, _, err = rented.call(run, more=f"--seed {how}")
    assert got == code
    assert says in err
    assert len((run / "samples.jsonl").read_text().splitlines()) == 31
    assert rented.containers() == []
    assert rented.call(run)[0] == 0
    rented.whole(run)


def test_another_job_is_refused_and_stop_ends_the_one(rented: RentedInstance, run: Path, tmp_path: Path) -> None:
    process = rented.begin(run, n=6000)
    until(seen(run, 5))
    code, _, err = rented.call(tmp_path / "other")
    assert code == 2
    assert "invoke stop" in err
    assert "job all-" in rented.invoke("ps").stdout
    assert "sample " in rented.invoke("logs").stdout
    assert "A100" in rented.invoke("gpu").stdout
    assert rented.invoke("ssh", "--command=exit 7").returncode == 7
    done = rented.invoke("stop")
    assert done.returncode == 0, done.stderr
    code, _, _ = rented.finish(process)
    assert code != 0
    assert rented.containers() == []


@pytest.mark.long
def test_an_image_that_is_not_there_is_an_error(rented: RentedInstance, run: Path) -> None:
    rented.machine.machine.sh(f"docker tag {STAND_IN} kept:1 && docker rmi {STAND_IN}")
    try:
        code, _, err = rented.call(run)
    finally:
        rented.machine.machine.sh(f"docker tag kept:1 {STAND_IN}")
    assert code == 3
    assert "invoke push --image=pipeline-cpu,sandbox" in err
    assert rented.containers() == []


@pytest.mark.long
def test_a_token_of_the_hub_reaches_the_job_and_nothing_else(
    rented: RentedInstance, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_" + "Qz7" * 11 + "x"
    monkeypatch.setitem(rented.environment, "HF_TOKEN", token)
    process = rented.begin(run, n=400, model="someone/gated")
    until(seen(run, 5))
    sh = rented.machine.machine.sh
    inspected = sh("docker inspect $(docker ps -aq)")
    assert "HF_TOKEN_PATH=/run/secrets/hf_token" in inspected
    there = sh(
        "docker ps -aq | while read id; do docker logs $id 2>&1; docker top $id axeww; done; cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' '\\n'"
    )
    assert "FRACTAL_SOCKET" in there
    files = sh("grep -rl hf_Qz7 /home/ubuntu /tmp /var /dev/shm /run 2> /dev/null || true")
    code, out, err = rented.finish(process)
    assert code == 0, err
    assert f"token {hashlib.sha256(token.encode()).hexdigest()}" in out
    here = "".join(path.read_text(errors="replace") for path in run.rglob("*") if path.is_file())
    state = "".join(path.read_text(errors="replace") for path in rented.ledger.folder.rglob("*") if path.is_file())
    for text in (inspected, there, files, out, err, here, state):
        assert token not in text
    assert files == ""
    assert "Hugging Face token goes into the job's container" in err
    rented.whole(run, n=400)
    assert sh("grep -rl hf_Qz7 /var/lib/docker 2> /dev/null || true") == ""  # gone with the container
    _, out, _ = rented.call(run.with_name("other"), n=1)  # a model from here
    assert "token none" in out


def drives(rented: RentedInstance, version: str) -> None:
    rented.machine.machine.sh(f"sed -i 's/^driver=.*/driver={version}/' /etc/machine.conf")


def test_a_driver_too_old_for_the_image_is_an_error_before_anything_is_sent(rented: RentedInstance, run: Path) -> None:
    drives(rented, "470.256.02")
    try:
        pushed = rented.invoke("push", "--image=pipeline,sandbox")
        code, _, err = rented.call(run, image="pipeline")
    finally:
        drives(rented, "580.95.05")
    for said in (pushed.stderr, err):
        (line,) = [line for line in said.splitlines() if "too old" in line]
        assert "driver 470.256.02 is too old for the CUDA image, which needs 580.65" in line
        assert "--family" in line
        assert "invoke terminate" in line
    assert (pushed.returncode, code) == (3, 3)
    assert rented.containers() == []


FULL_DF = b"#!/bin/sh\nprintf 'Filesystem 1024-blocks Used Available Capacity Mounted\\n/dev/vda1 9 9 2048 99%% /\\n'\n"


def test_too_little_disk_is_an_error_before_anything_is_sent(rented: RentedInstance) -> None:
    rented.machine.machine.put("/usr/local/bin/df", FULL_DF, 0o755)
    try:
        done = [rented.invoke("push", "--image=sandbox"), rented.invoke("build", "--image=sandbox", "--on=there")]
    finally:
        rented.machine.machine.sh("rm /usr/local/bin/df")
    for one in done:
        assert one.returncode == 3
        assert "The instance has 0.0 GB of free disk, 1.0 GB are needed: sandbox" in one.stderr
        assert "invoke terminate" in one.stderr


@pytest.mark.long
def test_what_lies_on_a_file_system_is_there_for_the_next_instance(rented: RentedInstance, run: Path) -> None:
    rented.fake.add_file_system("models", "us-west-1")
    request = LaunchRequest(types=("gpu_1x_a10",), regions=("us-west-1",), file_systems=("models",))
    terminate(rented.account(), rented.entry)
    said = []
    for number in range(2):
        rented.rent(request)
        code, out, err = rented.call(run.with_name(f"{run.name}-{number}"), n=2)
        assert code == 0, err
        said.append(out + err)
        terminate(rented.account(), rented.entry)
    first, second = said
    assert "huggingface/weights none" in first
    assert "kernels none" in first
    assert "model is on the instance: 4 files" in first
    assert "huggingface/weights kept" in second
    assert "kernels kept" in second
    assert "is on the instance" not in second
    for text in said:
        assert "from launch to first sample" in text
        assert "nothing, with the file system models" in text


@pytest.mark.long
def test_an_older_driver_gets_the_images_compatibility_libraries(rented: RentedInstance, run: Path) -> None:
    drives(rented, "570.195.03")
    try:
        code, out, err = rented.call(run, n=2, image="pipeline")
    finally:
        drives(rented, "580.95.05")
    assert code == 0, err
    assert f"True {driver_compatibility.COMPAT}" in out
    assert "compatibility libraries are used" in err


@pytest.mark.long
def test_a_full_disk_here_keeps_the_job_and_says_so(rented: RentedInstance, run: Path, tiny_disk: Path) -> None:
    folder = tiny_disk / run.name
    process = rented.begin(folder, n=400)
    code, _, err = rented.finish(process)
    if code == 0:
        pytest.skip("it fits")
    assert code == 3
    assert "full" in err or "space" in err
    assert len(rented.fake.living()) == 1


@pytest.mark.long
@pytest.mark.parametrize("how", ["preempt", "end_from_outside"])
def test_an_instance_that_is_taken_away_is_an_error_and_the_next_has_what_came_home(
    rented: RentedInstance, run: Path, how: str
) -> None:
    process = rented.begin(run, n=2000)
    until(seen(run, 30))
    until(lambda: (run / "samples.jsonl").exists())
    getattr(rented.fake, how)(str(rented.entry.id))
    code, _, err = rented.finish(process, 180)
    assert code == 3
    assert "invoke launch" in err
    assert rented.fake.living() == []
    before = len((run / "samples.jsonl").read_text().splitlines())
    assert before > 0
    rented.rent()
    code, _, err = rented.call(run, n=before + 10)
    assert code == 0, err
    lines = (run / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample_id"] for line in lines] == list(range(before + 10))


@pytest.mark.parametrize(
    "number",
    [pytest.param(0, marks=pytest.mark.long), signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)],
)
def test_terminate_ends_the_instance_on_every_way_out(rented: RentedInstance, run: Path, number: int) -> None:
    process = rented.begin(run, n=30 if not number else 2000, terminate=True)
    until(seen(run, 10))
    if number:
        process.send_signal(number)
    code, _, err = rented.finish(process)
    assert (code == 0) == (not number)
    assert rented.fake.living() == []
    assert rented.ledger.open_entries() == []
    assert "is terminated" in err
    assert (run / "samples.jsonl").exists()


@pytest.mark.long
def test_a_budget_that_is_reached_ends_the_instance_after_a_last_fetch(rented: RentedInstance, run: Path) -> None:
    process = rented.begin(run, n=4000)
    until(seen(run, 10))
    process.send_signal(signal.SIGKILL)
    process.wait()
    entry = rented.entry
    rented.ledger.change(entry.name, max_hours=(time.time() + 25 - entry.asked_at) / 3600)
    assert guard.alive(rented.ledger, entry.name)
    until(lambda: rented.fake.living() == [], 120)
    until(lambda: rented.ledger.open_entries() == [])
    said = guard.log_file(rented.ledger, entry.name).read_text()
    assert (run / "samples.jsonl").exists(), said
    assert len((run / "samples.jsonl").read_text().splitlines()) > 50, said
    assert "limit" in (rented.ledger.entries()[-1].end_reason or "") or "max" in (
        rented.ledger.entries()[-1].end_reason or ""
    )


# --- a command of the user's

TRAIN = """\
import hashlib, json, os, pathlib, sys, time
steps = int(sys.argv[1])
saved = pathlib.Path("checkpoints_critic/step.json")
done = json.loads(saved.read_text())["step"] if saved.exists() else 0
print("begin", done, os.getcwd(), os.getuid(), sorted(os.listdir()), flush=True)
print("key", hashlib.sha256(os.environ.get("WANDB_API_KEY", "").encode()).hexdigest(), flush=True)
for step in range(done, steps):
    saved.parent.mkdir(exist_ok=True)
    saved.with_suffix(".new").write_text(json.dumps({"step": step + 1}))
    saved.with_suffix(".new").rename(saved)
    print(f"step {step} Val Acc = {step / steps:.4f}", flush=True)
    time.sleep(0.1)
    if pathlib.Path("enough").exists():
        break
pathlib.Path("plot 1.png").write_bytes(bytes(1000))
pathlib.Path("large.tmp").write_bytes(bytes(1000))
sys.exit(7)
"""
SECRET = "wandb-" + "Kx9" * 11


@pytest.fixture
def user_project(tmp_path: Path) -> Path:
    """A git repository with the script of a user."""
    return git_repository(tmp_path / "project", {"train.py": TRAIN})


def git_repository(folder: Path, files: dict[str, str]) -> Path:
    """Whose files git tracks; nothing is committed."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    return folder


def only_run(project: Path) -> Path:
    (folder,) = project.glob("runs/train-*")
    return folder


def test_a_script_of_the_users_runs_with_its_secret_and_its_files_come_home(
    rented: RentedInstance, user_project: Path
) -> None:
    words = ["exec", "--fetch=checkpoints_*/,*.png", "--secret=WANDB_API_KEY", "--", "python", "train.py", "9999"]
    process = rented.start(*words, folder=user_project, WANDB_API_KEY=SECRET)
    until(lambda: list(user_project.glob("runs/train-*/logs/*.log")) and "step 5 " in log_of(only_run(user_project)))
    run = only_run(user_project)
    sh = rented.machine.machine.sh
    seen_there = sh(
        "docker inspect $(docker ps -aq); docker ps -aq | while read id; do docker logs $id 2>&1; done; ps axww; "
        "docker events --since 10m --until 1s | head -c 100000"
    )
    on_disk = sh("grep -rl Kx9Kx9Kx9 /var/lib/docker /home /tmp /dev/shm /run 2> /dev/null || true")
    queued = rented.start("exec", "--name=second", "--", "python", "-c", "print('the second')", folder=user_project)
    until(lambda: "waiting for the job exec-" in log_of(user_project / "runs/second"))
    shown = rented.invoke("ps").stdout
    assert "number 1 in the queue, behind exec-" in shown
    assert "python train.py 9999" in shown
    sh(f"touch /home/ubuntu/fractal/exec/{run.name}/work/enough")
    code, out, err = rented.finish(process)
    assert code == 7, err
    assert "begin 0 /work/project 1000 ['train.py']" in out
    assert f"key {hashlib.sha256(SECRET.encode()).hexdigest()}" in out
    files = {path.relative_to(run / "files").as_posix() for path in (run / "files").rglob("*") if path.is_file()}
    assert files == {"checkpoints_critic/step.json", "plot 1.png"}
    assert log_of(run) in out
    assert "digests equal" in err
    second_code, second_out, second_err = rented.finish(queued)
    assert second_code == 0, second_err
    assert "\nthe second\n" in second_out
    state = "".join(path.read_text(errors="replace") for path in rented.ledger.folder.rglob("*") if path.is_file())
    for text in (seen_there, on_disk, out, err, state, log_of(run)):
        assert SECRET not in text
    assert on_disk == ""
    assert sorted(path.name for path in user_project.iterdir()) == [".git", "runs", "train.py"]
    found = rented.invoke("grep", "step [03] Val", folder=user_project)
    lines = found.stdout.splitlines()
    assert [line.partition(": ")[2] for line in lines] == ["step 0 Val Acc = 0.0000", "step 3 Val Acc = 0.0003"]
    assert rented.containers() == []


def log_of(run: Path) -> str:
    return "".join(path.read_text() for path in run.glob("logs/*.log"))


@pytest.mark.long
def test_a_script_that_was_stopped_goes_on_also_on_another_instance(rented: RentedInstance, user_project: Path) -> None:
    words = ["--fetch=checkpoints_critic", "--", "python", "train.py", "100"]
    process = rented.start("exec", "--name=mine", *words, folder=user_project)
    run = user_project / "runs/mine"
    until(lambda: run.exists() and "step 5 " in log_of(run))
    process.send_signal(signal.SIGINT)
    code, _, err = rented.finish(process)
    assert code == 130
    assert "invoke logs --follow --job=exec-" in err
    assert rented.invoke("exec", "--resume=mine", *words, folder=user_project).returncode == 2  # it is at work
    assert rented.invoke("exec", "--name=mine", *words, folder=user_project).returncode == 2
    stopped = rented.invoke("stop", folder=user_project)
    assert stopped.returncode == 0, stopped.stderr
    done = int(json.loads((run / "files/checkpoints_critic/step.json").read_text())["step"])
    assert 5 < done < 100
    (user_project / "train.py").write_text(TRAIN.replace("exit(7)", "exit(0)"))
    again = rented.invoke("exec", "--resume=mine", *words, folder=user_project)
    assert again.returncode == 0, again.stderr
    assert f"begin {done} " in again.stdout
    rented.machine.machine.sh("rm -rf /home/ubuntu/fractal/exec/mine")  # as on another instance
    again = rented.invoke("exec", "--resume=mine", *words[:-1], "102", folder=user_project)
    assert again.returncode == 0, again.stderr
    assert "begin 100 " in again.stdout
    assert json.loads((run / "files/checkpoints_critic/step.json").read_text()) == {"step": 102}


@pytest.mark.long
def test_a_command_waits_for_the_stages_and_reads_their_run(
    rented: RentedInstance, run: Path, user_project: Path
) -> None:
    stages = rented.begin(run, n=150)
    until(seen(run, 1))
    command = rented.start("exec", "--", "wc", "-l", f"/work/runs/{run.name}/samples.jsonl", folder=user_project)
    code, out, err = rented.finish(command)
    assert code == 0, err
    assert "waiting for the job all-" in out
    assert f"\n150 /work/runs/{run.name}/samples.jsonl\n" in out
    code, _, err = rented.finish(stages)
    assert code == 0, err
    rented.whole(run, n=150)


@pytest.mark.long
@pytest.mark.parametrize(("command", "code"), [("exit 124", 124), ("kill -2 $$", 130)])
def test_the_exit_code_of_a_command_is_passed_on(
    rented: RentedInstance, user_project: Path, command: str, code: int
) -> None:
    done = rented.invoke("exec", "--", "sh", "-c", command, folder=user_project)
    assert done.returncode == code, done.stderr


@pytest.mark.long
def test_jobs_side_by_side_do_not_disturb_each_other_and_the_last_ends_the_instance(
    rented: RentedInstance, user_project: Path
) -> None:
    write = "import time; open('train.py', 'a').write('# {0}'); time.sleep({1}); print(open('train.py').read()[-4:])"
    options = ["--beside", "--terminate", "--", "python", "-c"]
    first = rented.start("exec", "--name=one", *options, write.format("aa", 6), folder=user_project)
    until(lambda: list(user_project.glob("runs/one/logs/*.log")))
    second = rented.start("exec", "--name=two", *options, write.format("bb", 12), folder=user_project)
    code, out, err = rented.finish(first)
    assert (code, out.splitlines()[0]) == (0, "# aa"), err
    assert "is NOT ended, it has other jobs" in err
    assert len(rented.fake.living()) == 1
    code, out, err = rented.finish(second)
    assert (code, out.splitlines()[0]) == (0, "# bb"), err
    assert "is terminated" in err
    assert rented.fake.living() == []
    assert (user_project / "train.py").read_text() == TRAIN
