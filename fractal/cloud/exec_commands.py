"""The tasks `exec`, a command of the user's on the instance, and `grep`, over the output of jobs.

A command runs in the pipeline's image, in a copy of the user's project (project.py), as a job beside those of `run`.
"""

import re
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fractal import console
from fractal.cloud import file_system, jobs, project, remote_build, run_commands, transfer
from fractal.cloud.ledger import Entry
from fractal.cloud.options import RUN_NAME, ExecRequest, Options, exec_request
from fractal.cloud.project import JobFolder, Project
from fractal.cloud.remote_host import Remote
from fractal.cloud.session import Session, log
from fractal.errors import InputError, OutsideError
from fractal.images import build as images
from fractal.images import packages

RUNS = Path("runs")
FILES = "files"  # in the run's folder: what comes home of a command's working folder
SHOWN = 3  # names in a line


def execute(session: Session, options: Options) -> int:
    """Run a command of the user's on the instance and follow it; returns its exit code."""
    request = exec_request(options)
    request = replace(request, name=request.name or default_name(request.command))
    files = project.read_project(Path.cwd(), request.include)
    folder = RUNS / request.name
    if request.resume and (folder / "manifest.json").exists():
        raise InputError(f"--resume={request.name}: {folder} is a run of the stages, not of a command. Name another.")
    if folder.exists() and not request.resume:
        raise InputError(f"{folder} is there already. To go on with it: --resume={request.name}; else another --name.")
    with run_commands.job_instance(session, terminate=request.terminate) as (remote, entry):
        prepared = project.make_folder(remote, request.name)
        _check_folder(remote, request, prepared, folder)
        image = _image(session, remote, entry, request)
        with remote.engine() as engine:  # before files are sent, with which the name is taken
            jobs.need_images(session, engine, image, request.image)
        _say_what_stays(files)
        project.send(remote, files, request.name, prepared, project.fetch_patterns(files.folder, request.fetch), log)
        if not prepared.exists and (folder / FILES).is_dir():
            project.send_results(remote, folder / FILES, request.name)
        job = _start(session, remote, entry, request, image, prepared, files)
        log(f"{job}: {shlex.join(request.command)}")
        try:
            code = run_commands.follow_to_end(session, remote, entry, folder, job, f"exec {request.name}")
        except KeyboardInterrupt:  # what goes on is said; the same command again would start another job
            return 130
    console.say(f"exec: {folder}; logs: {folder / 'logs'}; files: {_files_text(folder, request)}")
    return code


def default_name(command: tuple[str, ...]) -> str:
    """A name for runs/, from the script or program, and the time."""
    word = Path(project.script_of(command) or command[0]).stem
    if "-m" in command[:-1]:
        word = command[command.index("-m") + 1]
    word = re.sub(r"[^A-Za-z0-9_.-]+", "-", word).strip("-.")[:32]
    return jobs.new_id(word if RUN_NAME.fullmatch(word) else "command")


def _check_folder(remote: Remote, request: ExecRequest, prepared: JobFolder, folder: Path) -> None:
    """Raises InputError if a job has the name that is to be new, or none has the one to go on with."""
    names = transfer.run_names(remote)
    if not request.resume and request.name in names:
        raise InputError(
            f"--name={request.name}: the instance has one of that name. To go on: --resume={request.name}."
        )
    if request.resume and not prepared.exists and not folder.is_dir():
        there = ", ".join(names) or "none"
        raise InputError(f"--resume={request.name}: neither here nor on the instance. There: {there}.")
    for job in jobs.list_jobs(remote):
        if job.run == request.name and not job.ended:
            raise InputError(f"{folder} is at work as {job.id}. Follow it: invoke logs --follow --job={job.id}")


def _start(
    session: Session,
    remote: Remote,
    entry: Entry,
    request: ExecRequest,
    image: str,
    prepared: JobFolder,
    files: Project,
) -> str:
    with jobs.one_start_at_a_time(session.ledger):
        run_commands.collect_ended_jobs(remote, RUNS)
        jobs.remove_orphaned_sandboxes(remote)
        others = [job for job in jobs.list_jobs(remote) if not job.ended]
        after = () if request.beside else tuple(job.id for job in others)
        if after:
            log(f"it starts after {len(after)} other jobs ({', '.join(after)}); --beside starts one at once")
        return jobs.start_command(
            session, remote, entry, request, image=image, user=prepared.user, folder=files.folder, after=after
        )


def _image(session: Session, remote: Remote, entry: Entry, request: ExecRequest) -> str:
    """The image's name; one with packages is built on the instance, which has the bandwidth, if it is not there."""
    if not request.packages:
        return session.image_name(request.image)
    recipe = packages.pipeline_recipe(request.image, request.packages, session.processor)
    if recipe.key == request.image:  # it has them all
        return session.image_name(request.image)
    with session.timed("build", entry):
        built = remote_build.ensure(remote, recipe, images.Options(), file_system.folder(entry) or "")
    images.show(built, host=remote.host, as_json=False)
    return built.name


def _say_what_stays(files: Project) -> None:
    for names, what in (
        (files.untracked, "git does not track {}: not sent (--include)"),
        (files.outward_links, "{} leads out of the project: sent as a link, which leads nowhere there"),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            log(what.format(", ".join(map(repr, names[:SHOWN])) + more))


def _files_text(folder: Path, request: ExecRequest) -> str:
    if not request.fetch:
        return "none asked for (--fetch)"
    count = sum(path.is_file() for path in (folder / FILES).rglob("*"))
    return f"{folder / FILES} ({count})" if count else f"none match {', '.join(request.fetch)}"


def grep(session: Session, pattern: str, run: str = "") -> int:
    """Print the lines of the jobs' output that match a regular expression; 1 if none does.

    Of the logs below runs/, and of jobs on the rented instance whose output is not here yet. Raises InputError.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{pattern!r} is no regular expression: {error}. Write one, as 'Val Acc'.") from error
    name = Path(run).name if run else ""
    if any(entry.ready_at for entry in session.ledger.open_entries()):
        try:
            _fetch_output(session, name)
        except (OutsideError, InputError) as error:
            log(f"{error} Looking at what is here.")
    folders = [Path(run)] if run else sorted(RUNS.glob("*"))
    paths = [path for folder in folders for path in sorted(folder.glob("logs/*.log"))]
    if not paths:
        raise InputError(f"{run or RUNS}: there is no log. See: invoke ps")
    found = False
    for path in paths:
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if expression.search(line):
                console.say(f"{path}:{number}: {line}")
                found = True
    return 0 if found else 1


def _fetch_output(session: Session, run: str) -> None:
    """Add what the jobs on the instance have printed to the logs here."""
    with session.remote() as (remote, _):
        for job in jobs.list_jobs(remote):
            if run in ("", job.run) and RUN_NAME.fullmatch(job.run):
                with suppress(jobs.JobRemovedError):
                    jobs.follow(remote, job.id, jobs.log_file(RUNS / job.run, job.id), lambda _: None, once=True)
