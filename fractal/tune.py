"""`--mode lora` and `--mode full`: the language model itself is trained to judge, from the zero-shot judge on.

Loss: binary cross-entropy plus a pairwise term within each problem, so a micro-batch holds programs of one problem.
Some of the train problems (the dev problems) are held out and say when to stop. Each epoch is a folder with weights and
optimiser state: a killed training goes on from the last whole one and, on a CPU, comes to the same weights.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModel

from fractal import console, critic
from fractal.batch import is_out_of_memory, release
from fractal.critic import About, Array, Asker, Flags, Floats, Groups, Head
from fractal.features import Asked, device, read
from fractal.models import ModelFiles, preferred_dtype
from fractal.records import InputError, OutsideError

DEV_SHARE = 0.2  # of the train problems, held out to say when to stop
WARM_UP = 0.1  # of all steps, in which the learning rate rises from 0; then it falls to 0
CLIP = 1.0  # norm of the gradient
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATES = {"lora": 1e-4, "full": 1e-5}
OPTIMISER = "optimiser.pt"


class Diverged(Exception):
    """The loss is no number any more."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the model is trained. Checked when made; raises InputError."""

    mode: Literal["lora", "full"]
    epochs: int = 4
    learning_rate: float | None = None  # default: RATES
    batch_tokens: int = 4096  # padded tokens in one forward pass; out of memory, it is halved once
    problems: int = 8  # whose gradients are added up before a step
    rank: int = 16  # of LoRA's matrices
    patience: int = 2  # epochs without a better dev AUC before it stops
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("epochs", 1, 1000), ("batch_tokens", 64, 1 << 24), ("rank", 1, 1024)):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be from {low} to {high}.")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise InputError(f"--learning-rate {self.learning_rate}: must be above 0 and at most 1.")

    @property
    def rate(self) -> float:
        return self.learning_rate or RATES[self.mode]


@dataclass(frozen=True, slots=True)
class Example:
    """A program with its verdict; the same program drawn again counts in `weight`."""

    task_id: int
    ids: list[int]
    passed: bool
    weight: int


# --- plans: pure ------------------------------------------------------------------------------------------------------


def dev_problems(task_ids: Groups, seed: int = 0, share: float = DEV_SHARE) -> set[int]:
    """Which train problems are held out: a `share` of them, by a hash of the id, so that more problems move none.

    Empty for fewer than five problems.
    """
    known = sorted({int(task) for task in task_ids})
    if len(known) < 5:
        return set()
    order = sorted(known, key=lambda task: hashlib.sha256(f"dev/{seed}/{task}".encode()).digest())
    return set(order[: max(1, round(share * len(known)))])


def micro_batches(examples: list[Example], batch_tokens: int) -> list[list[Example]]:
    """One problem's programs in as few batches as hold `batch_tokens` padded tokens, like lengths together.

    Each batch gets its share of passing and of failing ones, so that pairs are left. A program longer than a batch
    stands alone.
    """
    ordered = sorted(examples, key=lambda one: len(one.ids))
    count = max(1, math.ceil(len(ordered[-1].ids) * len(ordered) / batch_tokens))
    while count < len(ordered):
        kinds = [[one for one in ordered if one.passed is kind] for kind in (True, False)]
        found = [
            [one for kind in kinds for one in kind[len(kind) * i // count : len(kind) * (i + 1) // count]]
            for i in range(count)
        ]
        if all(max(len(one.ids) for one in batch) * len(batch) <= batch_tokens for batch in found if batch):
            return [batch for batch in found if batch]
        count += 1
    return [ordered] if count == 1 else [[one] for one in ordered]


def steps_of_epoch(examples: list[Example], recipe: Recipe, epoch: int) -> list[list[Example]]:
    """The epoch's steps, each with the programs of `recipe.problems` problems; epoch and seed decide the order."""
    by_problem: dict[int, list[Example]] = {}
    for one in examples:
        by_problem.setdefault(one.task_id, []).append(one)
    tasks = sorted(by_problem)
    order = np.random.default_rng([recipe.seed, epoch]).permutation(len(tasks))
    return [
        [one for i in order[start : start + recipe.problems] for one in by_problem[tasks[i]]]
        for start in range(0, len(tasks), recipe.problems)
    ]


def learning_rate(step: int, steps: int, rate: float) -> float:
    """Rises linearly over the first WARM_UP of the steps and then falls linearly to 0; step counts from 0."""
    warm = max(1, round(WARM_UP * steps))
    return rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm + 1))


