"""Stage 3: the train problems' labels -> critic/. Modes: probe (frozen features, probe.py), lora and full (tune.py).

Problems, never samples, are split: everything that is fitted or chosen (head, layer, ridge, epoch, temperature, weights
beside the log-probability) sees train problems only, so validation and test problems are all new to the critic.
Validation problems are only watched.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fractal import console
from fractal.errors import InputError
from fractal.generate import models
from fractal.jsonl import encode, read_jsonl, unique, write_jsonl, write_whole
from fractal.records import Label, Problem, Sample
from fractal.rundir import RunDir

MODES = ("probe", "lora", "full")

Row = tuple[Problem, Sample, Label]


class TrainError(Exception):
    """The labels do not allow training, or it cannot go on. Exit code 1. `kept`: critic/best is its last good epoch."""

    def __init__(self, text: str, *, kept: bool = False) -> None:
        super().__init__(text)
        self.kept = kept


def labelled(folder: RunDir, splits: set[str]) -> list[Row]:
    """The run's samples of some splits with their labels, in order; `sandbox_error` is no label."""
    problems = folder.problems()
    samples = unique(read_jsonl(folder.file("samples.jsonl"), Sample), folder.file("samples.jsonl"))
    labels = unique(read_jsonl(folder.file("labels.jsonl"), Label), folder.file("labels.jsonl"))
    return [
        (problems[key[0]], samples[key], label)
        for key, label in sorted(labels.items())
        if key in samples and label.status != "sandbox_error" and problems[key[0]].split in splits
    ]


def run(folder: RunDir, base: str | None = None, mode: str = "probe", **recipe: Any) -> None:
    """Train the critic, unless it has been trained on the same labels in the same way. Raises TrainError, InputError.

    `recipe`: fields of tune.Recipe for lora and full; None means the default.
    """
    if mode not in MODES:
        raise InputError(f"--mode {mode}: unknown; known: {', '.join(MODES)}.")
    given = {name: value for name, value in recipe.items() if value is not None}
    if given and mode == "probe":
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(
            f"{options}: of no use with --mode probe, which is convex. Leave them out, or take --mode lora."
        )
    rows = labelled(folder, {"train"})
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
    place = folder.model_path(base)
    files = models.resolve(place)
    folder.keep_model_path(files.name, place)
    facts = b"".join(encode((s.task_id, s.sample_id, s.code, v.passed, s.sum_logprob, s.tokens)) for _, s, v in rows)
    config: dict[str, Any] = {
        "mode": mode,
        "base": files.name,
        "weights_sha256": files.digest,
        "labels_sha256": hashlib.sha256(facts).hexdigest(),
    }
    if mode != "probe":
        from fractal.critic.finetune import Recipe

        config["recipe"] = Recipe(mode=mode, **given).inputs()  # type: ignore[arg-type]
    if _known(folder.file("critic/best")) == config:
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
        console.say(
            f"train: {len(rows)} samples of {len(np.unique(groups))} train problems, {passed.mean():.1%} pass, "
            f"{files.name}, mode {mode}"
        )
        training = _Training(folder, rows, files, config)
        if not training.watched:
            console.warn(
                "train: no labelled sample belongs to a validation problem, so no epoch has a figure of unseen "
                "problems (Val Acc). Cross-validation and early stopping use train problems, as always."
            )
        training.run()
    folder.manifest["config"]["train"] = config
    folder.save()


def _inputs(critic_dir: Path) -> Any:
    """What a critic says that it was made from; None if it says nothing."""
    from fractal.critic import critic

    try:
        return critic.read_about(critic_dir).inputs
    except critic.BrokenCritic:
        return None


def _known(critic_dir: Path) -> Any:
    """What a critic was made from; None if there is none that is whole."""
    from fractal.critic import critic

    if not (critic_dir / "critic.json").exists():
        return None
    try:
        return critic.load(critic_dir)[1].inputs
    except critic.BrokenCritic as error:
        console.warn(f"train: {error}")
        return None


