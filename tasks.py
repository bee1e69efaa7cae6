"""The operator's menu: `invoke --list`. Each task is one call; what it does is in fractal/."""

import functools
import os
import shlex
import sys
from pathlib import Path

from invoke import Executor, Exit, task
from invoke.main import program

ROOT = Path(__file__).parent
BIN = Path(sys.executable).parent
BENCHES = ("verify", "images", "generate", "critic", "gpu")
RUN_HELP = {"run": "the run folder", "stage": "all, generate, verify, train, score, select or report"}
SHARING = {"launch", "up", "push", "run", "exec"}  # what such a task does depends on the others of its chain


class Chain(Executor):
    """Of such a chain the options of all tasks are checked first, and what was rented to be ended is ended."""

    def execute(self, *tasks):
        if not SHARING & {one.name for one in tasks}:
            return super().execute(*tasks)
        results = {}

        def execute():
            results.update(super(Chain, self).execute(*tasks))

        asked = [
            (one.name, {**one.as_kwargs, "command": _command()} if one.name == "exec" else one.as_kwargs)
            for one in tasks
        ]
        _do(lambda: _session().run_tasks(asked, execute, dry=self.config.run.dry), "lambda")
        return results


def _command():
    """The words behind the two dashes; Invoke itself joins them with spaces."""
    words = program.argv or []
    return words[words.index("--") + 1 :] if "--" in words else []


@functools.cache
def _session():
    """What the tasks of this command line share."""
    from fractal.cloud.session import Session

    return Session(pipeline())


def pipeline():
    """What fractal.cloud needs of the pipeline, whose stages it does not import; loaded when it is called."""
    from fractal.cloud.options import Pipeline

    def check_run_arguments(arguments):
        from fractal.__main__ import check_run_arguments

        check_run_arguments(arguments)

    def check_model(folder):
        from fractal.generate import models

        models.check_folder(folder)

    def embedded_model():
        from fractal.generate import models

        return models.resolve(models.EMBEDDED).path

    return Pipeline(check_run_arguments, check_model, embedded_model)


program.executor_class = Chain


def _fractal(c, *arguments):
    """Run the command line in place of this process's output; its exit code is ours."""
    _become(c, str(BIN / "fractal"), *arguments)


def _become(c, *command):
    command = [str(word) for word in command]
    if c.config.run.dry:
        print(" ".join(command))
        return
    sys.stdout.flush()
    os.execv(command[0], command)


def _options(**values):
    """Options that were given, as command-line words."""
    return [word for name, value in values.items() if value for word in (f"--{name.replace('_', '-')}", value)]


BUILD_HELP = {"image": "sandbox, pipeline-cpu, pipeline, several with commas, or all; default: sandbox, before a push what it sends",
              "json": "a JSON object for each image: image, digest, seconds, layers_built, bytes",
              "base": "build on this image instead of the recipe's base",
              "ca": "your network's certificates (PEM file): a secret of the build, never in a layer",
              "wheels": "a folder of wheels to take Python packages from", "cache": "--no-cache: build every layer anew",
              "on": "here, there (on the rented instance, by its own Docker), or auto: in a chain with an instance, where it is ready sooner",
              "for_": "the processor: amd64 or arm64; default: that of the machine which runs the image"}  # fmt: skip


@task(positional=[], help=BUILD_HELP)
def build(c, image="", json=False, base="", ca="", wheels="", cache=True, on="auto", for_=""):
    """Build an image if the engine does not have it.

    Examples: invoke build; invoke build --image=pipeline-cpu; invoke build --image=all --json; invoke build --on=there
    Settings of pip and apt, SSL_CERT_FILE, FRACTAL_BASE_IMAGE, FRACTAL_WHEELS and FRACTAL_DEBIAN_MIRROR are heard.
    """
    from fractal.cloud import run_commands
    from fractal.images.build import Options

    options = Options(base or None, Path(ca) if ca else None, Path(wheels) if wheels else None, not cache)
    dry = c.config.run.dry
    _do(lambda: run_commands.build(_session(), image, options, on=on, processor=for_, as_json=json, dry=dry))


@task(positional=[], help={"image": "sandbox, pipeline-cpu, pipeline, several with commas, or all",
                           "to": "a registry's prefix, as registry.example/team; default: FRACTAL_REGISTRY",
                           "host": "without a registry: this machine, by OpenSSH, as an alias or user@host; default: lambda",
                           "json": "a JSON object for each image"})  # fmt: skip
