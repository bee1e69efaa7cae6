"""One training of a critic: its epochs, their figures, and which of them becomes critic/best."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fractal import console
from fractal.critic import checkpoint, finetune
from fractal.critic.arrays import Flags, Floats, Groups
from fractal.critic.batching import dev_problems, examples_of, mixed_problems
from fractal.critic.checkpoint import CriticInfo
from fractal.critic.features import Features
from fractal.critic.head import zero_shot_head
from fractal.critic.held_out import fit_combination, fit_temperature, within_problem_auc
from fractal.critic.probe import EPOCHS, HeadFit, compare_splits, cross_validate
from fractal.critic.prompt import PromptTokenizer, question, tokenizer_digest
from fractal.critic.training_data import Row, TrainError
from fractal.critic.training_settings import TrainingSettings
from fractal.generate.models import ModelFiles
from fractal.jsonl import read_jsonl, write_jsonl, write_whole
from fractal.records import Problem, Sample, task_order


class Trainer:
    """What probe and fine-tuning share: the rows, the watched rows, and the figures of each epoch.

    A training with other inputs than the last one starts with no checkpoints; critic/best stays until the new critic
    is whole.
    """

    def __init__(
        self, folder: Path, rows: list[Row], watched: list[Row], files: ModelFiles, config: dict[str, Any]
    ) -> None:
        self.rows, self.watched, self.files, self.config = rows, watched, files, config
        self.folder = folder
        self.folder.mkdir(exist_ok=True)
        self.features = Features(files.path, files.digest, folder / "features")
        self.info = CriticInfo(
            mode=config["mode"],
            base=files.name,
            weights_sha256=files.digest,
            tokenizer_sha256=tokenizer_digest(files.path),
            depth=self.features.layers[-1],
            inputs=config,
        )
        self.history: list[dict[str, Any]] = []  # the rows of metrics.jsonl
        epochs = list(folder.glob("epoch-*"))
        if config["mode"] == "probe" or any(_inputs(epoch) not in (None, config) for epoch in epochs):
            for epoch in epochs:
                shutil.rmtree(epoch)
            folder.joinpath("metrics.jsonl").unlink(missing_ok=True)
        folder.joinpath("splits.json").unlink(missing_ok=True)

    def record(
        self,
        epoch: int,
        watched: Floats | None,
        train_loss: float | None = None,
        dev_within_auc: float | None = None,
        seconds: float | None = None,
    ) -> None:
        """Write an epoch's figures to metrics.jsonl, and report them. `watched`: logits of the validation samples."""
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
            passed, groups = _passed_and_groups(self.watched)
            row["val_acc"] = float(np.mean((watched > 0) == passed))
            row["val_within_auc"] = within_problem_auc(watched, passed, groups)
        self.history.append(row)
        write_jsonl(self.folder / "metrics.jsonl", self.history)
        dev = "" if dev_within_auc is None else f", Dev AUC within a problem {_figure(dev_within_auc)}"
        console.say(
            f"Epoch {epoch}{' (zero-shot)' if not epoch else ''}: Train Loss {_figure(train_loss, 4)}, Val Acc "
            f"{_figure(row['val_acc'])}, Val AUC within a problem {_figure(row['val_within_auc'])}{dev}"
        )

    def make_best(self, epoch: int) -> None:
        """Make an epoch's checkpoint critic/best, whole or not at all."""
        checkpoint.verify(self.folder / f"epoch-{epoch}")
        draft = self.folder / ".best"
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(self.folder / f"epoch-{epoch}", draft, copy_function=_link)
        checkpoint.remove_file(draft, finetune.OPTIMISER)  # critic.json is replaced, not written through the link
        best, previous = self.folder / "best", self.folder / ".old"
        shutil.rmtree(previous, ignore_errors=True)
        if best.exists():
            best.rename(previous)
        draft.rename(best)
        shutil.rmtree(previous, ignore_errors=True)
        for row in self.history:
            row["chosen"] = row["epoch"] == epoch
        write_jsonl(self.folder / "metrics.jsonl", self.history)


class ProbeTrainer(Trainer):
    """Mode probe: cross-validation chooses layer and ridge, then one convex fit (probe.py)."""

    def run(self) -> None:
        passed, groups = _passed_and_groups(self.rows)
        states = self.features.of(_pairs(self.rows))
        watched = self.features.of(_pairs(self.watched)) if self.watched else None
        zero_shot = zero_shot_head(self.files.path)
        self.record(0, None if watched is None else zero_shot.logits(watched[:, -1]))
        chosen = cross_validate(states, passed, groups, self.features.layers, zero_shot.weight)
        start = zero_shot.weight if chosen.start else None
        console.say(
            f"train: layer {chosen.layer}, ridge {chosen.ridge:g}, from "
            f"{'the zero-shot critic' if chosen.start else 'zero'}; held-out train problems: AUC within a problem "
            f"{_figure(chosen.within_auc)}, pooled {_figure(chosen.pooled_auc)}"
        )
        of_layer = states[:, chosen.index]
        splits = compare_splits(of_layer, passed, groups, chosen.ridge, start)
        write_whole(self.folder / "splits.json", json.dumps(splits, indent=1).encode())
        info = replace(
            self.info,
            depth=chosen.layer,
            temperature=fit_temperature(chosen.logits, passed),
            combination=fit_combination(chosen.logits, _mean_logprobs(self.rows), passed, groups),
            figures={
                "within_auc": chosen.within_auc,
                "pooled_auc": chosen.pooled_auc,
                "ridge": chosen.ridge,
                "zero_shot_start": chosen.start,
            },
        )
        fit = HeadFit(of_layer, passed, groups, chosen.ridge, start)
        for epoch in range(1, EPOCHS + 1):
            train_loss = fit.epoch()
            checkpoint.save(self.folder / f"epoch-{epoch}", fit.head(), replace(info, epoch=epoch))
            self.record(epoch, None if watched is None else fit.head().logits(watched[:, chosen.index]), train_loss)
        self.make_best(EPOCHS)  # the last: the loss is convex, nothing is chosen on the validation problems


