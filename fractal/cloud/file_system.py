"""Fractal's folder on a file system of Lambda's, which outlives the instance that has it attached.

It holds what a next instance in the region need not fetch again: weights, compiled kernels, inputs by their content.
"""

import hashlib
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence

from fractal.cloud.ledger import Entry
from fractal.cloud.remote_host import Remote, script
from fractal.images import recipes
from fractal.images.recipes import CACHE

PREPARE_TIMEOUT_S = 120.0  # of a network's file system that is slow, with files of another user
WEIGHTS = ("huggingface", "fractal")  # folders of CACHE with what is the same on any machine
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


def cache_binds(remote: Remote, entry: Entry, accelerator: str) -> tuple[str, ...]:
    """The binds of a job's cache on the file system, SOURCE:TARGET; none without one. Raises RemoteError.

    Weights are any instance's. All else is for those of the same GPU, processor and locked packages: vLLM, torch and
    Triton compile kernels for them, and not every library says so in the names of its files.
    """
    if (root := folder(entry)) is None:
        return ()
    locks = [(recipes.ROOT / lock).read_bytes() for lock in recipes.LOCKS[accelerator]]
    name = kernels_name(remote.driver.gpus, locks)
    kernels = remote.check("make the folder of kernels", script("make_kernel_folder"), f"{root}/cache/kernels/{name}")
    binds = tuple(f"{root}/cache/{weights}:{CACHE}/{weights}" for weights in WEIGHTS)
    return (f"{kernels.strip()}:{CACHE}", *binds)


def kernels_name(gpus: Sequence[str], locks: Iterable[bytes]) -> str:
    """The part of the name of a folder of compiled kernels that GPU and locked packages decide."""
    gpu = re.sub("[^A-Za-z0-9]+", "-", gpus[0]).strip("-")[:60] if gpus else "cpu"
    return f"{gpu}-{hashlib.sha256(b''.join(locks)).hexdigest()[:8]}"