class _Training:
    """One training: its rows, the rows that are watched, and what came of each epoch."""

    def __init__(self, folder: RunDir, rows: list[Row], files: models.ModelFiles, config: dict[str, Any]) -> None:
        from fractal.critic import critic  # torch and transformers: five seconds of import
        from fractal.critic.features import Features

        self.rows, self.files, self.config = rows, files, config
        self.target = folder.file("critic")
        self.target.mkdir(exist_ok=True)
        self.watched = labelled(folder, {"validation"})
        self.features = Features(files.path, files.digest, self.target / "features")
        self.zero = critic.Head(critic.answer_direction(files.path), 0.0)
        self.about = critic.About(
            mode=config["mode"],
            base=files.name,
            weights_sha256=files.digest,
            tokenizer_sha256=critic.tokenizer_digest(files.path),
            depth=self.features.layers[-1],
            inputs=config,
        )
        self.history: list[dict[str, Any]] = []
        # Whoever trains anew with other inputs starts with a clean folder; the same inputs go on.
        epochs = list(self.target.glob("epoch-*"))
        if config["mode"] == "probe" or any(_inputs(one) not in (None, config) for one in epochs):
            for old in epochs:
                shutil.rmtree(old)
            self.target.joinpath("metrics.jsonl").unlink(missing_ok=True)
        self.target.joinpath("splits.json").unlink(missing_ok=True)

    def run(self) -> None:
        self.probe() if self.config["mode"] == "probe" else self.tune()

    # --- probe

    def probe(self) -> None:
        from fractal.critic import critic
        from fractal.critic.probe import EPOCHS, HeadFit, compare_splits, cross_validate

        passed, groups = _truth(self.rows)
        states = self.features.of(_pairs(self.rows))
        seen = self.features.of(_pairs(self.watched)) if self.watched else None
        self.note(0, None, None if seen is None else self.zero.logits(seen[:, -1]))
        chosen = cross_validate(states, passed, groups, self.features.layers, self.zero.weight)
        start = self.zero.weight if chosen.start else None
        write_whole(self.target / "cross_validation.json", json.dumps(chosen.table, indent=1).encode())
        begun = "the zero-shot judge" if chosen.start else "zero"
        console.say(
            f"train: layer {chosen.layer}, ridge {chosen.ridge:g}, from {begun}; held-out train problems: AUC within a "
            f"problem {_figure(chosen.within_auc)}, pooled {_figure(chosen.pooled_auc)}"
        )
        place = chosen.place
        splits = compare_splits(states[:, place], passed, groups, chosen.ridge, start)
        write_whole(self.target / "splits.json", json.dumps(splits, indent=1).encode())
        about = replace(
            self.about,
            depth=chosen.layer,
            temperature=critic.temperature_of(chosen.logits, passed),
            combination=critic.combine(chosen.logits, _mean_logprobs(self.rows), passed, groups),
            figures={
                "within_auc": chosen.within_auc,
                "pooled_auc": chosen.pooled_auc,
                "ridge": chosen.ridge,
                "zero_shot_start": chosen.start,
            },
        )
        fit = HeadFit(states[:, place], passed, groups, chosen.ridge, start)
        for epoch in range(1, EPOCHS + 1):
            value = fit.epoch()
            critic.save(self.target / f"epoch-{epoch}", fit.head(), replace(about, epoch=epoch))
            self.note(epoch, value, None if seen is None else fit.head().logits(seen[:, place]))
        self.finish(EPOCHS, about)  # the last: the loss is convex, nothing is chosen on the validation problems

    # --- lora and full

    def tune(self) -> None:
        from fractal.critic import finetune
        from fractal.critic.critic import Asker, question
        from fractal.critic.features import Asked
        from fractal.selection import metrics

        recipe = finetune.Recipe(**self.config["recipe"])
        passed, groups = _truth(self.rows)
        dev = finetune.dev_problems(groups, recipe.seed)
        if not finetune.mixed_problems(passed[np.isin(groups, list(dev))], groups[np.isin(groups, list(dev))]):
            console.warn(
                "train: too few train problems to hold some out: it does not stop early, and is not calibrated."
            )
            dev = set()
        asker = Asker(self.files.path)
        texts = [(p.task_id, question(p, s.code), v.passed) for p, s, v in self.rows]
        examples = finetune.examples_of(asker, texts, lambda task: task not in dev)
        if len({e.passed for e in examples}) < 2:
            raise TrainError(
                "without the problems held out, all train samples are of one kind. Draw more samples (--n)."
            )
        held = [row for row in self.rows if row[0].task_id in dev]
        asked = {
            name: [Asked(str(i), p.task_id, asker.ids(question(p, s.code))) for i, (p, s, _) in enumerate(rows)]
            for name, rows in (("dev", held), ("watched", self.watched))
        }
        done = finetune.last_epoch(self.target, self.about)
        self.history = [row for row in _history(self.target / "metrics.jsonl") if row["epoch"] <= done]

        def evaluate(judge: finetune.Judge, epoch: int, train_loss: float | None, seconds: float | None) -> bool:
            auc = None
            if held:
                logits = judge.judge(asked["dev"], asker.pad)
                np.save(self.target / f".dev-{epoch}.npy", logits)
                truth, of = _truth(held)
                auc = metrics.within_problem_auc(logits, truth, of.tolist()).auc
            watched = judge.judge(asked["watched"], asker.pad) if self.watched else None
            self.note(epoch, train_loss, watched, auc, seconds)
            return not self.exhausted(recipe.patience)

        try:
            if not self.exhausted(recipe.patience):
                known = {row["epoch"] for row in self.history}
                finetune.fit(examples, self.files, recipe, self.target, self.about, done, known, evaluate)
        except finetune.Diverged as error:
            if best := self.best_epoch():
                self.conclude(best, held)
                raise TrainError(f"{error} critic/best is epoch {best}'s.", kept=True) from error
            raise TrainError(str(error)) from error
        self.conclude(self.best_epoch(), held)

    def exhausted(self, patience: int) -> bool:
        """Whether the last `patience` epochs brought nothing better on the dev problems."""
        values = [row["dev_within_auc"] for row in self.history if row["epoch"]]
        if len(values) <= patience or None in values:
            return False
        stop = bool(max(values[-patience:]) <= max(values[:-patience]))
        if stop:
            console.say(f"train: {patience} epochs without a better AUC on the dev problems: stopped early")
        return stop

    def best_epoch(self) -> int:
        """The epoch with the best AUC on the dev problems; without these, the last one."""
        rows = [
            row for row in self.history if row["epoch"] and (self.target / f"epoch-{row['epoch']}/critic.json").exists()
        ]
        return max(rows, key=lambda row: (row["dev_within_auc"] or 0.0, row["epoch"]))["epoch"] if rows else 0

    def conclude(self, epoch: int, held: list[Row]) -> None:
        """Calibrate the chosen epoch on the dev problems and make it critic/best."""
        from fractal.critic import critic

        about = critic.load(self.target / f"epoch-{epoch}")[1]
        kept = self.target / f".dev-{epoch}.npy"
        if held and kept.exists():
            passed, groups = _truth(held)
            logits = np.load(kept)
            about = replace(
                about,
                temperature=critic.temperature_of(logits, passed),
                combination=critic.combine(logits, _mean_logprobs(held), passed, groups),
                figures={
                    row_name: row[row_name]
                    for row in self.history
                    if row["epoch"] == epoch
                    for row_name in ("dev_within_auc",)
                },
            )
        first = next((row for row in self.history if row["epoch"] == 0), None)
        best = next(row for row in self.history if row["epoch"] == epoch)
        if (
            first
            and None not in (first["dev_within_auc"], best["dev_within_auc"])
            and first["dev_within_auc"] >= best["dev_within_auc"]
        ):
            console.warn(
                "train: on the dev problems no epoch is better than the zero-shot judge "
                f"({_figure(first['dev_within_auc'])}): training has added nothing."
            )
        self.finish(epoch, about)
        for old in self.target.glob(".dev-*.npy"):
            old.unlink()

    # --- both

    def note(
        self,
        epoch: int,
        train_loss: float | None,
        watched: NDArray[np.float64] | None,
        dev_within_auc: float | None = None,
        seconds: float | None = None,
    ) -> None:
        """Record an epoch and say it. `watched`: logits of the validation samples."""
        from fractal.selection import metrics

        row: dict[str, Any] = {
            "epoch": epoch,
            "train_loss": train_loss,
            "val_acc": None,
            "val_within_auc": None,
            "dev_within_auc": dev_within_auc,
            "seconds": seconds,
            "chosen": False,
        }
        if watched is not None:
            truth, groups = _truth(self.watched)
            row["val_acc"] = float(np.mean((watched > 0) == truth))
            row["val_within_auc"] = metrics.within_problem_auc(watched, truth, groups.tolist()).auc
        self.history.append(row)
        write_jsonl(self.target / "metrics.jsonl", self.history)
        held_out = "" if dev_within_auc is None else f", Dev AUC within a problem {_figure(dev_within_auc)}"
        console.say(
            f"Epoch {epoch}{' (zero-shot)' if not epoch else ''}: Train Loss {_figure(train_loss, 4)}, Val Acc "
            f"{_figure(row['val_acc'])}, Val AUC within a problem {_figure(row['val_within_auc'])}{held_out}"
        )

    def finish(self, epoch: int, about: Any) -> None:
        """Make a checkpoint critic/best, whole or not at all."""
        from fractal.critic import critic

        head, _ = critic.load(self.target / f"epoch-{epoch}")
        draft = self.target / ".best"
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(
            self.target / f"epoch-{epoch}", draft, ignore=shutil.ignore_patterns("optimiser.pt"), copy_function=_link
        )
        (draft / "head.safetensors").unlink()  # written anew: not through the link
        critic.save(draft, head, replace(about, epoch=epoch))
        best, old = self.target / "best", self.target / ".old"
        shutil.rmtree(old, ignore_errors=True)
        if best.exists():  # of other inputs, and good until this one is whole
            best.rename(old)
        draft.rename(best)
        shutil.rmtree(old, ignore_errors=True)
        for row in self.history:
            row["chosen"] = row["epoch"] == epoch
        write_jsonl(self.target / "metrics.jsonl", self.history)


def _link(source: str, target: str) -> None:
    """A second name instead of a second copy of gigabytes, where the file system can."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def _pairs(rows: list[Row]) -> list[tuple[Problem, Sample]]:
    return [(problem, sample) for problem, sample, _ in rows]


def _truth(rows: list[Row]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(N,) verdicts and (N,) task ids."""
    passed = np.array([label.passed for _, _, label in rows], dtype=bool)
    return passed, np.array([problem.task_id for problem, _, _ in rows], dtype=np.int64)


def _mean_logprobs(rows: list[Row]) -> NDArray[np.float64]:
    """(N,) log-probability of a token; NaN where the source gave none."""
    return np.array([np.nan if s.mean_logprob is None else s.mean_logprob for _, s, _ in rows])


def _history(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"}")]


def _figure(value: float | None, digits: int = 3) -> str:
    return "\u2013" if value is None else f"{value:.{digits}f}"
