"""Samples that were drawn elsewhere -> a run folder: stage 1 for files of our own or other tools. Draws nothing."""

from collections import Counter
from pathlib import Path

from fractal import console
from fractal.errors import InputError
from fractal.generate import models
from fractal.generate.sample_files import read_samples
from fractal.jsonl import file_digest, write_jsonl
from fractal.problems.sets import ProblemSet
from fractal.rundir import RunDir


def run(folder: RunDir, problem_set: ProblemSet, samples: Path, model: str) -> None:
    """Copy the samples of the chosen problems into samples.jsonl; what the other stages need is recorded.

    `model`: a folder or hub id of the model that drew them: the critic starts from it. Raises InputError; then nothing
    has been written.
    """
    if not samples.is_file():
        raise InputError(f"--samples {samples}: no such file.")
    files = models.resolve(model)
    digest = file_digest(samples).hexdigest()
    known = problem_set.by_id()
    counts: Counter[str] = Counter()
    temperatures: set[float | None] = set()
    with console.quiet("reading the samples"):
        for sample, _ in read_samples(samples, known):
            counts[sample.task_id] += 1
            temperatures.add(sample.temperature)
    chosen = [problem for problem in problem_set.problems if problem.task_id in counts]
    folder.configure("problems", {"name": problem_set.name, "digest": problem_set.digest})
    folder.configure(
        "generate",
        {
            "model": files.name,
            "revision": files.revision,
            "weights_sha256": files.digest,
            "backend": "adopted",
            "samples_sha256": digest,
            "n": max(counts.values()),
            "temperature": temperatures.pop() if len(temperatures) == 1 else None,
        },
    )
    folder.keep_model_path(files.name, model)
    folder.save()
    folder.set_problems(chosen)
    if folder.file("samples.jsonl").exists():
        console.say(f"adopt: {counts.total()} samples are there, nothing to do")
        return
    with folder.stage("adopt", "samples.jsonl"):
        adopted = (file_sample.extracted() for file_sample in read_samples(samples, known))
        write_jsonl(folder.file("samples.jsonl"), adopted)
        missing = len(problem_set.problems) - len(chosen)
        console.say(
            f"adopt: {counts.total()} samples of {len(chosen)} problems from {samples}"
            + (f"; {missing} problems without a sample left out" if missing else "")
        )
