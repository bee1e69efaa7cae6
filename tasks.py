"""The operator's menu: `invoke --list`. Each task is one call; what it does is in fractal/."""

import os
import sys
from pathlib import Path

from invoke import task

ROOT = Path(__file__).parent
BIN = Path(sys.executable).parent
RUN_HELP = {"run": "the run folder", "stage": "all, generate, verify, train, score, select or report"}


def _fractal(c, *arguments):
    """Run the command line in place of this process's output; its exit code is ours."""
    command = [str(BIN / "fractal"), *map(str, arguments)]
    if c.config.run.dry:
        print(" ".join(command))
        return
    sys.stdout.flush()
    os.execv(command[0], command)


def _options(**values):
    """Options that were given, as command-line words."""
    return [word for name, value in values.items() if value for word in (f"--{name.replace('_', '-')}", value)]


@task
def build(c):
    """Build the sandbox image if the engine does not have it."""
    c.run(f"{sys.executable} -m fractal.images.build", pty=sys.stdout.isatty())


@task(pre=[build])
def demo(c):
    """The whole pipeline in minutes: 72 starter problems, SmolLM2-135M, 8 samples each, into runs/demo."""
    _fractal(
        c, "run", "--run", "runs/demo", "--problems", "starter", "--n", 8, "--temperature", 0.6, "--max-tokens", 160
    )


@task(positional=[], help={**RUN_HELP, "problems": "starter, mbpp, mbpp-sanitized or a file", "model": "folder or hub id",
                           "n": "samples per problem", "split": "as train,validation", "limit": "problems of each split"})  # fmt: skip
def run(c, run="runs/default", stage="all", problems="", model="", n="", split="", limit=""):
    """Run the stages on this machine; what is done is not repeated."""
    given = _options(problems=problems, model=model, n=n, split=split, limit=limit)
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


@task(positional=[], help={"fast": "only what needs no Docker and no model", "keyword": "pytest's -k"})
def test(c, fast=False, keyword=""):
    """Run all tests that this machine can; those skipped are listed with the reason."""
    words = [sys.executable, "-m", "pytest"]
    if fast:
        words += ["-m", "'not docker and not model and not slow and not gpu and not cloud'"]
    if keyword:
        words += ["-k", f"'{keyword}'"]
    c.run(" ".join(words), pty=sys.stdout.isatty())


@task
def doctor(c):
    """Say what this machine can do, each line with its remedy."""
    _fractal(c, "doctor")