def push(c, image="pipeline,sandbox", to="", host="", json=False):
    """Send images to a registry, or over SSH to a machine's own engine; only missing layers travel.

    Examples: invoke push --to=registry.example/team; invoke push --image=pipeline-cpu,sandbox --host=lambda
    Credentials are Docker's (docker login) or ssh's. Interrupted and repeated, it goes on where it stopped.
    """
    from fractal.cloud import run_commands

    to = to or ("" if host else os.environ.get("FRACTAL_REGISTRY", ""))
    dry = c.config.run.dry
    _do(lambda: run_commands.push(_session(), image, to, host or "lambda", as_json=json, dry=dry), "push")


@task(positional=[], help={"json": "a JSON object for each image",
                           "older": "--no-older: remove our images of earlier sources that no container uses"})  # fmt: skip
def images(c, json=False, older=True):
    """What is here of our images, with size and hash, and what a build would do and why."""
    from fractal.images import image_list

    _do(lambda: image_list.show(as_json=json, older=older or c.config.run.dry))


@task(positional=[], help={"image": "sandbox, pipeline-cpu, pipeline, several with commas, or all"})
def scan(c, image="all"):
    """Look through every layer of an image for secrets, traces of this machine, weights and caches."""
    _become(c, sys.executable, "-m", "fractal.images.scan", *image.split(","))


@task(positional=[], help={"what": "all, python or images (the bases' digests)",
                           "upgrade": "take the newest versions that pyproject.toml allows"})  # fmt: skip
def lock(c, what="all", upgrade=False):
    """Write the lock files: Python packages with hashes, base images with digests."""
    from fractal.images import lock as locks

    _do(lambda: locks.lock(what, lambda text: print(f"lock: {text}", file=sys.stderr), upgrade=upgrade), "lock")


@task
def render(c):
    """Write the Dockerfiles from fractal/images/recipes.py."""
    from fractal.images import recipes

    for path in recipes.render():
        print(f"render: {path}")


@task(
    positional=[], help={"image": "run in this image beside a sandbox container, as pipeline-cpu; default: right here"}
)
def demo(c, image=""):
    """The whole pipeline in minutes: 72 starter problems, SmolLM2-135M, 8 samples each, into runs/demo."""
    words = ["--problems", "starter", "--n", "8", "--temperature", "0.6", "--max-tokens", "160"]
    if image:
        _contained(c, image, "runs/demo-" + image, words)
        return
    from fractal.images import build as images

    _do(lambda: images.build_all("sandbox", images.Options(), dry=c.config.run.dry))
    _fractal(c, "run", "--run", "runs/demo", *words)


@task(
    name="demo-cloud",
    positional=[],
    help={"run": "the run folder", "n": "samples per problem", "limit": "problems of each split"},
)
def demo_cloud(c, run="", n="", limit=""):
    """The whole chain on this machine: a fake of Lambda's API, a simulated instance, the real images; nothing is billed."""
    _become(
        c, sys.executable, "-m", "tests.fake_lambda.demo", *_options(run=run, limit=limit), *(["-n", n] if n else [])
    )


def _contained(c, image, run, words, gpus=False, secret=()):
    """`fractal run` in one of our images; its exit code is ours."""
    from fractal.cloud.options import secret_values
    from fractal.images import containers

    if c.config.run.dry:
        print(f"containers of {image} and sandbox: fractal run --run {run} {' '.join(map(str, words))}")
        return
    _do(lambda: containers.run_stages(image, Path(run), words, gpus=gpus, secrets=secret_values(secret)))


def _do(work, what="image"):
    """Run it; what goes wrong is one line and our exit code."""
    from fractal import console

    if code := console.report_errors(work, what):
        raise Exit(code=code)


WORK_HELP = {**RUN_HELP, "problems": "starter, mbpp, mbpp-sanitized or a file", "model": "folder or hub id",
             "n": "samples per problem", "split": "as train,validation", "limit": "problems of each split",
             "secret": "names of environment variables here that the job gets, as WANDB_API_KEY",
             "more": "further options of fractal run, as --more='--seed 1 --temperature 0.6'"}  # fmt: skip


