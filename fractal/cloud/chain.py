"""A chain of tasks: all options checked before money is spent; an instance launched, readied, given images, and ended.

With rented.py the only module that joins cloud/ and images/; tasks.py is their menu. State between two calls lies in
the ledger, on the machine and in the run's folder: any call may be the sequel of one that was killed.
"""

import contextlib
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import docker.errors
import typer
from rich.prompt import Confirm
from rich.table import Table

from fractal import console
from fractal.cloud import alias, instance, jobs, lambda_api, ledger, ready, results
from fractal.cloud.instance import Wish
from fractal.cloud.ledger import Entry, Ledger
from fractal.cloud.remote import ALIAS, Remote
from fractal.errors import InputError, OutsideError
from fractal.generate import models
from fractal.images import build as images
from fractal.images import containers, driver, engine, push, recipes
from fractal.install import docker_engine
from fractal.problems import sets

# A100 with 80 GB, the project's first; what is listed at https://lambda.ai/service/gpu-cloud as next in price and size.
PREFERRED = ("gpu_1x_a100_sxm4", "gpu_1x_a100", "gpu_1x_h100_pcie", "gpu_1x_a10")
ARM = ("gh200", "gb200", "gb300")  # in a type's name: Grace is NVIDIA's Arm processor; the API has no field for it
DRIVER_REMEDY = (
    "Take a family of images with a newer one (--family=), or upgrade it there; --image=pipeline-cpu needs none. "
    f"{ready.BILL}."
)
HUB = ("starter", "mbpp", "mbpp-sanitized")


# --- what a whole command line asks for ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """The chain of tasks of this invocation, with all their options."""

    tasks: tuple[tuple[str, Mapping[str, Any]], ...]

    def options(self, name: str) -> Mapping[str, Any] | None:
        """Of the first task of that name; None if it is not asked for."""
        return next((options for task, options in self.tasks if task == name), None)

    def comes_after(self, name: str, *later: str) -> bool:
        names = [task for task, _ in self.tasks]
        return name in names and any(task in later for task in names[names.index(name) + 1 :])


_plan = Plan(())  # of this process; set by `conduct`
_sent: dict[str, str] = {}  # images that this process has pushed, by the recipes' keys
_armed: set[str] = set()  # names of the instances that this process has to end


def conduct(work: Callable[[], Any], tasks: list[tuple[str, Mapping[str, Any]]], dry: bool) -> Any:
    """Run a chain of tasks: every option is checked before the first task, and whatever happens, what was rented to be
    ended is ended. Raises InputError."""
    global _plan
    _plan = Plan(tuple((name.replace("-", "_"), options) for name, options in tasks))
    check(_plan)
    names = {name for name, _ in _plan.tasks}
    if dry:
        return work()
    if {"launch", "up"} & names and {"build", "push", "up"} & names and (trouble := docker_engine.problem()):
        raise OutsideError(trouble)  # before money is spent
    if {"launch", "up"} & names:
        for program, package in (("ssh", "openssh-client"), ("rsync", "rsync")):
            if shutil.which(program) is None:
                raise OutsideError(f"There is no {program} here. On Debian or Ubuntu run: apt-get install {package}.")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
            signal.signal(number, lambda got, _: sys.exit(128 + got))
    try:
        return work()
    finally:
        if any(options.get("terminate", name == "up") for name, options in _plan.tasks):
            _end_armed()


def check(plan: Plan) -> None:
    """Raises InputError for the first option that cannot be meant, anywhere in the chain. Touches no network."""
    for name, options in plan.tasks:
        if name in ("launch", "up"):
            wish(options)
        if name == "build" and options["image"]:
            recipes.choose(options["image"])
        if name == "push":
            recipes.choose(options["image"])
            if options["to"]:
                push.target("fractal:check", options["to"])
        if name in ("run", "up"):
            more_words(options["more"])
        if name == "up" or (name == "run" and goes_there(options["where"])):
            work(options)


def image_name(key: str) -> str:
    """Of the image that this chain has pushed, though its sources were edited since; else of the present sources."""
    (recipe,) = recipes.choose(key)
    return _sent.get(key, recipe.name)


def plan() -> Plan:
    return _plan


def armed() -> frozenset[str]:
    return frozenset(_armed)


def arm(name: str) -> None:
    """However this process ends, the instance is ended with it; SIGKILL leaves that to the guard."""
    _armed.add(name)


