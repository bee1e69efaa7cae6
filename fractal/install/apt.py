"""Debian packages, for where we are root on Debian or Ubuntu. Standard library only: set-up runs before the venv."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

INSTALL_TIMEOUT_S = 900  # mmdebstrap or docker.io with their dependencies took 20 to 40 s
UPDATE_TIMEOUT_S = 300


class AptError(Exception):
    """A Debian package could not be installed: one line with apt's reason."""


def allowed() -> bool:
    """Whether this process may install Debian packages."""
    return hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get") is not None


def reason(output: str) -> str:
    """The line of apt's output that says why it failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "dpkg: error"))]
    return (errors or lines or ["no output"])[-1][:300]


def knows(package: str) -> bool:
    """Whether apt's lists, as they are, have a package."""
    return subprocess.run(["apt-cache", "show", package], capture_output=True, timeout=60).returncode == 0


def install(*packages: str, log: Path) -> None:
    """apt-get update and install; everything printed goes to the end of `log`. Raises AptError."""
    log.parent.mkdir(parents=True, exist_ok=True)
    options = ["-q", "-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=120"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}

    def run(argv: list[str], timeout_s: int) -> str | None:
        """None, or why it failed."""
        with log.open("ab+") as out:
            start = out.seek(0, os.SEEK_END)
            try:
                done = subprocess.run(
                    argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, timeout=timeout_s
                )
            except subprocess.TimeoutExpired:
                return f"no end after {timeout_s} s"
            out.seek(start)
            return reason(out.read().decode(errors="replace")) if done.returncode else None

    run(["dpkg", "--configure", "-a"], INSTALL_TIMEOUT_S)  # mends what a killed apt-get left; else no work
    # A third party's source that fails to update must not stop us: what counts is whether install finds the packages.
    stale = run(["apt-get", "update", *options], UPDATE_TIMEOUT_S)
    failed = run(["apt-get", "install", "-y", "--no-install-recommends", *options, *packages], INSTALL_TIMEOUT_S)
    if failed:
        hint = f" (apt-get update: {stale})" if stale else ""
        raise AptError(
            f"apt-get install {' '.join(packages)} failed: {failed}{hint}. "
            f"Mend that and run the command again; log: {log}"
        )
