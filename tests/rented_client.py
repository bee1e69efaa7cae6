"""`invoke run` on a simulated instance, with a stand-in for the pipeline's image, that may be killed at its n-th step.

python -m tests.rented_client '{"run": ..., "n": ..., "kill_at": ..., "terminate": ...}'
"""

import json
import os
import subprocess
import sys

import requests

from fractal import console
from fractal.cloud import chain, rented, results
from tests.killed_client import Steps

STAND_IN = "stand-in:1"


def main() -> int:
    job = json.loads(sys.argv[1])
    if job.get("kill_at", -1) >= 0:
        steps = Steps(job["kill_at"], 2)
        steps.wrap(requests.Session, "send", lambda session, request, **_: f"{request.method} {request.path_url}")
        steps.wrap(os, "replace", lambda source, target: "replace")
        steps.wrap(subprocess.Popen, "__init__", lambda process, command, *_: f"start {command[0]}")
    sent = chain.image_name
    chain.image_name = lambda key: sent(key) if key == "sandbox" else STAND_IN
    results.EVERY_S = 0.5
    options = {
        "run": job["run"], "stage": job.get("stage", "all"), "problems": "", "model": job["model"], "n": str(job["n"]),
        "split": "", "limit": "", "more": job.get("more", ""), "image": job.get("image", "pipeline-cpu"), "where": "lambda",
        "terminate": job.get("terminate", False),
    }  # fmt: skip
    asked = [("run", options)]
    return console.report_errors(lambda: chain.conduct(lambda: rented.run(options), asked, dry=False), "run")


if __name__ == "__main__":
    sys.exit(main())
