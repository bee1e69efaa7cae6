"""What is done on the rented machine: a run of the stages, followed from here; its output, results and processes.

The job over there is on its own: whoever follows it may be killed, lose the link, or come from another terminal.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import docker
import docker.errors

from fractal import console
from fractal.cloud import chain, guard, instance, jobs, ledger, results
from fractal.cloud import cost as costs
from fractal.cloud.chain import Work, cloud, machine, phase, say, work
from fractal.cloud.ledger import Entry, Ledger
from fractal.cloud.remote import ALIAS, ROOT, Remote
from fractal.errors import InputError, OutsideError
from fractal.generate import models
from fractal.images import build as images
from fractal.images import containers, hub_token, recipes
from fractal.images.engine import first_line

INPUTS = "/inputs"  # files and models from here, in the container
PROCESSES = "ps -eo pid,etime,pcpu,pmem,args --sort=-pcpu | grep -E 'PID|[p]ython|[f]ractal' | cut -c1-160"


def need_images(engine: docker.DockerClient, names: Iterable[str], key: str, registry: str) -> None:
    """The images over there; what a registry has is pulled. Raises OutsideError."""
    for name in names:
        with contextlib.suppress(docker.errors.ImageNotFound):
            engine.images.get(name)
            continue
        if not registry:
            raise OutsideError(f"{name} is not on the machine. Run: invoke push --image={key},sandbox")
        say(f"the machine pulls {registry}/{name}")
        try:
            repository, _, tag = name.partition(":")
            engine.images.pull(f"{registry}/{repository}", tag=tag).tag(repository, tag)
        except docker.errors.APIError as error:
            raise OutsideError(
                f"The machine cannot pull {registry}/{name}: {first_line(error)}. Log in here (docker login), "
                f"or send it over ssh: invoke push --host={ALIAS}"
            ) from error


def run(options: Mapping[str, Any]) -> int:
    """The stages on the rented instance, followed from here; the exit code of the stage."""
    wanted = work(options)
    with cloud() as (client, book):
        entry = instance.current(client, book)
        if wanted.terminate:
            book.change(entry.name, terminate_after=True)
            chain.arm(entry.name)
        # What the guard runs before it ends the instance at a limit; in a folder of its own.
        rescue = (
            sys.executable,
            "-m",
            "invoke",
            "--search-root",
            str(recipes.ROOT),
            "fetch",
            f"--run={wanted.run.absolute()}",
        )
        book.change(entry.name, owner=ledger.Process.here(), rescue=rescue)
        with machine(client, book, entry) as (remote, entry):
            code = _run(remote, book, entry, wanted)
        if entry.name not in chain.armed():
            say(
                f"{entry.type_name} goes on and costs {entry.price_cents_per_hour / 100:.2f} $/h "
                f"({entry.dollars(time.time()):.2f} $ so far). End it: invoke terminate"
            )
        return code


def _run(remote: Remote, book: Ledger, entry: Entry, wanted: Work) -> int:
    folder, name = wanted.run, wanted.run.name
    place = results.prepare(remote, name)
    job = _running(remote, wanted)
    if job is None:
        collect(remote, folder.parent)
        jobs.sweep(remote)
        results.exchange(remote, folder, say)
        job = _start(remote, entry, wanted, place)
    else:
        say(f"{job} runs already: going on with it")
    log = jobs.log_file(folder, job)
    say(f"{folder} runs on {remote.host} ({', '.join(place.gpus) or 'no GPU'}), its output is in {log}")
    try:
        with phase(book, entry.name, f"run {' '.join(wanted.words[:2])}"), results.coming_home(remote, folder):
            ended = jobs.follow(remote, job, log, _screen)
    except BaseException:
        _leave(remote, entry, folder)
        raise
    _settle(remote, folder, patient=entry.name in chain.armed())
    _explain(ended, log)
    jobs.end(remote, job)
    show_run(book, entry.name, folder)
    return ended.exit_code


def _running(remote: Remote, wanted: Work) -> str | None:
    """The id of this very job, if it runs there. Raises InputError if another does: there is one machine."""
    for job in jobs.jobs(remote):
        if not job.ended and job.state == "running":
            if job.run == wanted.run.name and job.words == wanted.words:
                return job.id
            raise InputError(
                f"The machine is at work on runs/{job.run} ({' '.join(job.words)}). Follow it: invoke logs --follow; "
                "end it: invoke stop. Then run this again."
            )
    return None


def _start(remote: Remote, entry: Entry, wanted: Work, place: results.Place) -> str:
    words, name = list(wanted.words), wanted.run.name
    on_gpu = wanted.image == "pipeline" and bool(place.gpus)
    if on_gpu:
        chain.driver_environment(remote, base="")  # before the inputs, which may be large
    for option in ("--problems", "--model"):
        if path := chain.local(words, option):
            words[words.index(option) + 1] = f"{INPUTS}/{results.send_input(remote, path, say)}"
    if "--model" not in words and hub_token.model_of(words, wanted.run) in (None, models.EMBEDDED):
        results.send_model(remote, models.resolve(models.EMBEDDED).path, say)  # images hold no weights
    (recipe,) = recipes.choose(wanted.image)
    pipeline, sandbox = chain.image_name(wanted.image), chain.image_name("sandbox")
    pushed = chain.plan().options("push") or chain.plan().options("up")
    registry = (pushed["to"] if pushed else "") or os.environ.get("FRACTAL_REGISTRY", "")
    job = jobs.new_id(words[1])

    compat: dict[str, str] = {}
    if token := hub_token.find(wanted.words, wanted.run):
        say(f"your Hugging Face token goes into the job's container, as a file; {hub_token.SWITCH}=1 keeps it here")

    def setup(volume: str) -> containers.Setup:
        return containers.Setup(
            sidecar=volume,
            user=place.user if not place.user.startswith("0:") else recipes.USER,
            gpus=bool(place.gpus),
            binds=(
                f"{place.home}/{ROOT}/runs/{name}:{recipes.WORK}/runs/{name}",
                f"{place.home}/{ROOT}/inputs:{INPUTS}:ro",
                f"{place.home}/{ROOT}/models:{containers.MODELS}:ro",
            ),
            environment={
                "FRACTAL_MODELS": containers.MODELS,
                "FRACTAL_PRICE_USD_PER_HOUR": f"{entry.price_cents_per_hour / 100:.4f}",
                **compat,
            },
            token=token,
        )

    with remote.engine() as engine:
        need_images(engine, (pipeline, sandbox), wanted.image, registry)
        if on_gpu:
            base = engine.images.get(pipeline).labels.get(images.BASE_LABEL, "")
            compat |= chain.driver_environment(remote, base)
        containers.start(
            engine, recipe, pipeline, sandbox, ["run", "--run", f"{recipes.WORK}/runs/{name}", *words], setup,
            job=job, labels=jobs.labels(job, name, wanted.words), size=containers.terminal(),
        )  # fmt: skip
    if compat:
        say("the driver there is older than the image's CUDA: its compatibility libraries stand in for it")
    return job


def _explain(job: jobs.Job, log: Path) -> None:
    if remedy := jobs.diagnose(job, log.read_bytes()[-jobs.TAIL :].decode(errors="replace")):
        say(f"{job.run} ended with exit code {job.exit_code}. {remedy}")


def _screen(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _settle(remote: Remote, folder: Path, *, patient: bool) -> None:
    """Everything home. Where the instance is ended after this, a full disk here gets some minutes to be mended."""
    for pause_s in (*((20.0, 60.0, 180.0) if patient else ()), None):
        try:
            say(f"{folder} is home: {results.settle(remote, folder)}")
            return
        except OutsideError as error:
            if pause_s is None:
                raise
            say(f"{error} Trying again in {pause_s:.0f} s; then the instance is ended as asked for.")
            time.sleep(pause_s)


def _leave(remote: Remote, entry: Entry, folder: Path) -> None:
    """This process stops following: fetch what there is if the instance ends with it, else say what goes on."""
    if entry.name in chain.armed():
        say("fetching what there is, then the instance is ended")
        remote.patience_s = 20.0
        with contextlib.suppress(OutsideError, InputError):
            results.fetch(remote, folder)
        return
    say(
        f"the job goes on over there, at {entry.price_cents_per_hour / 100:.2f} $/h. Follow it: invoke logs --follow; "
        "end the job: invoke stop; end the instance: invoke terminate"
    )


def collect(remote: Remote, runs: Path) -> None:
    """Bring home what ended jobs said, then remove them there: also jobs whose follower was killed."""
    for job in jobs.jobs(remote):
        if job.state != "running":
            if job.ended and jobs.NAME.fullmatch(job.run):
                with contextlib.suppress(jobs.JobGone):  # its own follower was quicker
                    jobs.follow(remote, job.id, jobs.log_file(runs / job.run, job.id), lambda _: None, once=True)
            jobs.end(remote, job.id)


def fetch(run: str) -> None:
    """Bring a run home, or all that the machine has; proven by digest unless a job still writes."""
    with cloud() as (client, book):
        entry = instance.current(client, book)
        if not entry.ready_at:
            raise InputError("The instance was never ready: there is nothing on it to fetch. Run: invoke wait")
        with machine(client, book, entry) as (remote, _):
            found = results.names(remote)
            if run and Path(run).name not in found:
                raise InputError(f"--run={run}: not on the machine. There: {', '.join(found) or 'no run'}.")
            busy = {job.run for job in jobs.jobs(remote) if not job.ended}
            for folder in [Path(run)] if run else [Path("runs") / name for name in found]:
                if results.direction(results.here(folder), results.there(remote, folder.name), folder.name) == "send":
                    say(f"{folder} is farther here than on the machine: nothing to fetch")
                elif folder.name in busy:
                    say(f"{folder}: {results.fetch(remote, folder)}; a job still writes there")
                else:
                    say(f"{folder} is home: {results.settle(remote, folder)}")
            collect(remote, Path(run).parent if run else Path("runs"))


def logs(run: str, job: str, follow: bool) -> int:
    """What a job says: the last one, of this run, or this one; with `follow`, until it ends, with its exit code."""
    with cloud() as (client, book), machine(client, book) as (remote, entry):
        found = [one for one in jobs.jobs(remote) if (not run or one.run == Path(run).name) and job in ("", one.id)]
        if not found:
            raise InputError(
                "No such job is on the machine. Output of earlier ones is in runs/NAME/logs/; see: invoke ps"
            )
        one = found[-1]
        folder = Path(run) if run else Path("runs") / one.run
        log = jobs.log_file(folder, one.id)
        try:
            with results.coming_home(remote, folder) if follow else contextlib.nullcontext():
                state = jobs.follow(remote, one.id, log, _screen, replay=True, once=not follow)
        except BaseException:
            _leave(remote, entry, folder)
            raise
        if not state.ended:
            return 0
        _explain(state, log)
        return state.exit_code if follow else 0


def stop() -> None:
    """End the job on the machine; what it finished is kept and comes home."""
    with cloud() as (client, book), machine(client, book) as (remote, _):
        running = [job for job in jobs.jobs(remote) if not job.ended]
        for job in running:
            remote.must("stop the job", '$1 stop -t 30 "$2" > /dev/null', remote.docker_words, job.container)
            say(f"{job.id} is stopped")
            _settle(remote, Path("runs") / job.run, patient=False)
        collect(remote, Path("runs"))
        if not running:
            say("no job runs there")


# --- what a person looks at ------------------------------------------------------------------------------------------


def ps() -> None:
    """Instances with their guard, jobs, and the processes over there."""
    with cloud() as (client, book):
        living = {one.id: one for one in instance.reconcile(client, book, say)}
        found, now = book.open(), time.time()
        for entry in found:
            status = living[entry.id].status if entry.id in living else entry.state
            console.say(
                f"{entry.name}: {entry.type_name} in {entry.region}, {status} at {entry.ip or 'no address yet'}; "
                f"{entry.hours(now):.2f} h, {entry.dollars(now):.2f} $ so far; {_guard(book, entry)}"
            )
        if not found:
            say("no instance is rented. To rent one: invoke launch")
            return
        entry = instance.current(client, book)
        if not entry.ready_at:
            say("it is not ready yet: invoke wait")
            return
        with machine(client, book, entry) as (remote, _):
            listed = jobs.jobs(remote)
            for job in listed:
                state = job.state if not job.ended else f"ended with {job.exit_code}"
                words = " ".join(job.words)
                console.say(f"job {job.id}: runs/{job.run}, {state}, since {job.started[:19]}Z: fractal run {words}")
            if not listed:
                console.say("no job is there")
            console.say(remote.must("list processes", PROCESSES).rstrip())


def _guard(book: Ledger, entry: Entry) -> str:
    found = guard.status(book, entry.name)
    if found.until is None:
        return "a guard is on watch, without a limit" if found.alive else "NO GUARD, and no limit"
    ends = f"ends it at {time.strftime('%H:%M', time.localtime(found.until))}"
    return f"a guard is on watch and {ends}" if found.alive else f"NO GUARD {ends}: invoke terminate"


def gpu() -> None:
    with cloud() as (client, book), machine(client, book) as (remote, _):
        console.say(remote.must("look at its GPU", "nvidia-smi").rstrip())


def shell(command: str) -> int:
    """A shell over there, or one command; its exit code."""
    with cloud() as (client, book), machine(client, book) as (remote, _):
        return subprocess.call(remote.shell(command))


def sync(folder: str) -> None:
    with cloud() as (client, book), machine(client, book) as (remote, _):
        say(remote.sync(Path(folder)))


def cost() -> None:
    """What every instance of this ledger cost, or costs; without a key, too."""
    console.say(costs.table(costs.cost(Ledger(ledger.state_dir()), time.time())))


def show_run(book: Ledger, name: str, folder: Path) -> None:
    """The end of a run: stages, times, dollars, and where everything is."""
    chain.show_bill(book, name, _stages(folder))
    report = folder / "report/index.html"
    console.say(f"run: {folder}; report: {report if report.exists() else 'none yet'}; logs: {folder / 'logs'}")


def _stages(folder: Path) -> list[tuple[str, float]]:
    try:
        return [(name, float(stage["seconds"])) for name, stage in _manifest(folder)["stages"].items()]
    except (ValueError, KeyError, TypeError):
        return []


def _manifest(folder: Path) -> Any:
    """The run's, as it is here; nothing where there is none, or no JSON."""
    try:
        return json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}