@task(positional=[], iterable=["secret"], help={**WORK_HELP,
                           "image": "there: pipeline (default) or pipeline-cpu; here: run in this image beside a sandbox container",
                           "gpus": "here, with --image: all of the machine's GPUs; default: if there are any",
                           "where": "lambda, here, or auto: the rented instance if one is rented",
                           "terminate": "end the instance after the run, on every way out"})  # fmt: skip
def run(c, run="runs/default", stage="all", problems="", model="", n="", split="", limit="", more="", image="", gpus=False,
        secret=None, where="auto", terminate=False):  # fmt: skip
    """Run the stages, on the rented instance if one is rented, else here; what is done is not repeated.

    Examples: invoke launch build push run --stage=all --terminate; invoke run --problems=mbpp -n 50; invoke run --where=here
    Over there the job goes on if this command ends; the same command, or invoke logs --follow, goes on following it.
    """
    from fractal.cloud.options import more_arguments, run_request

    options = dict(run=run, stage=stage, problems=problems, model=model, n=n, split=split, limit=limit, more=more,
                   image=image, secret=secret, terminate=terminate, where=where)  # fmt: skip
    if _session().runs_on_instance(where):
        if c.config.run.dry:
            arguments = " ".join(run_request(options, _session().pipeline).arguments)
            print(f"run: on the rented instance, {image or 'pipeline'}: fractal run --run {run} {arguments}")
            return
        from fractal.cloud import run_commands

        _do(lambda: run_commands.run(_session(), options), "run")
        return
    given = [*_options(problems=problems, model=model, n=n, split=split, limit=limit), *more_arguments(more)]
    if image:
        _contained(c, image, run, ["--stage", stage, *given], gpus, secret)
        return
    _fractal(c, "run", "--run", run, "--stage", stage, *given)


@task(positional=[], help={"run": "a run folder; or give the three files", "problems": "problems file",
                           "samples": "samples file, ours or of HumanEval and EvalPlus; .gz too", "out": "labels file",
                           "cpu": "CPU seconds a program may use", "wall": "wall seconds a program may take",
                           "memory": "MiB a program may use", "slots": "programs at once",
                           "cache": "run identical programs once; --no-cache: each"})  # fmt: skip
def verify(c, run="", problems="", samples="", out="", cpu="", wall="", memory="", slots="", cache=True):
    """The hard verifier alone.

    Example: invoke verify --problems=problems.jsonl --samples=samples.jsonl --out=labels.jsonl --cpu=2 --slots=4
    Or of a run: invoke verify --run=runs/demo. Stopped at any moment, the same command goes on.
    """
    given = _options(run=run, problems=problems, samples=samples, out=out, cpu=cpu, wall=wall, memory=memory)
    _fractal(c, "verify", *given, *_options(slots=slots), *([] if cache else ["--no-cache"]))


@task(positional=[], help={"what": "verify, images, generate, critic, or gpu: all of a GPU in one file", "problems": "mbpp, or a file; default: ../shared/mbpp/mbpp.jsonl, else mbpp",
                           "generations": "completions of a model; default: ../shared/generations/*.jsonl.gz, if there",
                           "samples_count": "samples in all; default 1500", "rounds": "turns of each contestant; default 3",
                           "seed": "of samples and orders; default 0",
                           "limit": "seconds for each sample; default 3; generate, critic: problems of each split; default 16 and 4",
                           "model": "generate, critic: a folder or hub id; default: the embedded small one",
                           "n": "generate, critic: samples a problem; default 4 and 6",
                           "workers": "samples at once; default: the cores", "only": "contestants, as fractal,plain,raw",
                           "turn": "seconds that a slow contestant may take a round, about; default 30",
                           "runtime": "a second container runtime for Fractal, such as runsc", "quick": "a smoke run",
                           "linear": "Fractal alone at growing numbers of samples: seconds and memory",
                           "counts": "those numbers; default 1000,10000,100000", "out": "folder of the JSON files",
                           "image": "images, or all; default sandbox,pipeline-cpu", "cold": "images: also all anew",
                           "instant": "generate: a model that answers at once: what Python costs",
                           "engines": "generate: engines of the contestant several; default 2"})  # fmt: skip
