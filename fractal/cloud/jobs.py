"""A job: the pipeline's container on the instance, started detached; its output and its end.

The engine there keeps the whole output. The copy here is runs/NAME/logs/JOB.log, and its length is the offset to
continue at: so no line is lost or doubled, however often the connection or this process ends.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from filelock import FileLock, Timeout

from fractal.cloud.remote_host import Remote, RemoteError, script
from fractal.errors import InputError
from fractal.images import ssh

JOB_LABEL = "fractal.job"  # labels of the container
RUN_LABEL = "fractal.run"
ARGUMENTS_LABEL = "fractal.words"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
DIAGNOSED_BYTES = 20_000  # of the end of the output


@dataclass(frozen=True, slots=True)
class Job:
    """A pipeline container on the instance."""

    id: str
    run: str  # name of the run
    arguments: tuple[str, ...]  # of `fractal run`, as the user gave them
    state: Literal["created", "running", "exited"]
    exit_code: int
    out_of_memory: bool  # the kernel killed it
    started: str  # ISO time; "0001-..." before

    @property
    def container(self) -> str:
        return container_name(self.id)

    @property
    def ended(self) -> bool:
        return self.state == "exited"


class JobRemovedError(RemoteError):
    """The job's container does not exist: another process has fetched its results, or somebody removed it."""


def container_name(job: str) -> str:
    return f"fractal-job-{job}"


def new_id(stage: str) -> str:
    """The name of a job, its containers and its log: stage, time, and random digits."""
    return f"{stage}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.urandom(2).hex()}"


def labels(job: str, run: str, arguments: tuple[str, ...]) -> Mapping[str, str]:
    return {JOB_LABEL: job, RUN_LABEL: run, ARGUMENTS_LABEL: json.dumps(arguments)}


def check_name(run: Path) -> str:
    """The run's name, valid for a folder and a label on the instance. Raises InputError."""
    name = run.name
    if not NAME.fullmatch(name):
        raise InputError(
            f"--run {run}: {name!r} cannot be a run's name on the instance. Use letters, digits, '-', '_', '.'."
        )
    return name


def list_jobs(remote: Remote) -> list[Job]:
    """All jobs on the instance, oldest first."""
    return parse(remote.check("list its containers", script("list_jobs")))


def parse(lines: str) -> list[Job]:
    """The output of list_jobs.sh. Raises RemoteError."""
    jobs = []
    for line in lines.splitlines():
        try:
            label, state = json.loads(line)
            status = state["Status"]
            running = status in ("running", "paused", "restarting")
            jobs.append(
                Job(
                    id=label[JOB_LABEL],
                    run=label.get(RUN_LABEL, ""),
                    arguments=tuple(json.loads(label.get(ARGUMENTS_LABEL, "[]"))),
                    state="running" if running else "created" if status == "created" else "exited",
                    exit_code=int(state["ExitCode"]),
                    out_of_memory=bool(state.get("OOMKilled")),
                    started=str(state.get("StartedAt", "")),
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteError(
                f"The instance's engine answers {line[:100]!r}, not a container's state: {error!r}."
            ) from error
    return sorted(jobs, key=lambda job: job.started)


def find(remote: Remote, id: str) -> Job:
    """The job as it is now. Raises JobRemovedError."""
    for job in list_jobs(remote):
        if job.id == id:
            return job
    raise JobRemovedError(
        f"The job {id} is not on {remote.host} any more: its container was removed there. What was fetched is kept; "
        "invoke run starts the rest."
    )


def log_file(folder: Path, job: str) -> Path:
    return folder / "logs" / f"{job}.log"


@contextmanager
def _locked(log: Path) -> Iterator[IO[bytes] | None]:
    """The log, open for the one process that writes it; None for other processes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(log.with_name(f".{log.name}.lock"), timeout=0))
        except Timeout:
            yield None
            return
        yield stack.enter_context(log.open("ab", buffering=0))


def follow(remote: Remote, job: str, log: Path, write: Callable[[bytes], None], *, once: bool = False) -> Job:
    """Copy the job's output to its log and to `write` until the job ends; returns the ended job.

    `write` first gets what the log has already. Lost connections are made again. `once`: copy what there is now,
    without waiting for more.
    """
    with _locked(log) as file:
        offset = file.tell() if file else 0
        if offset:
            write(log.read_bytes())

        def copy_output(option: str) -> None:
            nonlocal offset
            stream = link.stream(script("job_output"), container_name(job), str(offset + 1), option)
            assert stream.stdout is not None
            try:
                while data := stream.stdout.read(65536):
                    if file:
                        file.write(data)  # first: what the screen shows is kept
                    offset += len(data)
                    write(data)
            finally:
                stream.kill()
                stream.wait()
                stream.stdout.close()
            link.check_alive()

        while True:
            link = remote.link
            try:
                copy_output("" if once else "-f")
                state, copied = find(remote, job), offset
                if not once and not state.ended:
                    time.sleep(0.5)  # the stream ended, the job did not: the engine was restarted
                    continue
                copy_output("")  # what the engine had not written when it closed the stream
                if once or offset == copied:
                    return state
            except ssh.SshConnectionError as error:
                remote.reconnect(error, link)


def remove(remote: Remote, job: str) -> None:
    """Remove a job with its sandbox, running or not."""
    remote.check(f"remove the job {job}", script("remove_job"), job)


def remove_orphaned_sandboxes(remote: Remote) -> None:
    """Remove sandboxes without a job. No other client may be starting a job now."""
    remote.check("remove old sandboxes", script("remove_orphaned_sandboxes"))


def diagnose(job: Job, tail: str) -> str | None:
    """The cause of a job's failure and the remedy; None for one that succeeded or named its error itself.

    `tail`: the end of its output.
    """
    if job.exit_code == 0:
        return None
    if re.search(r"CUDA out of memory|OutOfMemoryError|No available memory for the cache blocks", tail):
        return (
            "The GPU's memory is full (CUDA out of memory). Take a smaller --model or --max-tokens, or a larger GPU "
            "(invoke terminate launch --type=...). What was finished is kept: the same command goes on."
        )
    if match := re.search(r"No module named '?([\w.]+)", tail):
        return (
            f"The image lacks the package {match[1]}. Add it to pyproject.toml, then: invoke lock build push run. "
            "Never install by hand on the instance: the next one would not have it."
        )
    if job.out_of_memory or re.search(r"\bKilled\b", tail[-300:]):
        return "The instance's memory is full: the kernel killed the job. Take a larger type; the same command goes on."
    if re.search(r"could not select device driver|nvidia-container-cli", tail):
        return "Docker on the instance has no GPU. Run: invoke wait, which repairs the NVIDIA toolkit."
    if "No space left on device" in tail or "no space left on the disk" in tail:
        return "The disk of the instance is full. Make room (invoke ssh), then run the same command: it goes on."
    reasons = {137: "killed", 139: "a segmentation fault", 134: "aborted", 143: "terminated"}
    if job.exit_code in reasons:
        return f"The process died ({reasons[job.exit_code]}). The same command goes on where it stopped."
    return None
