"""Stage 3: the train problems' labels -> critic/. Fits the scalar head on frozen features (`--mode probe`).

Problems, never samples, are split: the head, its layer, its ridge and its temperature see train problems only, so
validation and test problems are both new to the critic.
"""

import hashlib
import json
import shutil
from typing import Any

import numpy as np

from fractal import console, models
from fractal.records import InputError, Label, Problem, Sample, encode, read_jsonl, unique, write_jsonl, write_whole
from fractal.run import RunDir

MODES = ("probe",)


class TrainError(Exception):
    """The labels do not allow training. Exit code 1."""


def labelled(folder: RunDir, splits: set[str]) -> list[tuple[Problem, Sample, Label]]:
    """The run's samples of some splits with their labels, in order; `sandbox_error` is no label."""
    problems = folder.problems()
    samples = unique(read_jsonl(folder.file("samples.jsonl"), Sample), folder.file("samples.jsonl"))
    labels = unique(read_jsonl(folder.file("labels.jsonl"), Label), folder.file("labels.jsonl"))
    return [
        (problems[key[0]], samples[key], label)
        for key, label in sorted(labels.items())
        if key in samples and label.status != "sandbox_error" and problems[key[0]].split in splits
    ]


def run(folder: RunDir, base: str | None = None, mode: str = "probe") -> None:
    """Train the critic, unless it has been trained on the same labels. Raises TrainError, InputError."""
    if mode not in MODES:
        raise InputError(f"--mode {mode}: unknown; known: {', '.join(MODES)}.")
    rows = labelled(folder, {"train"})
    if not rows:
        raise TrainError(
            f"{folder.path}: no labelled sample belongs to a train problem, so no critic can be trained. Generate and "
            "verify samples of the train split."
        )
    base = base or folder.manifest["config"]["generate"]["model"]
    files = models.resolve(_path_of(folder, base))
    inputs = hashlib.sha256(b"".join(encode((s.task_id, s.sample_id, s.code, v.passed)) for _, s, v in rows))
    config = {"mode": mode, "base": files.name, "weights_sha256": files.digest, "labels_sha256": inputs.hexdigest()}
    done = folder.file("critic/best/config.json")
    if done.exists() and json.loads(done.read_bytes()).get("inputs") == config:
        console.say("train: the critic of these labels is there, nothing to do")
        return
    passed = np.array([v.passed for _, _, v in rows])
    groups = np.array([p.task_id for p, _, _ in rows], dtype=np.int64)
    if passed.all() or not passed.any():
        raise TrainError(
            f"{folder.path}: all {len(rows)} train samples {'pass' if passed.all() else 'fail'}: a critic needs both "
            "kinds. Draw more samples (--n), or take another model or problem set."
        )
    if len(np.unique(groups)) < 2:
        raise TrainError(f"{folder.path}: only one train problem: a critic needs several.")
    with folder.stage("train", "critic/metrics.jsonl") as entry:
        entry["config"] = config
        _train(folder, rows, passed, groups, files, config)
    folder.manifest["config"]["train"] = config
    folder.save()


def _path_of(folder: RunDir, base: str) -> str:
    """A model given as a folder is recorded by its name; the path it had is in the manifest beside it."""
    paths: dict[str, str] = folder.manifest.get("model_paths", {})
    return paths.get(base, base)


def _train(
    folder: RunDir,
    rows: list[tuple[Problem, Sample, Label]],
    passed: Any,
    groups: Any,
    files: models.ModelFiles,
    config: dict[str, Any],
) -> None:
    from fractal import critic, metrics  # torch and transformers: five seconds of import

    console.say(
        f"train: {len(rows)} samples of {len(np.unique(groups))} train problems, {passed.mean():.1%} pass, "
        f"{files.name}, mode {config['mode']}"
    )
    target = folder.file("critic")
    for old in (*target.glob("epoch-*"), target / "best"):
        shutil.rmtree(old, ignore_errors=True)
    features = critic.Features(files.path, files.digest, target / "features")
    states = features.of([(p, s) for p, s, _ in rows])
    held_out = labelled(folder, {"validation"})
    seen = features.of([(p, s) for p, s, _ in held_out]) if held_out else None
    truth = np.array([v.passed for _, _, v in held_out], dtype=bool)
    problems = np.array([p.task_id for p, _, _ in held_out], dtype=np.int64)
    choice = critic.cross_validate(states, passed, groups, features.layers)
    write_whole(target / "cross_validation.json", json.dumps(choice.table, indent=1).encode())
    console.say(
        f"train: layer {features.layers[choice.layer]}, ridge {choice.ridge:g}: held-out train problems: "
        f"AUC within a problem {_figure(choice.within_auc)}, pooled {_figure(choice.pooled_auc)}"
    )
    fit = critic.HeadFit(states, passed, groups, choice.layer, choice.ridge)
    history: list[dict[str, Any]] = []
    about = {"model_layer": features.layers[choice.layer], "cross_validation": critic.about(choice), "inputs": config}
    for epoch in range(1, critic.EPOCHS + 1):
        row: dict[str, Any] = {"epoch": epoch, "train_loss": fit.epoch(), "val_acc": None, "val_within_auc": None}
        head = fit.head(choice.temperature)
        if seen is not None:
            logits = head.logits(seen)
            row["val_acc"] = float(np.mean((logits > 0) == truth))
            row["val_within_auc"] = metrics.within_problem_auc(logits, truth, problems.tolist()).auc
        history.append(row)
        head.save(target / f"epoch-{epoch}", about)
        console.say(
            f"Epoch {epoch}: Train Loss {row['train_loss']:.4f}, Val Acc {_figure(row['val_acc'])}, "
            f"Val AUC within a problem {_figure(row['val_within_auc'])}"
        )
    write_jsonl(target / "metrics.jsonl", history)
    draft = target / ".best"
    shutil.rmtree(draft, ignore_errors=True)
    head.save(draft, about)  # the last epoch: the loss is convex, nothing is chosen on the validation problems
    draft.rename(target / "best")


def _figure(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.3f}"
