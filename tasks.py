"""The operator's menu: `invoke --list`. Each task is one call; what it does is in fractal/."""

import os
import shlex
import sys
from pathlib import Path

from invoke import Exit, task

ROOT = Path(__file__).parent
BIN = Path(sys.executable).parent
BENCHES = {"verify": "benchmarks/verify.py", "images": "benchmarks/images.py"}
RUN_HELP = {"run": "the run folder", "stage": "all, generate, verify, train, score, select or report"}


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


BUILD_HELP = {"image": "sandbox, pipeline-cpu, pipeline, several with commas, or all",
              "json": "a JSON object for each image: image, digest, seconds, layers_built, bytes",
              "base": "build on this image instead of the recipe's base",
              "ca": "your network's certificates (PEM file): a secret of the build, never in a layer",
              "wheels": "a folder of wheels to take Python packages from", "cache": "--no-cache: build every layer anew"}  # fmt: skip


@task(positional=[], help=BUILD_HELP)
def build(c, image="sandbox", json=False, base="", ca="", wheels="", cache=True):
    """Build an image if the engine does not have it.

    Examples: invoke build; invoke build --image=pipeline-cpu; invoke build --image=all --json
    Settings of pip and apt, SSL_CERT_FILE, FRACTAL_BASE_IMAGE, FRACTAL_WHEELS and FRACTAL_DEBIAN_MIRROR are heard.
    """
    from fractal.images import build as images

    options = images.Options(base or None, Path(ca) if ca else None, Path(wheels) if wheels else None, not cache)
    _do(lambda: images.build_all(image, options, as_json=json, dry=c.config.run.dry))


@task(positional=[], help={"image": "sandbox, pipeline-cpu, pipeline, several with commas, or all",
                           "to": "a registry's prefix, as registry.example/team; default: FRACTAL_REGISTRY",
                           "host": "without a registry: this machine, by OpenSSH, as an alias or user@host; default: lambda",
                           "json": "a JSON object for each image"})  # fmt: skip
def push(c, image="pipeline,sandbox", to="", host="", json=False):
    """Send images to a registry, or over SSH to a machine's own engine; only missing layers travel.

    Examples: invoke push --to=registry.example/team; invoke push --image=pipeline-cpu,sandbox --host=lambda
    Credentials are Docker's (docker login) or ssh's. Interrupted and repeated, it goes on where it stopped.
    """
    from fractal.images import push as images

    to = to or ("" if host else os.environ.get("FRACTAL_REGISTRY", ""))
    _do(lambda: images.push_all(image, to, host or "lambda", as_json=json, dry=c.config.run.dry), "push")


@task(positional=[], help={"json": "a JSON object for each image",
                           "older": "--no-older: remove our images of earlier sources that no container uses"})  # fmt: skip
def images(c, json=False, older=True):
    """What is here of our images, with size and hash, and what a build would do and why."""
    from fractal.images import inventory

    _do(lambda: inventory.show(as_json=json, older=older or c.config.run.dry))


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
    build(c)
    _fractal(c, "run", "--run", "runs/demo", *words)


def _contained(c, image, run, words, gpus=False):
    """`fractal run` in one of our images; its exit code is ours."""
    from fractal.images import containers

    if c.config.run.dry:
        print(f"containers of {image} and sandbox: fractal run --run {run} {' '.join(map(str, words))}")
        return
    _do(lambda: containers.run_stages(image, Path(run), words, gpus=gpus))


def _do(work, what="image"):
    """Run it; what goes wrong is one line and our exit code."""
    from fractal import console

    if code := console.report_errors(work, what):
        raise Exit(code=code)


@task(positional=[], help={**RUN_HELP, "problems": "starter, mbpp, mbpp-sanitized or a file", "model": "folder or hub id",
                           "n": "samples per problem", "split": "as train,validation", "limit": "problems of each split",
                           "image": "run in this image beside a sandbox container, as pipeline-cpu; default: right here",
                           "gpus": "with --image: all of the machine's GPUs; default: if there are any"})  # fmt: skip
def run(c, run="runs/default", stage="all", problems="", model="", n="", split="", limit="", image="", gpus=False):
    """Run the stages on this machine; what is done is not repeated."""
    given = _options(problems=problems, model=model, n=n, split=split, limit=limit)
    if image:
        _contained(c, image, run, ["--stage", stage, *given], gpus)
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


@task(positional=[], help={"what": "verify or images", "problems": "mbpp, or a file; default: ../shared/mbpp/mbpp.jsonl, else mbpp",
                           "generations": "completions of a model; default: ../shared/generations/*.jsonl.gz, if there",
                           "samples_count": "samples in all; default 1500", "rounds": "turns of each contestant; default 3",
                           "seed": "of samples and orders; default 0", "limit": "seconds for each sample; default 3",
                           "workers": "samples at once; default: the cores", "only": "contestants, as fractal,plain,raw",
                           "turn": "seconds that a slow contestant may take a round, about; default 30",
                           "runtime": "a second container runtime for Fractal, such as runsc", "quick": "a smoke run",
                           "linear": "Fractal alone at growing numbers of samples: seconds and memory",
                           "counts": "those numbers; default 1000,10000,100000", "out": "folder of the JSON files",
                           "image": "images, or all; default sandbox,pipeline-cpu", "cold": "images: also all anew"})  # fmt: skip
def bench(c, what="verify", problems="", generations="", samples_count="", rounds="", seed="", limit="", workers="",
          only="", turn="", runtime="", quick=False, linear=False, counts="", out="", image="", cold=False):  # fmt: skip
    """Measure the verifier against other harnesses, or what images cost, in one run; the figures go to runs/bench."""
    if what not in BENCHES:
        raise Exit(f"bench: unknown --what={what}; known: {', '.join(BENCHES)}.", code=2)
    given = _options(problems=problems, generations=generations, samples_count=samples_count, rounds=rounds, seed=seed,
                     limit=limit, workers=workers, only=only, turn=turn, runtime=runtime, counts=counts, out=out, image=image)  # fmt: skip
    given += [word for word, wanted in (("--quick", quick), ("--linear", linear), ("--cold", cold)) if wanted]
    _become(c, sys.executable, ROOT / BENCHES[what], *given)


@task(positional=[], help={"fast": "only what needs no Docker and no model", "keyword": "pytest's -k",
                           "image": "inside this image, without network, beside a sandbox container, as pipeline-cpu"})  # fmt: skip
def test(c, fast=False, keyword="", image=""):
    """Run all tests that this machine can; those skipped are listed with the reason."""
    words = ["-m", "not docker and not sandbox and not model and not slow and not gpu and not cloud"] if fast else []
    words += ["-k", keyword] if keyword else []
    if image:
        from fractal.images import containers

        _do(lambda: containers.run_tests(image, words))
        return
    c.run(shlex.join([sys.executable, "-m", "pytest", *words]), pty=sys.stdout.isatty())


@task
def doctor(c):
    """Say what this machine can do, each line with its remedy."""
    _fractal(c, "doctor")
