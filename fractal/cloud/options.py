"""The options of the tasks that use a rented instance, checked before money is spent. Touches no network."""

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fractal.cloud.launch import LaunchRequest
from fractal.cloud.ledger import Watchdog, limits_text
from fractal.cloud.project import check_pattern, check_script, read_project
from fractal.errors import InputError
from fractal.images import containers, packages, recipes
from fractal.problems import sets

# A100 with 80 GB, the project's first; what is listed at https://lambda.ai/service/gpu-cloud as next in price and size.
PREFERRED_TYPES = ("gpu_1x_a100_sxm4", "gpu_1x_a100", "gpu_1x_h100_pcie", "gpu_1x_a10")
ARM = ("gh200", "gb200", "gb300")  # in a type's name: Grace is NVIDIA's Arm processor; the API has no field for it
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
BUILD_PLACES = ("auto", "here", "there")
PROBLEM_SETS = ("starter", "mbpp", "mbpp-sanitized")

Options = Mapping[str, Any]  # of one task, by name, as Invoke gives them


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What this package needs of the pipeline's command line; its caller passes it, since cloud/ imports no stage."""

    check_run_arguments: Callable[[list[str]], None]  # raises InputError for what `fractal run` would refuse
    check_model: Callable[[Path], None]  # raises InputError for a folder that holds no model
    embedded_model: Callable[[], Path]  # prepares the model that ships with Fractal; its folder


@dataclass(frozen=True, slots=True)
class RunRequest:
    """A run on the instance, as the user asks for it."""

    folder: Path
    image: str  # key of the recipe
    arguments: tuple[str, ...]  # of `fractal run`, without --run; paths are those of this machine
    terminate: bool
    secrets: tuple[str, ...] = ()  # names of environment variables


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecRequest:
    """A command of the user's on the instance."""

    command: tuple[str, ...]
    name: str  # of the folder below runs/; "": one is made from the command and the time
    resume: bool  # go on in the folder of this name, which is there
    image: str  # key of the recipe
    packages: tuple[str, ...]  # NAME==VERSION
    include: tuple[str, ...]  # patterns of files that git does not track
    fetch: tuple[str, ...]  # patterns of files that come home
    secrets: tuple[str, ...]  # names of environment variables
    beside: bool  # start at once, beside other jobs
    terminate: bool


def launch_request(options: Options) -> LaunchRequest:
    """Raises InputError."""
    wait_hours = _number(options["wait_for_capacity"], "--wait-for-capacity", "hours")
    return LaunchRequest(
        types=_list(options["type"]),
        regions=_list(options["region"]),
        max_price_usd=_number(options["max_price"], "--max-price", "dollars an hour"),
        wait_s=(wait_hours or 0.0) * 3600,
        max_hours=_number(options["max_hours"], "--max-hours", "hours"),
        max_dollars=_number(options["max_dollars"], "--max-dollars", "dollars"),
        image=options["family"] or None,
        file_systems=_list(options["file_system"]),
        watchdog=_watchdog(options),
        strict_host_key=options["strict_host_key"],
    )


def processor(type_name: str) -> str:
    """The processor of an instance type, as Docker names it."""
    return "arm64" if any(text in type_name for text in ARM) else "amd64"


def check_build(on: str, processor: str) -> None:
    """Raises InputError for a --on or a --for of `invoke build` that is not valid."""
    if on not in BUILD_PLACES:
        raise InputError(f"--on={on}: expected {', '.join(BUILD_PLACES)}.")
    if processor not in ("", *recipes.PROCESSORS):
        raise InputError(f"--for={processor}: expected {' or '.join(recipes.PROCESSORS)}.")


def check_processor(types: Iterable[str], on: str, built_for: str) -> None:
    """Raises InputError for instance types that the images will not run on. `built_for`: the option --for, or ""."""
    built_for = built_for or (recipes.NATIVE if on == "here" else "")
    for name in types:
        if built_for and processor(name) != built_for:
            has, other = recipes.PROCESSORS[processor(name)], recipes.PROCESSORS.get(built_for, built_for)
            raise InputError(
                f"--type={name}: its processor is {has}, and the images would be built for {other}. Build them on the "
                f"instance (--on=there), or with --for={processor(name)}, or name another type."
            )


def describe(request: LaunchRequest) -> str:
    """A launch request as part of a sentence."""
    price = f" for {request.max_price_usd:g} $/h at most" if request.max_price_usd else ""
    limit = limits_text(request.max_hours, request.max_dollars)
    types, regions = ", ".join(request.types or PREFERRED_TYPES), ", ".join(request.regions) or "any region"
    watchdog = ", by a watchdog on it, too" if request.watchdog else ""
    systems = f" with the file system {', '.join(request.file_systems)}" if request.file_systems else ""
    return f"the first available of {types} in {regions}{price}{systems}; ended after {limit}{watchdog}"