# --- the model --------------------------------------------------------------------------------------------------------


class Judge:
    """A model that is trained to judge: backbone, head and optimiser."""

    def __init__(self, files: ModelFiles, recipe: Recipe) -> None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(recipe.seed)  # before LoRA's random matrices are made
        self.files, self.recipe = files, recipe
        dtype = preferred_dtype()
        self.cast = recipe.mode == "full" and dtype == "bfloat16"  # weights stay float32, products are bfloat16
        backbone: Any = AutoModel.from_pretrained(
            files.path, dtype=torch.float32 if recipe.mode == "full" else getattr(torch, dtype)
        )
        self.depth = int(backbone.config.num_hidden_layers)
        if recipe.mode == "lora":
            adapter = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, lora_dropout=0.05, target_modules=TARGETS)
            backbone = get_peft_model(backbone, adapter)
        self.backbone = backbone.to(device())
        start = torch.tensor(critic.answer_direction(files.path), device=device())
        self.weight = torch.nn.Parameter(start)
        self.bias = torch.nn.Parameter(torch.zeros((), device=device()))
        self.shift = 0.0  # of the prior (critic.prior_shift): what training with balanced classes leaves out
        self.parameters = [p for p in self.backbone.parameters() if p.requires_grad] + [self.weight, self.bias]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=recipe.rate, weight_decay=0.01)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(device(), torch.bfloat16) if self.cast else nullcontext()

    def logits(self, batch: list[Example], pad: int) -> torch.Tensor:
        """(B,) with gradients."""
        rows = [torch.tensor(one.ids) for one in batch]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(device())  # (B, T)
        last = torch.tensor([len(row) - 1 for row in rows], device=device())
        mask = (torch.arange(padded.shape[1], device=device())[None] <= last[:, None]).long()
        with self.autocast():
            states = self.backbone(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state
        kept = states[torch.arange(len(batch), device=device()), last].float()  # (B, D)
        logits: torch.Tensor = kept @ self.weight + self.bias
        return logits

    def judge(self, asked: list[Asked], pad: int) -> Floats:
        """Logits (N,) without gradients, in the order asked; `key` of each is unique."""
        self.backbone.eval()
        found: dict[str, float] = {}
        head = self.head()
        with self.autocast(), console.bar("held-out problems", len(asked)) as bar:
            for batch, states in read(self.backbone, asked, [self.depth], pad):
                found |= dict(zip([one.key for one in batch], head.logits(states[:, 0].cpu().numpy()), strict=True))
                bar.advance(len(batch))
        return np.array([found[one.key] for one in asked])

    def head(self) -> Head:
        weight: Array = self.weight.detach().float().cpu().numpy().copy()
        return Head(weight, float(self.bias.detach()) + self.shift)

    def save(self, folder: Path, about: About) -> None:
        """Write a checkpoint; it appears whole or not at all."""
        draft = folder.with_name(f".{folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        with console.quiet("writing the checkpoint"):
            self.backbone.save_pretrained(draft)
        (draft / "README.md").unlink(missing_ok=True)  # peft's empty form
        torch.save({"optimiser": self.optimiser.state_dict(), "bias": self.bias.detach()}, draft / OPTIMISER)
        critic.save(draft, self.head(), about)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)

    def restore(self, folder: Path) -> None:
        """Take up a checkpoint that `critic.load` found whole."""
        if self.recipe.mode == "lora":
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self.backbone, load_file(folder / "adapter_model.safetensors"))
        else:
            self.backbone.load_state_dict(critic.weights(folder, "model*.safetensors"))
        state = torch.load(folder / OPTIMISER, map_location=device(), weights_only=True)
        head, _ = critic.load(folder)
        with torch.no_grad():
            self.weight.copy_(torch.tensor(head.weight))
            self.bias.copy_(state["bias"])
        self.optimiser.load_state_dict(state["optimiser"])


