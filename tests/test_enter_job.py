"""What a job's container runs first, as processes here: secrets received, a queue in order, the command's exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fractal.images import enter_job


class Jobs:
    """Jobs of one queue, as processes here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.queue = folder / "queue"
        self.secrets = folder / "secrets"
        self.queue.mkdir()
        self.secrets.mkdir()
        text = Path(enter_job.__file__).read_text()
        text = text.replace('"/run/queue"', repr(str(self.queue))).replace('"/run/secrets"', repr(str(self.secrets)))
        self.text = text

    def begin(
        self, job: str, *command: str, after: tuple[str, ...] = (), secrets: bool = False
    ) -> subprocess.Popen[str]:
        (self.queue / job).touch()
        settings = json.dumps({"job": job, "after": after, "secrets": secrets})
        return subprocess.Popen(
            [sys.executable, "-c", self.text, settings, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def queue(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path)


def test_jobs_start_in_the_order_in_which_they_were_made(queue: Jobs) -> None:
    first = queue.begin("0", "sleep", "60")
    said = queue.folder / "order"
    names = [str(number) for number in range(1, 6)]
    others = [
        queue.begin(name, "sh", "-c", f"echo {name} >> {said}; sleep 0.1", after=("0", *names[:number]))
        for number, name in enumerate(names)
    ]
    beside = queue.begin("beside", "true")
    assert beside.wait(20) == 0
    assert others[0].stdout is not None
    assert others[0].stdout.readline() == "waiting for the job 0 to end\n"
    assert not said.exists()
    first.kill()  # however it ends
    assert [other.wait(20) for other in others] == [0] * 5
    assert said.read_text().split() == names
    for job in (first, *others):
        job.communicate()


def test_a_job_that_was_removed_or_never_began_is_not_waited_for(queue: Jobs) -> None:
    queue.text = queue.text.replace("BEGIN_TIMEOUT_S = 60.0", "BEGIN_TIMEOUT_S = 0.5")
    (queue.queue / "never").touch()
    assert queue.begin("next", "true", after=("removed", "never")).wait(20) == 0


def test_secrets_become_environment_and_a_file_and_are_gone(queue: Jobs) -> None:
    code = "import os; print(os.environ['KEY'], open(os.environ['SECRETS'] + '/hf_token').read(), os.listdir(os.environ['SECRETS']))"
    job = queue.begin("a", "env", f"SECRETS={queue.secrets}", sys.executable, "-c", code, secrets=True)
    (queue.secrets / "part").write_text('{"token": "hf_x", "environment": {"KEY": "v=1\\n2"}}')
    (queue.secrets / "part").rename(queue.secrets / "delivered")
    out, err = job.communicate(timeout=20)
    assert out == "v=1\n2 hf_x ['hf_token']\n", err
    assert (queue.secrets / "hf_token").stat().st_mode & 0o777 == 0o400


def test_a_job_whose_secrets_do_not_come_says_so(queue: Jobs) -> None:
    queue.text = queue.text.replace("DELIVERY_TIMEOUT_S = 60.0", "DELIVERY_TIMEOUT_S = 0.5")
    job = queue.begin("a", "true", secrets=True)
    out, _ = job.communicate(timeout=20)
    assert job.returncode == 3
    assert "did not arrive" in out


def test_the_exit_code_is_the_commands(queue: Jobs) -> None:
    (queue.folder / "file").touch()
    for command, code in {
        ("sh", "-c", "exit 124"): 124,
        ("sh", "-c", "kill -9 $$"): -9,
        ("no-such-program",): 127,
        (str(queue.folder / "file"),): 126,
    }.items():
        job = queue.begin("a", *command)
        _, err = job.communicate(timeout=20)
        assert job.returncode == code
        assert "Traceback" not in err