def _watchdog(options: Options) -> Watchdog | None:
    """None unless the user asks for it, with --watchdog or for all launches in the environment. Raises InputError."""
    always = os.environ.get("FRACTAL_WATCHDOG", "")
    if always not in ("", "0", "1"):
        raise InputError(f"FRACTAL_WATCHDOG={always}: expected 1 for a watchdog on each instance, else 0.")
    idle = _number(options["idle_minutes"], "--idle-minutes", "minutes")
    guard = _number(options["guard_minutes"], "--guard-minutes", "minutes")
    if not options["watchdog"] and always != "1":
        if idle or guard:
            raise InputError("--idle-minutes and --guard-minutes are for a watchdog: give --watchdog, too.")
        return None
    default = Watchdog()
    return Watchdog(idle * 60 if idle else default.idle_s, guard * 60 if guard else default.guard_s)


def run_request(options: Options, pipeline: Pipeline) -> RunRequest:
    """Raises InputError for what `fractal run` would refuse, and for files that do not exist here."""
    arguments = ["--stage", options["stage"]]
    for name in ("problems", "model", "n", "split", "limit"):
        if options[name]:
            arguments += [f"--{name}", str(options[name])]
    arguments += more_arguments(options["more"])
    check_name(Path(options["run"]))
    pipeline.check_run_arguments(["--run", options["run"], *arguments])
    for option in ("--problems", "--model"):
        path = local_path(arguments, option)
        if path is None:
            continue
        if not path.exists():
            raise InputError(f"{option} {path}: no such file or folder here.")
        if option == "--problems":
            sets.load(str(path), options["split"] or None, int(options["limit"]) if options["limit"] else None)
        else:
            pipeline.check_model(path)
    image = options["image"] or "pipeline"
    containers.pipeline(image)
    secrets = _list(options["secret"])
    secret_values(secrets)
    return RunRequest(Path(options["run"]), image, tuple(arguments), bool(options.get("terminate", True)), secrets)


def exec_request(options: Options) -> ExecRequest:
    """Raises InputError, also for a script or a secret that is not there."""
    command = tuple(options["command"])
    if not command or not command[0]:
        raise InputError("exec: there is no command. Write it behind two dashes, as: invoke exec -- python train.py")
    name, resume = options["name"], options["resume"]
    if name and resume:
        raise InputError(f"--name={name} and --resume={resume} exclude each other.")
    for option, value in (("--name", name), ("--resume", resume)):
        if value and not RUN_NAME.fullmatch(value):
            raise InputError(f"{option}={value}: no name of a job. Use letters, digits, '-', '_', '.'.")
    image = options["image"] or "pipeline"
    containers.pipeline(image)
    request = ExecRequest(
        command=command,
        name=name or resume,
        resume=bool(resume),
        image=image,
        packages=packages.parse(given, "--package") if (given := ",".join(_list(options["package"]))) else (),
        include=_list(options["include"]),
        fetch=_list(options["fetch"]),
        secrets=_list(options["secret"]),
        beside=options["beside"],
        terminate=options["terminate"],
    )
    for pattern in request.fetch:
        check_pattern("--fetch", pattern)
    secret_values(request.secrets)
    check_script(read_project(Path.cwd(), request.include), command)
    return request


def secret_values(given: str | Iterable[str]) -> dict[str, str]:
    """The values of these environment variables, for a job. Raises InputError for one that is not set."""
    found = {}
    for name in _list(given):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            shown = f"{name[:4]}..." if len(name) > 4 else name  # perhaps the secret itself
            raise InputError(f"--secret={shown}: not the name of an environment variable. Write it, not the value.")
        if not os.environ.get(name):
            raise InputError(f"--secret={name}: this variable is not set here. Run: export {name}=...")
        found[name] = os.environ[name]
    return found


def check_name(run: Path) -> str:
    """The run's name, valid for a folder and a label on the instance. Raises InputError."""
    name = run.name
    if not RUN_NAME.fullmatch(name):
        raise InputError(
            f"--run {run}: {name!r} cannot be a run's name on the instance. Use letters, digits, '-', '_', '.'."
        )
    return name


def more_arguments(text: str) -> list[str]:
    """The further arguments of `fractal run` in --more. Raises InputError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"--more={text}: {error}. Quote as for a shell: --more='--seed 1'.") from error


def local_path(arguments: Iterable[str], option: str) -> Path | None:
    """The option's value if it is a path on this machine, not the name of a problem set or of a hub's model."""
    listed = list(arguments)
    if option not in listed:
        return None
    value = listed[listed.index(option) + 1]
    path = Path(value).expanduser()
    if option == "--problems":
        return None if value in PROBLEM_SETS else path
    return path if path.exists() or value.startswith((".", "/", "~")) else None


def _list(given: str | Iterable[str]) -> tuple[str, ...]:
    """The parts of a text with commas, or of several."""
    texts = [given] if isinstance(given, str) else given
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


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
