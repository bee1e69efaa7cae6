"""Stage 4: samples and a critic -> scores.jsonl. Loads torch only when there is something to score."""

import math
from pathlib import Path

from fractal import console
from fractal.critic import checkpoint
from fractal.errors import InputError
from fractal.generate import models
from fractal.generate.backends import why_no_vllm
from fractal.install import gpu
from fractal.jsonl import iter_jsonl, read_keys, write_jsonl
from fractal.records import Sample
from fractal.rundir import RunDir

BACKENDS = ("auto", "transformers", "vllm")


def run(folder: RunDir, critic_dir: Path | None = None, backend: str = "auto", base: str | None = None) -> None:
    """Score every sample of the run, unless this critic has done so. Raises InputError."""
    critic_dir = critic_dir or folder.file("critic/best")
    if not critic_dir.is_dir():
        raise InputError(
            f"{critic_dir}: holds no critic. Run `fractal train --run {folder.path}` first, or give --critic."
        )
    info = checkpoint.verify(critic_dir)
    backend = choose_backend(backend, info.mode)
    keys = read_keys(folder.file("samples.jsonl"))
    if not keys:
        raise InputError(f"{folder.path}: has no samples yet. Run `fractal generate --run {folder.path}` first.")
    problems = folder.problems()
    digest = checkpoint.digest(critic_dir)
    previous = folder.manifest["config"].get("score", {})
    done = read_keys(folder.file("scores.jsonl"))
    if previous.get("critic_sha256") == digest and done == keys:
        console.say(f"score: {len(done)} scores are there, nothing to do")
        return
    files = models.resolve(base or folder.model_path(info.base))
    checkpoint.check_base(critic_dir, info, files)
    pairs = [(problems[sample.task_id], sample) for sample in iter_jsonl(folder.file("samples.jsonl"), Sample)]
    with folder.stage("score", "scores.jsonl") as entry:
        from fractal.critic import scorers

        if backend == "vllm":
            logits = scorers.score_by_vllm(critic_dir, files, pairs)
        else:
            logits = scorers.score_by_transformers(critic_dir, files, pairs, folder.file("critic/features"))
        scores = scorers.to_scores(pairs, logits, info)
        wrong = [f"{score.task_id}/{score.sample_id}" for score in scores if not math.isfinite(score.score)]
        if wrong:
            raise InputError(
                f"{critic_dir}: gives no number for {len(wrong)} samples ({', '.join(wrong[:5])}). Train it again."
            )
        write_jsonl(folder.file("scores.jsonl"), scores)
        entry["backend"] = backend
        console.say(f"score: {len(pairs)} samples scored by {critic_dir} ({info.mode} on {info.base}, {backend})")
    folder.manifest["config"]["score"] = {"critic_sha256": digest, "backend": backend}
    folder.save()


def choose_backend(backend: str, mode: str) -> str:
    """vLLM on a GPU where it is installed, for a critic with weights of its own; else transformers.

    A probe reads with the base: what training has read is kept, one pass gives both heads' states, and no engine needs
    to start.
    """
    if backend not in BACKENDS:
        raise InputError(f"--score-backend {backend}: unknown; known: {', '.join(BACKENDS)}.")
    problem = "a probe is read by transformers alone" if mode == "probe" else why_no_vllm()
    if backend == "vllm" and problem:
        raise InputError(f"--score-backend vllm: {problem}. Or take transformers.")
    if backend != "auto":
        return backend
    return "vllm" if gpu.usable() and not problem else "transformers"