class TuningTrainer(Trainer):
    """Modes lora and full: epochs of finetune.py, stopped by the dev problems."""

    def run(self) -> None:
        settings = TrainingSettings(**self.config["recipe"])
        passed, groups = _passed_and_groups(self.rows)
        dev = dev_problems((problem.task_id for problem, _, _ in self.rows), settings.seed)
        in_dev = np.array([problem.task_id in dev for problem, _, _ in self.rows], dtype=bool)
        if not mixed_problems(passed[in_dev], groups[in_dev]):
            console.warn(
                "train: too few train problems to hold some out: it does not stop early, and is not calibrated."
            )
            dev = set()
        tokenizer = PromptTokenizer(self.files.path)
        texts = [(p.task_id, question(p, s.code), v.passed) for p, s, v in self.rows]
        examples = examples_of(tokenizer, texts, lambda task: task not in dev)
        if len({e.passed for e in examples}) < 2:
            raise TrainError(
                "without the problems held out, all train samples are of one kind. Draw more samples (--n)."
            )
        held_out = [row for row in self.rows if row[0].task_id in dev]
        dev_prompts = tokenizer.prompts(_pairs(held_out))
        watched_prompts = tokenizer.prompts(_pairs(self.watched))
        self.history = read_jsonl(self.folder / "metrics.jsonl", dict)

        def evaluate(model: finetune.TrainableCritic, epoch: int, figures: dict[str, Any]) -> bool:
            self.history = [row for row in self.history if row["epoch"] <= epoch]
            if epoch not in (row["epoch"] for row in self.history):
                dev_auc = None
                if held_out:
                    logits, labels = model.score(dev_prompts, tokenizer.pad), _passed_and_groups(held_out)
                    dev_auc = within_problem_auc(logits, *labels)
                    if epoch:
                        temperature = fit_temperature(logits, labels[0])
                        combination = fit_combination(logits, _mean_logprobs(held_out), *labels)
                        folder = self.folder / f"epoch-{epoch}"
                        checkpoint.update(folder, temperature=temperature, combination=combination)
                watched = model.score(watched_prompts, tokenizer.pad) if self.watched else None
                self.record(epoch, watched, dev_within_auc=dev_auc, **figures)
            return not self.is_exhausted(settings.patience)

        try:
            finetune.fit(examples, self.files, settings, self.folder, self.info, evaluate)
        except finetune.DivergedError as error:
            if best := self.best_epoch():
                self.conclude(best)
                raise TrainError(f"{error} critic/best is epoch {best}'s.", kept=True) from error
            raise TrainError(str(error)) from error
        self.conclude(self.best_epoch())

    def is_exhausted(self, patience: int) -> bool:
        """Whether the last `patience` epochs brought nothing better on the dev problems."""
        values = [row["dev_within_auc"] for row in self.history if row["epoch"]]
        if len(values) <= patience or None in values or max(values[-patience:]) > max(values[:-patience]):
            return False
        console.say(f"train: {patience} epochs without a better AUC on the dev problems: stopped early")
        return True

    def best_epoch(self) -> int:
        """The epoch with the best AUC on the dev problems, without these the last one; 0 if there is none."""
        trained = [row for row in self.history if row["epoch"]]
        return max((row["dev_within_auc"] or 0.0, row["epoch"]) for row in trained)[1] if trained else 0

    def conclude(self, epoch: int) -> None:
        """Make the chosen epoch critic/best."""
        auc_of = {row["epoch"]: row["dev_within_auc"] for row in self.history}
        zero_shot, best = auc_of.get(0), auc_of[epoch]
        if zero_shot is not None and best is not None and zero_shot >= best:
            console.warn(
                "train: on the dev problems no epoch is better than the zero-shot critic "
                f"({_figure(zero_shot)}): training has added nothing."
            )
        self.make_best(epoch)


def _inputs(folder: Path) -> Any:
    """What a checkpoint was made from; None if it does not say."""
    try:
        return checkpoint.read_info(folder).inputs
    except checkpoint.BrokenCriticError:
        return None


def _link(source: str, target: str) -> None:
    """A hard link instead of a copy of gigabytes, where the file system has links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def _pairs(rows: list[Row]) -> list[tuple[Problem, Sample]]:
    return [(problem, sample) for problem, sample, _ in rows]


def _passed_and_groups(rows: list[Row]) -> tuple[Flags, Groups]:
    """(N,) labels and (N,) numbers of the problems, in their natural order."""
    passed = np.array([label.passed for _, _, label in rows], dtype=bool)
    tasks = [problem.task_id for problem, _, _ in rows]
    number = {task: number for number, task in enumerate(sorted(set(tasks), key=task_order))}
    return passed, np.array([number[task] for task in tasks], dtype=np.int64)


def _mean_logprobs(rows: list[Row]) -> Floats:
    """(N,) mean log-probability of a sample's tokens; NaN where the source gave none."""
    return np.array([np.nan if s.mean_logprob is None else s.mean_logprob for _, s, _ in rows])


def _figure(value: float | None, digits: int = 3) -> str:
    return "\u2013" if value is None else f"{value:.{digits}f}"
