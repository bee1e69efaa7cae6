"""Fractal's folder on a file system of Lambda's, which outlives the instance that has it attached.

It holds what a next instance in the region need not fetch again: weights, compiled kernels, inputs by their content.
"""

import subprocess
from collections.abc import Callable

from fractal.cloud.ledger import Entry
from fractal.cloud.remote_host import script

PREPARE_TIMEOUT_S = 120.0  # of a network's file system that is slow, with files of another user
LIST_MOUNTS = "findmnt --types nfs,nfs4,virtiofs"


def folder(entry: Entry) -> str | None:
    """Fractal's folder on the instance's file system, the first of several; None for an instance without one.

    As "/lambda/nfs/models/fractal".
    """
    return f"{entry.file_systems[0].mount_point}/fractal" if entry.file_systems else None


def prepare(run: Callable[..., subprocess.CompletedProcess[str]], entry: Entry) -> str:
    """Make the folder, with `cache`, `inputs` and `models` in it, for the user that jobs run as. It may be repeated.

    `run`: of a connection to the instance. Returns what is wrong with the file system, "" if nothing is.
    """
    if not entry.file_systems:
        return ""
    system = entry.file_systems[0]
    done = run(script("prepare_file_system"), system.mount_point, timeout_s=PREPARE_TIMEOUT_S)
    answer = (done.stdout.strip() or done.stderr.strip() or "no reason given").splitlines()[-1].rstrip(". ")[:200]
    if answer == "ready":
        return ""
    if answer == "absent":
        return f"The file system {system.name} is not mounted at {system.mount_point} on the instance"
    return f"The file system {system.name} cannot be written on the instance ({answer})"