def tuned_model(folder: Path, about: About, files: ModelFiles, dtype: str | None = None) -> Any:
    """The backbone of a trained critic, for reading."""
    kind = getattr(torch, dtype or preferred_dtype())
    if about.mode == "full":
        return AutoModel.from_pretrained(folder, dtype=kind).to(device()).eval()
    from peft import PeftModel

    base = AutoModel.from_pretrained(files.path, dtype=kind)
    return PeftModel.from_pretrained(base, folder).merge_and_unload().to(device()).eval()


# --- the loop ---------------------------------------------------------------------------------------------------------


class _Smaller(Exception):
    """Out of memory: once more with half the batch."""


def fit(
    examples: list[Example],
    files: ModelFiles,
    recipe: Recipe,
    target: Path,
    about: About,
    done: int,
    known: set[int],
    evaluate: Callable[[Judge, int, float | None, float | None], bool],
) -> None:
    """Train to the end of the recipe, from epoch `done` on, the last whole checkpoint in `target`; 0 is none.

    `evaluate(judge, epoch, train_loss, seconds)` is told of each epoch that is not in `known` (0 is the untrained
    judge) and says whether to go on. Raises Diverged if the loss is no number; the checkpoints before it stay.
    """
    pad = Asker(files.path).pad
    shift = critic.prior_shift(np.repeat([e.passed for e in examples], [e.weight for e in examples]))
    batch_tokens = recipe.batch_tokens
    while True:
        with console.quiet("loading the critic's model"):
            judge = Judge(files, recipe)
        if done:
            judge.restore(target / f"epoch-{done}")
            console.say(f"train: going on after epoch {done}")
        try:
            if not done and 0 not in known:
                known = known | {0}
                if not evaluate(judge, 0, None, None):
                    return
            judge.shift = shift
            if done and done not in known:  # killed between a checkpoint and its evaluation
                figures = critic.load(target / f"epoch-{done}")[1].figures
                if not evaluate(judge, done, figures["train_loss"], figures["seconds"]):
                    return
            for epoch in range(done + 1, recipe.epochs + 1):
                begin = time.monotonic()
                loss = _epoch(judge, examples, epoch, batch_tokens, pad)
                seconds = time.monotonic() - begin
                figures = {"train_loss": loss, "seconds": round(seconds, 3)}
                judge.save(target / f"epoch-{epoch}", replace(about, epoch=epoch, figures=figures))
                for older in target.glob(f"epoch-*/{OPTIMISER}"):
                    if older.parent.name != f"epoch-{epoch}":
                        critic.forget(older.parent, OPTIMISER)
                done, known = epoch, known | {epoch}
                if not evaluate(judge, epoch, loss, round(seconds, 3)):
                    return
            return
        except _Smaller as error:
            if batch_tokens < recipe.batch_tokens:
                raise OutsideError(
                    f"out of memory while training, also with --batch-tokens {batch_tokens}. Take a smaller --base, "
                    "--mode lora or probe, or a machine with more memory."
                ) from error
            batch_tokens //= 2
            console.warn(f"train: out of memory; this epoch again with --batch-tokens {batch_tokens}")
            del judge
            release()


def last_epoch(target: Path, about: About) -> int:
    """The last epoch with a whole checkpoint, its optimiser state, and the same inputs; 0 if there is none."""
    for folder in sorted(target.glob("epoch-*"), key=lambda one: -_number(one)):
        try:
            _, found = critic.load(folder)
        except critic.BrokenCritic as error:
            console.warn(f"train: {error} Going on from the checkpoint before it.")
            continue
        if found.inputs == about.inputs and (folder / OPTIMISER).exists():
            return _number(folder)
    return 0


def _number(folder: Path) -> int:
    tail = folder.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else 0


