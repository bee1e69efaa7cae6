"""A job: the pipeline's container on the rented machine, started and left alone; its output and its end.

The engine over there keeps the whole output. What is here of it is a file, runs/NAME/logs/JOB.log, and its length is
where to go on: so no line is lost or doubled, however often the connection or this process ends.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from filelock import FileLock, Timeout

from fractal.cloud.remote import Remote, RemoteError
from fractal.errors import InputError
from fractal.images import ssh

JOB = "fractal.job"  # labels of the container
RUN = "fractal.run"
WORDS = "fractal.words"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
LIST = """\
docker=$1
ids=$($docker ps -aq --filter label=fractal.job) || exit 1
[ -z "$ids" ] && exit
# One may go meanwhile: docker then prints an empty line for it, and fails.
$docker inspect --format '[{{json .Config.Labels}},{{json .State}}]' $ids | grep . || :
"""
HAVE = '$1 inspect "$2" > /dev/null 2>&1 || exit 1\n'  # else docker's own words would look like the job's
FOLLOW = HAVE + '$1 logs -f "$2" 2>&1 | tail -c +"$3"'
REST = HAVE + '$1 logs "$2" 2>&1 | tail -c +"$3"'
END = """\
docker=$1
$docker rm -fv "fractal-job-$2" "fractal-sandbox-$2" > /dev/null 2>&1
for i in 1 2 3 4 5 6 7 8 9 10; do $docker volume rm -f "fractal-sandbox-$2" > /dev/null 2>&1 && break; sleep 0.2; done
! $docker inspect "fractal-job-$2" > /dev/null 2>&1
"""
SWEEP = """\
docker=$1
volumes() { $docker volume ls -q --filter name=fractal-sandbox-; }
{ $docker ps -a --filter name=fractal-sandbox- --format '{{.Names}}'; volumes; } |
  sort -u | while read -r name; do
    $docker inspect "fractal-job-${name#fractal-sandbox-}" > /dev/null 2>&1 && continue
    $docker rm -fv "$name" > /dev/null 2>&1 < /dev/null
    $docker volume rm -f "$name" > /dev/null 2>&1 < /dev/null
  done
"""
TAIL = 20_000  # bytes of the output that a diagnosis looks at


@dataclass(frozen=True, slots=True)
class Job:
    """A pipeline container over there."""

    id: str
    run: str  # name of the run
    words: tuple[str, ...]  # of `fractal run`, as asked for
    state: Literal["created", "running", "exited"]
    exit_code: int
    out_of_memory: bool  # the kernel killed it
    started: str  # ISO time; "0001-..." before

    @property
    def container(self) -> str:
        return f"fractal-job-{self.id}"

    @property
    def ended(self) -> bool:
        return self.state == "exited"


def new_id(stage: str) -> str:
    """Names a job, its containers and its log: the stage, the time, and what keeps two of one second apart."""
    return f"{stage}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.urandom(2).hex()}"


def labels(job: str, run: str, words: tuple[str, ...]) -> Mapping[str, str]:
    return {JOB: job, RUN: run, WORDS: json.dumps(words)}


def check_name(run: Path) -> str:
    """The run's name, fit for a folder and a label over there. Raises InputError."""
    name = run.name
    if not NAME.fullmatch(name):
        raise InputError(
            f"--run {run}: {name!r} cannot be a run's name on the machine. Use letters, digits, '-', '_', '.'."
        )
    return name


def jobs(remote: Remote) -> list[Job]:
    """All over there, oldest first."""
    return parse(remote.must("list its containers", LIST, remote.docker_words))


