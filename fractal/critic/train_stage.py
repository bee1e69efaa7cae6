"""Stage 3: the train problems' labels -> critic/. Modes: probe (frozen features), lora and full (fine-tuning).

Everything that is fitted or chosen sees train problems only; validation problems are only watched. torch is loaded only
when there is something to train (trainer.py).
"""

import hashlib
from typing import Any

from fractal import console
from fractal.critic import checkpoint
from fractal.critic.training_data import TrainError, labelled_rows
from fractal.critic.training_settings import TrainingSettings
from fractal.errors import InputError
from fractal.generate import models
from fractal.jsonl import encode
from fractal.records import digest_id
from fractal.rundir import RunDir

MODES = ("probe", "lora", "full")


def run(folder: RunDir, base: str | None = None, mode: str = "probe", **settings: Any) -> None:
    """Train the critic, unless it has been trained on the same labels in the same way. Raises TrainError, InputError.

    `settings`: fields of TrainingSettings for lora and full; None means the default.
    """
    if mode not in MODES:
        raise InputError(f"--mode {mode}: unknown; known: {', '.join(MODES)}.")
    given = {name: value for name, value in settings.items() if value is not None}
    if given and mode == "probe":
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(
            f"{options}: of no use with --mode probe, which is convex. Leave them out, or take --mode lora."
        )
    rows = labelled_rows(folder, {"train"})
    if not rows:
        raise TrainError(
            f"{folder.path}: no labelled sample belongs to a train problem, so no critic can be trained. Generate and "
            "verify samples of the train split."
        )
    base = base or folder.manifest["config"].get("generate", {}).get("model")
    if not base:
        raise InputError(
            f"{folder.path}: its manifest does not say which model drew the samples. Name the "
            "critic's own: --base MODEL."
        )
    source = folder.model_path(base)
    files = models.resolve(source)
    folder.keep_model_path(files.name, source)
    facts = b"".join(
        encode((digest_id(s.task_id), s.sample_id, s.code, v.passed, s.sum_logprob, s.tokens)) for _, s, v in rows
    )
    config: dict[str, Any] = {
        "mode": mode,
        "base": files.name,
        "weights_sha256": files.digest,
        "labels_sha256": hashlib.sha256(facts).hexdigest(),
    }
    if mode != "probe":
        config["recipe"] = TrainingSettings(mode=mode, **given).inputs()  # type: ignore[arg-type]
    if _is_trained(folder, config):
        console.say("train: the critic of these labels is there, nothing to do")
        return
    passed = sum(label.passed for _, _, label in rows)
    if passed in (0, len(rows)):
        raise TrainError(
            f"{folder.path}: all {len(rows)} train samples {'pass' if passed else 'fail'}: a critic needs both "
            "kinds. Draw more samples (--n), or take another model or problem set."
        )
    problems = len({problem.task_id for problem, _, _ in rows})
    if problems < 2:
        raise TrainError(f"{folder.path}: only one train problem: a critic needs several.")
    with folder.stage("train", "critic/metrics.jsonl") as entry:
        entry["config"] = config
        console.say(
            f"train: {len(rows)} samples of {problems} train problems, {passed / len(rows):.1%} pass, "
            f"{files.name}, mode {mode}"
        )
        watched = labelled_rows(folder, {"validation"})
        if not watched:
            console.warn(
                "train: no labelled sample belongs to a validation problem, so no epoch has a figure of unseen "
                "problems (Val Acc). Cross-validation and early stopping use train problems, as always."
            )
        from fractal.critic.trainer import ProbeTrainer, TuningTrainer

        trainer = ProbeTrainer if mode == "probe" else TuningTrainer
        trainer(folder.file("critic"), rows, watched, files, config).run()
    folder.manifest["config"]["train"] = config
    folder.save()


def _is_trained(folder: RunDir, config: dict[str, Any]) -> bool:
    """Whether critic/best is whole and was made from these inputs."""
    best = folder.file("critic/best")
    if not (best / checkpoint.INFO_FILE).exists():
        return False
    try:
        return checkpoint.verify(best).inputs == config
    except checkpoint.BrokenCriticError as error:
        console.warn(f"train: {error}")
        return False