def bench(c, what="verify", problems="", generations="", samples_count="", rounds="", seed="", limit="", workers="",
          only="", turn="", runtime="", quick=False, linear=False, counts="", out="", image="", cold=False, model="", n="",
          instant=False, engines=""):  # fmt: skip
    """Measure, in one run: verifier against other harnesses, images' cost, generator against bare vLLM, critic's speed.

    The figures go to runs/bench.
    """
    if what not in BENCHES:
        raise Exit(f"bench: unknown --what={what}; known: {', '.join(BENCHES)}.", code=2)
    given = _options(problems=problems, generations=generations, samples_count=samples_count, rounds=rounds, seed=seed,
                     limit=limit, workers=workers, only=only, turn=turn, runtime=runtime, counts=counts, out=out, image=image,
                     model=model, n=n, engines=engines)  # fmt: skip
    flags = {"--quick": quick, "--linear": linear, "--cold": cold, "--instant": instant}
    given += [word for word, wanted in flags.items() if wanted]
    _become(c, sys.executable, ROOT / f"benchmarks/{what}.py", *given)


TEST_SETS = {
    "fast": "not docker and not sandbox and not model and not long and not gpu and not cloud",
    "everyday": "not long",
    "long": "long",
    "all": "",
}


@task(positional=[], help={"all": "the everyday set and the long one", "long": "the long set alone",
                           "fast": "only what needs no Docker and no model", "keyword": "pytest's -k",
                           "workers": "tests at once; default 2, as tests of rented machines mostly wait",
                           "durations": "write each test's seconds to this JSON file, as tests/durations.json",
                           "image": "inside this image, without network, beside a sandbox container, as pipeline-cpu"})  # fmt: skip
