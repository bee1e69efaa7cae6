"""`invoke run` on a simulated instance, with a stand-in for the pipeline's image, that may be killed at its n-th step.

python -m tests.rented_client '{"run": ..., "n": ..., "kill_at": ..., "terminate": ...}'
"""

import json
import os
import subprocess
import sys

import requests

from fractal import console
from fractal.cloud import lambda_api, run_commands, transfer
from fractal.cloud.lambda_api import RateLimiter
from fractal.cloud.session import Session
from tasks import pipeline
from tests.killed_client import Steps

STAND_IN = "stand-in:1"


def main() -> int:
    job = json.loads(sys.argv[1])
    if job.get("kill_at", -1) >= 0:
        steps = Steps(job["kill_at"], 2)
        steps.wrap(requests.Session, "send", lambda session, request, **_: f"{request.method} {request.path_url}")
        steps.wrap(os, "replace", lambda source, target: "replace")
        steps.wrap(subprocess.Popen, "__init__", lambda process, command, *_: f"start {command[0]}")
    image_name = Session.image_name
    Session.image_name = lambda self, key: image_name(self, key) if key == "sandbox" else STAND_IN  # type: ignore[method-assign]
    transfer.FETCH_INTERVAL_S = 0.5
    lambda_api.RateLimiter = lambda folder: RateLimiter(folder, request_s=0, launch_s=0)  # type: ignore[misc,assignment]
    options = {
        "run": job["run"], "stage": job.get("stage", "all"), "problems": "", "model": job["model"], "n": str(job["n"]),
        "split": "", "limit": "", "more": job.get("more", ""), "image": job.get("image", "pipeline-cpu"), "where": "lambda",
        "secret": job.get("secret", ()),
        "terminate": job.get("terminate", False),
    }  # fmt: skip
    session = Session(pipeline())

    def run_tasks() -> int:
        codes: list[int] = []
        session.run_tasks([("run", options)], lambda: codes.append(run_commands.run(session, options)))
        return codes[0]

    return console.report_errors(run_tasks, "run")


if __name__ == "__main__":
    sys.exit(main())