def parse(lines: str) -> list[Job]:
    """What LIST prints. Raises RemoteError."""
    found = []
    for line in lines.splitlines():
        try:
            label, state = json.loads(line)
            status = state["Status"]
            found.append(
                Job(
                    label[JOB], label.get(RUN, ""), tuple(json.loads(label.get(WORDS, "[]"))),
                    "running" if status in ("running", "paused", "restarting") else
                    "created" if status == "created" else "exited",
                    int(state["ExitCode"]), bool(state.get("OOMKilled")), str(state.get("StartedAt", "")),
                )
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteError(
                f"The engine over there says {line[:100]!r}, not a container's state: {error!r}."
            ) from error
    return sorted(found, key=lambda job: job.started)


class JobGone(RemoteError):
    """Its container is not there any more: whoever followed it has brought it home, or somebody removed it."""


def find(remote: Remote, job: str) -> Job:
    """One of them, as it is now. Raises JobGone."""
    for one in jobs(remote):
        if one.id == job:
            return one
    raise JobGone(
        f"The job {job} is not on {remote.host} any more: its container was removed there. What came home is kept; "
        "invoke run starts the rest."
    )


def log_file(folder: Path, job: str) -> Path:
    return folder / "logs" / f"{job}.log"


@contextmanager
def _held(log: Path) -> Iterator[IO[bytes] | None]:
    """The log, for the one process that writes it; None for the others."""
    log.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(log.with_name(f".{log.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield None
        return
    try:
        with log.open("ab", buffering=0) as file:
            yield file
    finally:
        lock.release()


def follow(
    remote: Remote,
    job: str,
    log: Path,
    screen: Callable[[bytes], None],
    *,
    replay: bool = False,
    once: bool = False,
) -> Job:
    """Copy the job's output to its log and to the screen until it ends; the ended job. Lost connections are made again.

    `replay`: the screen first gets what the log has already. `once`: what there is now, without waiting for more.
    """
    with _held(log) as file:
        offset = file.tell() if file else 0
        if replay and file and offset:
            screen(log.read_bytes())

        def take(stream_script: str) -> None:
            nonlocal offset
            stream = link.stream(stream_script, remote.docker_words, f"fractal-job-{job}", str(offset + 1))
            assert stream.stdout is not None
            try:
                while data := stream.stdout.read(65536):
                    if file:
                        file.write(data)  # first: what the screen shows is kept
                    offset += len(data)
                    screen(data)
            finally:
                stream.kill()
                stream.wait()
                stream.stdout.close()

        while True:
            link = remote.link
            try:
                if once:
                    state = find(remote, job)
                    take(REST)
                    link.check_alive()
                    return state
                take(FOLLOW)
                link.check_alive()
                state = find(remote, job)
                if state.ended:
                    before = offset
                    take(REST)  # what the engine had not written out when it closed the stream
                    link.check_alive()
                    if offset == before:
                        return state
                else:
                    time.sleep(0.5)  # the stream ended, the job did not: the engine over there was restarted
            except ssh.SshConnectionError as error:
                remote.again(error, link)


def end(remote: Remote, job: str) -> None:
    """Remove a job with its sidecar, running or not."""
    remote.must(f"remove the job {job}", END, remote.docker_words, job)


def sweep(remote: Remote) -> None:
    """Remove sandboxes without a job: a client was killed while it started one. No other may be starting one now."""
    remote.must("remove old sandboxes", SWEEP, remote.docker_words)


def diagnose(job: Job, tail: str) -> str | None:
    """What is behind a job's failure, and the remedy; nothing for one that succeeded or explained itself."""
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
            "Never install by hand over there: the next machine would not have it."
        )
    if job.out_of_memory or re.search(r"\bKilled\b", tail[-300:]):
        return "The machine's memory was full: the kernel killed the job. Take a larger type; the same command goes on."
    if re.search(r"could not select device driver|nvidia-container-cli", tail):
        return "Docker over there has no GPU. Run: invoke wait, which repairs the NVIDIA toolkit."
    if "No space left on device" in tail or "no space left on the disk" in tail:
        return "The disk over there is full. Make room (invoke ssh), then run the same command: it goes on."
    if job.exit_code in (137, 139, 134, 143):
        names = {137: "killed", 139: "a segmentation fault", 134: "aborted", 143: "told to end"}
        return f"The process died ({names[job.exit_code]}). The same command goes on where it stopped."
    return None
