"""A job: the pipeline's container on the instance: its start with inputs and images, its output, its end.

The engine there keeps the whole output. The copy here is runs/NAME/logs/JOB.log, and its length is the offset to
continue at: so no line is lost or doubled, however often the connection or this process ends.
"""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import docker
import docker.errors
from filelock import FileLock, Timeout

from fractal.cloud import file_system, prerequisites, transfer
from fractal.cloud.ledger import Entry
from fractal.cloud.options import RunRequest, local_path
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
INPUTS = "/inputs"  # files and models from this machine, in the container
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
    def ended(self) -> bool:
        return self.state == "exited"


class JobRemovedError(RemoteError):
    """The job's container does not exist: another process has fetched its results, or somebody removed it."""


def container_name(job: str) -> str:
    return f"fractal-job-{job}"


def new_id(stage: str) -> str:
    """The name of a job, its containers and its log: stage, time, and random digits."""
    return f"{stage}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.urandom(2).hex()}"


def job_labels(job: str, run: str, arguments: tuple[str, ...]) -> Mapping[str, str]:
    return {JOB_LABEL: job, RUN_LABEL: run, ARGUMENTS_LABEL: json.dumps(arguments)}


def start_job(session: Session, remote: Remote, entry: Entry, request: RunRequest, user: RemoteUser) -> str:
    """Start the job and return its id. Raises OutsideError."""
    arguments, name = list(request.arguments), request.folder.name
    gpus = bool(remote.driver.gpus)
    (recipe,) = recipes.choose(request.image)
    uses_cuda = recipe.accelerator == "cuda" and gpus
    if uses_cuda:
        remote.driver.environment()  # checked before the inputs are sent, which may be large
    if problem := file_system.prepare(remote.run, entry):
        raise RemoteError(f"{problem}. Look there: invoke ssh")
    root = file_system.folder(entry) or f"{user.home}/{ROOT}"
    cache = file_system.cache_binds(remote, entry, recipe.accelerator or "cpu")
    for option in ("--problems", "--model"):
        if path := local_path(arguments, option):
            arguments[arguments.index(option) + 1] = f"{INPUTS}/{transfer.send_input(remote, path, root, log)}"
    model = hub_token.model_of(arguments, request.folder)
    if "--model" not in arguments and model in (None, hub_token.EMBEDDED_MODEL):
        transfer.send_model(remote, session.pipeline.embedded_model(), root, log)  # images hold no weights
    pipeline, sandbox = session.image_name(request.image), session.image_name("sandbox")
    pushed = session.options_of("push") or session.options_of("up")
    registry = (pushed["to"] if pushed else "") or os.environ.get("FRACTAL_REGISTRY", "")
    job = new_id(arguments[1])
    environment = {
        "FRACTAL_MODELS": containers.MODELS,
        "FRACTAL_PRICE_USD_PER_HOUR": f"{entry.usd_per_hour:.4f}",
        "HF_ENDPOINT": prerequisites.hub(),
    }
    if token := hub_token.find(request.arguments, request.folder):
        log(f"your Hugging Face token goes into the job's container, as a file; {hub_token.SWITCH}=1 keeps it here")

    def setup(volume: str) -> containers.Setup:
        return containers.Setup(
            sidecar=volume,
            user=user.user if not user.user.startswith("0:") else recipes.USER,
            gpus=gpus,
            binds=(
                f"{user.home}/{ROOT}/runs/{name}:{recipes.WORK}/runs/{name}",
                f"{root}/inputs:{INPUTS}:ro",
                f"{root}/models:{containers.MODELS}:ro",
            ),
            cache=cache,
            environment=environment,
            token=token,
        )

    with remote.engine() as engine:
        need_images(engine, (pipeline, sandbox), request.image, registry)
        if uses_cuda:
            base = engine.images.get(pipeline).labels.get(images.BASE_LABEL, "")
            if compatibility := remote.driver.environment(base):
                environment |= compatibility
                log("the driver is older than the image's CUDA: CUDA's compatibility libraries are used")
        containers.start(
            engine,
            recipe,
            pipeline,
            sandbox,
            ["run", "--run", f"{recipes.WORK}/runs/{name}", *arguments],
            setup,
            job=job,
            labels=job_labels(job, name, request.arguments),
            size=containers.terminal(),
        )
    return job


def need_images(engine: docker.DockerClient, names: Iterable[str], key: str, registry: str) -> None:
    """Check that the instance has the images; what a registry has is pulled. Raises OutsideError."""
    for name in names:
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
    if job.exit_code - 128 in signal.valid_signals():
        reason = (signal.strsignal(job.exit_code - 128) or "").lower()
        return f"The process died ({reason}). The same command goes on where it stopped."
    return None
