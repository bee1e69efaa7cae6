"""A job: the pipeline's container on the instance: its start with inputs and images, its output, its end.

It runs the stages, or a command of the user's. Jobs start in the order in which they were made, each when those before
it have ended, but for those that are to run beside others (images/enter_job.py).

The engine there keeps the whole output. The copy here is runs/NAME/logs/JOB.log, and its length is the offset to
continue at: so no line is lost or doubled, however often the connection or this process ends.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

import docker
import docker.errors
from filelock import FileLock, Timeout

from fractal.cloud import file_system, prerequisites, transfer
from fractal.cloud.ledger import Entry, Ledger
from fractal.cloud.options import ExecRequest, RunRequest, local_path, secret_values
from fractal.cloud.remote_host import ROOT, Remote, RemoteError, script
from fractal.cloud.session import Session, log
from fractal.cloud.ssh_config import ALIAS
from fractal.cloud.transfer import RemoteUser
from fractal.errors import OutsideError
from fractal.images import build as images
from fractal.images import containers, hub_token, recipes, ssh
from fractal.images.docker_client import first_line

JOB_LABEL = "fractal.job"  # labels of the container
RUN_LABEL = "fractal.run"
ARGUMENTS_LABEL = "fractal.words"
COMMAND_LABEL = "fractal.command"  # its value is "1" where the words are a command of the user's
AFTER_LABEL = "fractal.after"
INPUTS = "/inputs"  # files and models from this machine, in the container
# Of a command's container: the user's project, what `sync` sent, and the instance's runs.
PROJECT, SOURCES, RUNS = (f"{recipes.WORK}/{name}" for name in ("project", "src", "runs"))
DIAGNOSED_BYTES = 20_000  # of the end of the output


@dataclass(frozen=True, slots=True)
class Job:
    """A pipeline container on the instance."""

    id: str
    run: str  # name of the run
    arguments: tuple[str, ...]  # of `fractal run`, or a command, as the user gave them
    state: Literal["created", "running", "exited"]
    exit_code: int
    out_of_memory: bool  # the kernel killed it
    started: str  # ISO time; "0001-..." before
    is_command: bool = False  # of the user's
    after: tuple[str, ...] = ()  # ids of the jobs that it waited or waits for

    @property
    def ended(self) -> bool:
        return self.state == "exited"

    @property
    def command(self) -> str:
        """What it runs, as a shell would take it."""
        return shlex.join(self.arguments if self.is_command else ("fractal", "run", *self.arguments))

    def waits_for(self, jobs: Iterable["Job"]) -> list[str]:
        """Ids of those jobs that have to end before it starts."""
        return [job.id for job in jobs if job.id in self.after and not job.ended and not self.ended]


class JobRemovedError(RemoteError):
    """The job's container does not exist: another process has fetched its results, or somebody removed it."""


def container_name(job: str) -> str:
    return f"fractal-job-{job}"


def new_id(stage: str) -> str:
    """The name of a job, its containers and its log: stage, time, and random digits."""
    return f"{stage}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.urandom(2).hex()}"


def job_labels(
    job: str, run: str, arguments: tuple[str, ...], *, is_command: bool = False, after: tuple[str, ...] = ()
) -> Mapping[str, str]:
    labels = {JOB_LABEL: job, RUN_LABEL: run, ARGUMENTS_LABEL: json.dumps(arguments), AFTER_LABEL: json.dumps(after)}
    return labels | ({COMMAND_LABEL: "1"} if is_command else {})


