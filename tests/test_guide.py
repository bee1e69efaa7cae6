"""The earlier project's guide, command by command: each has its counterpart, which runs on a simulated machine."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fractal.cloud import ssh_config
from tests.conftest import SHARED, until
from tests.fake_lambda.machines import Machines
from tests.fake_lambda.server import FakeLambda
from tests.machine import Unavailable
from tests.renting import end_guards
from tests.test_run_commands import KEY, RentedInstance, git_repository, send_images

pytestmark = [pytest.mark.docker, pytest.mark.cloud, pytest.mark.long, pytest.mark.usefixtures("openssh")]
PHASE = "research-log/phase14-vector6-reboot"
SCRIPTS = {  # as the guide has them: each reads what the one before has written
    "generate_mbpp.py": """\
import json, pathlib
data = pathlib.Path(__file__).parent / "data"
data.mkdir(exist_ok=True)
(data / "mbpp_generations.jsonl").write_text("".join(json.dumps({"task_id": i}) + "\\n" for i in range(20)))
print("8 samples", flush=True)
""",
    "execute_mbpp.py": """\
import json, pathlib
data = pathlib.Path(__file__).parent / "data"
rows = [json.loads(line) | {"passed": True} for line in (data / "mbpp_generations.jsonl").read_text().splitlines()]
(data / "mbpp_labeled.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
print(f"pass rate {len(rows)}/20", flush=True)
""",
    "train_critic.py": """\
import pathlib, sys, time
folder = pathlib.Path(__file__).parent
rows = (folder / "data/mbpp_labeled.jsonl").read_text().splitlines()
(folder / "checkpoints_critic").mkdir(exist_ok=True)
for epoch in range(1, 4):
    (folder / f"checkpoints_critic/critic_e{epoch}.pt").write_bytes(bytes([epoch]) * 1000)
    print(f"epoch {epoch} Train Loss = 0.{9 - epoch} Val Acc = {80 + epoch}.00% of {len(rows)}", flush=True)
    time.sleep(float(sys.argv[1]) if sys.argv[1:] else 0)
""",
}
# The guide's commands, by what names them, and where their counterpart is tried below.
COMMANDS = {
    r"lambda_helper.py launch": "launch",
    r"lambda_helper.py wait": "wait",
    r"lambda_helper.py setup-ssh": "setup-ssh",
    r"lambda_helper.py sync ": "sync",
    r"lambda_helper.py terminate": "terminate",
    r"SCRIPT\.py|generate_\*\.py|execute_\*\.py|train_\*\.py": "exec",
    r"ps aux": "ps",
    r"nvidia-smi": "gpu",
    r"tail -f": "logs",
    r"grep .Val Acc": "grep",
    r"pip install": "exec --package",
}


@pytest.fixture
def account(tmp_path: Path) -> Iterator[RentedInstance]:
    """Nothing is rented yet."""
    try:
        with Machines() as machines, FakeLambda(key=KEY, machines=machines, rate=False) as fake:
            instance = RentedInstance(tmp_path, fake)
            instance.environment |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[1])}
            (tmp_path / "home").mkdir()
            yield instance
            left = fake.living()
            for found in left:
                fake.end_from_outside(str(found["id"]))
            end_guards(instance.ledger.folder)
            assert left == []
    except Unavailable as error:
        pytest.skip(str(error))


def test_every_command_of_the_guide_is_among_those_that_are_tried() -> None:
    guides = list((SHARED / "seed").glob("*.txt"))
    if not guides:
        pytest.skip("the guide is not beside the checkout")
    text = guides[0].read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]
    joined = [
        line for line in "\n".join(lines).replace("&& \n", "&& ").splitlines() if "python" in line or "ssh" in line
    ]
    joined += re.findall(r"`((?:python|ssh|tail|grep) [^`]+)`", text)
    assert len(joined) > 12
    assert [line for line in joined if not any(re.search(pattern, line) for pattern in COMMANDS)] == []


def test_the_guide_command_by_command(account: RentedInstance, tmp_path: Path) -> None:
    project = git_repository(tmp_path / "Fractal", {f"{PHASE}/{name}": text for name, text in SCRIPTS.items()})
    done: list[str] = []

    def invoke(*words: str, code: int = 0) -> str:
        result = account.invoke(*words, folder=project)
        assert result.returncode == code, result.stderr
        done.append(words[0])
        return result.stdout + result.stderr

    # instance lifecycle
    assert "is ready" in invoke("launch", "--type=gpu_1x_a10", "--register-key", "--max-hours=2")
    assert "ssh lambda" in invoke("wait")
    invoke("setup-ssh")
    assert "Include" in (tmp_path / "home/.ssh/config").read_text()
    send_images(ssh_config.config_file(account.ledger.folder))  # with a stand-in; `build push` have tests of their own

    # sync, run with a log, follow, check
    assert PHASE in invoke("sync", f"--dir={PHASE}")
    assert account.machine.machine.sh(f"ls /home/ubuntu/fractal/src/{Path(PHASE).name}").split() == sorted(SCRIPTS)
    fetch = "--fetch=checkpoints_*/,data/*.jsonl"
    wanted = fetch.replace("data", f"{PHASE}/data")
    invoke("exec", "--name=phase14", wanted, "--", "python", f"{PHASE}/generate_mbpp.py")
    shown = invoke("exec", "--resume=phase14", wanted, "--", "python", f"{PHASE}/execute_mbpp.py")
    assert "pass rate 20/20" in shown
    training = account.start(
        "exec", "--resume=phase14", wanted, "--", "python", f"{PHASE}/train_critic.py", "3", folder=project
    )
    until(lambda: "Val Acc = 81" in "".join(path.read_text() for path in project.glob("runs/phase14/logs/*.log")))
    assert f"python {PHASE}/train_critic.py 3" in invoke("ps")
    assert "A100" in invoke("gpu")
    assert "Val Acc = 83.00% of 20" in invoke("logs", "--follow")
    code, out, err = account.finish(training)
    assert code == 0, err
    (log,) = [path for path in project.glob("runs/phase14/logs/*.log") if "Val Acc" in path.read_text()]
    assert log.read_text() in out  # 2>&1 | tee
    lines = invoke("grep", "Val Acc").splitlines()
    assert [line.rpartition("Val Acc = ")[2] for line in lines] == [f"{80 + epoch}.00% of 20" for epoch in (1, 2, 3)]
    files = {
        path.relative_to(project / "runs/phase14/files").as_posix()
        for path in project.glob("runs/phase14/files/**/*.*")
    }
    assert files == {
        *(f"{PHASE}/checkpoints_critic/critic_e{epoch}.pt" for epoch in (1, 2, 3)),
        *(f"{PHASE}/data/{name}.jsonl" for name in ("mbpp_generations", "mbpp_labeled")),
    }

    # troubleshooting
    assert "--package=no_such_module==VERSION" in invoke("exec", "--", "python", "-c", "import no_such_module", code=1)
    assert "process died" in invoke("exec", "--name=dies", "--", "sh", "-c", "kill -9 $$", code=137)
    assert "0.75" in invoke("cost")
    assert "is terminated" in invoke("terminate")
    assert account.fake.living() == []
    assert {name.split()[0] for name in COMMANDS.values()} <= set(done)
