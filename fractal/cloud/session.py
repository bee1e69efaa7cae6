"""A session: what the tasks of one command line share, from the check of all options to the end of the instance.

All other state is in the ledger, on the instance and in the run's folder: any command may continue one that was killed.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.prompt import Confirm

from fractal import console
from fractal.cloud import first_minutes, instance, lambda_api, options, readiness, reconcile, ssh_config, watchdog
from fractal.cloud.account import Account
from fractal.cloud.cost import bill
from fractal.cloud.lambda_errors import ConnectionLostError
from fractal.cloud.ledger import Entry, Ledger, Process, state_dir
from fractal.cloud.options import Options, Pipeline
from fractal.cloud.remote_host import Remote
from fractal.errors import InputError, OutsideError
from fractal.images import driver_compatibility, packages, push, recipes
from fractal.install import docker_engine


def log(text: str) -> None:
    console.note(text, "lambda")


def ask(question: str) -> bool:
    return Confirm.ask(question, console=console.err(), default=False)


class Session:
    """The tasks of one command line, and what they leave for each other."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.tasks: list[tuple[str, Options]] = []
        self.pushed: dict[str, str] = {}  # names of the images that were pushed or built there, by the recipes' keys
        self.built_there: set[str] = set()  # keys of those that were built on the instance
        self.to_terminate: set[str] = set()  # names of the instances to terminate when the command ends
        self.ledger = Ledger(state_dir())

    def run_tasks(self, tasks: Sequence[tuple[str, Options]], work: Callable[[], None], *, dry: bool = False) -> None:
        """Check the options of all tasks, run `work`, and terminate what was rented to be terminated, whatever happens.

        Raises InputError before anything is done if an option is not valid.
        """
        self.tasks = [(name.replace("-", "_"), task_options) for name, task_options in tasks]
        self.check_options()
        if dry:
            work()
            return
        self._check_programs()
        self._check_packages()
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        try:
            work()
        finally:
            if self.ends_instance():
                self._terminate_instances()

    def check_options(self) -> None:
        """Raises InputError for the first option of any task that is not valid. Touches no network."""
        for name, task_options in self.tasks:
            if name in ("launch", "up"):
                self._check_types(options.launch_request(task_options).types)
            if name in ("build", "up"):
                options.check_build(task_options["on"], task_options.get("for_", ""))
                self.builds_there(task_options["on"])
            if name == "build" and task_options["image"]:
                recipes.choose(task_options["image"])
            if name == "push":
                recipes.choose(task_options["image"])
                if task_options["to"]:
                    push.target("fractal:check", task_options["to"])
            if name in ("run", "up"):
                options.more_arguments(task_options["more"])
                options.secret_values(task_options["secret"])
            if name == "up" or (name == "run" and self.runs_on_instance(task_options["where"])):
                options.run_request(task_options, self.pipeline)
            if name == "exec":
                options.exec_request(task_options)

    def _check_types(self, types: Sequence[str]) -> None:
        """Raises InputError for an instance type whose processor the images of this command line would not fit."""
        living = [entry.type_name for entry in self.ledger.open_entries()]
        types = types or living or options.PREFERRED_TYPES
        if build := self.options_of("build") or self.options_of("up"):
            options.check_build(build["on"], build.get("for_", ""))
            place = "there" if self.builds_there(build["on"]) else "here"
            options.check_processor(types, place, build.get("for_", ""))
            if any(options.processor(name) == "arm64" for name in types):
                packages = ", ".join(recipes.WITHOUT_ARM_WHEEL)
                log(f"on an Arm processor {packages} is built from its source: there is no wheel of it")
        elif self.options_of("push"):
            options.check_processor(types, "here", "")

    def _registry(self) -> str:
        """The registry by way of which this command line brings images to the instance; "" if it does not."""
        pushed = self.options_of("push") or self.options_of("up")
        if pushed is None or pushed.get("host"):
            return ""
        return pushed["to"] or os.environ.get("FRACTAL_REGISTRY", "")

    def builds_there(self, on: str) -> bool:
        """Whether `build` may use the instance: it is asked to, or later tasks of this command line need images there.

        Images for a registry are built here. Raises InputError.
        """
        if registry := self._registry():
            if on == "there":
                raise InputError(
                    f"--on=there: the images would be on the instance, not at {registry}. Leave --on out, or --to and "
                    "FRACTAL_REGISTRY."
                )
            return False
        if on != "auto" or self.options_of("launch") or self.options_of("up"):
            return on != "here"
        pushed, run = self.options_of("push"), self.options_of("run")
        needed = (pushed and pushed["host"] in ("", ssh_config.ALIAS)) or (run and self.runs_on_instance(run["where"]))
        needed = needed or self.options_of("exec")
        return bool(needed and self.ledger.open_entries())

    def options_of(self, name: str) -> Options | None:
        """The options of the first task of that name; None if the command line has none."""
        return next((task_options for task, task_options in self.tasks if task == name), None)

    def ends_instance(self) -> bool:
        """Whether a task of the command line asks for the instance's end."""
        return any(task_options.get("terminate", name == "up") for name, task_options in self.tasks)

    def has_later(self, name: str, *later: str) -> bool:
        """Whether one of the tasks `later` comes after the task `name`."""
        names = [task for task, _ in self.tasks]
        return name in names and any(task in later for task in names[names.index(name) + 1 :])

    def runs_on_instance(self, where: str) -> bool:
        """Whether a run with this --where uses the rented instance. Raises InputError."""
        if where not in ("auto", "lambda", "here"):
            raise InputError(f"--where={where}: expected auto, lambda or here.")
        rents = self.options_of("launch") is not None
        return where == "lambda" or (where == "auto" and (rents or bool(self.ledger.open_entries())))

    @property
    def processor(self) -> str:
        """Of the rented instance, as Docker names it; without one, of this machine."""
        entries = self.ledger.open_entries()
        return options.processor(entries[-1].type_name) if entries else recipes.NATIVE

    def image_name(self, key: str) -> str:
        """The image that this command has pushed, though its sources were edited since; else that of the sources."""
        (recipe,) = recipes.choose(key, self.processor)
        return self.pushed.get(key, recipe.name)

    def account(self) -> Account:
        """Raises InputError without a valid key."""
        return Account(lambda_api.from_env(self.ledger.folder, log=log), self.ledger, log)

    @contextmanager
    def remote(self, entry: Entry | None = None) -> Iterator[tuple[Remote, Entry]]:
        """The ready instance, reached by ssh, also after its address changes.

        `entry`: as the API showed it just now, if the caller asked.
        """
        account = self.account()
        ready = self.make_ready(account, entry or instance.current(account))
        config = ssh_config.config_file(self.ledger.folder)
        with Remote(config, lambda: present_address(account, ready), log) as remote:
            if ready.watchdog is not None:
                watchdog.keep(account, remote, ready)
            yield remote, ready

    def start_watchdog(self, entry: Entry) -> None:
        """Where the entry of a ready instance has one, and the command needs no connection for anything else."""
        if entry.watchdog is not None:
            with self.remote(entry):
                pass

    def make_ready(self, account: Account, entry: Entry, *, again: bool = False) -> Entry:
        """Wait until the instance is ready, unless it was before; `again`: also then."""
        if entry.ready_at and not again:
            ssh_config.write(account.ledger.folder, entry)
            return entry
        active = instance.wait_active(account, entry)
        ssh_config.write(account.ledger.folder, active)
        with self.timed("ready", active):
            found = readiness.wait_ready(
                account.ledger.folder,
                active,
                log,
                lambda: present_address(account, active),
                lambda_offset_s=account.client.clock_offset_s,
            )
        log(f"{ssh_config.ALIAS} is ready: {found}")
        try:
            found.driver.environment()
        except driver_compatibility.DriverError as error:  # a push and a run of the CUDA image will stop there
            log(str(error))
        return account.ledger.change(active.name, ready_at=time.time())

    @contextmanager
    def timed(self, what: str, entry: Entry | None = None) -> Iterator[None]:
        """Add the time, also of a failure, to the bill of this instance, or of the one that waits meanwhile.

        That the ledger cannot note it changes no result.
        """
        began = time.time()
        try:
            yield
        finally:
            with contextlib.suppress(InputError, OutsideError):
                for billed in [entry] if entry else self.ledger.open_entries()[-1:]:
                    self.ledger.add_event(billed.name, what, began, time.time() - began)

    def show_bill(
        self, name: str, stages: Sequence[tuple[str, float]] = (), start_up: Mapping[str, object] | None = None
    ) -> None:
        """Show what the instance cost so far; with `start_up`, also its way to the first sample."""
        entry = self.ledger.find(name)
        assert entry is not None
        if phases := first_minutes.phases(entry, start_up or {}):
            console.say(first_minutes.table(entry, phases))
        console.say(bill(entry, stages))

    def _check_programs(self) -> None:
        """Raises OutsideError, before money is spent, if a program that the tasks need is missing."""
        names = {name for name, _ in self.tasks}
        if not {"launch", "up"} & names:
            return
        build = self.options_of("build") or self.options_of("up")
        here = (build is not None and not self.builds_there(build["on"])) or ("push" in names and build is None)
        if here and (problem := docker_engine.problem()):
            raise OutsideError(problem)
        for program, package in (("ssh", "openssh-client"), ("rsync", "rsync")):
            if shutil.which(program) is None:
                raise OutsideError(f"There is no {program} here. On Debian or Ubuntu run: apt-get install {package}.")

    def _check_packages(self) -> None:
        """Raises InputError or PackagesError, before money is spent, for packages that cannot be had."""
        launch = None if self.ledger.open_entries() else self.options_of("launch")
        for name, task_options in self.tasks:
            if name == "exec" and (asked := options.exec_request(task_options)).packages:
                processor = options.processor(launch["type"]) if launch else self.processor
                packages.pipeline_recipe(asked.image, asked.packages, processor)

    def _terminate_instances(self) -> None:
        """Also those whose launch was interrupted before this process knew of it. After SIGKILL the guard does it."""
        this_process = Process.current()
        names = set(self.to_terminate)
        names |= {e.name for e in self.ledger.open_entries() if e.terminate_after and e.owner == this_process}
        if not names:
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        try:
            account = self.account()
            for entry in self.ledger.open_entries():
                if entry.name in names:
                    reconcile.terminate(account, entry, "its command has ended")
                    self.show_bill(entry.name)
        except (OutsideError, InputError) as error:
            log(f"{error} STILL BILLED, perhaps. Run: invoke terminate")
            raise


def present_address(account: Account, entry: Entry) -> str:
    """Update the alias to the instance's present address and return it. Raises CloudError if the instance is gone."""
    with contextlib.suppress(ConnectionLostError):  # no network: the old address is the best guess
        found = instance.current(account)
        entry = found if found.ip else entry
    ssh_config.write(account.ledger.folder, entry)
    return str(entry.ip)