@contextmanager
def one_start_at_a_time(ledger: Ledger) -> Iterator[None]:
    """No other command of this state folder starts a job meanwhile: the order of jobs is that of their starts."""
    lock = FileLock(ledger.folder / "job.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log("another command is starting a job, waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def start_job(session: Session, remote: Remote, entry: Entry, request: RunRequest, user: RemoteUser) -> str:
    """Start a run of the stages and return the job's id. Raises OutsideError."""
    arguments, name = list(request.arguments), request.folder.name
    check_driver(remote, request.image)  # before the inputs are sent, which may be large
    token = hub_token.find(request.arguments, request.folder)
    root, setup = _setup(remote, entry, user, new_id(arguments[1]), request.image, request.secrets, token)
    for option in ("--problems", "--model"):
        if path := local_path(arguments, option):
            arguments[arguments.index(option) + 1] = f"{INPUTS}/{transfer.send_input(remote, path, root, log)}"
    model = hub_token.model_of(arguments, request.folder)
    if "--model" not in arguments and model in (None, hub_token.EMBEDDED_MODEL):
        transfer.send_model(remote, session.pipeline.embedded_model(), root, log)  # images hold no weights
    folder = f"{recipes.WORK}/runs/{name}"
    binds = (f"{user.home}/{ROOT}/runs/{name}:{folder}", f"{root}/inputs:{INPUTS}:ro")
    _start(
        session,
        remote,
        request.image,
        session.image_name(request.image),
        ["run", "--run", folder, *arguments],
        replace(setup, binds=(*setup.binds, *binds)),
        job_labels(setup.job, name, request.arguments),
    )
    return setup.job


def start_command(
    session: Session,
    remote: Remote,
    entry: Entry,
    request: ExecRequest,
    *,
    image: str,  # its name
    user: RemoteUser,
    folder: str,  # below the project's, where the command runs
    after: tuple[str, ...],  # jobs that it waits for
) -> str:
    """Start a command of the user's in the folder of its name and return the job's id. Raises OutsideError."""
    token = hub_token.read()
    _, setup = _setup(remote, entry, user, new_id("exec"), request.image, request.secrets, token)
    home = f"{user.home}/{ROOT}"
    binds = (f"{home}/exec/{request.name}/work:{PROJECT}", f"{home}/src:{SOURCES}:ro", f"{home}/runs:{RUNS}:ro")
    workdir = os.path.join(PROJECT, folder).rstrip("/")
    command, *arguments = request.command
    _start(
        session,
        remote,
        request.image,
        image,
        arguments,
        replace(setup, entrypoint=(command,), workdir=workdir, binds=(*setup.binds, *binds), after=after),
        job_labels(setup.job, request.name, request.command, is_command=True, after=after),
    )
    return setup.job


def _setup(
    remote: Remote, entry: Entry, user: RemoteUser, job: str, key: str, secrets: tuple[str, ...], token: str
) -> tuple[str, containers.Setup]:
    """What every job gets, and the folder of inputs and models: on a file system, where one is attached."""
    if token:
        log(f"your Hugging Face token goes into the job's container, as a file; {hub_token.SWITCH}=1 keeps it here")
    if secrets:
        log(f"{', '.join(secrets)}: the values go into the job's environment, by memory alone")
    if problem := file_system.prepare(remote.run, entry):
        raise RemoteError(f"{problem}. Look there: invoke ssh")
    if entry.file_systems:
        log(f"weights, compiled kernels and inputs lie on the file system {entry.file_systems[0].name}")
    (recipe,) = recipes.choose(key)
    home = f"{user.home}/{ROOT}"
    root = file_system.folder(entry) or home
    return root, containers.Setup(
        sidecar="",
        user=user.user if not user.user.startswith("0:") else recipes.USER,
        binds=(f"{root}/models:{containers.MODELS}:ro", containers.queue_bind(f"{home}/queue")),
        cache=file_system.cache_binds(remote, entry, recipe.accelerator or "cpu"),
        environment={
            "FRACTAL_MODELS": containers.MODELS,
            "FRACTAL_PRICE_USD_PER_HOUR": f"{entry.usd_per_hour:.4f}",
            "HF_ENDPOINT": prerequisites.hub(),
        },
        token=token,
        secrets=secret_values(secrets),
        job=job,
    )


def check_driver(remote: Remote, key: str, base: str = "") -> dict[str, str]:
    """The environment variables that the image needs for the driver there. Raises DriverError."""
    (recipe,) = recipes.choose(key)
    return remote.driver.environment(base) if recipe.accelerator == "cuda" and remote.driver.gpus else {}


def _start(
    session: Session,
    remote: Remote,
    key: str,
    image: str,
    command: list[str],
    setup: containers.Setup,
    labels: Mapping[str, str],
) -> None:
    """Start the containers of a job; what it gets from this instance is added to the set-up."""
    (recipe,) = recipes.choose(key)
    sandbox = session.image_name("sandbox")
    remote.check("make a place in the queue", 'mkdir -p fractal/queue && : >> "fractal/queue/$1"', setup.job)
    with remote.engine() as engine:
        need_images(session, engine, image, key)
        compatibility = check_driver(remote, key, engine.images.get(image).labels.get(images.BASE_LABEL, ""))
        if compatibility:
            log("the driver is older than the image's CUDA: CUDA's compatibility libraries are used")
        environment = {**setup.environment, **compatibility}
        gpus = bool(remote.driver.gpus)
        containers.start(
            engine,
            recipe,
            image,
            sandbox,
            command,
            lambda volume: replace(setup, sidecar=volume, gpus=gpus, environment=environment),
            job=setup.job,
            labels=labels,
            size=containers.terminal(),
        )


def need_images(session: Session, engine: docker.DockerClient, image: str, key: str) -> None:
    """Check that the instance has a job's images; what a registry has is pulled. Raises OutsideError."""
    pushed = session.options_of("push") or session.options_of("up")
    registry = (pushed["to"] if pushed else "") or os.environ.get("FRACTAL_REGISTRY", "")
    for name in (image, session.image_name("sandbox")):
        with suppress(docker.errors.ImageNotFound):
            engine.images.get(name)
            continue
        if not registry:
            raise OutsideError(f"{name} is not on the instance. Run: invoke push --image={key},sandbox")
        log(f"the instance pulls {registry}/{name}")
        try:
            repository, _, tag = name.partition(":")
            engine.images.pull(f"{registry}/{repository}", tag=tag).tag(repository, tag)
        except docker.errors.APIError as error:
            raise OutsideError(
                f"The instance cannot pull {registry}/{name}: {first_line(error)}. Log in here (docker login), "
                f"or send it over ssh: invoke push --host={ALIAS}"
            ) from error


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
                    is_command=label.get(COMMAND_LABEL) == "1",
                    after=tuple(json.loads(label.get(AFTER_LABEL, "[]"))),
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


def is_followed(log: Path) -> bool:
    """Whether a process of this machine follows the job that has this log."""
    if not log.exists():
        return False
    with _locked(log) as file:
        return file is None


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
            output = script("job_output")
            stream = link.stream(output, container_name(job), str(offset + 1), option, stdin=subprocess.PIPE)
            assert stream.stdin is not None
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
                stream.stdin.close()
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
    again = f"`invoke exec --resume={job.run} -- ...`" if job.is_command else "the same command"
    if re.search(r"CUDA out of memory|OutOfMemoryError|No available memory for the cache blocks", tail):
        smaller = "smaller batches" if job.is_command else "a smaller --model or --max-tokens"
        return (
            f"The GPU's memory is full (CUDA out of memory). Take {smaller}, or a larger GPU (invoke terminate launch "
            f"--type=...). What was finished is kept: {again} goes on."
        )
    if match := re.search(r"No module named '?([\w.]+)", tail):
        if job.is_command:
            return (
                f"There is no package {match[1]}. If an index has it: --package={match[1]}==VERSION. If it is yours: "
                "let git track it, or --include it."
            )
        return (
            f"The image lacks the package {match[1]}. Add it to pyproject.toml, then: invoke lock build push run. "
            "Never install by hand on the instance: the next one would not have it."
        )
    if job.out_of_memory or re.search(r"\bKilled\b", tail[-300:]):
        return f"The instance's memory is full: the kernel killed the job. Take a larger type; {again} goes on."
    if re.search(r"could not select device driver|nvidia-container-cli", tail):
        return "Docker on the instance has no GPU. Run: invoke wait, which repairs the NVIDIA toolkit."
    if "No space left on device" in tail or "no space left on the disk" in tail:
        return f"The disk of the instance is full. Make room (invoke ssh), then run {again}: it goes on."
    if job.exit_code - 128 in signal.valid_signals():
        reason = (signal.strsignal(job.exit_code - 128) or "").lower()
        return f"The process died ({reason}). To go on where it stopped: {again}."
    return None
