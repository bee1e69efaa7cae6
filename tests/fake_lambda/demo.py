"""The whole chain on a laptop: a fake of Lambda's API, a simulated machine, the real images, the demo's job.

    python -m tests.fake_lambda.demo [--limit L] [-n N]      # or: invoke demo-cloud

Nothing is rented and nothing is billed; the commands are those that a user types.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fractal.cloud import guard
from fractal.cloud.ledger import Ledger
from tests.fake_lambda.machines import Machines
from tests.fake_lambda.server import FakeLambda
from tests.machine import Unavailable, need

ROOT = Path(__file__).parents[2]
KEY = "a-key-of-the-demo"


def environment(fake: FakeLambda, state: Path) -> dict[str, str]:
    """With which every command believes that this is Lambda."""
    return {**os.environ, "FRACTAL_LAMBDA_URL": fake.url, "LAMBDA_API_KEY": KEY, "FRACTAL_STATE": str(state)}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="invoke demo-cloud", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", default="runs/demo-cloud", help="the run folder")
    parser.add_argument("--limit", default="", help="problems of each split; default: all 24")
    parser.add_argument("-n", default="8", help="samples per problem")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        try:
            need("ssh-keygen", "openssh-client", log=Path(folder) / "log")
            need("rsync", "rsync", log=Path(folder) / "log")
        except Unavailable as error:
            print(f"demo-cloud: {error}", file=sys.stderr)
            return 3
    with (
        tempfile.TemporaryDirectory(prefix="fractal-demo-cloud-") as state,
        Machines() as machines,
        FakeLambda(key=KEY, machines=machines, boot_s=3.0) as fake,
    ):
        chain = ["launch", "--type=gpu_1x_a10", "--max-hours=2", "--register-key", "build", "push"]
        chain += [
            "--image=pipeline-cpu,sandbox",
            "run",
            "--image=pipeline-cpu",
            f"--run={given.run}",
            "--problems=starter",
        ]
        chain += ["-n", given.n, "--more=--temperature 0.6 --max-tokens 160", "--terminate"]
        chain += [f"--limit={given.limit}"] if given.limit else []
        print(f"demo-cloud: invoke {' '.join(chain)}", file=sys.stderr, flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "invoke", *chain], cwd=ROOT, env=environment(fake, Path(state))
        )
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:  # it has got the same one, and ends the instance
                continue
        living = fake.living()
        book, deadline = Ledger(Path(state)), time.monotonic() + 20
        while any(guard.alive(book, entry.name) for entry in book.entries()) and time.monotonic() < deadline:
            time.sleep(0.2)  # it notices that its instance has ended, and goes
        print(
            f"demo-cloud: exit code {code}; {fake.launches} launched, {len(living)} still alive as the cloud sees it",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return code or bool(living)


if __name__ == "__main__":
    sys.exit(main())