def _end_armed() -> None:
    """Also what was asked for and interrupted before it was known here."""
    book = Ledger(ledger.state_dir())
    here = ledger.Process.here()
    mine = {one.name for one in book.open() if one.terminate_after and one.owner == here}
    if not _armed | mine:
        return
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        with cloud() as (client, book):
            for entry in [one for one in book.open() if one.name in _armed | mine]:
                instance.terminate(client, book, entry, say, "its command has ended")
                show_bill(book, entry.name)
        _armed.clear()
    except (OutsideError, InputError) as error:
        say(f"{error} STILL BILLED, perhaps. Run: invoke terminate")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- options ---------------------------------------------------------------------------------------------------------


def wish(options: Mapping[str, Any]) -> Wish:
    """What instance is wanted. Raises InputError."""
    wait_h = _number(options["wait_for_capacity"], "--wait-for-capacity", "hours")
    types = _list(options["type"])
    if arm := [name for name in types if any(word in name for word in ARM)]:
        raise InputError(
            f"--type={arm[0]}: its processor is an Arm, and our images are for x86-64 only. Name another type, as "
            f"{PREFERRED[0]}."
        )
    return Wish(
        types=types,
        regions=_list(options["region"]),
        max_price_usd=_number(options["max_price"], "--max-price", "dollars an hour"),
        wait_s=(wait_h or 0.0) * 3600,
        max_hours=_number(options["max_hours"], "--max-hours", "hours"),
        max_dollars=_number(options["max_dollars"], "--max-dollars", "dollars"),
        image=options["family"] or None,
        file_systems=_list(options["file_system"]),
    )


def preferred(client: lambda_api.Client, book: Ledger, wanted: Wish) -> Wish:
    """Without a type named: that of the living instance, else our preferences among what Lambda offers."""
    if wanted.types:
        return wanted
    if living := [entry.type_name for entry in book.open()]:
        return replace(wanted, types=tuple(living))
    offers = client.instance_types()
    return replace(wanted, types=tuple(name for name in PREFERRED if name in offers))