def test(c, all=False, long=False, fast=False, keyword="", workers="2", durations="", image=""):
    """Run the everyday tests that this machine can; those skipped are listed with the reason."""
    chosen = [name for name, given in (("all", all), ("long", long), ("fast", fast)) if given] or ["everyday"]
    if len(chosen) > 1:
        raise Exit(f"test: --{chosen[0]} and --{chosen[1]} exclude each other.", code=2)
    words = ["-m", TEST_SETS[chosen[0]]] if TEST_SETS[chosen[0]] else []
    words += ["-k", keyword] if keyword else []
    words += [f"--durations-file={durations}"] if durations else []
    if image:
        from fractal.images import containers

        _do(lambda: containers.run_tests(image, words))
        return
    if not workers.isdecimal() or int(workers) < 1:
        raise Exit(f"test: --workers={workers} is no number of workers. Give 1 or more.", code=2)
    threads = {}
    if int(workers) > 1:
        words = ["-n", workers, "--dist=loadscope", *words]
        threads["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))
    c.run(shlex.join([sys.executable, "-m", "pytest", *words]), pty=sys.stdout.isatty(), env=threads)


@task
def lint(c):
    """ruff, mypy and shellcheck over the whole of it: what CI runs before the tests."""
    scripts = [*sorted(ROOT.glob("[!.]*/**/*.sh")), ROOT / ".ci/run"]
    commands = [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy", "--strict"],
        ["shellcheck", *(str(path.relative_to(ROOT)) for path in scripts)],
    ]
    with c.cd(str(ROOT)):
        for command in commands:
            c.run(shlex.join([str(BIN / command[0]), *command[1:]]))


@task
def doctor(c):
    """Say what this machine can do, each line with its remedy."""
    _fractal(c, "doctor")


# --- the rented instance ------------------------------------------------------------------------------------------------

LAUNCH_HELP = {"type": "instance types, the best first, as gpu_1x_a100_sxm4,gpu_1x_a10",
               "region": "regions, the best first; default: any with capacity", "max_price": "dollars an hour at most",
               "wait_for_capacity": "look for capacity for so many hours", "max_hours": "end it after so many hours; default 4",
               "max_dollars": "end it when it has cost so much", "family": "the image family of the instance, as lambda-stack-24-04",
               "file_system": "attach this one, of the --region: it keeps weights, kernels and inputs for the next instance",
               "register_key": "make an SSH key and register it, without asking",
               "watchdog": "a service on the instance, with your API key in its memory, ends it also while this machine sleeps",
               "idle_minutes": "the watchdog ends it when nothing ran for so long; default 60",
               "guard_minutes": "the watchdog ends it when this machine was not seen for so long; default 720",
               "strict_host_key": "refuse an instance whose image did not take the host key made for it"}  # fmt: skip


@task(positional=[], help=LAUNCH_HELP)
def launch(c, type="", region="", max_price="", wait_for_capacity="", max_hours="4", max_dollars="", family="",
           file_system="", register_key=False, watchdog=False, idle_minutes="", guard_minutes="",
           strict_host_key=False):  # fmt: skip
    """Rent an instance and wait until it is ready. It costs money until `invoke terminate`.

    Examples: invoke launch; invoke launch --type=gpu_1x_a10 --max-price=1 --wait-for-capacity=6; invoke launch build push run
    LAMBDA_API_KEY holds the key. A living instance is used again. A guard ends it at the limits, also without this command.
    """
    from fractal.cloud.options import describe, launch_request

    options = dict(type=type, region=region, max_price=max_price, wait_for_capacity=wait_for_capacity, max_hours=max_hours,
                   max_dollars=max_dollars, family=family, file_system=file_system, register_key=register_key,
                   watchdog=watchdog, idle_minutes=idle_minutes, guard_minutes=guard_minutes,
                   strict_host_key=strict_host_key)  # fmt: skip
    if c.config.run.dry:
        print(f"launch: would rent {describe(launch_request(options))}")
        return
    from fractal.cloud import instance_commands

    _do(lambda: instance_commands.launch(_session(), options), "launch")


@task(positional=[], iterable=["secret"], help={**LAUNCH_HELP, **WORK_HELP, "image": "pipeline (default) or pipeline-cpu",
                           "to": "push by way of this registry; default: FRACTAL_REGISTRY, else over ssh",
                           "on": BUILD_HELP["on"]})  # fmt: skip
def up(c, type="", region="", max_price="", wait_for_capacity="", max_hours="4", max_dollars="", family="", file_system="",
       register_key=False, run="runs/default", stage="all", problems="", model="", n="", split="", limit="", more="",
       image="", secret=None, to="", on="auto", watchdog=False, idle_minutes="", guard_minutes="", strict_host_key=False):  # fmt: skip
    """launch, build, push and run in one; the instance is ended on every way out.

    Example: invoke up --problems=mbpp-sanitized --split=train,validation --model=Qwen/Qwen2.5-Coder-1.5B-Instruct -n 50 --max-dollars=5
    """
    from fractal.cloud.options import describe, launch_request, run_request

    options = dict(type=type, region=region, max_price=max_price, wait_for_capacity=wait_for_capacity, max_hours=max_hours,
                   max_dollars=max_dollars, family=family, file_system=file_system, register_key=register_key,
                   watchdog=watchdog, idle_minutes=idle_minutes, guard_minutes=guard_minutes,
                   strict_host_key=strict_host_key, run=run, stage=stage, problems=problems, model=model, n=n,
                   split=split, limit=limit, more=more, image=image, secret=secret,
                   to=to or os.environ.get("FRACTAL_REGISTRY", ""), on=on, terminate=True)  # fmt: skip
    if c.config.run.dry:
        print(f"up: would rent {describe(launch_request(options))}")
        build(c, image=f"{image or 'pipeline'},sandbox")
        push(c, image=f"{image or 'pipeline'},sandbox", to=to)
        arguments = " ".join(run_request(options, _session().pipeline).arguments)
        print(f"up: fractal run --run {run} {arguments}; then the instance would be ended")
        return
    from fractal.cloud import run_commands

    _do(lambda: run_commands.up(_session(), options), "up")


@task(name="exec", positional=[], iterable=["fetch", "include", "package", "secret"],
      help={"name": "of the folder below runs/; default: from the script and the time", "resume": "go on with the job of this name",
            "fetch": "files that come home as the job makes them, as 'checkpoints_*,*.png'",
            "include": "files to send that git does not track, as 'data/*.jsonl'",
            "package": "Python packages that the image lacks, as wandb==0.28.0", "secret": WORK_HELP["secret"],
            "image": "pipeline (default) or pipeline-cpu", "beside": "start at once; default: after the jobs that are there",
            "terminate": "end the instance after the command, on every way out"})  # fmt: skip
def execute(c, name="", resume="", fetch=None, include=None, package=None, secret=None, image="", beside=False,
            terminate=False):  # fmt: skip
    """Run a command of yours on the rented instance, in the pipeline's image, with the files that git tracks here.

    Examples: invoke exec -- python experiments/train_my_critic.py --lr 1e-4
    invoke exec --fetch='checkpoints_*,*.png' --package=wandb==0.28.0 --secret=WANDB_API_KEY -- python train.py
    invoke launch build push exec --terminate -- python train.py
    It goes on if this command ends: invoke logs --follow. Options may be repeated, or hold several with commas.
    """
    options = dict(command=_command(), name=name, resume=resume, fetch=fetch, include=include, package=package,
                   secret=secret, image=image, beside=beside, terminate=terminate)  # fmt: skip
    if c.config.run.dry:
        print(f"exec: on the rented instance, {image or 'pipeline'}: {shlex.join(options['command'])}")
        return
    from fractal.cloud import exec_commands

    _do(lambda: exec_commands.execute(_session(), options), "exec")


@task(help={"pattern": "a regular expression, as 'Val Acc'", "run": "a run folder; default: all below runs/"})
def grep(c, pattern, run=""):
    """Look for lines in what jobs have printed, here and on the instance. Example: invoke grep 'Val Acc'"""
    from fractal.cloud import exec_commands

    _on_instance(c, "grep", exec_commands.grep, pattern, run)


def _on_instance(c, what, command, *values, **options):
    """One call about the rented instance."""
    if c.config.run.dry:
        print(f"{what}: would ask the rented instance")
        return
    _do(lambda: command(_session(), *values, **options), what)


@task
def wait(c):
    """Run the readiness checks: active, port, host key, ssh, cloud-init, Docker, GPU in a container; repair what can be."""
    from fractal.cloud import instance_commands

    _on_instance(c, "wait", instance_commands.wait)


@task(name="setup-ssh")
def setup_ssh(c):
    """Let `ssh lambda` lead to the instance: an included file, and once one line in ~/.ssh/config."""
    from fractal.cloud import instance_commands

    _on_instance(c, "setup_ssh", instance_commands.setup_ssh)


@task(positional=[], help={"dir": "a folder of this project"})
def sync(c, dir="."):
    """Copy a folder to ~/fractal/src on the instance, without what git ignores. Example: invoke sync --dir=benchmarks"""
    from fractal.cloud import instance_commands

    _on_instance(c, "sync", instance_commands.sync, dir)


@task(positional=[], help={"command": "one command instead of a shell"})
def ssh(c, command=""):
    """A shell on the instance. Example: invoke ssh --command='df -h'"""
    from fractal.cloud import instance_commands

    _on_instance(c, "shell", instance_commands.shell, command)


@task
def ps(c):
    """What is rented, what guards it and what it cost so far; jobs and processes there."""
    from fractal.cloud import instance_commands

    _on_instance(c, "ps", instance_commands.ps)


@task
def gpu(c):
    """nvidia-smi of the instance."""
    from fractal.cloud import instance_commands

    _on_instance(c, "gpu", instance_commands.gpu)


@task(
    positional=[],
    help={"run": "of this run; default: the last job", "job": "as invoke ps names it", "follow": "until it ends"},
)
def logs(c, run="", job="", follow=False):
    """What a job on the instance says. Example: invoke logs -f"""
    from fractal.cloud import run_commands

    _on_instance(c, "logs", run_commands.logs, run, job, follow)


@task(positional=[], help={"run": "a run folder; default: all runs that the instance has"})
def fetch(c, run=""):
    """Bring results home, proven by digest; repeated, it brings what is new."""
    from fractal.cloud import run_commands

    _on_instance(c, "fetch", run_commands.fetch, run)


@task(positional=[], help={"job": "as invoke ps names it; default: all"})
def stop(c, job=""):
    """End the jobs on the instance, also those that wait; what they finished comes home."""
    from fractal.cloud import run_commands

    _on_instance(c, "stop", run_commands.stop, job)


@task
def cost(c):
    """What every instance cost, or costs."""
    from fractal.cloud import instance_commands

    _on_instance(c, "cost", instance_commands.cost)


@task(positional=[], help={"name": "only this one, as invoke ps names it"})
def terminate(c, name=""):
    """End the rented instances."""
    from fractal.cloud import instance_commands

    _on_instance(c, "terminate", instance_commands.terminate, name)


@task(
    positional=[],
    help={
        "yes": "without asking",
        "others": "also instances that another operator of this account rented with Fractal",
    },
)
def reap(c, yes=False, others=False):
    """Find and end instances that nobody owns: of the ledger, or by the name that Fractal gives."""
    from fractal.cloud import instance_commands

    _on_instance(c, "reap", instance_commands.reap, yes=yes, others=others)