def _epoch(judge: Judge, examples: list[Example], epoch: int, batch_tokens: int, pad: int) -> float:
    """One pass over all examples; returns the mean loss over its steps."""
    recipe = judge.recipe
    torch.manual_seed(recipe.seed * 1_000_003 + epoch)  # dropout: the same after a resumption
    judge.backbone.train()
    steps = steps_of_epoch(examples, recipe, epoch)
    share = sum(e.weight for e in examples if e.passed) / sum(e.weight for e in examples)
    losses: list[float] = []
    begin = time.monotonic()
    seen = 0
    with console.bar(f"epoch {epoch}", len(examples)) as bar:
        for number, step in enumerate(steps):
            for group in judge.optimiser.param_groups:
                group["lr"] = learning_rate((epoch - 1) * len(steps) + number, recipe.epochs * len(steps), recipe.rate)
            value = 0.0
            for batch, part in parts(judge, step, share, batch_tokens, pad):
                value += part
                seen += len(batch)
                bar.advance(len(batch), f"loss {value:.3f}, {seen / (time.monotonic() - begin):.1f} samples/s")
            norm = float(torch.nn.utils.clip_grad_norm_(judge.parameters, CLIP))
            if not math.isfinite(value) or not math.isfinite(norm):
                raise Diverged(
                    f"the loss is no number any more (epoch {epoch}, step {number + 1} of {len(steps)}; problems "
                    f"{', '.join(str(t) for t in sorted({e.task_id for e in step})[:8])}). Checkpoints of earlier "
                    f"epochs are kept. Try a lower --learning-rate than {recipe.rate:g}."
                )
            judge.optimiser.step()
            judge.optimiser.zero_grad(set_to_none=True)
            losses.append(value)
    return float(np.mean(losses))


def parts(
    judge: Judge, step: list[Example], share: float, batch_tokens: int, pad: int
) -> Iterator[tuple[list[Example], float]]:
    """Run a step's micro-batches and add up their gradients; yields each with its part of the step's loss."""
    by_problem: dict[int, list[Example]] = {}
    for one in step:
        by_problem.setdefault(one.task_id, []).append(one)
    batches = [batch for problem in by_problem.values() for batch in micro_batches(problem, batch_tokens)]
    total = sum(one.weight for one in step)
    mixed = sum(len({one.passed for one in batch}) == 2 for batch in batches)
    for batch in batches:
        try:
            logits = judge.logits(batch, pad)
            value = batch_loss(logits, batch, share, total, mixed)
            value.backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            judge.optimiser.zero_grad(set_to_none=True)
            raise _Smaller from error
        yield batch, float(value.detach())


def batch_loss(logits: torch.Tensor, batch: list[Example], share: float, total: int, mixed: int) -> torch.Tensor:
    """A micro-batch's part of a step's loss: `critic.loss` with a weight for each example.

    logits (B,) of one problem; `share` of all training samples that pass; `total` weight of the step; `mixed` batches
    of the step that have pairs.
    """
    y = torch.tensor([float(one.passed) for one in batch], device=logits.device)
    w = torch.tensor([float(one.weight) for one in batch], device=logits.device)
    balance = y * 0.5 / share + (1 - y) * 0.5 / (1 - share)
    value = functional.binary_cross_entropy_with_logits(logits, y, weight=w * balance, reduction="sum") / total
    good, bad = y == 1, y == 0
    if good.any() and bad.any():
        gaps = functional.softplus(logits[bad][None, :] - logits[good][:, None])  # (good, bad)
        weights = w[good][:, None] * w[bad][None, :]
        value = value + (gaps * weights).sum() / weights.sum() / mixed
    return value


def examples_of(
    asker: Asker, rows: list[tuple[int, str, bool]], keep: Callable[[int], bool] = lambda task: True
) -> list[Example]:
    """Training examples from (task_id, question, passed): equal questions once, with their number as weight."""
    counts: dict[tuple[int, str, bool], int] = {}
    for row in rows:
        if keep(row[0]):
            counts[row] = counts.get(row, 0) + 1
    return [Example(task, asker.ids(text), passed, count) for (task, text, passed), count in counts.items()]


def mixed_problems(passed: Flags, groups: Groups) -> int:
    return sum(0 < passed[groups == task].mean() < 1 for task in np.unique(groups))