def _list(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _number(text: str, option: str, unit: str) -> float | None:
    if text in ("", None):
        return None
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e6:
        raise InputError(f"{option}={text}: expected {unit} above 0, as {option}=2.5.")
    return number


@dataclass(frozen=True, slots=True)
class Work:
    """A run on the machine, as asked for."""

    run: Path
    image: str  # key of the recipe
    words: tuple[str, ...]  # of `fractal run`, without --run; paths are here
    terminate: bool


def work(options: Mapping[str, Any]) -> Work:
    """Raises InputError for what `fractal run` would refuse, and for files that are not here."""
    words = ["--stage", options["stage"]]
    for name in ("problems", "model", "n", "split", "limit"):
        if options[name]:
            words += [f"--{name}", str(options[name])]
    words += more_words(options["more"])
    jobs.check_name(Path(options["run"]))
    _parse(["--run", options["run"], *words])
    for option in ("--problems", "--model"):
        if path := local(words, option):
            if not path.exists():
                raise InputError(f"{option} {path}: no such file or folder here.")
            if option == "--problems":
                sets.load(str(path), options["split"] or None, int(options["limit"]) if options["limit"] else None)
            else:
                models.check_folder(path)
    image = options["image"] or "pipeline"
    containers.pipeline(image)
    return Work(Path(options["run"]), image, tuple(words), bool(options.get("terminate", True)))


def more_words(text: str) -> list[str]:
    """The further options of `fractal run`. Raises InputError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"--more={text}: {error}. Quote as for a shell: --more='--seed 1'.") from error


def _parse(words: list[str]) -> None:
    """Whether `fractal run` takes these words; nothing is run. Raises InputError."""
    from fractal.__main__ import app

    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    try:
        command.make_context("fractal run", list(words))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise InputError(f"run: {error.format_message()} See: fractal run --help") from error


def local(words: Iterable[str], option: str) -> Path | None:
    """The option's value if it is a path here and no name of the hub's."""
    listed = list(words)
    if option not in listed:
        return None
    value = listed[listed.index(option) + 1]
    if option == "--problems":
        return None if value in HUB else Path(value).expanduser()
    path = Path(value).expanduser()
    return path if path.exists() or value.startswith((".", "/", "~")) else None


def goes_there(where: str) -> bool:
    """Whether a run goes to the rented machine. Raises InputError."""
    if where not in ("auto", "lambda", "here"):
        raise InputError(f"--where={where}: expected auto, lambda or here.")
    rents = _plan.options("launch") is not None
    return where == "lambda" or (where == "auto" and (rents or bool(Ledger(ledger.state_dir()).open())))


def describe(wanted: Wish) -> str:
    """A wish in words."""
    price = f" for {wanted.max_price_usd:g} $/h at most" if wanted.max_price_usd else ""
    hours = f"{wanted.max_hours:g} h" if wanted.max_hours else ""
    dollars = f"{wanted.max_dollars:g} $" if wanted.max_dollars else ""
    limit = " or ".join(filter(None, (hours, dollars))) or "no limit"
    where = ", ".join(wanted.regions) or "any region"
    return f"the first to be had of {', '.join(wanted.types or PREFERRED)} in {where}{price}; ended after {limit}"


# --- the instance ----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    console.note(text, "lambda")


@contextmanager
def cloud() -> Iterator[tuple[lambda_api.Client, Ledger]]:
    folder = ledger.state_dir()
    with lambda_api.from_env(folder, say=say) as client:
        yield client, Ledger(folder)


@contextmanager
def phase(book: Ledger, name: str, what: str) -> Iterator[None]:
    """Time what happens on a rented instance; also what fails."""
    began = time.time()
    try:
        yield
    finally:
        book.event(name, what, began, time.time() - began)


def launch(options: Mapping[str, Any], *, wait: bool = True) -> None:
    """Rent an instance, or find that one is rented; wait until it is ready, unless the chain goes on with a build."""
    later = _plan.options("run")
    ends = bool(options.get("terminate") or (later and later["terminate"]))
    with cloud() as (client, book):
        asker = ask if sys.stdin.isatty() else None
        wanted = preferred(client, book, wish(options))
        instance.check(client, wanted)  # before a key is asked for
        key = instance.find_key(client, book, register=options["register_key"], ask=asker)
        entry = instance.launch(client, book, wanted, key, say, terminate_after=ends)
        if ends:
            arm(entry.name)
        if wait and not _plan.comes_after("launch", "build", "push", "run"):
            make_ready(client, book)
        elif not entry.ready_at:
            say("it boots while the chain goes on")


def ask(question: str) -> bool:
    return Confirm.ask(question, console=console.err, default=False)


def make_ready(client: lambda_api.Client, book: Ledger, *, anew: bool = False, entry: Entry | None = None) -> Entry:
    """Climb the ladder, unless this instance was seen at its top already. `entry`: as the API showed it just now."""
    known = entry or instance.current(client, book)
    if known.ready_at and not anew:
        point(book, known)
        return known
    active = instance.wait_active(client, book, known, say)
    point(book, active)
    with phase(book, active.name, "ready"):
        kind = client.instance_types().get(active.type_name)
        gpus = kind is None or kind.gpus > 0
        found = ready.wait(book.folder, active, say, gpus=gpus, refresh=lambda: present(client, book, active))
    say(f"{ALIAS} is ready: {found}")
    try:
        driver.environment(found.driver, found.cards, base="", remedy=DRIVER_REMEDY)
    except driver.DriverError as error:  # a push and a run of the CUDA image will stop there
        say(str(error))
    return book.change(active.name, ready_at=time.time())


def point(book: Ledger, entry: Entry) -> None:
    """Let the alias lead to the instance's present address."""
    assert entry.ip is not None
    assert entry.id is not None
    alias.write(book.folder, ip=entry.ip, key_file=Path(entry.key_file), instance_id=entry.id)


def present(client: lambda_api.Client, book: Ledger, entry: Entry) -> str:
    """The instance's address now, to which the alias leads from then on. Raises CloudError if it is gone."""
    with contextlib.suppress(
        lambda_api.ConnectionLost
    ):  # the API is as far away as the machine: its old address will do
        found = instance.current(client, book)
        entry = found if found.ip else entry
    point(book, entry)
    return str(entry.ip)


@contextmanager
def machine(client: lambda_api.Client, book: Ledger, entry: Entry | None = None) -> Iterator[tuple[Remote, Entry]]:
    """The ready instance, reached by ssh; wherever its address moves to. `entry`: as the API showed it just now."""
    found = make_ready(client, book, entry=entry)
    with Remote(alias.config_file(book.folder), lambda: present(client, book, found), say) as remote:
        yield remote, found


# --- images ----------------------------------------------------------------------------------------------------------


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Note the time on the bill of the instance that waits meanwhile, if one does."""
    book = Ledger(ledger.state_dir())
    found = book.open()
    with phase(book, found[-1].name, what) if found else contextlib.nullcontext():
        yield


def build(image: str, options: images.Options, *, as_json: bool, dry: bool) -> None:
    """In a chain that pushes, what is pushed is what is built by default."""
    pushed = _plan.options("push") if _plan.comes_after("build", "push") else None
    keys = image or (pushed["image"] if pushed else "sandbox")
    with timed("build") if not dry else contextlib.nullcontext():
        images.build_all(keys, options, as_json=as_json, dry=dry)


def send_images(image: str, registry: str, host: str, *, as_json: bool, dry: bool) -> None:
    """To the registry, or to the host; the host `lambda` is the rented instance, if one is."""
    book = Ledger(ledger.state_dir())
    config = None
    if not registry and host == ALIAS and book.open() and not dry:
        with cloud() as (client, _), machine(client, book) as (remote, _):
            if any(recipe.key == "pipeline" for recipe in recipes.choose(image)):
                driver_environment(remote, base_of(image_name("pipeline")))
        config = alias.config_file(book.folder)
    with timed("push") if not dry else contextlib.nullcontext():
        _sent.update(push.push_all(image, registry, host, as_json=as_json, dry=dry, ssh_config=config))


def driver_environment(remote: Remote, base: str) -> dict[str, str]:
    """What the CUDA image needs there beside the machine's driver. Raises DriverError before anything large is sent.

    `base`: the image's label of where its base came from, "" if unknown.
    """
    found = results.driver(remote)
    return driver.environment(found.version, found.cards, base=base, remedy=DRIVER_REMEDY)


def base_of(name: str) -> str:
    """The label of an image that the engine here has; "" where it has none."""
    client = engine.connect()
    try:
        return str(client.images.get(name).labels.get(images.BASE_LABEL, ""))
    except docker.errors.ImageNotFound:
        return ""
    finally:
        client.close()


def up(options: Mapping[str, Any]) -> int:
    """launch, build, push and run in one, and the end of the instance whatever happens; the exit code of the run."""
    from fractal.cloud import rented

    wanted = work(options)
    keys = f"{wanted.image},sandbox"
    everything = {**options, "terminate": True}
    launch(everything, wait=False)
    build(keys, images.Options(), as_json=False, dry=False)
    send_images(keys, options["to"], ALIAS, as_json=False, dry=False)
    return rented.run(everything)


def wait() -> None:
    with cloud() as (client, book):
        entry = make_ready(client, book, anew=True)
        say(f"{entry.type_name} at {entry.ip}: ssh {ALIAS}; end it: invoke terminate")


def setup_ssh() -> None:
    """The alias at the present address, and the line in the user's config."""
    with cloud() as (client, book):
        entry = instance.current(client, book)
        point(book, entry)
        if alias.own_alias(Path.home()):
            say(f"~/.ssh/config has a host {ALIAS} of your own; ours stands first and wins")
        added = alias.include(Path.home(), book.folder)
        say(f"`ssh {ALIAS}` leads to {entry.ip}" + ("; ~/.ssh/config has one line more" if added else ""))


def terminate(name: str = "") -> None:
    """End the instances of this ledger, or the one of that name, and show what they cost. Raises InputError."""
    with cloud() as (client, book):
        instance.reconcile(client, book, say)
        found = [entry for entry in book.open() if name in ("", entry.name)]
        if name and not found:
            raise InputError(f"--name={name}: no living instance of that name is in the ledger. See: invoke ps")
        for entry in found:
            instance.terminate(client, book, entry, say, "invoke terminate")
            show_bill(book, entry.name)
        if not found:
            say("the ledger knows no living instance. To look for others of this account: invoke reap")


def reap(*, yes: bool, others: bool) -> None:
    with cloud() as (client, book):
        instance.reap(client, book, say, yes=yes, others=others, ask=ask if sys.stdin.isatty() else None)


def show_bill(book: Ledger, name: str, stages: Iterable[tuple[str, float]] = ()) -> None:
    """One instance's phases, and a run's stages, with seconds and dollars."""
    entry = book.find(name)
    assert entry is not None
    price = entry.price_cents_per_hour / 100
    table = Table("what", "began", "seconds", "dollars", title=f"{entry.type_name} in {entry.region}, {price:.2f} $/h")
    for event in entry.timeline:
        clock = time.strftime("%H:%M:%S", time.localtime(event.at))
        table.add_row(event.what, clock, f"{event.seconds:.0f}", f"{event.seconds / 3600 * price:.4f}")
    for stage, seconds in stages:
        table.add_row(f"  {stage}", "", f"{seconds:.0f}", f"{seconds / 3600 * price:.4f}")
    alive_s = (entry.ended_at or time.time()) - entry.asked_at
    table.add_row(
        "all of its life" if entry.ended_at else "until now", "", f"{alive_s:.0f}", f"{alive_s / 3600 * price:.4f}"
    )
    console.say(table)
