"""The tasks about images and runs: up, build, push, run, logs, stop, fetch.

The job is detached: the process that follows it may be killed, lose the connection, or run in another terminal.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import docker.errors

from fractal import console
from fractal.cloud import (
    file_system,
    instance,
    instance_commands,
    jobs,
    prerequisites,
    remote_build,
    ssh_config,
    transfer,
)
from fractal.cloud.ledger import Entry, Process
from fractal.cloud.options import RUN_NAME, Options, RunRequest, check_build, run_request
from fractal.cloud.remote_host import Remote
from fractal.cloud.session import Session, log
from fractal.errors import InputError, OutsideError
from fractal.images import build as images
from fractal.images import docker_client, recipes
from fractal.images import push as image_push
from fractal.images.recipes import Recipe

FETCH_RETRIES_S = (20.0, 60.0, 180.0)  # before an instance is terminated although its results are not all here


def up(session: Session, options: Options) -> int:
    """launch, build, push and run; the instance is terminated whatever happens. Returns the exit code of the run."""
    request = run_request(options, session.pipeline)
    keys = f"{request.image},sandbox"
    options = {**options, "terminate": True}
    instance_commands.launch(session, options, wait=False)
    build(session, keys, images.Options(), on=options["on"])
    push(session, keys, options["to"], ssh_config.ALIAS, as_json=False, dry=False)
    return run(session, options)


def build(
    session: Session,
    image: str,
    build_options: images.Options,
    *,
    on: str = "auto",
    processor: str = "",
    as_json: bool = False,
    dry: bool = False,
) -> None:
    """Build images, here or on the instance; before a push, what it sends by default. Raises InputError, OutsideError.

    `on`: here, there, or auto: where they are ready sooner. `processor`: "amd64" or "arm64"; "": the instance's.
    """
    check_build(on, processor)
    pushed = session.options_of("push") if session.has_later("build", "push") else None
    keys = image or (pushed["image"] if pushed else "sandbox")
    there = session.builds_there(on)
    processor = processor or (session.processor if there else recipes.NATIVE)
    if dry or not there:
        with contextlib.nullcontext() if dry else session.timed("build"):
            images.build_all(keys, build_options, processor=processor, as_json=as_json, dry=dry)
        return
    with session.remote() as (remote, entry), session.timed("build"):
        uplink = remote_build.uplink(remote) if on == "auto" else 0.0
        for recipe in recipes.choose(keys, processor):
            if recipe.accelerator == "cuda":
                remote.driver.environment()  # an image of several GB that does not run there is not built
            if on == "auto":
                choice = remote_build.choose(remote, recipe, uplink)
                log(f"{recipe.key}: {choice.reason}: {'there' if choice.there else 'here'}")
                if not choice.there:
                    images.build_all(recipe.key, build_options, processor=processor, as_json=as_json)
                    continue
            check_disk(session, remote, entry, [recipe], {})
            built = remote_build.ensure(remote, recipe, build_options, file_system.folder(entry) or "")
            images.show(built, host=remote.host, as_json=as_json)
            if built.built and (line := remote_build.compare(remote, built.name)):
                log(line)
            session.built_there.add(recipe.key)
            session.pushed[recipe.key] = built.name


def push(session: Session, image: str, registry: str, host: str, *, as_json: bool, dry: bool) -> None:
    """Push to the registry, or to the host; the host `lambda` is the rented instance, if there is one."""
    config, chosen = None, recipes.choose(image)
    if not registry and host == ssh_config.ALIAS and session.ledger.open_entries() and not dry:
        chosen = recipes.choose(image, session.processor)
        with session.remote() as (remote, entry):
            present = session.built_there | remote_build.only_there(remote, chosen)
            for recipe in chosen:
                name = session.image_name(recipe.key)
                if recipe.accelerator == "cuda":
                    remote.driver.environment("" if recipe.key in present else _base_label(name))
                if recipe.key in present:
                    log(f"{name} is on {host}, where it was built")
            chosen = [recipe for recipe in chosen if recipe.key not in present]
            if chosen:
                check_disk(session, remote, entry, chosen, _sizes(session, chosen))
        config = ssh_config.config_file(session.ledger.folder)
    with contextlib.nullcontext() if dry else session.timed("push"):
        session.pushed.update(image_push.push_all(chosen, registry, host, as_json=as_json, dry=dry, ssh_config=config))


def check_disk(
    session: Session, remote: Remote, entry: Entry, chosen: Iterable[Recipe], sizes: Mapping[str, float]
) -> None:
    """Raises RemoteError if the instance has too little disk for the images and the model of the run that follows.

    `sizes`: bytes of images that are known, by the recipes' keys. A model on a file system needs no disk.
    """
    later = session.options_of("run") or session.options_of("up")
    model = later["model"] if later and not entry.file_systems else ""
    found = prerequisites.probe(remote.run)
    needed = prerequisites.needed_bytes((recipe.key for recipe in chosen), found, sizes, model)
    prerequisites.check_disk(found, needed)


def run(session: Session, options: Options) -> int:
    """Run the stages on the instance and follow the job; returns the exit code of the stage."""
    request = run_request(options, session.pipeline)
    with job_instance(session, f"--run={request.folder.absolute()}", terminate=request.terminate) as (remote, entry):
        return _run_and_follow(session, remote, entry, request)


@contextmanager
def job_instance(session: Session, *fetch: str, terminate: bool) -> Iterator[tuple[Remote, Entry]]:
    """The instance for a job that this process follows. `fetch`: what the guard fetches before it ends the instance."""
    entry = instance.current(session.account())
    if terminate:
        session.ledger.change(entry.name, terminate_after=True)
        session.to_terminate.add(entry.name)
    # The guard's folder is not this one, below which results of all runs come home.
    command = ["sh", "-c", 'cd "$0" && exec "$@"', str(Path.cwd())]
    command += [sys.executable, "-m", "invoke", "--search-root", str(recipes.ROOT), "fetch", *fetch]
    session.ledger.change(entry.name, owner=Process.current(), rescue=tuple(command))
    with session.remote(entry) as (remote, entry):
        yield remote, entry
    if entry.name not in session.to_terminate:
        log(
            f"{entry.type_name} goes on and costs {entry.usd_per_hour:.2f} $/h "
            f"({entry.dollars(time.time()):.2f} $ so far). End it: invoke terminate"
        )


def _run_and_follow(session: Session, remote: Remote, entry: Entry, request: RunRequest) -> int:
    folder = request.folder
    user = transfer.prepare(remote, folder.name)
    with jobs.one_start_at_a_time(session.ledger):
        job = _running_job(remote, request)
        if job is None:
            collect_ended_jobs(remote, folder.parent)
            jobs.remove_orphaned_sandboxes(remote)
            with session.timed("inputs", entry):
                transfer.exchange(remote, folder, log)
                job = jobs.start_job(session, remote, entry, request, user)
        else:
            log(f"{job} runs already: following it")
    code = follow_to_end(session, remote, entry, folder, job, f"run {' '.join(request.arguments[:2])}")
    report = folder / "report/index.html"
    console.say(f"run: {folder}; report: {report if report.exists() else 'none yet'}; logs: {folder / 'logs'}")
    return code


def follow_to_end(session: Session, remote: Remote, entry: Entry, folder: Path, job: str, what: str) -> int:
    """Follow a job, fetch its results meanwhile and at the end, remove it; returns its exit code.

    `what`: as the bill names it. The instance is not ended under other jobs.
    """
    log_file = jobs.log_file(folder, job)
    gpus = ", ".join(remote.driver.gpus) or "no GPU"
    log(f"{folder} runs on {remote.host} ({gpus}), its output is in {log_file}")
    try:
        with session.timed(what, entry), transfer.periodic_fetch(remote, folder):
            ended = jobs.follow(remote, job, log_file, _to_screen)
    except BaseException:
        _stop_following(session, remote, entry, folder, job)
        raise
    _keep_for_others(session, remote, entry, job)
    _fetch_all(remote, folder, retries_s=FETCH_RETRIES_S if entry.name in session.to_terminate else ())
    _log_diagnosis(ended, log_file)
    jobs.remove(remote, job)
    session.show_bill(entry.name, _stage_seconds(folder), _start_up(folder))
    return ended.exit_code


def _keep_for_others(session: Session, remote: Remote, entry: Entry, job: str) -> None:
    """Do not end the instance as asked for if other jobs run or wait there."""
    if entry.name in session.to_terminate:
        others = [other.id for other in jobs.list_jobs(remote) if not other.ended and other.id != job]
        if others:
            session.to_terminate.discard(entry.name)
            session.ledger.change(entry.name, terminate_after=False)
            log(f"the instance is NOT ended, it has other jobs: {', '.join(others)}. Then: invoke terminate")


def _running_job(remote: Remote, request: RunRequest) -> str | None:
    """The id of this very job, if it is running. Raises InputError if another one is: there is one instance."""
    for job in jobs.list_jobs(remote):
        if job.state == "running":
            if job.run == request.folder.name and job.arguments == request.arguments and not job.is_command:
                return job.id
            raise InputError(
                f"The instance is running runs/{job.run} ({job.command}). Follow it: invoke logs --follow; end it: "
                "invoke stop. Then run this again."
            )
    return None


def _fetch_all(remote: Remote, folder: Path, *, retries_s: tuple[float, ...] = ()) -> None:
    """Fetch everything, verified; after a failure wait and retry, so that a full disk here can be cleared."""
    for pause_s in (*retries_s, None):
        try:
            log(f"{folder} is fetched: {transfer.fetch_verified(remote, folder)}")
            return
        except OutsideError as error:
            if pause_s is None:
                raise
            log(f"{error} Trying again in {pause_s:.0f} s; then the instance is terminated as requested.")
            time.sleep(pause_s)


def _stop_following(session: Session, remote: Remote, entry: Entry, folder: Path, job: str) -> None:
    """This process ends before the job: fetch what there is if the instance ends with it, else say what continues."""
    if entry.name in session.to_terminate:
        remote.patience_s = 20.0
        with contextlib.suppress(OutsideError, InputError):
            _keep_for_others(session, remote, entry, job)
        if entry.name in session.to_terminate:
            log("fetching what there is, then the instance is terminated")
        with contextlib.suppress(OutsideError, InputError):
            transfer.fetch(remote, folder)
    if entry.name not in session.to_terminate:
        log(
            f"the job goes on there, at {entry.usd_per_hour:.2f} $/h. Follow it: invoke logs --follow --job={job}; end "
            f"the job: invoke stop --job={job}; end the instance: invoke terminate"
        )


def collect_ended_jobs(remote: Remote, runs: Path) -> None:
    """Fetch output and results of ended jobs that nobody follows, since their follower was killed, and remove them."""
    for job in jobs.list_jobs(remote):
        log_file = jobs.log_file(runs / job.run, job.id)
        if job.state == "running" or jobs.is_followed(log_file):
            continue
        if job.ended and RUN_NAME.fullmatch(job.run):
            with contextlib.suppress(jobs.JobRemovedError):  # its own follower was quicker
                jobs.follow(remote, job.id, log_file, lambda _: None, once=True)
            with contextlib.suppress(OutsideError, InputError):  # what is there can be fetched later
                transfer.fetch(remote, runs / job.run)
        jobs.remove(remote, job.id)


def fetch(session: Session, run: str) -> None:
    """Fetch a run, or all runs of the instance; verified by digest unless a job still writes."""
    entry = instance.current(session.account())
    if not entry.ready_at:
        raise InputError("The instance was never ready: there is nothing on it to fetch. Run: invoke wait")
    with session.remote(entry) as (remote, _):
        names = transfer.run_names(remote)
        if run and Path(run).name not in names:
            raise InputError(f"--run={run}: not on the instance. There: {', '.join(names) or 'no run'}.")
        busy = {job.run for job in jobs.list_jobs(remote) if not job.ended}
        for folder in [Path(run)] if run else [Path("runs") / name for name in names]:
            if folder.name in busy:
                log(f"{folder}: {transfer.fetch(remote, folder)}; a job still writes there")
            else:
                _fetch_all(remote, folder)
        collect_ended_jobs(remote, Path(run).parent if run else Path("runs"))


def logs(session: Session, run: str, job: str, follow: bool) -> int:
    """Show a job's output: of the last job, the last of this run, or this one.

    With `follow`: until it ends; returns its exit code.
    """
    with session.remote() as (remote, entry):
        matching = [
            listed
            for listed in jobs.list_jobs(remote)
            if (not run or listed.run == Path(run).name) and job in ("", listed.id)
        ]
        if not matching:
            raise InputError(
                "No such job is on the instance. Output of earlier ones is in runs/NAME/logs/; see: invoke ps"
            )
        last = matching[-1]
        folder = Path(run) if run else Path("runs") / last.run
        log_file = jobs.log_file(folder, last.id)
        try:
            with transfer.periodic_fetch(remote, folder) if follow else contextlib.nullcontext():
                state = jobs.follow(remote, last.id, log_file, _to_screen, once=not follow)
        except BaseException:
            _stop_following(session, remote, entry, folder, last.id)
            raise
        if not state.ended:
            return 0
        _log_diagnosis(state, log_file)
        return state.exit_code if follow else 0


def stop(session: Session, job: str = "") -> None:
    """Stop the jobs that run or wait, or this one; what they finished is kept and fetched. Raises InputError."""
    with session.remote() as (remote, _):
        living = [found for found in jobs.list_jobs(remote) if not found.ended and job in ("", found.id)]
        if job and not living:
            raise InputError(f"--job={job}: no such job runs there. See: invoke ps")
        for found in reversed(living):  # the last first: none starts because another ends
            remote.check("stop the job", 'docker stop -t 30 "$1" > /dev/null', jobs.container_name(found.id))
            log(f"{found.id} is stopped")
            _fetch_all(remote, Path("runs") / found.run)
        collect_ended_jobs(remote, Path("runs"))
        if not living:
            log("no job is running there")


def _log_diagnosis(job: jobs.Job, log_file: Path) -> None:
    tail = log_file.read_bytes()[-jobs.DIAGNOSED_BYTES :].decode(errors="replace")
    if remedy := jobs.diagnose(job, tail):
        log(f"{job.run} ended with exit code {job.exit_code}. {remedy}")


def _to_screen(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _stage_seconds(folder: Path) -> list[tuple[str, float]]:
    """Names and seconds of the stages in the run's manifest; none if it cannot be read."""
    try:
        stages = json.loads((folder / "manifest.json").read_bytes())["stages"]
        return [(name, float(stage["seconds"])) for name, stage in stages.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _start_up(folder: Path) -> dict[str, object]:
    """When and after what generation began, by the run's manifest; empty if it does not say."""
    try:
        return dict(json.loads((folder / "manifest.json").read_bytes())["stages"]["generate"]["start_up"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _sizes(session: Session, chosen: Iterable[Recipe]) -> dict[str, float]:
    """Bytes of those images that the local engine has, by the recipes' keys."""
    sizes = {}
    client = docker_client.connect()
    try:
        for recipe in chosen:
            with contextlib.suppress(docker.errors.ImageNotFound):
                sizes[recipe.key] = float(client.images.get(session.image_name(recipe.key)).attrs["Size"])
    finally:
        client.close()
    return sizes


def _base_label(name: str) -> str:
    """The label of an image that the local engine has; "" where it has none."""
    client = docker_client.connect()
    try:
        return str(client.images.get(name).labels.get(images.BASE_LABEL, ""))
    except docker.errors.ImageNotFound:
        return ""
    finally:
        client.close()
