"""Stage 4, the soft verifier: samples and a critic -> scores.jsonl. Runs no program."""

import hashlib
import json
from pathlib import Path

import numpy as np

from fractal import console, models, train
from fractal.records import InputError, Sample, Score, read_jsonl, unique, write_jsonl
from fractal.run import RunDir


def run(folder: RunDir, critic_dir: Path | None = None) -> None:
    """Score every sample of the run, unless this critic has done so. Raises InputError."""
    where = critic_dir or folder.file("critic/best")
    if not (where / "head.safetensors").exists() or not (where / "config.json").exists():
        raise InputError(f"{where}: holds no critic. Run `fractal train --run {folder.path}` first, or give --critic.")
    path = folder.file("samples.jsonl")
    samples = unique(read_jsonl(path, Sample), path)
    problems = folder.problems()
    digest = hashlib.sha256(
        (where / "head.safetensors").read_bytes() + (where / "config.json").read_bytes()
    ).hexdigest()
    done = unique(read_jsonl(folder.file("scores.jsonl"), Score), folder.file("scores.jsonl"))
    if folder.manifest["config"].get("score") == {"critic_sha256": digest} and done.keys() == samples.keys():
        console.say(f"score: {len(done)} scores are there, nothing to do")
        return
    inputs = json.loads((where / "config.json").read_bytes())["inputs"]
    files = models.resolve(train._path_of(folder, inputs["base"]))
    if files.digest != inputs["weights_sha256"]:
        raise InputError(f"{where}: was trained on another version of {inputs['base']}: its weights differ now.")
    with folder.stage("score", "scores.jsonl"):
        from fractal import critic

        head = critic.Head.load(where)
        pairs = [(problems[s.task_id], s) for s in samples.values()]
        logits = head.logits(critic.Features(files.path, files.digest, folder.file("critic/features")).of(pairs))
        chances = 1 / (1 + np.exp(-np.clip(logits / head.temperature, -500, 500)))
        write_jsonl(
            folder.file("scores.jsonl"),
            (
                Score(s.task_id, s.sample_id, float(logit), float(chance))
                for (_, s), logit, chance in zip(pairs, logits, chances, strict=True)
            ),
        )
        console.say(f"score: {len(pairs)} samples scored by {where}")
    folder.manifest["config"]["score"] = {"critic_sha256": digest}
    folder.save()
